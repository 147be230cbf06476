"""The process side of a worker: ranks that wait for tasks and do them one after the other.

Rank 0 leads. It talks to the crew, encodes prompts and decodes images, and after every step looks into its inbox and
tells the other ranks over pipes whether to go on, so that all agree on what they do next. Waiting is blocking: an idle
worker takes no processor time. The processes end when whoever started them does, in the middle of a step if need be.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from executors.group import Alone, Group, synchronised_clock
from executors.handover import Handover, parse, serialise, take_over
from executors.live.lines import Inbox, Kind, Line
from executors.live.stage import Stage, png
from executors.live.tasks import Done, Gang, Task
from executors.ranks import Failure, meet
from executors.run import on_cpu
from executors.samplers import sampler_state
from hybridsd_sim.errors import InputError, Problem

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
        if not isinstance(error, EOFError) and not Failure.of(error).lost_another:
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
        line.send(Kind.failed, 0, Failure.of(error))
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
    return meet(rank, gang.degree, kind="nccl" if gang.device.startswith("cuda") else "gloo", port=port)


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
                failure = Failure.of(error)
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

    def _from_noise(self, task: Task, sampler: Any, watch: _Stopwatch) -> Handover:
        latents = self.stage.noise(task) * sampler.init_noise_sigma
        with watch.time("text_encode_s"):
            conditioning = self.stage.encode(task)
        space = self.stage.latent_space(task)
        return on_cpu(take_over(sampler, latents, 0, latent_space=space, conditioning=conditioning))

    def _handed_over(self, task: Task, watch: _Stopwatch) -> Handover:
        with watch.time("parse_s"):
            begun = parse(task.begun or b"", self.stage.expected(task))
        if begun.guidance_scale != task.guidance_scale:
            rule = f"this side runs {task.guidance_scale}"
            raise InputError(Problem("hand-over guidance_scale", str(begun.guidance_scale), rule))
        if begun.step > task.stop:
            raise InputError(Problem("hand-over step", str(begun.step), f"this task stops before step {task.stop}"))
        return begun

    def _steps(self, ticket: int, task: Task, begun: Handover, sampler: Any, watch: _Stopwatch) -> Tensor:
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
        self, task: Task, begun: Handover, sampler: Any, latents: Tensor, step: int, watch: _Stopwatch
    ) -> bytes:
        """The state before `step` as a hand-over of the task's precision."""
        with watch.time("serialise_s"):
            state = replace(begun, latents=latents, step=step, state=sampler_state(sampler))
            return serialise(state, task.payload)
