"""Times what requests ask of their workers before a run, on the very workers that will serve it.

First each worker alone, which is enough to choose a switch step and to price the plan. Then in a rehearsal: other
requests, at random times of the same rate as in the run, through the same service. That way a task's seconds hold what
cold caches, client, service and the other workers cost a worker at this load, and still nothing of the run itself. The
pace, last, tells in a few seconds how fast the workers are just now.

Service, client and driver share one process and its event loop, and requests still cross a TCP connection; every worker
has processes of its own, each on a CPU of its own that is kept awake.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from hybridsd_sim.errors import RunError
from hybridsd_sim.plan import Deployment, Stage
from hybridsd_sim.pricing import PlanCost
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling import Scheduler, Worker

from ..hybrid import open_listener
from ..live import (
    Client,
    ClientRequest,
    Link,
    OnStep,
    ProcessPool,
    ProcessSettings,
    RequestOutcome,
    ServiceSettings,
    Task,
    TaskResult,
    WorkerSpec,
    build_service,
    cloud_workers,
    edge_worker,
    run_service,
)
from ..profiling import MIN_RUNS
from .cost_rows import TimedTask, WorkerProfile, device_of, profile_of
from .load import replay_trace
from .recording import POLICY
from .testbed import REQUEST_CLASS, Testbed, plan_of

PROMPT = "a lighthouse at dusk"

WARMUP_RUNS = 4

_CLOUD, _EDGE = "cloud/0", "edge/0"


@dataclass(frozen=True, slots=True)
class ObservedTask:
    """A task that a worker did, and when it was given to it."""

    given_s: float
    done: TaskResult


class WatchedPool(ProcessPool):
    """A pool that remembers what its workers did, as long as `observed` is a list."""

    observed: list[ObservedTask] | None = None

    async def run(self, worker: str, task: Task, *, on_step: OnStep | None = None) -> TaskResult:
        given_s = time.monotonic()
        done = await super().run(worker, task, on_step=on_step)
        if self.observed is not None:
            self.observed.append(ObservedTask(given_s, done))
        return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The requests of a rehearsal: seconds of their arrivals, their links (None crosses no network), their price."""

    arrivals_s: Sequence[float]
    links: Sequence[Link | None]
    cost: PlanCost


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPools:
    """The workers of a validation, of which the cloud's are `specs`: one there, one at the edge, or one of them."""

    cloud: WatchedPool
    edge: WatchedPool
    specs: tuple[WorkerSpec, ...]

    def of(self, stage: Stage) -> tuple[WatchedPool, str]:
        """The pool and the worker that do a stage."""
        return (self.cloud, _CLOUD) if stage.site.tier == "cloud" else (self.edge, _EDGE)


async def measure_pace(
    pools: ProcessPools, scenario: Scenario, deployment: Deployment, settings: ServiceSettings, for_s: float
) -> dict[str, float]:
    """The median step of each device while all workers do one task after the other and no requests are about."""

    async def run(pool: ProcessPool, worker: str, task: Task) -> TaskResult:
        return await pool.run(worker, replace(task, key=f"pace/{time.monotonic_ns()}"))

    async def repeat(pool: ProcessPool, worker: str, task: Task) -> list[float]:
        found: list[float] = []
        while not found or time.monotonic() < until_s:
            found += (await run(pool, worker, task)).step_s
        return found

    begun, tasks = None, {}
    for stage in plan_of(deployment).stages:
        tasks[device_of(stage)] = (*pools.of(stage), _task(scenario, stage, begun, settings))
        begun = (await run(*tasks[device_of(stage)])).payload
    until_s = time.monotonic() + for_s
    step_s = await asyncio.gather(*[repeat(*task) for task in tasks.values()])
    return {device: median(seconds) for device, seconds in zip(tasks, step_s, strict=True)}


async def time_alone(
    pools: ProcessPools, scenario: Scenario, deployment: Deployment, settings: ServiceSettings
) -> WorkerProfile:
    """A few tasks of each worker, one worker after the other, with nothing else to do.

    The first `WARMUP_RUNS` are not counted. An edge goes on from what the cloud handed over.
    """
    plan, begun, timed = plan_of(deployment), None, []
    for stage in plan.stages:
        pool, worker = pools.of(stage)
        task = _task(scenario, stage, begun, settings)
        tasks = (replace(task, key=f"alone/{number}", seed=number) for number in range(WARMUP_RUNS + MIN_RUNS))
        done = [await pool.run(worker, one) for one in tasks][WARMUP_RUNS:]
        timed.append([TimedTask(one, one.stop_s - one.start_s) for one in done])
        begun = done[0].payload
    return profile_of(scenario, plan, timed, "worker alone")


def _task(scenario: Scenario, stage: Stage, begun: bytes | None, settings: ServiceSettings) -> Task:
    spec = scenario.requests[REQUEST_CLASS]
    return Task(
        key="", model=stage.model, prompt=PROMPT, height_px=spec.height_px, width_px=spec.width_px,
        num_inference_steps=spec.num_inference_steps, guidance_scale=spec.guidance_scale, sampler=spec.sampler,
        stop=stage.stop, begun=begun, decode=stage.stop == spec.num_inference_steps, payload=settings.payload,
        checkpoint_every=settings.checkpoint_every,
    )  # fmt: skip


async def rehearse(
    client: Client, pools: ProcessPools, scenario: Scenario, deployment: Deployment, rehearsal: Rehearsal
) -> WorkerProfile:
    """Serve other requests at the load of the run, and see what workers do and what the machine adds to the network."""
    plan = plan_of(deployment)
    for number in range(WARMUP_RUNS):
        await _ask(client, number)
    watched = [pools.of(stage)[0] for stage in plan.stages]
    for pool in watched:
        pool.observed = []
    try:
        sent = await replay_trace(rehearsal.arrivals_s, lambda number, _: _ask(client, number, rehearsal.links[number]))
        observed = [list(pool.observed or ()) for pool in watched]
    finally:
        for pool in watched:
            pool.observed = None
    found = profile_of(scenario, plan, [list(hold_times(tasks)) for tasks in observed], "served at the load of the run")
    cost = rehearsal.cost
    modelled_s = [
        0.0 if link is None else link.up_s(cost.bytes_up) + link.down_s(cost.bytes_down) for link in rehearsal.links
    ]
    stack_s = median(one.answer.transfer_s - seconds for one, seconds in zip(sent, modelled_s, strict=True))
    return replace(found, stack_s=max(0.0, stack_s))


async def _ask(client: Client, seed: int, link: Link | None = None) -> RequestOutcome:
    name = f"p{time.monotonic_ns()}"
    outcome = await client.ask(ClientRequest(id=name, request_class=REQUEST_CLASS, prompt=PROMPT, seed=seed, link=link))
    if outcome.status != "served":
        raise RunError(f"a request of the profile was not served: {outcome.reason} {outcome.words}".rstrip())
    return outcome


def hold_times(tasks: Iterable[ObservedTask]) -> Iterator[TimedTask]:
    """For how long each task held its worker: where the next one waited for it already, until that one began.

    Where none waited, to its own end, and then as long as a worker usually takes from one task to the next.
    """
    ordered = sorted(tasks, key=lambda observed: observed.done.start_s)
    pauses = {a.done.start_s: b.done.start_s - a.done.stop_s for a, b in pairwise(ordered) if b.given_s < a.done.stop_s}
    usual_s = median(pauses.values()) if pauses else 0.0
    for observed in ordered:
        done = observed.done
        yield TimedTask(done, done.stop_s - done.start_s + pauses.get(done.start_s, usual_s))


_WATCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent = int(sys.argv[2])
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


def available_cpus() -> tuple[int, ...]:
    """The CPUs that this process may use, by number; none where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def assign_cpus(processes: Sequence[int], cpus: Sequence[int]) -> list[tuple[int, ...]]:
    """CPUs for workers of so many processes, one a process; none for anybody where there are too few."""
    if sum(processes) > len(cpus):
        return [()] * len(processes)
    free = iter(cpus)
    return [tuple(next(free) for _ in range(count)) for count in processes]


@contextmanager
def keep_cpus_awake() -> Iterator[tuple[int, ...]]:
    """No CPU of this process sleeps inside the block; the ids of the processes that watch, which end with it.

    A CPU that has nothing to do goes to sleep; the next task finds another clock, cold caches or, on a virtual machine,
    a host that has lent the CPU to somebody else. Steps then take a few per cent more or less from one half minute to
    the next. A process of the lowest scheduling class (SCHED_IDLE) that does nothing on every CPU prevents that, and
    gives way at once to whoever has something to do; but it counts against a container's CPU quota, under which nobody
    should measure. Linux only; elsewhere nothing is done.
    """
    watchers: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in available_cpus() if hasattr(os, "SCHED_IDLE") else ():
            command = [sys.executable, "-c", _WATCH, str(cpu), str(os.getpid())]
            watchers.append(subprocess.Popen(command))  # noqa: S603 -- this very program
        yield tuple(watcher.pid for watcher in watchers)
    finally:
        for watcher in watchers:
            watcher.kill()
        for watcher in watchers:
            watcher.wait()


@asynccontextmanager
async def start_workers(deployment: Deployment, testbed: Testbed) -> AsyncIterator[ProcessPools]:
    """The workers that a deployment asks for, all up: a CPU thread each process, on CPUs that are kept awake."""
    settings = ProcessSettings(threads=1, weights=testbed.weights, profiles=testbed.profiles)
    device = edge_worker([plan_of(deployment)], settings)
    sides = cloud_workers(deployment, settings), (device,) if device else ()
    cpus = iter(assign_cpus([spec.degree for side in sides for spec in side], available_cpus()))
    specs, devices = (tuple(replace(spec, cpus=next(cpus)) for spec in side) for side in sides)
    with keep_cpus_awake():
        async with WatchedPool(specs) as cloud, WatchedPool(devices) as edge:
            yield ProcessPools(cloud=cloud, edge=edge, specs=specs)


@asynccontextmanager
async def open_client(
    pools: ProcessPools, scenario: Scenario, deployment: Deployment, profiles: Profiles, settings: ServiceSettings
) -> AsyncIterator[Client]:
    """A client of the live service that follows the deployment."""
    workers = [Worker(spec.name, spec.pool, spec.degree) for spec in pools.specs]
    scheduler = Scheduler.from_plan(deployment, policy=POLICY, scenario=scenario, profiles=profiles, workers=workers)
    service = build_service(scheduler, pools.cloud, specs=pools.specs, settings=settings)
    with open_listener(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        async with run_service(service, listener), Client(f"http://{host}:{port}", pools.edge) as client:
            yield client
