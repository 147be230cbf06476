"""The paths and their OpenAPI description: what each takes and every answer that it may give.

What the server answers: decisions, problems, what-ifs, plans. The models document it; the answers are plain JSON.

Whatever is refused is answered as `{"error": [{place, value, rule, remedy}, ...]}` with a 4xx code.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.plan import Deployment
from hybridsd_sim.serving.requests import EventSent, EventsSent, QuestionSent, RequestSent

if TYPE_CHECKING:
    from hybridsd_sim.serving.app import Sidecar


MOST_PROBLEMS = 100


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


class Answer(BaseModel):
    """What goes out: exactly these keys."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ProblemAnswer(Answer):
    """One thing wrong with what was sent."""

    place: str
    value: str
    rule: str
    remedy: str


class ErrorAnswer(Answer):
    """Everything wrong with what was sent."""

    error: list[ProblemAnswer]


Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class DecisionAnswer(Answer):
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


class ObservedAnswer(Answer):
    """How many events were taken in."""

    observed: int


class VersionAnswer(Answer):
    """Number of the plan in use: 1 when the server starts, and one more with each that replaces it."""

    version: int


class PlanAnswer(VersionAnswer):
    """The plan in use; `deployment` is what PUT takes."""

    policy: str
    scenario: str
    deployment: dict[str, Any]


class HealthAnswer(Answer):
    """How the server is."""

    status: Literal["alive", "ready", "starting"]


class OptionAnswer(Answer):
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


class WhatIfAnswer(Answer):
    """What would be decided, why, and from what."""

    decision: DecisionAnswer
    why: str
    options: list[OptionAnswer]


class ChoicesAnswer(Answer):
    """What one can ask about: the classes with their own values, and the pools."""

    scenario: str
    policy: str
    version: int
    classes: dict[str, dict[str, Any]]
    pools: list[str]


Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]

Responses = dict[int | str, dict[str, Any]]

WHERE = "#/components/schemas/{model}"

BODIES: Mapping[str, Any] = {
    "RequestSent": RequestSent,
    "EventsSent": EventSent | EventsSent,
    "QuestionSent": QuestionSent,
    "Deployment": Deployment,
}

REFUSALS = {
    400: "The body broke off.",
    401: "The token is missing or wrong.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON by its header.",
    421: "The Host header names another server.",
    422: "What was sent is wrong; nothing has changed.",
    429: "Too many requests; `Retry-After` says how long to wait.",
    500: "Something failed that should not.",
}

WITH_PLAN = {
    "name": "plan", "in": "query", "required": False, "schema": {"type": "boolean"},
    "description": "Whether the answer holds the plan to carry out.",
}  # fmt: skip


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and answers it: nothing is worked out between, for speed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def describe(app: FastAPI, sidecar: Sidecar, *, with_token: bool) -> None:
    """Enter every path with what it takes and answers, and have /openapi.json tell it."""
    app.router.route_class = DirectRoute
    decisions = DecisionAnswer | PlannedDecisionAnswer
    _with_body(app, "POST", "/v1/decide", sidecar.decide, "RequestSent", decisions, parameters=[WITH_PLAN])
    _with_body(app, "POST", "/v1/observe", sidecar.observe, "EventsSent", ObservedAnswer)
    _with_body(app, "PUT", "/v1/plan", sidecar.put_plan, "Deployment", VersionAnswer)
    _with_body(app, "POST", "/v1/whatif", sidecar.what_if, "QuestionSent", WhatIfAnswer)
    _plain(app, "/v1/plan", sidecar.get_plan, _answers(PlanAnswer, 401, 421, 429))
    _plain(app, "/v1/whatif", sidecar.choices, _answers(ChoicesAnswer, 401, 421, 429))
    _plain(app, "/healthz", sidecar.healthy, _answers(HealthAnswer, 421), security=[])
    late: Responses = {503: {"model": HealthAnswer, "description": "It has not started, or is ending."}}
    _plain(app, "/readyz", sidecar.is_ready, _answers(HealthAnswer, 421) | late, security=[])
    text: Responses = {200: {"content": {"text/plain": {}}, "description": "Prometheus text."}}
    _plain(app, "/metrics", sidecar.metrics, _answers(None, 401, 421) | text)
    app.add_api_route("/", sidecar.page, include_in_schema=False)
    app.openapi = lambda: _openapi(app, with_token=with_token)  # type: ignore[method-assign]


def _with_body(app: FastAPI, method: str, path: str, endpoint: Endpoint, body: str, answer: Any, **more: Any) -> None:
    content = {"application/json": {"schema": {"$ref": WHERE.format(model=body)}}}
    app.add_api_route(
        path, endpoint, methods=[method], response_model=None, responses=_answers(answer, *set(REFUSALS) - {500}),
        openapi_extra={"requestBody": {"required": True, "content": content}, **more},
    )  # fmt: skip


def _plain(app: FastAPI, path: str, endpoint: Endpoint, answers: Responses, **more: Any) -> None:
    app.add_api_route(path, endpoint, methods=["GET"], response_model=None, responses=answers, openapi_extra=more)


def _answers(answer: Any, *refusals: int) -> Responses:
    refused: Responses = {
        code: {"model": ErrorAnswer, "description": REFUSALS[code]} for code in (*sorted(refusals), 500)
    }
    return {200: {"model": answer, "description": "Done."}, **refused}


def _openapi(app: FastAPI, *, with_token: bool) -> dict[str, Any]:
    """The description, made once."""
    if not app.openapi_schema:
        known = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schemas = known["components"]["schemas"]
        for name, body in BODIES.items():
            schema = TypeAdapter(body).json_schema(ref_template=WHERE)
            schemas |= schema.pop("$defs", {}) | {name: schema}
        if with_token:
            known["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            known["security"] = [{"token": []}]
        app.openapi_schema = known
    return app.openapi_schema
