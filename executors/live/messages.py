"""How requests end without an image: a code for programs, and place, value, rule and remedy for people.

What client and service say to each other: an order as JSON, an answer as a line of JSON with the payload after it.

Every answer carries the SHA-256 of its whole body as `Content-Digest` (RFC 9530), so that damage on the way is noticed
whatever it hits. It is no signature: it does not guard against a forger.

One request's access network where there is none: half a round trip each way, and bytes no faster than the rate.

Shaped is what an application can shape, the moments at which bytes are given to the connection; what the machine's own
network takes comes on top of that, and disappears in the half round trip where it is shorter.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hybridsd_sim.errors import HybridSDError, Problem, RunError
from hybridsd_sim.profiles import Network

CANCELLED, DAMAGED, DEADLINE, EDGE_LOST, FAILED = "cancelled", "damaged", "deadline", "edge_lost", "failed"

NO_EDGE, NO_WORKER, REFUSED, STOPPED, TIMEOUT = "no_edge", "no_worker", "refused", "stopped", "timeout"

UNREACHABLE, WORKER_LOST = "unreachable", "worker_lost"


class Ending(NamedTuple):
    """The HTTP status of an ending, the rule behind it, and what the asker can do."""

    code: int
    rule: str
    remedy: str


_AGAIN = "Ask again later, under another id."

_OPERATOR = "Tell whoever runs the service."

_ENDINGS: Mapping[str, Ending] = {
    CANCELLED: Ending(409, "the client took it back", "Ask again under another id."),
    DAMAGED: Ending(
        502, "every copy of the answer was damaged on the way", "Look at what is between client and cloud."
    ),
    DEADLINE: Ending(504, "its deadline has passed, and the policy serves nobody late", _AGAIN),
    EDGE_LOST: Ending(500, "the edge's own process died with it too often", "Look at the edge's memory."),
    FAILED: Ending(500, "it could not be carried out", _OPERATOR),
    NO_EDGE: Ending(500, "the plan leaves steps to the edge, and this client has no device", "Give the client a crew."),
    NO_WORKER: Ending(503, "no worker that is up can carry out its plan", _AGAIN),
    REFUSED: Ending(400, "the service did not take it", "See the error that came with it."),
    STOPPED: Ending(503, "the service is being stopped", _AGAIN),
    TIMEOUT: Ending(504, "it took longer than any request may", _AGAIN),
    UNREACHABLE: Ending(503, "the service cannot be reached", "Is it running, and the network up?"),
    WORKER_LOST: Ending(503, "workers died with it too often", _OPERATOR),
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


Clock = Callable[[], float]

Sleep = Callable[[float], Awaitable[object]]

HalfRtt = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]

Rate = Annotated[float, Field(ge=128, allow_inf_nan=False)]

PIECE_S = 0.005
"""About so many seconds of the link go out at a time: shorter than any round trip, longer than a timer's error."""

SMALLEST_PIECE, LARGEST_PIECE = 256, 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network for as long as one request lasts: seconds of half a round trip, and bytes a second each way."""

    half_rtt_s: HalfRtt
    up_bytes_per_s: Rate
    down_bytes_per_s: Rate

    @classmethod
    def drawn(cls, network: Network, *, rate_u: float = 0.5, rtt_u: float = 0.5) -> Link:
        """The link of a user at these quantiles of a class of networks; by default the median one."""
        return cls(
            half_rtt_s=network.rtt_s.at(rtt_u) / 2,
            up_bytes_per_s=network.up_bytes_per_s.at(rate_u),
            down_bytes_per_s=network.down_bytes_per_s.at(rate_u),
        )

    def up_s(self, count: int) -> float:
        """Seconds until the last of `count` bytes sent at once has reached the cloud."""
        return self.half_rtt_s + count / self.up_bytes_per_s

    def down_s(self, count: int) -> float:
        """Seconds until the last of `count` bytes sent at once has reached the edge."""
        return self.half_rtt_s + count / self.down_bytes_per_s


async def until(when_s: float, *, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep) -> None:
    """Wait for a time of the clock; timers that ring too early are set again."""
    while (left_s := when_s - clock()) > 0.0:
        await sleep(left_s)


async def paced(
    data: bytes,
    link: Link,
    *,
    start_s: float | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> AsyncIterator[bytes]:
    """The data in pieces, each at the moment at which its last byte would come out of the link's lower end.

    Sent at `start_s` (None: now), of which at a later time t no more than the rate times t - start_s - half_rtt_s has
    been given out. Whoever takes a piece late gets the next ones without delay until the link's time is caught up with.
    """
    begin_s = (clock() if start_s is None else start_s) + link.half_rtt_s
    rate = link.down_bytes_per_s
    size = min(max(int(rate * PIECE_S), SMALLEST_PIECE), LARGEST_PIECE)
    for first in range(0, len(data), size):
        piece = data[first : first + size]
        await until(begin_s + (first + len(piece)) / rate, clock=clock, sleep=sleep)
        yield piece


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
