"""The cloud endpoint: orders in, answers out with their payloads paced by the asker's network, over HTTP.

`POST /v1/images` waits for the answer as long as the order allows and may be sent again at any time: it is the order's
id that counts. Bodies are small and read within seconds, the number and the rate of orders are limited, and every error
is JSON: `{"error": {"place", "value", "rule", "remedy"}}`. Nothing that a request carries is logged.

A service on a port, inside the event loop of whoever wants it there.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.scheduling import Scheduler
from hybridsd_sim.serving import LOOPBACK, Guard, RefusedError, body_of

from . import messages as endings
from .messages import DIGEST, MEDIA_TYPE, Ended, Error, Order, Refusal, digest_of, head_of, paced
from .messages import Message as Said
from .request import CONTENT_TYPE, ROOM_S, BusyError, Desk, Meters, Settings, Work
from .tasks import Gang
from .worker_pool import Roster

if TYPE_CHECKING:
    from .worker_pool import Crew


_CODES = {"served": 200, "handed_over": 200, "open": 202}

SaidT = TypeVar("SaidT", bound=Said)


def build_service(
    scheduler: Scheduler,
    crew: Crew,
    *,
    gangs: Sequence[Gang] = (),
    token: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    settings: Settings | None = None,
) -> FastAPI:
    """The endpoint of a scheduler and the crew that carries its decisions out, as an ASGI application.

    The crew must be up, and stays its owner's; `gangs` are what it was made of, so that a plan that is swapped in sends
    no worker what it was not made for. With a `token` whoever asks must send it as a bearer token; health and
    readiness are for everybody. `hosts` are the names by which the service may be asked; None is any, for one that
    others than this machine reach. `scheduler.replace_plan` may be called at any time.
    """
    chosen = settings or Settings()
    meters = Meters()
    desk = Desk(Roster(scheduler, crew, gangs), chosen, meters)
    meters.watch("hybridsd_live_workers_up", "Workers that take requests", lambda: len(crew.up()))
    meters.watch("hybridsd_live_plan_version", "Plan that the scheduler follows", lambda: scheduler.version)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.close()

    app = FastAPI(title="hybridsd_sim live", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(_health(crew))
    app.include_router(_images(desk, meters, chosen))
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Guard, token=token, hosts=hosts, answer=_turned_away)
    return app


# ---- Routes ---------------------------------------------------------------------------------------------------------


def _health(crew: Crew) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "up"}

    @router.get("/readyz")
    async def readyz() -> Response:
        """Whether a worker is up."""
        if crew.up():
            return Response('{"status":"ready"}', media_type="application/json")
        problem = Problem("workers", "none up", "an image needs a worker", "Wait until one has loaded its models.")
        return _refusal(503, problem, retry_after_s=1.0)

    return router


def _images(desk: Desk, meters: Meters, settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/images", openapi_extra=_takes(Order))
    async def ask(request: Request) -> Response:
        """Make an image or begin it, and answer when the cloud's part is done; the order may be sent again."""
        received_s = time.monotonic()
        order = await _read(request, Order, settings.max_body_bytes)
        try:
            work = desk.take(order)
        except BusyError as busy:
            problem = Problem("request", "not taken", str(busy), "Send it again a little later.")
            return _refusal(429, problem, retry_after_s=busy.retry_after_s)
        except InputError as error:
            return _refusal(409, error.problems[0])
        await asyncio.wait({work.task}, timeout=order.wait_s)
        return _answered(work, order, received_s, meters)

    @router.get("/v1/images/{name}")
    async def state(name: str) -> Response:
        """How far an image is."""
        answer = _known(desk, name).answer(time.monotonic())
        return _said(_CODES.get(answer.status, 200), answer)

    @router.delete("/v1/images/{name}", status_code=204)
    async def cancel(name: str) -> None:
        """Give an image up: out of the queue, at the next step, or at the edge."""
        _known(desk, name).end(endings.CANCELLED)

    @router.post("/v1/images/{name}/done", status_code=204, openapi_extra=_takes(Ended))
    async def done(name: str, request: Request) -> None:
        """How the edge's part ended; what the scheduler learns from."""
        ended = await _read(request, Ended, settings.max_body_bytes)
        _known(desk, name).close(ended)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(meters.text(), media_type=CONTENT_TYPE)

    return router


def _known(desk: Desk, name: str) -> Work:
    work = desk.find(name)
    if work is None:
        raise RefusedError(404, Problem("id", "unknown", "no such request is under way or kept", "Order it."))
    return work


def _answered(work: Work, order: Order, received_s: float, meters: Meters) -> Response:
    """The answer with its payload, as fast as the asker's link carries it."""
    answer, payload = work.answer(received_s), work.payload
    if work.dropped and answer.status != "unserved":
        problem = Problem("request", "no longer kept", "its payload had to make room for others", "Send it again.")
        return _refusal(503, problem, retry_after_s=ROOM_S)
    if answer.status == "unserved" or not payload:
        code = _CODES.get(answer.status) or endings.ending_of(answer.reason).code
        return _said(code, answer)
    head = head_of(answer)
    headers = {DIGEST: digest_of(head, payload), "content-length": str(len(head) + len(payload))}
    meters.sent_bytes.inc(len(payload))
    ready_s = received_s if work.cloud is None else max(received_s, work.cloud.stop_s)
    return StreamingResponse(_body(head, payload, order, ready_s), headers=headers, media_type=MEDIA_TYPE)


async def _body(head: bytes, payload: bytes, order: Order, start_s: float) -> AsyncIterator[bytes]:
    """The answer's own line goes out at once, as the HTTP head does; the payload is what the link is charged for."""
    yield head
    if order.link is None:
        yield payload
        return
    async for piece in paced(payload, order.link, start_s=start_s):
        yield piece


# ---- Reading and refusing -------------------------------------------------------------------------------------------


def _takes(shape: type[Said]) -> dict[str, Any]:
    """What a route reads, for its OpenAPI entry."""
    content = {"application/json": {"schema": shape.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def _read(request: Request, shape: type[SaidT], most: int) -> SaidT:
    """The body as a message. Raises `RefusedError` where it is too long, too slow or something else."""
    body = await body_of(request, most)
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(422, _misread(error)) from None


def _misread(error: ValidationError) -> Problem:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(["body", *map(str, first["loc"])])
    return Problem(
        place, "missing" if first["type"] == "missing" else first["type"], first["msg"], "See /openapi.json."
    )


def _said(code: int, message: Said, headers: dict[str, str] | None = None) -> Response:
    body = head_of(message)
    return Response(body, code, {**(headers or {}), DIGEST: digest_of(body)}, "application/json")


def _refusal(code: int, problem: Problem, *, retry_after_s: float | None = None) -> Response:
    headers = {} if retry_after_s is None else {"retry-after": str(max(1, round(retry_after_s)))}
    return _said(code, Refusal(error=Error.of(problem), retry_after_s=retry_after_s), headers)


def _turned_away(refused: RefusedError) -> Response:
    response = _refusal(refused.code, refused.problem)
    response.headers.update(refused.headers)
    return response


async def _refused(_: Request, error: RefusedError) -> Response:
    return _turned_away(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """A path or a method that there is not, in the shape of all errors."""
    problem = Problem("request", request.method, error.detail)
    return _turned_away(RefusedError(error.status_code, problem, error.headers))


_STOPPING_S = 5

_LOOK_S = 0.01


@asynccontextmanager
async def served(service: FastAPI, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
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
