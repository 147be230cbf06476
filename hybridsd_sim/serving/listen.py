"""Runs the sidecar: reads the plan, opens the port, and serves until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.scheduling import Scheduler
from hybridsd_sim.serving.app import REQUESTS_PER_S, build_app
from hybridsd_sim.serving.guard import LOOPBACK
from hybridsd_sim.serving.reload import PlanFile

LOG = logging.getLogger("hybridsd_sim.server")

TOKEN = "HYBRIDSD_TOKEN"  # noqa: S105 -- the name of the variable, not what it holds

MOST_HEAD_BYTES = 65_536

HEAD_S = 10.0
"""Seconds within which request line and headers must be there, from the connection on or the answer before."""

MOST_CONNECTIONS = 1000

GRACE_S = 5
"""Seconds that open requests have to end once the server is told to."""

SWITCH_S = 0.0005
"""Seconds after which a thread that prices a plan lets decisions through."""


def serve(
    plan: Path,
    *,
    host: str,
    port: int,
    policy: str | None = None,
    token_file: Path | None = None,
    requests_per_s: float = REQUESTS_PER_S,
) -> None:
    """Serve a plan's scheduler until SIGTERM or SIGINT.

    Raises `InputError` for a plan, policy, token, host or port that will not do: all but this machine's own addresses
    need a token.
    """
    token = read_token(token_file)
    if token is None and not is_loopback(host):
        rule = "is reached from other machines, and nothing asks who they are"
        remedy = f"Give --token-file or {TOKEN}, or listen on 127.0.0.1."
        raise InputError(Problem("--host", host, rule, remedy))
    file = PlanFile(plan)  # before it is read, so that no change is missed meanwhile
    scheduler = Scheduler.from_plan(plan, policy=policy)
    app = build_app(scheduler, plan_file=file, token=token, hosts=names_of(host), requests_per_s=requests_per_s)
    with opened(host, port) as listener:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s: %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        LOG.info("plan %d of %s at http://%s", scheduler.version, scheduler.scenario.name, address_of(listener))
        run(app, listener)


def run(app: object, listener: socket.socket) -> None:
    """Answer on a socket until a signal; the signal ends the server and nothing else."""
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()  # profiles and plan stay: no decision waits while they are looked through for garbage
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal once more when it has ended
        signal.signal(number, lambda *_: None)
    uvicorn.Server(settings(app)).run(sockets=[listener])


def settings(app: object) -> uvicorn.Config:
    """How uvicorn runs the application: bounded, silent, and without a word of what it is."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedHead, ws="none", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip


class BoundedHead(HttpToolsProtocol):
    """HTTP that hangs up on a request line and headers of more than `MOST_HEAD_BYTES`, or of more than `HEAD_S`.

    A connection on which nothing is being answered is dropped unless a whole head comes in time: one that sends
    nothing, or its head by the byte, would take the place of another for ever.
    """

    _head_bytes = 0
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting_for_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MOST_HEAD_BYTES:
            self.transport.close()
        elif self._head_due is None and self.cycle.response_complete:  # the first head is awaited from the start
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._head_due = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting_for_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()
        self._stop_waiting_for_head()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def names_of(host: str) -> frozenset[str] | None:
    """Names by which a server at an address may be asked; None, any, if other machines reach it."""
    if not is_loopback(host):
        return None
    return frozenset({*LOOPBACK, f"[{host}]" if ":" in host else host.lower()})


def read_token(file: Path | None) -> str | None:
    """The token in a file, else in the environment; None if there is neither. Raises `InputError` for an empty one."""
    place = f"{TOKEN}" if file is None else "--token-file"
    try:
        text = os.environ.get(TOKEN) if file is None else file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        rule = "must be a file with a token in plain characters"
        raise InputError(Problem(place, str(file), rule, f"Mend it: {type(error).__name__}.")) from None
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        rule = "must hold one word of printable characters"
        raise InputError(Problem(place, "no token", rule, "For example what `openssl rand -hex 32` prints."))
    return token


def opened(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `InputError` for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        remedy = "Choose another --port, or another --host."
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(Problem("--port", str(port), f"cannot listen on {host}: {why}", remedy)) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts inherits this
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a socket listens."""
    host, port, *_ = listener.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
