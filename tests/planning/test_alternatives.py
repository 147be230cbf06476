"""Laws of the formulation under changed promises and traffic, and of the shadow prices made from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim.planning.alternatives import margins
from hybridsd_sim.planning.milp import GAP
from hybridsd_sim.planning.planner import fit_traffic_factor, solve, strict_condition, vary
from planners import SHORT, chosen_by, planner_of

ROUNDING = 1.0 + 3.0 * GAP
"""Two answers of the solver are each within its gap."""


@pytest.fixture(scope="module")
def planner(quickstart, profiles):
    """The means to plan the quickstart scenario."""
    return planner_of(quickstart, profiles, **SHORT)


@pytest.fixture(scope="module")
def chosen(planner):
    """The plan that the search finds."""
    return chosen_by(planner)


def cost_of(planner, changes, traffic=1.0):
    """Dollars an hour of the cheapest plan by formula; infinite where there is none."""
    answer = solve(vary(planner, changes, traffic=traffic))
    return float("inf") if answer is None else answer.objective


@settings(max_examples=15)
@given(st.floats(0.3, 12.0), st.floats(0.05, 6.0))
def test_a_looser_slo_never_costs_more(planner, slo_s, more_s):
    """Seconds added to an SLO leave every plan that was there."""
    tight, loose = ({"requests.picture.slo_s": slo} for slo in (slo_s, slo_s + more_s))
    assert cost_of(planner, loose) <= cost_of(planner, tight) * ROUNDING


@settings(max_examples=15)
@given(st.floats(0.27, 0.31), st.floats(0.0, 0.03))
def test_a_lower_quality_floor_never_costs_more(planner, floor, less):
    """CLIP taken off a floor leaves every plan that was there."""
    high, low = ({"requests.picture.quality_floor": value} for value in (floor, floor - less))
    assert cost_of(planner, low) <= cost_of(planner, high) * ROUNDING


@settings(max_examples=15)
@given(st.floats(0.2, 2.5), st.floats(0.05, 0.95))
def test_less_traffic_never_costs_more(planner, traffic, share):
    """A part of the requests needs no more nodes than all of them."""
    assert cost_of(planner, {}, traffic * share) <= cost_of(planner, {}, traffic) * ROUNDING


def test_changed_promises_need_no_new_prices(planner, quickstart, profiles):
    """Judged anew, the old candidates keep the same floors and limits as those of the changed scenario."""
    changes = {"requests.picture.quality_floor": 0.29, "requests.picture.edge_energy_j": 30.0}
    fresh = planner_of(quickstart, profiles, **SHORT, **changes)
    known = vary(planner, changes)
    held = [[(o.plan, o.keeps_limits) for o in each.found.by_class["picture"]] for each in (known, fresh)]
    assert held[0] == held[1]
    assert {kept for _, kept in held[0]} == {True, False}


def test_margins_start_from_one_cost_and_move_the_right_way(planner, chosen):
    """More seconds, less quality and less traffic cost nothing more; the opposites save nothing."""
    costs = {m.change: (m.before, m.after) for m in margins(planner, chosen) if m.figure == "usd_per_hour"}
    assert len(costs) == 5
    assert len({before for before, _ in costs.values()}) == 1
    for change, (before, after) in costs.items():
        if change in {"0.005 of CLIP more on every quality floor", "ten per cent more traffic"}:
            assert after is None or after >= before
        else:
            assert after <= before


def test_a_dollar_buys_no_slower_and_no_poorer_pictures(planner, chosen):
    """One more dollar an hour can only lower the latency and raise the quality."""
    bought = {m.figure: (m.before, m.after) for m in margins(planner, chosen) if m.figure != "usd_per_hour"}
    assert bought["latency_p95_s"][1] <= bought["latency_p95_s"][0]
    assert bought["quality"][1] >= bought["quality"][0]


def test_a_dollar_that_buys_a_node_buys_something(quickstart, profiles):
    """Where a node costs less than a dollar an hour, the dollar shortens the latency and betters the pictures."""
    cheap = planner_of(quickstart, profiles, **SHORT, **{"pools.a100.usd_per_gpu_hour": 0.5})
    bought = {margin.figure: margin for margin in margins(cheap, chosen_by(cheap))}
    assert bought["latency_p95_s"].after < bought["latency_p95_s"].before
    assert bought["quality"].after > bought["quality"].before


def test_a_change_that_no_plan_survives_has_no_cost(quickstart, profiles, chosen):
    """Floors raised above the best picture leave nothing: the cost is unknown, not infinite."""
    strict = planner_of(quickstart, profiles, **SHORT, **{"requests.picture.quality_floor": 0.297})
    told = {margin.change: margin for margin in margins(strict, chosen)}
    assert told["0.005 of CLIP more on every quality floor"].after is None
    assert told["0.005 of CLIP more on every quality floor"].before is not None


def test_a_scenario_without_promises_has_margins_of_money_and_traffic_only(quickstart, profiles, chosen):
    """Where nobody is promised seconds or quality, one more of them means nothing."""
    free = {"requests.picture.slo_s": None, "requests.picture.quality_floor": None}
    told = {margin.change for margin in margins(planner_of(quickstart, profiles, **SHORT, **free), chosen)}
    assert not any("SLO" in change or "CLIP" in change for change in told)
    assert any("traffic" in change for change in told)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_the_agreeing_traffic_factor_lets_the_formula_believe_the_plan(planner, nodes):
    """At that share of the traffic a plan exists for the rent, unless none does at the smallest."""
    condition, rent = strict_condition(planner), nodes * planner.sizer.unit_rent["a100"]
    traffic_factor = fit_traffic_factor(planner, condition, rent)
    believed = solve(planner, usd_per_hour=rent * (1.0 + 1e-6), traffic_factor=traffic_factor) is not None
    smallest = solve(planner, usd_per_hour=rent * (1.0 + 1e-6), traffic_factor=0.7) is not None
    assert believed == smallest
