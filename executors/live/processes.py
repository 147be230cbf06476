"""The processes of a gang, from their start until none of them is left."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Literal

from executors.live.tasks import Gang
from executors.live.worker import live
from executors.ranks import last_words, meeting_place

StartMethod = Literal["spawn", "forkserver"]
GRACE_S = 2.0
"""Processes whose line is closed have that long to end by themselves, so that they can say why."""
_READ_AHEAD_BYTES = 2**22


class Processes:
    """The ranks of a gang as processes; they start with the object and end together."""

    def __init__(self, gang: Gang, start_method: StartMethod = "spawn") -> None:
        self._gang, self._start_method = gang, start_method
        self._store = meeting_place() if gang.degree > 1 else None  # the ranks meet there as long as they live
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
        return f"worker {self._gang.name} died: {which}{last_words(code)}"

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
    context.set_forkserver_preload(["executors.live.worker"])
    return context
