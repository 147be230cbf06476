"""Routes and their OpenAPI description: what each takes, and every answer that it may give.

Endpoints take the request and answer it themselves, so that FastAPI does no work for a request; bodies and answers are
described by models all the same, and /openapi.json tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from hybridsd_sim.plan import Deployment
from hybridsd_sim.serving.answers import ErrorAnswer
from hybridsd_sim.serving.requests import EventSent, EventsSent, QuestionSent, RequestSent

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


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and answers it: nothing is worked out between, for speed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def add_body_route(
    app: FastAPI, method: str, path: str, endpoint: Endpoint, body: str, answer: Any, **more: Any
) -> None:
    """Enter a path that takes a JSON body, one of `BODIES`, and may refuse it for every reason there is.

    `more` are further keys of its OpenAPI entry.
    """
    content = {"application/json": {"schema": {"$ref": WHERE.format(model=body)}}}
    app.add_api_route(
        path, endpoint, methods=[method], response_model=None, responses=responses_of(answer, *set(REFUSALS) - {500}),
        openapi_extra={"requestBody": {"required": True, "content": content}, **more},
    )  # fmt: skip


def add_get_route(app: FastAPI, path: str, endpoint: Endpoint, responses: Responses, **more: Any) -> None:
    """Enter a path that is only asked for; `more` are further keys of its OpenAPI entry."""
    app.add_api_route(path, endpoint, methods=["GET"], response_model=None, responses=responses, openapi_extra=more)


def responses_of(answer: Any, *refusals: int) -> Responses:
    """The answer of a route and, by their codes, the refusals that it may give; 500 is always among them."""
    refused: Responses = {
        code: {"model": ErrorAnswer, "description": REFUSALS[code]} for code in (*sorted(refusals), 500)
    }
    return {200: {"model": answer, "description": "Done."}, **refused}


def describe_routes(app: FastAPI, *, with_token: bool) -> None:
    """Have /openapi.json tell the routes, the bodies that they take and, `with_token`, that a bearer token is needed.

    The description is made when it is first asked for.
    """

    def openapi() -> dict[str, Any]:
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

    app.openapi = openapi  # type: ignore[method-assign]
