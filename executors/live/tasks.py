"""What a worker is, what it is asked to do, what it answers, and the channel over which that goes.

The channel is a socket between two processes of one program. To the worker goes a task, or that one is cancelled; from
it comes that it is up, of a task every step and checkpoint, and then that it is done, cancelled or has failed. Messages
are pickled: the socket has no name, so that only the process that started the other one can be at its end. It is no
`multiprocessing.connection` because the pool reads it on its event loop, which must not wait for the rest of a message
from a worker that has stopped.

Times are seconds of `time.monotonic()`, which all processes of one machine share.
"""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hybridsd_sim.errors import RunError

from ..parallel import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """A worker to start: `degree` processes that work as one, of which rank 0 speaks for all.

    `models` are names of the catalogue, all loaded before the worker is up; with `weights` a model's parts come from
    its folder. `vae` names another decoder for models without weights. A process has `threads` CPU threads; `cpus` are
    the CPU of each rank, by its number on Linux, and none leaves the choice to the system. `options` are the method's,
    `profiles` a profiles folder of one's own.
    """

    name: str
    pool: str
    models: tuple[str, ...]
    method: str = "single"
    degree: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)
    threads: int = 1
    cpus: tuple[int, ...] = ()
    device: str = "cpu"
    precision: str = "fp32"
    weights: Mapping[str, Path] = field(default_factory=dict)
    profiles: Path | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.cpus and len(self.cpus) != self.degree:
            msg = f"worker {self.name}: {len(self.cpus)} CPUs for {self.degree} ranks"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A contiguous run of steps of one request on one worker.

    `key` is the caller's, unique among the tasks under way. Steps before `stop` are done here; where `stop` is
    `num_inference_steps` the latents are final, and `decode` then makes the image of them. `begun` is a serialised
    latent transfer to go on from, of another site or a checkpoint of this one; None begins with noise from `seed`.
    Whenever a multiple of `checkpoint_every` steps of the image is done, the state is sent as a latent transfer of
    precision `payload`; 0 never sends it. From one in fp32 a single device goes on to the bit; a parallel method does
    its synchronous steps again first.
    """

    key: str
    model: str
    prompt: str = ""
    seed: int = 0
    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    stop: int
    begun: bytes | None = None
    decode: bool = False
    payload: str = "fp32"
    checkpoint_every: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A task that is done: a PNG if `is_image`, else a serialised latent transfer, and the seconds that each part took.

    The worker held the task from `start_s` to `stop_s`. Parts that the task did not have took 0 s. `step_s` has an
    entry for every step done, in order; `serialise_s` is that of the payload, PNG too, and of all checkpoints.
    """

    payload: bytes
    is_image: bool
    start_s: float
    stop_s: float
    text_encode_s: float
    vae_decode_s: float
    step_s: tuple[float, ...]
    parse_s: float
    serialise_s: float


class WorkerLost(RunError):  # noqa: N818 -- what happened to it, as in `except WorkerLost`
    """The worker died with the task.

    `checkpoint` is the last state that it had sent, a serialised latent transfer from which a task like this one goes
    on at step `step`; None and 0 where it had sent nothing.
    """

    def __init__(self, reason: str, *, checkpoint: bytes | None = None, step: int = 0) -> None:
        super().__init__(reason)
        self.checkpoint = checkpoint
        self.step = step


class TaskCancelled(RunError):  # noqa: N818 -- likewise
    """The task was cancelled, in the queue or between two steps."""


PoolMessage = tuple["MessageKind", int, Any]
"""(kind, ticket, value): the ticket names the task, 0 none."""

_LENGTH = struct.Struct("!Q")


class MessageKind(StrEnum):
    """What a message is; its value in brackets."""

    task = "task"  # (Task)
    cancel = "cancel"
    up = "up"
    step = "step"  # (its index, its seconds)
    checkpoint = "checkpoint"  # (the first step that is left, a serialised latent transfer)
    done = "done"  # (TaskResult)
    cancelled = "cancelled"
    failed = "failed"  # (RankFailure); ticket 0: the worker could not start


def encode_message(kind: MessageKind, ticket: int, value: object = None) -> bytes:
    """A message as bytes: its length (8 bytes, big-endian), then the pickled triple."""
    data = pickle.dumps((kind, ticket, value))
    return _LENGTH.pack(len(data)) + data


async def read_message(reader: asyncio.StreamReader) -> PoolMessage:
    """The next message. Raises `asyncio.IncompleteReadError` at the end of the stream."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    message: PoolMessage = pickle.loads(await reader.readexactly(length))  # noqa: S301 -- from a process of our own
    return message


class Channel:
    """The worker's end, which blocks: its calls wait until the other end has taken or sent a whole message."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._poller = select.poll()
        self._poller.register(end, select.POLLIN)

    def send(self, kind: MessageKind, ticket: int = 0, value: object = None) -> None:
        self._end.sendall(encode_message(kind, ticket, value))

    def receive(self) -> PoolMessage:
        """The next message. Raises `EOFError` once the pool has gone."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        message: PoolMessage = pickle.loads(self._exactly(length))  # noqa: S301 -- from the process that started this one
        return message

    def has_message(self) -> bool:
        """Whether something has come that was not received."""
        return bool(self._poller.poll(0))

    def _exactly(self, count: int) -> bytes:
        data = self._end.recv(count, socket.MSG_WAITALL)
        if len(data) < count:
            raise EOFError("the pool has gone")
        return data


class TaskQueue:
    """The tasks that wait at a worker, in order of arrival, and what was cancelled."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: dict[int, Task] = {}
        self._cancelled: set[int] = set()

    def next(self) -> tuple[int, Task]:
        """The next task and its ticket, once there is one."""
        while not self._waiting:
            self._receive()
        self._cancelled.clear()  # of tasks that have ended, as those that wait leave the queue at once
        ticket = next(iter(self._waiting))
        return ticket, self._waiting.pop(ticket)

    def is_cancelled(self, ticket: int) -> bool:
        """Whether this task, which is under way, is no longer wanted; reads what has come since it was last asked."""
        while self._channel.has_message():
            self._receive()
        return ticket in self._cancelled

    def _receive(self) -> None:
        kind, ticket, task = self._channel.receive()
        if kind is MessageKind.task:
            self._waiting[ticket] = task
        elif self._waiting.pop(ticket, None) is not None:
            self._channel.send(MessageKind.cancelled, ticket)
        else:  # the task under way, or one that has ended meanwhile
            self._cancelled.add(ticket)
