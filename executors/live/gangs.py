"""The workers that a plan asks for: gangs of processes in the cloud, and the process of an edge device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from executors.live.tasks import Gang
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, Plan, Stage

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
