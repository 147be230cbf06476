"""The scheduler's ledger against plain queues, event by event: who runs, when a gang could start, and where."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import InputError
from hybridsd_sim.scheduling import Worker, check_number
from hybridsd_sim.scheduling.ledger import LOST_S, LOST_TIMES, MAX_WORKERS, Ledger, WorkerJob

POOL = "pool"
GANGS = st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(1, 20), st.sampled_from([0.5, 1.0, 3.0]))
"""Seconds since the last arrival, GPUs, predicted seconds, and how many times as long it takes in truth."""


@dataclass
class Server:
    """A worker as it is: its head begins when its GPUs are free, and takes as long as it takes."""

    gpus: int
    running: list[tuple[float, WorkerJob]] = field(default_factory=list)
    waiting: list[tuple[float, WorkerJob]] = field(default_factory=list)

    @property
    def free(self) -> int:
        return self.gpus - sum(job.degree for _, job in self.running)

    def take(self, job: WorkerJob, takes_s: float, now: float) -> None:
        self.waiting.append((takes_s, job))
        self.begin(now)

    def begin(self, now: float) -> None:
        while self.waiting and self.waiting[0][1].degree <= self.free:
            takes_s, job = self.waiting.pop(0)
            self.running.append((now + takes_s, job))

    def next_stop_s(self) -> float:
        return min((stop_s for stop_s, _ in self.running), default=float("inf"))

    def stop(self) -> tuple[float, WorkerJob]:
        """The next end of a job, and who begins then."""
        first = min(self.running, key=lambda entry: (entry[0], entry[1].number))
        self.running.remove(first)
        self.begin(first[0])
        return first

    def start_s(self, degree: int, now: float) -> float:
        """When a gang would start that came now: the whole queue played forward, one event at a time."""
        if degree > self.gpus:
            return float("inf")
        copy = Server(self.gpus, list(self.running), list(self.waiting))
        probe = WorkerJob(-1, degree, 1.0, 0.0, now)
        copy.take(probe, 1.0, now)
        while not any(job is probe for _, job in copy.running):
            now, _ = copy.stop()
        return now


class Town:
    """Workers and their ledger, side by side."""

    def __init__(self, gpus: list[int]) -> None:
        self.servers = {f"w{index}": Server(count) for index, count in enumerate(gpus)}
        self.ledger = Ledger([POOL], [Worker(name, POOL, server.gpus) for name, server in self.servers.items()])
        self.now, self.number = 0.0, 0

    def pass_until(self, until_s: float) -> None:
        """Every end of a job up to then, told to the ledger when it happens."""
        while True:
            name, server = min(self.servers.items(), key=lambda item: item[1].next_stop_s())
            if not server.running or server.next_stop_s() > until_s:
                break
            self.now, job = server.stop()
            self.ledger.release(name, job.number, self.now)
        self.now = until_s if until_s < float("inf") else self.now

    def arrive(self, degree: int, hold_s: float, times: float) -> tuple[str | None, float]:
        self.number += 1
        self.ledger.view(self.now)
        placed = self.ledger.place(0, WorkerJob(self.number, degree, hold_s, 3 * degree, self.now), self.now)
        if placed[0] is not None:
            job = WorkerJob(self.number, degree, hold_s, 3 * degree, self.now)
            self.servers[placed[0]].take(job, times * hold_s, self.now)
        return placed

    def expected(self, degree: int) -> tuple[str | None, float]:
        """The first of the workers that could start soonest, and in how long."""
        waits = {name: server.start_s(degree, self.now) - self.now for name, server in self.servers.items()}
        best = min(waits, key=lambda name: waits[name])
        return (best if waits[best] < float("inf") else None), waits[best]

    @property
    def who_runs(self) -> set[int]:
        return {job.number for server in self.servers.values() for _, job in server.running}

    @property
    def held_to_run(self) -> set[int]:
        return {
            number for pool in self.ledger.view(self.now).pools for queue in pool.queues for number in queue.running
        }


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(GANGS, max_size=25))
def test_exact_predictions_give_exact_starts(gpus: list[int], gangs: list[tuple[int, int, int, float]]) -> None:
    """Worker and wait of every gang are those of the queues played forward; of workers that are equal, the first."""
    town = Town(gpus)
    for gap_s, degree, hold_s, _ in gangs:
        town.pass_until(town.now + gap_s)
        view = town.ledger.view(town.now).pools[0]

        assert [view.wait_s(d, town.now) for d in range(1, 6)] == [town.expected(d)[1] for d in range(1, 6)]
        assert town.expected(degree) == town.arrive(degree, float(hold_s), 1.0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(GANGS, max_size=25))
def test_the_ledger_knows_who_runs_however_wrong_predictions_are(
    gpus: list[int], gangs: list[tuple[int, int, int, float]]
) -> None:
    """Early or late, whoever has its GPUs is held to run and nobody else; in the end nothing is left over."""
    town = Town(gpus)
    for gap_s, degree, hold_s, times in gangs:
        town.pass_until(town.now + gap_s)
        town.arrive(degree, float(hold_s), times)
        pool = town.ledger.view(town.now).pools[0]

        assert town.held_to_run == town.who_runs
        assert pool.queued == sum(len(server.waiting) for server in town.servers.values())
        assert all(pool.wait_s(d, town.now) >= 0.0 for d in range(1, 5))
    town.pass_until(float("inf"))
    pool = town.ledger.view(town.now).pools[0]

    assert (pool.queued, pool.declared_work) == (0, 0)
    assert {(state.queued, state.left_s) for state in town.ledger.states(town.now)} == {(0, 0.0)}
    assert pool.wait_s(1, town.now) == 0.0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(GANGS, max_size=30), st.randoms())
def test_cancelled_gangs_leave_no_trace(gpus: list[int], gangs: list[tuple[int, int, int, float]], random) -> None:
    """Jobs that are taken out in any order, waiting or running, twice too, leave idle workers."""
    town = Town(gpus)
    given = []
    for gap_s, degree, hold_s, _ in gangs:
        town.now += gap_s
        worker, _ = town.arrive(degree, float(hold_s), 1.0)
        given += [(worker, town.number)] * 2 if worker else []
    random.shuffle(given)
    for worker, number in given:
        town.ledger.release(worker, number, town.now)
    pool = town.ledger.view(town.now).pools[0]

    assert (pool.queued, pool.declared_work) == (0, 0)
    assert [pool.wait_s(d, town.now) for d in range(1, max(gpus) + 1)] == [0.0] * max(gpus)


def test_a_gang_waits_for_its_gpus_and_everybody_behind_it() -> None:
    """Of four GPUs three are busy until 10: a gang of two waits, and so does a single one behind it."""
    ledger = Ledger([POOL], [Worker("a", POOL, 4)])
    waits = [ledger.place(0, WorkerJob(n, degree, 10.0, 1, 0.0), 0.0)[1] for n, degree in enumerate((3, 2, 1))]

    assert waits == [0.0, 10.0, 10.0]


def test_a_gang_that_fits_nowhere_waits_for_ever() -> None:
    """Five GPUs on workers of four, or on none at all: no worker, and no end of waiting."""
    for workers in ([], [Worker("a", POOL, 4)]):
        ledger = Ledger([POOL], workers)

        assert ledger.place(0, WorkerJob(1, 5, 1.0, 1, 0.0), 0.0) == (None, float("inf"))
        assert ledger.view(0.0).pools[0].declared_work == 0


PICTURES = 900


def times_chosen(load: float) -> list[int]:
    """How often a worker of four is chosen that never ends anything, in each of four periods before that is lost."""
    ledger = Ledger([POOL], [Worker(name, POOL) for name in "abcd"])
    ends: deque[tuple[float, str, int]] = deque()
    chosen, free_s = [], dict.fromkeys("acd", 0.0)
    for number in range(PICTURES):
        now = number / (4 * load)
        while ends and ends[0][0] <= now:
            stop_s, name, done = ends.popleft()
            ledger.release(name, done, stop_s)
        ledger.view(now)
        name, _ = ledger.place(0, WorkerJob(number, 1, 1.0, 1, now), now)
        chosen.append(name)
        if name != "b":
            free_s[name] = max(now, free_s[name]) + 1.0
            insort(ends, (free_s[name], name, number))
    return [chosen[first : first + PICTURES // 4].count("b") for first in range(0, PICTURES, PICTURES // 4)]


@pytest.mark.parametrize("load", [0.4, 0.6, 0.74])
def test_a_worker_that_hangs_is_chosen_less_and_less(load: float) -> None:
    """While the others can do it all, also when they queue, it soon gets next to nothing."""
    quarters = times_chosen(load)

    assert quarters == sorted(quarters, reverse=True)
    assert quarters[-1] <= 2


def test_a_worker_that_hangs_gets_little_where_nobody_is_free_either() -> None:
    """In overload, where all look busier and busier, it gets a small part of its share of a quarter."""
    assert sum(times_chosen(1.2)) < 0.05 * PICTURES


@pytest.mark.parametrize("hold_s", [2.0, 100.0])
def test_an_end_that_is_never_told_keeps_nobody_busy_for_ever(hold_s: float) -> None:
    """Overdue by so much a job is lost, not sooner, however often one looks; those behind it are when they are too."""
    ledger, allowed_s = Ledger([POOL], [Worker("a", POOL)]), max(LOST_S, LOST_TIMES * hold_s)
    for number in range(3):
        ledger.place(0, WorkerJob(number, 1, hold_s, 1, 0.0), 0.0)
    looks_s = [hold_s + share * allowed_s for share in (0.01, 0.5, 0.9, 1.0)]
    held = [ledger.states(now)[0].queued for now in looks_s]
    held += [ledger.states(looks_s[-1] + late_s)[0].queued for late_s in (0.1, hold_s + 0.1, 2 * hold_s + 0.1)]
    pool = ledger.view(looks_s[-1] + 2 * hold_s + 0.1).pools[0]

    assert held == [3, 3, 3, 3, 2, 1, 0]
    assert (pool.queued, pool.declared_work, pool.wait_s(1, looks_s[-1] + 2 * hold_s + 0.1)) == (0, 0, 0.0)


def test_an_end_that_is_told_after_all_changes_nothing() -> None:
    """A worker hung for an hour and has been given another job since: its old job's end is not the new one's."""
    ledger = Ledger([POOL], [Worker("a", POOL, 2)])
    ledger.place(0, WorkerJob(1, 2, 1.0, 1, 0.0), 0.0)
    ledger.view(3600.0)
    ledger.place(0, WorkerJob(2, 2, 5.0, 1, 3600.0), 3600.0)
    before = ledger.states(3601.0)
    ledger.release("a", 1, 3601.0)

    assert ledger.states(3601.0) == before == (replace(before[0], queued=1, left_s=4.0),)


def test_one_that_is_late_by_a_moment_is_not_taken_for_idle() -> None:
    """Who is overdue takes a little longer at least, so that an idle worker goes before it."""
    ledger = Ledger([POOL], [Worker(name, POOL) for name in "ab"])
    ledger.place(0, WorkerJob(1, 1, 10.0, 1, 0.0), 0.0)
    ledger.place(0, WorkerJob(2, 1, 1.0, 1, 0.0), 0.0)
    ledger.release("b", 2, 1.0)
    ledger.view(10.001)

    assert ledger.place(0, WorkerJob(3, 1, 10.0, 1, 10.001), 10.001) == ("b", 0.0)


@given(st.lists(GANGS, min_size=1, max_size=20), st.integers(0, 2), st.integers(1, 8))
def test_those_who_stay_keep_what_they_were_given(
    gangs: list[tuple[int, int, int, float]], leaver: int, gpus: int
) -> None:
    """Another worker's going or coming changes neither jobs nor predictions of the rest."""
    town = Town([4, 4, 4])
    for gap_s, degree, hold_s, times in gangs:
        town.pass_until(town.now + gap_s)
        town.arrive(degree, float(hold_s), times)
    before = {state.name: state for state in town.ledger.states(town.now)}
    town.ledger.leave(f"w{leaver}")
    stayed = town.ledger.states(town.now)
    town.ledger.join(Worker("new", POOL, gpus), town.now)
    joined = town.ledger.states(town.now)
    pool = town.ledger.view(town.now).pools[0]

    assert stayed == tuple(state for name, state in before.items() if name != f"w{leaver}")
    assert joined[:-1] == stayed
    assert (joined[-1].name, joined[-1].queued) == ("new", 0)
    assert pool.declared_work == sum(
        job.work for queue in pool.queues for job in (*queue.running.values(), *queue.waiting.values())
    )
    assert town.ledger.widest == (max(4, gpus),)
    assert pool.best(gpus, town.now)[1] == 0.0


@given(
    st.lists(GANGS, max_size=20),
    st.sets(st.sampled_from(["w0", "w1", "w2", "nobody"])),
    st.lists(st.builds(Worker, st.sampled_from(["w1", "w2", "new"]), st.just(POOL), st.integers(3, 8)),
             unique_by=lambda worker: worker.name, max_size=3),
)  # fmt: skip
def test_workers_exchanged_at_once_are_as_if_one_by_one(
    gangs: list[tuple[int, int, int, float]], gone: set[str], come: list[Worker]
) -> None:
    """Who goes, who comes, who comes back as another and who is there already: the same queues and predictions."""
    towns = [Town([4, 4, 4]) for _ in range(2)]
    for town in towns:
        for gap_s, degree, hold_s, times in gangs:
            town.pass_until(town.now + gap_s)
            town.arrive(degree, float(hold_s), times)
    now, (whole, single) = towns[0].now, (town.ledger for town in towns)
    whole.exchange(gone, come, now)
    for name in gone:
        single.leave(name)
    for worker in come:
        single.join(worker, now)
    ours, theirs = (ledger.view(now).pools[0] for ledger in (whole, single))

    assert whole.states(now) == single.states(now)
    assert (ours.queued, ours.declared_work, whole.widest) == (theirs.queued, theirs.declared_work, single.widest)
    assert [ours.best(d, now) for d in range(1, 9)] == [theirs.best(d, now) for d in range(1, 9)]


def test_a_worker_that_is_there_already_keeps_its_queue() -> None:
    """Told twice that it is up, it stays as it is; with other GPUs it is another worker, and idle."""
    ledger = Ledger([POOL], [Worker("a", POOL, 2)])
    ledger.place(0, WorkerJob(1, 2, 5.0, 1, 0.0), 0.0)
    ledger.join(Worker("a", POOL, 2), 1.0)
    again = ledger.states(1.0)
    ledger.join(Worker("a", POOL, 4), 1.0)

    assert [(state.queued, state.left_s) for state in again] == [(1, 4.0)]
    assert [(state.gpus, state.queued) for state in ledger.states(1.0)] == [(4, 0)]


def test_old_news_of_its_end_takes_no_worker_away() -> None:
    """A worker that came back at 10 is not the one that went at 5."""
    ledger = Ledger([POOL], [])
    ledger.join(Worker("a", POOL), 10.0)
    ledger.leave("a", 5.0)
    kept = "a" in ledger
    ledger.leave("a", 11.0)

    assert (kept, "a" in ledger) == (True, False)


def test_a_ledger_keeps_so_many_workers_and_no_more() -> None:
    """The number is bounded, and says so."""
    check_number(MAX_WORKERS)
    with pytest.raises(InputError, match="at most"):
        check_number(MAX_WORKERS + 1)
