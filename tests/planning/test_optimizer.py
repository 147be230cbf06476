"""What a capacity plan promises: it holds, it is cheapest among its kinds, and it says why."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import CapacityPlan, Profiles, Scenario, optimize, simulate
from hybridsd_sim.plan import Deployment, deployment_from_dict
from hybridsd_sim.planning import Store
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.evaluation import dominates
from hybridsd_sim.pricing import find_candidates, rental_usd_per_hour
from hybridsd_sim.scenario import dump_yaml, load_scenario, load_yaml


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
        if option.pool_index < 0 or not option.keeps_limits:
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
        ({"requests__picture__slo_s": 0.5}, "SLO of picture: 0.709 s instead of 0.5 s would do"),
        ({"requests__picture__quality_floor": 0.31}, "Quality floor of picture: 0.2993 CLIP instead of 0.31"),
        ({"pools__a100__replicas_max": 1}, "Nodes of pool a100: 3 nodes instead of 1 nodes would do"),
        ({"budget__usd_per_hour": 4.0}, "Budget: 10.31 USD/h instead of 4 USD/h would do"),
    ],
)
def test_an_infeasible_scenario_says_what_binds_and_what_would_lift_it(
    quickstart: Scenario, profiles: Profiles, changes: dict[str, Any], words: str
) -> None:
    """A plan is still returned, marked infeasible, with what conflicts and the change that would help."""
    plan = optimize(short(quickstart, **changes), profiles)

    assert not plan.feasible
    assert plan.conflict
    assert not plan.frontier
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
    sizing = sizer.assess({"picture": ((1.0, option),)}, {"a100": 3})
    deployment = Deployment.pure({"a100": 3}, {"picture": option.plan})
    result = simulate(scenario, profiles, policy="planned", plan=deployment)
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


def test_the_store_changes_nothing_but_the_time(quickstart: Scenario, profiles: Profiles, tmp_path: Path) -> None:
    """With a cold store, with a warm one and without any the plan is the same to the bit."""
    store = Store(tmp_path)
    plans = [optimize(short(quickstart), profiles, store=given) for given in (None, store, store)]

    assert len({repr(plan.evidence) for plan in plans}) == 1
    assert len({plan.explanation for plan in plans}) == 1
    assert len({plan.chosen_result.replications[0].rows().tobytes() for plan in plans}) == 1


def test_what_is_around_the_plan_belongs_to_it(plan: CapacityPlan) -> None:
    """Frontier, savings, margins, sensitivity and confidence speak of the plan that was chosen."""
    assert {saving.other for saving in plan.savings} == {"cloud only", "edge only", "static switch 40%"}
    assert any(point.usd_per_hour == pytest.approx(plan.usd_per_hour) for point in plan.frontier)
    assert all(variation.result.deployment.replicas == plan.replicas_opt for variation in plan.sensitivity)
    assert plan.confidence is not None
    assert 0.0 <= plan.confidence.probability <= 1.0
    assert plan.bound_usd_per_hour is not None
    assert plan.margins
    assert not plan.conflict


def test_a_plan_at_a_confidence_holds_that_surely(quickstart: Scenario, profiles: Profiles, plan: CapacityPlan) -> None:
    """Asked for 95%, the plan is surer than the one at the medians, and costs no less."""
    sure = optimize(short(quickstart, budget__confidence=0.95), profiles)

    assert sure.feasible
    assert sure.confidence is not None
    assert sure.confidence.probability >= 0.95
    assert (sure.usd_per_hour or 0) >= (plan.usd_per_hour or 0)


def test_a_robust_plan_holds_in_every_scenario(profiles: Profiles, plan: CapacityPlan) -> None:
    """One plan for the base, the busy hour and the slow network: it holds in each, on the nodes of the busy hour."""
    base = {"horizon_s": 150.0, "warmup_s": 20.0, "replications": 2}
    others = {name: load_scenario("quickstart", scenario=name, overrides=base) for name in ("busy", "slow-network")}
    robust = optimize(load_scenario("quickstart", overrides=base), profiles, robust=others)

    assert robust.feasible
    assert [variation.name for variation in robust.robust] == ["busy", "slow-network"]
    assert all(variation.result.feasible for variation in robust.robust)
    assert robust.replicas_opt["a100"] > plan.replicas_opt["a100"]


def test_spot_and_on_demand_nodes_share_the_requests(profiles: Profiles) -> None:
    """Where spot nodes are cheap but few the rest is served on demand, and preemption is played when it is tried."""
    own = {"gpu": "a100-sxm-80gb", "runtime": "compiled", "usd_per_gpu_hour": 1.2, "purchase": "spot"}
    spot = {**own, "replicas_max": 2, "preemptions_per_node_hour": 0.2}
    scenario = load_scenario("quickstart", overrides={"pools.spot": spot, "replications": 2, "horizon_s": 300})
    plan = optimize(scenario, profiles)

    assert plan.feasible
    assert plan.replicas_opt["spot"] >= 1
    assert (plan.usd_per_hour or 0) < 10.29


def test_batches_serve_more_on_the_same_nodes(quickstart: Scenario, profiles: Profiles) -> None:
    """Allowed to denoise several pictures together, the plan needs no more nodes, and each class keeps its promise."""
    alone = optimize(short(quickstart, requests__picture__edge_energy_j=4.0), profiles)
    together = optimize(short(quickstart, requests__picture__edge_energy_j=4.0, search__batch_caps=[1, 4]), profiles)

    assert together.feasible
    assert (together.usd_per_hour or 0) <= (alone.usd_per_hour or 0)


@settings(max_examples=6, deadline=None)
@given(
    rent=st.floats(3.0, 30.0),
    each=st.floats(0.0002, 0.002),
    rate=st.floats(1.0, 16.0),
    minimise=st.sampled_from(["usd_per_hour", "latency_p95_s", "quality_loss", "turned_away_per_s"]),
)
def test_no_plan_that_is_called_feasible_exceeds_a_budget(
    quickstart: Scenario, profiles: Profiles, rent: float, each: float, rate: float, minimise: str
) -> None:
    """Whatever is minimised: the rent an hour and the rent an image stay within what may be spent."""
    limits = {"budget__usd_per_hour": rent, "budget__usd_per_image": each, "search__minimise": minimise}
    plan = optimize(short(quickstart, requests__picture__arrivals__rate_per_s=rate, **limits), profiles)

    if plan.feasible:
        everyone = plan.chosen_result.summary.xs("all", level="request_class").iloc[0]
        assert (plan.usd_per_hour or 0.0) <= rent * (1 + 1e-9)
        assert float(everyone["rent_usd_per_image"]) <= each * (1 + 1e-9)
