"""What each policy promises: it decides from the view alone, and each does what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import InputError, Profiles, Scenario
from hybridsd_sim.plan import Share
from hybridsd_sim.pricing import Candidate, find_candidates, make_candidate, request_of
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.scheduling import POLICIES, DeadlinePoolView, FleetView, PoolView
from hybridsd_sim.scheduling.policies import Planned, make_policy
from hybridsd_sim.scheduling.policy import MAX_KNOWN, PerCandidates
from hybridsd_sim.simulation.fleet import GpuPool, PoolJob, Preemption, Route


@pytest.fixture(scope="module")
def options(profiles: Profiles) -> tuple[Candidate, ...]:
    """The candidates of an old phone in the photo app: every kind of plan on two pools."""
    return find_candidates(load_scenario("photo-app"), profiles).by_class["iphone-14"]


def view(*backlogs: float) -> FleetView:
    """Pools of ten GPUs with that many GPU-seconds waiting."""
    pools = []
    for backlog in backlogs:
        pool = PoolView(10, 0 if backlog else 1)
        pool.queued, pool.backlog_gpu_s, pool.declared_work = int(backlog > 0), backlog, backlog
        pools.append(pool)
    return FleetView(pools)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "planned"])
def test_every_policy_decides_the_same_twice(options: tuple[Candidate, ...], name: str) -> None:
    """Deterministic given what it sees and saw; the candidate comes from the options."""
    fleets = [view(0.0, 40.0 * turn) for turn in range(5)]
    first, second = (
        [policy.decide(options, 8.0 + turn, fleet, float(turn)) for turn, fleet in enumerate(fleets)]
        for policy in (make_policy(name, budget_usd_per_hour=10.0) for _ in range(2))
    )

    assert first == second
    assert all(decision.candidate in options for decision in first)


@pytest.mark.parametrize(
    ("name", "cloud", "edge"), [("cloud_only", True, False), ("edge_only", False, True), ("static_switch", True, True)]
)
def test_static_policies_stay_on_their_side(options: tuple[Candidate, ...], name: str, cloud: bool, edge: bool) -> None:
    """Cloud-only does no step at the edge, edge-only none in the cloud, the static switch some of both."""
    candidate = make_policy(name).decide(options, 8.0, view(0.0, 0.0), 0.0).candidate

    assert candidate is not None
    assert (candidate.cloud_steps > 0, candidate.edge_steps > 0) == (cloud, edge)


def test_the_static_switch_is_the_papers_ten_of_twenty_five(options: tuple[Candidate, ...]) -> None:
    """Share 0.4 of 25 steps."""
    candidate = make_policy("static_switch", static_switch=0.4).decide(options, 8.0, view(0.0, 0.0), 0.0).candidate

    assert candidate is not None
    assert candidate.cloud_steps == 10


@given(st.floats(0, 500), st.floats(0, 500), st.floats(0.5, 30))
def test_cost_aware_takes_the_cheapest_that_is_in_time(
    options: tuple[Candidate, ...], first: float, second: float, slo_s: float
) -> None:
    """Nothing cheaper was predicted to meet floor and deadline; else the soonest is taken and marked late."""
    fleet = view(first, second)
    decision = make_policy("cost_aware").decide(options, slo_s, fleet, 0.0)

    def finish(option: Candidate) -> float:
        wait = fleet.pools[option.pool_index].wait_s(option.degree, 0.0) if option.pool_index >= 0 else 0.0
        return wait + option.latency_s

    keeping = [option for option in options if option.keeps_limits]
    in_time = [option for option in keeping if finish(option) <= slo_s]
    assert decision.candidate is not None
    if in_time:
        assert decision.candidate.usd_or_inf == min(option.usd_or_inf for option in in_time)
    else:
        assert decision.reason == "late"
        assert finish(decision.candidate) == min(map(finish, keeping))


def test_least_work_goes_where_least_is_declared(options: tuple[Candidate, ...]) -> None:
    """The pool with less outstanding steps x pixels x images, whatever it costs."""
    chosen = [
        make_policy("least_work").decide(options, 8.0, view(*loads), 0.0).candidate
        for loads in ((9.0, 1.0), (1.0, 9.0))
    ]

    assert [candidate.pool_index for candidate in chosen if candidate] == [1, 0]


def test_without_a_candidate_a_request_is_rejected_with_a_reason() -> None:
    """An empty set of options is no crash."""
    for name in POLICIES.keys() - {"planned"}:
        decision = make_policy(name, budget_usd_per_hour=10.0).decide((), 8.0, view(), 0.0)
        assert (decision.action, decision.reason) == ("reject", "no_candidate")


def test_an_idle_pool_has_no_wait_and_a_busy_one_shares_its_work() -> None:
    """The predicted wait is the outstanding GPU-seconds over the GPUs."""
    busy = view(40.0).pools[0]
    busy.busy_gpus, busy.busy_until_gpu_s = 10, 10 * 105.0

    assert view(0.0).pools[0].wait_s(1, 0.0) == 0.0
    assert busy.wait_s(1, 100.0) == pytest.approx((40.0 + 10 * 5.0) / 10)


def test_a_snapshot_does_not_change() -> None:
    """A copied view keeps what was known then."""
    live = view(40.0).pools[0]
    copy = live.copy()
    live.queued, live.backlog_gpu_s = 0, 0.0

    assert (copy.queued, copy.backlog_gpu_s) == (1, 40.0)


ranks = st.tuples(st.integers(-2, 2), st.floats(0, 50), st.floats(0.1, 5))
"""Priority, deadline and seconds of a job."""


def one_gpu(drawn: list[tuple[int, float, float]]) -> tuple[simpy.Environment, GpuPool[PoolJob], list[PoolJob]]:
    """A GPU that goes by deadline, and the jobs that it was given at once."""
    env = simpy.Environment()
    pool: GpuPool[PoolJob] = GpuPool(env, nodes=1, gpus_per_node=1, discipline="edf", done=lambda _: None)
    jobs = [PoolJob(number, 1, hold_s, due_s) for number, (_, due_s, hold_s) in enumerate(drawn)]
    for job, (priority, _, _) in zip(jobs, drawn, strict=True):
        job.priority = priority
        pool.submit(job)
    return env, pool, jobs


@given(st.lists(ranks, max_size=20), st.integers(-2, 2), st.floats(0, 50))
def test_the_wait_of_a_newcomer_is_the_one_that_it_has(
    drawn: list[tuple[int, float, float]], priority: int, due_s: float
) -> None:
    """On one GPU that goes by deadline, the predicted wait is when the newcomer starts, whatever is due after it."""
    env, pool, _ = one_gpu(drawn)
    newcomer = PoolJob(len(drawn), 1, 1.0, due_s)
    newcomer.priority = priority
    predicted_s = pool.view.wait_before_s(1, 0.0, due_s, priority)
    pool.submit(newcomer)
    env.run()

    assert newcomer.cloud_start_s == pytest.approx(predicted_s)


@given(st.lists(ranks, max_size=20), st.integers(-2, 2), st.floats(0, 50), st.floats(0.01, 0.99), st.floats(1.01, 2))
def test_spare_work_makes_nobody_late_and_more_does(
    drawn: list[tuple[int, float, float]], priority: int, due_s: float, less: float, more: float
) -> None:
    """A newcomer with less work than is spare leaves everybody of its priority in time who was; one with more, not."""

    def in_time(*newcomers: tuple[int, float, float]) -> set[int]:
        env, _, jobs = one_gpu([*drawn, *newcomers])
        env.run()
        return {job.number for job in jobs[: len(drawn)] if job.priority == priority and job.cloud_stop_s <= due(job)}

    def due(job: PoolJob) -> float:
        return job.deadline_s * (1 + 1e-9)

    spare_s = one_gpu(drawn)[1].view.spare_gpu_s(0.0, due_s, priority)
    assert in_time() <= in_time((priority, due_s, less * min(spare_s, 1e6)))
    if 1e-6 < spare_s < float("inf"):
        assert not in_time() <= in_time((priority, due_s, more * spare_s))


@given(st.lists(st.tuples(st.integers(0, 9), ranks), max_size=30), st.lists(st.integers(1, 9), max_size=6))
def test_a_view_by_deadline_knows_of_those_who_wait_and_of_nobody_else(
    drawn: list[tuple[int, tuple[int, float, float]]], lives: list[int]
) -> None:
    """Through batches and lost nodes: as many are due as wait, with the work that waits; a snapshot stays as it was."""
    env, left, done = simpy.Environment(), iter(lives), []
    route = Route((1.0, 1.5, 1.8))

    def check(job: PoolJob) -> None:
        done.append(job)
        assert isinstance(pool.view, DeadlinePoolView)
        assert len(pool.view.due) == pool.view.queued
        assert pool.view.due == sorted(pool.view.due)
        assert sum(due.gpu_s for due in pool.view.due) == pytest.approx(pool.view.backlog_gpu_s, abs=1e-9)

    preemption = Preemption(lambda _: next(left, 1e6) + 0.37, 2.0)
    pool: GpuPool[PoolJob] = GpuPool(env, nodes=2, gpus_per_node=1, discipline="edf", done=check, preemption=preemption)
    for number, (at_s, (priority, due_s, hold_s)) in enumerate(drawn):
        job = PoolJob(number, 1, 1.0 if number % 2 else hold_s, due_s)
        job.priority, job.route = priority, route if number % 2 else job.route
        env.timeout(at_s).callbacks.append(lambda _, job=job: pool.submit(job))
    env.run(until=9.5)
    before, seen = pool.view.copy(), pool.view.wait_before_s(1, 9.5, 25.0, 0)
    env.run(until=1e4)

    assert len(done) == len(drawn)
    assert before.wait_before_s(1, 9.5, 25.0, 0) == seen
    assert pool.view.wait_before_s(1, 1e4, 25.0, 0) == 0.0


def test_an_unknown_policy_names_the_nearest(quickstart: Scenario) -> None:
    """A typing slip is answered with what was probably meant."""
    with pytest.raises(InputError, match="cost_aware"):
        make_policy("cost_awares")


def followed(policy: Planned, options: tuple[Candidate, ...], requests: int) -> list[int]:
    """The position in the options of each request's plan; -1 when it is turned away."""
    decisions = [policy.decide(options, 8.0, view(), 0.0) for _ in range(requests)]

    assert {decision.reason for decision in decisions if decision.candidate is None} <= {"turned_away"}
    return [-1 if d.candidate is None else options.index(d.candidate) for d in decisions]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 1000), st.integers(1, 400))
def test_a_mix_keeps_its_shares_over_any_run(
    options: tuple[Candidate, ...], weights: list[int], left_over: int, requests: int
) -> None:
    """After any number of requests each part has its share of them, to less than one request for each part."""
    total = sum(weights) + left_over
    parts = [Share(weight / total, option.plan) for weight, option in zip(weights, options, strict=False)]
    mix, mine = {"iphone-14": tuple(parts)}, options[: len(parts)]
    taken = followed(Planned(mix), mine, requests)
    shares = [part.share for part in parts] + ([left_over / total] if left_over else [])
    counts = [taken.count(index) for index in range(len(parts))] + ([taken.count(-1)] if left_over else [])

    assert sum(counts) == requests
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - share * requests) < len(shares)
    assert followed(Planned(mix), mine, requests) == taken


def test_equal_shares_take_turns(options: tuple[Candidate, ...]) -> None:
    """Halves alternate, so that no pool gets two in a row."""
    mix = {"iphone-14": (Share(0.5, options[0].plan), Share(0.5, options[1].plan))}

    assert followed(Planned(mix), options[:2], 6) == [0, 1, 0, 1, 0, 1]


def test_classes_take_turns_on_their_own(quickstart: Scenario, profiles: Profiles) -> None:
    """The requests of one class do not move the turns of another."""
    spec = quickstart.to_dict()["requests"]["picture"]
    found = find_candidates(quickstart.with_overrides({"requests.second": spec}), profiles).by_class
    mix = {name: (Share(0.5, own[0].plan), Share(0.5, own[1].plan)) for name, own in found.items()}
    policy = Planned(mix)
    turns = [followed(policy, found[name][:2], 1)[0] for name in ("picture", "second", "picture", "second")]

    assert turns == [0, 0, 1, 1]


def test_a_mix_of_switch_steps_holds_for_requests_of_other_step_counts(
    quickstart: Scenario, profiles: Profiles
) -> None:
    """Two plans that differ in the switch step alone stay two, each scaled to the steps asked for."""
    own = find_candidates(quickstart, profiles).by_class["picture"]
    plans = [next(option.plan for option in own if option.cloud_steps == k) for k in (5, 10)]
    longer = replace(request_of("picture", quickstart.requests["picture"]), num_inference_steps=50)
    options = tuple(make_candidate(quickstart, profiles, longer, plan.rescaled(50)) for plan in plans)
    policy = Planned({"picture": (Share(0.25, plans[0]), Share(0.5, plans[1]))})
    taken = followed(policy, options, 8)

    assert [option.cloud_steps for option in options] == [10, 20]
    assert [taken.count(0), taken.count(1), taken.count(-1)] == [2, 4, 2]


def test_a_part_whose_pool_is_not_rented_is_not_served_elsewhere(options: tuple[Candidate, ...]) -> None:
    """A part without an option is refused for that reason, and the other part keeps its own share alone."""
    policy = Planned({"iphone-14": (Share(0.5, options[0].plan), Share(0.5, options[1].plan))})
    reasons = [policy.decide(options[:1], 8.0, view(), 0.0).reason for _ in range(4)]

    assert reasons == ["planned", "no_candidate", "planned", "no_candidate"]


def test_what_is_worked_out_for_options_is_remembered_in_part() -> None:
    """The same sequence is worked out once, an equal one anew; of sequences without end no more are kept than said."""
    made: list[int] = []
    known = PerCandidates(lambda options: made.append(len(options)) or len(options))
    endless: list[list[Candidate]] = [[] for _ in range(3 * MAX_KNOWN)]
    for options in endless:
        assert known.of(options) == known.of(options) == 0
        assert len(known) <= MAX_KNOWN

    assert len(made) == len(endless)
