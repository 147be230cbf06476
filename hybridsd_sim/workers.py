"""The scheduler's ledger: which workers there are, what each was given, and when a gang could start on it.

A worker is one node, or one gang of GPUs, with a queue of its own in order of arrival. Its GPUs are a row of times at
which they will be free, sorted, so that a gang of d GPUs starts at the d-th; one array a pool, so that all workers are
looked at together. The times follow predictions and are put right by every `CloudDone`. A worker that is overdue is
expected to take as long again as it is late: one that hangs looks busier and busier instead of free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridsd_sim.policy import FleetView
from hybridsd_sim.roofline import Floats

__all__ = ["Job", "Worker", "WorkerPool", "WorkerState", "Workers"]

IDLE, NEVER = -np.inf, np.inf


@dataclass(frozen=True, slots=True)
class Worker:
    """A gang of GPUs of a pool that takes requests of its own."""

    name: str
    pool: str
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker at one moment: requests that it was given and has not done, and the seconds until it has."""

    name: str
    pool: str
    gpus: int
    queued: int
    left_s: float


@dataclass(slots=True)
class Job:
    """Work that a worker was given: GPUs, predicted seconds, and when it started or will, as far as is known."""

    number: int
    degree: int
    hold_s: float
    work: float
    start_s: float


@dataclass(slots=True)
class _Given:
    """A worker's place in its pool, and what it was given, in order of arrival."""

    worker: Worker
    index: int
    jobs: dict[int, Job] = field(default_factory=dict)


class WorkerPool:
    """The workers of one pool as policies see a pool (`queued`, `declared_work`, `wait_s`), and as they are placed on.

    `free_s[w, g]` is when worker w has g + 1 GPUs free: `IDLE` for GPUs that nobody uses, `NEVER` beyond its own.
    """

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.given = [_Given(worker, index) for index, worker in enumerate(workers)]
        self.widest = max((given.worker.gpus for given in self.given), default=1)
        self.free_s: Floats = np.full((len(self.given), self.widest), IDLE)
        for given in self.given:
            self.free_s[given.index, given.worker.gpus :] = NEVER
        self.queued = 0
        self.declared_work = 0.0

    def best(self, degree: int, now: float) -> tuple[int, float]:
        """The worker on which a gang of `degree` GPUs would start soonest, the first of equals, and in how long.

        Infinite seconds where no worker has so many GPUs.
        """
        if degree > self.widest or not self.given:
            return -1, NEVER
        waits = np.abs(self.free_s[:, degree - 1] - now)
        waits[self.free_s[:, degree - 1] == IDLE] = 0.0
        index = int(waits.argmin())
        return index, float(waits[index])

    def wait_s(self, degree: int, now: float) -> float:
        return self.best(degree, now)[1]

    def add(self, index: int, job: Job, now: float) -> None:
        """Give a worker a job that it begins once it can."""
        given = self.given[index]
        row = self.free_s[index]
        free_s = float(row[job.degree - 1])
        job.start_s = now if free_s == IDLE else now + abs(free_s - now)
        self.free_s[index] = _after(row, job, now)
        given.jobs[job.number] = job
        self.queued += 1
        self.declared_work += job.work

    def remove(self, index: int, number: int, now: float) -> None:
        """A worker has done a job, or will never do it: those behind it move up."""
        given = self.given[index]
        done = given.jobs.pop(number, None)
        if done is None:
            return
        self.queued -= 1
        self.declared_work = self.declared_work - done.work if self.queued else 0.0
        gpus = given.worker.gpus
        row = np.full(self.widest, IDLE)
        row[gpus:] = NEVER
        row[gpus - done.degree : gpus] = now  # the GPUs given back: whoever waited for them starts now
        for job in given.jobs.values():
            free_s = float(row[job.degree - 1])
            job.start_s = min(job.start_s, now) if free_s == IDLE else max(free_s, now)
            row = _after(row, job, job.start_s)
        row[row == now] = IDLE
        self.free_s[index] = row

    def state(self, given: _Given, now: float) -> WorkerState:
        last_s = max((job.start_s + job.hold_s for job in given.jobs.values()), default=now)
        worker = given.worker
        return WorkerState(worker.name, worker.pool, worker.gpus, len(given.jobs), max(0.0, last_s - now))


def _after(row: Floats, job: Job, now: float) -> Floats:
    """When the GPUs are free once the job has its own; nobody behind a job starts before it."""
    after = row.copy()
    after[: job.degree] = job.start_s + job.hold_s
    if job.start_s > now:
        np.maximum(after, job.start_s, out=after)
    after.sort()
    return after


class Workers:
    """All workers by pool, in the scenario's order of pools; `view` is what a policy is shown."""

    def __init__(self, pools: Sequence[str], workers: Iterable[Worker]) -> None:
        self._where: dict[str, tuple[WorkerPool, int]] = {}
        self._pools: dict[str, WorkerPool] = {}
        self.keep(pools)
        by_pool: dict[str, list[Worker]] = {}
        for worker in workers:
            by_pool.setdefault(worker.pool, []).append(worker)
        for name, mine in by_pool.items():
            self._fill(name, mine)

    def keep(self, pools: Sequence[str]) -> None:
        """Have these pools, in this order: those that were there with their workers, others empty."""
        self._pools = {name: self._pools.get(name) or WorkerPool(()) for name in pools}
        self._where = {name: place for name, place in self._where.items() if place[0] in self._pools.values()}
        self._look()

    def _fill(self, name: str, workers: Sequence[Worker]) -> None:
        pool = self._pools[name] = WorkerPool(workers)
        self._where.update({given.worker.name: (pool, given.index) for given in pool.given})
        self._look()

    def _look(self) -> None:
        self._by_index = list(self._pools.values())
        self.view = FleetView(self._by_index)
        self.widest = tuple(pool.widest if pool.given else 0 for pool in self._by_index)
        """The most GPUs that a worker of each pool has; 0 for a pool without workers."""

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def all(self) -> tuple[Worker, ...]:
        return tuple(given.worker for pool in self._pools.values() for given in pool.given)

    def states(self, now: float) -> tuple[WorkerState, ...]:
        return tuple(pool.state(given, now) for pool in self._pools.values() for given in pool.given)

    def place(self, pool_index: int, job: Job, now: float) -> tuple[str | None, float]:
        """Give a job to the worker of the pool that can begin soonest: its name, and in how many seconds."""
        pool = self._by_index[pool_index]
        index, wait_s = pool.best(job.degree, now)
        if index < 0 or wait_s == NEVER:
            return None, NEVER
        pool.add(index, job, now)
        return pool.given[index].worker.name, wait_s

    def release(self, worker: str, number: int, now: float) -> None:
        """Take a job out of a worker's queue; nothing happens if either is gone."""
        if worker in self._where:
            pool, index = self._where[worker]
            pool.remove(index, number, now)

    def join(self, worker: Worker, now: float) -> None:
        """Add an idle worker, or take it for idle if it was there."""
        self.leave(worker.name, now)
        mine = [given.worker for given in self._pools[worker.pool].given]
        self._replace(worker.pool, [*mine, worker], now)

    def leave(self, name: str, now: float) -> None:
        """Remove a worker and forget what it was given."""
        if name in self._where:
            pool, index = self._where.pop(name)
            worker = pool.given[index].worker
            mine = [given.worker for given in pool.given if given.worker is not worker]
            self._replace(worker.pool, mine, now)

    def _replace(self, pool: str, workers: Sequence[Worker], now: float) -> None:
        """The pool with other workers; those that stay keep their jobs."""
        jobs = {given.worker.name: list(given.jobs.values()) for given in self._pools[pool].given}
        self._fill(pool, workers)
        for given in self._pools[pool].given:
            for job in jobs.get(given.worker.name, ()):
                self._pools[pool].add(given.index, job, min(job.start_s, now))
