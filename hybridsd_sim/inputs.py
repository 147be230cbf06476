"""What a scenario's requests bring with them whatever is deployed: drawn once, as arrays, for every deployment tried.

The same arrivals, devices and links as `simulate` meets (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridsd_sim.candidates import Candidate, make_candidate, request_of
from hybridsd_sim.draws import links, own_size
from hybridsd_sim.plan import Plan
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import all_arrivals

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


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


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Everything about a scenario that no deployment changes: its requests, and the plans priced so far."""

    scenario: Scenario
    profiles: Profiles
    replications: tuple[Requests, ...]
    priced: dict[tuple[str, Plan], Candidate] = field(default_factory=dict)

    @classmethod
    def of(cls, scenario: Scenario, profiles: Profiles, *, replications: Sequence[int] | None = None) -> Inputs:
        """Draw the requests of some replications, of all without a word. Raises `InputError` for unknown names."""
        numbers = range(scenario.replications) if replications is None else replications
        return cls(scenario, profiles, tuple(draw_requests(scenario, profiles, number) for number in numbers))

    def candidate(self, request_class: str, plan: Plan) -> Candidate:
        """A class's plan, priced; checked and priced once."""
        key = request_class, plan
        if key not in self.priced:
            request = request_of(request_class, self.scenario.requests[request_class])
            self.priced[key] = make_candidate(self.scenario, self.profiles, request, plan)
        return self.priced[key]


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
        asked_s=on_the_clock(chunk.arrival_s),
        class_index=chunk.class_index.astype(np.int64),
        half_rtt_s=half_rtt_s,
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=down_bytes_per_s,
        device=device,
        **owners_of(fleet, device, owned),
        varied=not own_size(scenario, chunk).all(),
    )


def on_the_clock(arrival_s: Floats) -> Floats:
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
