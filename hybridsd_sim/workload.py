"""Who asks for what, when: arrival processes, traces and the random numbers that come with a request.

Arrivals are drawn lazily, in chunks, class by class, and merged in time order. Every class and every attribute has its
own random stream, named after it: adding a class, a policy or an attribute shifts no draw of another, so that policies
meet exactly the same requests (common random numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from hybridsd_sim.arrival_processes import (
    Marks,
    arrival_blocks,
    arrival_problems,
    arrival_source,
    mean_rate_per_s,
)
from hybridsd_sim.errors import InputError
from hybridsd_sim.gentd26 import GenTD26Generator
from hybridsd_sim.scenario import RequestClass, Scenario
from hybridsd_sim.traces import Floats, Ints, Trace, TraceSummary, describe_trace, import_trace

__all__ = [
    "ArrivalChunk",
    "GenTD26Generator",
    "Trace",
    "TraceSummary",
    "all_arrivals",
    "arrival_chunks",
    "arrival_source",
    "arrivals",
    "describe_trace",
    "import_trace",
    "mean_rate_per_s",
    "stream",
]

CHUNK = 8192
"""Arrivals that a chunk has, about, and that are drawn at a time over all classes."""


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


_COLUMNS = tuple(column.name for column in fields(ArrivalChunk))


def stream(seed: int, replication: int, name: str) -> np.random.Generator:
    """The random stream of a name in one replication: the same on every machine, independent of every other."""
    words = np.frombuffer(sha256(name.encode()).digest()[:16], "<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(replication, *words))))


def arrivals(scenario: Scenario, replication: int) -> Iterator[tuple[float, int]]:
    """Every arrival of a replication in time order, as (arrival_s, class_index); lazy. Raises `InputError` at once."""
    return _pairs(arrival_chunks(scenario, replication))


def _pairs(chunks: Iterator[ArrivalChunk]) -> Iterator[tuple[float, int]]:
    for chunk in chunks:
        yield from zip(chunk.arrival_s.tolist(), chunk.class_index.tolist(), strict=True)


def arrival_chunks(scenario: Scenario, replication: int) -> Iterator[ArrivalChunk]:
    """Every arrival before `horizon_s` of a replication, merged over the classes in time order, chunk by chunk.

    Lazy and of bounded memory; no chunk is empty. A trace plays once, from its first request at time 0, the same in
    every replication. Raises `InputError` at once for arrivals that cannot be drawn, all classes together.
    """
    _check(scenario)
    size = max(256, CHUNK // len(scenario.requests))
    return _merge([_of_class(scenario, index, replication, size) for index in range(len(scenario.requests))])


def all_arrivals(scenario: Scenario, replication: int) -> ArrivalChunk:
    """Every arrival of a replication at once: `arrival_chunks` in one piece, empty where nobody asks."""
    reals, wholes = np.empty(0), np.empty(0, np.int16)
    nobody = ArrivalChunk(reals, wholes, reals, reals, reals, wholes, wholes, wholes)
    return _joined([nobody, *arrival_chunks(scenario, replication)])


def _check(scenario: Scenario) -> None:
    problems = [
        problem
        for name, spec in scenario.requests.items()
        for problem in arrival_problems(f"requests.{name}.arrivals", spec.arrivals)
    ]
    if problems:
        raise InputError(problems)


def _merge(sources: list[Iterator[ArrivalChunk]]) -> Iterator[ArrivalChunk]:
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
                held[index] = _joined([held[index], chunk])
    yield from _in_order([held[index] for index in sorted(held)])


def _in_order(parts: list[ArrivalChunk]) -> Iterator[ArrivalChunk]:
    """One chunk of several that are complete up to the same time; none if they are empty."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        yield parts[0]
    elif parts:
        joined = _joined(parts)
        yield joined.take(np.argsort(joined.arrival_s, kind="stable"))


def _joined(parts: list[ArrivalChunk]) -> ArrivalChunk:
    return ArrivalChunk(*(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS))


def _of_class(scenario: Scenario, index: int, replication: int, size: int) -> Iterator[ArrivalChunk]:
    """The arrivals of one class up to the horizon, with everything drawn for them."""
    name, spec = list(scenario.requests.items())[index]
    stream_of = partial(_class_stream, scenario.seed, replication, name)
    uniforms = [stream_of(what) for what in ("device", "network", "rtt")]
    expected = 1.1 * mean_rate_per_s(spec.arrivals) * scenario.horizon_s + 16
    for arrival_s, marks in arrival_blocks(spec.arrivals, stream_of, int(min(size, expected))):
        stop = int(np.searchsorted(arrival_s, scenario.horizon_s))
        if stop:
            class_index = np.full(stop, index, np.int16)
            device_u, network_u, rtt_u = (rng.random(stop) for rng in uniforms)
            asked = _marks(spec, marks, stop)
            yield ArrivalChunk(arrival_s[:stop], class_index, device_u, network_u, rtt_u, *asked)
        if stop < len(arrival_s):
            return


def _class_stream(seed: int, replication: int, name: str, what: str) -> np.random.Generator:
    return stream(seed, replication, f"{what}/{name}")


def _marks(spec: RequestClass, marks: Marks, size: int) -> list[npt.NDArray[np.int16]]:
    """Base model, images and steps of the first arrivals of a block; 0 images or steps mean the class's own."""
    found = []
    for values, own in zip(marks, (0, spec.num_images, spec.num_inference_steps), strict=True):
        if values is None:
            found.append(np.full(size, own, np.int16))
        else:
            found.append(np.where(values[:size] > 0, values[:size], own).astype(np.int16))
    return found
