"""Laws of the search for one plan, on small random scenarios with real simulations."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Scenario, load_scenario
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.evaluation import EvaluationJob, Evaluator, evaluate
from hybridsd_sim.planning.search import BETTER, ROUNDS, Evaluate, Found, PlanSearch
from hybridsd_sim.scenario import ALL
from planners import Trials, planner_of
from random_scenarios import random_scenario

SEEDS = st.integers(0, 400)
SHORT = {"horizon_s": 120.0, "warmup_s": 12.0, "replications": 2}
"""Of the quickstart, about 2,000 requests."""
NODE_USD_PER_HOUR = 3.4309
"""What one of its nodes rents for."""


def search_of(scenario: Scenario, profiles: Profiles, trials: Evaluate | None = None) -> PlanSearch:
    """A search over all plans of a scenario."""
    return planner_of(scenario, profiles, trials).search("plan")


def found_of(search: PlanSearch) -> Found | None:
    """What it finds; None also where a class has no plan in time on an idle fleet."""
    condition = search.conditions[0]
    if condition.relaxed or any(not options for options in condition.plans.values()):
        return None
    return search.run()


def quick(profiles: Profiles, **changes: object) -> Found:
    """The plan for a short quickstart with changes."""
    found = found_of(search_of(load_scenario("quickstart", overrides={**SHORT, **changes}), profiles))
    assert found is not None
    assert found.feasible
    return found


def usd_per_hour(found: Found | None) -> float:
    """Rent and egress of a plan that holds; infinite without one."""
    return found.sizing.usd_per_hour if found is not None and found.feasible else math.inf


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.floats(0.3, 3.0))
def test_what_is_called_feasible_keeps_budget_and_promises(profiles: Profiles, seed: int, factor: float) -> None:
    """Simulated again, the plan keeps them all; its rent keeps both budgets, which lie around what it cost without."""
    free = random_scenario(seed).with_overrides({"budget.usd_per_hour": None, "budget.usd_per_image": None})
    rent = usd_per_hour(found_of(search_of(free, profiles)))
    assume(0.0 < rent < math.inf)
    images = sum(3600 * spec.arrivals.rate_per_s * spec.num_images for spec in free.requests.values())  # type: ignore[operator]
    limits = {"usd_per_hour": factor * rent, "usd_per_image": 1.2 * factor * rent / images}

    scenario = free.with_overrides({"budget": limits})
    found = found_of(search_of(scenario, profiles))
    if found is not None and found.feasible:
        again = evaluate(EvaluationJob(scenario, profiles, found.evaluations[0].deployment))
        everyone = again.classes[ALL]
        assert again.feasible
        assert again.rent_usd_per_hour is not None
        assert again.rent_usd_per_hour <= limits["usd_per_hour"] * (1.0 + 1e-9)
        assert everyone["rent_usd_per_image"].value <= limits["usd_per_image"] * (1.0 + 1e-9)


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_a_search_ends_and_repeats_nothing(profiles: Profiles, seed: int) -> None:
    """At most `ROUNDS` plans and their confirmation; none is tried twice at a level; the bound lies below."""
    trials = Trials()
    found = found_of(search_of(random_scenario(seed), profiles, trials))

    tried = [(job.level, str(job.deployment.to_dict())) for job in trials.jobs]
    assert len(tried) <= ROUNDS + 1
    assert len(set(tried)) == len(tried)
    if found is not None and found.bound is not None:
        assert found.bound <= found.sizing.usd_per_hour
        assert found.bound >= found.sizing.usd_per_hour * (1.0 - 2.0 * BETTER)


@settings(max_examples=4, deadline=None)
@given(SEEDS)
def test_whatever_fans_out_the_answer_is_the_same(profiles: Profiles, seed: int) -> None:
    """One job after the other, or several threads at a time, without and with what others kept."""
    scenario = random_scenario(seed)
    alone = found_of(search_of(scenario, profiles))
    with ThreadPoolExecutor(2) as pool:
        together = found_of(search_of(scenario, profiles, lambda jobs: list(pool.map(Evaluator(), jobs))))

    def deployed(found: Found | None) -> Deployment | None:
        return found and found.evaluations[0].deployment

    assert deployed(alone) == deployed(together)


@settings(max_examples=5, deadline=None)
@given(SEEDS, st.floats(1.05, 3.0))
def test_a_looser_slo_never_costs_more(profiles: Profiles, seed: int, factor: float) -> None:
    """More seconds for every class: the plan is not dearer by more than 1%."""
    scenario = random_scenario(seed)
    promised = {name: spec.slo_s for name, spec in scenario.requests.items() if spec.slo_s is not None}
    looser = {f"requests.{name}.slo_s": factor * slo_s for name, slo_s in promised.items()}

    tight = usd_per_hour(found_of(search_of(scenario, profiles)))
    loose = usd_per_hour(found_of(search_of(scenario.with_overrides(looser), profiles)))
    assert loose <= 1.01 * tight or math.isinf(tight)


def test_a_free_plan_is_tried_and_confirmed_alone(profiles: Profiles) -> None:
    """Where the edge can do everything, nothing could be cheaper."""
    trials = Trials()
    easy = {"requests.picture.quality_floor": None, "requests.picture.edge_energy_j": None}
    scenario = load_scenario("quickstart", overrides={**SHORT, **easy})

    found = found_of(search_of(scenario, profiles, trials))
    assert usd_per_hour(found) == pytest.approx(0.0, abs=0.2)
    assert [job.level for job in trials.jobs] == ["screen", "simulate"]


def test_dollars_buy_latency(profiles: Profiles) -> None:
    """Minimising latency under a budget: not slower than the cheapest plan, and within the budget."""
    cheapest = quick(profiles)
    budget = {"search.minimise": "latency_p95_s", "budget.usd_per_hour": 6 * NODE_USD_PER_HOUR}
    fastest = quick(profiles, **budget)

    assert fastest.sizing.rent_usd_per_hour <= budget["budget.usd_per_hour"]  # type: ignore[operator]
    got, other = (one.evaluations[0].classes[ALL]["latency_p95_s"].value for one in (fastest, cheapest))
    assert got <= other


def test_dollars_buy_quality(profiles: Profiles) -> None:
    """Minimising the loss of quality under a budget: the pictures are no worse than the cheapest plan's, and better."""
    cheapest = quick(profiles)
    finest = quick(profiles, **{"search.minimise": "quality_loss", "budget.usd_per_hour": 6 * NODE_USD_PER_HOUR})

    got, other = (one.evaluations[0].classes[ALL]["quality_mean"].value for one in (finest, cheapest))
    assert got > other
    assert finest.sizing.rent_usd_per_hour <= 6 * NODE_USD_PER_HOUR


def test_what_a_budget_cannot_serve_is_turned_away(profiles: Profiles) -> None:
    """Minimising what is turned away: most of the traffic on half the nodes, everybody on enough of them."""
    asked = {"search.minimise": "turned_away_per_s"}
    few = quick(profiles, **asked, **{"budget.usd_per_hour": 2 * NODE_USD_PER_HOUR})
    enough = quick(profiles, **asked, **{"budget.usd_per_hour": 4 * NODE_USD_PER_HOUR})

    served = [sum(share for share, _ in found.mixes["picture"]) for found in (few, enough)]
    assert 0.4 < served[0] < 1.0
    assert served[1] == pytest.approx(1.0)
