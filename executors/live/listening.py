"""A service on a port, inside the event loop of whoever wants it there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

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
