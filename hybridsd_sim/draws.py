"""The random inputs of requests, a chunk at a time: arrival, device, link conditions, model, size.

They are drawn with the arrival from named streams and never by a policy's doing, so that every policy meets exactly the
same requests on the same links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, stream

Floats = npt.NDArray[np.float64]

Draw = tuple[float, int, float, float, float, float, float, int, tuple[int, int] | None]
"""Arrival (s), class index, device draw in 0..1, half a round trip (s), uplink and downlink rate (bytes/s), seconds
that loading the model would take, base model, and (steps, images) where they differ from the class's own."""


def links(scenario: Scenario, profiles: Profiles, chunk: ArrivalChunk) -> tuple[Floats, Floats, Floats]:
    """Half a round trip (s), uplink and downlink rate (bytes/s) of every request, on the network of its own fleet."""
    half_rtt_s, up, down = (np.empty(len(chunk)) for _ in range(3))
    for index, spec in enumerate(scenario.requests.values()):
        network = profiles.network(scenario.edge[spec.origin].network)
        mine = chunk.class_index == index
        half_rtt_s[mine] = network.rtt_s.at_many(chunk.rtt_u[mine]) / 2
        up[mine] = network.up_bytes_per_s.at_many(chunk.network_u[mine])
        down[mine] = network.down_bytes_per_s.at_many(chunk.network_u[mine])
    return half_rtt_s, up, down


def own_size(scenario: Scenario, chunk: ArrivalChunk) -> npt.NDArray[np.bool_]:
    """Which requests of a chunk ask for the steps and images of their class; only those of a trace may not."""
    specs = list(scenario.requests.values())
    steps, images = (np.array([getattr(s, name) for s in specs]) for name in ("num_inference_steps", "num_images"))
    same_steps: npt.NDArray[np.bool_] = steps[chunk.class_index] == chunk.num_inference_steps
    same_steps &= images[chunk.class_index] == chunk.num_images
    return same_steps


class Draws:
    """The requests of one replication in order of arrival: an iterator of `Draw`.

    `on_chunk` is called before each new chunk: a good moment for work that need not be done for every request. `drawn`
    counts the arrivals of the chunks so far.
    """

    def __init__(self, scenario: Scenario, profiles: Profiles, replication: int) -> None:
        self._scenario, self._profiles = scenario, profiles
        self._chunks = arrival_chunks(scenario, replication)
        self._loads = stream(scenario.seed, replication, "model_load")
        limited = any(pool.resident_models is not None for pool in scenario.pools.values())
        self._load_row = profiles.model_load("*") if limited else None
        self.on_chunk: Callable[[], None] = lambda: None
        self.drawn = 0

    def __iter__(self) -> Iterator[Draw]:
        for chunk in self._chunks:
            self.on_chunk()
            self.drawn += len(chunk)
            # A zip of plain lists: the hot path takes one tuple a request and indexes nothing.
            yield from zip(
                chunk.arrival_s.tolist(),
                chunk.class_index.tolist(),
                chunk.device_u.tolist(),
                *(column.tolist() for column in links(self._scenario, self._profiles, chunk)),
                self._load_seconds(len(chunk)),
                chunk.base_model.tolist(),
                self._variants(chunk),
                strict=True,
            )

    def _variants(self, chunk: ArrivalChunk) -> list[tuple[int, int] | None]:
        own = own_size(self._scenario, chunk)
        if own.all():
            return [None] * len(chunk)
        pairs = zip(chunk.num_inference_steps.tolist(), chunk.num_images.tolist(), strict=True)
        return [None if same else pair for same, pair in zip(own.tolist(), pairs, strict=True)]

    def _load_seconds(self, size: int) -> list[float]:
        """Seconds that loading the model would take each request: log-normal through the row's median and p95."""
        row = self._load_row
        if row is None:
            return [0.0] * size
        spread = 0.0 if row.seconds_p95 is None else math.log(row.seconds_p95 / row.seconds_median) / 1.6449
        seconds: list[float] = (row.seconds_median * np.exp(spread * self._loads.standard_normal(size))).tolist()
        return seconds
