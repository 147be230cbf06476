"""The requests of one replication with all that chance decides about them: arrival, device, link, model, size.

They are drawn with the arrival from named streams and never by a policy's doing, so that every policy and every
deployment meets exactly the same requests on the same links (common random numbers): one by one for the event loop
(`Draws`), or at once as arrays for the compiled recursion (`Requests`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload.arrivals import ArrivalChunk, all_arrivals, arrival_chunks, stream

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


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
        row = self._load_row
        for chunk in self._chunks:
            self.on_chunk()
            size = len(chunk)
            self.drawn += size
            load_s = [0.0] * size
            if row is not None:  # log-normal through the row's median and p95
                spread = 0.0 if row.seconds_p95 is None else math.log(row.seconds_p95 / row.seconds_median) / 1.6449
                load_s = (row.seconds_median * np.exp(spread * self._loads.standard_normal(size))).tolist()
            sizes: list[tuple[int, int] | None] = [None] * size
            if not (own := own_size(self._scenario, chunk)).all():
                pairs = zip(chunk.num_inference_steps.tolist(), chunk.num_images.tolist(), strict=True)
                sizes = [None if same else pair for same, pair in zip(own.tolist(), pairs, strict=True)]
            # A zip of plain lists: the hot path takes one tuple a request and indexes nothing.
            yield from zip(
                chunk.arrival_s.tolist(),
                chunk.class_index.tolist(),
                chunk.device_u.tolist(),
                *(column.tolist() for column in links(self._scenario, self._profiles, chunk)),
                load_s,
                chunk.base_model.tolist(),
                sizes,
                strict=True,
            )


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """The requests of one replication in order of arrival, as arrays: what `Draws` gives, as columns.

    `asked_s` is the arrival as the simulation's clock shows it, a rounding away from `arrival_s`. `device` is the
    user's own in the fleet of origin, wherever devices have owners. The requests of owner `o` are
    `asks[first[o]:first[o + 1]]`, in order of arrival; `owner` is each request's own, and `before` the request that the
    same user made before, -1 for none. `varied` says that some ask for other steps or images than their class.
    """

    replication: int
    arrival_s: Floats
    asked_s: Floats
    class_index: Ints
    half_rtt_s: Floats
    up_bytes_per_s: Floats
    down_bytes_per_s: Floats
    device: Ints
    asks: Ints
    first: Ints
    owner: Ints
    before: Ints
    varied: bool

    def __len__(self) -> int:
        return len(self.arrival_s)


def draw_requests(scenario: Scenario, profiles: Profiles, replication: int) -> Requests:
    """The requests of one replication. Raises `InputError` for unknown names."""
    chunk = all_arrivals(scenario, replication)
    half_rtt_s, up_bytes_per_s, down_bytes_per_s = links(scenario, profiles, chunk)
    fleets, names = list(scenario.edge.values()), list(scenario.edge)
    fleet = np.array([names.index(spec.origin) for spec in scenario.requests.values()])[chunk.class_index]
    device = (chunk.device_u * np.array([fleet.replicas for fleet in fleets])[fleet]).astype(np.int64)
    owned = np.flatnonzero(np.array([fleet.ownership == "user" for fleet in fleets])[fleet])
    return Requests(
        replication=replication,
        arrival_s=chunk.arrival_s,
        asked_s=clock_times(chunk.arrival_s),
        class_index=chunk.class_index.astype(np.int64),
        half_rtt_s=half_rtt_s,
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=down_bytes_per_s,
        device=device,
        **owners_of(fleet, device, owned),
        varied=not own_size(scenario, chunk).all(),
    )


def clock_times(arrival_s: Floats) -> Floats:
    """Arrivals as the event loop's clock shows them, which goes from one to the next by differences.

    Nearly every difference is exact: what goes wrong with one is mended by the next, so that a few rounds are enough.
    """
    shown = arrival_s
    while True:
        again = arrival_s.copy()
        again[1:] = shown[:-1] + np.maximum(arrival_s[1:] - shown[:-1], 0.0)
        if np.array_equal(again, shown):
            return again
        shown = again


def owners_of(fleet: Ints, device: Ints, owned: Ints) -> dict[str, Ints]:
    """Who made which requests: those of each owned device together."""
    whose = (fleet * (device.max(initial=0) + 1) + device)[owned]
    order = np.argsort(whose, kind="stable")
    asks, another = owned[order], np.diff(whose[order], prepend=-1) != 0
    owner, before = np.full(len(device), -1), np.full(len(device), -1)
    owner[asks] = np.cumsum(another) - 1
    before[asks[1:]] = np.where(another[1:], -1, asks[:-1])
    first = np.append(np.flatnonzero(another), len(asks))
    return {"asks": asks, "first": first, "owner": owner, "before": before}
