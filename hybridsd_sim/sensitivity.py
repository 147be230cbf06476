"""The chosen plan, unchanged, when the world is not as written: other traffic, slower sites, other access networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hybridsd_sim.capacity import Variation, evaluated
from hybridsd_sim.evaluations import Job
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.planner import Planner, quickest
from hybridsd_sim.scenario import ArrivalSpec, Scenario
from hybridsd_sim.sizing import Mixes

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
        Variation(change.name, evaluated(change.name, one, planner.priced(one.deployment, scenario)))
        for change, one, scenario in zip(changes, evaluations, scenarios, strict=True)
    )


def _job(planner: Planner, scenario: Scenario, deployment: Deployment, slowdowns: Mapping[str, float]) -> Job:
    moved = on_networks(deployment, scenario)
    return Job(scenario, planner.profiles, moved, quickest(scenario, moved), slowdowns)


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


def on_networks(deployment: Deployment, scenario: Scenario) -> Deployment:
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
    return list(dict.fromkeys(part.where for part in parts if part.tier != "network" and part.seconds > 0.0))
