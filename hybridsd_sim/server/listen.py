"""Runs the sidecar: reads the plan, opens the port, and serves until it is told to end."""

from __future__ import annotations

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
from hybridsd_sim.scheduler import Scheduler
from hybridsd_sim.server.app import build_app
from hybridsd_sim.server.guard import LOOPBACK

LOG = logging.getLogger("hybridsd_sim.server")
TOKEN = "HYBRIDSD_TOKEN"  # noqa: S105 -- the name of the variable, not what it holds
MOST_HEAD_BYTES = 65_536
MOST_CONNECTIONS = 1000
GRACE_S = 5
"""Seconds that open requests have to end once the server is told to."""
SWITCH_S = 0.0005
"""Seconds after which a thread that prices a plan lets decisions through."""


def serve(plan: Path, *, host: str, port: int, policy: str | None = None, token_file: Path | None = None) -> None:
    """Serve a plan's scheduler until SIGTERM or SIGINT.

    Raises `InputError` for a plan, policy, token, host or port that will not do: all but this machine's own addresses
    need a token.
    """
    token = read_token(token_file)
    local = is_loopback(host)
    if not local and token is None:
        rule = "is reached from other machines, and nothing asks who they are"
        remedy = f"Give --token-file or {TOKEN}, or listen on 127.0.0.1."
        raise InputError(Problem("--host", host, rule, remedy))
    scheduler = Scheduler.from_plan(plan, policy=policy)
    hosts = {*LOOPBACK, f"[{host}]" if ":" in host else host.lower()} if local else None
    app = build_app(scheduler, plan_path=plan, token=token, hosts=hosts)
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
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedHead, ws="none", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


class BoundedHead(HttpToolsProtocol):
    """HTTP of which request line and headers together may have at most `MOST_HEAD_BYTES`; beyond, it hangs up."""

    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MOST_HEAD_BYTES:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
        said = getattr(error, "strerror", None) or str(error)
        raise InputError(Problem("--port", str(port), f"cannot listen on {host}: {said}", remedy)) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts inherits this
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a socket listens."""
    host, port, *_ = listener.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
