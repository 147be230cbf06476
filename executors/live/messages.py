"""What client and service say to each other, and the reasons for which a request ends without an image.

A request goes as JSON; a response is a line of JSON with the payload after it. Every response carries the SHA-256 of
its whole body as `Content-Digest` (RFC 9530), so that damage on the way is noticed whatever it hits. It is no
signature: it does not guard against a forger.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hybridsd_sim.errors import HybridSDError, Problem, RunError

from .shaping import Link

Status = Literal["open", "handed_over", "served", "unserved"]

DIGEST = "content-digest"

MEDIA_TYPE = "application/octet-stream"

LONGEST_PROMPT = 8192

Seconds = Annotated[float, Field(ge=0, le=86400)]


class Message(BaseModel):
    """Anything that crosses between client and service: frozen, strict, no unknown fields, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ImageRequest(Message):
    """A request as it is sent. One with a known `id` is not carried out again: it asks after the first one."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """The client's own name for it; nobody else's request may have it."""
    request_class: Annotated[str, Field(min_length=1, max_length=200)]
    """Request class of the plan's scenario."""
    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the first latents."""
    slo_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    """Promised seconds from asking to image; null takes the class's own."""
    link: Link | None = None
    """Network to shape both ways by; null shapes nothing."""
    age_s: Seconds = 0.0
    """Seconds since the user asked."""
    wait_s: Seconds = 20.0
    """Longest to wait for an answer; after that it is `open`, and the request must be sent again."""

    def same_image(self, other: ImageRequest) -> bool:
        """Whether both ask for the same, whenever and over whatever network."""
        return all(getattr(self, name) == getattr(other, name) for name in ("request_class", "prompt", "seed", "slo_s"))


class EdgeReport(Message):
    """How the edge's part of a request ended, and the seconds of its steps."""

    outcome: Literal["served", "failed", "cancelled"] = "served"
    step_s: Annotated[tuple[Seconds, ...], Field(max_length=1000)] = ()


class ImageSettings(Message):
    """An image's size and how it is denoised."""

    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str


class EdgeStage(Message):
    """What is left to the edge: the steps from `start` on by `model`, none if it only decodes, and the decoder."""

    model: str
    vae: str
    start: int
    job: ImageSettings


class WorkerTimes(Message):
    """When a request waited for its worker and held it, on the service's clock, and the seconds of its steps."""

    worker: str
    ready_s: float
    start_s: float
    stop_s: float
    step_s: tuple[float, ...] = ()


class ErrorDetail(Message):
    """One thing wrong, as every error of this project says it."""

    place: str
    value: str
    rule: str
    remedy: str

    @classmethod
    def of(cls, problem: Problem) -> Self:
        return cls(place=problem.place, value=problem.value, rule=problem.rule, remedy=problem.remedy)


class ImageResponse(Message):
    """What became of a request in the cloud, up to now or for good.

    `open`: it is under way. `served`: the payload is the image, a PNG. `handed_over`: `edge` says what is left, and the
    payload is the latent transfer to go on from, empty where the edge begins itself. `unserved`: for the reason given,
    with its error. `received_s` and `answered_s` are those of this exchange, on the service's clock.
    """

    status: Status
    reason: str = ""
    plan: str = ""
    plan_version: int = 0
    cloud: WorkerTimes | None = None
    edge: EdgeStage | None = None
    restarts: int = 0
    steps_done: int = 0
    received_s: float = 0.0
    answered_s: float = 0.0
    error: ErrorDetail | None = None

    @property
    def has_payload(self) -> bool:
        """Whether there is something to send with it: only an edge that begins itself is handed nothing."""
        begun = self.status == "handed_over" and self.edge is not None and self.edge.start > 0
        return self.status == "served" or begun


class ErrorResponse(Message):
    """A request that was not taken: what is wrong with it, or after how many seconds to try again."""

    error: ErrorDetail
    retry_after_s: float | None = None


_RESPONSE: TypeAdapter[ImageResponse | ErrorResponse] = TypeAdapter(ImageResponse | ErrorResponse)


class DamagedResponseError(RunError):
    """An answer arrived otherwise than it was sent."""


def content_digest(*parts: bytes) -> str:
    """The `Content-Digest` (RFC 9530) of a body in parts: SHA-256 in Base64 between colons.

    Parts are hashed one after the other, so that a payload of megabytes is not copied to stand behind its head.
    """
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return f"sha-256=:{b64encode(total.digest()).decode()}:"


def encode_head(answer: Message) -> bytes:
    """The response as the first line of a body.

    What has its default is left out; JSON has no raw line break, so that the payload begins behind the first one.
    """
    return answer.model_dump_json(exclude_defaults=True).encode() + b"\n"


def decode_response(body: bytes, digest: str | None) -> tuple[ImageResponse | ErrorResponse, bytes]:
    """The answer and its payload. Raises `DamagedResponseError` for a body that is not what the service sent.

    `digest` is the `Content-Digest` that came with it; without one nothing is taken. The payload is empty where there
    is none.
    """
    if digest != content_digest(body):
        raise DamagedResponseError(
            f"the answer was damaged: its {len(body)} bytes do not have the digest that came with them"
        )
    head, _, payload = body.partition(b"\n")
    try:
        return _RESPONSE.validate_json(head), payload
    except ValidationError as error:
        raise DamagedResponseError(
            f"the answer is none of this service: {error.error_count()} fields do not fit"
        ) from error


# ---- Endings --------------------------------------------------------------------------------------------------------


class Reason:
    """Why a request ended without an image, in one word; policies have words of their own beside these."""

    CANCELLED = "cancelled"
    DAMAGED = "damaged"
    DEADLINE = "deadline"
    EDGE_LOST = "edge_lost"
    FAILED = "failed"
    NO_EDGE = "no_edge"
    NO_WORKER = "no_worker"
    REFUSED = "refused"
    STOPPED = "stopped"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    WORKER_LOST = "worker_lost"


class Ending(NamedTuple):
    """The HTTP status of an ending, the rule behind it, and what the asker can do."""

    code: int
    rule: str
    remedy: str


_AGAIN = "Ask again later, under another id."

_OPERATOR = "Tell whoever runs the service."

_ENDINGS: Mapping[str, Ending] = {
    Reason.CANCELLED: Ending(409, "the client took it back", "Ask again under another id."),
    Reason.DAMAGED: Ending(
        502, "every copy of the answer was damaged on the way", "Look at what is between client and cloud."
    ),
    Reason.DEADLINE: Ending(504, "its deadline has passed, and the policy serves nobody late", _AGAIN),
    Reason.EDGE_LOST: Ending(500, "the edge's own process died with it too often", "Look at the edge's memory."),
    Reason.FAILED: Ending(500, "it could not be carried out", _OPERATOR),
    Reason.NO_EDGE: Ending(
        500, "the plan leaves steps to the edge, and this client has no device", "Give the client a pool."
    ),
    Reason.NO_WORKER: Ending(503, "no worker that is up can carry out its plan", _AGAIN),
    Reason.REFUSED: Ending(400, "the service did not take it", "See the error that came with it."),
    Reason.STOPPED: Ending(503, "the service is being stopped", _AGAIN),
    Reason.TIMEOUT: Ending(504, "it took longer than any request may", _AGAIN),
    Reason.UNREACHABLE: Ending(503, "the service cannot be reached", "Is it running, and the network up?"),
    Reason.WORKER_LOST: Ending(503, "workers died with it too often", _OPERATOR),
    "unknown_class": Ending(404, "the plan has no such request class", "Name a class of the plan's scenario."),
}

_REJECTED = Ending(503, "the scheduler has no room for it", _AGAIN)


class UnservedError(HybridSDError):
    """A request ends without an image, for this reason; `words` say more than the code does."""

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.words = words


def ending_of(reason: str) -> Ending:
    """What a reason code means; codes of policies that are not in the table reject."""
    return _ENDINGS.get(reason, _REJECTED)


def problem_of(reason: str, words: str = "") -> Problem:
    """A reason code for people."""
    ending = ending_of(reason)
    return Problem("request", words or reason, ending.rule, ending.remedy)
