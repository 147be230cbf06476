"""Which plans are legal for a request class on a fleet, and why the others are not.

Enumerates cloud-only, edge-only and hybrid plans over pools, parallel methods, degrees, their options, switch steps,
small models and VAEs, as the scenario's `search` allows; refuses with a reason what breaks a rule (method, memory, node
size, latent space, text encoder); prices the rest. `prune` keeps the plans that no other beats in everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hybridsd_sim.cost import PlanCost, price
from hybridsd_sim.errors import IllegalPlanError, InputError, MissingDataError, Problem
from hybridsd_sim.legality import plan_problems
from hybridsd_sim.methods import find_method
from hybridsd_sim.plan import Options, Plan, Request, Site, Stage
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import EdgeFleet, Pool, RequestClass, Scenario

DEFAULT_SWITCH_STRIDE = 5
"""Without `search.switch_steps` every fifth step is a candidate, as in Hybrid SD's published tables."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A legal, priced plan for one request class, with the few numbers that policies compare.

    `pool_index` and `fleet_index` are positions in the scenario's pools and edge fleets, -1 without. Seconds are at the
    network's median rates and an idle fleet. `batch_s` are the cloud's seconds for 1, 2, ... `plan.batch_cap` requests
    denoised together; the first is `cloud_s`.
    """

    request_class: str
    plan: Plan
    cost: PlanCost
    pool_index: int
    fleet_index: int
    degree: int
    cloud_s: float
    edge_s: float
    latency_s: float
    usd_or_inf: float
    quality: float | None
    cloud_steps: int
    edge_steps: int
    meets_slo: bool
    meets_floor: bool
    batch_s: tuple[float, ...]

    @property
    def switch_share(self) -> float:
        return self.cloud_steps / (self.cloud_steps + self.edge_steps)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A plan that cannot run, and the first reason why."""

    request_class: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates per request class, cheapest first, and what was refused."""

    by_class: Mapping[str, tuple[Candidate, ...]]
    refusals: tuple[Refusal, ...]

    def refusal_counts(self) -> dict[tuple[str, str], int]:
        """How often each (class, reason) refused a plan."""
        counts: dict[tuple[str, str], int] = {}
        for refusal in self.refusals:
            key = (refusal.request_class, refusal.reason)
            counts[key] = counts.get(key, 0) + 1
        return counts


def request_of(name: str, spec: RequestClass) -> Request:
    """The request that a class of the scenario stands for."""
    return Request(
        model=spec.model,
        height_px=spec.height_px,
        width_px=spec.width_px,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        num_images=spec.num_images,
        sampler=spec.sampler,
        request_class=name,
        slo_s=spec.slo_s,
        quality_floor=spec.quality_floor,
        priority=spec.priority,
    )


def pool_site(name: str, pool: Pool) -> Site:
    """A node of the pool as a site of plans."""
    return Site(
        name=name,
        tier="cloud",
        device=pool.gpu,
        runtime=pool.runtime,
        precision=pool.precision,
        gpus_per_node=pool.gpus_per_node,
        interconnect=pool.interconnect,
        purchase=pool.purchase,
        provider=pool.provider,
        usd_per_device_hour=pool.usd_per_gpu_hour,
    )


def fleet_site(name: str, fleet: EdgeFleet, profiles: Profiles) -> Site:
    """A device of the edge fleet as a site of plans, with its own default runtime unless the scenario names one."""
    device = profiles.edge_device(fleet.device)
    return Site(
        name=name,
        tier="edge",
        device=fleet.device,
        runtime=fleet.runtime or device.default_runtime,
        precision=fleet.precision or device.default_precision,
        power_w=fleet.power_w,
    )


def check_names(scenario: Scenario, profiles: Profiles) -> None:
    """Raise one `InputError` naming every device, GPU, model, network or method that the profiles do not hold."""
    problems: list[Problem] = []
    for place, look_up, name in _named(scenario, profiles):
        try:
            look_up(name)
        except InputError as error:
            problems += [Problem(place, p.value, p.rule, p.remedy) for p in error.problems]
    if problems:
        raise InputError(problems)


def _named(scenario: Scenario, profiles: Profiles) -> Iterator[tuple[str, Any, str]]:
    for name, spec in scenario.requests.items():
        yield f"requests.{name}.model", profiles.model, spec.model
        for small in spec.small_models:
            yield f"requests.{name}.small_models", profiles.model, small
    for name, fleet in scenario.edge.items():
        yield f"edge.{name}.device", profiles.edge_device, fleet.device
        yield f"edge.{name}.network", profiles.network, fleet.network
    for name, pool in scenario.pools.items():
        yield f"pools.{name}.gpu", profiles.device, pool.gpu
        yield f"pools.{name}.runtime", profiles.runtime, pool.runtime
        if pool.interconnect is not None:
            yield f"pools.{name}.interconnect", profiles.interconnect, pool.interconnect
    for method in scenario.search.methods:
        yield "search.methods", find_method, method


def find_candidates(scenario: Scenario, profiles: Profiles) -> CandidateSet:
    """Every legal plan of every request class, priced, cheapest first, and every refusal with its reason."""
    check_names(scenario, profiles)
    refusals: list[Refusal] = []
    by_class: dict[str, tuple[Candidate, ...]] = {}
    for name, spec in scenario.requests.items():
        request = request_of(name, spec)
        found = []
        for plan in enumerate_plans(scenario, profiles, name):
            try:
                found.append(make_candidate(scenario, profiles, request, plan))
            except (IllegalPlanError, MissingDataError) as error:
                refusals.append(Refusal(name, plan.label, str(error.problems[0])))
        by_class[name] = tuple(
            sorted(found, key=lambda option: (option.usd_or_inf, option.latency_s, option.plan.label))
        )
    return CandidateSet(by_class, tuple(refusals))


def enumerate_plans(scenario: Scenario, profiles: Profiles, class_name: str) -> Iterator[Plan]:
    """Every plan that the scenario's search space spans for a class, legal or not."""
    spec = scenario.requests[class_name]
    steps = spec.num_inference_steps
    fleet = scenario.edge[spec.origin]
    edge = fleet_site(spec.origin, fleet, profiles)
    encode_at = {True: edge.name, False: ""}[fleet.encodes_prompt]
    for vae in scenario.search.vaes:
        for model in dict.fromkeys((spec.model, *spec.small_models)):
            stage = Stage(start=0, stop=steps, model=model, site=edge)
            yield Plan(stages=(stage,), text_encode_site=edge.name, vae_site=edge.name, vae=vae, network=fleet.network)
        for cloud in _cloud_stages(scenario, spec.model, steps):
            site = cloud.site.name
            yield Plan(stages=(cloud,), text_encode_site=site, vae_site=site, vae=vae, network=fleet.network)
            yield Plan(
                stages=(cloud,),
                text_encode_site=site,
                vae_site=edge.name,
                vae=vae,
                network=fleet.network,
                extra_sites=(edge,),
            )
            for k, small in product(_switch_steps(scenario, steps), spec.small_models):
                first = _until(cloud, k)
                second = Stage(start=k, stop=steps, model=small, site=edge)
                yield Plan(
                    stages=(first, second),
                    text_encode_site=encode_at or site,
                    vae_site=edge.name,
                    vae=vae,
                    network=fleet.network,
                )


def _until(stage: Stage, stop: int) -> Stage:
    return Stage(
        start=0,
        stop=stop,
        model=stage.model,
        site=stage.site,
        method=stage.method,
        degree=stage.degree,
        options=stage.options,
    )


def _switch_steps(scenario: Scenario, steps: int) -> list[int]:
    """Switch steps strictly inside the request: the ends are edge-only and cloud-only."""
    wanted: Iterable[int] = range(0, steps, DEFAULT_SWITCH_STRIDE)
    if scenario.search.switch_steps is not None:
        wanted = scenario.search.switch_steps
    return sorted({k for k in wanted if 0 < k < steps})


def _cloud_stages(scenario: Scenario, model: str, steps: int) -> Iterator[Stage]:
    for name, pool in scenario.pools.items():
        site = pool_site(name, pool)
        yield Stage(start=0, stop=steps, model=model, site=site)
        for method, degree in product(scenario.search.methods, scenario.search.degrees):
            if method == "single" or degree == 1:
                continue
            for options in _option_grid(scenario, method):
                yield Stage(start=0, stop=steps, model=model, site=site, method=method, degree=degree, options=options)


def _option_grid(scenario: Scenario, method: str) -> list[Options]:
    """Every combination of the option values that the search allows for a method; its defaults alone without any."""
    allowed = scenario.search.options.get(method, {})
    keys = sorted(allowed)
    return [tuple(zip(keys, values, strict=True)) for values in product(*(allowed[key] for key in keys))]


def make_candidate(scenario: Scenario, profiles: Profiles, request: Request, plan: Plan) -> Candidate:
    """Check and price one plan. Raises `IllegalPlanError` or `MissingDataError` with the reason."""
    problems = plan_problems(plan, request, profiles)
    if problems:
        raise IllegalPlanError(problems)
    cost = price(plan, request, profiles, prefer=scenario.search.prefer_sources)
    cloud, edge = plan.cloud_stages, plan.edge_stages
    quality = cost.quality.clip
    pools, fleets = list(scenario.pools), list(scenario.edge)
    cloud_s = sum(part.seconds for part in cost.parts if part.tier == "cloud")
    edge_held = any(part.tier == "edge" and part.critical for part in cost.parts)
    floor = request.quality_floor
    return Candidate(
        request_class=request.request_class,
        plan=plan,
        cost=cost,
        pool_index=pools.index(cloud[0].site.name) if cloud else -1,
        fleet_index=fleets.index(scenario.requests[request.request_class].origin) if edge_held else -1,
        degree=max((stage.degree for stage in cloud), default=0),
        cloud_s=cloud_s,
        edge_s=sum(part.seconds for part in cost.parts if part.tier == "edge" and part.critical),
        latency_s=cost.latency_s,
        usd_or_inf=float("inf") if cost.usd is None else cost.usd,
        quality=quality,
        cloud_steps=sum(stage.num_steps for stage in cloud),
        edge_steps=sum(stage.num_steps for stage in edge),
        meets_slo=request.slo_s is None or cost.latency_s <= request.slo_s,
        meets_floor=_meets_floor(quality, floor) and _meets_limits(scenario, request, cost),
        batch_s=(cloud_s,),
    )


def _meets_floor(quality: float | None, floor: float | None) -> bool:
    """Unknown quality meets no floor."""
    return floor is None or (quality is not None and quality >= floor)


def _meets_limits(scenario: Scenario, request: Request, cost: PlanCost) -> bool:
    """Per-image limits on edge energy and dollars, of the class and of the budget. An unknown figure meets no limit."""
    spec, budget = scenario.requests[request.request_class], scenario.budget
    limits = (
        (cost.edge_energy_j, spec.edge_energy_j),
        (cost.edge_energy_j, budget.edge_energy_j_per_image),
        (cost.usd, spec.usd_per_image),
    )
    return all(
        limit is None or (figure is not None and figure / request.num_images <= limit) for figure, limit in limits
    )


def prune(options: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats: none on the same pool or at the edge alone is as good in every merit.

    Merits are GPU-seconds, dollars, latency, degree, quality and edge energy. Of equals the first is kept.
    """
    merits = [(option.pool_index, _merits(option)) for option in options]
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: merits[i][1]):
        pool, mine = merits[index]
        beaten = any(
            merits[k][0] in (pool, -1) and all(a <= b for a, b in zip(merits[k][1], mine, strict=True)) for k in kept
        )
        if not beaten:
            kept.append(index)
    return [options[index] for index in sorted(kept)]


def _merits(option: Candidate) -> tuple[float, ...]:
    energy = option.cost.edge_energy_j
    return (
        option.cost.gpu_seconds,
        option.usd_or_inf,
        option.latency_s,
        option.degree,
        -(option.quality if option.quality is not None else -1.0),
        energy if energy is not None else float("inf"),
    )


def pool_usd_per_gpu_hour(scenario: Scenario, profiles: Profiles, name: str) -> float | None:
    """The scenario's own price of a pool's GPU, else the catalogue's; None when nobody knows."""
    pool = scenario.pools[name]
    if pool.usd_per_gpu_hour is not None:
        return pool.usd_per_gpu_hour
    row = profiles.gpu_price(pool.gpu, pool.purchase, pool.provider)
    return None if row is None else row.usd


def rental_usd_per_hour(scenario: Scenario, profiles: Profiles, replicas: Mapping[str, int]) -> float | None:
    """Dollars an hour of the nodes rented, used or not; None when the price of a rented pool is unknown."""
    rented = [name for name in scenario.pools if replicas.get(name, 0)]
    rates = {name: pool_usd_per_gpu_hour(scenario, profiles, name) for name in rented}
    if any(rate is None for rate in rates.values()):
        return None
    return sum(replicas[name] * scenario.pools[name].gpus_per_node * (rates[name] or 0.0) for name in rented)
