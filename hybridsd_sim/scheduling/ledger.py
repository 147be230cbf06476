"""The scheduler's ledger: which workers there are, what each was given, and when a worker group could start on it.

A ledger worker is one node, or one worker group of GPUs, with a queue of its own in order of arrival: its head waits
for its GPUs and everybody behind it waits too. Which jobs run and which wait follows from the events; when GPUs will be
free is predicted. An overdue job is expected to take as long again as it is late: a worker that hangs looks busier and
busier instead of free, and so does the queue behind it. A job overdue by far is taken for done and its event for lost,
so that no worker is kept busy for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf import Floats
from hybridsd_sim.scheduling.policy import AnyPool, FleetView

MAX_WORKERS = 16_384
"""Workers that are kept at a time; a plan that rents more, or a worker that comes on top, is refused."""

LEAST_LATE = 0.1
"""Share of its predicted seconds that an overdue job is expected to take at least: it was late by a moment only."""

LOST_S = 600.0
LOST_TIMES = 20.0
"""A job overdue by more than `LOST_S` seconds, and `LOST_TIMES` times those that were predicted, is taken for lost."""

IDLE, NEVER = -np.inf, np.inf
"""Since when a GPU is free that nobody uses, and a GPU that a worker does not have."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker group of GPUs of a pool that takes requests of its own."""

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
class WorkerJob:
    """A request's part on a worker: GPUs, predicted seconds, declared work (steps x pixels x images).

    Once it runs, `due_s` is when it should be done, `stop_s` when it is expected to be, and `again_s` when that
    expectation is to be revised. All times are seconds on the caller's clock.
    """

    number: int
    degree: int
    hold_s: float
    work: float
    given_s: float
    due_s: float = field(init=False)
    stop_s: float = field(init=False)
    again_s: float = field(init=False)

    @property
    def lost_s(self) -> float:
        """From when on it is taken for lost if it still runs."""
        return self.due_s + max(LOST_S, LOST_TIMES * self.hold_s)

    def expect(self, now: float) -> None:
        """Expect the end when it was predicted until that has passed, and then as long again; look again halfway."""
        if self.again_s < now:
            late_s = max(now - self.due_s, LEAST_LATE * self.hold_s)
            self.stop_s, self.again_s = now + late_s, min(now + late_s / 2, self.lost_s)


class WorkerQueue:
    """What one worker was given: the jobs that run on its GPUs, and those that wait, in order of arrival.

    `spare` are its free GPUs, `since_s` is when it came, and `index` its column in the pool's table.
    """

    __slots__ = ("index", "running", "since_s", "spare", "waiting", "worker")

    def __init__(self, worker: Worker, index: int, since_s: float) -> None:
        self.worker = worker
        self.index = index
        self.since_s = since_s
        self.spare = worker.gpus
        self.running: dict[int, WorkerJob] = {}
        self.waiting: OrderedDict[int, WorkerJob] = OrderedDict()

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, job: WorkerJob) -> bool:
        """Take a job; whether it begins at once."""
        begins = not self.waiting and job.degree <= self.spare
        if begins:
            self._begin(job, job.given_s)
        else:
            self.waiting[job.number] = job
        return begins

    def remove(self, number: int, now: float) -> WorkerJob | None:
        """Take out a job that is done, or never will be, and start those behind it that can; None if it is gone."""
        gone = self.waiting.pop(number, None)
        if gone is None and (gone := self.running.pop(number, None)) is not None:
            self.spare += gone.degree
        while self.waiting and (head := next(iter(self.waiting.values()))).degree <= self.spare:
            del self.waiting[head.number]
            self._begin(head, now)
        return gone

    def _begin(self, job: WorkerJob, now: float) -> None:
        self.running[job.number] = job
        self.spare -= job.degree
        job.due_s = job.stop_s = job.again_s = max(job.given_s, now) + job.hold_s

    def outlook(self) -> tuple[list[float], float]:
        """When one, two, ... of its GPUs will be free for a new job, and when the next job becomes overdue."""
        stops: list[float] = []
        again_s = NEVER
        for job in self.running.values():
            stops += [job.stop_s] * job.degree
            again_s = min(again_s, job.again_s)
        stops.sort()
        free_s = [IDLE] * self.spare + stops
        for job in self.waiting.values():
            free_s = after_waiting(free_s, job)
        return free_s, again_s


def after_waiting(free_s: list[float], job: WorkerJob) -> list[float]:
    """When one, two, ... GPUs are free once a waiting job has had its own; nobody behind it starts before it."""
    stop_s = free_s[job.degree - 1] + job.hold_s
    return sorted([stop_s] * job.degree + free_s[job.degree :])


class WorkerPool(AnyPool):
    """The workers of one pool: what policies see of them (`queued`, `declared_work`, `wait_s`), and their queues.

    `free_s[g, w]` is when worker w has g + 1 GPUs free: `IDLE` for GPUs that nobody uses, `NEVER` beyond its own. It is
    right after `look`, with which every question at a new moment begins. `widest` is the largest worker's GPUs.
    """

    def __init__(self) -> None:
        self.queues: list[WorkerQueue] = []
        self.widest = 0
        self.queued = 0
        self.declared_work = 0.0
        self.free_s: Floats = np.empty((0, 0))
        self._again_s: Floats = np.empty(0)
        self._changed: dict[WorkerQueue, None] = {}
        self._soonest: dict[int, tuple[int, float]] = {}

    def settle(self) -> None:
        """Predict anew for the workers that somebody was taken from."""
        for queue in self._changed:
            self._write(queue)
        self._changed.clear()

    def look(self, now: float) -> None:
        """Take in what has changed and who is overdue by now."""
        if self._changed:
            self.settle()
        if self.queues and self._again_s[self._again_s.argmin()] < now:
            for index in np.flatnonzero(self._again_s < now).tolist():
                queue, lost = self.queues[index], False
                # What is behind a lost job began when that was due, and may be lost as well.
                while job := next((job for job in queue.running.values() if job.lost_s < now), None):
                    self.remove(queue, job.number, job.due_s)
                    lost = True
                jobs = list(queue.running.values())
                stops_s = [job.stop_s for job in jobs]
                for job in jobs:
                    job.expect(now)
                if lost or len(jobs) > 1:
                    self._write(queue)
                    continue
                # Behind a job that runs alone the whole queue moves with it.
                self.free_s[: queue.worker.gpus, index] += jobs[0].stop_s - stops_s[0]
                self._again_s[index] = jobs[0].again_s
                self._soonest = {}

    def _write(self, queue: WorkerQueue) -> None:
        free_s, self._again_s[queue.index] = queue.outlook()
        self.free_s[: len(free_s), queue.index] = free_s
        self._soonest = {}

    def wait_s(self, degree: int, now: float) -> float:
        soonest = self._soonest  # a thread that looks while another writes puts its finding into a dropped table
        found = soonest.get(degree)
        if found is None:
            found = -1, NEVER
            if degree <= self.widest:
                row = self.free_s[degree - 1]
                index = int(row.argmin())
                found = index, float(row[index])
            found = soonest.setdefault(degree, found)
        free_s = found[1]
        return free_s - now if free_s > now else 0.0

    def best(self, degree: int, now: float) -> tuple[int, float]:
        """The worker on which a group of `degree` GPUs would start soonest, the first of equals, and in how long.

        Infinite seconds where no worker has so many GPUs.
        """
        wait_s = self.wait_s(degree, now)
        return self._soonest[degree][0], wait_s

    def add(self, index: int, job: WorkerJob) -> None:
        """Give a worker a job that it begins once it can."""
        queue = self.queues[index]
        self.declared_work += job.work
        if queue.add(job):
            self._write(queue)
            return
        self.queued += 1
        row = self.free_s[: queue.worker.gpus, index]
        row[:] = after_waiting(row.tolist(), job)
        self._soonest = {}

    def remove(self, queue: WorkerQueue, number: int, now: float) -> None:
        """A worker has done a job, or will never do it: those behind it move up."""
        waiting = len(queue.waiting)
        gone = queue.remove(number, now)
        if gone is not None:
            self.queued -= waiting - len(queue.waiting)
            self.declared_work -= gone.work
            self._changed[queue] = None

    def join(self, workers: Sequence[Worker], now: float) -> list[WorkerQueue]:
        """Add idle workers."""
        before = len(self.queues)
        new = [WorkerQueue(worker, before + place, now) for place, worker in enumerate(workers)]
        self.queues += new
        self.widest = max(queue.worker.gpus for queue in self.queues)
        free_s = np.full((max(self.widest, len(self.free_s)), len(self.queues)), NEVER)
        free_s[: len(self.free_s), :before] = self.free_s
        self.free_s, self._again_s = free_s, np.append(self._again_s, np.full(len(new), NEVER))
        for queue in new:
            free_s[: queue.worker.gpus, queue.index] = IDLE
        self._soonest = {}
        return new

    def leave(self, gone: Collection[WorkerQueue]) -> None:
        """Remove workers and forget what they were given; the others keep what they have."""
        places = [queue.index for queue in gone]
        self.free_s, self._again_s = (np.delete(array, places, -1) for array in (self.free_s, self._again_s))
        self.queues = [queue for queue in self.queues if queue not in gone]
        for index, queue in enumerate(self.queues):
            queue.index = index
        self._soonest = {}
        self.widest = max((queue.worker.gpus for queue in self.queues), default=0)
        for queue in gone:
            self._changed.pop(queue, None)
            self.queued -= len(queue.waiting)
            self.declared_work -= sum(job.work for jobs in (queue.running, queue.waiting) for job in jobs.values())

    def state(self, queue: WorkerQueue, now: float) -> WorkerState:
        worker, last_s = queue.worker, float(self.free_s[queue.worker.gpus - 1, queue.index])
        return WorkerState(worker.name, worker.pool, worker.gpus, len(queue), max(0.0, last_s - now))


class Ledger:
    """All workers with what they were given, by pool, in the scenario's order of pools.

    Queues go in order of arrival, whatever deadlines and priorities say: those order only queues of the caller's own.
    """

    def __init__(self, pools: Sequence[str], workers: Iterable[Worker]) -> None:
        self._where: dict[str, WorkerQueue] = {}
        self._pools: dict[str, WorkerPool] = {}
        self.keep(pools)
        self.exchange([], workers, IDLE)

    def keep(self, pools: Sequence[str]) -> None:
        """Have these pools, in this order: those that were there with their workers, others empty."""
        self._pools = {name: self._pools.get(name) or WorkerPool() for name in pools}
        self._where = {name: queue for name, queue in self._where.items() if queue.worker.pool in self._pools}
        self._by_index = list(self._pools.values())
        self._view = FleetView(self._by_index)
        self._measure()

    def _measure(self) -> None:
        self.widest = tuple(pool.widest for pool in self._by_index)
        """The most GPUs that a worker of each pool has; 0 for a pool without workers."""

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def all(self) -> tuple[Worker, ...]:
        return tuple(queue.worker for pool in self._by_index for queue in pool.queues)

    def view(self, now: float) -> FleetView:
        """What a policy is shown; it holds until the next event or placement."""
        for pool in self._by_index:
            pool.look(now)
        return self._view

    def states(self, now: float) -> tuple[WorkerState, ...]:
        self.view(now)
        return tuple(pool.state(queue, now) for pool in self._by_index for queue in pool.queues)

    def place(self, pool_index: int, job: WorkerJob, now: float) -> tuple[str | None, float]:
        """Give a job to the worker of the pool that can begin soonest: its name, and in how many seconds.

        None and infinite seconds where no worker of the pool has so many GPUs.
        """
        pool = self._by_index[pool_index]
        index, wait_s = pool.best(job.degree, now)
        if index < 0:
            return None, wait_s
        pool.add(index, job)
        return pool.queues[index].worker.name, wait_s

    def release(self, worker: str, number: int, now: float) -> None:
        """Take a job out of a worker's queue; nothing happens if either is gone."""
        if (queue := self._where.get(worker)) is not None:
            self._pools[queue.worker.pool].remove(queue, number, now)

    def settle(self) -> None:
        """Predict anew now what the next decision would else have to."""
        for pool in self._by_index:
            pool.settle()

    def join(self, worker: Worker, now: float) -> None:
        """Add an idle worker. One that is there already, with as many GPUs, keeps what it was given."""
        self.exchange([], [worker], now)

    def leave(self, name: str, now: float = NEVER) -> None:
        """Remove a worker and forget what it was given, unless it came after that."""
        queue = self._where.get(name)
        if queue is not None and queue.since_s <= now:
            self.exchange([name], [], now)

    def exchange(self, gone: Iterable[str], come: Iterable[Worker], now: float) -> None:
        """Remove and add workers as `leave` and `join` do, all at once: many take hardly longer than one."""
        names = set(gone)
        new = [w for w in come if w.name in names or not (w.name in self and self._where[w.name].worker == w)]
        names.update(worker.name for worker in new)
        left = {queue for name in names if (queue := self._where.pop(name, None)) is not None}
        for pool in {queue.worker.pool for queue in left}:
            self._pools[pool].leave({queue for queue in left if queue.worker.pool == pool})
        for pool in dict.fromkeys(worker.pool for worker in new):
            joined = self._pools[pool].join([worker for worker in new if worker.pool == pool], now)
            self._where.update({queue.worker.name: queue for queue in joined})
        if left or new:
            self._measure()


def rented_workers(replicas: Mapping[str, int], gpus_per_node: Mapping[str, int]) -> frozenset[Worker]:
    """A worker for each node that is rented, called `<pool>/<number>`."""
    return frozenset(
        Worker(f"{pool}/{index}", pool, gpus)
        for pool, gpus in gpus_per_node.items()
        for index in range(replicas.get(pool, 0))
    )


def worker_number(worker: Worker) -> tuple[str, int]:
    """The order of rented workers."""
    return worker.pool, int(worker.name.rpartition("/")[2])


def check_number(workers: int) -> None:
    """Raise `InputError` for more workers than are kept."""
    if workers > MAX_WORKERS:
        rule = f"a scheduler keeps at most {MAX_WORKERS}"
        raise InputError(Problem("workers", str(workers), rule, "Give each part of the fleet a scheduler of its own."))
