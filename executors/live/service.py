"""The cloud endpoint over HTTP: requests in, responses out with their payloads paced by the asker's network.

`POST /v1/images` waits for the response as long as the request allows and may be sent again at any time: it is its id
that counts. Bodies are small and read within seconds, the number and the rate of requests are limited, and every error
is JSON: `{"error": {"place", "value", "rule", "remedy"}}`. Nothing that a request carries is logged.

`build_service` makes the application, `run_service` serves it on a port inside the event loop of its caller.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from hybridsd_sim.errors import InputError, Problem, validation_rule
from hybridsd_sim.scheduling import Scheduler
from hybridsd_sim.serving import LOOPBACK, Guard, RefusedError, body_of

from .dispatch import Dispatcher
from .messages import (
    DIGEST,
    MEDIA_TYPE,
    EdgeReport,
    ErrorDetail,
    ErrorResponse,
    ImageRequest,
    Message,
    Reason,
    content_digest,
    encode_head,
    ending_of,
)
from .request import CONTENT_TYPE, RETRY_AFTER_S, BusyError, OpenRequest, OpenRequests, RequestMetrics, ServiceSettings
from .shaping import pace_payload
from .tasks import WorkerSpec
from .worker_pool import ProcessPool

_STOPPING_S = 5

_LOOK_S = 0.01

_CODES = {"served": 200, "handed_over": 200, "open": 202}

MessageT = TypeVar("MessageT", bound=Message)


def build_service(
    scheduler: Scheduler,
    pool: ProcessPool,
    *,
    specs: Sequence[WorkerSpec] = (),
    token: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    settings: ServiceSettings | None = None,
) -> FastAPI:
    """The endpoint of a scheduler and the pool that carries its decisions out, as an ASGI application.

    The pool must be up, and stays its owner's; `specs` are what it was made of, so that a plan that is swapped in sends
    no worker what it was not made for. With a `token` whoever asks must send it as a bearer token; health and
    readiness are for everybody. `hosts` are the names by which the service may be asked; None is any, for one that
    others than this machine reach. `scheduler.replace_plan` may be called at any time.
    """
    chosen = settings or ServiceSettings()
    counters = RequestMetrics()
    open_requests = OpenRequests(Dispatcher(scheduler, pool, specs), chosen, counters)
    counters.watch("hybridsd_live_workers_up", "Workers that take requests", lambda: len(pool.up()))
    counters.watch("hybridsd_live_plan_version", "Plan that the scheduler follows", lambda: scheduler.version)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await open_requests.close()

    app = FastAPI(title="hybridsd_sim live", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(_health(pool))
    app.include_router(_images(open_requests, counters, chosen))
    app.add_middleware(Guard, token=token, hosts=hosts, answer=_refuse)

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, error: RefusedError) -> Response:
        return _refuse(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        """A path or a method that there is not, in the shape of all errors."""
        problem = Problem("request", request.method, error.detail)
        return _refuse(RefusedError(error.status_code, problem, error.headers))

    return app


# ---- Routes ---------------------------------------------------------------------------------------------------------


def _health(pool: ProcessPool) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "up"}

    @router.get("/readyz")
    async def readyz() -> Response:
        """Whether a worker is up."""
        if pool.up():
            return Response('{"status":"ready"}', media_type="application/json")
        problem = Problem("workers", "none up", "an image needs a worker", "Wait until one has loaded its models.")
        return _refusal(503, problem, retry_after_s=1.0)

    return router


def _images(open_requests: OpenRequests, counters: RequestMetrics, settings: ServiceSettings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/images", openapi_extra=_takes(ImageRequest))
    async def ask(request: Request) -> Response:
        """Make an image or begin it, and answer when the cloud's part is done; the request may be sent again."""
        received_s = time.monotonic()
        message = await _read(request, ImageRequest, settings.max_body_bytes)
        try:
            open_request = open_requests.take(message)
        except BusyError as busy:
            problem = Problem("request", "not taken", str(busy), "Send it again a little later.")
            return _refusal(429, problem, retry_after_s=busy.retry_after_s)
        except InputError as error:
            return _refusal(409, error.problems[0])
        await asyncio.wait({open_request.task}, timeout=message.wait_s)
        return respond(open_request, message, received_s, counters)

    @router.get("/v1/images/{name}")
    async def state(name: str) -> Response:
        """How far an image is."""
        answer = _known(open_requests, name).answer(time.monotonic())
        return _respond_json(_CODES.get(answer.status, 200), answer)

    @router.delete("/v1/images/{name}", status_code=204)
    async def cancel(name: str) -> None:
        """Give an image up: out of the queue, at the next step, or at the edge."""
        _known(open_requests, name).end(Reason.CANCELLED)

    @router.post("/v1/images/{name}/done", status_code=204, openapi_extra=_takes(EdgeReport))
    async def done(name: str, request: Request) -> None:
        """How the edge's part ended; what the scheduler learns from."""
        ended = await _read(request, EdgeReport, settings.max_body_bytes)
        _known(open_requests, name).close(ended)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(counters.text(), media_type=CONTENT_TYPE)

    return router


def _known(open_requests: OpenRequests, name: str) -> OpenRequest:
    open_request = open_requests.find(name)
    if open_request is None:
        raise RefusedError(404, Problem("id", "unknown", "no such request is under way or kept", "Order it."))
    return open_request


def respond(open_request: OpenRequest, message: ImageRequest, received_s: float, counters: RequestMetrics) -> Response:
    """The answer with its payload, as fast as the asker's link carries it.

    The link's clock starts when the cloud's part was done, or at `received_s` where the message came later. A payload
    that had to make room is refused with 503 and a time after which to send the request again.
    """
    answer, payload = open_request.answer(received_s), open_request.payload
    if open_request.dropped and answer.status != "unserved":
        problem = Problem("request", "no longer kept", "its payload had to make room for others", "Send it again.")
        return _refusal(503, problem, retry_after_s=RETRY_AFTER_S)
    if answer.status == "unserved" or not payload:
        code = _CODES.get(answer.status) or ending_of(answer.reason).code
        return _respond_json(code, answer)
    head = encode_head(answer)
    headers = {DIGEST: content_digest(head, payload), "content-length": str(len(head) + len(payload))}
    counters.sent_bytes.inc(len(payload))
    ready_s = received_s if open_request.cloud is None else max(received_s, open_request.cloud.stop_s)

    async def body() -> AsyncIterator[bytes]:
        yield head  # at once, as the HTTP head goes; the payload is what the link is charged for
        if message.link is None:
            yield payload
            return
        async for piece in pace_payload(payload, message.link, start_s=ready_s):
            yield piece

    return StreamingResponse(body(), headers=headers, media_type=MEDIA_TYPE)


# ---- Reading and refusing -------------------------------------------------------------------------------------------


def _takes(shape: type[Message]) -> dict[str, Any]:
    """What a route reads, for its OpenAPI entry."""
    content = {"application/json": {"schema": shape.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def _read(request: Request, shape: type[MessageT], most: int) -> MessageT:
    """The body as a message. Raises `RefusedError` where it is too long, too slow or something else."""
    body = await body_of(request, most)
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(["body", *map(str, first["loc"])])
        value = "missing" if first["type"] == "missing" else first["type"]
        raise RefusedError(422, Problem(place, value, validation_rule(first), "See /openapi.json.")) from None


def _respond_json(code: int, message: Message, headers: dict[str, str] | None = None) -> Response:
    body = encode_head(message)
    return Response(body, code, {**(headers or {}), DIGEST: content_digest(body)}, "application/json")


def _refusal(code: int, problem: Problem, *, retry_after_s: float | None = None) -> Response:
    headers = {} if retry_after_s is None else {"retry-after": str(max(1, round(retry_after_s)))}
    return _respond_json(code, ErrorResponse(error=ErrorDetail.of(problem), retry_after_s=retry_after_s), headers)


def _refuse(refused: RefusedError) -> Response:
    response = _refusal(refused.code, refused.problem)
    response.headers.update(refused.headers)
    return response


# ---- On a port ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def run_service(service: FastAPI, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Serve on `listener` for as long as the block lasts, which begins once requests are answered; the running task."""
    config = uvicorn.Config(service, log_level="warning", access_log=False, timeout_graceful_shutdown=_STOPPING_S)
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or running.done()):  # noqa: ASYNC110 -- uvicorn sets a flag and no event
        await asyncio.sleep(_LOOK_S)
    try:
        yield running
    finally:
        server.should_exit = True
        await running


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to who runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
