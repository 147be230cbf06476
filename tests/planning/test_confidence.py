"""Laws of plans under uncertain step costs: how factors are drawn, how sure a plan is, and what surer plans cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, load_scenario
from hybridsd_sim.planning.analytic import Mixes, Sizer
from hybridsd_sim.planning.confidence import (
    Confident,
    Spread,
    confidence,
    confident_search,
    factors,
    keeps_limits,
    spreads,
)
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.pricing import Candidate, CandidateSet
from planners import SMALL, planner_of

DRAWS = 60
WIDTHS = st.floats(0.0, 1.5)


def small(profiles: Profiles, **overrides: object) -> Planner:
    """Phones and one pool, for four minutes; double underscores are dots."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return planner_of(load_scenario("quickstart", overrides={**SMALL, **changes}), profiles)


def pure(mine: Planner, text: str = "[0,10)") -> Mixes:
    """Every picture by the plan whose label holds a text."""
    return {"picture": ((1.0, next(o for o in mine.found.by_class["picture"] if text in o.plan.label)),)}


def with_ends(option: Candidate, low: float, high: float) -> Candidate:
    """The same plan with intervals of its parts from `low` to `high` times their seconds."""
    parts = (
        replace(part, seconds=replace(part.seconds, low=low * part.seconds.value, high=high * part.seconds.value))
        for part in option.cost.parts
    )
    return replace(option, cost=replace(option.cost, parts=tuple(parts)))


def sure(mine: Planner, nodes: int, mixes: Mixes | None = None) -> float:
    """How sure a plan on so many nodes is."""
    return confidence(mine, mixes or pure(mine), {"a100": nodes}, None, draws=DRAWS).probability


@pytest.fixture(scope="module")
def mine(profiles: Profiles) -> Planner:
    """The scenario as it is."""
    return small(profiles)


@pytest.fixture(scope="module")
def searched(mine: Planner) -> dict[float, Confident]:
    """The plans for three probabilities."""
    return {asked: confident_search(mine, asked, draws=DRAWS) for asked in (0.6, 0.95)}


@given(WIDTHS, WIDTHS)
def test_the_factor_of_a_site_has_the_interval_of_its_seconds(mine: Planner, below: float, above: float) -> None:
    """Its median is 1, and 90% of it lie between the ends that the parts have."""
    low, high = np.exp([-below, above]).tolist()
    ((_, option),) = pure(mine)["picture"]
    found = spreads({"picture": ((1.0, with_ends(option, low, high)),)}, mine.sizer)

    assert set(found) == {"a100", "phones"}
    for one in found.values():
        assert [one.at(p) for p in (0.05, 0.5, 0.95)] == pytest.approx([low, 1.0, high])


@given(st.integers(1, 60), WIDTHS, WIDTHS)
def test_each_site_meets_every_part_of_its_distribution_once(
    mine: Planner, draws: int, below: float, above: float
) -> None:
    """A Latin hypercube: of n draws, one lies between each two neighbouring n-quantiles."""
    spread = {"a100": Spread(below, above), "phones": Spread(above, below)}
    drawn = factors(mine.scenario, spread, draws)

    for site, one in spread.items():
        bounds = [one.at(k / draws) for k in range(1, draws)]
        values = sorted(draw[site] for draw in drawn)
        ends = zip([0.0, *bounds], values, [*bounds, np.inf], strict=True)
        assert all(low * (1 - 1e-6) <= value <= high * (1 + 1e-6) for low, value, high in ends)


def test_another_site_shifts_no_draw(mine: Planner) -> None:
    """Each site has a random stream of its own, so that plans that use other sites meet the same luck."""
    alone = factors(mine.scenario, {"a100": Spread(0.1, 0.2)}, 20)
    beside = factors(mine.scenario, {"phones": Spread(0.3, 0.3), "a100": Spread(0.1, 0.2)}, 20)

    assert [draw["a100"] for draw in alone] == [draw["a100"] for draw in beside]


@pytest.mark.parametrize(("nodes", "holds"), [(3, 1.0), (1, 0.0)])
def test_without_uncertainty_a_plan_holds_or_does_not(mine: Planner, nodes: int, holds: float) -> None:
    """With intervals of no width every draw is the same; the probability is that of the simulation's yes or no."""
    ((_, option),) = pure(mine)["picture"]

    assert sure(mine, nodes, {"picture": ((1.0, with_ends(option, 1.0, 1.0)),)}) == holds


@settings(max_examples=5)
@given(st.lists(st.floats(1.5, 20.0), min_size=2, max_size=4))
def test_a_tighter_slo_is_never_surer(profiles: Profiles, slos_s: list[float]) -> None:
    """On the same draws, who is in time within fewer seconds is in time within more."""
    found = [sure(small(profiles, requests__picture__slo_s=slo_s), 3) for slo_s in sorted(slos_s)]

    assert found == sorted(found)


def test_more_nodes_never_lower_the_probability(profiles: Profiles) -> None:
    """From a queue that grows to one that is empty; the energy budget is lifted, as no node mends that."""
    mine = small(profiles, requests__picture__edge_energy_j=None)
    found = [sure(mine, nodes) for nodes in (1, 2, 3, 4, 6)]

    assert found == sorted(found)
    assert found[0] == 0.0
    assert found[-1] == 1.0


def test_limits_on_joules_count_in_the_probability(mine: Planner, profiles: Profiles) -> None:
    """Slow phones draw more; with plenty of nodes it is the energy budget alone that breaks."""
    free = small(profiles, requests__picture__edge_energy_j=None)

    assert sure(mine, 8) < sure(free, 8)


def test_a_fleet_over_the_budget_holds_with_no_probability(profiles: Profiles) -> None:
    """The rent is a promise as well; each class by itself does not see it."""
    mine = small(profiles, budget__usd_per_hour=10.0)
    found = confidence(mine, pure(mine), {"a100": 3}, 0.9, draws=DRAWS)

    assert found.probability == 0.0
    assert found.by_class["picture"] > 0.0
    assert (found.asked, found.draws, found.level) == (0.9, DRAWS, "screened")


def test_formula_and_recursion_are_about_as_sure(mine: Planner, profiles: Profiles) -> None:
    """A queue by deadline of one class is first in, first out: the recursion refuses it, the formula says the same."""
    by_deadline = small(profiles, pools__a100__discipline="edf")
    formula = confidence(by_deadline, pure(by_deadline), {"a100": 3}, None, draws=DRAWS)
    recursion = confidence(mine, pure(mine), {"a100": 3}, None, draws=DRAWS)

    assert formula.level.startswith("formula")
    assert formula.probability == pytest.approx(recursion.probability, abs=0.1)


def test_limits_hold_in_the_mean_of_a_mix(mine: Planner) -> None:
    """As the verdict has it; what nobody knows keeps no limit."""
    good, bad = (pure(mine, text)["picture"][0][1] for text in ("[0,15)", "[0,5)"))
    floor = mine.scenario.requests["picture"].quality_floor

    assert good.quality > floor > bad.quality
    assert keeps_limits(mine.scenario, "picture", [(0.99, good), (0.01, bad)])
    assert not keeps_limits(mine.scenario, "picture", [(0.01, good), (0.99, bad)])
    assert not keeps_limits(mine.scenario, "picture", [(0.99, good), (0.01, replace(bad, quality=None))])


def test_a_confident_plan_is_as_sure_as_asked_and_holds_at_the_medians(searched: Mapping[float, Confident]) -> None:
    """Its probability is at least what is asked, and simulation confirms it at the prices themselves."""
    for asked, one in searched.items():
        assert one.sure
        assert one.confidence.probability >= asked == one.confidence.asked
        assert one.found.feasible
        assert one.found.simulated
        assert one.evaluated


def test_more_confidence_never_costs_less(mine: Planner, searched: Mapping[float, Confident]) -> None:
    """And the plan at the medians is no dearer than any."""
    dollars = [one.found.sizing.usd_per_hour for one in searched.values()]
    plain = mine.search("plan").run()

    assert plain.sizing.usd_per_hour <= dollars[0] <= dollars[1]
    assert dollars[0] < dollars[1]


def test_the_mixes_of_a_confident_plan_are_at_their_true_prices(
    mine: Planner, searched: Mapping[float, Confident]
) -> None:
    """Slower prices guide the search and are gone from the answer."""
    own = {id(option) for option in mine.found.by_class["picture"]}

    assert all(id(o) in own for one in searched.values() for _, o in one.found.mixes["picture"])


def test_where_nothing_is_sure_enough_the_surest_plan_comes_back(profiles: Profiles) -> None:
    """On three nodes at most the budget of joules stays in doubt: a plan, and how sure it is."""
    one = confident_search(small(profiles, pools__a100__replicas_max=3), 0.99, draws=DRAWS)

    assert not one.sure
    assert one.found.feasible
    assert 0.0 < one.confidence.probability < 0.99


def test_where_nothing_holds_at_the_medians_there_is_no_plan(profiles: Profiles) -> None:
    """An SLO that nobody can keep has no plan of any probability."""
    one = confident_search(small(profiles, requests__picture__slo_s=0.1), 0.6, draws=DRAWS)

    assert (one.found, one.confidence, one.sure) == (None, None, False)


def test_with_known_costs_confidence_costs_nothing(mine: Planner) -> None:
    """Where no interval has width, the plan of any confidence is the plain plan."""
    exact = {name: tuple(with_ends(o, 1.0, 1.0) for o in options) for name, options in mine.found.by_class.items()}
    certain = replace(mine, found=CandidateSet(exact, ()), sizer=Sizer(mine.scenario, mine.profiles))
    one, plain = confident_search(certain, 0.95, draws=DRAWS), certain.search("plan").run()

    assert one.confidence.probability == 1.0
    assert one.found.replicas == plain.replicas
    assert one.found.sizing.usd_per_hour == pytest.approx(plain.sizing.usd_per_hour)
