"""Candidates: the legal plans of a request class on a fleet, each with its price, and why the others are refused.

`find_candidates` takes every plan of the scenario's search space, refuses with a reason what breaks a rule (method,
memory, node size, latent space) or what nobody timed, and prices the rest. `slowed` says what becomes of a candidate
where a site is slower. `RentedCandidates` are those that a policy may choose from, priced anew for other request sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isclose
from typing import Any

from hybridsd_sim.errors import IllegalPlanError, InputError, MissingDataError, Problem
from hybridsd_sim.perf import find_method
from hybridsd_sim.plan import Deployment, Plan, Promises, Request
from hybridsd_sim.pricing.pricer import PlanCost, batch_seconds, price
from hybridsd_sim.pricing.search_space import enumerate_plans, plan_problems, request_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A legal, priced plan for one request class, with the few numbers that policies compare.

    `pool_index` and `fleet_index` are positions in the scenario's pools and edge fleets, -1 without. Seconds are at the
    network's median rates and an idle fleet. `batch_s` are the cloud's seconds for 1, 2, ... `plan.batch_cap` requests
    denoised together; the first is `cloud_s`. `meets_slo` and `keeps_limits` say whether the price keeps `promises`:
    the SLO with nobody else there; the quality floor and every limit of an image.
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
    keeps_limits: bool
    batch_s: tuple[float, ...]
    promises: Promises = field(default_factory=Promises)

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of one request where the worker group always has as many of them together as it may."""
        alone, together = self.cost.gpu_seconds, self.batch_s[-1] * self.degree / len(self.batch_s)
        return alone if isclose(alone, together, rel_tol=1e-9) else together

    @property
    def full_batch_latency_s(self) -> float:
        """Seconds from arrival to image of a request that is denoised in a full batch, without waiting."""
        return self.latency_s + (self.batch_s[-1] - self.cloud_s)

    @property
    def switch_share(self) -> float:
        return self.cloud_steps / (self.cloud_steps + self.edge_steps)


@dataclass(frozen=True, slots=True)
class RefusedPlan:
    """A plan that cannot run, and the first reason why."""

    request_class: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates per request class, cheapest first, and what was refused."""

    by_class: Mapping[str, tuple[Candidate, ...]]
    refusals: tuple[RefusedPlan, ...]

    def refusal_counts(self) -> dict[tuple[str, str], int]:
        """How often each (class, reason) refused a plan."""
        counts: dict[tuple[str, str], int] = {}
        for refusal in self.refusals:
            key = (refusal.request_class, refusal.reason)
            counts[key] = counts.get(key, 0) + 1
        return counts


def check_names(scenario: Scenario, profiles: Profiles) -> None:
    """Raise one `InputError` naming every device, GPU, model, network or method that the profiles do not hold."""
    problems: list[Problem] = []
    for place, look_up, name in _mentioned_names(scenario, profiles):
        try:
            look_up(name)
        except InputError as error:
            problems += [Problem(place, p.value, p.rule, p.remedy) for p in error.problems]
    if problems:
        raise InputError(problems)


def _mentioned_names(scenario: Scenario, profiles: Profiles) -> Iterator[tuple[str, Any, str]]:
    """Every name of the catalogue in a scenario: its place, what looks it up, and the name."""
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
    refusals: list[RefusedPlan] = []
    by_class: dict[str, tuple[Candidate, ...]] = {}
    # Candidates are kept, so that collecting garbage among them again and again meanwhile would be in vain.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, spec in scenario.requests.items():
            request = request_of(name, spec)
            found = []
            for plan in enumerate_plans(scenario, profiles, name):
                try:
                    found.append(make_candidate(scenario, profiles, request, plan))
                except (IllegalPlanError, MissingDataError) as error:
                    refusals.append(RefusedPlan(name, plan.label, str(error.problems[0])))
            by_class[name] = tuple(
                sorted(found, key=lambda option: (option.usd_or_inf, option.latency_s, option.plan.label))
            )
    finally:
        if collecting:
            gc.enable()
    return CandidateSet(by_class, tuple(refusals))


def make_candidate(scenario: Scenario, profiles: Profiles, request: Request, plan: Plan) -> Candidate:
    """Check and price one plan. Raises `IllegalPlanError` or `MissingDataError` with the reason."""
    problems = plan_problems(plan, request, profiles)
    if problems:
        raise IllegalPlanError(problems)
    prefer = scenario.search.prefer_sources
    cost = price(plan, request, profiles, prefer=prefer)
    cloud, edge = plan.cloud_stages, plan.edge_stages
    pools, fleets = list(scenario.pools), list(scenario.edge)
    spec, cloud_s = scenario.requests[request.request_class], cost.cloud_s
    edge_held = [part.seconds.value for part in cost.parts if part.tier == "edge" and part.critical]
    promises = scenario.promises[request.request_class].asked_by(request)
    latency_s, usd = cost.latency_s, cost.usd
    batched = plan.batch_cap > 1
    return Candidate(
        request_class=request.request_class,
        plan=plan,
        cost=cost,
        pool_index=pools.index(cloud[0].site.name) if cloud else -1,
        fleet_index=fleets.index(spec.origin) if edge_held else -1,
        degree=max((stage.degree for stage in cloud), default=0),
        cloud_s=cloud_s,
        edge_s=sum(edge_held),
        latency_s=latency_s,
        usd_or_inf=float("inf") if usd is None else usd,
        quality=cost.quality.clip.value_or_none,
        cloud_steps=sum(stage.num_steps for stage in cloud),
        edge_steps=sum(stage.num_steps for stage in edge),
        meets_slo=promises.in_time(latency_s),
        keeps_limits=cost.keeps_limits(promises),
        batch_s=batch_seconds(plan, request, profiles, prefer=prefer) if batched else (cloud_s,),
        promises=promises,
    )


def slowed(candidate: Candidate, factors: Mapping[str, float]) -> Candidate:
    """The candidate where every second at a named pool or edge fleet takes its factor times as long.

    Seconds with their intervals, dollars of devices and joules grow with it; transfers do not. Whether SLO, floor and
    limits hold is asked again. Where no site of the plan has a factor other than 1, the candidate itself comes back.
    """
    parts = tuple(part.slowed(factors) for part in candidate.cost.parts)
    if all(ours is theirs for ours, theirs in zip(parts, candidate.cost.parts, strict=True)):
        return candidate
    cost = replace(candidate.cost, parts=parts)
    latency_s, usd, cloud_s = cost.latency_s, cost.usd, cost.cloud_s
    ratio = cloud_s / candidate.cloud_s if candidate.cloud_s else 1.0
    return replace(
        candidate,
        cost=cost,
        cloud_s=cloud_s,
        batch_s=(cloud_s, *(ratio * seconds for seconds in candidate.batch_s[1:])),
        edge_s=sum(part.seconds.value for part in parts if part.tier == "edge" and part.critical),
        latency_s=latency_s,
        usd_or_inf=float("inf") if usd is None else usd,
        meets_slo=candidate.promises.in_time(latency_s),
        keeps_limits=cost.keeps_limits(candidate.promises),
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


@dataclass(frozen=True, slots=True)
class Pricing:
    """Prices plans for requests of a scenario. `slowdowns` multiply every second spent at the sites they name."""

    scenario: Scenario
    profiles: Profiles
    slowdowns: Mapping[str, float] = field(default_factory=dict)

    def priced(self, request: Request, plan: Plan) -> Candidate:
        """The candidate that a plan makes for a request."""
        return self.slowed(make_candidate(self.scenario, self.profiles, request, plan))

    def slowed(self, candidate: Candidate) -> Candidate:
        """The candidate at the sites' own pace: itself where nothing is slower."""
        return slowed(candidate, self.slowdowns) if self.slowdowns else candidate


def resolve_candidates(pricing: Pricing, known: CandidateSet | None) -> CandidateSet:
    """The candidates of every class, found anew unless they are `known`."""
    found = known or find_candidates(pricing.scenario, pricing.profiles)
    if not pricing.slowdowns:
        return found
    by_class = {name: tuple(pricing.slowed(option) for option in options) for name, options in found.by_class.items()}
    return CandidateSet(by_class, found.refusals)


def price_deployment(pricing: Pricing, plan: Deployment | None) -> CandidateSet:
    """The plan's own candidates, one for each part of each class's mix. Raises `InputError` without a plan."""
    if plan is None:
        raise InputError(Problem("policy", "planned", "follows a plan, and none was given", "Pass a plan.yaml."))
    by_class = {
        name: tuple(pricing.priced(request_of(name, spec), part.plan) for part in plan.plans.get(name, ()))
        for name, spec in pricing.scenario.requests.items()
    }
    return CandidateSet(by_class, ())


class RentedCandidates:
    """The candidates a policy may choose from: each class's `own` on rented pools, priced anew for other sizes."""

    def __init__(self, pricing: Pricing, options: CandidateSet, replicas: Mapping[str, int]) -> None:
        self._pricing = pricing
        self._specs = list(pricing.scenario.requests.items())
        rented = {index for index, nodes in enumerate(replicas.values()) if nodes} | {-1}
        self.own = [tuple(o for o in options.by_class[name] if o.pool_index in rented) for name, _ in self._specs]
        self._variants: dict[tuple[int, tuple[int, int]], tuple[Candidate, ...]] = {}

    def resized(self, class_index: int, shape: tuple[int, int]) -> tuple[Candidate, ...]:
        """A class's candidates for requests of another `shape`: (steps, images)."""
        key = (class_index, shape)
        if key not in self._variants:
            (name, spec), (steps, images) = self._specs[class_index], shape
            request = replace(request_of(name, spec), num_inference_steps=steps, num_images=images)
            plans = (option.plan.rescaled(steps) for option in self.own[class_index])
            self._variants[key] = tuple(self._pricing.priced(request, plan) for plan in plans)
        return self._variants[key]
