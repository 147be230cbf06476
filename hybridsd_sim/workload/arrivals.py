"""When requests come: arrival processes, played traces, and the merged stream of all classes of a scenario.

A process gives the arrivals of one class in order, in blocks, for ever (a trace ends); how many are drawn at a time
never changes what is drawn. `arrival_chunks` merges the classes in time order, lazily.

Every class and every attribute has a random stream of its own, named after it: adding a class, a policy or an attribute
shifts no draw of another, so that policies meet exactly the same requests (common random numbers: Law, Simulation
Modeling and Analysis, 5th ed., section 11.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.scenario import ArrivalSpec, Scenario
from hybridsd_sim.workload.gentd26 import MEAN_GAP_S, GenTD26Generator, StreamOf
from hybridsd_sim.workload.traces import Floats, Ints, Trace, import_trace

DAY_S = 86_400.0

MAX_CV = 100.0
"""Gaps more uneven than this come in clumps of thousands of simultaneous requests: a mistake, not a workload."""

MAX_PEAK = 24.0
"""Peak over mean rate of a day whose requests all come in one hour."""

CHUNK = 8192
"""Arrivals that a chunk has, about, and that are drawn at a time over all classes."""

_DAY_CELLS = 1440  # a minute each

Marks = tuple[Ints | None, Ints | None, Ints | None]
"""Base model by rank, images and steps of each request; None, and 0, is the class's own."""

Block = tuple[Floats, Marks]

OWN: Marks = (None, None, None)


def arrival_blocks(spec: ArrivalSpec, stream_of: StreamOf, size: int) -> Iterator[Block]:
    """Arrival times in seconds, and marks, of a process; `size` at a time where that is free.

    `stream_of` gives a random stream for a word. Expects arrivals without `arrival_problems`.
    """
    if _plays_file(spec):
        trace, scale = _trace_of(spec), _scale(spec)
        # Base models by rank: 0 for the commonest and for requests that name none.
        names, which, counts = np.unique(trace.base_model, return_inverse=True, return_counts=True)
        counts[names == ""] = 0
        ranks = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
        ranks[names == ""] = 0
        models = np.minimum(ranks, np.iinfo(np.int16).max)[which]
        for at in range(0, len(trace), size):
            part = slice(at, at + size)
            yield trace.arrival_s[part] * scale, (models[part], trace.num_images[part], trace.num_inference_steps[part])
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
        phase = rng.random()
        return _per_second((np.arange(at, at + size, dtype=np.float64) + phase for at in count(0, size)), rate)
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
    has the peak asked for: the mean of ((1 + cos x) / 2)^n over a turn is gamma(n + 1/2) / (sqrt(pi) gamma(n + 1)).
    """
    swing = np.cos(2.0 * math.pi * (np.arange(_DAY_CELLS) + 0.5) / _DAY_CELLS - math.pi)
    profile: Floats = 1.0 + (peak_to_mean - 1.0) * swing
    if peak_to_mean > 2.0:
        low, high = 1.0, 2.0 * peak_to_mean**2
        for _ in range(60):
            power = (low + high) / 2.0
            mean = math.exp(math.lgamma(power + 0.5) - math.lgamma(power + 1.0)) / math.sqrt(math.pi)
            low, high = (power, high) if 1.0 / mean < peak_to_mean else (low, power)
        profile = ((1.0 + swing) / 2.0) ** high
        profile /= profile.mean()
    profile = np.roll(profile, -int(np.argmax(profile >= 1.0)))
    profile.setflags(write=False)  # it is shared by all callers
    return profile


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


@dataclass(frozen=True, slots=True, eq=False)
class ArrivalChunk:
    """Arrivals in time order, equal times in order of the classes: arrays of one length.

    `arrival_s` seconds; `class_index` the position in `scenario.requests`; `device_u`, `network_u`, `rtt_u` uniform in
    [0, 1), which pick the device of the origin fleet, the quantile of the link's rate and of its round trip;
    `base_model` 0 for the class's model, above 0 for the other base models of a trace, by rank; `num_images` and
    `num_inference_steps` the class's own unless a trace or generator says otherwise.
    """

    arrival_s: Floats
    class_index: npt.NDArray[np.int16]
    device_u: Floats
    network_u: Floats
    rtt_u: Floats
    base_model: npt.NDArray[np.int16]
    num_images: npt.NDArray[np.int16]
    num_inference_steps: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, which: slice | Ints) -> ArrivalChunk:
        """The arrivals at some positions."""
        return ArrivalChunk(*(getattr(self, name)[which] for name in _COLUMNS))

    @classmethod
    def join(cls, parts: Sequence[ArrivalChunk]) -> ArrivalChunk:
        """Chunks one after the other, in the order given; one without arrivals where there are none."""
        if not parts:
            reals, wholes = np.empty(0), np.empty(0, np.int16)
            return cls(reals, wholes, reals, reals, reals, wholes, wholes, wholes)
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


_COLUMNS = tuple(column.name for column in fields(ArrivalChunk))


def stream(seed: int, replication: int, name: str) -> np.random.Generator:
    """The random stream of a name in one replication: the same on every machine, independent of every other."""
    words = np.frombuffer(sha256(name.encode()).digest()[:16], "<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(replication, *words))))


def arrivals(scenario: Scenario, replication: int) -> Iterator[tuple[float, int]]:
    """Every arrival of a replication in time order, as (arrival_s, class_index); lazy. Raises `InputError` at once."""
    chunks = arrival_chunks(scenario, replication)  # checks now, not when the first arrival is asked for
    return (pair for chunk in chunks for pair in zip(chunk.arrival_s.tolist(), chunk.class_index.tolist(), strict=True))


def arrival_chunks(scenario: Scenario, replication: int) -> Iterator[ArrivalChunk]:
    """Every arrival before `horizon_s` of a replication, merged over the classes in time order, chunk by chunk.

    Lazy and of bounded memory; no chunk is empty. A trace plays once, from its first request at time 0, the same in
    every replication. Raises `InputError` at once for arrivals that cannot be drawn, all classes together.
    """
    problems = [
        problem
        for name, spec in scenario.requests.items()
        for problem in arrival_problems(f"requests.{name}.arrivals", spec.arrivals)
    ]
    if problems:
        raise InputError(problems)
    size = max(256, CHUNK // len(scenario.requests))
    return merge([_of_class(scenario, index, replication, size) for index in range(len(scenario.requests))])


def all_arrivals(scenario: Scenario, replication: int) -> ArrivalChunk:
    """Every arrival of a replication at once: `arrival_chunks` in one piece, empty where nobody asks."""
    return ArrivalChunk.join(list(arrival_chunks(scenario, replication)))


def merge(sources: list[Iterator[ArrivalChunk]]) -> Iterator[ArrivalChunk]:
    """Merge chunks in time order.

    What a source has not given yet lies at or after its last arrival. Everything before the earliest of those is
    therefore complete, and the sources that set this limit are asked for more.
    """
    held: dict[int, ArrivalChunk] = {}
    for index, source in enumerate(sources):
        if (chunk := next(source, None)) is not None:
            held[index] = chunk
    limited = set(held)
    while limited:
        limit = min(held[index].arrival_s[-1] for index in limited)
        done = []
        for index in sorted(held):
            cut = int(np.searchsorted(held[index].arrival_s, limit))
            done.append(held[index].take(slice(0, cut)))
            held[index] = held[index].take(slice(cut, None))
        yield from _in_order(done)
        for index in [index for index in limited if held[index].arrival_s[-1] == limit]:
            if (chunk := next(sources[index], None)) is None:
                limited.remove(index)
            else:
                held[index] = ArrivalChunk.join([held[index], chunk])
    yield from _in_order([held[index] for index in sorted(held)])


def _in_order(parts: list[ArrivalChunk]) -> Iterator[ArrivalChunk]:
    """One chunk of several that are complete up to the same time; none if they are empty."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        yield parts[0]
    elif parts:
        joined = ArrivalChunk.join(parts)
        yield joined.take(np.argsort(joined.arrival_s, kind="stable"))


def _of_class(scenario: Scenario, index: int, replication: int, size: int) -> Iterator[ArrivalChunk]:
    """The arrivals of one class up to the horizon, with everything drawn for them."""
    name, spec = list(scenario.requests.items())[index]

    def stream_of(what: str) -> np.random.Generator:
        return stream(scenario.seed, replication, f"{what}/{name}")

    uniforms = [stream_of(what) for what in ("device", "network", "rtt")]
    expected = 1.1 * mean_rate_per_s(spec.arrivals) * scenario.horizon_s + 16
    for arrival_s, marks in arrival_blocks(spec.arrivals, stream_of, int(min(size, expected))):
        stop = int(np.searchsorted(arrival_s, scenario.horizon_s))
        if stop:
            class_index = np.full(stop, index, np.int16)
            device_u, network_u, rtt_u = (rng.random(stop) for rng in uniforms)
            # Base model, images and steps; 0 images or steps mean the class's own.
            asked = [
                np.full(stop, own, np.int16)
                if values is None
                else np.where(values[:stop] > 0, values[:stop], own).astype(np.int16)
                for values, own in zip(marks, (0, spec.num_images, spec.num_inference_steps), strict=True)
            ]
            yield ArrivalChunk(arrival_s[:stop], class_index, device_u, network_u, rtt_u, *asked)
        if stop < len(arrival_s):
            return
