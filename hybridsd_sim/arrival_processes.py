"""When requests of a class come: arrival processes with a rate, played traces, and the GenTD26 generator.

A process gives its arrivals in order, in blocks, for ever (a trace ends). How many are drawn at a time never changes
what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import count
from pathlib import Path

import numpy as np

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.gentd26 import MEAN_GAP_S, GenTD26Generator, StreamOf
from hybridsd_sim.scenario import ArrivalSpec
from hybridsd_sim.traces import Floats, Ints, Trace, import_trace

DAY_S = 86_400.0
MAX_CV = 100.0
"""Gaps more uneven than this come in clumps of thousands of simultaneous requests: a mistake, not a workload."""
MAX_PEAK = 24.0
"""Peak over mean rate of a day whose requests all come in one hour."""
_DAY_CELLS = 1440

Marks = tuple[Ints | None, Ints | None, Ints | None]
"""Base model by rank, images and steps of each request; None, and 0, is the class's own."""
Block = tuple[Floats, Marks]
OWN: Marks = (None, None, None)


def arrival_blocks(spec: ArrivalSpec, stream_of: StreamOf, size: int) -> Iterator[Block]:
    """Arrival times in seconds, and marks, of a process; `size` at a time where that is free.

    `stream_of` gives a random stream for a word. Expects arrivals without `arrival_problems`.
    """
    if _plays_file(spec):
        yield from _from_trace(_trace_of(spec), _scale(spec), size)
    elif spec.process == "gentd26":
        for block in GenTD26Generator(_scale(spec)).blocks(stream_of):
            yield block.arrival_s, (block.base_model, block.num_images, block.num_inference_steps)
    else:
        for times in _steady(spec, stream_of("arrivals"), size):
            yield times, OWN


def _steady(spec: ArrivalSpec, rng: np.random.Generator, size: int) -> Iterator[Floats]:
    """Arrival times of the processes that have a rate; time 0 is an arbitrary moment of them, no renewal."""
    rate = spec.rate_per_s or math.nan
    if spec.process == "constant":
        return _per_second(_evenly(rng.random(), size), rate)
    if spec.process == "gamma":
        shape = spec.cv**-2
        gap = 1.0 / rate / shape
        # The first gap is what is left of the one that time 0 falls into; long gaps are hit in proportion to length.
        first = rng.random() * rng.standard_gamma(shape + 1.0) * gap
        return _renewals(first, lambda number: gap * rng.standard_gamma(shape, number), size)
    poisson = _renewals(rng.standard_exponential(), rng.standard_exponential, size)
    return _per_second(poisson, rate) if spec.process == "poisson" else _daily(poisson, rate, spec.peak_to_mean)


def _renewals(first: float, gaps: Callable[[int], Floats], size: int) -> Iterator[Floats]:
    """Times of a renewal process; the same however many are drawn at a time."""
    times = np.array([first])
    while True:
        yield times
        drawn = gaps(size)
        drawn[0] += times[-1]
        times = np.cumsum(drawn)


def _evenly(phase: float, size: int) -> Iterator[Floats]:
    for at in count(0, size):
        yield np.arange(at, at + size, dtype=np.float64) + phase


def _per_second(unit: Iterator[Floats], rate: float) -> Iterator[Floats]:
    for times in unit:
        yield times / rate


def _daily(poisson: Iterator[Floats], rate: float, peak_to_mean: float) -> Iterator[Floats]:
    """A Poisson process of a rate that follows the day: unit arrivals carried through the inverse of its integral."""
    requests = np.concatenate([[0.0], np.cumsum(daily_profile(peak_to_mean))]) * (rate * DAY_S / _DAY_CELLS)
    borders = np.linspace(0.0, DAY_S, _DAY_CELLS + 1)
    for times in poisson:
        day, rest = np.divmod(times, requests[-1])
        yield day * DAY_S + np.interp(rest, requests, borders)


@cache
def daily_profile(peak_to_mean: float) -> Floats:
    """Rate over its mean in every minute of a day; time 0 is where it rises through its mean.

    A sinusoid up to a peak of twice the mean; above, where that would turn negative, a raised cosine to the power that
    has the peak asked for.
    """
    swing = np.cos(2.0 * math.pi * (np.arange(_DAY_CELLS) + 0.5) / _DAY_CELLS - math.pi)
    profile = 1.0 + (peak_to_mean - 1.0) * swing if peak_to_mean <= 2.0 else _sharpened(swing, peak_to_mean)
    profile = np.roll(profile, -int(np.argmax(profile >= 1.0)))
    profile.setflags(write=False)  # it is shared by all callers
    return profile


def _sharpened(swing: Floats, peak_to_mean: float) -> Floats:
    low, high = 1.0, 2.0 * peak_to_mean**2
    for _ in range(60):
        power = (low + high) / 2.0
        # Mean of ((1 + cos x) / 2)^n over a turn.
        mean = math.exp(math.lgamma(power + 0.5) - math.lgamma(power + 1.0)) / math.sqrt(math.pi)
        low, high = (power, high) if 1.0 / mean < peak_to_mean else (low, power)
    profile: Floats = ((1.0 + swing) / 2.0) ** high
    profile /= profile.mean()
    return profile


def _from_trace(trace: Trace, scale: float, size: int) -> Iterator[Block]:
    models = _ranks(trace)
    for at in range(0, len(trace), size):
        part = slice(at, at + size)
        yield trace.arrival_s[part] * scale, (models[part], trace.num_images[part], trace.num_inference_steps[part])


def _ranks(trace: Trace) -> Ints:
    """Rank of each request's base model, 0 for the commonest and for requests that name none."""
    names, which, counts = np.unique(trace.base_model, return_inverse=True, return_counts=True)
    counts[names == ""] = 0
    ranks = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    ranks[names == ""] = 0
    return np.minimum(ranks, np.iinfo(np.int16).max)[which]


def arrival_problems(place: str, spec: ArrivalSpec) -> Iterator[Problem]:
    """What keeps arrivals from being drawn; `place` is their dotted path in the scenario."""
    broken = list(_broken(spec))
    for key, rule, remedy in broken:
        yield Problem(f"{place}.{key}", repr(getattr(spec, key)), rule, remedy)
    if not broken and _plays_file(spec):
        try:
            trace = _trace_of(spec)
        except InputError as error:
            yield from error.problems
            return
        if spec.process == "gentd26" and not trace.base_model.any():
            yield Problem(f"{place}.path", repr(spec.path), "names no base models", "Use process trace.")
        if spec.rate_per_s is not None and trace.span_s == 0.0:
            rule = "needs a trace whose requests do not all arrive at once"
            yield Problem(f"{place}.rate_per_s", repr(spec.rate_per_s), rule, "Remove it.")


def _broken(spec: ArrivalSpec) -> Iterator[tuple[str, str, str]]:
    """The rules of arrivals that do not hold, as (key, rule, remedy)."""
    process, rate = spec.process, spec.rate_per_s
    if rate is not None and not 0.0 < rate < math.inf:
        yield "rate_per_s", "must be above 0", "Remove the class if nobody asks."
    if process in {"trace", "gentd26"}:
        if process == "trace" and spec.path is None:
            yield "path", "must name a file when process is trace", "Give the path of a trace."
        if not 0.0 < spec.time_scale < math.inf:
            yield "time_scale", "must be above 0", "1 plays a trace as it was."
        elif rate is not None and spec.time_scale != 1.0:
            yield "time_scale", "must be 1 when rate_per_s sets the pace of a trace", "Give one of the two."
    elif rate is None:
        yield "rate_per_s", f"must be a number when process is {process}", "Give requests a second."
    if process == "gamma" and not 0.0 < spec.cv <= MAX_CV:
        yield "cv", f"must be above 0 and at most {MAX_CV:.0f}", "1 is Poisson."
    if process == "daily" and not 1.0 <= spec.peak_to_mean <= MAX_PEAK:
        yield "peak_to_mean", f"must be from 1 to {MAX_PEAK:.0f}", "1 has no day and night."


def _plays_file(spec: ArrivalSpec) -> bool:
    return spec.process in {"trace", "gentd26"} and spec.path is not None


def _trace_of(spec: ArrivalSpec) -> Trace:
    path = Path(spec.path or "")
    try:
        status = path.stat()
    except OSError:
        return import_trace(path)  # which says what is wrong
    return _remembered(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _remembered(path: Path, mtime_ns: int, size: int) -> Trace:  # noqa: ARG001 -- part of the key
    """A trace, read once for all policies and replications for as long as its file does not change."""
    return import_trace(path)


def _scale(spec: ArrivalSpec) -> float:
    """Factor on every gap of a trace or of the GenTD26 generator."""
    if spec.rate_per_s is None:
        return spec.time_scale
    if not _plays_file(spec):
        return 1.0 / (spec.rate_per_s * MEAN_GAP_S)
    trace = _trace_of(spec)
    return (len(trace) - 1) / (spec.rate_per_s * trace.span_s)


def mean_rate_per_s(spec: ArrivalSpec) -> float:
    """Requests a second, averaged over whole days or over the whole trace. Expects arrivals that can be drawn."""
    if spec.rate_per_s is not None:
        return spec.rate_per_s
    if not _plays_file(spec):
        return 1.0 / (MEAN_GAP_S * spec.time_scale)
    trace = _trace_of(spec)
    return (len(trace) - 1) / (trace.span_s * spec.time_scale) if trace.span_s else math.inf


def arrival_source(spec: ArrivalSpec) -> str:
    """Where the arrivals of a class come from, in words for a report."""
    if _plays_file(spec):
        trace = _trace_of(spec)
        name = Path(spec.path or "").name
        return f"the {trace.layout} trace {name}, {len(trace)} requests, time x {_scale(spec):.4g}"
    if spec.process == "gentd26":
        fitted = "the generator fitted to GenTD26's published statistics, which stands in for the trace"
        return f"{fitted}, time x {_scale(spec):.4g}"
    return f"{spec.process}, {spec.rate_per_s:.6g} requests a second"
