"""The processes of a gang, from their start until none of them is left.

The process side of a worker: ranks that wait for tasks and do them one after the other.

Rank 0 leads. It talks to the crew, encodes prompts and decodes images, and after every step looks into its inbox and
tells the other ranks over pipes whether to go on, so that all agree on what they do next. Waiting is blocking: an idle
worker takes no processor time. The processes end when whoever started them does, in the middle of a step if need be.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem

from ..hybrid import LatentTransfer, capture_transfer, parse, serialise, to_cpu
from ..models import sampler_state
from ..parallel import (
    Alone,
    Group,
    RankFailure,
    describe_exit,
    join_rendezvous,
    open_rendezvous,
    synchronised_clock,
)
from .tasks import Done, Gang, Inbox, Kind, Line, Task
from .worker_stage import Stage, png

_GO_ON, _STOP = b"+", b"-"

_GRACE_S = 2.0
"""A rank that cannot start leaves rank 0 that long to say what it saw of it."""


class _CalledOff(Exception):  # noqa: N818 -- no error: nobody wants the task any more
    """Ends a task between two of its steps."""


def live(gang: Gang, rank: int, port: int, ends: Sequence[Connection], crew: socket.socket | None) -> None:
    """A rank's whole life, in its own process.

    The ranks of a gang of several meet at `port`. `ends` are rank 0's pipes to the others, or another's one from it;
    `crew` is rank 0's socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; whoever started us decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gang.cpus:
        os.sched_setaffinity(0, {gang.cpus[rank]})
    torch.set_num_threads(gang.threads)
    try:
        if crew is not None:
            _lead(gang, port, ends, Line(crew))
        else:
            _follow(gang, rank, port, ends[0])
    except Exception as error:
        if not isinstance(error, EOFError) and not RankFailure.of(error).lost_another:
            raise
    sys.exit(1)  # the crew or another rank has gone, and whoever noticed said so


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _lead(gang: Gang, port: int, followers: Sequence[Connection], line: Line) -> None:
    try:
        stage = Stage(gang, _group(gang, 0, port))
        stage.load_ends()
        stage.group.barrier()
    except Exception as error:  # noqa: BLE001 -- raised again by the crew
        line.send(Kind.failed, 0, RankFailure.of(error))
        return
    line.send(Kind.up)
    Leader(stage, line, followers).serve()


def _follow(gang: Gang, rank: int, port: int, leader: Connection) -> None:
    try:
        stage = Stage(gang, _group(gang, rank, port))
        stage.group.barrier()
    except Exception:
        leader.poll(_GRACE_S)  # what ails all ranks is rank 0's to tell
        raise
    while True:
        task, begun = pickle.loads(leader.recv_bytes())  # noqa: S301 -- from rank 0
        do_steps = stage.steps(task, begun, stage.sampler(task))
        with suppress(_CalledOff):
            do_steps(lambda *_: _heed(leader))


def _heed(leader: Connection) -> None:
    if leader.recv_bytes() == _STOP:
        raise _CalledOff


def _group(gang: Gang, rank: int, port: int) -> Group:
    if gang.degree == 1:
        return Alone(gang.device)
    return join_rendezvous(rank, gang.degree, kind="nccl" if gang.device.startswith("cuda") else "gloo", port=port)


@dataclass(slots=True)
class _Stopwatch:
    """The seconds of a task, as they come in."""

    device: torch.device
    start_s: float
    text_encode_s: float = 0.0
    vae_decode_s: float = 0.0
    parse_s: float = 0.0
    serialise_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    step_began_s: float = 0.0

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part."""
        began_s = self.now()
        yield
        setattr(self, part, getattr(self, part) + self.now() - began_s)

    def begin_step(self) -> None:
        self.step_began_s = self.now()

    def end_step(self) -> float:
        """Seconds of the step that ends here."""
        self.step_s.append(self.now() - self.step_began_s)
        return self.step_s[-1]

    def now(self) -> float:
        """Seconds of the clock that all processes share, the device's work finished."""
        synchronised_clock(self.device)
        return time.monotonic()

    def done(self, payload: bytes, *, is_image: bool) -> Done:
        return Done(
            payload=payload, is_image=is_image, start_s=self.start_s, stop_s=self.now(),
            text_encode_s=self.text_encode_s, vae_decode_s=self.vae_decode_s, step_s=tuple(self.step_s),
            parse_s=self.parse_s, serialise_s=self.serialise_s,
        )  # fmt: skip


class Leader:
    """Rank 0 at work: takes tasks from its inbox, leads the ranks through their steps, and answers."""

    def __init__(self, stage: Stage, line: Line, followers: Sequence[Connection]) -> None:
        self.stage, self.line, self.followers = stage, line, followers
        self.inbox = Inbox(line)
        self._in_steps = False

    def serve(self) -> None:
        """Do tasks until the crew has gone. A task that fails is answered with its error, and the next one is done.

        A gang whose ranks stopped in different places cannot go on: its rank 0 ends, and the crew starts a new one.
        """
        while True:
            ticket, task = self.inbox.next()
            try:
                self.line.send(Kind.done, ticket, self._do(ticket, task))
            except _CalledOff:
                self.line.send(Kind.cancelled, ticket)
            except Exception as error:  # noqa: BLE001 -- raised again by the crew
                failure = RankFailure.of(error)
                if not failure.lost_another:
                    self.line.send(Kind.failed, ticket, failure)
                if self._in_steps and self.followers:
                    return

    def _do(self, ticket: int, task: Task) -> Done:
        watch = _Stopwatch(self.stage.group.device, start_s=time.monotonic())
        self._in_steps = False
        self.stage.check(task)
        sampler = self.stage.sampler(task)
        begun = self._from_noise(task, sampler, watch) if task.begun is None else self._handed_over(task, watch)
        if self.inbox.calls_off(ticket):
            raise _CalledOff
        latents = self._steps(ticket, task, begun, sampler, watch)
        if not task.decode:
            state = self._written(task, begun, sampler, latents, task.stop, watch)
            return watch.done(state, is_image=False)
        with watch.time("vae_decode_s"):
            pixels = self.stage.picture(task, latents)
        with watch.time("serialise_s"):
            image = png(pixels)
        return watch.done(image, is_image=True)

    def _from_noise(self, task: Task, sampler: Any, watch: _Stopwatch) -> LatentTransfer:
        latents = self.stage.noise(task) * sampler.init_noise_sigma
        with watch.time("text_encode_s"):
            conditioning = self.stage.encode(task)
        space = self.stage.latent_space(task)
        return to_cpu(capture_transfer(sampler, latents, 0, latent_space=space, conditioning=conditioning))

    def _handed_over(self, task: Task, watch: _Stopwatch) -> LatentTransfer:
        with watch.time("parse_s"):
            begun = parse(task.begun or b"", self.stage.expected(task))
        if begun.guidance_scale != task.guidance_scale:
            rule = f"this side runs {task.guidance_scale}"
            raise InputError(Problem("hand-over guidance_scale", str(begun.guidance_scale), rule))
        if begun.step > task.stop:
            raise InputError(Problem("hand-over step", str(begun.step), f"this task stops before step {task.stop}"))
        return begun

    def _steps(self, ticket: int, task: Task, begun: LatentTransfer, sampler: Any, watch: _Stopwatch) -> Tensor:
        def on_step(step: int, latents: Tensor) -> None:
            self.line.send(Kind.step, ticket, (step, watch.end_step()))
            if task.checkpoint_every and (step + 1) % task.checkpoint_every == 0 and step + 1 < task.stop:
                state = self._written(task, begun, sampler, latents, step + 1, watch)
                self.line.send(Kind.checkpoint, ticket, (step + 1, state))
            self._agree(ticket)
            watch.begin_step()

        self._in_steps = True
        if self.followers:
            self._tell(pickle.dumps((replace(task, begun=None), begun)))
        do_steps = self.stage.steps(task, begun, sampler)
        watch.begin_step()
        latents = do_steps(on_step)
        self._in_steps = False
        return latents

    def _agree(self, ticket: int) -> None:
        """Decide for all ranks whether to go on."""
        called_off = self.inbox.calls_off(ticket)
        self._tell(_STOP if called_off else _GO_ON)
        if called_off:
            raise _CalledOff

    def _tell(self, said: bytes) -> None:
        for follower in self.followers:
            follower.send_bytes(said)

    def _written(
        self, task: Task, begun: LatentTransfer, sampler: Any, latents: Tensor, step: int, watch: _Stopwatch
    ) -> bytes:
        """The state before `step` as a hand-over of the task's precision."""
        with watch.time("serialise_s"):
            state = replace(begun, latents=latents, step=step, state=sampler_state(sampler))
            return serialise(state, task.payload)


StartMethod = Literal["spawn", "forkserver"]

GRACE_S = 2.0
"""Processes whose line is closed have that long to end by themselves, so that they can say why."""

_READ_AHEAD_BYTES = 2**22


class Processes:
    """The ranks of a gang as processes; they start with the object and end together."""

    def __init__(self, gang: Gang, start_method: StartMethod = "spawn") -> None:
        self._gang, self._start_method = gang, start_method
        self._store = open_rendezvous() if gang.degree > 1 else None  # the ranks meet there as long as they live
        self._ours, theirs = socket.socketpair()
        self._ranks: list[BaseProcess] = []
        self._ended: list[int] = []
        self._one_ended = asyncio.Event()
        with theirs, ExitStack() as held:
            try:
                self._start(theirs, held)
            except BaseException:
                self._kill()
                self._ours.close()
                raise

    def _start(self, theirs: socket.socket, held: ExitStack) -> None:
        """Start every rank; what is `held` goes over to them, so that each notices when another's end closes."""
        context = _context(self._gang, self._start_method)
        pipes = [context.Pipe(duplex=False) for _ in range(1, self._gang.degree)]
        for end in (end for pipe in pipes for end in pipe):
            held.enter_context(end)
        port = self._store.port if self._store else 0
        for rank in range(self._gang.degree):
            ends: Sequence[Connection] = [leads for _, leads in pipes] if rank == 0 else [pipes[rank - 1][0]]
            job = (self._gang, rank, port, ends, theirs if rank == 0 else None)
            process = context.Process(target=live, args=job, name=f"{self._gang.name}.{rank}", daemon=True)
            process.start()
            self._ranks.append(process)
            asyncio.get_running_loop().add_reader(process.sentinel, self._note_end, rank)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid or 0 for process in self._ranks)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The line to rank 0."""
        return await asyncio.open_unix_connection(sock=self._ours, limit=_READ_AHEAD_BYTES)

    async def one_ends(self) -> None:
        """Wait until a rank has ended, for a grace: whoever closes the line is about to."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._one_ended.wait(), GRACE_S)

    async def end(self) -> str:
        """Kill the ranks that live and wait until all have ended; what the first one died of, in words."""
        self._kill()
        await asyncio.to_thread(self._join)
        codes = {rank: self._ranks[rank].exitcode or 0 for rank in self._ended or range(len(self._ranks))}
        rank, code = min(
            codes.items(), key=lambda item: item[1]
        )  # who was killed, before who missed it: signals are < 0
        for process in self._ranks:
            process.close()
        which = f"rank {rank} of {self._gang.degree} " if self._gang.degree > 1 else ""
        return f"worker {self._gang.name} died: {which}{describe_exit(code)}"

    def _note_end(self, rank: int) -> None:
        """A rank has ended: note it with those that ended just before it, and take the others along."""
        self._ended = [other for other, process in enumerate(self._ranks) if other == rank or process.exitcode]
        self._one_ended.set()
        self._kill()

    def _kill(self) -> None:
        for process in self._ranks:
            asyncio.get_running_loop().remove_reader(process.sentinel)
            process.kill()

    def _join(self) -> None:
        for process in self._ranks:
            process.join()


def _context(gang: Gang, start_method: StartMethod) -> SpawnContext | ForkServerContext:
    """How processes start. A CUDA driver that an import woke up would not survive a fork."""
    if start_method == "spawn" or gang.device.startswith("cuda"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
