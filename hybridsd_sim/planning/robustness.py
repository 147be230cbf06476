"""One plan for several scenarios: the cheapest, by the base scenario's prices, that holds under each of them.

A condition of the formulation stands for each scenario. Plans are the same plan under two scenarios when models, steps,
pools, methods and sites are; access networks, prices and the speed of what stands behind a pool's name may differ. A
plan that one scenario does not have, or under which it breaks a promise on an idle fleet, is no choice at all; of the
others those stay that are beaten by none under at least one of the scenarios.

The chosen plan, unchanged, when the world is not as written: other traffic, slower sites, other access networks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.planning.analytic import Mixes
from hybridsd_sim.planning.capacity_plan import EvaluatedPlan, Variation
from hybridsd_sim.planning.evaluation import EvaluationJob
from hybridsd_sim.planning.milp import Condition
from hybridsd_sim.planning.planner import Planner, least_infeasible, prune, quickest_level
from hybridsd_sim.planning.search import Found
from hybridsd_sim.pricing import Candidate, find_candidates
from hybridsd_sim.scenario import ArrivalSpec, Scenario

BASE = "base"
"""What the scenario itself is called beside the named ones."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One scenario: its planner, and by class its plans by what they are, all of them and those within promises."""

    name: str
    planner: Planner
    plans: Mapping[str, Mapping[Hashable, Candidate]]
    within: Mapping[str, Mapping[Hashable, Candidate]]


def robust_conditions(planner: Planner, scenarios: Mapping[str, Scenario]) -> list[Condition]:
    """A condition for the planner's scenario, then one for each named scenario, with their plans aligned.

    A class that no plan serves within its promises under all of them is forgiven under all, with the least bad plans
    that exist everywhere; `robust_obstacles` says where it fails. Numbers of nodes are bounded by the planner's
    scenario. Raises `InputError` where a scenario has other request classes than the planner's.
    """
    sides = _sides(planner, scenarios)
    kept = {name: _kept(sides, name) for name in planner.scenario.requests}
    forgiven = frozenset(name for name, keys in kept.items() if not _usable(sides, name))
    return [
        Condition(
            side.planner.sizer,
            {name: [side.plans[name][key] for key in keys] for name, keys in kept.items()},
            forgiven=forgiven,
            name=side.name,
        )
        for side in sides
    ]


def robust_obstacles(planner: Planner, scenarios: Mapping[str, Scenario]) -> tuple[str, ...]:
    """In words, for each class that no plan serves within its promises everywhere: under which scenarios that is so."""
    sides = _sides(planner, scenarios)
    return tuple(_obstacle(sides, name) for name in planner.scenario.requests if not _usable(sides, name))


def robust_variations(found: Found, scenarios: Mapping[str, Scenario]) -> tuple[Variation, ...]:
    """The plan under each named scenario, as the search for it found."""
    return tuple(
        Variation(name, EvaluatedPlan.from_evaluation(name, evaluation, found.mixes))
        for name, evaluation in zip(scenarios, found.evaluations[1:], strict=True)
    )


def _sides(planner: Planner, scenarios: Mapping[str, Scenario]) -> list[_Side]:
    problems = [problem for name, other in scenarios.items() for problem in _strangers(planner.scenario, name, other)]
    if problems:
        raise InputError(problems)
    bounded = [_with_bounds(planner.scenario, other) for other in scenarios.values()]
    others = (planner.under(other, find_candidates(other, planner.profiles)) for other in bounded)
    return [_side(name, mine) for name, mine in zip((BASE, *scenarios), (planner, *others), strict=True)]


def _strangers(base: Scenario, name: str, other: Scenario) -> Iterator[Problem]:
    """Request classes that only one of two scenarios has."""
    place = f"scenarios.{name}"
    remedy = "Give a class that falls silent a low rate, or plan the scenarios apart."
    for request_class in base.requests:
        if request_class not in other.requests:
            yield Problem(place, f"no requests.{request_class}", "a robust plan serves the same classes always", remedy)
    for request_class in other.requests:
        if request_class not in base.requests:
            yield Problem(place, f"requests.{request_class}", "is not in the base scenario", remedy)


def _with_bounds(base: Scenario, other: Scenario) -> Scenario:
    """The scenario with the base's bounds on the nodes of the pools that both have."""
    changes: dict[str, int | None] = {}
    for name, pool in base.pools.items():
        theirs = other.pools.get(name)
        if theirs is not None and (theirs.replicas_min, theirs.replicas_max) != (pool.replicas_min, pool.replicas_max):
            changes |= {
                f"pools.{name}.{key}": getattr(pool, key) for key in ("replicas_min", "replicas_max", "replicas")
            }
    return other.with_overrides(changes) if changes else other


def _side(name: str, planner: Planner) -> _Side:
    found = planner.found.by_class
    plans = {cls: {_identity(option.plan): option for option in options} for cls, options in found.items()}
    within = {
        cls: {_identity(option.plan): option for option in planner.within_promises(options)}
        for cls, options in found.items()
    }
    return _Side(name, planner, plans, within)


def _identity(plan: Plan) -> Hashable:
    """What makes a plan the same one under another scenario."""
    stages = tuple((s.start, s.stop, s.model, s.site.name, s.method, s.degree, s.options) for s in plan.stages)
    return stages, plan.text_encode_site, plan.vae_site, plan.vae, plan.batch_cap


def _usable(sides: Sequence[_Side], request_class: str) -> list[Hashable]:
    """The plans of a class that are within its promises under every scenario, in the base's order."""
    first, *others = (side.within[request_class] for side in sides)
    return [key for key in first if all(key in other for other in others)]


def _kept(sides: Sequence[_Side], request_class: str) -> list[Hashable]:
    """The usable plans that no other beats under some scenario; without any, the least bad that exist everywhere."""
    usable = _usable(sides, request_class)
    if not usable:
        return _least_bad_everywhere(sides, request_class)
    unbeaten = {
        _identity(option.plan)
        for side in sides
        for option in prune([side.within[request_class][key] for key in usable])
    }
    return [key for key in usable if key in unbeaten]


def _least_bad_everywhere(sides: Sequence[_Side], request_class: str) -> list[Hashable]:
    first, *others = (side.plans[request_class] for side in sides)
    common = [option for key, option in first.items() if all(key in other for other in others)]
    return [_identity(option.plan) for option in least_infeasible(common)]


def _obstacle(sides: Sequence[_Side], request_class: str) -> str:
    alone = [side.name for side in sides if not side.within[request_class]]
    if alone:
        return f"{request_class}: no plan keeps its promises under {' or '.join(alone)}, even on an idle fleet"
    names = [side.name for side in sides]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{request_class}: each scenario has plans that keep its promises, but none does under {listed} alike"


TRAFFIC = (0.8, 0.9, 1.1, 1.2)
"""Factors on the rate of every request class."""

SLOWER = (1.1, 1.2)
"""Factors on the seconds spent at one site."""


@dataclass(frozen=True, slots=True)
class _Change:
    """Another world: its name in words, and what differs in it."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    slowdowns: Mapping[str, float] = field(default_factory=dict)


def sensitivity(planner: Planner, deployment: Deployment) -> tuple[Variation, ...]:
    """The plan under other traffic, slower pools and edge fleets, and each access network that not all are on.

    Each change comes alone; each is tried by the quickest means that tells, all of them in one call and over the
    scenario's own replications, with no more where a promise is undecided. A site at which the plan spends no time is
    left out: nothing would change.
    """
    changes = list(_changes(planner, deployment))
    once = {"search.replications_max": planner.scenario.replications}
    scenarios = [planner.scenario.with_overrides({**once, **change.overrides}) for change in changes]
    jobs = [_job(planner, scenario, deployment, c.slowdowns) for scenario, c in zip(scenarios, changes, strict=True)]
    evaluations = planner.evaluate(jobs)
    return tuple(
        Variation(
            change.name, EvaluatedPlan.from_evaluation(change.name, one, planner.priced(one.deployment, scenario))
        )
        for change, one, scenario in zip(changes, evaluations, scenarios, strict=True)
    )


def _job(planner: Planner, scenario: Scenario, deployment: Deployment, slowdowns: Mapping[str, float]) -> EvaluationJob:
    moved = follow_networks(deployment, scenario)
    return EvaluationJob(scenario, planner.profiles, moved, quickest_level(scenario, moved), slowdowns)


def _changes(planner: Planner, deployment: Deployment) -> Iterator[_Change]:
    scenario = planner.scenario
    yield _Change("as planned")
    for factor in TRAFFIC:
        yield _Change(f"traffic {factor - 1.0:+.0%}", traffic(scenario, factor))
    for site in busy_sites(planner.priced(deployment)):
        for factor in SLOWER:
            yield _Change(f"{site} {factor - 1.0:.0%} slower", slowdowns={site: factor})
    for network in planner.profiles.networks:
        others = [name for name, fleet in scenario.edge.items() if fleet.network != network]
        if others:
            yield _Change(f"everybody on {network}", {f"edge.{name}.network": network for name in others})


def traffic(scenario: Scenario, factor: float) -> dict[str, float]:
    """The overrides under which every class asks `factor` times as often; a trace is played so much faster."""
    return dict(_paced(name, spec.arrivals, factor) for name, spec in scenario.requests.items())


def _paced(name: str, arrivals: ArrivalSpec, factor: float) -> tuple[str, float]:
    place = f"requests.{name}.arrivals"
    if arrivals.rate_per_s is None:
        return f"{place}.time_scale", arrivals.time_scale / factor
    return f"{place}.rate_per_s", arrivals.rate_per_s * factor


def follow_networks(deployment: Deployment, scenario: Scenario) -> Deployment:
    """The same plans over the access networks that the scenario's fleets are on."""
    plans = {
        name: tuple(Share(part.share, _over(part.plan, scenario, name)) for part in mix)
        for name, mix in deployment.plans.items()
    }
    return Deployment(deployment.replicas, plans)


def _over(plan: Plan, scenario: Scenario, class_name: str) -> Plan:
    if plan.network is None:
        return plan
    return replace(plan, network=scenario.edge[scenario.requests[class_name].origin].network)


def busy_sites(mixes: Mixes) -> list[str]:
    """Pools and edge fleets at which the plans of the mixes spend seconds, in order of first use."""
    parts = (part for mix in mixes.values() for _, option in mix for part in option.cost.parts)
    return list(dict.fromkeys(part.where for part in parts if part.tier != "network" and part.seconds.value > 0.0))
