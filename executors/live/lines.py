"""What the crew and a worker say to each other: whole messages over a socket between two processes of one program.

To the worker: a task, or that one is cancelled. From it: that it is up; of a task every step and checkpoint, and then
that it is done, cancelled or has failed. A message is (kind, ticket, value); the ticket names the task, 0 none.
"""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
import struct
from enum import StrEnum
from typing import Any

from executors.live.tasks import Task

Message = tuple["Kind", int, Any]
_LENGTH = struct.Struct("!Q")


class Kind(StrEnum):
    """What a message is; its value in brackets."""

    task = "task"  # (Task)
    cancel = "cancel"
    up = "up"
    step = "step"  # (its index, its seconds)
    checkpoint = "checkpoint"  # (the first step that is left, a serialised hand-over)
    done = "done"  # (Done)
    cancelled = "cancelled"
    failed = "failed"  # (Failure); ticket 0: the worker could not start


def written(kind: Kind, ticket: int, value: object = None) -> bytes:
    """A message as bytes, its length before it."""
    data = pickle.dumps((kind, ticket, value))
    return _LENGTH.pack(len(data)) + data


async def read(reader: asyncio.StreamReader) -> Message:
    """The next message. Raises `asyncio.IncompleteReadError` at the end of the stream."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    message: Message = pickle.loads(await reader.readexactly(length))  # noqa: S301 -- from a process of our own
    return message


class Line:
    """The worker's end. Its calls wait until the other end has taken or sent a whole message."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._mail = select.poll()
        self._mail.register(end, select.POLLIN)

    def send(self, kind: Kind, ticket: int = 0, value: object = None) -> None:
        self._end.sendall(written(kind, ticket, value))

    def receive(self) -> Message:
        """The next message. Raises `EOFError` once the crew has gone."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        message: Message = pickle.loads(self._exactly(length))  # noqa: S301 -- from the process that started this one
        return message

    def has_mail(self) -> bool:
        """Whether something has come that was not received."""
        return bool(self._mail.poll(0))

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._end.recv(min(count - len(data), 2**20))
            if not part:
                raise EOFError("the crew has gone")
            data += part
        return bytes(data)


class Inbox:
    """The tasks that wait at a worker, in order of arrival, and what was called off."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._waiting: dict[int, Task] = {}
        self._called_off: set[int] = set()

    def next(self) -> tuple[int, Task]:
        """The next task and its ticket, once there is one."""
        while not self._waiting:
            self._receive()
        self._called_off.clear()  # of tasks that have ended, as those that wait leave the queue at once
        ticket = next(iter(self._waiting))
        return ticket, self._waiting.pop(ticket)

    def calls_off(self, ticket: int) -> bool:
        """Whether this task, which is under way, is no longer wanted; reads what has come since it was last asked."""
        while self._line.has_mail():
            self._receive()
        return ticket in self._called_off

    def _receive(self) -> None:
        kind, ticket, task = self._line.receive()
        if kind is Kind.task:
            self._waiting[ticket] = task
        elif self._waiting.pop(ticket, None) is not None:
            self._line.send(Kind.cancelled, ticket)
        else:  # the task under way, or one that has ended meanwhile
            self._called_off.add(ticket)
