from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.profiling import Timing
from executors.profiling.devices import DeviceMeter
from executors.profiling.timing import Meter, Stopwatch, measure
from hybridsd_sim.errors import InputError


class Clock:
    """A clock that work moves forward."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Work:
    """Takes as many seconds as its numbers say, one after the other."""

    def __init__(self, clock: Clock, seconds) -> None:
        self.clock, self.seconds, self.runs = clock, iter(seconds), 0

    def __call__(self) -> None:
        self.runs += 1
        self.clock.now_s += next(self.seconds)


def test_percentiles_lie_linearly_between_samples() -> None:
    """The median, the 5th and the 95th percentile of 1 s to 11 s are 6 s, 1.5 s and 10.5 s, in whatever order."""
    timing = Timing(tuple(float(second) for second in (11, 2, 3, 10, 5, 6, 7, 8, 9, 4, 1)))
    assert (timing.median_s, timing.p05_s, timing.p95_s) == pytest.approx((6.0, 1.5, 10.5))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_percentiles_never_fall(samples) -> None:
    """The 5th percentile is at most the median, which is at most the 95th, all within the samples."""
    timing = Timing(tuple(samples))
    slack = 1e-9 * max(samples)
    bounds = [min(samples) - slack, timing.p05_s, timing.median_s, timing.p95_s, max(samples) + slack]
    assert all(low <= high + slack for low, high in itertools.pairwise(bounds))


def test_warm_up_runs_are_not_timed() -> None:
    """Runs before the clock counts take their time and leave no sample; the samples keep the order of the runs."""
    clock = Clock()
    timed = [0.1 * number for number in range(1, 13)]
    work = Work(clock, [50.0, 40.0, 30.0, *timed])
    timing = measure(work, clock=clock, warmup_runs=3, runs=12)
    assert work.runs == 15
    assert np.allclose(timing.samples_s, timed)


@pytest.mark.parametrize(("warmup_runs", "runs", "place"), [(3, 9, "runs"), (0, 10, "warm-up runs")])
def test_a_protocol_without_percentiles_is_refused(warmup_runs, runs, place) -> None:
    """Fewer than ten runs, or none to warm up, are refused before anything runs."""
    clock = Clock()
    work = Work(clock, itertools.repeat(1.0))
    with pytest.raises(InputError) as error:
        measure(work, clock=clock, warmup_runs=warmup_runs, runs=runs)
    assert [problem.place for problem in error.value.problems] == [place]
    assert work.runs == 0


def test_energy_is_that_of_one_run() -> None:
    """What the meter read over all timed runs is divided by their number; warm-up runs are not in it."""
    clock = Clock()
    work = Work(clock, itertools.repeat(1.0))

    class Wattmeter(Meter):
        started_at = -1

        def start(self) -> None:
            self.started_at = work.runs

        def energy_j(self) -> float:
            return 7.0 * (work.runs - self.started_at)

    assert measure(work, clock=clock, warmup_runs=4, runs=10, meter=Wattmeter()).energy_j == pytest.approx(7.0)


def test_a_lap_begins_where_the_last_one_ended() -> None:
    """Laps of a stopwatch cover the time since its start without gaps."""
    clock = Clock()
    watch = Stopwatch(clock)
    watch.start()
    for seconds in (1.0, 0.5, 2.0):
        clock.now_s += seconds
        watch.lap()
    assert watch.timing().samples_s == pytest.approx((1.0, 0.5, 2.0))


@contextmanager
def fresh_megabytes() -> Iterator[None]:
    """256 MiB straight from the system: an allocator may hand out again what earlier tests have freed."""
    with mmap(-1, 2**28) as pages:
        for _ in range(256):
            pages.write(bytes(2**20))
        yield


def test_a_peak_may_count_from_before_the_warm_up() -> None:
    """What runs held before the clock started counts where the timed ones, as replays, allocate nothing themselves."""
    meter, usual = DeviceMeter("cpu", peak_from_now=True), DeviceMeter("cpu")
    with fresh_megabytes():
        pass
    meter.start()
    with_warmup = meter.peak_memory_bytes()
    usual.start()
    if with_warmup is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert with_warmup > usual.peak_memory_bytes() + 200 * 2**20


def test_peak_memory_is_that_of_the_measurement() -> None:
    """The peak holds what was allocated since the start and not what an earlier measurement held."""
    meter = DeviceMeter("cpu")
    meter.start()
    before = meter.peak_memory_bytes()
    if before is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    with fresh_megabytes():
        large = meter.peak_memory_bytes()
    meter.start()
    assert large - before > 200 * 2**20
    assert meter.peak_memory_bytes() < large - 200 * 2**20
