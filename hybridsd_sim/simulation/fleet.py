"""The fleet of a simulation: pools of GPUs with worker groups, queues and resident models, and edge devices.

A pool is a number of nodes with some GPUs each. A job takes all its GPUs on one node at once or waits; it holds them
until its work is done. SimPy timeouts with callbacks carry the time; there is one event a job, because nothing can be
decided between its start and its stop. Edge devices serve in order of arrival with known service times, so their start
and stop follow from a free-at time and need no event at all.

Queue disciplines of a pool (all in order of arrival unless said otherwise):

- `fifo`: the head waits for its GPUs and everybody behind it waits too.
- `gang_fifo`: a head that does not fit reserves the node that will be free soonest; those behind use the other nodes.
- `backfill`: the same, and a later job may use the reserved node if it is done before the head could start.
- `edf`: the highest priority, and among equals the earliest deadline, is the head.

Batches are greedy: a job of a route with a batch cap takes along waiting jobs of the same route and base model, in the
order of the queue and wherever they stand in it, and never waits for more. The worker group serves them all at once.

Preemption takes a node away with everything that runs there. The jobs return to the head of the queue (under `edf` to
their place in it) with all their work to do again; another node serves in the place of the lost one a while later, with
no model loaded. The rent runs on meanwhile, and the pool's view still counts the node among its GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Self, TypeVar

import simpy
from simpy.events import Timeout

from hybridsd_sim.scheduling import DeadlinePoolView, Due, PoolView, Rank

NAN, INFINITY = float("nan"), float("inf")


class Route:
    """What jobs of one class and plan share: `batch_s`, the seconds that 1, 2, ... of them take together.

    Jobs of one route may be batched; without `batch_s` they never are.
    """

    __slots__ = ("batch_s",)

    def __init__(self, batch_s: Sequence[float] = ()) -> None:
        self.batch_s = batch_s


ALONE = Route()
"""The route of jobs that are never batched."""


class PoolJob:
    """Work for a pool: GPUs, seconds, deadline; and, once it ran, when it was where.

    `hold_s` is the work itself, done alone. `load_s` is what loading the model adds: what was drawn for it
    (`drawn_load_s`) until it starts, 0 on a node that holds the model. `work` is what was declared of it (steps x
    pixels x images). `batch` are the jobs of its batch, None alone. `restarts` counts the nodes lost under it, and
    `lost_gpu_s` its part of the GPU-seconds that went with them. Seconds are on the simulated clock.
    """

    __slots__ = (
        "batch",
        "cloud_ready_s",
        "cloud_start_s",
        "cloud_stop_s",
        "deadline_s",
        "degree",
        "drawn_load_s",
        "hold_s",
        "load_s",
        "lost_gpu_s",
        "model_key",
        "node",
        "number",
        "priority",
        "restarts",
        "route",
        "work",
    )

    def __init__(self, number: int, degree: int, hold_s: float, deadline_s: float = INFINITY) -> None:
        self.number = number
        self.degree = degree
        self.hold_s = hold_s
        self.deadline_s = deadline_s
        self.load_s = self.drawn_load_s = self.lost_gpu_s = self.work = 0.0
        self.model_key = self.priority = self.restarts = 0
        self.route: Route = ALONE
        self.batch: Sequence[Self] | None = None
        self.cloud_ready_s = self.cloud_start_s = self.cloud_stop_s = NAN
        self.node = -1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.number}, {self.degree} GPUs, {self.hold_s:.3f} s)"


@dataclass(frozen=True, slots=True)
class Preemption:
    """How nodes are taken away, in seconds: a node serves for `up_s(node)`, and `replacement_s` later another one does.

    `up_s` is called once for each life of a node, when that begins.
    """

    up_s: Callable[[int], float]
    replacement_s: float


JobT = TypeVar("JobT", bound=PoolJob)


class GpuPool(Generic[JobT]):
    """GPUs of one kind in nodes, with one queue. `done(job)` is called when a job's GPUs are free again.

    `resident_models` limits how many models a node keeps; a job whose model is not there adds its `load_s`. None means
    that every model fits and is loaded. The nodes, rented at time 0, serve from `cold_start_s` on. `after_s(job)` are
    the seconds from a job's end here until what its deadline asks for.
    """

    def __init__(
        self,
        env: simpy.Environment,
        *,
        nodes: int,
        gpus_per_node: int,
        discipline: str,
        done: Callable[[JobT], None],
        resident_models: int | None = None,
        cold_start_s: float = 0.0,
        preemption: Preemption | None = None,
        after_s: Callable[[JobT], float] = lambda _: 0.0,
    ) -> None:
        self.env = env
        self.gpus_per_node = gpus_per_node
        self._due = DeadlinePoolView(nodes * gpus_per_node, 0)
        self._by_deadline = discipline == "edf"
        self.view = self._due if self._by_deadline else PoolView(nodes * gpus_per_node, 0)
        self._nodes = nodes
        self._done = done
        self._after_s = after_s
        self._by_free: list[dict[int, None]] = [{} for _ in range(gpus_per_node + 1)]
        self._free = [gpus_per_node] * nodes
        self._running: list[dict[int, Timeout]] = [{} for _ in range(nodes)]
        self._preemption = preemption
        self._away: dict[int, float] = {}
        self._resident_models = resident_models
        self._resident: list[dict[int, None]] = [{} for _ in range(nodes)]
        self._queue: deque[JobT] = deque()
        self._heap: list[tuple[Rank, JobT]] = []
        self._order = count(1)
        self._dispatch = {"fifo": self._dispatch_fifo, "edf": self._dispatch_edf}.get(
            discipline, self._dispatch_reserving
        )
        self._backfill = discipline == "backfill"
        if cold_start_s > 0.0:
            Timeout(env, cold_start_s).callbacks.append(lambda _: self._open())
        else:
            self._open()

    def __repr__(self) -> str:
        return f"GpuPool({self.view.busy_gpus} of {self.view.gpus} GPUs busy, {self.view.queued} waiting)"

    def _open(self) -> None:
        self._by_free[self.gpus_per_node] = dict.fromkeys(range(self._nodes))
        self.view.largest_free = self.gpus_per_node if self._nodes else 0
        self._dispatch()
        if self._preemption is not None:
            for node in range(self._nodes):
                self._begin_life(node, self._preemption)

    def submit(self, job: JobT) -> None:
        """Queue a job now; it starts at once if nobody waits and a node has room."""
        job.cloud_ready_s = self.env.now
        view = self.view
        view.declared_work += job.work
        if view.queued == 0 and (node := self._fit(job, ())) >= 0:
            self._start(job, node)
            return
        view.queued += 1
        view.backlog_gpu_s += job.degree * job.hold_s
        if self._by_deadline:
            self._push(job, next(self._order))
        else:
            self._queue.append(job)
        self._dispatch()

    def _push(self, job: JobT, turn: int) -> None:
        """Queue a job by priority and deadline; among equals, the lowest turn comes first."""
        rank = (-job.priority, job.deadline_s, turn)
        heappush(self._heap, (rank, job))
        latest_s = job.deadline_s - self._after_s(job) - job.hold_s
        self._due.enter(Due(rank, job.degree * job.hold_s, latest_s))

    def _fit(self, job: JobT, reserved: Iterable[int]) -> int:
        """The fullest node that still has room, one that holds the model if residency matters; -1 if there is none."""
        fallback = -1
        for bucket in self._by_free[job.degree :]:
            for node in bucket:
                if node in reserved:
                    continue
                if self._resident_models is None or job.model_key in self._resident[node]:
                    return node
                fallback = node if fallback < 0 else fallback
        return fallback

    def _start(self, job: JobT, node: int, batch: Sequence[JobT] | None = None) -> None:
        """Start a job on a node, with its batch if it has one."""
        now = self.env.now
        if self._resident_models is None:
            job.load_s = 0.0
        else:
            job.drawn_load_s = job.load_s
            resident = self._resident[node]
            if job.model_key in resident:
                del resident[job.model_key]
                job.load_s = 0.0
            elif len(resident) >= self._resident_models:
                del resident[next(iter(resident))]  # the least recently used one makes room
            resident[job.model_key] = None
        hold = (job.hold_s if batch is None else job.route.batch_s[len(batch) - 1]) + job.load_s
        job.node, job.cloud_start_s, job.cloud_stop_s = node, now, now + hold
        view = self.view
        view.busy_gpus += job.degree
        view.busy_until_gpu_s += job.degree * job.cloud_stop_s
        self._move(node, -job.degree)
        self._running[node][job.number] = stop = Timeout(self.env, hold, job)
        stop.callbacks.append(self._stop)
        if batch is not None:
            job.batch = batch
            for other in batch[1:]:
                other.batch, other.node, other.drawn_load_s, other.load_s = batch, node, other.load_s, job.load_s
                other.cloud_start_s, other.cloud_stop_s = now, job.cloud_stop_s

    def _move(self, node: int, change: int) -> None:
        """Change a node's free GPUs and keep the buckets and the view's largest gap right."""
        buckets, view, free = self._by_free, self.view, self._free[node]
        del buckets[free][node]
        self._free[node] = free = free + change
        buckets[free][node] = None
        if free > view.largest_free:
            view.largest_free = free
        else:
            while view.largest_free and not buckets[view.largest_free]:
                view.largest_free -= 1

    def _stop(self, event: simpy.Event) -> None:
        job: JobT = event.value  # type: ignore[assignment]
        view = self.view
        view.busy_gpus -= job.degree
        view.busy_until_gpu_s -= job.degree * job.cloud_stop_s
        view.declared_work -= job.work
        del self._running[job.node][job.number]
        self._move(job.node, job.degree)
        if view.queued:
            self._dispatch()
        self._done(job)
        if job.batch is not None:
            for member in job.batch[1:]:
                view.declared_work -= member.work
                self._done(member)

    def _leave_queue(self, job: JobT, node: int, until_s: float = INFINITY) -> None:
        """Start a waiting job, already taken out of the queue, and what may go with it and be done by `until_s`."""
        view = self.view
        view.queued -= 1
        view.backlog_gpu_s -= job.degree * job.hold_s
        if view.queued and len(job.route.batch_s) > 1 and (others := self._take_batch(job, until_s)):
            view.queued -= len(others)
            view.backlog_gpu_s -= job.degree * job.hold_s * len(others)
            self._start(job, node, (job, *others))
        else:
            self._start(job, node)

    def _take_batch(self, head: JobT, until_s: float) -> list[JobT]:
        """Take the jobs that join the head's batch out of the queue, the first of its route and base model."""
        room_s = until_s - self.env.now - head.load_s
        most = sum(hold_s <= room_s for hold_s in head.route.batch_s[1:])
        if self._by_deadline:
            taken: list[JobT] = []
            heap, passed = self._heap, []
            while heap and len(taken) < most:
                entry = rank, job = heappop(heap)
                if job.route is head.route and job.model_key == head.model_key:
                    taken.append(job)
                    self._due.leave(rank)
                else:
                    passed.append(entry)
            for entry in passed:
                heappush(heap, entry)
            return taken
        found: list[int] = []
        for index, job in enumerate(self._queue):
            if len(found) >= most:
                break
            if job.route is head.route and job.model_key == head.model_key:
                found.append(index)
        taken = [self._queue[index] for index in found]
        for index in reversed(found):
            del self._queue[index]
        return taken

    def _begin_life(self, node: int, preemption: Preemption) -> None:
        """Let a node serve until it is taken away; another one then comes in its place."""

        def preempt(_: simpy.Event) -> None:
            self._away[node] = self.env.now + preemption.replacement_s
            self._requeue(node)
            Timeout(self.env, preemption.replacement_s).callbacks.append(replace)
            self._dispatch()

        def replace(_: simpy.Event) -> None:
            del self._away[node]
            self._move(node, self.gpus_per_node)
            self._begin_life(node, preemption)
            self._dispatch()

        Timeout(self.env, preemption.up_s(node)).callbacks.append(preempt)

    def _requeue(self, node: int) -> None:
        """Take a node's GPUs and models away, break off what runs there, and put its jobs back into the queue."""
        self._move(node, -self._free[node])
        self._resident[node].clear()
        lost: list[JobT] = []
        view = self.view
        for stop in self._running[node].values():
            stop.callbacks.clear()
            head: JobT = stop.value  # type: ignore[assignment]
            view.busy_gpus -= head.degree
            view.busy_until_gpu_s -= head.degree * head.cloud_stop_s
            batch = head.batch or (head,)
            gpu_s = (self.env.now - head.cloud_start_s) * head.degree / len(batch)
            for job in batch:
                job.restarts += 1
                job.lost_gpu_s += gpu_s
                job.batch, job.node, job.cloud_start_s, job.cloud_stop_s = None, -1, NAN, NAN
                if self._resident_models is not None:
                    job.load_s = job.drawn_load_s
            lost += batch
        self._running[node].clear()
        for job in sorted(lost, key=lambda job: (job.cloud_ready_s, job.number), reverse=True):
            view.queued += 1
            view.backlog_gpu_s += job.degree * job.hold_s
            if self._by_deadline:
                self._push(job, -next(self._order))  # before those of its own priority and deadline
            else:
                self._queue.appendleft(job)

    def _dispatch_fifo(self) -> None:
        queue = self._queue
        while queue and (node := self._fit(queue[0], ())) >= 0:
            self._leave_queue(queue.popleft(), node)

    def _dispatch_edf(self) -> None:
        heap = self._heap
        while heap and (node := self._fit(heap[0][1], ())) >= 0:
            rank, job = heappop(heap)
            self._due.leave(rank)
            self._leave_queue(job, node)

    def _dispatch_reserving(self) -> None:
        """Start what fits, in order; each head that does not fit reserves the node it can have soonest.

        Of nodes that are free equally soon it is the first.
        """
        reserved: dict[int, float] = {}
        waiting: list[JobT] = []
        while self._queue and len(reserved) < self._nodes:
            job = self._queue.popleft()
            node = self._fit(job, reserved)
            if node < 0 and self._backfill:
                # a reserved node that the job would have left before the reservation begins
                stop = self.env.now + job.hold_s + job.load_s
                fitting = (n for n, when in reserved.items() if self._free[n] >= job.degree and stop <= when)
                node = next(fitting, -1)
            if node >= 0:
                self._leave_queue(job, node, reserved.get(node, INFINITY))
            else:
                waiting.append(job)
                unreserved = (node for node in range(self._nodes) if node not in reserved)
                soonest_s, node = min((self._free_at(node, job.degree), node) for node in unreserved)
                reserved[node] = soonest_s
        self._queue.extendleft(reversed(waiting))

    def _free_at(self, node: int, degree: int) -> float:
        """When the node will have `degree` GPUs free if nothing else starts there."""
        if node in self._away:
            return self._away[node]
        free, when = self._free[node], self.env.now
        running: list[JobT] = [stop.value for stop in self._running[node].values()]  # type: ignore[misc]
        for stop, gpus in sorted((job.cloud_stop_s, job.degree) for job in running):
            if free >= degree:
                break
            free, when = free + gpus, stop
        return when


class EdgeDevices:
    """The devices of one edge fleet. Owned: a request runs on its own user's device. Shared: on the first free one."""

    def __init__(self, replicas: int, *, shared: bool) -> None:
        self.replicas = replicas
        self._owned: dict[int, float] = {}
        self._shared: list[tuple[float, int]] | None = [(0.0, device) for device in range(replicas)] if shared else None
        if self._shared is not None:
            heapify(self._shared)

    def serve(self, ready_s: float, hold_s: float, draw: float) -> tuple[int, float]:
        """Serve a request that is ready now, in order of readiness: the device that does it, and when it starts.

        `draw` in [0, 1) picks the user's own device. Calls must come in order of `ready_s`.
        """
        if self._shared is not None:
            free_at, device = heappop(self._shared)
            start = max(ready_s, free_at)
            heappush(self._shared, (start + hold_s, device))
            return device, start
        device = int(draw * self.replicas)
        free_at = self._owned.get(device, 0.0)
        start = max(ready_s, free_at)
        self._owned[device] = start + hold_s
        return device, start
