"""A pool of workers as an asyncio program holds it: starts them, gives them tasks, notices when one dies.

A worker is one process, or several that work as one (`worker`). Its tasks are done in the order of their arrival. If
any of its processes dies, all of them are killed, the tasks that it had raise `WorkerLost`, and new processes take its
place.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, Self

from hybridsd_sim.errors import HybridSDError, InputError, Problem, RunError, unknown_name

from ..parallel import describe_exit, open_rendezvous
from .tasks import MessageKind, Task, TaskCancelled, TaskResult, WorkerLost, WorkerSpec, encode_message, read_message
from .worker import run_rank

log = logging.getLogger(__name__)

OnStep = Callable[[int, float], None]
"""Hears the index and the seconds of every step done."""

StartMethod = Literal["spawn", "forkserver"]

GRACE_S = 2.0
"""Processes whose channel is closed have that long to end by themselves, so that they can say why."""

_READ_AHEAD_BYTES = 2**22

_LONGEST_PAUSE_S = 30.0


class ProcessPool:
    """Workers by name. As an async context manager it starts them, waits until all are up, and kills them at the end.

    `on_up` is called on the event loop whenever a worker is ready, at the start and after a restart, `on_down` when one
    that was up is lost; not at the end. Without `restart` a worker that died stays away. A process that is spawned
    imports for seconds first; with `forkserver` one process has done so for all, and workers on the CPU are there at
    once. Entering raises the error of a worker that cannot start: `InputError` for what is wrong with its spec, else
    `RunError`.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        *,
        restart: bool = True,
        start_method: StartMethod = "spawn",
        on_up: Callable[[WorkerSpec], None] = lambda _: None,
        on_down: Callable[[WorkerSpec], None] = lambda _: None,
    ) -> None:
        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(Problem("workers", ", ".join(twice), "every worker has a name of its own"))
        self._workers = {
            spec.name: _PoolWorker(spec, restart=restart, start_method=start_method, on_up=on_up, on_down=on_down)
            for spec in specs
        }

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*[worker.start() for worker in self._workers.values()])
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        await asyncio.gather(*(worker.end() for worker in self._workers.values()))

    async def run(self, worker: str, task: Task, *, on_step: OnStep | None = None) -> TaskResult:
        """Let a worker do a task after those that it has; `on_step` hears the index and seconds of every step done.

        Raises `InputError` for an unknown worker and for a key that is in use, `WorkerLost` if the worker is not up or
        dies, `TaskCancelled` after `cancel`, and `RunError` with the worker's words for a task that it could not do.
        If the caller's own asyncio task is cancelled, so is this one.
        """
        if worker not in self._workers:
            raise InputError(unknown_name("worker", worker, tuple(self._workers)))
        if any(other.has(task.key) for other in self._workers.values()):
            raise InputError(Problem("key", repr(task.key), "a task of this key is under way"))
        return await self._workers[worker].run(task, on_step)

    def cancel(self, key: str) -> None:
        """Call a task off: out of the queue, or after the step under way. A task that has ended stays as it is."""
        for worker in self._workers.values():
            worker.cancel(key)

    def up(self) -> tuple[str, ...]:
        """The workers that are alive and ready."""
        return tuple(name for name, worker in self._workers.items() if worker.is_up)

    def pids(self, worker: str) -> tuple[int, ...]:
        """Identifiers of the worker's processes, by rank; none while it is down."""
        return self._workers[worker].pids


@dataclass(slots=True, eq=False)
class _OpenTask:
    """A task under way: who waits for it, and the last state that came of it."""

    task: Task
    on_step: OnStep | None
    outcome: asyncio.Future[TaskResult]
    checkpoint: bytes | None = None
    step: int = 0

    def receive(self, kind: MessageKind, value: Any) -> None:
        """Take in what the worker says of the task."""
        if self.outcome.done():  # whoever waited for it has left
            return
        match kind:
            case MessageKind.step if self.on_step:
                asyncio.get_running_loop().call_soon(self.on_step, *value)
            case MessageKind.checkpoint:
                self.step, self.checkpoint = value
            case MessageKind.done:
                self.outcome.set_result(value)
            case MessageKind.cancelled:
                self.outcome.set_exception(TaskCancelled(f"task {self.task.key} was cancelled"))
            case MessageKind.failed:  # in the worker's own words
                error = value.error(f"task {self.task.key} failed")
                if not isinstance(error, RunError):  # wrong input is the cause of the error
                    cause, error = error, RunError(str(error))
                    error.__cause__ = cause
                self.outcome.set_exception(error)

    def lose(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(WorkerLost(reason, checkpoint=self.checkpoint, step=self.step))


class _PoolWorker:
    """A worker as its pool sees it: one life of its processes after the other, and the tasks that it was given."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        restart: bool,
        start_method: StartMethod,
        on_up: Callable[[WorkerSpec], None],
        on_down: Callable[[WorkerSpec], None],
    ) -> None:
        self.spec, self._restart, self._start_method = spec, restart, start_method
        self._on_up, self._on_down = on_up, on_down
        self.pids: tuple[int, ...] = ()
        self._channel: asyncio.StreamWriter | None = None
        self._tasks: dict[int, _OpenTask] = {}
        self._tickets = itertools.count(1)

    @property
    def is_up(self) -> bool:
        return self._channel is not None

    def start(self) -> asyncio.Future[None]:
        """Begin to live. The result is there when the worker is up for the first time, or the reason why it is not."""
        self._first_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._supervise())
        self._life.add_done_callback(self._note_crash)
        return self._first_up

    async def end(self) -> None:
        self._life.cancel()
        await asyncio.wait({self._life})
        self._lose_all(f"worker {self.spec.name}: its pool was ended")

    # ---- Tasks ------------------------------------------------------------------------------------------------------

    async def run(self, task: Task, on_step: OnStep | None) -> TaskResult:
        if self._channel is None:
            raise WorkerLost(f"worker {self.spec.name} is not up")
        ticket = next(self._tickets)
        open_task = self._tasks[ticket] = _OpenTask(task, on_step, asyncio.get_running_loop().create_future())
        self._channel.write(encode_message(MessageKind.task, ticket, task))
        try:
            return await open_task.outcome
        except asyncio.CancelledError:
            self._send_cancel(ticket)
            raise
        finally:
            self._tasks.pop(ticket, None)

    def has(self, key: str) -> bool:
        return any(open_task.task.key == key for open_task in self._tasks.values())

    def cancel(self, key: str) -> None:
        for ticket, open_task in self._tasks.items():
            if open_task.task.key == key:
                self._send_cancel(ticket)

    def _send_cancel(self, ticket: int) -> None:
        if self._channel is not None:
            self._channel.write(encode_message(MessageKind.cancel, ticket))

    # ---- Lives ------------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Start the worker again whenever it has died; one that cannot start after longer and longer pauses."""
        pause_s = 0.0
        while True:
            was_up, error = await self._run_once()
            if not self._first_up.done():
                self._first_up.set_exception(error)
                return
            if not self._restart:
                return
            pause_s = 0.0 if was_up else min(max(2 * pause_s, 0.5), _LONGEST_PAUSE_S)
            log.warning("%s; it starts again in %g s", error, pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> tuple[bool, HybridSDError]:
        """From the start of the processes until none is left: whether the worker was up, and why it ended."""
        try:
            processes = WorkerProcesses(self.spec, self._start_method)
        except OSError as error:
            return False, RunError(f"worker {self.spec.name} cannot be started: {error}")
        self.pids = processes.pids
        refusal: HybridSDError | None = None
        try:
            reader, writer = await processes.connect()
            with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    kind, ticket, value = await read_message(reader)
                    if kind is MessageKind.up:
                        self._channel = writer
                        asyncio.get_running_loop().call_soon(self._on_up, self.spec)
                        if not self._first_up.done():
                            self._first_up.set_result(None)
                    elif ticket in self._tasks:
                        self._tasks[ticket].receive(kind, value)
                    elif kind is MessageKind.failed and ticket == 0:
                        refusal = value.error(f"worker {self.spec.name} cannot start")
            await processes.wait_for_exit()
        finally:
            was_up, self._channel, self.pids = self.is_up, None, ()
            died = await processes.end()
        if was_up:
            asyncio.get_running_loop().call_soon(self._on_down, self.spec)
        self._lose_all(died)
        return was_up, refusal or RunError(died)

    def _lose_all(self, reason: str) -> None:
        for open_task in self._tasks.values():
            open_task.lose(reason)

    def _note_crash(self, life: asyncio.Task[None]) -> None:
        if life.cancelled() or (error := life.exception()) is None:
            return
        self._lose_all(f"worker {self.spec.name} is given up: {error}")
        if self._first_up.done():
            log.error("worker %s is given up", self.spec.name, exc_info=error)
        else:
            self._first_up.set_exception(error)


class WorkerProcesses:
    """The ranks of a worker as processes; they start with the object and end together."""

    def __init__(self, spec: WorkerSpec, start_method: StartMethod = "spawn") -> None:
        self._spec = spec
        self._store = open_rendezvous() if spec.degree > 1 else None  # the ranks meet there as long as they live
        self._ours, theirs = socket.socketpair()
        self._ranks: list[BaseProcess] = []
        self._ended: list[int] = []
        self._exited = asyncio.Event()
        with theirs, ExitStack() as held:
            try:
                context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
                if start_method == "forkserver" and not spec.device.startswith("cuda"):
                    # A CUDA driver that an import woke up would not survive a fork.
                    context = multiprocessing.get_context("forkserver")
                    context.set_forkserver_preload([run_rank.__module__])
                pipes = [context.Pipe(duplex=False) for _ in range(1, spec.degree)]
                for end in (end for pipe in pipes for end in pipe):
                    held.enter_context(end)  # goes over to the ranks, so that each notices when another's end closes
                port = self._store.port if self._store else 0
                for rank in range(spec.degree):
                    ends: Sequence[Connection] = [leads for _, leads in pipes] if rank == 0 else [pipes[rank - 1][0]]
                    job = (spec, rank, port, ends, theirs if rank == 0 else None)
                    process = context.Process(target=run_rank, args=job, name=f"{spec.name}.{rank}", daemon=True)
                    process.start()
                    self._ranks.append(process)
                    asyncio.get_running_loop().add_reader(process.sentinel, self._note_end, rank)
            except BaseException:
                self._kill()
                self._ours.close()
                raise

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid or 0 for process in self._ranks)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The channel to rank 0."""
        return await asyncio.open_unix_connection(sock=self._ours, limit=_READ_AHEAD_BYTES)

    async def wait_for_exit(self) -> None:
        """Wait until a rank has ended, for a grace: whoever closes the channel is about to."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), GRACE_S)

    async def end(self) -> str:
        """Kill the ranks that live and wait until all have ended; what the first one died of, in words.

        Of ranks that ended together, one that a signal killed counts before those that noticed it missing.
        """
        self._kill()
        for process in self._ranks:
            await asyncio.to_thread(process.join)
        codes = {rank: self._ranks[rank].exitcode or 0 for rank in self._ended or range(len(self._ranks))}
        rank, code = min(
            codes.items(), key=lambda item: item[1]
        )  # who was killed, before who missed it: signals are < 0
        for process in self._ranks:
            process.close()
        which = f"rank {rank} of {self._spec.degree} " if self._spec.degree > 1 else ""
        return f"worker {self._spec.name} died: {which}{describe_exit(code)}"

    def _note_end(self, rank: int) -> None:
        """A rank has ended: note it with those that ended just before it, and take the others along."""
        self._ended = [other for other, process in enumerate(self._ranks) if other == rank or process.exitcode]
        self._exited.set()
        self._kill()

    def _kill(self) -> None:
        for process in self._ranks:
            asyncio.get_running_loop().remove_reader(process.sentinel)
            process.kill()
