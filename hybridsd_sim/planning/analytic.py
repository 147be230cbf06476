"""The analytic queueing model: waits, SLO attainment, dollars and quality of a deployment, in under a millisecond.

The lowest of the three levels of fidelity (formula, compiled recursion, simulation). A pool that runs `c` worker groups
at a time is an M/G/c queue by Allen and Cunneen's approximation (A. O. Allen, Probability, Statistics, and Queueing
Theory, 2nd ed., 1990): Erlang C's probability of waiting, and beyond it an exponential wait whose mean carries the
squared variation of arrivals and service. Exact for M/M/c and for the mean wait of M/G/1. Bursts wait more often than
Erlang says: Hayward's approximation (Fredericks, Bell Syst. Tech. J. 59, 1980) takes traffic of peakedness z on c
servers as Poisson traffic on c / z; jobs of one length have the peakedness of their arrivals' squared variation.

The classes of a pool share its queue. A request is in time when wait, work and transfers stay inside its SLO; transfers
vary with the access network, so an attainment is a mean over a fixed grid of link conditions. A batch is taken to be
full, the slowest that a request can meet; nodes that may be taken away serve the share of the time that they are there,
and a job that loses its node pays the lost work once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridsd_sim.plan import tightest
from hybridsd_sim.pricing import Candidate, rental_usd_per_hour
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import arrival_chunks, mean_rate_per_s

EVENNESS = 0.1
"""Least squared variation of arrivals: evenly spaced requests reach a pool through links of their own."""


LINK_GRID = 20
"""Link conditions over which an attainment is averaged: a Latin square of rate and round-trip quantiles."""

REQUESTS_A_WINDOW = 50
"""Requests, in the mean, of a window in which a trace's rate is taken to be steady."""

QUANTILE_STEPS = 60
"""Halvings in the search for a latency quantile: to nanoseconds."""

EDGE_LOAD_MOST = 0.95
"""Most of the time that edge devices may be busy."""

EDGE_IDLE = 0.005
"""Share of the time below which edge devices are taken to be free whenever they are needed."""

EDGE_WAITS = (np.arange(10) + 0.5) / 10
"""Shares of the requests that wait for an edge device, at whose waits their lateness is looked at."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Jobs of one kind: `rate_per_s`, seconds of a worker group of `degree` GPUs, and the CV of their arrivals."""

    rate_per_s: float
    hold_s: float
    degree: int = 1
    arrival_cv: float = 1.0


@dataclass(frozen=True, slots=True)
class Wait:
    """A waiting time: none with probability 1 - `probability`, else exponential with mean `scale_s`.

    An overloaded queue has `probability` 1 and an infinite scale.
    """

    probability: float
    scale_s: float
    utilisation: float

    def within(self, seconds: float) -> float:
        """Probability that the wait is at most `seconds`."""
        return float(self.within_all(np.array([seconds]))[0])

    def within_all(self, seconds: np.ndarray) -> np.ndarray:
        """`within` for a vector of seconds."""
        tail = np.exp(-np.maximum(seconds, 0.0) / self.scale_s) if self.scale_s else np.zeros(len(seconds))
        return np.where(seconds >= 0.0, 1.0 - self.probability * tail, 0.0)

    @property
    def mean_s(self) -> float:
        """Mean wait of all requests, those that do not wait included, seconds."""
        return self.probability * self.scale_s if self.probability else 0.0


NO_WAIT = Wait(0.0, 0.0, 0.0)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an M/M/c customer waits; `offered` is the load in servers (Erlangs). 1 when overloaded."""
    if offered >= servers:
        return 1.0
    blocked = 1.0  # Erlang B by its recursion in the servers: the closed form overflows from about 170 of them on
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    share = offered / servers
    return blocked / (1.0 - share * (1.0 - blocked))


def gang_servers(nodes: float, gpus_per_node: int, flows: Sequence[Flow]) -> float:
    """Worker groups that run at a time: whole ones per node, averaged over the flows by the GPU-seconds asked for."""
    weights = [flow.rate_per_s * flow.hold_s for flow in flows]
    total = sum(weights)
    if total == 0.0:
        return float(nodes * gpus_per_node)
    # A harmonic mean: each kind of worker group takes 1/(groups per node) of a node for its share of the time.
    node_share = sum(w / (gpus_per_node // flow.degree) for w, flow in zip(weights, flows, strict=True))
    return nodes * total / node_share


def pool_wait(nodes: float, gpus_per_node: int, flows: Sequence[Flow]) -> Wait:
    """The wait of a job that joins the pool's queue, by Allen and Cunneen's approximation.

    A node that is there a part of the time counts that part. Overloaded, or without nodes: an infinite scale.
    """
    rate = sum(flow.rate_per_s for flow in flows)
    if rate == 0.0:
        return NO_WAIT
    if nodes == 0:
        return Wait(1.0, math.inf, math.inf)
    servers = gang_servers(nodes, gpus_per_node, flows)
    mean = sum(flow.rate_per_s * flow.hold_s for flow in flows) / rate
    offered = rate * mean
    if offered >= servers:
        return Wait(1.0, math.inf, offered / servers)
    second = sum(flow.rate_per_s * flow.hold_s**2 for flow in flows) / rate
    service_cv2 = max(0.0, second / mean**2 - 1.0)
    arrival_cv2 = max(EVENNESS, sum(flow.rate_per_s * flow.arrival_cv**2 for flow in flows) / rate)
    scale = mean / (servers - offered) * (arrival_cv2 + service_cv2) / 2.0
    return Wait(share_waiting(servers, offered, arrival_cv2), scale, offered / servers)


def share_waiting(servers: float, offered: float, peakedness: float) -> float:
    """Share of customers that wait, of arrivals of a peakedness: 1 is Poisson, for which it is Erlang C."""
    fewer = max(1.0, servers / max(peakedness, EVENNESS))
    return erlang_c_between(fewer, offered / servers * fewer)


def erlang_c_between(servers: float, offered: float) -> float:
    """Erlang C for a fractional number of servers: linear between the whole numbers around it."""
    low = max(1, math.floor(servers))
    share = servers - low
    at_low = erlang_c(low, offered) if low > offered else 1.0
    return at_low if share <= 0.0 else (1.0 - share) * at_low + share * erlang_c(low + 1, offered)


Mixes = Mapping[str, tuple[tuple[float, Candidate], ...]]
"""Per request class the shares of its requests and the candidates that serve them, the largest share first."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """A deployment and what the formula predicts of it.

    `missed` is the sum over classes of the attainment that is lacking, and of edge work beyond what the devices can do:
    0 when everything holds. `quality` is the mean CLIP score of the requests served, None where one is unknown.
    """

    mixes: Mixes
    replicas: Mapping[str, int]
    rent_usd_per_hour: float
    egress_usd_per_hour: float
    waits: Mapping[str, Wait]
    attainment: Mapping[str, float]
    missed: float
    quality: float | None

    @property
    def usd_per_hour(self) -> float:
        """Rent of the nodes and metered egress."""
        return self.rent_usd_per_hour + self.egress_usd_per_hour


@dataclass(slots=True)
class Sizer:
    """The formula for one scenario; keeps latencies and slacks of candidates, so that a deployment takes no time.

    `rates` are requests a second and the variation (CV) of their gaps, by class. Two corrections carry what simulation
    found and the formula does not know: `load_factors` are, by pool, GPU-seconds held over those predicted (model
    loads, requests of other sizes); `correction_factors` are, by pool and edge fleet, those on its traffic under which
    the formula gives the attainment that was simulated. `unit_rent` are dollars an hour of one node of each pool,
    infinite where nobody knows its price.
    """

    scenario: Scenario
    profiles: Profiles
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    load_factors: dict[str, float] = field(default_factory=dict)
    correction_factors: dict[str, float] = field(default_factory=dict)
    unit_rent: dict[str, float] = field(init=False, default_factory=dict)
    _slacks: dict[tuple[Candidate, float | None], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _latencies: dict[Candidate, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rates = self.rates or planning_rates(self.scenario)
        for name in self.scenario.pools:
            rent = rental_usd_per_hour(self.scenario, self.profiles, {name: 1})
            self.unit_rent[name] = math.inf if rent is None else rent

    def replace(
        self,
        scenario: Scenario | None = None,
        *,
        rates: Mapping[str, tuple[float, float]] | None = None,
        correction_factors: Mapping[str, float] | None = None,
    ) -> Sizer:
        """A copy with some fields changed. What was learnt is copied, so that neither teaches the other.

        `rates` stay where none are given, also for another scenario; empty ones are found anew.
        """
        return Sizer(
            scenario or self.scenario,
            self.profiles,
            rates=dict(self.rates if rates is None else rates),
            load_factors=dict(self.load_factors),
            correction_factors=dict(self.correction_factors if correction_factors is None else correction_factors),
            _slacks=self._slacks if scenario is None else {},
            _latencies=self._latencies,
        )

    @property
    def rent_limit_usd_per_hour(self) -> float | None:
        """The most that the budget lets all nodes cost, images counted at the mean rates; None without a limit."""
        budget = self.scenario.budget
        if budget.usd_per_image is None:
            return budget.usd_per_hour
        planned, requests = planning_rates(self.scenario), self.scenario.requests
        each = {name: mean_rate_per_s(spec.arrivals) * 3600 * spec.num_images for name, spec in requests.items()}
        images = sum(each[name] * self.rates[name][0] / planned[name][0] for name in each)
        return tightest(budget.usd_per_hour, budget.usd_per_image * images)

    def latencies(self, candidate: Candidate) -> np.ndarray:
        """Latencies in seconds without queues over the link grid; of a full batch where plans batch."""
        if candidate not in self._latencies:
            held_s, plan = candidate.batch_s[-1] + candidate.edge_s, candidate.plan
            found = np.full(LINK_GRID, held_s)
            if candidate.pool_index >= 0 and plan.network is not None:
                network = self.profiles.network(plan.network)
                # A Latin square: each quantile of the rate meets another one of the round trip, as independent ones do.
                rate_u = (np.arange(LINK_GRID) + 0.5) / LINK_GRID
                rtt_u = ((np.arange(LINK_GRID) * 7) % LINK_GRID + 0.5) / LINK_GRID
                up = candidate.cost.bytes_up / network.up_bytes_per_s.at_many(rate_u)
                down = candidate.cost.bytes_down / network.down_bytes_per_s.at_many(rate_u)
                found = np.asarray(held_s + up + down + network.rtt_s.at_many(rtt_u))
            self._latencies[candidate] = found
        return self._latencies[candidate]

    def slacks(self, candidate: Candidate, within_s: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Seconds that a request may wait and still be in time, and how often each is met (weights that sum to 1).

        In time is inside the class's SLO, or `within_s`; infinite without either. A node's loss costs the work again.
        """
        key = (candidate, within_s)
        if key not in self._slacks:
            due_s = self.scenario.promises[candidate.request_class].deadline_s() if within_s is None else within_s
            slack = due_s - self.latencies(candidate)
            weights = np.full(LINK_GRID, 1.0 / LINK_GRID)
            if candidate.pool_index >= 0 and (rate := self._preemption_rate(candidate)):
                lost = 1.0 - math.exp(-rate * candidate.batch_s[-1])
                slack = np.concatenate([slack, slack - candidate.batch_s[-1]])
                weights = np.concatenate([(1.0 - lost) * weights, lost * weights])
            self._slacks[key] = slack, weights
        return self._slacks[key]

    def _preemption_rate(self, candidate: Candidate) -> float:
        return list(self.scenario.pools.values())[candidate.pool_index].preemptions_per_s

    def share_in_time(
        self, candidate: Candidate, wait: Wait, within_s: float | None = None, edge: Wait = NO_WAIT
    ) -> float:
        """Share of a candidate's requests in time behind a pool's queue, and behind that of its edge fleet."""
        slack, weights = self.slacks(candidate, within_s)
        edge = edge if candidate.edge_s else NO_WAIT
        if math.isinf(wait.scale_s) or math.isinf(edge.scale_s):
            return 0.0
        if edge.probability:
            later = slack[:, None] + edge.scale_s * np.log1p(-EDGE_WAITS)
            each = np.repeat(weights, len(EDGE_WAITS)) * edge.probability / len(EDGE_WAITS)
            slack = np.concatenate([slack, later.ravel()])
            weights = np.concatenate([(1.0 - edge.probability) * weights, each])
        return float(wait.within_all(slack) @ weights)

    def idle_attainment(self, candidate: Candidate) -> float:
        """Share of requests inside the SLO with nobody else there."""
        return self.share_in_time(candidate, NO_WAIT)

    def wanted(self, class_name: str) -> float:
        """The share of requests that a class wants inside its SLO."""
        return self.scenario.promises[class_name].slo_share

    def flow(self, candidate: Candidate, share: float = 1.0) -> Flow:
        """What a share of a class brings to the queue of its pool: full batches, work lost with nodes included."""
        name = list(self.scenario.pools)[candidate.pool_index]
        rate, cv = self.rates[candidate.request_class]
        hold = candidate.batch_s[-1] * self.load_factors.get(name, 1.0)
        if lost := self._preemption_rate(candidate):
            hold = math.expm1(lost * hold) / lost
        rate_per_s = share * rate * self.correction_factors.get(name, 1.0) / len(candidate.batch_s)
        return Flow(rate_per_s, hold, candidate.degree, cv)

    def assess(self, mixes: Mixes, replicas: Mapping[str, int]) -> Sizing:
        """What the formula predicts of mixes on so many nodes."""
        waits = {}
        for index, (name, spec) in enumerate(self.scenario.pools.items()):
            flows = [self.flow(option, share) for share, option in _parts(mixes) if option.pool_index == index]
            waits[name] = pool_wait(replicas[name] * spec.availability, spec.gpus_per_node, flows)
        edges = [self.edge_wait(site, mixes) for site in self.scenario.edge]
        attainment = {
            name: sum(
                share * self.share_in_time(option, self.wait_of(option, waits), edge=edges[option.fleet_index])
                for share, option in mix
            )
            for name, mix in mixes.items()
        }
        missed = sum(max(0.0, self.wanted(name) - got) for name, got in attainment.items())
        edge_load: dict[int, float] = {}
        for share, option in _parts(mixes):
            busy = share * self.rates[option.request_class][0] * option.edge_s
            edge_load[option.fleet_index] = edge_load.get(option.fleet_index, 0.0) + busy
        fleets = list(self.scenario.edge.values())
        overload = sum(
            max(0.0, busy / fleets[index].replicas - EDGE_LOAD_MOST) for index, busy in edge_load.items() if index >= 0
        )
        scores = [(share * self.rates[o.request_class][0], o.quality) for share, o in _parts(mixes)]
        served = sum(rate for rate, _ in scores)
        known = served and all(score is not None for _, score in scores)
        quality = sum(rate * (score or 0.0) for rate, score in scores) / served if known else None
        return Sizing(
            mixes=mixes,
            replicas=dict(replicas),
            rent_usd_per_hour=sum(count * self.unit_rent[name] for name, count in replicas.items() if count),
            egress_usd_per_hour=sum(self.egress_usd_per_hour(o, share) for share, o in _parts(mixes)),
            waits=waits,
            attainment=attainment,
            missed=missed + overload,
            quality=quality,
        )

    def edge_busy(self, option: Candidate, site: str) -> float:
        """Share of the time for which a fleet's devices are busy with a candidate, if all of its class has it."""
        busy = self.rates[option.request_class][0] * option.edge_s / self.scenario.edge[site].replicas
        return self.correction_factors.get(site, 1.0) * busy

    def edge_wait(self, site: str, mixes: Mixes) -> Wait:
        """The wait for an edge device: its owner's other requests, or everybody's where devices are shared."""
        spec, index = self.scenario.edge[site], list(self.scenario.edge).index(site)
        mine = [(share, o) for share, o in _parts(mixes) if o.fleet_index == index and o.edge_s]
        busy = sum(share * self.edge_busy(o, site) for share, o in mine)
        if busy <= EDGE_IDLE:
            return NO_WAIT
        queues = spec.replicas if spec.ownership == "shared" else 1
        flows = [Flow(share * self.edge_busy(o, site) * queues / o.edge_s, o.edge_s) for share, o in mine]
        return pool_wait(queues, 1, flows)

    def wait_of(self, option: Candidate, waits: Mapping[str, Wait]) -> Wait:
        """The wait of a candidate's pool; none at the edge."""
        return waits[list(self.scenario.pools)[option.pool_index]] if option.pool_index >= 0 else NO_WAIT

    def egress_usd_per_hour(self, option: Candidate, share: float = 1.0) -> float:
        """Dollars an hour of metered egress of a share of the candidate's class."""
        dollars = sum(part.usd or 0.0 for part in option.cost.parts if part.tier == "network")
        return share * self.rates[option.request_class][0] * 3600 * dollars

    def quantile(self, sizing: Sizing, share: float) -> float:
        """The latency in seconds that `share` of all requests stay under; infinite when a queue is overloaded."""
        mix = [
            (part * self.rates[o.request_class][0], self.latencies(o), self.wait_of(o, sizing.waits))
            for part, o in _parts(sizing.mixes)
        ]
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

    @staticmethod
    def _share_within(mix: list[tuple[float, np.ndarray, Wait]], seconds: float) -> float:
        return sum(rate * float(wait.within_all(seconds - latencies).mean()) for rate, latencies, wait in mix)


def _parts(mixes: Mixes) -> Iterator[tuple[float, Candidate]]:
    for mix in mixes.values():
        yield from mix


def planning_rates(scenario: Scenario) -> dict[str, tuple[float, float]]:
    """Per class the rate (requests a second) to plan for and the variation (CV) of its gaps.

    A daily rhythm is planned for at its peak; a trace or its stand-in at the rate of the window (of about
    `REQUESTS_A_WINDOW` requests) that 95% of requests do not exceed, with the variation inside windows.
    """
    parametric = {"poisson": 1.0, "constant": 0.0, "daily": 1.0}
    rates = {}
    for class_index, (name, spec) in enumerate(scenario.requests.items()):
        arrivals = spec.arrivals
        if arrivals.process not in ("trace", "gentd26") and arrivals.rate_per_s is not None:
            peak = arrivals.peak_to_mean if arrivals.process == "daily" else 1.0
            rates[name] = (arrivals.rate_per_s * peak, parametric.get(arrivals.process, arrivals.cv))
            continue
        drawn = [chunk.arrival_s[chunk.class_index == class_index] for chunk in arrival_chunks(scenario, 0)]
        times = np.concatenate(drawn) if drawn else np.empty(0)
        if len(times) < 2 * REQUESTS_A_WINDOW:
            rates[name] = len(times) / scenario.horizon_s, 1.0
            continue
        windows = len(times) // REQUESTS_A_WINDOW
        counts, edges = np.histogram(times, bins=windows, range=(0.0, scenario.horizon_s))
        seen_by_requests = np.repeat(counts, counts)  # a busy window is met by many requests
        rate = float(np.quantile(seen_by_requests, 0.95)) * windows / scenario.horizon_s
        gaps = [np.diff(part) for part in np.split(times, np.searchsorted(times, edges[1:-1])) if len(part) > 10]
        rates[name] = rate, float(np.median([gap.std() / gap.mean() for gap in gaps])) if gaps else 1.0
    return rates
