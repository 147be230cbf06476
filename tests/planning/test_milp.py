"""Laws of the formulation: what the MILP answers keeps what was asked, by the formula that confirms it."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Scenario, load_scenario
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.milp import Condition, Formulation, Goal, Solution
from hybridsd_sim.planning.planner import prune
from hybridsd_sim.pricing import find_candidates

CHANGES = st.fixed_dictionaries(
    {
        "requests.picture.arrivals.rate_per_s": st.floats(0.5, 30.0),
        "requests.picture.slo_s": st.floats(5.0, 20.0),
        "requests.picture.quality_floor": st.sampled_from([0.26, 0.285, 0.298]),
        "pools.a100.replicas_max": st.integers(1, 20),
    }
)


def condition(scenario: Scenario, profiles: Profiles) -> Condition:
    """The scenario's side, with the plans that keep their promises on an idle fleet."""
    sizer = Sizer(scenario, profiles)
    plans = {
        name: prune([o for o in options if o.keeps_limits and sizer.idle_attainment(o) >= sizer.wanted(name)])
        for name, options in find_candidates(scenario, profiles).by_class.items()
    }
    return Condition(sizer, plans)


@pytest.fixture(scope="module")
def photo(profiles: Profiles) -> Condition:
    """Five classes on two pools."""
    return condition(load_scenario("photo-app"), profiles)


@pytest.fixture(scope="module")
def solved(photo: Condition) -> Solution:
    """The cheapest plan of the photo app by formula."""
    answer = Formulation([photo]).solve(Goal())
    assert answer is not None
    return answer


@settings(max_examples=25, deadline=None)
@given(CHANGES)
def test_the_answer_keeps_every_promise_by_formula(profiles: Profiles, changes: dict[str, float]) -> None:
    """Whatever is asked, the exact formula finds nothing missing in what the states allowed."""
    side = condition(load_scenario("quickstart", overrides=changes), profiles)
    answer = Formulation([side]).solve(Goal())

    if answer is not None:
        sizing = side.sizer.assess(answer.mixes, answer.replicas)
        assert sizing.missed <= 0.003  # utilisations are looked at on a grid
        assert sum(share for share, _ in answer.mixes["picture"]) == pytest.approx(1.0)
        assert answer.replicas["a100"] <= changes["pools.a100.replicas_max"]
        assert answer.objective == pytest.approx(sizing.usd_per_hour, rel=0.01)


@settings(max_examples=15, deadline=None)
@given(CHANGES)
def test_no_single_plan_is_cheaper_than_the_mix(profiles: Profiles, changes: dict[str, float]) -> None:
    """Trying every plan on every number of nodes finds nothing cheaper that the states could have seen."""
    side = condition(load_scenario("quickstart", overrides=changes), profiles)
    answer = Formulation([side]).solve(Goal())

    cheapest = min(
        (
            sizing.usd_per_hour
            for option, nodes in product(side.plans["picture"], range(int(changes["pools.a100.replicas_max"]) + 1))
            if (sizing := side.sizer.assess({"picture": ((1.0, option),)}, {"a100": nodes})).missed <= 0.0
            and max(wait.utilisation for wait in sizing.waits.values()) < 0.9
        ),
        default=float("inf"),
    )
    assert (answer.objective if answer else float("inf")) <= cheapest * 1.001


@given(st.floats(1.0, 12.0))
@settings(max_examples=12, deadline=None)
def test_a_budget_bounds_the_rent(photo: Condition, budget: float) -> None:
    """What costs more than the budget is no answer; a larger budget never makes the plan dearer."""
    formulation = Formulation([photo])
    answer = formulation.solve(Goal(usd_per_hour=budget))

    if answer is not None:
        assert photo.sizer.assess(answer.mixes, answer.replicas).rent_usd_per_hour <= budget + 1e-6
        more = formulation.solve(Goal(usd_per_hour=budget + 1.0))
        assert more is not None
        assert more.objective <= answer.objective + 1e-3


def test_more_traffic_never_costs_less(photo: Condition) -> None:
    """The dollars rise with the traffic that the plan has to leave room for."""
    formulation = Formulation([photo])
    costs = [formulation.solve(Goal(traffic_factor=factor)) for factor in (0.6, 0.8, 1.0, 1.3, 2.0)]

    dollars = [answer.objective for answer in costs if answer]
    assert len(dollars) == len(costs)
    assert all(a <= b * 1.0005 for a, b in pairwise(dollars))


def test_a_fleet_cut_off_and_smaller_ones_are_not_proposed_again(photo: Condition, solved: Solution) -> None:
    """Some pool has more nodes than the fleet cut off."""
    again = Formulation([photo]).solve(Goal(no_good_cuts=(solved.replicas,)))

    assert again is not None
    assert any(again.replicas[name] > nodes for name, nodes in solved.replicas.items())
    assert again.objective >= solved.objective - 1e-6


def test_the_least_loaded_plan_works_its_nodes_least(photo: Condition, solved: Solution) -> None:
    """For next to the same dollars the pools are busy a smaller part of the time."""
    least_loaded = Formulation([photo]).solve(Goal(minimise="load", total_usd_per_hour=solved.objective * 1.002))

    assert least_loaded is not None
    busy = [
        sum(w.utilisation for w in photo.sizer.assess(a.mixes, a.replicas).waits.values())
        for a in (least_loaded, solved)
    ]
    assert busy[0] <= busy[1] + 1e-9
    assert photo.sizer.assess(least_loaded.mixes, least_loaded.replicas).usd_per_hour <= solved.objective * 1.003


def test_a_quality_asked_in_the_mean_is_met_by_a_mix(photo: Condition, solved: Solution) -> None:
    """Between two plans' scores lies a mix of both, which costs something between them."""
    before = photo.sizer.assess(solved.mixes, solved.replicas).quality
    assert before is not None
    better = Formulation([photo]).solve(Goal(quality=before + 0.002))

    assert better is not None
    after = photo.sizer.assess(better.mixes, better.replicas).quality
    assert after is not None
    assert after >= before + 0.002 - 1e-5
    assert better.objective >= solved.objective - 1e-6


def test_where_a_pool_is_too_small_the_rest_is_turned_away(profiles: Profiles) -> None:
    """One GPU serves what it can in time; without leave to turn anybody away there is no plan."""
    scenario = load_scenario("quickstart", overrides={"pools.a100.replicas_max": 1})
    formulation = Formulation([condition(scenario, profiles)])
    answer = formulation.solve(Goal(minimise="turned_away_per_s", turned_away_per_s=None))

    assert formulation.solve(Goal()) is None
    assert answer is not None
    served = sum(share for share, _ in answer.mixes["picture"])
    assert 0.1 < served < 0.9
    assert answer.objective == pytest.approx(8.0 * (1.0 - served), rel=0.01)


def test_an_answer_that_was_not_found_in_time_is_no_proof(photo: Condition) -> None:
    """Without time the solver gives up, and says so; a goal that no plan meets is proved and says nothing."""
    hurried, proved = Formulation([photo]), Formulation([photo])

    assert proved.solve(Goal(usd_per_hour=0.01)) is None
    assert not proved.gave_up
    assert hurried.solve(Goal(time_limit_s=0.0)) is None
    assert hurried.gave_up


def test_two_conditions_share_fleet_and_shares(profiles: Profiles) -> None:
    """A plan for quiet and busy hours costs what the busy hour costs, and no less than the quiet one."""
    quiet = condition(load_scenario("quickstart"), profiles)
    busy = condition(load_scenario("quickstart", scenario="busy"), profiles)
    alone, other, both = (Formulation(sides).solve(Goal()) for sides in ([quiet], [busy], [quiet, busy]))

    assert alone is not None
    assert other is not None
    assert both is not None
    assert both.replicas == other.replicas
    assert both.objective >= alone.objective
