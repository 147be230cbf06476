"""A plan as the scheduler uses it: read, held against its scenario, priced, and with the policy that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.deployment import load_deployment, misfits, scenario_beside
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.menu import Menu
from hybridsd_sim.offers import Pricing, found_options, planned_options
from hybridsd_sim.plan import Deployment
from hybridsd_sim.policies import Planned, policy_for
from hybridsd_sim.policy import Policy, best_static
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workers import check_number

__all__ = ["AnyPlan", "PlanInUse", "prepared", "resolved"]


class PlanWithScenario(Protocol):
    """An answer that brings its deployment and the scenario that it was found for, such as a `CapacityPlan`."""

    @property
    def deployment(self) -> Deployment: ...

    @property
    def scenario(self) -> Scenario: ...


AnyPlan = str | Path | Deployment | PlanWithScenario


@dataclass(frozen=True, slots=True)
class PlanInUse:
    """Replaced as a whole, so that a decision sees one plan and one only.

    `anew` makes the policy again as it was at first, `widest` are the GPUs of a node of each pool that the plan rents,
    0 of the others, and `fallbacks` are the candidates that a class has without looking at anything.
    """

    scenario: Scenario
    deployment: Deployment
    policy: Policy
    anew: Callable[[], Policy]
    menu: Menu
    widest: tuple[int, ...]
    fallbacks: Mapping[str, Candidate | None]
    version: int = 1


def resolved(plan: AnyPlan, scenario: Scenario | None) -> tuple[Deployment, Scenario]:
    """The plan, and the scenario that it was made for. Raises `InputError` where either cannot be had."""
    if isinstance(plan, Deployment):
        if scenario is None:
            rule = "says nothing of request classes, pools and fleets"
            raise InputError(Problem("scenario", "not given", f"a Deployment {rule}", "Pass scenario=."))
        return plan, scenario
    if not isinstance(plan, str | Path):
        return plan.deployment, scenario or plan.scenario
    path = Path(plan)
    file = path / "plan.yaml" if path.is_dir() else path
    return load_deployment(file), scenario or scenario_beside(file)


def prepared(
    deployment: Deployment, scenario: Scenario, profiles: Profiles | None, policy: str | Policy | None
) -> PlanInUse:
    """A plan ready to decide by: checked, its candidates priced. Raises `InputError` for one that does not fit."""
    if isinstance(policy, Planned):
        rule = "would follow the shares that it was made with, whatever the plan"
        raise InputError(Problem("policy", "a Planned object", rule, f'Pass its name, "{Planned.name}", or none.'))
    known = profiles or load_profiles(scenario.search.profiles)
    if problems := misfits(deployment, scenario, known, complete=False):
        raise InputError(problems)
    check_number(sum(deployment.replicas.values()))
    anew = _maker(policy, scenario, deployment)
    decider = policy if isinstance(policy, Policy) else anew()
    pricing = Pricing(scenario, known)
    own = planned_options(pricing, deployment)
    found = own if decider.name == Planned.name else found_options(pricing, None)
    fallbacks = {name: next(iter(own.by_class[name]), best_static(found.by_class[name])) for name in scenario.requests}
    nodes = deployment.replicas
    widest = tuple(pool.gpus_per_node if nodes.get(name, 0) else 0 for name, pool in scenario.pools.items())
    return PlanInUse(scenario, deployment, decider, anew, Menu(pricing, found), widest, fallbacks)


def _maker(policy: str | Policy | None, scenario: Scenario, deployment: Deployment) -> Callable[[], Policy]:
    """Makes the policy anew; one that was given as an object is copied as it is then."""
    if isinstance(policy, Policy):
        return lambda: deepcopy(policy)
    return lambda: policy_for(policy or Planned.name, scenario, deployment)
