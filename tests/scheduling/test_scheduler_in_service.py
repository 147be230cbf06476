"""The embedded scheduler in service: absurd questions, events in any order, threads, other plans, and no end of it."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import fields, replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import PICTURE, at_switch_step, left_s
from hybridsd_sim import InputError, Profiles, Request, Scenario, Scheduler
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scheduling import (
    POLICIES,
    CloudDone,
    Decision,
    Event,
    FleetView,
    Policy,
    PoolView,
    RequestDone,
    StepDone,
    Worker,
    WorkerDown,
    WorkerUp,
    active_plan,
    feedback,
)
from hybridsd_sim.scheduling import scheduler as scheduler_module
from hybridsd_sim.scheduling.active_plan import prepare_plan

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10**40), st.integers(-(10**400), 10**400), st.floats(),
    st.text(max_size=3), st.just([]), st.just({}),
    st.sampled_from(["sd14", "sdxl", "picture", 512, 1024, 25, 2, 0, -1, 7.5]),
)  # fmt: skip
SOME = {field.name: ANYTHING for field in fields(Request)}


@pytest.fixture(scope="module")
def every(plan: Deployment, quickstart: Scenario, profiles: Profiles) -> list[Scheduler]:
    """A scheduler for each policy."""
    paid = quickstart.with_overrides({"budget.usd_per_hour": 20.0})
    return [Scheduler.from_plan(plan, scenario=paid, profiles=profiles, policy=name) for name in POLICIES]


def written(decision: Decision) -> dict[str, Any]:
    """The decision as JSON that every reader takes."""
    return json.loads(json.dumps(decision.to_dict(), allow_nan=False))


# ---- Absurd questions -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=SOME), st.one_of(st.floats(0, 1e9), ANYTHING), st.data())
def test_deciding_never_fails(every: list[Scheduler], asked: dict[str, Any], now: Any, data: st.DataObject) -> None:
    """Whatever a request holds and a clock shows, every policy gives a decision with a reason, as clean JSON."""
    view = data.draw(st.sampled_from([None, FleetView([]), FleetView([PoolView(3, 1)]), 3]))
    for scheduler in every:
        decision = scheduler.decide(replace(PICTURE, **asked), view, now)

        assert written(decision)["reason"] == decision.reason != ""
        assert (decision.candidate is None) == (decision.action == "reject")
        scheduler.observe(RequestDone(decision.number, 1e9))


@pytest.mark.parametrize("request_", [None, 3, "picture", object(), [PICTURE]])
@pytest.mark.parametrize("now", [0.0, nan, inf, 10**400, None, "now"])
def test_what_is_no_request_is_rejected(scheduler: Scheduler, request_: Any, now: Any) -> None:
    """Nothing is known of it, so there is nothing to fall back on."""
    decision = scheduler.decide(request_, None, now)

    assert (decision.action, decision.reason) == ("reject", "fallback")
    assert written(decision)["now_s"] == 0.0


@pytest.mark.parametrize("now", [nan, inf, -inf, 10**400, -(10**400), None, "noon"])
def test_a_clock_without_time_leaves_no_mark(scheduler: Scheduler, now: Any) -> None:
    """The request gets the plan that is right on an idle fleet; the ledger stays as it is."""
    decision = scheduler.decide(PICTURE, None, now)

    assert (decision.action, decision.reason, decision.number) == ("run", "fallback", 0)
    assert decision.plan is not None
    assert decision.plan.switch_step == 10
    assert scheduler.open_decisions == 0
    assert written(scheduler.decide(replace(PICTURE, request_class="film"), None, now))["now_s"] == 0.0
    assert scheduler.decide(PICTURE, None, 1.0).predicted_start_s == 1.0


class Broken(Policy):
    """Fails in a way of its own at every request."""

    name = "broken"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [KeyError("x"), RecursionError(), MemoryError(), None, "run", Decision])
def test_a_policy_that_fails_is_replaced_by_the_plan(
    plan: Deployment, quickstart: Scenario, profiles: Profiles, answer: Any
) -> None:
    """Its request gets the plan that is right on an idle fleet, and no lock stays shut."""
    scheduler = Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles, policy=Broken(answer))
    decisions = []
    threads = [threading.Thread(target=lambda: decisions.append(scheduler.decide(PICTURE, None, 1.0))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)

    assert [(d.action, d.reason, d.plan) for d in decisions] == [("run", "fallback", plan.plans["picture"][0].plan)] * 2


@pytest.mark.parametrize("wait_s", [inf, nan])
def test_a_pool_that_never_begins_is_no_place_to_send_to(scheduler: Scheduler, wait_s: float) -> None:
    """A view in which the wait has no end, or is no number, has no candidate for the plan."""

    class Closed(PoolView):
        def wait_s(self, degree: int, now: float) -> float:
            return wait_s

    decision = scheduler.decide(PICTURE, FleetView([Closed(3, 0)]), 0.0)

    assert (decision.action, decision.reason, scheduler.open_decisions) == ("reject", "no_candidate", 0)
    assert written(decision)["predicted_finish_s"] is None


def test_what_cannot_be_served_says_why(scheduler: Scheduler) -> None:
    """Unknown class, unknown size, no worker: each its reason, and none takes a place in the ledger."""
    reasons = [
        scheduler.decide(replace(PICTURE, **changed), None, 0.0).reason
        for changed in ({"request_class": "film"}, {"height_px": 513}, {"model": "sdxl"}, {"num_images": 0})
    ]
    for state in scheduler.workers(0.0):
        scheduler.observe(WorkerDown(state.name, 0.0))

    assert reasons == ["unknown_class", "no_candidate", "no_candidate", "no_candidate"]
    assert scheduler.decide(PICTURE, None, 0.0).reason == "no_candidate"
    assert scheduler.open_decisions == 0


# ---- Events ---------------------------------------------------------------------------------------------------------


def test_late_repeated_and_unknown_events_change_nothing(scheduler: Scheduler) -> None:
    """Ends that were told before, of decisions that nobody made, and at no time at all."""
    first, second = (scheduler.decide(PICTURE, None, 0.0) for _ in range(2))
    scheduler.observe(CloudDone(first.number, 0.2))
    before = left_s(scheduler, 0.2), scheduler.open_decisions
    nothing: list[Event] = [
        CloudDone(first.number, 0.2), CloudDone(99, 0.2), RequestDone(99, 0.2), StepDone(99, 1.0),
        CloudDone(second.number, nan), RequestDone(second.number, inf), RequestDone(second.number, 10**400),
        WorkerDown("a100/0", nan), WorkerDown("nobody", 0.2), WorkerUp("a100/1", "a100", 0.2),
        WorkerUp("new", "a100", nan),
    ]  # fmt: skip
    for event in nothing:
        scheduler.observe(event)

    assert (left_s(scheduler, 0.2), scheduler.open_decisions) == before
    scheduler.observe(RequestDone(first.number, 0.3))
    scheduler.observe(RequestDone(first.number, 0.3))
    assert scheduler.open_decisions == 1


def test_workers_come_and_go(scheduler: Scheduler) -> None:
    """One that goes takes its queue with it and the rest keep theirs; one that comes is idle and taken first."""
    decisions = [scheduler.decide(PICTURE, None, 0.0) for _ in range(5)]
    before = left_s(scheduler, 0.1)
    scheduler.observe(WorkerDown("a100/1", 0.1))
    after = left_s(scheduler, 0.1)
    scheduler.observe(WorkerUp("late", "a100", 0.1))
    lost = next(decision for decision in decisions if decision.worker == "a100/1")
    scheduler.observe(CloudDone(lost.number, 0.2))

    assert after == [state for state in before if state[0] != "a100/1"]
    assert scheduler.decide(PICTURE, None, 0.2).worker == "late"


@pytest.mark.parametrize(
    ("event", "said"), [(WorkerUp("a", "h100", 0.0), "h100"), (WorkerUp("a", "a100", 0.0, 0), "at least one")]
)
def test_a_worker_that_cannot_be_is_refused(scheduler: Scheduler, event: WorkerUp, said: str) -> None:
    """Of a pool that is not there, or without a GPU: an error, and nobody has come."""
    with pytest.raises(InputError, match=said):
        scheduler.observe(event)

    assert len(scheduler.workers(0.0)) == 3


EVENTS = st.one_of(
    st.builds(StepDone, st.integers(0, 30), st.floats(), st.integers(-2, 3)),
    st.builds(CloudDone, st.integers(0, 30), st.floats(-10, 100)),
    st.builds(RequestDone, st.integers(0, 30), st.floats(-10, 100)),
    st.builds(WorkerUp, st.sampled_from("abc"), st.just("a100"), st.floats(-10, 100), st.integers(1, 4) | st.none()),
    st.builds(WorkerDown, st.sampled_from("abc"), st.floats(-10, 100)),
)


@settings(max_examples=40)
@given(st.lists(EVENTS | st.floats(0, 100), max_size=60))
def test_any_course_of_events_is_taken_twice_the_same(
    plan: Deployment, quickstart: Scenario, profiles: Profiles, course: list[Event | float]
) -> None:
    """Events in any order, with decisions between: none fails, times are times, and the same course ends the same."""
    workers = [Worker("a", "a100")]
    both = [Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles, workers=workers) for _ in range(2)]
    for item in course:
        if isinstance(item, float):
            ours, theirs = (scheduler.decide(PICTURE, None, item) for scheduler in both)
            assert written(ours) == written(theirs)
            assert ours.reason in ("planned", "no_candidate")
        else:
            for scheduler in both:
                scheduler.observe(item)

    assert both[0].workers(100.0) == both[1].workers(100.0)
    assert all(0 <= state.left_s < inf for state in both[0].workers(100.0))


# ---- No end of it ---------------------------------------------------------------------------------------------------


def kept_bytes(scheduler: Scheduler, decisions: int, told: bool) -> list[int]:
    """Bytes held after each third of so many decisions, whose ends are told or never."""
    held: list[int] = []
    for number in range(decisions):
        decision = scheduler.decide(PICTURE, None, 0.1 * number)
        if told:
            scheduler.observe(RequestDone(decision.number, 0.1 * number + 0.05))
        if (number + 1) % (decisions // 3) == 0 and tracemalloc.is_tracing():
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    return held


@pytest.mark.parametrize("told", [True, False])
def test_decisions_without_end_take_no_more_memory(
    plan: Deployment, quickstart: Scenario, profiles: Profiles, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred thousand, their ends told or never: what is open is bounded, and then memory is flat."""
    monkeypatch.setattr(scheduler_module, "MAX_OPEN", 512)
    monkeypatch.setattr(scheduler_module, "LOST_AT_ONCE", 32)
    scheduler = Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles, policy="least_work")
    kept_bytes(scheduler, 188_000, told)
    tracemalloc.start()
    try:
        _, earlier, later = kept_bytes(scheduler, 12_000, told)
    finally:
        tracemalloc.stop()

    assert scheduler.open_decisions <= (0 if told else 512)
    assert sum(state.queued for state in scheduler.workers(1.2e3)) == scheduler.open_decisions
    assert later < earlier + 20_000


SIZES = st.tuples(st.integers(6, 12), st.integers(1, 60), st.integers(1, 3), st.floats(0.2, 0.3))


@settings(max_examples=5)
@given(st.lists(SIZES, min_size=30, max_size=40))
def test_sizes_and_kinds_without_end_are_remembered_in_part(
    plan: Deployment, quickstart: Scenario, profiles: Profiles, sizes: list[tuple[int, int, int, float]]
) -> None:
    """Sizes, floors and kinds of steps come and go; each table keeps to its bound, whichever is asked for again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_plan, "MAX_SIZES", 10)
        patch.setattr(feedback, "MAX_KINDS", 10)
        patch.setattr(scheduler_module, "MAX_OPEN", 16)
        patch.setattr(scheduler_module, "LOST_AT_ONCE", 4)
        active = prepare_plan(plan, quickstart, profiles, "cost_aware")
        scheduler = Scheduler(active, None, lambda *_: active)
        for now, (side, steps, images, floor) in enumerate(sizes):
            asked = replace(
                PICTURE, height_px=64 * side, num_inference_steps=steps, num_images=images, quality_floor=floor
            )
            decision = scheduler.decide(asked, None, float(now))
            for _ in range(20):
                scheduler.observe(StepDone(decision.number, 1.0))

            assert len(active.cache) <= 10
            assert len(scheduler.factors()) <= 10
            assert scheduler.open_decisions <= 16


# ---- Threads ---------------------------------------------------------------------------------------------------------


def serve(scheduler: Scheduler, thread: int, decisions: list[Decision], over: threading.Event) -> None:
    """Ask and tell until it is over; a failure in a thread fails the test, as every warning does."""
    for number in itertools.count():
        if over.is_set():
            return
        decision = scheduler.decide(PICTURE, None, float(number))
        decisions.append(decision)
        scheduler.observe(StepDone(decision.number, 0.02))
        if number % 3 != thread % 3:
            scheduler.observe(CloudDone(decision.number, number + 0.1))
            scheduler.observe(RequestDone(decision.number, number + 0.2))
        if number % 50 == 0:
            scheduler.observe(WorkerDown(f"a100/{thread}", float(number)))
            scheduler.observe(WorkerUp(f"a100/{thread}", "a100", float(number)))


def test_every_decision_belongs_to_one_plan_while_plans_are_swapped(
    quickstart: Scenario, profiles: Profiles, options: tuple[Candidate, ...]
) -> None:
    """Threads ask and tell while three plans take turns: plan, version, pool and worker always go together.

    Under the third plan the pools stand in another order, so that a decision half of one plan and half of the next
    would be placed on the wrong pool's workers.
    """
    spec = quickstart.to_dict()
    pools = {"spare": spec["pools"]["a100"], **spec["pools"]}
    turned = Scenario.model_validate_json(json.dumps(spec | {"pools": pools}))
    plans = [at_switch_step(options, k, nodes) for k, nodes in ((10, 3), (15, 2), (25, 4))]
    scenarios = (quickstart, quickstart, turned)
    priced = [prepare_plan(*pair, profiles, None) for pair in zip(plans, scenarios, strict=True)]
    scheduler = Scheduler(priced[0], None, lambda plan, _: priced[plans.index(plan)])
    decisions: list[Decision] = []
    over = threading.Event()
    threads = [threading.Thread(target=serve, args=(scheduler, index, decisions, over)) for index in range(4)]
    for thread in threads:
        thread.start()
    versions = []
    for swap in range(1, 200):
        versions.append(scheduler.replace_plan(plans[swap % 3]))
        before = len(decisions)
        while len(decisions) < before + 20 and all(thread.is_alive() for thread in threads):
            time.sleep(0.0)
    over.set()
    for thread in threads:
        thread.join(60.0)

    assert versions == list(range(2, 201))
    assert len({decision.plan_version for decision in decisions}) > 150
    for decision in decisions:
        assert decision.reason == "planned"
        assert decision.plan == plans[(decision.plan_version - 1) % 3].plans["picture"][0].plan
        assert decision.pool == "a100"
        assert decision.worker is not None
        assert decision.worker.startswith("a100/")
    assert len({decision.number for decision in decisions}) == len(decisions)
