"""Laws of the frontier and of near-optimal alternatives, on the quickstart scenario and small variations of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.alternatives import MOST, NEAR_OPTIMAL, alternatives, distance
from hybridsd_sim.planning.evaluation import EvaluatedPlan, EvaluationJob, dominates, evaluate
from hybridsd_sim.planning.frontier import frontier
from planners import SHORT, chosen_by, hypervolume, planner_of

OTHER_POOL = {"gpu": "l40s", "gpus_per_node": 1, "runtime": "tensorrt", "replicas_max": 16}
DISCOUNT = {"gpu": "a100-sxm-80gb", "gpus_per_node": 1, "runtime": "compiled", "replicas_max": 16, "purchase": "spot"}
CASES = {
    "as shipped": {},
    "under a budget": {"budget.usd_per_hour": 18.0},
    "two pools": {"pools.l40s": OTHER_POOL},
}


@pytest.fixture(scope="module")
def drawn(quickstart, profiles):
    """By the name of a case: a planner, its chosen plan and the frontier around it, made once."""

    @cache
    def draw(name):
        planner = planner_of(quickstart, profiles, **SHORT, **CASES[name])
        chosen = chosen_by(planner)
        return planner, chosen, frontier(planner, chosen)

    return draw


@pytest.fixture(params=CASES)
def case(request, drawn):
    """Each case in turn."""
    return drawn(request.param)


def test_no_point_of_the_frontier_beats_another(case):
    """In dollars, latency and quality together, each point is better than each other one somewhere."""
    _, _, points = case
    assert len(points) > 5
    assert not any(dominates(one, other) for one in points for other in points)


def test_every_point_of_the_frontier_holds_by_its_own_evaluation(case):
    """Tried again, a point keeps every promise and has the figures that the frontier tells."""
    planner, _, points = case
    for point in points:
        assert point.feasible
        again = evaluate(EvaluationJob(planner.scenario, planner.profiles, point.deployment, "screen"))
        assert again.feasible
        assert again.rent_usd_per_hour == pytest.approx(point.usd_per_hour)
        if point.name != "chosen":
            assert again.classes["all"]["latency_p95_s"].value == pytest.approx(point.latency_p95_s[0])


def test_every_point_of_the_frontier_is_within_the_budget(case):
    """No point rents for more than the scenario allows."""
    planner, _, points = case
    limit = planner.scenario.budget.usd_per_hour
    assert limit is None or max(point.usd_per_hour for point in points) <= limit


def test_the_frontier_has_the_chosen_plan_or_a_better_one(case):
    """The plan that the search found is a point, or some point is nowhere worse."""
    _, chosen, points = case
    assert any(point is chosen or dominates(point, chosen) for point in points)


def test_a_budget_cuts_the_frontier_and_changes_nothing_below(drawn):
    """Under a budget the cheapest point stays and the dearest plans are gone."""
    (_, _, free), (_, _, bound) = drawn("as shipped"), drawn("under a budget")
    assert bound[0].usd_per_hour == free[0].usd_per_hour
    assert bound[-1].usd_per_hour <= 18.0 < free[-1].usd_per_hour


def test_the_frontier_covers_more_than_every_unmixed_plan_on_every_fleet(drawn):
    """Its volume of cost, latency and quality is at least that of all plans of one kind, tried one by one."""
    planner, _, points = drawn("as shipped")
    grid = [
        EvaluatedPlan.from_evaluation("grid", evaluation, {"picture": ((1.0, option),)})
        for option in planner.condition().plans["picture"]
        for nodes in range(1, 17)
        if (evaluation := tried(planner, option, nodes)).feasible
    ]
    worst = (60.0, 8.0, 0.285)
    assert len(grid) > 30
    assert hypervolume(points, worst) >= hypervolume(grid, worst)


def tried(planner, option, nodes):
    """One plan for everybody on so many nodes, by the recursion."""
    deployment = Deployment.pure({"a100": nodes}, {"picture": option.plan})
    return evaluate(EvaluationJob(planner.scenario, planner.profiles, deployment, "screen"))


def test_without_any_plan_the_frontier_is_what_was_chosen_or_empty(drawn, quickstart, profiles):
    """Where the formula has no plan, a chosen plan that holds stays alone and one that does not is no point."""
    _, chosen, _ = drawn("as shipped")
    infeasible = planner_of(quickstart, profiles, **SHORT, **{"requests.picture.slo_s": 0.1})
    assert frontier(infeasible, chosen) == (chosen,)
    assert frontier(infeasible, replace(chosen, feasible=False)) == ()


@pytest.fixture(scope="module")
def spores(quickstart, profiles):
    """A scenario with three pools, on demand and spot, its chosen plan, and the alternatives to it."""
    pools = {"pools.l40s": OTHER_POOL, "pools.a100-spot": DISCOUNT}
    planner = planner_of(quickstart, profiles, **SHORT, **pools)
    chosen = chosen_by(planner)
    return planner, chosen, alternatives(planner, chosen)


def test_alternatives_hold_and_cost_little_more(spores):
    """Every alternative keeps its promises and rents for at most 1.3 times as much as the chosen plan."""
    _, chosen, others = spores
    assert 0 < len(others) <= MOST
    assert all(other.feasible and other.usd_per_hour <= NEAR_OPTIMAL * chosen.usd_per_hour + 1e-6 for other in others)


def test_alternatives_are_of_the_kind_that_they_are_named_after(spores):
    """`only pool P` rents no other, `without pool P` not that one, and a purchase is kept to."""
    planner, _, others = spores
    for other in others:
        rented = {name for name, nodes in other.deployment.replicas.items() if nodes}
        if other.name.startswith("only pool "):
            assert rented <= {other.name.removeprefix("only pool ")}
        if other.name.startswith("without pool "):
            assert other.name.removeprefix("without pool ") not in rented
        if other.name.endswith(" only"):
            bought = other.name.removesuffix(" only").replace(" ", "_")
            assert {planner.scenario.pools[name].purchase for name in rented} <= {bought}


def test_alternatives_differ_from_the_chosen_plan_and_from_each_other(spores):
    """The distance is symmetric, 0 from a plan to itself, and every pair that is told is apart."""
    planner, chosen, others = spores
    told = (chosen, *others)
    for index, one in enumerate(told):
        assert distance(planner, one, one) == pytest.approx(0.0)
        for other in told[index + 1 :]:
            assert distance(planner, one, other) == pytest.approx(distance(planner, other, one))
            assert 0.01 <= distance(planner, one, other) <= 2.0 + 1e-9


def test_the_most_different_alternative_comes_first(spores):
    """No later alternative is further from the chosen plan than the first."""
    planner, chosen, others = spores
    distances = [distance(planner, chosen, other) for other in others]
    assert distances[0] == max(distances)
