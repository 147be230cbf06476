"""The embedded scheduler: the simulator's own choices, whatever is asked and told, and bounded for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from builders import PICTURE, at_switch_step, left_s
from hand_made import hand_made_plan, hand_made_scenario
from hybridsd_sim import InputError, Profiles, Scenario, Scheduler, simulate
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.pricing import Candidate, find_candidates, request_of
from hybridsd_sim.profiles import Quantiles
from hybridsd_sim.scheduling import (
    POLICIES,
    CloudDone,
    DeadlinePoolView,
    Decision,
    Due,
    FleetView,
    Policy,
    RequestDone,
    StepDone,
    Worker,
)
from hybridsd_sim.scheduling.policies import Planned
from hybridsd_sim.simulation import column

QUICKSTART = Path(__file__).parents[2] / "reports" / "examples" / "quickstart"


def test_a_request_goes_by_its_own_priority(
    quickstart: Scenario, profiles: Profiles, options: tuple[Candidate, ...]
) -> None:
    """In a queue that the caller keeps by priority and deadline, it waits for nobody who is less urgent."""
    one_gpu = at_switch_step(options, 10, nodes=1)
    scheduler = Scheduler.from_plan(one_gpu, policy="edf_reject", scenario=quickstart, profiles=profiles)
    pool = DeadlinePoolView(1, 0)
    pool.busy_gpus, pool.busy_until_gpu_s, pool.queued, pool.backlog_gpu_s = 1, 0.5, 1, 100.0
    pool.enter(Due((0, 1.0, 1.0), 100.0, 1.0))
    plain, urgent = (
        scheduler.decide(replace(PICTURE, priority=priority, slo_s=9.0), FleetView([pool]), 0.0) for priority in (0, 3)
    )

    assert plain.action == "reject" or plain.pool is None
    assert (urgent.action, urgent.pool, urgent.predicted_wait_s) == ("queue", "a100", 0.5)
    assert urgent.predicted_finish_s is not None
    assert urgent.predicted_finish_s <= urgent.deadline_s


# ---- From a plan ----------------------------------------------------------------------------------------------------


def test_a_folder_and_its_file_give_the_same_scheduler(scheduler: Scheduler) -> None:
    """A run's folder, the plan.yaml in it, and the same deployment decide alike, on a worker for each node."""
    forms = (Scheduler.from_plan(QUICKSTART), Scheduler.from_plan(str(QUICKSTART / "plan.yaml")), scheduler)
    decisions = [form.decide(PICTURE, None, 5.0) for form in forms]

    assert len({(d.action, d.reason, d.pool, d.worker, d.plan, d.predicted_finish_s) for d in decisions}) == 1
    assert (decisions[0].action, decisions[0].reason, decisions[0].worker) == ("run", "planned", "a100/0")
    for form in forms:
        assert [state.name for state in form.workers(5.0)] == ["a100/0", "a100/1", "a100/2"]
        assert (form.version, form.policy_name, form.open_decisions) == (1, "planned", 1)


def test_a_capacity_plan_knows_its_scenario(tmp_path: Path, profiles: Profiles) -> None:
    """What `optimize` returned decides as its deployment does under its scenario, class by class."""
    plan = hand_made_plan(hand_made_scenario(tmp_path))
    whole, bare = Scheduler.from_plan(plan), Scheduler.from_plan(plan.deployment, scenario=plan.scenario)

    for request in whole.requests.values():
        ours, theirs = (scheduler.decide(request, None, 1.0) for scheduler in (whole, bare))
        assert ours.to_dict() == theirs.to_dict()
        assert ours.plan == plan.chosen[request.request_class].plan


def test_a_folder_without_its_scenario_is_refused(tmp_path: Path, quickstart: Scenario) -> None:
    """Without provenance.json beside it a plan.yaml says nothing of classes and pools; with `scenario` it does."""
    copy = tmp_path / "plan.yaml"
    copy.write_text((QUICKSTART / "plan.yaml").read_text())
    with pytest.raises(InputError) as failed:
        Scheduler.from_plan(tmp_path)

    (problem,) = failed.value.problems
    assert "provenance.json" in problem.place
    assert all((problem.value, problem.rule, problem.remedy))
    assert Scheduler.from_plan(tmp_path, scenario=quickstart).version == 1


@pytest.mark.parametrize("written", ["", "{}", "[]", '{"scenario": {"name": "x"}}', "\x00"])
def test_a_provenance_that_is_none_is_refused(tmp_path: Path, written: str) -> None:
    """A file that no run wrote is an error with a place and a remedy."""
    (tmp_path / "plan.yaml").write_text((QUICKSTART / "plan.yaml").read_text())
    (tmp_path / "provenance.json").write_text(written)
    with pytest.raises(InputError, match=r"provenance\.json.*must be what `plan` wrote"):
        Scheduler.from_plan(tmp_path)


def test_a_plan_for_other_hardware_is_refused(options: tuple[Candidate, ...], quickstart: Scenario) -> None:
    """What the scenario does not have, and a deployment without any, are named with what to do."""
    plan = at_switch_step(options, 10)
    other = quickstart.with_overrides({"pools.a100.gpu": "l40s", "requests.picture.num_inference_steps": 30})
    with pytest.raises(InputError) as failed:
        Scheduler.from_plan(plan, scenario=other)
    with pytest.raises(InputError, match="Pass scenario="):
        Scheduler.from_plan(plan)

    assert {problem.value for problem in failed.value.problems} == {"a100-sxm-80gb in a100", "25 steps"}
    assert all(problem.place and problem.rule and problem.remedy for problem in failed.value.problems)


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([Worker("a", "h100")], "h100"),
        ([Worker("a", "a100", 0)], "at least one"),
        ([Worker("a", "a100"), Worker("a", "a100")], "name of its own"),
    ],
)
def test_workers_that_cannot_be_are_refused(workers: list[Worker], said: str) -> None:
    """Another pool than the scenario's, no GPU, or the name of another worker."""
    with pytest.raises(InputError, match=said):
        Scheduler.from_plan(QUICKSTART, workers=workers)


# ---- The same choices as the simulation -----------------------------------------------------------------------------


class Embedded(Policy):
    """Lets an embedded scheduler decide for a simulation, from the simulation's own view of the pools."""

    name = "embedded"

    def __init__(self, scheduler: Scheduler, scenario: Scenario, discipline: str | None) -> None:
        self.discipline = discipline  # type: ignore[misc]
        self._scheduler = scheduler
        self._requests = {name: request_of(name, spec) for name, spec in scenario.requests.items()}

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        return self._scheduler.decide(self._requests[options[0].request_class], view, now)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_simulation_that_asks_the_scheduler_is_the_same_simulation(
    quickstart: Scenario, profiles: Profiles, options: tuple[Candidate, ...], name: str
) -> None:
    """Every policy, embedded and shown the same pools, gives the same records to the byte, in overload too."""
    busy = quickstart.with_overrides(
        {"horizon_s": 120, "warmup_s": 10, "replications": 1, "pools.a100.replicas": 5, "budget.usd_per_hour": 8.0,
         "requests.picture.arrivals.rate_per_s": 20.0}
    )  # fmt: skip
    third = tuple(Share(0.3, option.plan) for option in options if option.plan.switch_step in (10, 15, 25))
    plan = Deployment({"a100": 5}, {"picture": third[:3]})
    plain = simulate(busy, profiles, policy=name, plan=plan)
    scheduler = Scheduler.from_plan(plan, scenario=busy, policy=name, profiles=profiles)
    asked = simulate(busy, profiles, policy=Embedded(scheduler, busy, POLICIES[name].discipline), plan=plan)
    ours, theirs = (result.replications[0].rows() for result in (plain, asked))

    assert len(ours) > 2000
    for field in ("arrival_s", "cloud_start_s", "cloud_stop_s", "edge_start_s", "finish_s", "status", "reason", "usd"):
        np.testing.assert_array_equal(column(ours, field), column(theirs, field))


def without_distance(profiles: Profiles, name: str) -> Profiles:
    """Profiles with one network on which nothing takes time."""
    near = profiles.network(name)
    none, all_at_once = (dict.fromkeys(Quantiles.model_fields, value) for value in (1e-300, 1e300))
    fields = {"rtt_s": none, "down_bytes_per_s": all_at_once, "up_bytes_per_s": all_at_once}
    instant = near.model_copy(update={key: Quantiles(**value) for key, value in fields.items()})
    return replace(profiles, networks=MappingProxyType({**profiles.networks, name: instant}))


class Replayed(Policy):
    """Takes the plans that were decided before, in order."""

    name = "replayed"

    def __init__(self, plans: Sequence[object]) -> None:
        self._plans = iter(plans)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        wanted = next(self._plans)
        return Decision("run", next(option for option in options if option.plan == wanted), 0.0, self.name)


def on_its_own_ledger(scheduler: Scheduler, arrivals_s: Sequence[float], nodes: int) -> list[Decision]:
    """Every arrival decided from the ledger, with a `CloudDone` when a queue common to all nodes would be done."""
    free_s, stops, decisions = [0.0] * nodes, [], []
    heapify(free_s)
    for now in arrivals_s:
        while stops and stops[0][0] <= now:
            stop_s, number = heappop(stops)
            scheduler.observe(CloudDone(number, stop_s))
            scheduler.observe(RequestDone(number, stop_s + 1.0))
        decision = scheduler.decide(PICTURE, None, now)
        decisions.append(decision)
        candidate = decision.candidate
        assert candidate is not None
        if candidate.pool_index == 0:
            stop_s = max(now, heappop(free_s)) + candidate.cloud_s
            heappush(free_s, stop_s)
            heappush(stops, (stop_s, decision.number))
    return decisions


@pytest.mark.parametrize(
    ("name", "nodes", "same"),
    [("planned", 1, True), ("planned", 4, True), ("least_work", 4, True), ("cost_aware", 1, True),
     ("cost_aware", 4, False)],
)  # fmt: skip
def test_on_its_own_ledger_it_decides_and_predicts_as_simulated(
    quickstart: Scenario, profiles: Profiles, options: tuple[Candidate, ...], name: str, nodes: int, same: bool
) -> None:
    """Without distance, and told when pool parts are done, it foresees every start, and decides as in simulation.

    A queue for each worker, entered where it is shortest in seconds, is a queue common to all. Only `cost_aware` on
    several nodes decides otherwise at times: a pool in the simulation says how much work there is for each GPU, the
    ledger when the first GPU will be free. Its starts are foreseen all the same.
    """
    near = without_distance(profiles, quickstart.edge["phones"].network)
    busy = quickstart.with_overrides(
        {"horizon_s": 200, "warmup_s": 10, "replications": 1, "requests.picture.slo_s": 2.2,
         "requests.picture.arrivals.rate_per_s": 4.1 * nodes}
    )  # fmt: skip
    mix = tuple(Share(0.5, option.plan) for option in options if option.plan.switch_step in (10, 15))
    plan = Deployment({"a100": nodes}, {"picture": mix[:2]})
    plain = simulate(busy, near, policy=name, plan=plan).replications[0]
    arrivals_s = column(plain.rows(), "arrival_s").tolist()
    scheduler = Scheduler.from_plan(plan, scenario=busy, policy=name, profiles=near)
    decisions = on_its_own_ledger(scheduler, arrivals_s, nodes)
    plans = [decision.plan for decision in decisions]
    run = simulate(busy, near, policy=Replayed(plans), plan=plan, options=find_candidates(busy, near)).replications[0]
    start_s = column(run.rows(), "cloud_start_s")
    begun = ~np.isnan(start_s)
    foreseen_s = np.array([decision.predicted_start_s for decision in decisions])
    labels = [[rows.plans[int(index)] for index in column(rows.rows(), "plan_index")] for rows in (run, plain)]

    assert sum(decision.action == "queue" for decision in decisions) > 100
    np.testing.assert_allclose(foreseen_s[begun], start_s[begun], atol=1e-9)
    assert (labels[0] == labels[1]) is same


def test_ends_that_are_never_told_are_no_outage_for_ever(quickstart: Scenario, profiles: Profiles) -> None:
    """Each of three nodes owes one end: requests are rejected for minutes, and then served; an end told late is none.

    Nothing that is rejected could ever make the ledger move on.
    """
    scheduler = Scheduler.from_plan(QUICKSTART, scenario=quickstart, profiles=profiles, policy="edf_reject")
    untold = [scheduler.decide(PICTURE, None, 0.0) for _ in range(3)]
    answers = [scheduler.decide(PICTURE, None, float(now)) for now in range(60, 660, 60)]
    again = scheduler.decide(PICTURE, None, 660.0)
    before = scheduler.workers(660.1)
    for decision in untold:
        scheduler.observe(RequestDone(decision.number, 660.1))

    assert {decision.worker for decision in untold} == {"a100/0", "a100/1", "a100/2"}
    assert {decision.reason for decision in answers} == {"certain_late"}
    assert (again.action, again.reason) == ("run", "edf_reject")
    assert again.worker is not None
    assert scheduler.workers(660.1) == before
    assert scheduler.open_decisions == 1


# ---- Other plans ----------------------------------------------------------------------------------------------------


def test_another_plan_is_followed_from_the_next_decision_on(
    scheduler: Scheduler, options: tuple[Candidate, ...]
) -> None:
    """The version counts up, workers keep their queues, nodes are added and taken away, corrections stay."""
    first = scheduler.decide(PICTURE, None, 1000.0)
    for seconds in [1.0] * 10:
        scheduler.observe(StepDone(first.number, seconds))
    learnt, before = scheduler.factors(), left_s(scheduler, 1000.1)
    more = scheduler.replace_plan(at_switch_step(options, 15, nodes=4))
    grown, second = left_s(scheduler, 1000.1), scheduler.decide(PICTURE, None, 1000.1)
    fewer = scheduler.replace_plan(at_switch_step(options, 5, nodes=1))

    assert (first.plan_version, more, second.plan_version, fewer, scheduler.version) == (1, 2, 2, 3, 3)
    assert learnt
    assert scheduler.factors() == learnt
    assert grown == [*before, ("a100/3", 0, 0.0)]
    assert second.plan is not None
    assert second.plan.switch_step == 15
    assert left_s(scheduler, 1000.1) == before[:1]


def test_workers_of_the_callers_stay_whatever_a_plan_rents(
    plan: Deployment, options: tuple[Candidate, ...], quickstart: Scenario, profiles: Profiles
) -> None:
    """With workers of one's own a plan changes none; without, a plan that rents none is followed by one that does."""
    own = Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles, workers=[Worker("mine", "a100")])
    none = Scheduler.from_plan(at_switch_step(options, 0, nodes=0), scenario=quickstart, profiles=profiles)
    for scheduler in (own, none):
        scheduler.replace_plan(at_switch_step(options, 15, nodes=2))

    assert [state.name for state in own.workers(0.0)] == ["mine"]
    assert [state.name for state in none.workers(0.0)] == ["a100/0", "a100/1"]


def test_a_budget_is_one_budget_under_however_many_plans(
    options: tuple[Candidate, ...], quickstart: Scenario, profiles: Profiles
) -> None:
    """What was spent ahead of time under one plan is spent under the next: at one moment never more than the cap."""
    paid = quickstart.with_overrides({"budget.usd_per_hour": 1.0})
    plans = [at_switch_step(options, k) for k in (10, 15)]
    scheduler = Scheduler.from_plan(plans[0], scenario=paid, profiles=profiles, policy="budgeted")
    spent_usd = 0.0
    for swap in range(1, 10):
        spent_usd += sum(scheduler.decide(PICTURE, None, 0.0).usd or 0.0 for _ in range(100))
        scheduler.replace_plan(plans[swap % 2])

    assert 0.9 / 60 < spent_usd <= 1.0 / 60


def test_shares_given_as_an_object_could_follow_no_other_plan(
    plan: Deployment, quickstart: Scenario, profiles: Profiles
) -> None:
    """They are refused, with the name to give instead."""
    with pytest.raises(InputError, match='Pass its name, "planned"'):
        Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles, policy=Planned(plan.plans))


def test_a_plan_that_does_not_fit_changes_nothing(scheduler: Scheduler, options: tuple[Candidate, ...]) -> None:
    """An error, the old plan, its version, its workers."""
    plan = at_switch_step(options, 15)
    for wrong in (replace(plan, replicas={"h100": 3}), replace(plan, plans={"film": plan.plans["picture"]}), "nowhere"):
        with pytest.raises(InputError):
            scheduler.replace_plan(wrong)
    decision = scheduler.decide(PICTURE, None, 0.0)

    assert decision.plan is not None
    assert (scheduler.version, decision.plan_version, decision.plan.switch_step) == (1, 1, 10)
    assert len(scheduler.workers(0.0)) == 3
