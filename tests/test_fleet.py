"""Laws of pools and edge fleets: theory's queues, gangs, disciplines, residency."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.fleet import EdgeFleet, Job, Pool
from hybridsd_sim.queueing import erlang_c

DISCIPLINES = ("fifo", "gang_fifo", "backfill", "edf")


def run_pool(jobs: Iterable[tuple[float, Job]], *, nodes: int, gpus: int = 1, **settings: object) -> list[Job]:
    """Submit each (time, job) to a pool and return the jobs in the order in which they finished."""
    env, finished = simpy.Environment(), []
    pool: Pool[Job] = Pool(
        env, nodes=nodes, gpus_per_node=gpus, discipline=str(settings.pop("discipline", "fifo")),
        done=finished.append, **settings,  # type: ignore[arg-type]
    )  # fmt: skip

    def submit(job: Job) -> Callable[[simpy.Event], None]:
        return lambda _: pool.submit(job)

    for at, job in jobs:
        env.timeout(at).callbacks.append(submit(job))
    env.run()
    return finished


def waits(jobs: Iterable[Job]) -> np.ndarray:
    """Seconds that each job waited for its gang."""
    return np.array([job.cloud_start_s - job.cloud_ready_s for job in jobs])


def poisson_jobs(seed: int, rate: float, holds: np.ndarray) -> list[tuple[float, Job]]:
    """Single-GPU jobs with these holding times, arriving at random."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(holds)))
    return [(float(at), Job(i, 1, float(hold))) for i, (at, hold) in enumerate(zip(times, holds, strict=True))]


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
    jobs = [(at, Job(i, degree, hold, deadline)) for i, (at, degree, hold, deadline) in enumerate(drawn)]
    done = run_pool(jobs, nodes=nodes, gpus=4, discipline=discipline)

    assert sorted(job.number for job in done) == list(range(len(drawn)))
    for job in done:
        alongside = [o for o in done if o.node == job.node and o.cloud_start_s <= job.cloud_start_s < o.cloud_stop_s]
        assert sum(other.degree for other in alongside) <= 4
        assert job.cloud_start_s >= job.cloud_ready_s


@given(jobs_strategy, st.sampled_from(DISCIPLINES))
def test_nobody_waits_for_an_empty_pool(drawn: list[tuple[float, int, float, float]], discipline: str) -> None:
    """Work conservation: while a job of one GPU waits at the head, no node has a GPU free (single-GPU jobs)."""
    jobs = [(at, Job(i, 1, hold, deadline)) for i, (at, _, hold, deadline) in enumerate(drawn)]
    done = run_pool(jobs, nodes=2, gpus=1, discipline=discipline)
    for job in done:
        if job.cloud_start_s > job.cloud_ready_s:
            busy = [o for o in done if o.cloud_start_s <= job.cloud_ready_s < o.cloud_stop_s]
            assert len(busy) == 2


def staged(discipline: str) -> dict[str, float]:
    """Start times on two nodes of two GPUs, of which one GPU is free: a gang of two waits and two small jobs follow."""
    named = {
        "long": (0.0, Job(0, 2, 10.0, 99.0)),
        "half": (0.0, Job(1, 1, 4.0, 98.0)),
        "gang": (1.0, Job(2, 2, 3.0, 97.0)),
        "short": (2.0, Job(3, 1, 1.0, 96.0)),
        "slow": (2.5, Job(4, 1, 9.0, 1.0)),
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
        "left": (0.0, Job(0, 1, 4.0)),
        "right": (0.0, Job(1, 2, 2.0)),
        "gang": (1.0, Job(2, 2, 3.0)),
        "small": (1.5, Job(3, 1, 1.0)),
    }
    run_pool(named.values(), nodes=2, gpus=2, discipline="gang_fifo")

    assert named["gang"][1].cloud_start_s == 2.0
    assert named["small"][1].cloud_start_s == 1.5


def test_edf_serves_the_most_urgent_first_and_priority_before_that() -> None:
    """Among waiting jobs the earliest deadline starts first; a higher priority goes before any deadline."""
    first, late, soon, vip = Job(0, 1, 5.0, 9.0), Job(1, 1, 1.0, 90.0), Job(2, 1, 1.0, 10.0), Job(3, 1, 1.0, 99.0)
    vip.priority = 1
    run_pool([(0.0, first), (1.0, late), (2.0, soon), (3.0, vip)], nodes=1, discipline="edf")

    assert [vip.cloud_start_s, soon.cloud_start_s, late.cloud_start_s] == [5.0, 6.0, 7.0]


def test_a_job_goes_to_the_node_that_holds_its_model() -> None:
    """With one resident model a node, a second model loads once and is then found where it is."""
    jobs = [(float(3 * i), Job(i, 1, 1.0)) for i in range(6)]
    for index, (_, job) in enumerate(jobs):
        job.model_key, job.load_s = index % 2, 0.5
    done = run_pool(jobs, nodes=2, resident_models=1)

    assert [job.load_s for job in done] == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_least_recently_used_model_makes_room() -> None:
    """A node that keeps two models and is asked for A, B, A, C, A, B loads A, B, C and B again."""
    jobs = [(float(3 * i), Job(i, 1, 1.0)) for i in range(6)]
    for key, (_, job) in zip([0, 1, 0, 2, 0, 1], jobs, strict=True):
        job.model_key, job.load_s = key, 0.5
    done = run_pool(jobs, nodes=1, resident_models=2)

    assert [job.load_s for job in done] == [0.5, 0.5, 0.0, 0.5, 0.0, 0.5]


def test_a_cold_pool_starts_nothing_before_it_is_up() -> None:
    """Nodes rented at time 0 serve from their cold start on, in the order of arrival."""
    jobs = [(0.0, Job(0, 1, 1.0)), (1.0, Job(1, 1, 1.0))]
    done = run_pool(jobs, nodes=1, cold_start_s=30.0)

    assert [job.cloud_start_s for job in done] == [30.0, 31.0]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 3), st.floats(0, 0.999)), max_size=40), st.booleans())
def test_edge_devices_serve_one_at_a_time(drawn: list[tuple[float, float, float]], shared: bool) -> None:
    """No device runs two requests at once or one that is not ready; a shared fleet keeps no one from a free device."""
    fleet = EdgeFleet(3, shared=shared)
    served = []
    for ready, hold, draw in sorted(drawn):
        device, start = fleet.serve(ready, hold, draw)
        assert start >= ready
        assert 0 <= device < 3
        assert all(other != device or stop <= start for other, _, stop in served)
        if shared and start > ready:
            assert sum(begin <= ready < stop for _, begin, stop in served) == 3
        served.append((device, start, start + hold))
