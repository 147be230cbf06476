"""What goes out: the bodies of answers, and the answers to what is refused.

The models describe the bodies in /openapi.json; what is sent is plain JSON, which nothing validates once more. Whatever
is refused is answered as `{"error": [{place, value, rule, remedy}, ...]}` with a 4xx code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.responses import Response

from hybridsd_sim.errors import HybridSDError, InputError, Problem

MOST_PROBLEMS = 100

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class ResponseBody(BaseModel):
    """What goes out: exactly these keys."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ProblemAnswer(ResponseBody):
    """One thing wrong with what was sent."""

    place: str
    value: str
    rule: str
    remedy: str


class ErrorAnswer(ResponseBody):
    """Everything wrong with what was sent."""

    error: list[ProblemAnswer]


class DecisionAnswer(ResponseBody):
    """What to do with the request. Moments are seconds on the server's clock, where it is `now_s`."""

    action: Literal["run", "queue", "degrade", "reject"]
    reason: str
    """The policy's name, or late, no_candidate, turned_away, certain_late, over_budget, unknown_class, fallback."""
    number: int
    """Handle for events; 0 if there will be none."""
    plan_version: int
    now_s: float
    pool: str | None
    worker: str | None
    device: str | None
    """Edge fleet that takes part."""
    switch_step: int | None
    """First step done at the edge."""
    predicted_start_s: float | None
    predicted_finish_s: float | None
    predicted_finish_interval_s: Interval | None
    deadline_s: float | None
    usd: float | None
    quality: float | None
    """CLIP score in 0..1."""
    quality_interval: Interval | None


class PlannedDecisionAnswer(DecisionAnswer):
    """A decision with the plan to carry out, where `?plan=true` asked for it."""

    plan: dict[str, Any] | None


class ObservedAnswer(ResponseBody):
    """How many events were taken in."""

    observed: int


class VersionAnswer(ResponseBody):
    """Number of the plan in use: 1 when the server starts, and one more with each that replaces it."""

    version: int


class PlanAnswer(VersionAnswer):
    """The plan in use; `deployment` is what PUT takes."""

    policy: str
    scenario: str
    deployment: dict[str, Any]


class HealthAnswer(ResponseBody):
    """How the server is."""

    status: Literal["alive", "ready", "starting"]


class OptionAnswer(ResponseBody):
    """A way to serve the request, and what is predicted of it."""

    plan: str
    pool: str | None
    device: str | None
    degree: int
    switch_step: int
    wait_s: float | None
    """Null where it could never begin."""
    latency_s: float | None
    latency_interval_s: Interval | None
    usd: float | None
    quality: float | None
    quality_interval: Interval | None
    misses: list[str]
    """What it would break of: deadline, quality floor or limits."""
    taken: bool


class WhatIfAnswer(ResponseBody):
    """What would be decided, why, and from what."""

    decision: DecisionAnswer
    why: str
    options: list[OptionAnswer]


class ChoicesAnswer(ResponseBody):
    """What one can ask about: the classes with their own values, and the pools."""

    scenario: str
    policy: str
    version: int
    classes: dict[str, dict[str, Any]]
    pools: list[str]


class RefusedError(HybridSDError):
    """A request that is turned away, with a code of HTTP and headers of its own."""

    def __init__(self, code: int, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        self.code, self.problem, self.headers = code, problem, dict(headers or {})
        super().__init__(str(problem))


class Json(Response):
    """JSON text; a number that JSON has no word for is null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def refusal(refused: RefusedError) -> Response:
    """The answer to a request that is turned away."""
    return problems_answer([refused.problem], refused.code, refused.headers)


def input_answer(error: InputError) -> Response:
    """The answer to input that is wrong."""
    return problems_answer(error.problems[:MOST_PROBLEMS], 422)


def problems_answer(problems: Iterable[Problem], code: int, headers: Mapping[str, str] | None = None) -> Response:
    """Problems as JSON."""
    return Json({"error": [asdict(problem) for problem in problems]}, code, headers)
