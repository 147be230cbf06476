"""What client and service say to each other: an order as JSON, an answer as a line of JSON with the payload after it.

Every answer carries the SHA-256 of its whole body as `Content-Digest` (RFC 9530), so that damage on the way is noticed
whatever it hits. It is no signature: it does not guard against a forger.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from executors.live.shaping import Link
from hybridsd_sim.errors import Problem, RunError

Status = Literal["open", "handed_over", "served", "unserved"]
DIGEST = "content-digest"
MEDIA_TYPE = "application/octet-stream"
LONGEST_PROMPT = 8192
Seconds = Annotated[float, Field(ge=0, le=86400)]


class Message(BaseModel):
    """Anything that crosses between client and service: frozen, strict, no unknown fields, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Order(Message):
    """A request as it is sent. An order with a known `id` is not carried out again: it asks after the first one."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """The client's own name for it; nobody else's order may have it."""
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
    """Longest to wait for an answer; after that it is `open`, and the order must be sent again."""

    def same_image(self, other: Order) -> bool:
        """Whether both ask for the same, whenever and over whatever network."""
        return all(getattr(self, name) == getattr(other, name) for name in ("request_class", "prompt", "seed", "slo_s"))


class Ended(Message):
    """How the edge's part of a request ended, and the seconds of its steps."""

    outcome: Literal["served", "failed", "cancelled"] = "served"
    step_s: Annotated[tuple[Seconds, ...], Field(max_length=1000)] = ()


class Job(Message):
    """An image's size and how it is denoised."""

    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str


class EdgePart(Message):
    """What is left to the edge: the steps from `start` on by `model`, none if it only decodes, and the decoder."""

    model: str
    vae: str
    start: int
    job: Job


class Held(Message):
    """When a request waited for its worker and held it, on the service's clock, and the seconds of its steps."""

    worker: str
    ready_s: float
    start_s: float
    stop_s: float
    step_s: tuple[float, ...] = ()


class Error(Message):
    """One thing wrong, as every error of this project says it."""

    place: str
    value: str
    rule: str
    remedy: str

    @classmethod
    def of(cls, problem: Problem) -> Self:
        return cls(place=problem.place, value=problem.value, rule=problem.rule, remedy=problem.remedy)


class Answer(Message):
    """What became of an order in the cloud, up to now or for good.

    `open`: it is under way. `served`: the payload is the image, a PNG. `handed_over`: `edge` says what is left, and the
    payload is the hand-over to go on from, empty where the edge begins itself. `unserved`: for the reason given, with
    its error. `received_s` and `answered_s` are those of this exchange, on the service's clock.
    """

    status: Status
    reason: str = ""
    plan: str = ""
    plan_version: int = 0
    cloud: Held | None = None
    edge: EdgePart | None = None
    restarts: int = 0
    steps_done: int = 0
    received_s: float = 0.0
    answered_s: float = 0.0
    error: Error | None = None

    @property
    def has_payload(self) -> bool:
        """Whether there is something to send with it: only an edge that begins itself is handed nothing."""
        begun = self.status == "handed_over" and self.edge is not None and self.edge.start > 0
        return self.status == "served" or begun


class Refusal(Message):
    """An order that was not taken: what is wrong with it, or after how many seconds to try again."""

    error: Error
    retry_after_s: float | None = None


_SAID: TypeAdapter[Answer | Refusal] = TypeAdapter(Answer | Refusal)


class DamagedError(RunError):
    """An answer arrived otherwise than it was sent."""


def digest_of(*parts: bytes) -> str:
    """The `Content-Digest` of a body in parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return f"sha-256=:{b64encode(total.digest()).decode()}:"


def head_of(answer: Message) -> bytes:
    """The answer as the first line of a body."""
    return answer.model_dump_json(exclude_defaults=True).encode() + b"\n"


def read_answer(body: bytes, digest: str | None) -> tuple[Answer | Refusal, bytes]:
    """The answer and its payload. Raises `DamagedError` for a body that is not what the service sent."""
    if digest != digest_of(body):
        raise DamagedError(f"the answer was damaged: its {len(body)} bytes do not have the digest that came with them")
    head, _, payload = body.partition(b"\n")
    try:
        return _SAID.validate_json(head), payload
    except ValidationError as error:
        raise DamagedError(f"the answer is none of this service: {error.error_count()} fields do not fit") from error
