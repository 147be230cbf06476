"""Laws of the plan under other conditions: each change alone, the plan itself unchanged, and no surprise in sign."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Scenario, load_scenario
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning import Variation
from hybridsd_sim.planning.evaluation import EvaluationJob, evaluate
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.planning.robustness import busy_sites, follow_networks, sensitivity, traffic
from hybridsd_sim.workload import mean_rate_per_s
from planners import SMALL, planner_of


def deployed(mine: Planner, nodes: int, label: str) -> Deployment:
    """The plan whose label holds a text, for every picture."""
    option = next(o for o in mine.found.by_class["picture"] if label in o.plan.label)
    return Deployment.pure({"a100": nodes}, {"picture": option.plan})


@pytest.fixture(scope="module")
def mine(profiles: Profiles) -> Planner:
    """Phones and one pool, for four minutes."""
    return planner_of(load_scenario("quickstart", overrides=SMALL), profiles)


@pytest.fixture(scope="module")
def plan(mine: Planner) -> Deployment:
    """A hand-over after ten steps, on three nodes."""
    return deployed(mine, 3, "[0,10)")


@pytest.fixture(scope="module")
def found(mine: Planner, plan: Deployment) -> dict[str, Variation]:
    """The plan under every condition, by name."""
    return {one.name: one for one in sensitivity(mine, plan)}


def test_each_change_comes_once_and_by_name(mine: Planner, found: dict[str, Variation]) -> None:
    """The plan as it is, four traffics, two speeds of each site in use, and every network but everybody's own."""
    traffics = ["traffic -20%", "traffic -10%", "traffic +10%", "traffic +20%"]
    speeds = [f"{site} {more}% slower" for site in ("phones", "a100") for more in (10, 20)]
    networks = [f"everybody on {name}" for name in mine.profiles.networks if name != "wifi5"]

    assert sorted(found) == sorted(["as planned", *traffics, *speeds, *networks])


def test_all_changes_are_tried_in_one_call(mine: Planner, found: dict[str, Variation]) -> None:
    """So that they fan out over whatever workers there are; the recursion does where it applies."""
    (jobs,) = mine.evaluate.calls

    assert len(jobs) == len(found)
    assert {job.level for job in jobs} == {"screen"}


def test_only_the_network_of_the_plan_follows_the_change(
    mine: Planner, plan: Deployment, found: dict[str, Variation]
) -> None:
    """Nodes, stages and shares stay; transfers go over the network that the phones are now on."""
    for name, one in found.items():
        network = name.removeprefix("everybody on ") if name.startswith("everybody") else "wifi5"
        (share,) = one.result.deployment.plans["picture"]
        assert share.plan.network == network
        assert share.plan.stages == plan.plans["picture"][0].plan.stages
        assert one.result.deployment.replicas == {"a100": 3}


def test_a_slower_site_is_never_better(mine: Planner, plan: Deployment, found: dict[str, Variation]) -> None:
    """On the same requests, twice as much slower is at least as late, and both later than the plan as it is."""
    as_it_is = (
        evaluate(EvaluationJob(mine.scenario, mine.profiles, plan, "screen")).classes["all"]["latency_p95_s"].value
    )

    for site in ("phones", "a100"):
        later = [found[f"{site} {more}% slower"].result.latency_p95_s[0] for more in (10, 20)]
        assert as_it_is < later[0] < later[1]


def test_a_variation_is_the_evaluation_of_its_job(mine: Planner, plan: Deployment, found: dict[str, Variation]) -> None:
    """What is shown for a slower pool is what the same plan gives when that pool is slower."""
    direct = evaluate(EvaluationJob(mine.scenario, mine.profiles, plan, "screen", {"a100": 1.2}))

    p95 = direct.classes["all"]["latency_p95_s"]
    assert found["a100 20% slower"].result.latency_p95_s == (p95.value, p95.low, p95.high)
    assert found["a100 20% slower"].result.feasible == direct.feasible


def test_a_site_without_work_is_left_out(profiles: Profiles) -> None:
    """Phones that draw alone do not care how fast the cloud is, nor the cloud how fast the phones are."""
    mine = planner_of(load_scenario("quickstart", overrides={**SMALL, "horizon_s": 60}), profiles)
    alone = deployed(mine, 0, "sd14 on phones")

    assert busy_sites(mine.priced(alone)) == ["phones"]
    assert not any("a100" in one.name for one in sensitivity(mine, alone))


@given(st.floats(0.1, 10.0), st.sampled_from(["poisson", "gamma", "constant", "daily", "gentd26"]))
def test_traffic_scales_the_rate_of_every_process(quickstart: Scenario, factor: float, process: str) -> None:
    """Whether its rate is written or comes from a trace: `factor` times as many requests a second."""
    pace = {"rate_per_s": None, "time_scale": 0.02} if process == "gentd26" else {"rate_per_s": 3.0}
    before = quickstart.with_overrides({"requests.picture.arrivals": {"process": process, **pace}})
    after = before.with_overrides(traffic(before, factor))

    rates = [mean_rate_per_s(one.requests["picture"].arrivals) for one in (before, after)]
    assert rates[1] == pytest.approx(factor * rates[0])


def test_a_plan_without_a_network_gets_none(mine: Planner, plan: Deployment) -> None:
    """A measurement inside one machine room stays there."""
    from dataclasses import replace

    bare = replace(plan.plans["picture"][0].plan, network=None)
    there = mine.scenario.with_overrides({"edge.phones.network": "lte"})

    assert follow_networks(Deployment.pure({}, {"picture": bare}), there).plans["picture"][0].plan == bare
