"""Holds a live run against its replay: figures of both, how far the simulation is off, and whether that is near enough.

A run is compared as a whole, the requests of all its parts together. Both sides have the same requests, so that figures
are compared in pairs. Intervals are 95% percentile intervals of the moving block bootstrap (Künsch, Annals of
Statistics 17, 1989): requests are drawn again in blocks of neighbours, live and simulated together, because requests
that share a queue depend on each other. A block is as long as the live latencies are correlated (`block_length`);
without correlation it is one request, which is the ordinary paired bootstrap. Blocks may run over the end of a part
into the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import RunError
from hybridsd_sim.simulation import SERVED, Records, column, in_time

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000

NAN = math.nan

LIMITS: tuple[tuple[float, Mapping[str, float]], ...] = (
    (0.6, {"latency_p50_s": 0.05, "latency_mean_s": 0.05, "served_per_s": 0.05, "latency_p95_s": 0.10}),
    (0.8, {"latency_p50_s": 0.10, "latency_mean_s": 0.10, "served_per_s": 0.10, "latency_p95_s": 0.15}),
)
"""By how much, relative to the live run, a simulation may be off at loads up to the first number."""


SIDES = ("cloud", "edge")

Pair = tuple[Records, Records]
"""A part of a live run, and its replay."""


class RequestTimes(NamedTuple):
    """The requests of a run as arrays: seconds of latency, of waiting for workers, and of holding the busiest one.

    `span_s` is the time from first arrival to last image, of all parts together.
    """

    latency_s: Floats
    wait_s: Floats
    held_s: Floats
    in_time: Floats
    span_s: float

    @property
    def served_per_s(self) -> float:
        """Throughput, from the first arrival to the last image of each part."""
        return len(self.latency_s) / self.span_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of both runs. `off` is simulated over live less 1, or for shares simulated less live.

    `low` and `high` bound it, NaN where that cannot be told. `limit` is None for figures that nothing is asked of.
    """

    name: str
    live: float
    simulated: float
    off: float
    low: float
    high: float
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figure is as near as is asked."""
        return self.limit is None or abs(self.off) <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A live run against its replay; `block` is the number of requests in a block of the bootstrap."""

    load: float
    requests: int
    block: int
    figures: tuple[Figure, ...]

    @property
    def holds(self) -> bool | None:
        """Whether every figure is as near as is asked; None at loads of which nothing is asked."""
        if all(figure.limit is None for figure in self.figures):
            return None
        return all(figure.holds for figure in self.figures)

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)


Statistic = Callable[[RequestTimes, npt.NDArray[np.intp]], float]

RELATIVE: Mapping[str, Statistic] = {
    "latency_mean_s": lambda run, at: float(run.latency_s[at].mean()),
    "latency_p50_s": lambda run, at: float(np.percentile(run.latency_s[at], 50)),
    "latency_p95_s": lambda run, at: float(np.percentile(run.latency_s[at], 95)),
    "latency_p99_s": lambda run, at: float(np.percentile(run.latency_s[at], 99)),
    "wait_mean_s": lambda run, at: float(run.wait_s[at].mean()),
    "held_mean_s": lambda run, at: float(run.held_s[at].mean()),
}
"""Figures whose difference is told relative to the live run."""

SHARES: Mapping[str, Statistic] = {
    "utilisation": lambda run, at: float(run.held_s[at].mean()) * len(run.held_s) / run.span_s,
    "slo_attainment": lambda run, at: float(run.in_time[at].mean()),
}
"""Figures whose difference is told in shares of 1."""


def compare(parts: Sequence[Pair], load: float, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare the parts of a live run with their replays, pair by pair.

    Raises `RunError` if two of a pair have not the same requests, or if a request was not served.
    """
    for live, simulated in parts:
        if len(live) != len(simulated):
            raise RunError(f"{len(live)} requests were served live and {len(simulated)} in the simulation")
    # Held the longest, live: the worker whose queue makes the waiting.
    side = max(SIDES, key=lambda side: sum(float(_seconds(live.rows(), side)[1].sum()) for live, _ in parts))
    pair = tuple(_request_times([part[which] for part in parts], side) for which in (0, 1))
    count = len(pair[0].latency_s)
    block = block_length(pair[0].latency_s)
    draws = resample_blocks(count, block, resamples, np.random.default_rng(seed))
    limits = limits_at(load)
    whole = np.arange(count)
    figures = [_figure(name, how, pair, whole, draws, _relative, limits.get(name)) for name, how in RELATIVE.items()]
    # throughput is one figure a run, so that there is no interval
    rates, limit = [run.served_per_s for run in pair], limits.get("served_per_s")
    off = _relative(*rates)
    rate = Figure(name="served_per_s", live=rates[0], simulated=rates[1], off=off, low=NAN, high=NAN, limit=limit)
    figures.append(rate)
    figures += [
        _figure(name, how, pair, whole, draws, lambda live, simulated: simulated - live, None)
        for name, how in SHARES.items()
    ]
    return Comparison(load=load, requests=count, block=block, figures=tuple(figures))


def limits_at(load: float) -> Mapping[str, float]:
    """By how much, relative to live, each figure may be off at a load (`LIMITS`); empty above the loads named there."""
    return next((limits for most, limits in LIMITS if load <= most + 1e-9), {})


def _request_times(parts: Sequence[Records], busiest: str) -> RequestTimes:
    """The requests of all parts, one part after the other. Raises `RunError` unless all of them were served."""
    span_s = 0.0
    for part in (records.rows() for records in parts):
        if not len(part) or (column(part, "status") != SERVED).any():
            raise RunError(f"{int((column(part, 'status') != SERVED).sum())} of {len(part)} requests were not served")
        span_s += float(column(part, "finish_s").max() - column(part, "arrival_s").min())
    rows = np.concatenate([records.rows() for records in parts])
    arrival_s, finish_s = column(rows, "arrival_s"), column(rows, "finish_s")
    return RequestTimes(
        latency_s=finish_s - arrival_s,
        wait_s=sum((_seconds(rows, side)[0] for side in SIDES), np.zeros(len(rows))),
        held_s=_seconds(rows, busiest)[1],
        in_time=in_time(finish_s, column(rows, "deadline_s")).astype(float),
        span_s=span_s,
    )


def _seconds(rows: np.ndarray, side: str) -> tuple[Floats, Floats]:
    """Seconds that each request waited for a side's worker, and held it; 0 without one."""
    ready, start, stop = (column(rows, f"{side}_{point}_s") for point in ("ready", "start", "stop"))
    return np.nan_to_num(start - ready), np.nan_to_num(stop - start)


def _relative(live: float, simulated: float) -> float:
    return simulated / live - 1.0 if live else NAN if simulated else 0.0


def _figure(
    name: str,
    how: Statistic,
    pair: Sequence[RequestTimes],
    whole: npt.NDArray[np.intp],
    draws: npt.NDArray[np.intp],
    off: Callable[[float, float], float],
    limit: float | None,
) -> Figure:
    live, simulated = (how(run, whole) for run in pair)
    again = np.array([off(*(how(run, at) for run in pair)) for at in draws])
    low, high = np.percentile(again, [2.5, 97.5]) if np.isfinite(again).all() else (NAN, NAN)
    return Figure(
        name=name, live=live, simulated=simulated, off=off(live, simulated), low=float(low), high=float(high),
        limit=limit,
    )  # fmt: skip


def block_length(values: Floats) -> int:
    """Requests until the autocorrelation is lost in noise, below 2 / sqrt(n); at most an eighth of them all.

    1 for a series that is not correlated.
    """
    count = len(values)
    centred = values - values.mean()
    power = float(centred @ centred)
    if count < 16 or power <= 1e-12 * float(values @ values):
        return 1
    longest = count // 8
    for lag in range(1, longest):
        if float(centred[:-lag] @ centred[lag:]) / power < 2.0 / math.sqrt(count):
            return lag
    return longest


def resample_blocks(count: int, block: int, times: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Positions of requests drawn again in blocks of neighbours: (times, count), each row a series of its own.

    Blocks of `block` neighbours begin anywhere and may overlap; the last one is cut off at `count`.
    """
    blocks = -(-count // block)
    starts = rng.integers(0, count - block + 1, size=(times, blocks, 1))
    return (starts + np.arange(block)).reshape(times, -1)[:, :count]
