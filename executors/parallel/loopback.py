"""All ranks in one process, run in turn: what each of N devices would compute, measured on the one that is there.

Every rank is a thread, and one of them at a time holds the turn. A rank passes it on only where it must wait for
another, so the order of work, and with it every number, is the same in every run. The time a rank holds the turn is its
own compute; what a wire would add is not in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hybridsd_sim.errors import RunError

from .group import Group, Pending, Traffic, synchronised_clock

T = TypeVar("T")

_Key = tuple[object, ...]


class _Stopped(BaseException):
    """Another rank failed; not an `Exception`, so that no handler on the way takes it for its own."""


@dataclass(slots=True, eq=False)
class _World:
    """Whose turn it is, and what lies on the table between the ranks."""

    size: int
    device: torch.device
    turn: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    table: dict[_Key, Tensor] = field(default_factory=dict)
    readers_left: dict[_Key, int] = field(default_factory=dict)
    at_work: set[int] = field(default_factory=set)
    fruitless_turns: int = 0
    error: BaseException | None = None
    spent_s: list[float] = field(default_factory=list)
    since_s: float = 0.0

    def __post_init__(self) -> None:
        self.at_work, self.spent_s = set(range(self.size)), [0.0] * self.size

    def enter(self, rank: int) -> None:
        """Wait for the turn and start the rank's clock."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.error is not None)
            if self.error is not None:
                raise _Stopped
        self.since_s = synchronised_clock(self.device)

    def leave(self, rank: int, *, finished: bool = False) -> None:
        """Stop the rank's clock and pass the turn to the next rank that is at work."""
        self.spent_s[rank] += synchronised_clock(self.device) - self.since_s
        with self.changed:
            if finished:
                self.at_work.discard(rank)
            later = [(other - rank - 1) % self.size for other in self.at_work]
            if later:
                self.turn = (rank + 1 + min(later)) % self.size
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def clock(self, rank: int) -> float:
        return self.spent_s[rank] + synchronised_clock(self.device) - self.since_s

    def put(self, key: _Key, tensor: Tensor, readers: int) -> None:
        """Lay a copy on the table: the sender may go on and change its own."""
        self.table[key], self.readers_left[key] = tensor.clone(), readers
        self.fruitless_turns = 0

    def take(self, rank: int, keys: Sequence[_Key]) -> list[Tensor]:
        """What lies there under these keys, letting the others work until it does."""
        while not all(key in self.table for key in keys):
            self.fruitless_turns += 1
            if self.fruitless_turns > 2 * self.size:
                raise RunError(f"rank {rank} waits for {keys[0]}, which nobody will send; the ranks disagree")
            self.leave(rank)
            self.enter(rank)
        for key in keys:
            self.readers_left[key] -= 1
        return [self.table[key] if self.readers_left[key] else self.table.pop(key) for key in keys]


class Loopback(Group):
    """One of several ranks in this process; made by `run_loopback`."""

    def __init__(self, world: _World, members: Sequence[int], rank: int, traffic: Traffic, name: _Key = ()) -> None:
        self.rank, self.size, self.device, self.traffic = rank, len(members), world.device, traffic
        self._world, self._members, self._name = world, tuple(members), name
        self._counts: dict[_Key, int] = {}

    @property
    def _world_rank(self) -> int:
        return self._members[self.rank]

    def clock(self) -> float:
        return self._world.clock(self._world_rank)

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        part = next(tuple(part) for part in parts if self.rank in part)
        members = [self._members[rank] for rank in part]
        name = (*self._name, *self._key("split"), part)
        return Loopback(self._world, members, part.index(self.rank), self.traffic, name)

    def barrier(self) -> None:
        self._gather(torch.empty(0)).wait()

    def _start_all_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        return self._gather(tensor)

    def _gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        key = self._key("gather")
        self._world.put((*key, self.rank), tensor, self.size)
        return Pending(lambda: self._world.take(self._world_rank, [(*key, rank) for rank in range(self.size)]))

    def _start_exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Pending[dict[int, Tensor]]:
        for rank, tensor in outgoing.items():
            self._world.put(self._key("send", self.rank, rank), tensor, 1)
        keys = [self._key("send", rank, self.rank) for rank in incoming]

        def finish() -> dict[int, Tensor]:
            for tensor, arrived in zip(incoming.values(), self._world.take(self._world_rank, keys), strict=True):
                tensor.copy_(arrived)
            return incoming

        return Pending(finish)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        key = self._key("broadcast")
        if self.rank == source:
            self._world.put(key, tensor, self.size - 1)
        else:
            tensor.copy_(self._world.take(self._world_rank, [key])[0])

    def _key(self, *what: object) -> _Key:
        """The next message of this sort: every rank counts them alike, as all call the same collectives in order."""
        number = self._counts[what] = self._counts.get(what, 0) + 1
        return (*self._name, *what, number)


def run_loopback(work: Callable[..., T], size: int, args: Sequence[Any], device: torch.device) -> list[T]:
    """Run `work(group, *args)` for every rank in turn and return what each returned; the first error is raised.

    A rank that waits for what nobody will send ends the run with a `RunError`. An interrupt stops all ranks at their
    next wait.
    """
    world = _World(size, device)
    results: list[Any] = [None] * size

    def live(rank: int) -> None:
        try:
            world.enter(rank)
            results[rank] = work(Loopback(world, range(size), rank, Traffic()), *args)
            world.leave(rank, finished=True)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 raised again below, in the caller's thread
            world.fail(error)

    threads = [threading.Thread(target=live, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt in the caller's thread stops the ranks at their next wait
        world.fail(error)
        raise
    if world.error is not None:
        raise world.error
    return results
