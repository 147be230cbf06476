"""Laws of pools and edge fleets: theory's queues, gangs, disciplines, residency, batches, preemption."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.planning.analytic import erlang_c
from hybridsd_sim.simulation.fleet import EdgeDevices, GpuPool, PoolJob, Preemption, Route

DISCIPLINES = ("fifo", "gang_fifo", "backfill", "edf")


def run_pool(jobs: Iterable[tuple[float, PoolJob]], *, nodes: int, gpus: int = 1, **settings: object) -> list[PoolJob]:
    """Submit each (time, job) to a pool and return the jobs in the order in which they finished.

    `until` ends the run; with preemption it never ends by itself.
    """
    until = settings.pop("until", None)
    env, finished = simpy.Environment(), []
    pool: GpuPool[PoolJob] = GpuPool(
        env, nodes=nodes, gpus_per_node=gpus, discipline=str(settings.pop("discipline", "fifo")),
        done=finished.append, **settings,  # type: ignore[arg-type]
    )  # fmt: skip

    def submit(job: PoolJob) -> Callable[[simpy.Event], None]:
        return lambda _: pool.submit(job)

    for at, job in jobs:
        env.timeout(at).callbacks.append(submit(job))
    env.run(until)
    return finished


def waits(jobs: Iterable[PoolJob]) -> np.ndarray:
    """Seconds that each job waited for its gang."""
    return np.array([job.cloud_start_s - job.cloud_ready_s for job in jobs])


def poisson_jobs(seed: int, rate: float, holds: np.ndarray) -> list[tuple[float, PoolJob]]:
    """Single-GPU jobs with these holding times, arriving at random."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(holds)))
    return [(float(at), PoolJob(i, 1, float(hold))) for i, (at, hold) in enumerate(zip(times, holds, strict=True))]


@pytest.mark.parametrize("servers", [1, 4, 8])
def test_exponential_service_waits_as_erlang_c_says(servers: int) -> None:
    """M/M/c: the mean wait over five runs lies within its 99% interval of Erlang C's."""
    load, size = 0.7, 40_000
    means = []
    for seed in range(5):
        holds = np.random.default_rng(100 + seed).exponential(1.0, size)
        done = run_pool(poisson_jobs(seed, load * servers, holds), nodes=servers)
        means.append(waits(done)[size // 10 :].mean())
    theory = erlang_c(servers, load * servers) / (servers * (1 - load))
    error = np.std(means, ddof=1) / np.sqrt(len(means)) * 4.604

    assert abs(np.mean(means) - theory) < max(error, 0.05 * theory)


def test_fixed_service_waits_half_as_long() -> None:
    """M/D/1 waits rho S / 2 (1 - rho): half of M/M/1."""
    done = run_pool(poisson_jobs(3, 0.7, np.ones(200_000)), nodes=1)

    assert waits(done)[10_000:].mean() == pytest.approx(0.7 / (2 * 0.3), rel=0.05)


def test_littles_law_holds() -> None:
    """The mean number in the pool is the arrival rate times the mean time there, on any sample path."""
    done = run_pool(poisson_jobs(5, 2.5, np.random.default_rng(6).exponential(1.0, 5_000)), nodes=3)
    enter = np.array([job.cloud_ready_s for job in done])
    leave = np.array([job.cloud_stop_s for job in done])
    span = leave.max()
    times = np.sort(np.concatenate([enter, leave]))
    number = np.searchsorted(np.sort(enter), times, "right") - np.searchsorted(np.sort(leave), times, "right")
    mean_number = (number[:-1] * np.diff(times)).sum() / span

    assert mean_number == pytest.approx(len(done) / span * (leave - enter).mean(), rel=1e-6)


jobs_strategy = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 4), st.floats(0.01, 5), st.floats(0, 50)), min_size=1, max_size=40
)


@given(jobs_strategy, st.sampled_from(DISCIPLINES), st.integers(1, 3))
def test_every_job_runs_once_and_no_node_is_overfull(
    drawn: list[tuple[float, int, float, float]], discipline: str, nodes: int
) -> None:
    """Whatever the discipline: all jobs finish, gangs stay on one node, a node never runs more than its GPUs."""
    jobs = [(at, PoolJob(i, degree, hold, deadline)) for i, (at, degree, hold, deadline) in enumerate(drawn)]
    done = run_pool(jobs, nodes=nodes, gpus=4, discipline=discipline)

    assert sorted(job.number for job in done) == list(range(len(drawn)))
    for job in done:
        alongside = [o for o in done if o.node == job.node and o.cloud_start_s <= job.cloud_start_s < o.cloud_stop_s]
        assert sum(other.degree for other in alongside) <= 4
        assert job.cloud_start_s >= job.cloud_ready_s


@given(jobs_strategy, st.sampled_from(DISCIPLINES))
def test_nobody_waits_for_an_empty_pool(drawn: list[tuple[float, int, float, float]], discipline: str) -> None:
    """Work conservation: while a job of one GPU waits at the head, no node has a GPU free (single-GPU jobs)."""
    jobs = [(at, PoolJob(i, 1, hold, deadline)) for i, (at, _, hold, deadline) in enumerate(drawn)]
    done = run_pool(jobs, nodes=2, gpus=1, discipline=discipline)
    for job in done:
        if job.cloud_start_s > job.cloud_ready_s:
            busy = [o for o in done if o.cloud_start_s <= job.cloud_ready_s < o.cloud_stop_s]
            assert len(busy) == 2


def staged(discipline: str) -> dict[str, float]:
    """Start times on two nodes of two GPUs, of which one GPU is free: a gang of two waits and two small jobs follow."""
    named = {
        "long": (0.0, PoolJob(0, 2, 10.0, 99.0)),
        "half": (0.0, PoolJob(1, 1, 4.0, 98.0)),
        "gang": (1.0, PoolJob(2, 2, 3.0, 97.0)),
        "short": (2.0, PoolJob(3, 1, 1.0, 96.0)),
        "slow": (2.5, PoolJob(4, 1, 9.0, 1.0)),
    }
    run_pool(named.values(), nodes=2, gpus=2, discipline=discipline)
    return {name: job.cloud_start_s for name, (_, job) in named.items()}


def test_fifo_lets_nobody_past_the_head() -> None:
    """A waiting gang blocks the small jobs behind it although a GPU is free."""
    starts = staged("fifo")

    assert starts["gang"] == 4.0
    assert starts["short"] >= 4.0


def test_backfill_fills_the_gap_without_delaying_the_gang() -> None:
    """A job that ends before the gang could start runs in the gap; one that would not, waits."""
    starts = staged("backfill")

    assert starts["short"] == 2.0
    assert starts["gang"] == 4.0
    assert starts["slow"] >= 7.0


def test_gang_fifo_reserves_one_node_and_leaves_the_others() -> None:
    """The head drains the node it can have soonest; the next job may start elsewhere but not there."""
    named = {
        "left": (0.0, PoolJob(0, 1, 4.0)),
        "right": (0.0, PoolJob(1, 2, 2.0)),
        "gang": (1.0, PoolJob(2, 2, 3.0)),
        "small": (1.5, PoolJob(3, 1, 1.0)),
    }
    run_pool(named.values(), nodes=2, gpus=2, discipline="gang_fifo")

    assert named["gang"][1].cloud_start_s == 2.0
    assert named["small"][1].cloud_start_s == 1.5


def test_edf_serves_the_most_urgent_first_and_priority_before_that() -> None:
    """Among waiting jobs the earliest deadline starts first; a higher priority goes before any deadline."""
    first, late, soon, vip = (
        PoolJob(0, 1, 5.0, 9.0),
        PoolJob(1, 1, 1.0, 90.0),
        PoolJob(2, 1, 1.0, 10.0),
        PoolJob(3, 1, 1.0, 99.0),
    )
    vip.priority = 1
    run_pool([(0.0, first), (1.0, late), (2.0, soon), (3.0, vip)], nodes=1, discipline="edf")

    assert [vip.cloud_start_s, soon.cloud_start_s, late.cloud_start_s] == [5.0, 6.0, 7.0]


def test_a_job_goes_to_the_node_that_holds_its_model() -> None:
    """With one resident model a node, a second model loads once and is then found where it is."""
    jobs = [(float(3 * i), PoolJob(i, 1, 1.0)) for i in range(6)]
    for index, (_, job) in enumerate(jobs):
        job.model_key, job.load_s = index % 2, 0.5
    done = run_pool(jobs, nodes=2, resident_models=1)

    assert [job.load_s for job in done] == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_least_recently_used_model_makes_room() -> None:
    """A node that keeps two models and is asked for A, B, A, C, A, B loads A, B, C and B again."""
    jobs = [(float(3 * i), PoolJob(i, 1, 1.0)) for i in range(6)]
    for key, (_, job) in zip([0, 1, 0, 2, 0, 1], jobs, strict=True):
        job.model_key, job.load_s = key, 0.5
    done = run_pool(jobs, nodes=1, resident_models=2)

    assert [job.load_s for job in done] == [0.5, 0.5, 0.0, 0.5, 0.0, 0.5]


def test_a_cold_pool_starts_nothing_before_it_is_up() -> None:
    """Nodes rented at time 0 serve from their cold start on, in the order of arrival."""
    jobs = [(0.0, PoolJob(0, 1, 1.0)), (1.0, PoolJob(1, 1, 1.0))]
    done = run_pool(jobs, nodes=1, cold_start_s=30.0)

    assert [job.cloud_start_s for job in done] == [30.0, 31.0]


routed_strategy = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 2), st.integers(0, 1), st.integers(0, 50)), min_size=1, max_size=40
)
ROUTES = (Route((3.0,)), Route((2.0, 3.0, 3.5)), Route((4.0, 4.0)))
DEGREES = (1, 2, 1)
"""GPUs of a job of each route."""


def routed_jobs(drawn: list[tuple[int, int, int, int]]) -> list[tuple[float, PoolJob]]:
    """Jobs from (arrival, route, base model, deadline), in order of arrival."""
    jobs = []
    for number, (at, which, model, deadline) in enumerate(sorted(drawn)):
        job = PoolJob(number, DEGREES[which], ROUTES[which].batch_s[0], float(deadline))
        job.route, job.model_key = ROUTES[which], model
        jobs.append((float(at), job))
    return jobs


def gangs_of(done: Iterable[PoolJob]) -> list[tuple[PoolJob, ...]]:
    """The jobs of each gang, alone or together."""
    found = {job.number if job.batch is None else job.batch[0].number: job.batch or (job,) for job in done}
    return [tuple(gang) for gang in found.values()]


@given(routed_strategy, st.sampled_from(DISCIPLINES), st.integers(1, 2))
def test_batches_hold_one_gang_and_nobody_runs_twice(
    drawn: list[tuple[int, int, int, int]], discipline: str, nodes: int
) -> None:
    """All jobs finish; a gang is of one route and model, within its cap, takes its batch's time, and fits its node."""
    done = run_pool(routed_jobs(drawn), nodes=nodes, gpus=2, discipline=discipline)
    gangs = gangs_of(done)

    assert sorted(job.number for gang in gangs for job in gang) == list(range(len(drawn)))
    for gang in gangs:
        assert len({(job.route, job.model_key, job.node, job.cloud_start_s, job.cloud_stop_s) for job in gang}) == 1
        assert len(gang) <= len(gang[0].route.batch_s)
        assert gang[0].cloud_stop_s == gang[0].cloud_start_s + gang[0].route.batch_s[len(gang) - 1]
        assert all(job.cloud_start_s >= job.cloud_ready_s for job in gang)
        alongside = [
            other[0].degree
            for other in gangs
            if other[0].node == gang[0].node and other[0].cloud_start_s <= gang[0].cloud_start_s < other[0].cloud_stop_s
        ]
        assert sum(alongside) <= 2


@given(routed_strategy, st.sampled_from(DISCIPLINES))
def test_a_batch_leaves_nobody_behind_who_was_first(drawn: list[tuple[int, int, int, int]], discipline: str) -> None:
    """Jobs of one route and model start in the order of the queue, and a gang that leaves one waiting is full."""
    done = run_pool(routed_jobs(drawn), nodes=1, gpus=2, discipline=discipline)
    for gang in gangs_of(done):
        head, start_s = gang[0], gang[0].cloud_start_s
        left = [
            job
            for job in done
            if (job.route, job.model_key) == (head.route, head.model_key)
            and job.cloud_ready_s < start_s < job.cloud_start_s
        ]
        rank = (lambda job: job.deadline_s) if discipline == "edf" else (lambda job: job.cloud_ready_s)
        mates = [job for job in gang if job.cloud_ready_s < start_s]
        assert all(rank(mate) <= rank(job) for mate in mates for job in left)
        assert not left or len(gang) == len(head.route.batch_s) or discipline == "backfill"


def test_a_batch_takes_its_mates_from_anywhere_in_the_queue() -> None:
    """Those of another route keep their place; the one that finds a free node alone does not wait for company."""
    route = Route((2.0, 3.0, 4.0))
    first, other, second, third = PoolJob(0, 1, 2.0), PoolJob(1, 1, 5.0), PoolJob(2, 1, 2.0), PoolJob(3, 1, 2.0)
    head = PoolJob(4, 1, 2.0)
    for job in (head, first, second, third):
        job.route = route
    run_pool([(0.0, head), (0.5, first), (0.6, other), (0.7, second), (0.8, third)], nodes=1)

    assert head.batch is None
    assert head.cloud_stop_s == 2.0
    assert first.batch == second.batch == third.batch == (first, second, third)
    assert [first.cloud_stop_s, third.cloud_stop_s, other.cloud_start_s] == [6.0, 6.0, 6.0]


def test_an_overloaded_pool_serves_full_batches() -> None:
    """A queue that never empties is served at the cap over the batch's time, whatever one alone would take."""
    route, jobs = Route((1.0, 1.5, 2.0, 2.5)), []
    for number in range(401):
        job = PoolJob(number, 1, 1.0)
        job.route = route
        jobs.append((0.001 * number, job))
    done = run_pool(jobs, nodes=1)

    assert max(job.cloud_stop_s for job in done) == pytest.approx(1.0 + 100 * 2.5)


def test_a_batch_in_a_gap_does_not_delay_the_gang_behind() -> None:
    """Backfill takes along only as many as are done before the reserved start."""
    route = Route((1.0, 1.5, 9.0))
    long, gang = PoolJob(0, 1, 4.0), PoolJob(1, 2, 3.0)
    small = [PoolJob(2 + n, 1, 1.0) for n in range(3)]
    for job in small:
        job.route = route
    others = [(0.0, PoolJob(8, 1, 1.0)), (0.0, PoolJob(9, 2, 50.0))]
    run_pool(
        [(0.0, long), *others, (0.5, gang), *((0.6, job) for job in small)], nodes=2, gpus=2, discipline="backfill"
    )

    assert [job.cloud_start_s for job in small] == [1.0, 1.0, 2.5]
    assert gang.cloud_start_s == 4.0


def taken_away(*lives_s: float, replacement_s: float) -> Preemption:
    """Nodes whose lives last so long, in the order in which they begin; after that for ever."""
    left = iter(lives_s)
    return Preemption(lambda _: next(left, 1e9), replacement_s)


@pytest.mark.parametrize("discipline", DISCIPLINES)
def test_a_lost_job_starts_again_on_the_next_node(discipline: str) -> None:
    """Its work is to be done again in full, before its equals who waited; what it held so far is counted as lost."""
    lost, waiting = PoolJob(0, 2, 10.0), PoolJob(1, 2, 1.0)
    preemption = taken_away(4.0, replacement_s=3.0)
    run_pool([(0.0, lost), (1.0, waiting)], nodes=1, gpus=2, preemption=preemption, until=100.0, discipline=discipline)

    assert (lost.cloud_ready_s, lost.cloud_start_s, lost.cloud_stop_s) == (0.0, 7.0, 17.0)
    assert (lost.restarts, lost.lost_gpu_s) == (1, 8.0)
    assert (waiting.cloud_start_s, waiting.restarts) == (17.0, 0)


def test_a_lost_batch_is_lost_in_equal_parts() -> None:
    """Each request of a batch bears its part of the lost GPU-seconds, and they may go together again."""
    route = Route((2.0, 3.0))
    first, pair = PoolJob(0, 1, 2.0), (PoolJob(1, 1, 2.0), PoolJob(2, 1, 2.0))
    for job in (first, *pair):
        job.route = route
    jobs = [(0.0, first), (0.5, pair[0]), (0.6, pair[1])]
    run_pool(jobs, nodes=1, preemption=taken_away(4.0, replacement_s=1.0), until=100.0)

    assert [job.lost_gpu_s for job in (first, *pair)] == [0.0, 1.0, 1.0]
    assert [job.cloud_start_s for job in pair] == [5.0, 5.0]
    assert pair[0].batch == pair


def test_a_new_node_holds_no_model() -> None:
    """A model that was there is loaded again, also for the request that had found it there."""
    jobs = [(0.0, PoolJob(0, 1, 1.0)), (2.0, PoolJob(1, 1, 5.0))]
    for _, job in jobs:
        job.load_s = 0.5
    done = run_pool(jobs, nodes=1, resident_models=1, preemption=taken_away(4.0, replacement_s=1.0), until=50.0)

    assert [job.load_s for job in done] == [0.5, 0.5]
    assert done[1].cloud_stop_s == 5.0 + 0.5 + 5.0


def test_a_request_that_led_no_batch_keeps_its_own_load() -> None:
    """Whoever rode along in a batch that was lost loads its model itself when it starts alone later."""
    route = Route((2.0, 3.0))
    starter, urgent, first, other, last = (PoolJob(n, 1, 2.0, 10.0 * n) for n in range(5))
    for job in (urgent, first, last):
        job.route, job.model_key = route, 1
    for job in (starter, urgent, first, other, last):
        job.load_s = 0.5
    jobs = [(0.0, starter), (0.1, first), (0.1, last), (3.0, urgent), (3.0, other)]
    preemption = taken_away(4.0, replacement_s=1.0)
    run_pool(jobs, nodes=1, discipline="edf", resident_models=1, preemption=preemption, until=50.0)

    assert (first.restarts, last.restarts) == (1, 1)
    assert urgent.batch == first.batch == (urgent, first)
    assert [job.load_s for job in (urgent, first, other, last)] == [0.5] * 4


def test_a_head_reserves_no_node_that_is_away_before_it_is_back() -> None:
    """Backfill counts on a node from its replacement on, and lets nobody in who would still run then."""
    preemption = taken_away(1.0, replacement_s=20.0)
    away_for_long, busy = PoolJob(0, 1, 0.5), PoolJob(1, 1, 6.0)
    gang, short, slow = PoolJob(2, 2, 1.0), PoolJob(3, 1, 2.0), PoolJob(4, 1, 9.0)
    jobs = [(0.0, away_for_long), (1.5, busy), (2.0, gang), (3.0, short), (3.1, slow)]
    run_pool(jobs, nodes=2, gpus=2, discipline="backfill", preemption=preemption, until=100.0)

    assert gang.cloud_start_s == busy.cloud_stop_s == 7.5
    assert short.cloud_start_s == 3.0
    assert slow.cloud_start_s == 8.5


@given(
    routed_strategy,
    st.sampled_from(DISCIPLINES),
    st.lists(st.integers(1, 9), max_size=8),
    st.integers(0, 8),
    st.sampled_from([None, 1]),
)
def test_a_node_that_is_away_runs_nothing(
    drawn: list[tuple[int, int, int, int]],
    discipline: str,
    lives: list[int],
    replacement: int,
    resident: int | None,
) -> None:
    """However nodes come and go: every job finishes once, on a node that is there from its last start to its stop."""
    spans: dict[int, list[float]] = {0: [], 1: []}
    left = iter(lives)

    def up_s(node: int) -> float:
        spans[node].append(next(left, 1e6) + 0.37)
        return spans[node][-1]

    jobs = routed_jobs(drawn)
    settings = {"discipline": discipline, "resident_models": resident, "until": 1e5}
    done = run_pool(jobs, nodes=2, gpus=2, preemption=Preemption(up_s, float(replacement)), **settings)

    assert sorted(job.number for job in done) == list(range(len(drawn)))
    for job in done:
        begin_s = 0.0
        for life_s in spans[job.node]:
            end_s = begin_s + life_s
            assert (
                job.cloud_stop_s <= begin_s
                or job.cloud_start_s >= end_s
                or (begin_s <= job.cloud_start_s and job.cloud_stop_s <= end_s)
            )
            begin_s = end_s + replacement
            assert job.cloud_stop_s <= end_s or job.cloud_start_s >= begin_s
        assert job.restarts or not job.lost_gpu_s


@given(routed_strategy, st.sampled_from(DISCIPLINES), st.lists(st.integers(1, 9), max_size=8))
def test_a_pool_that_is_done_shows_nothing_outstanding(
    drawn: list[tuple[int, int, int, int]], discipline: str, lives: list[int]
) -> None:
    """Whatever was batched or lost: what the view counts up, it counts down again, and it counts nobody twice."""
    env, view_of, done = simpy.Environment(), [], []

    def check(job: PoolJob) -> None:
        done.append(job)
        assert 0 <= view_of[0].queued <= len(drawn) - len(done)
        assert view_of[0].backlog_gpu_s >= -1e-9

    preemption = taken_away(*(life + 0.37 for life in lives), replacement_s=3.0)
    pool: GpuPool[PoolJob] = GpuPool(
        env, nodes=2, gpus_per_node=2, discipline=discipline, done=check, preemption=preemption
    )
    view_of.append(pool.view)
    for at, job in routed_jobs(drawn):
        job.work = 1.0
        env.timeout(at).callbacks.append(lambda _, job=job: pool.submit(job))
    env.run(until=1e4)
    view = pool.view

    assert len(done) == len(drawn)
    assert (view.queued, view.busy_gpus, view.largest_free) == (0, 0, 2)
    assert (view.declared_work, view.backlog_gpu_s, view.busy_until_gpu_s) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("load", [0.3, 1.0, 2.0])
def test_a_job_under_preemption_takes_as_long_as_theory_says(load: float) -> None:
    """With nodes replaced at once, work h lost at rate v takes (exp(v h) - 1) / v in the mean (99.99% interval)."""
    rng, size = np.random.default_rng(7), 20_000
    jobs = [(0.0, PoolJob(number, 1, load)) for number in range(size)]
    preemption = Preemption(lambda _: float(rng.exponential(1.0)), 0.0)
    done = run_pool(jobs, nodes=1, preemption=preemption, until=size * exp(load) * 2)
    stops = np.array([0.0, *(job.cloud_stop_s for job in done)])
    took = np.diff(stops)
    error = took.std(ddof=1) / np.sqrt(size)

    assert len(done) == size
    assert abs(took.mean() - (exp(load) - 1.0)) < 3.9 * error
    assert error < 0.03 * took.mean()
    assert sum(job.restarts for job in done) == pytest.approx(size * (exp(load) - 1.0), rel=0.1)


@given(jobs_strategy, st.sampled_from(DISCIPLINES))
def test_a_pool_that_loses_no_node_is_as_one_that_cannot(
    drawn: list[tuple[float, int, float, float]], discipline: str
) -> None:
    """Lives that never end change no start, stop or node."""
    runs = []
    for preemption in (None, Preemption(lambda _: 1e9, 1.0)):
        jobs = [(at, PoolJob(i, degree, hold, deadline)) for i, (at, degree, hold, deadline) in enumerate(drawn)]
        done = run_pool(jobs, nodes=2, gpus=4, discipline=discipline, preemption=preemption, until=1e4)
        runs.append([(job.number, job.node, job.cloud_start_s, job.cloud_stop_s) for job in done])

    assert runs[0] == runs[1]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 3), st.floats(0, 0.999)), max_size=40), st.booleans())
def test_edge_devices_serve_one_at_a_time(drawn: list[tuple[float, float, float]], shared: bool) -> None:
    """No device runs two requests at once or one that is not ready; a shared fleet keeps no one from a free device."""
    fleet = EdgeDevices(3, shared=shared)
    served = []
    for ready, hold, draw in sorted(drawn):
        device, start = fleet.serve(ready, hold, draw)
        assert start >= ready
        assert 0 <= device < 3
        assert all(other != device or stop <= start for other, _, stop in served)
        if shared and start > ready:
            assert sum(begin <= ready < stop for _, begin, stop in served) == 3
        served.append((device, start, start + hold))
