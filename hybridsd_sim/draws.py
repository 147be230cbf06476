"""The random inputs of requests, a chunk at a time: arrival, device, link conditions, model, size.

They are drawn with the arrival from named streams and never by a policy's doing, so that every policy meets exactly the
same requests on the same links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, stream

Draw = tuple[float, int, float, float, float, float, float, int, tuple[int, int] | None]
"""Arrival (s), class index, device draw in 0..1, half a round trip (s), uplink and downlink rate (bytes/s), seconds
that loading the model would take, base model, and (steps, images) where they differ from the class's own."""


class Draws:
    """The requests of one replication in order of arrival: an iterator of `Draw`.

    `on_chunk` is called before each new chunk: a good moment for work that need not be done for every request. `drawn`
    counts the arrivals of the chunks so far.
    """

    def __init__(self, scenario: Scenario, profiles: Profiles, replication: int) -> None:
        self._specs = list(scenario.requests.values())
        self._networks = [profiles.network(scenario.edge[spec.origin].network) for spec in self._specs]
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
                *self._links(chunk),
                self._load_seconds(len(chunk)),
                chunk.base_model.tolist(),
                self._variants(chunk),
                strict=True,
            )

    def _links(self, chunk: ArrivalChunk) -> tuple[list[float], list[float], list[float]]:
        half_rtt, up, down = (np.empty(len(chunk.arrival_s)) for _ in range(3))
        for index, network in enumerate(self._networks):
            mine = chunk.class_index == index
            half_rtt[mine] = network.rtt_s.at_many(chunk.rtt_u[mine]) / 2
            up[mine] = network.up_bytes_per_s.at_many(chunk.network_u[mine])
            down[mine] = network.down_bytes_per_s.at_many(chunk.network_u[mine])
        return half_rtt.tolist(), up.tolist(), down.tolist()

    def _variants(self, chunk: ArrivalChunk) -> list[tuple[int, int] | None]:
        steps = np.array([spec.num_inference_steps for spec in self._specs])[chunk.class_index]
        images = np.array([spec.num_images for spec in self._specs])[chunk.class_index]
        own = (steps == chunk.num_inference_steps) & (images == chunk.num_images)
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
