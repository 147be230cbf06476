"""The workers that a plan asks for: gangs of processes in the cloud, and the process of an edge device.

The workers of one site, as an asyncio program holds them: start them, give them tasks, notice when one dies.

A worker is a gang of processes (`worker`). Its tasks are done in the order of their arrival. If any of
its processes dies, the whole gang is killed, the tasks that it had raise `WorkerLost`, and a new gang takes its place.

The workers as the scheduler must know them: it is told who came up and who went down before every decision.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from hybridsd_sim.errors import HybridSDError, InputError, Problem, RunError, unknown_name
from hybridsd_sim.plan import Deployment, Plan, Request, Stage
from hybridsd_sim.scheduling import Decision, Scheduler, WorkerDown, WorkerUp

from ..parallel import RankFailure
from .tasks import Cancelled, Done, Gang, Kind, Task, WorkerLost, read, written
from .worker import Processes, StartMethod

_REMEDY = "Plan anew with a search space that leaves it out."


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What the machine gives each process: threads, device, precision, models' weights, a profiles folder."""

    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    weights: Mapping[str, Path] = field(default_factory=dict)
    profiles: Path | None = None


def plan_problems(plan: Plan) -> list[Problem]:
    """Why a plan cannot be carried out live: one stage in the cloud, then one at the edge, which also decodes."""
    tiers = [stage.site.tier for stage in plan.stages]
    problems = []
    if tiers not in (["cloud"], ["edge"], ["cloud", "edge"]):
        rule = "is served live only as one stage in the cloud, one at the edge, or the one after the other"
        problems.append(Problem("plan.stages", plan.label, rule, _REMEDY))
    if "edge" in tiers and plan.sites[plan.vae_site].tier != "edge":
        rule = "must decode at the edge what the edge denoised last"
        problems.append(Problem("plan.vae_site", plan.vae_site, rule, _REMEDY))
    return problems


def cloud_gangs(deployment: Deployment, here: Here) -> tuple[Gang, ...]:
    """As many gangs as fit each pool's nodes, named `<pool>/<number>`, with all models that the plans run there.

    On GPUs a gang has its own. Raises `InputError` for plans that cannot be served live, of which one pool would need
    gangs of several kinds, or that need more GPUs than are here.
    """
    plans = [part.plan for mix in deployment.plans.values() for part in mix]
    if problems := [problem for plan in plans for problem in plan_problems(plan)]:
        raise InputError(problems)
    gangs = [
        gang for pool, nodes in deployment.replicas.items() if nodes for gang in _of_pool(pool, nodes, plans, here)
    ]
    return placed(gangs, torch.cuda.device_count()) if here.device.startswith("cuda") else tuple(gangs)


def placed(gangs: Sequence[Gang], num_gpus: int) -> tuple[Gang, ...]:
    """The gangs on this machine's GPUs, one GPU a rank; a single gang stays as it is, and its ranks count from GPU 0.

    Raises `InputError` where there are too few GPUs, and for gangs of several ranks beside others.
    """
    wanted = sum(gang.degree for gang in gangs)
    if wanted > num_gpus:
        rule = f"every rank of a worker needs one, which makes {wanted}"
        raise InputError(Problem("devices", f"{num_gpus} GPUs", rule, "Plan fewer nodes, or serve with --device cpu."))
    if len(gangs) <= 1:
        return tuple(gangs)
    if wide := [gang.name for gang in gangs if gang.degree > 1]:
        rule = "has several ranks, and is served on GPUs only where it is the only worker"
        raise InputError(Problem("workers", ", ".join(wide), rule, "Plan one worker, or degrees of 1."))
    return tuple(replace(gang, device=f"cuda:{index}") for index, gang in enumerate(gangs))


def _of_pool(pool: str, nodes: int, plans: list[Plan], here: Here) -> Iterator[Gang]:
    mine = [plan for plan in plans for stage in plan.cloud_stages if stage.site.name == pool]
    if not mine:
        return
    stage, vae = _only_kind(pool, mine), mine[0].vae
    models = tuple(dict.fromkeys(plan.cloud_stages[0].model for plan in mine))
    for index in range(nodes * (stage.site.gpus_per_node // stage.degree)):
        yield Gang(
            name=f"{pool}/{index}", pool=pool, models=models, method=stage.method, degree=stage.degree,
            options=dict(stage.options), vae=vae, threads=here.threads, device=here.device, precision=here.precision,
            weights=here.weights, profiles=here.profiles,
        )  # fmt: skip


def _only_kind(pool: str, plans: list[Plan]) -> Stage:
    """A stage that stands for all of a pool, in method, degree, options and decoder."""
    kinds = {
        (stage.method, stage.degree, stage.options, plan.vae): stage for plan in plans for stage in plan.cloud_stages
    }
    if len(kinds) > 1:
        said = ", ".join(f"{method} x{degree} with {vae}" for method, degree, _, vae in kinds)
        rule = "a pool's workers are all of one method, degree and decoder"
        raise InputError(Problem(f"plan: pool {pool}", said, rule, "Limit search.methods, degrees, options and vaes."))
    return next(iter(kinds.values()))


def edge_gang(plans: Sequence[Plan], here: Here) -> Gang | None:
    """A device that finishes whatever these plans leave to the edge; None if they leave nothing."""
    at_edge = [plan for plan in plans if plan.sites[plan.vae_site].tier == "edge"]
    models = [(plan.edge_stages or plan.stages)[0].model for plan in at_edge]
    return device_gang(models, at_edge[0].vae, here) if at_edge else None


def device_gang(models: Sequence[str], vae: str, here: Here, *, number: int = 0) -> Gang:
    """An edge device's one process, with these models and this decoder."""
    return Gang(
        name=f"edge/{number}", pool="edge", models=tuple(dict.fromkeys(models)), vae=vae, threads=here.threads,
        device=here.device, precision=here.precision, weights=here.weights, profiles=here.profiles,
    )  # fmt: skip


log = logging.getLogger(__name__)


OnStep = Callable[[int, float], None]

_LONGEST_PAUSE_S = 30.0


class Crew:
    """Workers by name. As an async context manager it starts them, waits until all are up, and kills them at the end.

    `on_up` is called on the event loop whenever a worker is ready, at the start and after a restart, `on_down` when one
    that was up is lost; not at the end. Without `restart` a worker that died stays away. A process that is spawned
    imports for seconds first; with `forkserver` one process has done so for all, and workers on the CPU are there at
    once. Entering raises the error of a worker that cannot start: `InputError` for what is wrong with its gang, else
    `RunError`.
    """

    def __init__(
        self,
        gangs: Sequence[Gang],
        *,
        restart: bool = True,
        start_method: StartMethod = "spawn",
        on_up: Callable[[Gang], None] = lambda _: None,
        on_down: Callable[[Gang], None] = lambda _: None,
    ) -> None:
        names = [gang.name for gang in gangs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(Problem("workers", ", ".join(twice), "every worker has a name of its own"))
        self._workers = {
            gang.name: _Worker(gang, restart=restart, start_method=start_method, on_up=on_up, on_down=on_down)
            for gang in gangs
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

    async def run(self, worker: str, task: Task, *, on_step: OnStep | None = None) -> Done:
        """Let a worker do a task after those that it has; `on_step` hears the index and seconds of every step done.

        Raises `InputError` for an unknown worker and for a key that is in use, `WorkerLost` if the worker is not up or
        dies, `Cancelled` after `cancel`, and `RunError` with the worker's own words for a task that it could not do. If
        the caller's own asyncio task is cancelled, so is this one.
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
class _Job:
    """A task under way: who waits for it, and the last state that came of it."""

    task: Task
    on_step: OnStep | None
    outcome: asyncio.Future[Done]
    checkpoint: bytes | None = None
    step: int = 0

    def hear(self, kind: Kind, value: Any) -> None:
        """Take in what the worker says of the task."""
        if self.outcome.done():  # whoever waited for it has left
            return
        match kind:
            case Kind.step if self.on_step:
                asyncio.get_running_loop().call_soon(self.on_step, *value)
            case Kind.checkpoint:
                self.step, self.checkpoint = value
            case Kind.done:
                self.outcome.set_result(value)
            case Kind.cancelled:
                self.outcome.set_exception(Cancelled(f"task {self.task.key} was cancelled"))
            case Kind.failed:
                self.outcome.set_exception(_refusal(value, self.task))

    def lose(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(WorkerLost(reason, checkpoint=self.checkpoint, step=self.step))


def _refusal(failure: RankFailure, task: Task) -> RunError:
    """The worker's own words; wrong input is the cause of the error."""
    error = failure.error(f"task {task.key} failed")
    if isinstance(error, RunError):
        return error
    refusal = RunError(str(error))
    refusal.__cause__ = error
    return refusal


class _Worker:
    """A gang as its crew sees it: one life of its processes after the other, and the tasks that it was given."""

    def __init__(
        self,
        gang: Gang,
        *,
        restart: bool,
        start_method: StartMethod,
        on_up: Callable[[Gang], None],
        on_down: Callable[[Gang], None],
    ) -> None:
        self.gang, self._restart, self._start_method = gang, restart, start_method
        self._on_up, self._on_down = on_up, on_down
        self.pids: tuple[int, ...] = ()
        self._line: asyncio.StreamWriter | None = None
        self._jobs: dict[int, _Job] = {}
        self._tickets = itertools.count(1)

    @property
    def is_up(self) -> bool:
        return self._line is not None

    def start(self) -> asyncio.Future[None]:
        """Begin to live. The result is there when the worker is up for the first time, or the reason why it is not."""
        self._first_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._note_crash)
        return self._first_up

    async def end(self) -> None:
        self._life.cancel()
        await asyncio.wait({self._life})
        self._lose_all(f"worker {self.gang.name}: its crew was ended")

    # ---- Tasks ------------------------------------------------------------------------------------------------------

    async def run(self, task: Task, on_step: OnStep | None) -> Done:
        if self._line is None:
            raise WorkerLost(f"worker {self.gang.name} is not up")
        ticket = next(self._tickets)
        job = self._jobs[ticket] = _Job(task, on_step, asyncio.get_running_loop().create_future())
        self._line.write(written(Kind.task, ticket, task))
        try:
            return await job.outcome
        except asyncio.CancelledError:
            self._call_off(ticket)
            raise
        finally:
            self._jobs.pop(ticket, None)

    def has(self, key: str) -> bool:
        return any(job.task.key == key for job in self._jobs.values())

    def cancel(self, key: str) -> None:
        for ticket, job in self._jobs.items():
            if job.task.key == key:
                self._call_off(ticket)

    def _call_off(self, ticket: int) -> None:
        if self._line is not None:
            self._line.write(written(Kind.cancel, ticket))

    # ---- Lives ------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Start the gang again whenever it has died; one that cannot start is tried after longer and longer pauses."""
        pause_s = 0.0
        while True:
            was_up, error = await self._one_life()
            if not self._first_up.done():
                self._first_up.set_exception(error)
                return
            if not self._restart:
                return
            pause_s = 0.0 if was_up else min(max(2 * pause_s, 0.5), _LONGEST_PAUSE_S)
            log.warning("%s; it starts again in %g s", error, pause_s)
            await asyncio.sleep(pause_s)

    async def _one_life(self) -> tuple[bool, HybridSDError]:
        """From the start of the processes until none is left: whether the worker was up, and why it ended."""
        try:
            processes = Processes(self.gang, self._start_method)
        except OSError as error:
            return False, RunError(f"worker {self.gang.name} cannot be started: {error}")
        self.pids = processes.pids
        try:
            refusal = await self._listen(processes)
        finally:
            was_up, self._line, self.pids = self.is_up, None, ()
            died = await processes.end()
        if was_up:
            asyncio.get_running_loop().call_soon(self._on_down, self.gang)
        self._lose_all(died)
        return was_up, refusal or RunError(died)

    async def _listen(self, processes: Processes) -> HybridSDError | None:
        """Hear what the worker says to the end of its line; the error with which it refused to start, if it did."""
        reader, writer = await processes.connect()
        refusal = None
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, ticket, value = await read(reader)
                if kind is Kind.up:
                    self._go_up(writer)
                elif ticket in self._jobs:
                    self._jobs[ticket].hear(kind, value)
                elif kind is Kind.failed and ticket == 0:
                    refusal = value.error(f"worker {self.gang.name} cannot start")
        await processes.one_ends()
        return refusal

    def _go_up(self, writer: asyncio.StreamWriter) -> None:
        self._line = writer
        asyncio.get_running_loop().call_soon(self._on_up, self.gang)
        if not self._first_up.done():
            self._first_up.set_result(None)

    def _lose_all(self, reason: str) -> None:
        for job in self._jobs.values():
            job.lose(reason)

    def _note_crash(self, life: asyncio.Task[None]) -> None:
        if life.cancelled() or (error := life.exception()) is None:
            return
        self._lose_all(f"worker {self.gang.name} is given up: {error}")
        if self._first_up.done():
            log.error("worker %s is given up", self.gang.name, exc_info=error)
        else:
            self._first_up.set_exception(error)


_POLL_S = 0.05


class Roster:
    """A crew and its scheduler. Workers that are lost come back by themselves, so that waiting for them is sensible.

    `gangs` are the crew's. Without them a worker is what the scheduler was made with, and does whatever its pool does.
    """

    def __init__(self, scheduler: Scheduler, crew: Crew, gangs: Sequence[Gang] = ()) -> None:
        self.scheduler = scheduler
        self.crew = crew
        self._gangs = {gang.name: gang for gang in gangs}
        known = scheduler.workers(time.monotonic())
        self._told = {worker.name for worker in known}
        self._places = {worker.name: (worker.pool, worker.gpus) for worker in known}
        self._places |= {gang.name: (gang.pool, gang.degree) for gang in gangs}

    @property
    def complete(self) -> bool:
        """Whether every worker is up."""
        return self._places.keys() <= set(self.crew.up())

    def decide(self, request: Request, now: float) -> Decision:
        """The scheduler's decision, on the workers that are up now."""
        self._tell(now)
        return self.scheduler.decide(request, None, now)

    def weigh(self, request: Request, now: float) -> Decision:
        """What `decide` would answer; changes nothing in the ledger."""
        self._tell(now)
        return self.scheduler.preview(request, None, now).decision

    def _tell(self, now: float) -> None:
        up = set(self.crew.up())
        for name in self._told - up:
            self.scheduler.observe(WorkerDown(name, now))
        for name in up - self._told:
            pool, gpus = self._places.get(name, ("", 0))
            if pool in self.scheduler.scenario.pools:
                self.scheduler.observe(WorkerUp(name, pool, now, gpus))
        self._told = up

    def worker_for(self, stage: Stage, wanted: str | None) -> str | None:
        """The worker that the scheduler wanted, else another one that is up and can do the stage; None if none is."""
        fit = [name for name in self.crew.up() if self._fits(name, stage)]
        if wanted in fit:
            return wanted
        left_s = {worker.name: worker.left_s for worker in self.scheduler.workers(time.monotonic())}
        return min(fit, key=lambda name: left_s.get(name, 0.0), default=None)

    def _fits(self, name: str, stage: Stage) -> bool:
        gang = self._gangs.get(name)
        if gang is None:
            return self._places.get(name, ("", 0))[0] == stage.site.name
        made_for = (gang.pool, gang.method, gang.degree, dict(gang.options))
        asked = (stage.site.name, stage.method, stage.degree, dict(stage.options))
        return stage.model in gang.models and made_for == asked

    async def change(self, until_s: float) -> bool:
        """Wait until other workers are up than now; False if `until_s` comes first."""
        before = self.crew.up()
        while time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
            if self.crew.up() != before:
                return True
        return False
