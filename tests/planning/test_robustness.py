"""Laws of one plan for several scenarios: it holds under each, and costs what the hardest of them costs or more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from hybridsd_sim import InputError, Profiles, Scenario, load_scenario
from hybridsd_sim.planning.milp import Formulation, Goal
from hybridsd_sim.planning.planner import prune, quickest_level
from hybridsd_sim.planning.robustness import plan_identity, robust_conditions, robust_obstacles, robust_variations
from hybridsd_sim.planning.search import Found, PlanSearch
from planners import SMALL, planner_of

RATE = "requests.picture.arrivals.rate_per_s"
H100 = {"gpu": "h100-sxm", "runtime": "compiled", "replicas_max": 16}


@pytest.fixture(scope="module")
def base() -> Scenario:
    """Phones and one pool, for four minutes."""
    return load_scenario("quickstart", overrides=SMALL)


@pytest.fixture(scope="module")
def two_pools(base: Scenario) -> Scenario:
    """The same with a pool of cheap H100s beside the A100s."""
    return base.with_overrides({"pools.h100": {**H100, "usd_per_gpu_hour": 1.0}})


def robust(scenario: Scenario, profiles: Profiles, others: Mapping[str, Scenario]) -> Found | None:
    """The plan that holds under a scenario and others."""
    mine = planner_of(scenario, profiles)
    return PlanSearch(robust_conditions(mine, others), mine.evaluate, quickest_level, "robust").run()


def rent(found: Found | None) -> float:
    """Dollars an hour of a plan's nodes."""
    assert found is not None
    assert found.feasible
    return found.sizing.rent_usd_per_hour


def test_a_robust_plan_for_the_base_alone_is_the_bases_plan(base: Scenario, profiles: Profiles) -> None:
    """Without other scenarios the search is the plain one, to the last figure."""
    alone, plain = robust(base, profiles, {}), planner_of(base, profiles).search("plan").run()

    assert alone is not None
    assert plain is not None
    assert repr(alone.evaluations) == repr(plain.evaluations)  # NaN equals nothing
    assert alone.bound == plain.bound


def test_a_robust_plan_holds_under_each_scenario_and_costs_no_less_than_its_plan(
    base: Scenario, profiles: Profiles
) -> None:
    """Twice the traffic and a slow network: one fleet for all, simulated under each, at least as dear as any alone."""
    others = {"busy": base.with_overrides({RATE: 16.0}), "train": base.with_overrides({"edge.phones.network": "lte"})}
    found = robust(base, profiles, others)

    assert found is not None
    assert [one.feasible for one in found.evaluations] == [True] * 3
    assert {one.level for one in found.evaluations} == {"simulate"}
    singles = [rent(planner_of(one, profiles).search("plan").run()) for one in (base, *others.values())]
    assert rent(found) >= max(singles) - 1e-9

    shown = robust_variations(found, others)
    assert [one.name for one in shown] == ["busy", "train"]
    assert all(one.result.feasible for one in shown)


def test_a_pool_that_one_scenario_lacks_serves_nobody(two_pools: Scenario, profiles: Profiles) -> None:
    """The cheap pool is chosen alone, and left alone once it may be missing."""
    gone = {"gone": two_pools.with_overrides({"pools.h100": None})}
    found = robust(two_pools, profiles, gone)

    assert robust(two_pools, profiles, {}).replicas["h100"] > 0
    assert found.feasible
    assert found.replicas["h100"] == 0
    assert found.replicas["a100"] > 0


def test_every_scenarios_own_budget_is_kept_at_its_own_prices(two_pools: Scenario, profiles: Profiles) -> None:
    """Where the cheap pool turns dear under a budget, the plan moves to the other one at once."""
    dear = {"pools.h100.usd_per_gpu_hour": 40.0, "budget.usd_per_hour": 35.0}
    mine = planner_of(two_pools, profiles)
    search = PlanSearch(
        robust_conditions(mine, {"dear": two_pools.with_overrides(dear)}), mine.evaluate, quickest_level, "robust"
    )
    found = search.run()

    assert rent(found) > 0.0
    assert found.replicas["h100"] == 0
    assert all(one.feasible for one in search.evaluated)


def test_nodes_are_bounded_by_the_base(base: Scenario, profiles: Profiles) -> None:
    """Another scenario's own limit on nodes is no limit of the plan, nor is its minimum."""
    others = {"other": base.with_overrides({"pools.a100.replicas_max": 1, "pools.a100.replicas": 1})}
    conditions = robust_conditions(planner_of(base, profiles), others)

    assert [c.sizer.scenario.pools["a100"].replicas_max for c in conditions] == [16, 16]
    assert rent(robust(base, profiles, others)) == pytest.approx(rent(robust(base, profiles, {})))


def test_plans_are_the_same_plan_under_every_condition(base: Scenario, profiles: Profiles) -> None:
    """Column j names one plan everywhere, on each scenario's own network, and none that is worth having is missing."""
    train = base.with_overrides({"edge.phones.network": "lte", "pools.a100.gpu": "h100-sxm"})
    mine, theirs = planner_of(base, profiles), planner_of(train, profiles)
    here, there = (condition.plans["picture"] for condition in robust_conditions(mine, {"train": train}))

    assert [plan_identity(option.plan) for option in here] == [plan_identity(option.plan) for option in there]
    assert {option.plan.network for option in here} == {"wifi5"}
    assert {option.plan.network for option in there} == {"lte"}
    held = [side.within_promises(side.found.by_class["picture"]) for side in (mine, theirs)]
    both = {plan_identity(o.plan) for o in held[0]} & {plan_identity(o.plan) for o in held[1]}
    unbeaten = (prune([o for o in options if plan_identity(o.plan) in both]) for options in held)
    assert {plan_identity(o.plan) for options in unbeaten for o in options} == {plan_identity(o.plan) for o in here}


def test_a_fleet_cut_off_at_the_peak_is_outgrown_though_the_base_needs_less(base: Scenario, profiles: Profiles) -> None:
    """A quiet base has no state with more nodes than the fleet cut off; the peak's states count as well."""
    quiet = base.with_overrides({RATE: 0.5})
    formulation = Formulation(
        robust_conditions(planner_of(quiet, profiles), {"peak": base.with_overrides({RATE: 16.0})})
    )
    needed = formulation.solve(Goal())
    assert needed is not None
    outgrown = formulation.solve(Goal(no_good_cuts=(needed.replicas,)))

    assert outgrown is not None
    assert outgrown.replicas["a100"] > needed.replicas["a100"]


def test_other_request_classes_are_refused(base: Scenario, profiles: Profiles) -> None:
    """A plan for classes that come and go is no plan; place, value, rule and remedy say so."""
    data: dict[str, Any] = base.to_dict()
    renamed = base.with_overrides({"requests.drawing": data["requests"]["picture"], "requests.picture": None})

    with pytest.raises(InputError) as caught:
        robust_conditions(planner_of(base, profiles), {"art": renamed})
    assert {problem.place for problem in caught.value.problems} == {"scenarios.art"}
    assert {problem.value for problem in caught.value.problems} == {"no requests.picture", "requests.drawing"}
    assert all(problem.rule and problem.remedy for problem in caught.value.problems)


def test_where_no_plan_holds_the_scenario_is_named(base: Scenario, profiles: Profiles) -> None:
    """An SLO of a tenth of a second under one scenario makes the whole problem infeasible, by that scenario."""
    others = {"busy": base.with_overrides({RATE: 16.0}), "rush": base.with_overrides({"requests.picture.slo_s": 0.1})}
    mine = planner_of(base, profiles)
    conditions = robust_conditions(mine, others)

    assert [condition.relaxed for condition in conditions] == [{"picture"}] * 3
    assert all(condition.plans["picture"] for condition in conditions)
    (said,) = robust_obstacles(mine, others)
    assert said == "picture: no plan keeps its promises under rush, even on an idle fleet"
    assert robust_obstacles(mine, {"busy": others["busy"]}) == ()


def test_plans_that_hold_under_either_but_not_both_are_an_obstacle(base: Scenario, profiles: Profiles) -> None:
    """Phones alone without a cloud, the cloud alone with slow phones: each has its plan, and they share none."""
    no_limits = {"requests.picture.quality_floor": None, "requests.picture.edge_energy_j": None}
    offline = base.with_overrides({**no_limits, "pools.a100": None})
    strict = base.with_overrides({"requests.picture.quality_floor": 0.298})

    (said,) = robust_obstacles(planner_of(strict, profiles), {"offline": offline})
    assert said == "picture: each scenario has plans that keep its promises, but none does under base and offline alike"
