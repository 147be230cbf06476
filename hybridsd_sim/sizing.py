"""How many nodes a choice of plans needs, by formula: the analytic side of the optimiser.

A choice gives every request class one candidate. The classes of a pool share its queue (`queueing.pool_wait`); a class
is served in time when wait, work and transfers together stay inside its SLO at its percentile. Transfers vary with the
access network: the attainment is averaged over a fixed grid of link conditions. The fewest nodes that give every class
its percentile are the pool's replicas.

`load_factors` carry what simulation found and the formula does not know (model loads, requests of other sizes): the
GPU-seconds measured over those predicted, per pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from hybridsd_sim.candidates import Candidate, rental_usd_per_hour
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.queueing import NO_WAIT, Flow, Wait, pool_wait
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import arrival_chunks

LINK_GRID = 20
"""Link conditions over which an attainment is averaged: a Latin square of rate and round-trip quantiles."""
REQUESTS_A_WINDOW = 50
"""Requests, in the mean, of a window in which a trace's rate is taken to be steady."""
QUANTILE_STEPS = 60
"""Halvings in the search for a latency quantile: to nanoseconds."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """A choice with its replicas, and what the formula predicts of it.

    `usd_per_hour` is the rent and the metered egress. `missed` is the sum over classes of the attainment that is
    lacking: 0 when the choice holds every SLO.
    """

    chosen: Mapping[str, Candidate]
    replicas: Mapping[str, int]
    rent_usd_per_hour: float
    usd_per_hour: float
    waits: Mapping[str, Wait]
    attainment: Mapping[str, float]
    missed: float
    quality: float | None
    load_usd_per_hour: float


@dataclass(slots=True)
class Sizer:
    """Sizes choices for one scenario; keeps the link grid and the rates, so that a choice takes under a millisecond."""

    scenario: Scenario
    profiles: Profiles
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    load_factors: dict[str, float] = field(default_factory=dict)
    extra_nodes: dict[str, int] = field(default_factory=dict)
    _latencies: dict[Candidate, np.ndarray] = field(default_factory=dict)
    _unit_rent: dict[str, float] = field(default_factory=dict)
    _known_nodes: dict[tuple[str, tuple[Candidate, ...]], tuple[int, Wait]] = field(default_factory=dict)
    _known_attainment: dict[tuple[Candidate, Wait], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rates = self.rates or planning_rates(self.scenario)
        for name in self.scenario.pools:
            rent = rental_usd_per_hour(self.scenario, self.profiles, {name: 1})
            self._unit_rent[name] = math.inf if rent is None else rent

    def latencies(self, candidate: Candidate) -> np.ndarray:
        """Latencies in seconds on an idle fleet over the link grid."""
        known = self._latencies.get(candidate)
        if known is None:
            known = self._latencies[candidate] = self._over_links(candidate)
        return known

    def _over_links(self, candidate: Candidate) -> np.ndarray:
        held = candidate.cloud_s + candidate.edge_s
        plan = candidate.plan
        if candidate.pool_index < 0 or plan.network is None:
            return np.full(LINK_GRID, held)
        network = self.profiles.network(plan.network)
        rate_u = (np.arange(LINK_GRID) + 0.5) / LINK_GRID
        rtt_u = ((np.arange(LINK_GRID) * 7) % LINK_GRID + 0.5) / LINK_GRID
        up = candidate.cost.bytes_up / network.up_bytes_per_s.at_many(rate_u)
        down = candidate.cost.bytes_down / network.down_bytes_per_s.at_many(rate_u)
        return np.asarray(held + up + down + network.rtt_s.at_many(rtt_u))

    def idle_attainment(self, candidate: Candidate) -> float:
        """Share of requests inside the SLO with nobody else there."""
        return self._attainment(candidate, NO_WAIT)

    def _attainment(self, candidate: Candidate, wait: Wait) -> float:
        key = (candidate, wait)
        if key not in self._known_attainment:
            self._known_attainment[key] = self._share_in_time(candidate, wait)
        return self._known_attainment[key]

    def _share_in_time(self, candidate: Candidate, wait: Wait) -> float:
        slo = self.scenario.requests[candidate.request_class].slo_s
        if slo is None:
            return 1.0 if wait.utilisation < 1.0 else 0.0
        return float(wait.within_all(slo - self.latencies(candidate)).mean())

    def wanted(self, class_name: str) -> float:
        """The share of requests that a class wants inside its SLO."""
        return self.scenario.requests[class_name].slo_percentile / 100.0

    def size(self, chosen: Mapping[str, Candidate]) -> Sizing:
        """The fewest nodes that hold every class's SLO, and what they cost."""
        waits, replicas = {}, {}
        for index, name in enumerate(self.scenario.pools):
            mine = [option for option in chosen.values() if option.pool_index == index]
            replicas[name], waits[name] = self._nodes(name, mine)
        names = list(self.scenario.pools)
        attainment = {
            name: self._attainment(option, waits[names[option.pool_index]] if option.pool_index >= 0 else NO_WAIT)
            for name, option in chosen.items()
        }
        missed = sum(max(0.0, self.wanted(name) - got) for name, got in attainment.items())
        return Sizing(
            chosen=dict(chosen),
            replicas=replicas,
            rent_usd_per_hour=self._rent(replicas),
            usd_per_hour=self._usd_per_hour(chosen, replicas),
            waits=waits,
            attainment=attainment,
            missed=missed + self._edge_overload(chosen),
            quality=self._quality(chosen),
            load_usd_per_hour=sum(self.rates[name][0] * 3600 * option.usd_or_inf for name, option in chosen.items()),
        )

    def with_replicas(self, sizing: Sizing, replicas: Mapping[str, int]) -> Sizing:
        """The same choice on another number of nodes, whatever the formula thinks of it."""
        return replace(
            sizing,
            replicas=dict(replicas),
            rent_usd_per_hour=self._rent(replicas),
            usd_per_hour=self._usd_per_hour(sizing.chosen, replicas),
        )

    def learn(self, pool: str, load_factor: float, extra_nodes: int) -> None:
        """Take over what a simulation found out about a pool."""
        self.load_factors[pool], self.extra_nodes[pool] = load_factor, extra_nodes
        self._known_nodes.clear()

    def _nodes(self, name: str, mine: list[Candidate]) -> tuple[int, Wait]:
        key = (name, tuple(mine))
        if key not in self._known_nodes:
            self._known_nodes[key] = self._fewest_nodes(name, mine)
        return self._known_nodes[key]

    def _fewest_nodes(self, name: str, mine: list[Candidate]) -> tuple[int, Wait]:
        spec = self.scenario.pools[name]
        if not mine:
            return spec.replicas_min, NO_WAIT
        flows = [self._flow(name, option) for option in mine]
        high = spec.replicas_max
        low = min(max(1, spec.replicas_min) + self.extra_nodes.get(name, 0), high)
        load = sum(flow.rate_per_s * flow.hold_s * flow.degree for flow in flows)
        nodes = min(max(low, math.floor(load / spec.gpus_per_node)), high)
        wait = pool_wait(nodes, spec.gpus_per_node, flows)
        while nodes < high and any(self._attainment(o, wait) < self.wanted(o.request_class) for o in mine):
            nodes += 1
            wait = pool_wait(nodes, spec.gpus_per_node, flows)
        return nodes, wait

    def _flow(self, pool: str, option: Candidate) -> Flow:
        rate, cv = self.rates[option.request_class]
        return Flow(rate, option.cloud_s * self.load_factors.get(pool, 1.0), option.degree, cv)

    def _edge_overload(self, chosen: Mapping[str, Candidate]) -> float:
        """By how much edge fleets are asked for more than their devices can do."""
        load: dict[int, float] = {}
        for name, option in chosen.items():
            load[option.fleet_index] = load.get(option.fleet_index, 0.0) + self.rates[name][0] * option.edge_s
        fleets = list(self.scenario.edge.values())
        return sum(max(0.0, busy / fleets[index].replicas - 0.95) for index, busy in load.items() if index >= 0)

    def _usd_per_hour(self, chosen: Mapping[str, Candidate], replicas: Mapping[str, int]) -> float:
        """Rent of the nodes and metered egress, dollars an hour."""
        egress = sum(
            self.rates[name][0] * 3600 * sum(part.usd or 0.0 for part in option.cost.parts if part.tier == "network")
            for name, option in chosen.items()
        )
        return self._rent(replicas) + egress

    def _rent(self, replicas: Mapping[str, int]) -> float:
        return sum(count * self._unit_rent[name] for name, count in replicas.items() if count)

    def _quality(self, chosen: Mapping[str, Candidate]) -> float | None:
        """Mean CLIP score over requests; None if any class's is unknown."""
        scores = [(self.rates[name][0], option.quality) for name, option in chosen.items()]
        total = sum(rate for rate, _ in scores)
        if not total or any(score is None for _, score in scores):
            return None
        return sum(rate * (score or 0.0) for rate, score in scores) / total

    def quantile(self, sizing: Sizing, share: float) -> float:
        """The latency in seconds that `share` of all requests stay under; infinite when a queue is overloaded."""
        mix = [(self.rates[name][0], self.latencies(o), self._wait(o, sizing)) for name, o in sizing.chosen.items()]
        total = sum(rate for rate, _, _ in mix)
        if not total or any(math.isinf(wait.scale_s) for _, _, wait in mix):
            return math.inf
        low, high = 0.0, 1.0
        while self._share_within(mix, high) < share * total:
            high *= 2.0
        for _ in range(QUANTILE_STEPS):
            middle = (low + high) / 2.0
            low, high = (low, middle) if self._share_within(mix, middle) >= share * total else (middle, high)
        return high

    def _wait(self, option: Candidate, sizing: Sizing) -> Wait:
        return sizing.waits[list(self.scenario.pools)[option.pool_index]] if option.pool_index >= 0 else NO_WAIT

    @staticmethod
    def _share_within(mix: list[tuple[float, np.ndarray, Wait]], seconds: float) -> float:
        return sum(rate * float(wait.within_all(seconds - latencies).mean()) for rate, latencies, wait in mix)


def planning_rates(scenario: Scenario) -> dict[str, tuple[float, float]]:
    """Per class the rate (requests a second) to plan for and the variation (CV) of its gaps.

    A daily rhythm is planned for at its peak; a trace or its stand-in at the rate of the window (of about
    `REQUESTS_A_WINDOW` requests) that 95% of requests do not exceed, with the variation inside windows.
    """
    parametric = {"poisson": 1.0, "constant": 0.0, "daily": 1.0}
    rates = {}
    for name, spec in scenario.requests.items():
        arrivals = spec.arrivals
        if arrivals.process in ("trace", "gentd26") or arrivals.rate_per_s is None:
            rates[name] = _observed_rate(scenario, name)
        else:
            peak = arrivals.peak_to_mean if arrivals.process == "daily" else 1.0
            rates[name] = (arrivals.rate_per_s * peak, parametric.get(arrivals.process, arrivals.cv))
    return rates


def _observed_rate(scenario: Scenario, name: str) -> tuple[float, float]:
    index = list(scenario.requests).index(name)
    drawn = [chunk.arrival_s[chunk.class_index == index] for chunk in arrival_chunks(scenario, 0)]
    times = np.concatenate(drawn) if drawn else np.empty(0)
    if len(times) < 2 * REQUESTS_A_WINDOW:
        return len(times) / scenario.horizon_s, 1.0
    windows = len(times) // REQUESTS_A_WINDOW
    counts, edges = np.histogram(times, bins=windows, range=(0.0, scenario.horizon_s))
    seen_by_requests = np.repeat(counts, counts)  # a busy window is met by many requests
    rate = float(np.quantile(seen_by_requests, 0.95)) * windows / scenario.horizon_s
    gaps = [np.diff(part) for part in np.split(times, np.searchsorted(times, edges[1:-1])) if len(part) > 10]
    return rate, float(np.median([gap.std() / gap.mean() for gap in gaps])) if gaps else 1.0
