"""Starts the ranks of a parallel run and brings back what each of them returned.

Ranks in processes of their own meet over torch.distributed; a rank that dies takes the others with it within seconds,
and the caller learns which and why. Under torchrun the processes are there already and only join. A run that cannot
have the devices it was asked for does not start.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import multiprocessing

from hybridsd_sim.errors import HybridSDError, InputError, Problem, RunError

from .group import TIMEOUT_S, Alone, Distributed, join
from .loopback import run_loopback

T = TypeVar("T")

Carrier = Literal["loopback", "gloo", "nccl"]

_GRACE_S = 2.0
"""Once a rank has failed, the others have that long to say what they saw of it."""


def run_ranks(
    work: Callable[..., T],
    size: int,
    *,
    kind: Carrier = "loopback",
    args: Sequence[Any] = (),
    device: str = "cpu",
    threads: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[T]:
    """Run `work(group, *args)` on every one of `size` ranks and return their results, by rank.

    `kind`: loopback runs all ranks in this process, in turn, on `device`; gloo starts processes on the CPU; nccl starts
    a process for each GPU. A process has `threads` threads, by default its share of this one's. Between processes a
    collective may take `timeout_s`. Results of processes travel through torch.save.

    Raises `InputError` where the devices are not there, and whatever `HybridSDError` a rank raises; `RunError` where a
    rank fails in another way, dies or is lost, with the rank's own traceback as its cause.
    """
    if size < 1:
        raise InputError(Problem("degree", str(size), "counts ranks, so it is at least 1"))
    there, wanted = torch.cuda.device_count(), size if kind == "nccl" else int(device.startswith("cuda"))
    if wanted > there:
        rule = f"{wanted} needed for {size} {kind} ranks"
        remedy = "Use loopback ranks, which share one GPU and run in turn." if there else "Run on a machine with GPUs."
        raise InputError(Problem("devices", f"{there} GPUs", rule, remedy))
    if size == 1 and kind == "loopback":
        return [work(Alone(device), *args)]
    if kind == "loopback":
        return run_loopback(work, size, args, torch.device(device))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _join_torchrun(work, size, kind, args, threads, timeout_s)
    threads = threads or max(1, torch.get_num_threads() // size)
    return _run_processes(work, size, kind, args, threads, timeout_s)


def _device_of(rank: int, kind: Carrier) -> torch.device:
    device = torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ---- Where ranks meet -----------------------------------------------------------------------------------------------


def open_rendezvous() -> dist.TCPStore:
    """Where processes of this machine meet, by its `port`; whoever starts them keeps it for as long as they live."""
    listener = socket.create_server(("127.0.0.1", 0))  # of its own accord a store listens to the whole network
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_rendezvous(rank: int, size: int, *, kind: Carrier, port: int, timeout_s: float = TIMEOUT_S) -> Distributed:
    """Become a rank of the group whose processes meet at this port of `open_rendezvous`; gloo works on the CPU."""
    if sys.platform == "linux":  # the host's own name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    return join(backend=kind, device=_device_of(rank, kind), timeout_s=timeout_s, rank=rank, size=size, store=store)


# ---- The process that starts the ranks ------------------------------------------------------------------------------


def _run_processes(
    work: Callable[..., T], size: int, kind: Carrier, args: Sequence[Any], threads: int, timeout_s: float
) -> list[T]:
    store = open_rendezvous()
    with tempfile.TemporaryDirectory(prefix="hybridsd-ranks-") as name:
        folder = Path(name)
        job = (work, size, kind, args, threads, timeout_s, store.port, folder)
        processes = multiprocessing.start_processes(
            _run_rank, job, nprocs=size, join=False, start_method="spawn"
        ).processes
        try:
            while not any(process.exitcode for process in processes):
                if not (at_work := [process.sentinel for process in processes if process.exitcode is None]):
                    break
                connection.wait(at_work)
            deadline_s = time.monotonic() + _GRACE_S
            for process in processes:
                process.join(max(0.0, deadline_s - time.monotonic()))
            codes = [process.exitcode for process in processes]  # None of a rank that is still at work
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(code != 0 for code in codes):
            raise _first_failure(codes, folder)
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(size)]


def _first_failure(codes: Sequence[int | None], folder: Path) -> HybridSDError:
    """The error of the rank that failed or died, rather than of those that lost it while they waited."""
    size = len(codes)
    files = {rank: file for rank in range(size) if (file := _failure(folder, rank)).exists()}
    failures: dict[int, RankFailure] = {rank: torch.load(file, weights_only=False) for rank, file in files.items()}
    for rank, failure in failures.items():
        if not failure.lost_another:
            return failure.error(f"rank {rank} of {size} failed")
    for rank, code in enumerate(codes):
        if code and rank not in failures:
            return RunError(f"rank {rank} of {size} died: {describe_exit(code)}")
    rank, failure = next(iter(failures.items()))
    return failure.error(f"rank {rank} of {size} lost another rank")


def describe_exit(code: int) -> str:
    """What an exit code says: the number, or the signal that killed the process.

    As in multiprocessing, a negative code is that of a signal.
    """
    if code > 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"killed by {known.get(-code, f'signal {-code}')}"


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"


# ---- What a rank that fails leaves behind ---------------------------------------------------------------------------


class RankTraceback(Exception):  # noqa: N818 -- no error of its own; it is the cause of one
    """Where a rank in another process failed: its traceback as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class RankFailure:
    """An exception as it crosses to the process that started the rank.

    `own` is what to raise again there: the type and the argument of a `HybridSDError`; None for other exceptions.
    `lost_another` says that the rank failed because another one was gone or silent.
    """

    text: str
    traceback: str
    own: tuple[type[HybridSDError], Any] | None
    lost_another: bool

    @classmethod
    def of(cls, error: Exception) -> RankFailure:
        own: tuple[type[HybridSDError], Any] | None = None
        if isinstance(error, HybridSDError):
            own = (type(error), error.problems if isinstance(error, InputError) else str(error))
        return cls(
            text=": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]),
            traceback=traceback.format_exc(),
            own=own,
            # errors of gloo have no type, but name its sources
            lost_another=isinstance(error, dist.DistError | ConnectionError) or "/gloo/" in str(error),
        )

    def error(self, what: str) -> HybridSDError:
        """The error to raise, with the rank's traceback as its cause."""
        error = self.own[0](self.own[1]) if self.own else RunError(f"{what}: {self.text}")
        error.__cause__ = RankTraceback(self.traceback)
        return error


def _failure(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.failed"


# ---- A rank ---------------------------------------------------------------------------------------------------------


def _run_rank(
    rank: int,
    work: Callable[..., T],
    size: int,
    kind: Carrier,
    args: Sequence[Any],
    threads: int,
    timeout_s: float,
    port: int,
    folder: Path,
) -> None:
    """A rank's whole life, in its own process."""
    torch.set_num_threads(threads)
    try:
        group = join_rendezvous(rank, size, kind=kind, port=port, timeout_s=timeout_s)
        torch.save(work(group, *args), _result(folder, rank))
        group.barrier()  # nobody leaves while another still reads from it
    except Exception as error:  # noqa: BLE001 -- raised again by the process that started this one
        part = folder / f"rank{rank}.part"
        torch.save(RankFailure.of(error), part)
        part.rename(_failure(folder, rank))  # whole, or not there
        sys.exit(1)
    dist.destroy_process_group()


def _join_torchrun(
    work: Callable[..., T], size: int, kind: Carrier, args: Sequence[Any], threads: int | None, timeout_s: float
) -> list[T]:
    """This process is already a rank, started by torchrun: join the others and share the results."""
    there = int(os.environ["WORLD_SIZE"])
    if there != size:
        raise InputError(Problem("torchrun --nproc-per-node", str(there), f"must be the degree, {size}"))
    if threads:
        torch.set_num_threads(threads)
    group = join(backend=kind, device=_device_of(int(os.environ["LOCAL_RANK"]), kind), timeout_s=timeout_s)
    results: list[Any] = [None] * size
    dist.all_gather_object(results, work(group, *args))
    group.barrier()
    return results
