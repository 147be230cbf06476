"""What a capacity plan promises: it holds, it is cheapest among its kinds, and it says why."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from hybridsd_sim import CapacityPlan, Profiles, Scenario, optimize, simulate
from hybridsd_sim.candidates import find_candidates, rental_usd_per_hour
from hybridsd_sim.capacity import dominates
from hybridsd_sim.plan import Deployment, deployment_from_dict
from hybridsd_sim.scenario import dump_yaml, load_scenario, load_yaml
from hybridsd_sim.sizing import Sizer


def short(scenario: Scenario, **changes: Any) -> Scenario:
    """The scenario over two minutes, twice."""
    base = {"horizon_s": 150.0, "warmup_s": 20.0, "replications": 2}
    return scenario.with_overrides(base | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def plan(quickstart: Scenario, profiles: Profiles) -> CapacityPlan:
    """The plan of the quickstart, shortened."""
    return optimize(short(quickstart), profiles)


def test_a_feasible_plan_holds_when_it_is_simulated_again(plan: CapacityPlan, profiles: Profiles) -> None:
    """Deploying the answer gives the evidence it was chosen by."""
    again = simulate(plan.scenario, profiles, policy="planned", plan=plan.deployment)

    assert plan.feasible
    assert again.verdict.feasible.ok
    assert again.replications[0].rows().tobytes() == plan.chosen_result.replications[0].rows().tobytes()


def test_handing_over_saves_against_cloud_only(plan: CapacityPlan) -> None:
    """The quickstart's answer is a hand-over: cheaper than cloud-only, above the quality floor."""
    (option,) = plan.chosen.values()
    cloud_only = next(baseline for baseline in plan.baselines if baseline.name == "cloud only")

    assert 0 < option.cloud_steps < 25
    assert (plan.usd_per_hour or 0) < (cloud_only.usd_per_hour or 0)
    assert (option.quality or 0) >= 0.285


def test_no_smaller_deployment_holds(plan: CapacityPlan, profiles: Profiles) -> None:
    """Every choice of one plan on fewer nodes breaks a promise: found by simulating them all."""
    scenario = plan.scenario
    for option in find_candidates(scenario, profiles).by_class["picture"]:
        if option.pool_index < 0 or not option.meets_floor:
            continue
        fewer = Deployment.pure({"a100": plan.replicas_opt["a100"] - 1}, {"picture": option.plan})
        assert not simulate(scenario, profiles, policy="planned", plan=fewer).verdict.feasible.ok


def test_the_rent_is_that_of_the_nodes(plan: CapacityPlan, profiles: Profiles) -> None:
    """Dollars an hour are nodes times price, whichever object is asked."""
    rent = rental_usd_per_hour(plan.scenario, profiles, plan.replicas_opt)

    assert plan.usd_per_hour == plan.chosen_result.usd_per_hour == pytest.approx(rent)


def test_nothing_on_the_frontier_is_dominated(plan: CapacityPlan) -> None:
    """No point is as good as another in dollars, latency and quality and better in one."""
    assert len(plan.frontier) >= 2
    assert not any(dominates(one, other) for one in plan.frontier for other in plan.frontier)


def test_the_switch_curve_covers_every_step(plan: CapacityPlan) -> None:
    """One plan a switch step, in order, both ends included."""
    steps = [option.cloud_steps for option in plan.switch_curve["picture"]]

    assert steps == [0, 5, 10, 15, 20, 25]


def test_a_deployment_survives_yaml(plan: CapacityPlan) -> None:
    """What is written as plan.yaml is read back the same."""
    text = dump_yaml(plan.deployment.to_dict())

    assert deployment_from_dict(load_yaml(text, "plan.yaml")) == plan.deployment


def test_the_explanation_says_what_to_rent_and_why(plan: CapacityPlan) -> None:
    """Rent, saving, why not earlier, why not at the edge alone."""
    text = " ".join(plan.explanation)

    for words in ("Rent", "less than cloud only", "under the floor", "the edge alone"):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests__picture__slo_s": 0.5}, "with an SLO of"),
        ({"requests__picture__quality_floor": 0.31}, "with a quality floor of 0.2993"),
        ({"pools__a100__replicas_max": 1}, "replicas_max of 1"),
        ({"budget__usd_per_hour": 4.0}, "would pay for the plan shown"),
    ],
)
def test_an_infeasible_scenario_says_what_binds_and_what_would_lift_it(
    quickstart: Scenario, profiles: Profiles, changes: dict[str, Any], words: str
) -> None:
    """A plan is still returned, marked infeasible, with the change that would help."""
    plan = optimize(short(quickstart, **changes), profiles)

    assert not plan.feasible
    assert plan.explanation[0].startswith("No plan holds every promise")
    assert any(words in sentence for sentence in plan.explanation), plan.explanation


def test_a_plan_within_the_budget_stays_within_it(quickstart: Scenario, profiles: Profiles) -> None:
    """A budget that is just enough is enough; a feasible plan never exceeds it."""
    plan = optimize(short(quickstart, budget__usd_per_hour=10.3), profiles)

    assert plan.feasible
    assert (plan.usd_per_hour or 0) <= 10.3


def test_the_studio_needs_nvlink_and_more_than_one_gpu(profiles: Profiles) -> None:
    """Final pictures at 2048 px get a gang on the NVLink nodes, and the reader hears why PCIe will not do."""
    studio = load_scenario("studio-2k", overrides={"horizon_s": 3600.0, "replications": 1})
    plan = optimize(studio, profiles)

    assert plan.feasible
    assert plan.chosen["final"].degree > 1
    assert plan.replicas_opt["nvlink"] >= 1
    assert any("final: on pcie" in sentence for sentence in plan.explanation)


def test_minimising_latency_spends_more_to_be_faster(
    quickstart: Scenario, profiles: Profiles, plan: CapacityPlan
) -> None:
    """With the other objective the plan is at least as fast on an idle fleet and at least as dear."""
    fast = optimize(short(quickstart, search__minimise="latency_p95_s"), profiles)

    assert fast.chosen["picture"].latency_s <= plan.chosen["picture"].latency_s
    assert (fast.usd_per_hour or 0) >= (plan.usd_per_hour or 0)


def test_the_formula_agrees_with_the_simulation_where_it_should(quickstart: Scenario, profiles: Profiles) -> None:
    """One plan, Poisson arrivals, moderate load: p95 by formula within a tenth of the simulated one."""
    scenario = quickstart.with_overrides({"horizon_s": 900.0, "replications": 2})
    sizer = Sizer(scenario, profiles)
    option = next(o for o in find_candidates(scenario, profiles).by_class["picture"] if o.cloud_steps == 10)
    sizing = sizer.with_replicas(sizer.size({"picture": option}), {"a100": 3})
    result = simulate(
        scenario, profiles, policy="planned", plan=Deployment.pure(sizing.replicas, {"picture": option.plan})
    )
    simulated = float(result.summary.xs("all", level="request_class").iloc[0]["latency_p95_s"])

    assert sizer.quantile(sizing, 0.95) == pytest.approx(simulated, rel=0.1)


def test_the_answer_does_not_depend_on_who_runs_the_simulations(quickstart: Scenario, profiles: Profiles) -> None:
    """Baselines in other processes and baselines one after the other give the same plan to the bit."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        apart = optimize(short(quickstart), profiles, map=pool.map)
    together = optimize(short(quickstart), profiles)

    assert apart.explanation == together.explanation
    assert repr(apart.evidence) == repr(together.evidence)  # NaN is not equal to itself, but prints the same
    for name, result in together.baseline_results.items():
        assert result.replications[0].rows().tobytes() == apart.baseline_results[name].replications[0].rows().tobytes()
