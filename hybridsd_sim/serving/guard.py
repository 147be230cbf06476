"""Who may ask, how often and how much: every request passes here before the application sees it.

In this order: the `Host` header (a page of another site that got its name to point here is turned away), the bearer
token, the rate, which strangers therefore cannot use up; bodies are bounded where they are read. Whatever goes wrong
inside is answered as JSON, and logged by its kind and place, without a word of what the request carried.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import traceback
from collections.abc import Callable, Collection

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridsd_sim.errors import Problem
from hybridsd_sim.serving.answers import RefusedError, refusal

LOG = logging.getLogger("hybridsd_sim.server")

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names under which a server that listens to this machine alone is asked."""

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Answered without a token: they tell nothing of requests, plans or the fleet."""

FREE_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Answered however many requests come: whoever watches the server must not be shut out."""

BODY_S = 10.0
"""Seconds within which a body must be there."""


class RateLimiter:
    """A token bucket: so many requests a second, and as many at once after a quiet second."""

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        self._per_s, self._most = per_s, max(per_s, 1.0)
        self._left, self._clock, self._at_s = self._most, clock, clock()

    def wait_s(self) -> float:
        """0 for a request that may go on, and is counted; else the seconds until the next may."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at_s) * self._per_s)
        self._at_s = now
        if self._left < 1.0:
            return (1.0 - self._left) / self._per_s
        self._left -= 1.0
        return 0.0


class Guard:
    """ASGI middleware that turns away what must not come in, and lets no error out as it is.

    `hosts` are the names that the `Host` header may have; None lets every name pass. Without a `limiter` requests may
    come at any rate. `answer` says what is refused in the application's own shape.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Collection[str] | None,
        limiter: RateLimiter | None = None,
        answer: Callable[[RefusedError], Response] = refusal,
    ) -> None:
        self._app, self._answer = app, answer
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else frozenset(host.encode() for host in hosts)
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refused := self._refused(scope):
            await self._answer(refused)(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 -- nobody outside learns more than that it failed
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "an unknown place"
            LOG.error("%s in %s", type(error).__name__, place)  # noqa: TRY400 -- values might stand in it
            if not begun:
                await self._answer(FAILED)(scope, receive, send)

    def _refused(self, scope: Scope) -> RefusedError | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        path = scope["path"]
        if self._hosts is not None:
            host = headers.get(b"host", b"")
            name, colon, port = host.rpartition(b":")
            if (name if colon and port.isdigit() else host).lower() not in self._hosts:
                return STRANGE_HOST
        if self._token is not None and path not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # The comparison takes as long for a wrong token as for the right one.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                return NO_TOKEN
        if self._limiter is not None and path not in FREE_PATHS and (wait_s := self._limiter.wait_s()):
            return too_many(wait_s)
        return None


FAILED = RefusedError(500, Problem("server", "failed", "this should not have happened", "See the server's log."))

NO_TOKEN = RefusedError(
    401, Problem("Authorization", "missing or wrong", "must hold the token", "Send `Authorization: Bearer TOKEN`."),
    {"WWW-Authenticate": "Bearer"},
)  # fmt: skip

STRANGE_HOST = RefusedError(
    421, Problem("Host", "another name", "must be the name that the server listens by", "Ask it by its address."),
)  # fmt: skip


def too_many(wait_s: float) -> RefusedError:
    """The answer to requests that come too fast."""
    whole_s = max(1, math.ceil(wait_s))
    problem = Problem("requests", "too many", "come faster than the server takes them", f"Wait {whole_s} s.")
    return RefusedError(429, problem, {"Retry-After": str(whole_s)})


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request: JSON by its header, at most so many bytes, all of them within `BODY_S`.

    Raises `RefusedError` for another type (415), too many bytes (413, however they come), a body that breaks off (400)
    and one that is not there in time, its first byte or its last (408).
    """
    headers = request.headers
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(
            415, Problem("Content-Type", "not application/json", "says what the body is", "Send JSON, and say so.")
        )
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > most:
        raise too_large(most)
    parts: list[bytes] = []
    size = 0
    message: Message = {"type": "http.request", "more_body": True}
    try:
        async with asyncio.timeout(BODY_S):
            while message.get("more_body", False) and size <= most:
                message = await request.receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
    except TimeoutError:
        raise RefusedError(408, Problem("body", "incomplete", f"must be there within {BODY_S:g} s"), CLOSE) from None
    if message["type"] == "http.disconnect":
        raise RefusedError(400, Problem("body", "incomplete", "must be sent whole"), CLOSE)
    if size > most:
        raise too_large(most)
    return b"".join(parts)


def too_large(most: int) -> RefusedError:
    """The answer to a body that is too large: what is left of it is not read."""
    return RefusedError(413, Problem("body", "too large", f"has at most {most} bytes", "Send less at a time."), CLOSE)


CLOSE = {"Connection": "close"}
