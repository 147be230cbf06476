"""Reads what serving systems ask for: bodies of HTTP requests, and the arguments of a call to a served model.

Bodies are requests, events, questions of the what-if page and plans. They are read strictly: numbers are finite and
bounded as in a scenario, unknown keys are refused, and all problems reported. Times are seconds on the server's clock,
which every decision tells as `now_s`; an event without a time happens when it comes.

The arguments of a call belong to the served model and are read leniently: a `Request`, a mapping, an object with
fields or keywords, under this project's names or those of diffusers. In both, what a request leaves out is as its
class has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hybridsd_sim.errors import InputError, Problem, validation_problem
from hybridsd_sim.plan import Request
from hybridsd_sim.scheduling import CloudDone, Event, Outcome, RequestDone, StepDone, WorkerDown, WorkerUp

MOST_EVENTS = 256
"""Events in one message: more would keep decisions waiting."""

MOST_PROBLEMS = 20

Word = Annotated[str, Field(min_length=1, max_length=200)]

Count = Annotated[int, Field(ge=1, le=2**53)]

Seconds = Annotated[float, Field(gt=0, le=1e9)]

Moment = Annotated[float, Field(ge=0, le=1e12)]

Pixels = Annotated[int, Field(ge=64, le=16384, multiple_of=8)]

ReadT = TypeVar("ReadT")

Asked = Request | Mapping[str, Any]
"""A request, or some of its fields by name."""

RequestOf = Callable[[Sequence[Any], Mapping[str, Any]], Asked]
"""What reads a request out of the positional and the keyword arguments of a call."""

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "request_class": ("request_class", "class"),
    "model": ("model",),
    "height_px": ("height_px", "height"),
    "width_px": ("width_px", "width"),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "num_images": ("num_images", "num_images_per_prompt"),
    "sampler": ("sampler",),
    "slo_s": ("slo_s",),
    "quality_floor": ("quality_floor",),
    "priority": ("priority",),
}
"""Fields of a request by the names they go by: ours first, then those of diffusers' pipelines."""

NUMBERS: Mapping[str, Callable[[Any], Any]] = {
    "height_px": int, "width_px": int, "num_inference_steps": int, "num_images": int, "priority": int,
    "guidance_scale": float, "slo_s": float, "quality_floor": float,
}  # fmt: skip


class RequestBody(BaseModel):
    """What comes from outside: nothing unknown, nothing converted, nothing infinite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RequestSent(RequestBody):
    """What a user asks for. Only the class is needed; the rest is as the class has it."""

    request_class: Word
    """Name of a request class of the plan's scenario."""
    model: Word | None = None
    height_px: Pixels | None = None
    width_px: Pixels | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    num_images: Annotated[int, Field(ge=1, le=64)] | None = None
    sampler: Word | None = None
    slo_s: Seconds | None = None
    """Seconds from now to the image that are promised."""
    quality_floor: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lowest CLIP score accepted, 0 to 1."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None

    def of(self, classes: Mapping[str, Request]) -> Request:
        """The request, completed from its class; of an unknown class, only what was given."""
        own = classes.get(self.request_class) or Request(model="", request_class=self.request_class)
        values = self.__dict__
        given = {key: values[key] for key in self.model_fields_set if values[key] is not None}
        return replace(own, **given) if len(given) > 1 else own


class StepDoneSent(RequestBody):
    """One denoising step of a stage took so long."""

    event: Literal["step_done"]
    number: Count
    seconds: Seconds
    stage: Annotated[int, Field(ge=0, le=1000)] = 0

    def of(self, now: float) -> Event:
        return StepDone(self.number, self.seconds, self.stage)


class CloudDoneSent(RequestBody):
    """The worker has done its part and is free."""

    event: Literal["cloud_done"]
    number: Count
    at_s: Moment | None = None

    def of(self, now: float) -> Event:
        return CloudDone(self.number, _moment(self.at_s, now))


class RequestDoneSent(RequestBody):
    """A decision has ended: the image is there, or never will be."""

    event: Literal["request_done"]
    number: Count
    at_s: Moment | None = None
    outcome: Outcome = "served"

    def of(self, now: float) -> Event:
        return RequestDone(self.number, _moment(self.at_s, now), self.outcome)


class WorkerUpSent(RequestBody):
    """A worker of a pool takes requests from now on; without `gpus` it has those of one of the pool's nodes."""

    event: Literal["worker_up"]
    worker: Word
    pool: Word
    at_s: Moment | None = None
    gpus: Annotated[int, Field(ge=1, le=64)] | None = None

    def of(self, now: float) -> Event:
        return WorkerUp(self.worker, self.pool, _moment(self.at_s, now), self.gpus)


class WorkerDownSent(RequestBody):
    """A worker is gone with everything it was given."""

    event: Literal["worker_down"]
    worker: Word
    at_s: Moment | None = None

    def of(self, now: float) -> Event:
        return WorkerDown(self.worker, _moment(self.at_s, now))


def _moment(at_s: float | None, now: float) -> float:
    """When it happened: nothing happens later than its event comes."""
    return now if at_s is None else min(at_s, now)


class QuestionSent(RequestBody):
    """What if a request came while pools are as busy as said?"""

    request: RequestSent
    busy_s: Annotated[dict[Word, Annotated[float, Field(ge=0, le=1e6)]], Field(max_length=100)] = {}
    """Seconds until each pool could begin with a request; pools left out are as they are now."""


EventSent = Annotated[
    StepDoneSent | CloudDoneSent | RequestDoneSent | WorkerUpSent | WorkerDownSent, Field(discriminator="event")
]

EventsSent = Annotated[list[EventSent], Field(min_length=1, max_length=MOST_EVENTS)]

REQUEST: TypeAdapter[RequestSent] = TypeAdapter(RequestSent)

QUESTION: TypeAdapter[QuestionSent] = TypeAdapter(QuestionSent)

EVENT: TypeAdapter[EventSent] = TypeAdapter(EventSent)

EVENTS: TypeAdapter[list[EventSent]] = TypeAdapter(EventsSent)

EVENT_NAMES = {"step_done", "cloud_done", "request_done", "worker_up", "worker_down"}

MODELS: tuple[type[RequestBody], ...] = (
    StepDoneSent, CloudDoneSent, RequestDoneSent, WorkerUpSent, WorkerDownSent, RequestSent, QuestionSent,
)  # fmt: skip

KEYS = [key for model in MODELS for key in model.model_fields]
"""Every key that may be sent, for the nearest to one that may not."""

VALUES = {"json_invalid": "not JSON", "union_tag_not_found": "missing"}
"""What was sent where no part of it is to blame."""


def read(what: TypeAdapter[ReadT], body: bytes) -> ReadT:
    """The body as what it must be. Raises `InputError` with its problems, the first `MOST_PROBLEMS` of them."""
    try:
        return what.validate_json(body)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_context=False)[:MOST_PROBLEMS]:
            found = validation_problem(item, tags=EVENT_NAMES)
            place = _cut(f"body{found.place}" if found.place[:1] in {"", "["} else found.place)
            if item["type"] == "extra_forbidden":
                close = get_close_matches(str(item["loc"][-1]), KEYS, n=1)
                remedy = f"Did you mean {close[0]}?" if close else "Leave it out."
                problems.append(Problem(place, "unknown key", found.rule, remedy))
            else:
                value = VALUES.get(item["type"], found.value)
                problems.append(replace(found, place=place, value=value, remedy="See /openapi.json."))
        raise InputError(problems) from None


def asks_for_plan(query: bytes) -> bool:
    """Whether the query of a decision asks for its plan: `plan=true`. Raises `InputError` for any other query."""
    if query not in {b"", b"plan=true", b"plan=false"}:
        raise InputError(Problem("query", "not understood", "must be plan=true or plan=false", "See /openapi.json."))
    return query == b"plan=true"


def read_events(body: bytes) -> list[EventSent]:
    """One event or a list of them."""
    if body.lstrip()[:1] == b"[":
        return read(EVENTS, body)
    return [read(EVENT, body)]


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_plain(body: bytes, place: str) -> Any:
    """JSON as plain data: no key twice, nothing that is no finite number. Raises `InputError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            msg = "a key stands twice in one object"
            raise ValueError(msg)
        return found

    try:
        return json.loads(body, parse_constant=_finite, parse_float=_finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else _cut(str(error))
        remedy = "Send what GET /v1/plan answers under `deployment`."
        raise InputError(Problem(place, "not JSON", f"must be JSON: {why}", remedy)) from None


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        msg = f"{_cut(text)} is no number"
        raise ValueError(msg)
    return value


def request_fields(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Asked:
    """The request in the first argument of a call, or the fields found there and among the keywords.

    A keyword goes before a field of the first argument, whether that was given by position or by keyword.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, Request) else _fields_of(first) | _fields_of(kwargs)


def complete_request(asked: Asked, own: Mapping[str, Request]) -> Request:
    """The whole request; `own` is what each class asks for by itself.

    A request that names no class is of the only one. Raises `InputError` where there are several, and `ValueError` or
    `TypeError` for fields that are no numbers or no fields of a request.
    """
    if isinstance(asked, Request):
        return asked
    fields = {name: NUMBERS.get(name, str)(value) for name, value in asked.items()}
    if "request_class" not in fields and len(own) > 1:
        rule = f"the plan has several: {', '.join(own)}"
        raise InputError(Problem("request_class", "not given", rule, "Name one in the call, or give request_of."))
    name = fields.pop("request_class", next(iter(own)))
    of_class = own.get(name) or replace(next(iter(own.values())), request_class=name)
    return replace(of_class, **fields)


def _fields_of(source: Any) -> dict[str, Any]:
    """The fields of a request that a mapping or an object has, under the first of their names that is not None."""
    found = {}
    for field, names in SPELLINGS.items():
        values = (source.get(name) if isinstance(source, Mapping) else getattr(source, name, None) for name in names)
        value = next((value for value in values if value is not None), None)
        if value is not None:
            found[field] = value
    return found
