"""When the world is not as written: one plan for several scenarios, and the chosen plan under other conditions.

A robust plan is the cheapest, by the base scenario's prices, that holds under each of several scenarios; a condition of
the formulation stands for each. Plans are the same plan under two scenarios when models, steps, pools, methods and
sites are; access networks, prices and the speed of what stands behind a pool's name may differ. A plan that one
scenario does not have, or under which it breaks a promise on an idle fleet, is no choice at all; of the others those
stay that are beaten by none under at least one of the scenarios.

Sensitivity keeps the chosen plan as it is and changes one thing at a time: traffic, the speed of a site, the network.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.planning.analytic import Mixes
from hybridsd_sim.planning.capacity_plan import Variation
from hybridsd_sim.planning.evaluation import EvaluatedPlan, EvaluationJob
from hybridsd_sim.planning.milp import Condition
from hybridsd_sim.planning.planner import Planner, least_infeasible, prune, quickest_level
from hybridsd_sim.planning.search import Found
from hybridsd_sim.pricing import Candidate, find_candidates
from hybridsd_sim.scenario import Scenario

BASE = "base"
"""What the scenario itself is called beside the named ones."""

TRAFFIC = (0.8, 0.9, 1.1, 1.2)
"""Factors on the rate of every request class."""

SLOWER = (1.1, 1.2)
"""Factors on the seconds spent at one site."""


@dataclass(frozen=True, slots=True)
class _ScenarioPlans:
    """One scenario: its planner, and by class its plans by what they are, all of them and those within promises."""

    name: str
    planner: Planner
    plans: Mapping[str, Mapping[Hashable, Candidate]]
    within: Mapping[str, Mapping[Hashable, Candidate]]


def robust_conditions(planner: Planner, scenarios: Mapping[str, Scenario]) -> list[Condition]:
    """A condition for the planner's scenario, then one for each named scenario, with their plans aligned.

    A class that no plan serves within its promises under all of them is relaxed under all, with the least bad plans
    that exist everywhere; `robust_obstacles` says where it fails. Numbers of nodes are bounded by the planner's
    scenario. Raises `InputError` where a scenario has other request classes than the planner's.
    """
    aligned = _aligned(planner, scenarios)
    kept: dict[str, list[Hashable]] = {}
    relaxed = set()
    for name in planner.scenario.requests:
        usable = _usable(aligned, name)
        if usable:  # those that no other beats under some scenario
            unbeaten = {
                plan_identity(option.plan)
                for one in aligned
                for option in prune([one.within[name][key] for key in usable])
            }
            kept[name] = [key for key in usable if key in unbeaten]
        else:
            first, *others = (one.plans[name] for one in aligned)
            common = [option for key, option in first.items() if all(key in other for other in others)]
            kept[name] = [plan_identity(option.plan) for option in least_infeasible(common)]
            relaxed.add(name)
    return [
        Condition(
            one.planner.sizer,
            {name: [one.plans[name][key] for key in keys] for name, keys in kept.items()},
            relaxed=frozenset(relaxed),
            name=one.name,
        )
        for one in aligned
    ]


def robust_obstacles(planner: Planner, scenarios: Mapping[str, Scenario]) -> tuple[str, ...]:
    """In words, for each class that no plan serves within its promises everywhere: under which scenarios that is so."""
    aligned = _aligned(planner, scenarios)
    found = []
    for request_class in planner.scenario.requests:
        alone = [one.name for one in aligned if not one.within[request_class]]
        if alone:
            where = f"under {' or '.join(alone)}, even on an idle fleet"
            found.append(f"{request_class}: no plan keeps its promises {where}")
        elif not _usable(aligned, request_class):
            *names, last = (one.name for one in aligned)
            where = f"under {', '.join(names)} and {last} alike"
            found.append(f"{request_class}: each scenario has plans that keep its promises, but none does {where}")
    return tuple(found)


def robust_variations(found: Found, scenarios: Mapping[str, Scenario]) -> tuple[Variation, ...]:
    """The plan under each named scenario, as the search for it found."""
    return tuple(
        Variation(name, EvaluatedPlan.from_evaluation(name, evaluation, found.mixes))
        for name, evaluation in zip(scenarios, found.evaluations[1:], strict=True)
    )


def _aligned(planner: Planner, scenarios: Mapping[str, Scenario]) -> list[_ScenarioPlans]:
    problems, base = [], planner.scenario.requests
    for name, other in scenarios.items():
        place, remedy = f"scenarios.{name}", "Give a class that falls silent a low rate, or plan the scenarios apart."
        rule = "a robust plan serves the same classes always"
        problems += [Problem(place, f"no requests.{cls}", rule, remedy) for cls in base if cls not in other.requests]
        rule = "is not in the base scenario"
        problems += [Problem(place, f"requests.{cls}", rule, remedy) for cls in other.requests if cls not in base]
    if problems:
        raise InputError(problems)
    others = []
    for other in scenarios.values():  # with the base's bounds on the nodes of the pools that both have
        theirs = {name: other.pools[name] for name in planner.scenario.pools if name in other.pools}
        bounds = {
            f"pools.{name}.{key}": getattr(pool, key)
            for name, pool in planner.scenario.pools.items()
            if name in theirs
            and (theirs[name].replicas_min, theirs[name].replicas_max) != (pool.replicas_min, pool.replicas_max)
            for key in ("replicas_min", "replicas_max", "replicas")
        }
        bounded = other.with_overrides(bounds) if bounds else other
        others.append(planner.under(bounded, find_candidates(bounded, planner.profiles)))
    aligned = []
    for name, mine in zip((BASE, *scenarios), (planner, *others), strict=True):
        found = mine.found.by_class
        within = {cls: mine.within_promises(options) for cls, options in found.items()}
        by_identity, within_by_identity = (
            {cls: {plan_identity(option.plan): option for option in options} for cls, options in each.items()}
            for each in (found, within)
        )
        aligned.append(_ScenarioPlans(name, mine, by_identity, within_by_identity))
    return aligned


def plan_identity(plan: Plan) -> Hashable:
    """What makes a plan the same one under another scenario."""
    stages = tuple((s.start, s.stop, s.model, s.site.name, s.method, s.degree, s.options) for s in plan.stages)
    return stages, plan.text_encode_site, plan.vae_site, plan.vae, plan.batch_cap


def _usable(aligned: Sequence[_ScenarioPlans], request_class: str) -> list[Hashable]:
    """The plans of a class that are within its promises under every scenario, in the base's order."""
    first, *others = (one.within[request_class] for one in aligned)
    return [key for key in first if all(key in other for other in others)]


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
    scenario = planner.scenario
    changes = [_Change("as planned")]
    changes += [_Change(f"traffic {factor - 1.0:+.0%}", traffic(scenario, factor)) for factor in TRAFFIC]
    changes += [
        _Change(f"{site} {factor - 1.0:.0%} slower", slowdowns={site: factor})
        for site in busy_sites(planner.priced(deployment))
        for factor in SLOWER
    ]
    for network in planner.profiles.networks:
        others = [name for name, fleet in scenario.edge.items() if fleet.network != network]
        if others:
            changes.append(_Change(f"everybody on {network}", {f"edge.{name}.network": network for name in others}))
    once = {"search.replications_max": scenario.replications}
    scenarios = [scenario.with_overrides({**once, **change.overrides}) for change in changes]
    jobs = []
    for other, change in zip(scenarios, changes, strict=True):
        moved = follow_networks(deployment, other)
        level = quickest_level(other, moved)
        jobs.append(EvaluationJob(other, planner.profiles, moved, level, change.slowdowns))
    evaluations = planner.evaluate(jobs)
    return tuple(
        Variation(change.name, EvaluatedPlan.from_evaluation(change.name, one, planner.priced(one.deployment, other)))
        for change, one, other in zip(changes, evaluations, scenarios, strict=True)
    )


def traffic(scenario: Scenario, factor: float) -> dict[str, float]:
    """The overrides under which every class asks `factor` times as often; a trace is played so much faster."""
    changes = {}
    for name, arrivals in ((name, spec.arrivals) for name, spec in scenario.requests.items()):
        if arrivals.rate_per_s is None:
            changes[f"requests.{name}.arrivals.time_scale"] = arrivals.time_scale / factor
        else:
            changes[f"requests.{name}.arrivals.rate_per_s"] = arrivals.rate_per_s * factor
    return changes


def follow_networks(deployment: Deployment, scenario: Scenario) -> Deployment:
    """The same plans over the access networks that the scenario's fleets are on."""
    plans = {}
    for name, mix in deployment.plans.items():
        parts = []
        for part in mix:
            plan = part.plan
            if plan.network is not None:
                plan = replace(plan, network=scenario.edge[scenario.requests[name].origin].network)
            parts.append(Share(part.share, plan))
        plans[name] = tuple(parts)
    return Deployment(deployment.replicas, plans)


def busy_sites(mixes: Mixes) -> list[str]:
    """Pools and edge fleets at which the plans of the mixes spend seconds, in order of first use."""
    parts = (part for mix in mixes.values() for _, option in mix for part in option.cost.parts)
    return list(dict.fromkeys(part.where for part in parts if part.tier != "network" and part.seconds.value > 0.0))
