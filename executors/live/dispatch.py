"""Which workers carry out a plan, and which of them does a stage: between the scheduler and the worker pool.

A deployment says what each pool rents; from it come the workers to start, in the cloud and for an edge device. While
they run, the `Dispatcher` tells the scheduler before every decision who came up and who went down, and finds the worker
for the stage that was decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, Plan, Request, Stage
from hybridsd_sim.scheduling import Decision, Scheduler, WorkerDown, WorkerUp

from .tasks import WorkerSpec
from .worker_pool import ProcessPool

_POLL_S = 0.05

_REMEDY = "Plan anew with a search space that leaves it out."


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
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


def cloud_workers(deployment: Deployment, settings: ProcessSettings) -> tuple[WorkerSpec, ...]:
    """As many workers as fit each pool's nodes, named `<pool>/<number>`, with all models that the plans run there.

    On GPUs a worker has its own. Raises `InputError` for plans that cannot be served live, of which one pool would need
    workers of several kinds, or that need more GPUs than are here.
    """
    plans = [part.plan for mix in deployment.plans.values() for part in mix]
    if problems := [problem for plan in plans for problem in plan_problems(plan)]:
        raise InputError(problems)
    specs: list[WorkerSpec] = []
    for pool, nodes in deployment.replicas.items():
        mine = [plan for plan in plans for stage in plan.cloud_stages if stage.site.name == pool]
        if not (nodes and mine):
            continue
        kinds = {
            (stage.method, stage.degree, stage.options, plan.vae): stage for plan in mine for stage in plan.cloud_stages
        }
        if len(kinds) > 1:
            found = ", ".join(f"{method} x{degree} with {vae}" for method, degree, _, vae in kinds)
            rule = "a pool's workers are all of one method, degree and decoder"
            remedy = "Limit search.methods, degrees, options and vaes."
            raise InputError(Problem(f"plan: pool {pool}", found, rule, remedy))
        stage, models = next(iter(kinds.values())), tuple(dict.fromkeys(plan.cloud_stages[0].model for plan in mine))
        specs += [
            WorkerSpec(
                name=f"{pool}/{index}", pool=pool, models=models, method=stage.method, degree=stage.degree,
                options=dict(stage.options), vae=mine[0].vae, threads=settings.threads, device=settings.device,
                precision=settings.precision, weights=settings.weights, profiles=settings.profiles,
            )
            for index in range(nodes * (stage.site.gpus_per_node // stage.degree))
        ]  # fmt: skip
    return place_on_gpus(specs, torch.cuda.device_count()) if settings.device.startswith("cuda") else tuple(specs)


def place_on_gpus(specs: Sequence[WorkerSpec], num_gpus: int) -> tuple[WorkerSpec, ...]:
    """The workers on this machine's GPUs, one GPU a rank; a single one stays as it is, and its ranks count from GPU 0.

    Raises `InputError` where there are too few GPUs, and for workers of several ranks beside others.
    """
    wanted = sum(spec.degree for spec in specs)
    if wanted > num_gpus:
        rule = f"every rank of a worker needs one, which makes {wanted}"
        raise InputError(Problem("devices", f"{num_gpus} GPUs", rule, "Plan fewer nodes, or serve with --device cpu."))
    if len(specs) <= 1:
        return tuple(specs)
    if wide := [spec.name for spec in specs if spec.degree > 1]:
        rule = "has several ranks, and is served on GPUs only where it is the only worker"
        raise InputError(Problem("workers", ", ".join(wide), rule, "Plan one worker, or degrees of 1."))
    return tuple(replace(spec, device=f"cuda:{index}") for index, spec in enumerate(specs))


def edge_worker(plans: Sequence[Plan], settings: ProcessSettings) -> WorkerSpec | None:
    """A device that finishes whatever these plans leave to the edge; None if they leave nothing."""
    at_edge = [plan for plan in plans if plan.sites[plan.vae_site].tier == "edge"]
    models = [(plan.edge_stages or plan.stages)[0].model for plan in at_edge]
    return device_worker(models, at_edge[0].vae, settings) if at_edge else None


def device_worker(models: Sequence[str], vae: str, settings: ProcessSettings, *, number: int = 0) -> WorkerSpec:
    """An edge device's one process, with these models and this decoder."""
    return WorkerSpec(
        name=f"edge/{number}", pool="edge", models=tuple(dict.fromkeys(models)), vae=vae, threads=settings.threads,
        device=settings.device, precision=settings.precision, weights=settings.weights, profiles=settings.profiles,
    )  # fmt: skip


class Dispatcher:
    """A pool and its scheduler. Workers that are lost come back by themselves, so that waiting for them is sensible.

    `specs` are the pool's. Without them a worker is what the scheduler was made with, and does whatever its pool does.
    """

    def __init__(self, scheduler: Scheduler, pool: ProcessPool, specs: Sequence[WorkerSpec] = ()) -> None:
        self.scheduler = scheduler
        self.pool = pool
        self._specs = {spec.name: spec for spec in specs}
        known = scheduler.workers(time.monotonic())
        self._known_up = {worker.name for worker in known}
        self._places = {worker.name: (worker.pool, worker.gpus) for worker in known}
        self._places |= {spec.name: (spec.pool, spec.degree) for spec in specs}

    @property
    def complete(self) -> bool:
        """Whether every worker is up."""
        return self._places.keys() <= set(self.pool.up())

    def decide(self, request: Request, now: float) -> Decision:
        """The scheduler's decision, on the workers that are up now.

        The ledger holds it from then on, until the scheduler observes how it ended. `now` is `time.monotonic()`.
        """
        self._update_scheduler(now)
        return self.scheduler.decide(request, None, now)

    def preview(self, request: Request, now: float) -> Decision:
        """What `decide` would answer; changes nothing in the ledger."""
        self._update_scheduler(now)
        return self.scheduler.preview(request, None, now).decision

    def _update_scheduler(self, now: float) -> None:
        up = set(self.pool.up())
        for name in self._known_up - up:
            self.scheduler.observe(WorkerDown(name, now))
        for name in up - self._known_up:
            pool, gpus = self._places.get(name, ("", 0))
            if pool in self.scheduler.scenario.pools:
                self.scheduler.observe(WorkerUp(name, pool, now, gpus))
        self._known_up = up

    def worker_for(self, stage: Stage, wanted: str | None) -> str | None:
        """The worker that the scheduler wanted, else another one that is up and can do the stage; None if none is.

        Of several the one with the least left to do by the scheduler's ledger. A worker can do a stage if it has loaded
        the model, and runs in the stage's pool with its method, degree and options.
        """

        def fits(name: str) -> bool:
            spec = self._specs.get(name)
            if spec is None:
                return self._places.get(name, ("", 0))[0] == stage.site.name
            made_for = (spec.pool, spec.method, spec.degree, dict(spec.options))
            wanted_for = (stage.site.name, stage.method, stage.degree, dict(stage.options))
            return stage.model in spec.models and made_for == wanted_for

        fit = [name for name in self.pool.up() if fits(name)]
        if wanted in fit:
            return wanted
        left_s = {worker.name: worker.left_s for worker in self.scheduler.workers(time.monotonic())}
        return min(fit, key=lambda name: left_s.get(name, 0.0), default=None)

    async def change(self, until_s: float) -> bool:
        """Wait until other workers are up than now; False if `until_s` (`time.monotonic`) comes first."""
        before = self.pool.up()
        while time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
            if self.pool.up() != before:
                return True
        return False
