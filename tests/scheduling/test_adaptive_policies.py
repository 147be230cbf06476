"""Policies that answer to queues, deadlines and money: their rules as laws, and what each is for by simulation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import InputError, Profiles, Scenario, SimResult, simulate
from hybridsd_sim.cli import main
from hybridsd_sim.pricing import Candidate, find_candidates
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.scheduling import AnyPool, FleetView, PoolView
from hybridsd_sim.scheduling.policies import Budgeted, EdfReject, SwitchByQueue, make_policy

BUSY: dict[str, Any] = {
    "horizon_s": 300.0, "warmup_s": 30.0, "replications": 1, "pools.a100.replicas_max": 2,
    "requests.picture.arrivals.rate_per_s": 12.0,
}  # fmt: skip
"""Half as many requests again as two GPUs can begin within the quickstart's quality floor."""
waits = st.floats(0, 40)


@pytest.fixture(scope="module")
def options(profiles: Profiles) -> tuple[Candidate, ...]:
    """The candidates of a new phone in the photo app: two pools, and an edge that can do everything in 4 s."""
    return find_candidates(load_scenario("photo-app"), profiles).by_class["elite"]


@pytest.fixture(scope="module")
def saturated(quickstart: Scenario) -> Scenario:
    """The busy quickstart whose phones may spend more energy, so that they could do everything themselves."""
    return quickstart.with_overrides({**BUSY, "requests.picture.edge_energy_j": None})


def view(*waits_s: float) -> FleetView:
    """Pools of ten GPUs with so many seconds of work waiting."""
    pools = []
    for wait_s in waits_s:
        pool = PoolView(10, 0 if wait_s else 1)
        pool.queued, pool.backlog_gpu_s = int(wait_s > 0), 10 * wait_s
        pools.append(pool)
    return FleetView(pools)


def wait_of(option: Candidate, fleet: FleetView) -> float:
    """Predicted seconds until the option starts."""
    return fleet.pools[option.pool_index].wait_s(option.degree, 0.0) if option.pool_index >= 0 else 0.0


def figure(result: SimResult, name: str, request_class: str = "all") -> float:
    """A figure of a simulation's summary."""
    return float(result.summary.xs(request_class, level="request_class")[name].iloc[0])


# ---- edf_reject -----------------------------------------------------------------------------------------------------


@given(waits, waits, st.floats(0.3, 30))
def test_edf_takes_the_cheapest_offer_in_time_or_rejects(
    options: tuple[Candidate, ...], first_s: float, second_s: float, slo_s: float
) -> None:
    """A pool offers its cheapest plan above the floor that is in time when idle; only those the queue leaves count."""
    fleet = view(first_s, second_s)
    decision = make_policy("edf_reject").decide(options, slo_s, fleet, 0.0)
    offers: dict[int, Candidate] = {}
    for option in options:
        if option.keeps_limits and option.latency_s <= slo_s:
            offers.setdefault(option.pool_index, option)
    in_time = [offer for offer in offers.values() if wait_of(offer, fleet) + offer.latency_s <= slo_s]

    if in_time:
        assert decision.candidate is min(in_time, key=options.index)
        assert decision.predicted_wait_s == wait_of(decision.candidate, fleet)
    else:
        assert (decision.action, decision.candidate, decision.reason) == ("reject", None, "certain_late")


def test_rejecting_what_would_be_late_keeps_the_goodput_of_the_pool(quickstart: Scenario, profiles: Profiles) -> None:
    """In overload almost as many are in time as the GPUs can serve; without rejection next to none is."""
    scenario = quickstart.with_overrides(BUSY)
    edf, cost_aware = (simulate(scenario, profiles, policy=name) for name in ("edf_reject", "cost_aware"))
    cheapest = next(o for o in find_candidates(scenario, profiles).by_class["picture"] if o.keeps_limits)
    most_per_s = 2 / cheapest.cloud_s

    assert set(edf.requests.loc[edf.requests["status"] == "unserved", "reason"]) == {"certain_late"}
    assert 0.85 * most_per_s < figure(edf, "goodput_per_s") <= most_per_s
    assert figure(cost_aware, "goodput_per_s") < 0.1 * figure(edf, "goodput_per_s")


def with_urgent(quickstart: Scenario, urgent_per_s: float, arrivals: dict[str, Any], discipline: str) -> Scenario:
    """The busy quickstart with other arrivals, and beside them requests that are promised a third of the time."""
    urgent = quickstart.to_dict()["requests"]["picture"] | {"slo_s": 2.8}
    urgent["arrivals"] = {"process": "poisson", "rate_per_s": urgent_per_s}
    changes = {"requests.urgent": urgent, "requests.picture.arrivals": arrivals, "pools.a100.discipline": discipline}
    return quickstart.with_overrides({**BUSY, **changes})


BURSTS: dict[str, Any] = {"process": "gamma", "cv": 3.0, "rate_per_s": 4.5}


def test_queues_go_by_deadline_whatever_the_scenario_says(quickstart: Scenario, profiles: Profiles) -> None:
    """Under fifo and under edf the run is the same to the bit."""
    runs = [
        simulate(with_urgent(quickstart, 1.0, BURSTS, discipline), profiles, policy="edf_reject")
        for discipline in ("fifo", "edf")
    ]
    rows = [result.replications[0].rows().tobytes() for result in runs]

    assert rows[0] == rows[1]


def test_urgent_requests_pass_a_burst_that_can_wait(quickstart: Scenario, profiles: Profiles) -> None:
    """By deadline both classes keep their promise through bursts; in order of arrival the urgent ones lose it."""

    class InOrderOfArrival(EdfReject):
        discipline = None

    scenario = with_urgent(quickstart, 1.0, BURSTS, "fifo")
    edf, fifo = (simulate(scenario, profiles, policy=policy) for policy in (EdfReject(), InOrderOfArrival()))

    assert figure(edf, "slo_attainment", "urgent") > 0.95
    assert figure(edf, "slo_attainment", "picture") > 0.99
    assert figure(fifo, "slo_attainment", "urgent") < 0.75


def test_urgent_requests_make_nobody_late(quickstart: Scenario, profiles: Profiles) -> None:
    """In overload as many are in time as without urgent requests among them: nobody waits who is late all the same."""
    poisson = {"process": "poisson", "rate_per_s": 10.0}
    mixed = simulate(with_urgent(quickstart, 2.0, poisson, "edf"), profiles, policy="edf_reject")
    alone = simulate(quickstart.with_overrides(BUSY), profiles, policy="edf_reject")

    assert figure(mixed, "goodput_per_s") > 0.95 * figure(alone, "goodput_per_s")


def test_a_pool_that_knows_only_its_wait_is_enough(options: tuple[Candidate, ...]) -> None:
    """Views of other systems need not know what is due when: `wait_s` stands in."""

    class Elsewhere(AnyPool):
        queued, declared_work = 3, 0.0

        def wait_s(self, degree: int, now: float) -> float:
            return 0.5 * degree

    fleet = FleetView([Elsewhere(), Elsewhere()])
    for policy in (make_policy("edf_reject"), make_policy("switch_by_queue"), Budgeted(100.0)):
        decision = policy.decide(options, 3.0, fleet, 0.0)
        assert decision.candidate is not None
        assert decision.predicted_wait_s == 0.5 * decision.candidate.degree


# ---- switch_by_queue ------------------------------------------------------------------------------------------------


@given(waits, waits, st.floats(0.3, 30), st.floats(0.5, 8))
def test_the_switch_step_follows_the_formula(
    options: tuple[Candidate, ...], first_s: float, second_s: float, slo_s: float, gain: float
) -> None:
    """The most steps within K (1 - gain w / S) and in time; else the fewest; degraded where it is less than K.

    If nothing would be in time on idle pools, the soonest.
    """
    fleet = view(first_s, second_s)
    decision = SwitchByQueue(gain).decide(options, slo_s, fleet, 0.0)
    chosen, keeping = decision.candidate, [option for option in options if option.keeps_limits]
    possible = [option for option in keeping if option.latency_s <= slo_s]
    if not possible:
        assert chosen is min(keeping, key=lambda option: wait_of(option, fleet) + option.latency_s)
        return
    most = max(option.cloud_steps for option in possible)
    allowed = [
        option.cloud_steps
        for option in possible
        if option.cloud_steps <= most * (1 - gain * wait_of(option, fleet) / slo_s)
        and wait_of(option, fleet) + option.latency_s <= slo_s
    ]
    late = wait_of(chosen, fleet) + chosen.latency_s > slo_s

    assert chosen.cloud_steps == (max(allowed) if allowed else min(option.cloud_steps for option in possible))
    assert (decision.action == "degrade") == (chosen.cloud_steps < most)
    assert decision.reason == ("late" if late else "switch_by_queue")


@given(waits, waits, waits, waits, st.floats(0.5, 30))
def test_a_longer_queue_never_brings_more_steps_to_the_cloud(
    options: tuple[Candidate, ...], first_s: float, second_s: float, more_s: float, most_s: float, slo_s: float
) -> None:
    """With more work waiting anywhere, the steps in the cloud stay or fall."""
    fleets = view(first_s, second_s), view(first_s + more_s, second_s + most_s)
    chosen = [make_policy("switch_by_queue").decide(options, slo_s, fleet, 0.0).candidate for fleet in fleets]
    possible = any(option.keeps_limits and option.latency_s <= slo_s for option in options)

    assert not possible or chosen[0].cloud_steps >= chosen[1].cloud_steps


def test_an_empty_queue_gets_the_best_picture(options: tuple[Candidate, ...]) -> None:
    """Every step in the cloud at full quality, on the cheapest pool; also where all GPUs are busy and nobody waits."""
    fleet = view(0.0, 0.0)
    for pool in fleet.pools:
        pool.largest_free, pool.busy_gpus, pool.busy_until_gpu_s = 0, 10, 10 * 0.3
    for each in (view(0.0, 0.0), fleet):
        decision = make_policy("switch_by_queue").decide(options, 8.0, each, 0.0)
        best = max(option.quality for option in options)
        full = [option for option in options if option.edge_steps == 0 and option.quality == best]
        assert (decision.action, decision.candidate) == ("run", full[0])


def test_the_floor_holds_unless_nothing_is_above_it(options: tuple[Candidate, ...]) -> None:
    """However long the queues, no picture is worse than promised; a class without such a plan is served yet."""
    low = [option for option in options if not option.keeps_limits and option.pool_index >= 0]
    high = [option for option in options if option.keeps_limits and option.pool_index >= 0]
    policy = make_policy("switch_by_queue")

    assert policy.decide([*low, *high], 3.0, view(100.0, 100.0), 0.0).candidate in high
    assert policy.decide(low, 3.0, view(0.0, 0.0), 0.0).candidate in low


def test_a_saturated_cloud_keeps_its_promise_by_leaving_steps_to_the_edge(
    saturated: Scenario, profiles: Profiles
) -> None:
    """More work than the cloud can do at a fixed step: following the queue, the promise is kept, and it stays so."""
    by_queue, static = (simulate(saturated, profiles, policy=name) for name in ("switch_by_queue", "static_switch"))
    calm = saturated.with_overrides({"requests.picture.arrivals.rate_per_s": 1.0})
    idle = simulate(calm, profiles, policy="switch_by_queue")
    frame = by_queue.requests[by_queue.requests["status"] == "served"]
    half = frame["arrival_s"] < 165.0
    p95 = [(part["finish_s"] - part["arrival_s"]).quantile(0.95) for part in (frame[half], frame[~half])]

    assert figure(static, "slo_attainment") < 0.05
    assert figure(by_queue, "slo_attainment") > 0.99
    assert figure(by_queue, "quality_mean") > figure(static, "quality_mean")
    assert p95[1] == pytest.approx(p95[0], rel=0.1)
    assert figure(by_queue, "gpu_seconds_per_image") < 0.4 * figure(idle, "gpu_seconds_per_image")


# ---- budgeted -------------------------------------------------------------------------------------------------------

moments = st.tuples(st.floats(-20, 60), st.lists(st.floats(0, 0.05), min_size=1, max_size=4), st.floats(0, 10))


def priced(options: Sequence[Candidate], prices: Sequence[float]) -> list[Candidate]:
    """Options above the floor with these prices, the cheapest first."""
    keeping = [option for option in options if option.keeps_limits and option.pool_index >= 0]
    return [replace(option, usd_or_inf=usd) for option, usd in zip(keeping, sorted(prices), strict=False)]


@given(st.lists(moments, max_size=30), st.floats(0.01, 20), st.floats(0.001, 0.2), st.floats(0, 1))
def test_no_window_sees_more_spent_than_the_budget_and_the_cap(
    options: tuple[Candidate, ...],
    drawn: list[tuple[float, list[float], float]],
    usd_per_hour: float,
    cap_usd: float,
    usd_per_clip: float,
) -> None:
    """Whatever the arrivals, prices, queues and the clock do; and nobody is rejected whom the budget could serve."""
    policy = Budgeted(usd_per_hour, cap_usd, usd_per_clip)
    now, clock, accepted = 0.0, -float("inf"), []
    for gap_s, prices, wait_s in drawn:
        now += gap_s
        choice = priced(options, prices)
        decision = policy.decide(choice, now + 3.0, view(wait_s, 0.0), now)
        clock = max(clock, now)
        if decision.candidate is None:
            assert decision.reason == "over_budget"
            assert policy.ahead_usd + choice[0].usd_or_inf > cap_usd
        accepted.append((clock, 0.0 if decision.candidate is None else decision.candidate.usd_or_inf))
        assert policy.ahead_usd <= cap_usd
    for first in range(len(accepted)):
        spent = accumulate(usd for _, usd in accepted[first:])
        for (until_s, _), usd in zip(accepted[first:], spent, strict=True):
            assert usd <= usd_per_hour / 3600 * (until_s - accepted[first][0]) + cap_usd + 1e-9


def test_the_further_ahead_the_spending_the_cheaper_the_plan(options: tuple[Candidate, ...]) -> None:
    """Idle pools at one moment: the best picture first, then cheaper ones, at last the free edge for everybody."""
    policy, idle = Budgeted(1.0, cap_usd=0.01), view(0.0, 0.0)
    decisions = [policy.decide(options, 8.0, idle, 0.0) for _ in range(200)]
    prices = [decision.candidate.usd_or_inf for decision in decisions if decision.candidate]
    qualities = [decision.candidate.quality for decision in decisions if decision.candidate]
    best = max(option.quality for option in options)

    assert qualities[0] == best
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] == 0.0
    assert [decision.action == "degrade" for decision in decisions] == [quality < best for quality in qualities]
    assert sum(prices) <= 0.01


def test_what_costs_nobody_knows_is_never_bought(options: tuple[Candidate, ...]) -> None:
    """An unknown price fits no budget: without another plan the request is rejected for that reason."""
    unknown = [replace(option, usd_or_inf=float("inf")) for option in options if option.keeps_limits]
    decision = Budgeted(1e9).decide(unknown, 8.0, view(0.0, 0.0), 0.0)

    assert (decision.action, decision.reason) == ("reject", "over_budget")


def test_no_money_goes_into_being_less_late(options: tuple[Candidate, ...]) -> None:
    """Where nothing is in time the cheapest plan above the floor is taken, and said to be late."""
    cloud = [option for option in options if option.pool_index >= 0]
    decision = Budgeted(100.0).decide(cloud, 3.0, view(60.0, 50.0), 0.0)

    assert (decision.reason, decision.candidate) == ("late", next(option for option in cloud if option.keeps_limits))


def test_without_a_budget_there_is_nothing_to_follow(quickstart: Scenario, profiles: Profiles) -> None:
    """A scenario that sets no dollars an hour is told which key to set."""
    with pytest.raises(InputError, match=r"budget\.usd_per_hour: null; is what the policy budgeted spends"):
        simulate(quickstart, profiles, policy="budgeted")


def metered(result: SimResult) -> tuple[np.ndarray, np.ndarray]:
    """When each served request arrived, and its metered dollars."""
    frame = result.requests[result.requests["status"] == "served"]
    return frame["arrival_s"].to_numpy(float), frame["usd"].to_numpy(float)


def overspent(result: SimResult, usd_per_hour: float) -> float:
    """The most dollars by which the requests of any window cost more than its budget."""
    arrival_s, usd = metered(result)
    above = np.cumsum(usd) - usd_per_hour / 3600 * arrival_s
    before = np.concatenate([[0.0], np.cumsum(usd)[:-1]]) - usd_per_hour / 3600 * arrival_s
    return float((above - np.minimum.accumulate(before)).max())


def test_a_running_budget_holds_where_the_cheapest_plan_overspends(quickstart: Scenario, profiles: Profiles) -> None:
    """At twice the traffic that 3 dollars an hour can serve: within budget and cap in every window, to the brim."""
    scenario = quickstart.with_overrides(
        {**BUSY, "pools.a100.replicas_max": 16, "requests.picture.arrivals.rate_per_s": 6.0, "budget.usd_per_hour": 3.0}
    )
    held, cheapest = (simulate(scenario, profiles, policy=name) for name in ("budgeted", "cost_aware"))
    cap_usd, spent_usd = 3.0 / 60, metered(held)[1].sum()

    assert overspent(held, 3.0) <= cap_usd + 1e-9
    assert overspent(cheapest, 3.0) > 3 * cap_usd
    assert spent_usd > 0.95 * 3.0 / 12
    assert set(held.requests.loc[held.requests["status"] == "unserved", "reason"]) == {"over_budget"}


def test_what_the_budget_leaves_over_buys_better_pictures(quickstart: Scenario, profiles: Profiles) -> None:
    """With room for more than the cheapest plan and less than the best: everybody is served, better, and within it."""
    scenario = quickstart.with_overrides(
        {**BUSY, "pools.a100.replicas_max": 16, "requests.picture.arrivals.rate_per_s": 3.0, "budget.usd_per_hour": 4.5}
    )
    held, cheapest, best = (
        simulate(scenario, profiles, policy=name) for name in ("budgeted", "cost_aware", "cloud_only")
    )

    assert figure(held, "slo_attainment") == figure(cheapest, "slo_attainment") == 1.0
    assert figure(held, "quality_mean") > figure(cheapest, "quality_mean") + 0.003
    assert overspent(held, 4.5) <= 4.5 / 60 + 1e-9 < overspent(best, 4.5)


# ---- From the command line to the report ----------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run the command line in this process; the code it exits with."""

    def run(*arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", ["hybridsd-sim", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0

    return run


def test_rejections_stand_in_the_report_with_their_reasons(command: Callable[..., object], tmp_path: Path) -> None:
    """`simulate` takes the policies by name, from a flag or the scenario, and the report says who went unserved why."""
    busy = [word for key, value in {**BUSY, "horizon_s": 60.0, "warmup_s": 10.0}.items()
            for word in ("--set", f"{key}={value}")]  # fmt: skip
    more = ("--set", "budget.usd_per_hour=2", "--set", "search.policies=[edf_reject, switch_by_queue, budgeted]")
    assert command("simulate", "quickstart", *busy, *more, "--out", tmp_path / "run") == 0
    text = (tmp_path / "run" / "report.md").read_text()

    assert "picture requests unserved: certain_late" in text
    assert "picture requests unserved: over_budget" in text


def test_a_budget_that_is_missing_is_wrong_input(
    command: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`budgeted` without `budget.usd_per_hour` ends with exit code 2 and names the key."""
    assert command("simulate", "quickstart", "--policy", "budgeted", "--out", tmp_path / "run") == 2
    assert "budget.usd_per_hour" in capsys.readouterr().err
