"""The random inputs of requests, a chunk at a time: arrival, device, link conditions, model, size.

`Draws.on_chunk` is called before each new chunk: a good moment for work that need not be done for every request. They
are drawn with the arrival from named streams and never by a policy's doing, so that every policy meets exactly the same
requests on the same links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, stream


class Draws:
    """The random inputs of the requests, a chunk at a time, as plain lists that the hot path can index."""

    def __init__(self, scenario: Scenario, profiles: Profiles, replication: int) -> None:
        self._specs = list(scenario.requests.values())
        self._networks = [profiles.network(scenario.edge[spec.origin].network) for spec in self._specs]
        self._chunks = arrival_chunks(scenario, replication)
        self._loads = stream(scenario.seed, replication, "model_load")
        limited = any(pool.resident_models is not None for pool in scenario.pools.values())
        self._load_row = profiles.model_load("*") if limited else None
        self.slo_s = [math.inf if spec.slo_s is None else spec.slo_s for spec in self._specs]
        self.on_chunk: Callable[[], None] = lambda: None
        self.arrival_s: list[float] = []
        self.at = -1
        self.drawn = 0
        """Arrivals drawn so far, all chunks together."""

    def advance(self, now: float) -> float:
        """Move to the next arrival: seconds until then, never less than 0; -1 after the last."""
        self.at += 1
        if self.at == len(self.arrival_s):
            chunk = next(self._chunks, None)
            if chunk is None:
                return -1.0
            self.on_chunk()
            self._load(chunk)
        delay = self.arrival_s[self.at] - now
        return max(0.0, delay)

    def _load(self, chunk: ArrivalChunk) -> None:
        self.at = 0
        self.drawn += len(chunk)
        self.arrival_s, self.class_index = chunk.arrival_s.tolist(), chunk.class_index.tolist()
        self.device_u, self.base_model = chunk.device_u.tolist(), chunk.base_model.tolist()
        self._load_links(chunk)
        self._load_variants(chunk)
        self.load_s = self._load_seconds(len(self.arrival_s))

    def variant(self, at: int) -> tuple[int, int] | None:
        """(steps, images) of an arrival that differs from its class; None for the class's own."""
        return None if self._variants is None else self._variants[at]

    def _load_links(self, chunk: ArrivalChunk) -> None:
        half_rtt, up, down = (np.empty(len(chunk.arrival_s)) for _ in range(3))
        for index, network in enumerate(self._networks):
            mine = chunk.class_index == index
            half_rtt[mine] = network.rtt_s.at_many(chunk.rtt_u[mine]) / 2
            up[mine] = network.up_bytes_per_s.at_many(chunk.network_u[mine])
            down[mine] = network.down_bytes_per_s.at_many(chunk.network_u[mine])
        self.half_rtt_s, self.up_bytes_per_s, self.down_bytes_per_s = half_rtt.tolist(), up.tolist(), down.tolist()

    def _load_variants(self, chunk: ArrivalChunk) -> None:
        steps = np.array([spec.num_inference_steps for spec in self._specs])[chunk.class_index]
        images = np.array([spec.num_images for spec in self._specs])[chunk.class_index]
        own = (steps == chunk.num_inference_steps) & (images == chunk.num_images)
        pairs: Sequence[tuple[int, int]] = list(
            zip(chunk.num_inference_steps.tolist(), chunk.num_images.tolist(), strict=True)
        )
        self._variants = None if own.all() else [None if same else p for same, p in zip(own, pairs, strict=True)]

    def _load_seconds(self, size: int) -> list[float]:
        """Seconds that loading the model would take each request: log-normal through the row's median and p95."""
        row = self._load_row
        if row is None:
            return [0.0] * size
        spread = 0.0 if row.seconds_p95 is None else math.log(row.seconds_p95 / row.seconds_median) / 1.6449
        seconds: list[float] = (row.seconds_median * np.exp(spread * self._loads.standard_normal(size))).tolist()
        return seconds
