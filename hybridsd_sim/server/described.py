"""The paths and their OpenAPI description: what each takes and every answer that it may give."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from hybridsd_sim.plan import Deployment
from hybridsd_sim.server.answers import (
    ChoicesAnswer,
    DecisionAnswer,
    ErrorAnswer,
    HealthAnswer,
    ObservedAnswer,
    PlanAnswer,
    PlannedDecisionAnswer,
    VersionAnswer,
    WhatIfAnswer,
)
from hybridsd_sim.server.sent import EventSent, EventsSent, QuestionSent, RequestSent

if TYPE_CHECKING:
    from hybridsd_sim.server.app import Sidecar

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
