"""One stopwatch for everything that is timed: warm-up runs first, the device synchronised, every sample kept.

A clock is a function without arguments that gives seconds once the device has finished its work
(`parallel.synchronised_clock`, or a rank's own `Group.clock`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hybridsd_sim.errors import InputError, Problem

Clock = Callable[[], float]

MIN_RUNS = 10
"""Fewer samples have no 5th and 95th percentile worth writing down."""


class Meter:
    """What else is read off while the clock runs. This one reads nothing; `devices.DeviceMeter` asks the machine."""

    def start(self) -> None:
        """Begin: what happened before does not count."""

    def peak_memory_bytes(self) -> int | None:
        """Most memory held at once since `start`; None where it cannot be told."""
        return None

    def energy_j(self) -> float | None:
        """Energy drawn since `start`; None where it cannot be told."""
        return None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every timed run, in order, and what was read off meanwhile; `energy_j` is the average of a run."""

    samples_s: tuple[float, ...]
    peak_memory_bytes: int | None = None
    energy_j: float | None = None

    def percentile_s(self, percent: float) -> float:
        """A percentile of the samples, linear between them."""
        return float(np.percentile(self.samples_s, percent))

    @property
    def median_s(self) -> float:
        return self.percentile_s(50)

    @property
    def p05_s(self) -> float:
        return self.percentile_s(5)

    @property
    def p95_s(self) -> float:
        return self.percentile_s(95)


@dataclass(slots=True)
class Stopwatch:
    """Times one run after the other: a lap ends a run and begins the next."""

    clock: Clock
    meter: Meter = field(default_factory=Meter)
    samples_s: list[float] = field(default_factory=list)
    _mark_s: float = 0.0

    def start(self) -> None:
        """Begin the first run."""
        self.meter.start()
        self._mark_s = self.clock()

    def lap(self) -> None:
        """End a run, keep its seconds, begin the next."""
        now_s = self.clock()
        self.samples_s.append(now_s - self._mark_s)
        self._mark_s = now_s

    def timing(self) -> Timing:
        """The laps so far, with the meter's readings at this moment."""
        energy_j = self.meter.energy_j()
        per_run_j = None if energy_j is None else energy_j / len(self.samples_s)
        return Timing(tuple(self.samples_s), self.meter.peak_memory_bytes(), per_run_j)


def measure(
    action: Callable[[], object],
    *,
    clock: Clock,
    warmup_runs: int = 3,
    runs: int = 10,
    meter: Meter | None = None,
) -> Timing:
    """Time `runs` runs of `action` after `warmup_runs` untimed ones. Raises `InputError` for too few of either.

    `clock` gives seconds once the device has finished its work, so that every sample holds the work of its own run. The
    meter runs over all timed runs together.
    """
    check_runs(warmup_runs, runs)
    for _ in range(warmup_runs):
        action()
    watch = Stopwatch(clock, meter or Meter())
    watch.start()
    for _ in range(runs):
        action()
        watch.lap()
    return watch.timing()


def check_runs(warmup_runs: int, runs: int) -> None:
    """Raises `InputError` where the protocol would not give a median and percentiles of a warm device."""
    problems = []
    if runs < MIN_RUNS:
        problems.append(Problem("runs", str(runs), f"percentiles need at least {MIN_RUNS} runs"))
    if warmup_runs < 1:
        problems.append(Problem("warm-up runs", str(warmup_runs), "the first run prepares kernels: at least 1"))
    if problems:
        raise InputError(problems)
