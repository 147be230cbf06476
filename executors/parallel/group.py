"""The ranks of a parallel run: what they may say to each other, and how many bytes that takes.

A rank is given a `Group` and works through it, whatever carries the bytes: torch.distributed between processes, or
`loopback` with all ranks in one process. A collective is started and later awaited; the work in between hides it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem, RunError

T = TypeVar("T")

TIMEOUT_S = 120.0
"""A collective that takes longer has lost a rank; an edge that is silent for longer is gone."""


@dataclass(slots=True)
class Traffic:
    """What one rank sent and received. A tensor that goes to several ranks counts once for each."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0

    def count(self, sent: int, received: int) -> None:
        self.sent_bytes += sent
        self.received_bytes += received
        self.messages += 1


class Pending(Generic[T]):
    """An exchange under way. `wait` returns what arrived; every rank of the exchange must come to wait."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish = finish

    def wait(self) -> T:
        return self._finish()


class Group(ABC):
    """The ranks of a parallel run as one of them sees it: `rank` of `size`, working on `device`.

    Every rank calls the same collectives in the same order. `traffic` counts what this rank sent and received.
    """

    rank: int
    size: int
    device: torch.device
    traffic: Traffic

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank; all have the same shape.

        Counted as (size - 1) x its bytes, sent and received: what a rank's link carries, whatever the algorithm.
        """
        return self.start_all_gather(tensor).wait()

    def start_all_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        """Begin an all-gather. The tensor must not change until it is awaited.

        Work done between this and `wait` hides the exchange: the asynchronous methods live on that.
        """
        if self.size == 1:
            return Pending(lambda: [tensor])
        others = tensor.nbytes * (self.size - 1)
        self.traffic.count(others, others)
        return self._start_all_gather(tensor.contiguous())

    def start_exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]
    ) -> Pending[dict[int, Tensor]]:
        """Begin to send each rank its tensor and to fill `incoming` (empty tensors of the right shape) by sender."""
        if not outgoing and not incoming:
            return Pending(dict)
        self.traffic.count(sum(t.nbytes for t in outgoing.values()), sum(t.nbytes for t in incoming.values()))
        return self._start_exchange({rank: tensor.contiguous() for rank, tensor in outgoing.items()}, dict(incoming))

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of rank `source` on every rank; elsewhere `tensor` gives the shape and is filled."""
        if self.size > 1:
            is_source = self.rank == source
            self.traffic.count(tensor.nbytes * (self.size - 1) * is_source, tensor.nbytes * (not is_source))
            tensor = tensor.contiguous()
            self._broadcast(tensor, source)
        return tensor

    @abstractmethod
    def clock(self) -> float:
        """Seconds of this rank, its device's work finished: wall time between processes, own work in loopback."""

    @abstractmethod
    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        """The group of the part that this rank is in; every rank gives the same disjoint parts. It shares `traffic`."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def _start_all_gather(self, tensor: Tensor) -> Pending[list[Tensor]]: ...

    @abstractmethod
    def _start_exchange(
        self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]
    ) -> Pending[dict[int, Tensor]]: ...

    @abstractmethod
    def _broadcast(self, tensor: Tensor, source: int) -> None: ...


def synchronised_clock(device: torch.device) -> float:
    """Seconds on the process's clock once the device has finished its work.

    On a GPU that is the current stream's: an exchange under way on a stream of its own goes on beside it.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


class Alone(Group):
    """One rank without company."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device, self.traffic = 0, 1, torch.device(device), Traffic()

    def clock(self) -> float:
        return synchronised_clock(self.device)

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        return self

    def barrier(self) -> None: ...

    def _start_all_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        return Pending(lambda: [tensor])

    def _start_exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Pending[dict[int, Tensor]]:
        raise InputError(Problem("rank", str([*outgoing, *incoming]), "this group has one rank"))

    def _broadcast(self, tensor: Tensor, source: int) -> None: ...


class Distributed(Group):
    """Ranks in processes of their own, over torch.distributed (gloo or nccl)."""

    def __init__(
        self,
        device: torch.device,
        process_group: dist.ProcessGroup | None = None,
        traffic: Traffic | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        joined = process_group if process_group is not None else dist.group.WORLD
        if joined is None:
            raise RunError("this process has joined no group of ranks")
        self._process_group = joined
        self.rank = dist.get_rank(self._process_group)
        self.size = dist.get_world_size(self._process_group)
        self.device = device
        self.traffic = traffic or Traffic()
        self._timeout_s = timeout_s  # a part of the group must be told: torch would give it half an hour

    def clock(self) -> float:
        return synchronised_clock(self.device)

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        timeout = timedelta(seconds=self._timeout_s)
        groups = [dist.new_group([self._world_rank(rank) for rank in part], timeout) for part in parts]
        mine = next(group for part, group in zip(parts, groups, strict=True) if self.rank in part)
        return Distributed(self.device, mine, self.traffic, self._timeout_s)

    def barrier(self) -> None:
        own = [self.device.index] if self.device.type == "cuda" else None  # nccl would guess a device otherwise
        dist.barrier(self._process_group, device_ids=own)

    def _world_rank(self, rank: int) -> int:
        return dist.get_global_rank(self._process_group, rank)

    def _start_all_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        work = dist.all_gather(gathered, tensor, self._process_group, async_op=True)
        return Pending(lambda: _after([work], gathered))

    def _start_exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Pending[dict[int, Tensor]]:
        sends = [self._operation(dist.isend, tensor, rank) for rank, tensor in sorted(outgoing.items())]
        receives = [self._operation(dist.irecv, tensor, rank) for rank, tensor in sorted(incoming.items())]
        works = dist.batch_isend_irecv(sends + receives)
        return Pending(lambda: _after(works, (incoming, outgoing))[0])  # what is sent must live until it is gone

    def _operation(self, operation: Any, tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, self._world_rank(rank), self._process_group)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        dist.broadcast(tensor, self._world_rank(source), self._process_group)


def _after(works: Sequence[Any], result: T) -> T:
    """The result once the works are done."""
    for work in works:
        work.wait()
    return result


def join(
    *,
    backend: str,
    device: torch.device,
    timeout_s: float = TIMEOUT_S,
    rank: int = -1,
    size: int = -1,
    store: dist.Store | None = None,
) -> Distributed:
    """Become a rank of a group of processes that meet at `store`, or of the one that torchrun's environment describes.

    A process joins once; later calls give the same group with `timeout_s` for the parts it is split into.
    """
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=size,
            store=store,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    return Distributed(device, timeout_s=timeout_s)
