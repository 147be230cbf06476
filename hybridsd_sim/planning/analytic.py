"""What a deployment promises by formula: waits, attainment, dollars and quality of mixes of plans on rented nodes.

The classes of a pool share its queue (`queueing.pool_wait`); a request is in time when wait, work and transfers stay
inside its SLO. Transfers vary with the access network: an attainment is averaged over a fixed grid of link conditions.
A batch is taken to be full, which is the slowest that a request can meet; nodes that may be taken away serve the share
of the time that they are there, and a job that loses its node pays the lost work once more.

Two corrections carry what simulation found and the formula does not know: `load_factors` are GPU-seconds held over
those predicted (model loads, requests of other sizes), `strain` is the factor on a pool's traffic under which the
formula gives the attainment that was simulated.

How long a job waits for its gang: multi-server queue formulas, the first rung of the ladder of fidelity.

A pool with `c` gangs at a time is treated as an M/G/c queue by Allen and Cunneen's approximation: the M/M/c probability
of waiting (Erlang C), and beyond it an exponential wait whose mean carries the variation of arrivals and service. It is
exact for M/M/c and for the mean wait of M/G/1; otherwise simulation confirms it.

Arrivals that come in bursts wait more often than Erlang says, evenly spaced ones less often. Hayward's approximation
(Fredericks 1980, for blocking) takes traffic of peakedness z on c servers as Poisson traffic on c / z: jobs of one
length have the peakedness of their arrivals' squared variation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridsd_sim.plan import tightest
from hybridsd_sim.pricing import Candidate, rental_usd_per_hour
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Pool, Scenario
from hybridsd_sim.workload import arrival_chunks, mean_rate_per_s

EVENNESS = 0.1
"""Least squared variation of arrivals: evenly spaced requests reach a pool through links of their own."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Jobs of one kind: `rate_per_s`, seconds of a gang of `degree` GPUs, and the variation (CV) of their arrivals."""

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
        return self.probability * self.scale_s if self.probability else 0.0


NO_WAIT = Wait(0.0, 0.0, 0.0)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an M/M/c customer waits; `offered` is the load in servers. 1 when overloaded.

    Computed by the recursion of Erlang's B formula, which does not overflow.
    """
    if offered >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    share = offered / servers
    return blocked / (1.0 - share * (1.0 - blocked))


def gang_servers(nodes: float, gpus_per_node: int, flows: Sequence[Flow]) -> float:
    """Gangs that run at a time: whole gangs per node, averaged over the flows by the GPU-seconds they ask for."""
    weights = [flow.rate_per_s * flow.hold_s for flow in flows]
    total = sum(weights)
    if total == 0.0:
        return float(nodes * gpus_per_node)
    # A harmonic mean: each kind of gang takes 1/(gangs per node) of a node for its share of the time.
    node_share = sum(w / (gpus_per_node // flow.degree) for w, flow in zip(weights, flows, strict=True))
    return nodes * total / node_share


def pool_wait(nodes: float, gpus_per_node: int, flows: Sequence[Flow]) -> Wait:
    """The wait of a job that joins the pool's queue; a node that is there a part of the time counts that part."""
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
    """The formula for one scenario; keeps the link grid and the rates, so that a deployment takes under a millisecond.

    `rates` are requests a second and the variation (CV) of their gaps, by class; `strain` is by pool and by edge fleet.
    """

    scenario: Scenario
    profiles: Profiles
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    load_factors: dict[str, float] = field(default_factory=dict)
    strain: dict[str, float] = field(default_factory=dict)
    unit_rent: dict[str, float] = field(default_factory=dict)
    """Dollars an hour of one node of each pool; infinite where nobody knows its price."""
    _slacks: dict[tuple[Candidate, float | None], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _latencies: dict[Candidate, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rates = self.rates or planning_rates(self.scenario)
        for name in self.scenario.pools:
            rent = rental_usd_per_hour(self.scenario, self.profiles, {name: 1})
            self.unit_rent[name] = math.inf if rent is None else rent

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
        known = self._latencies.get(candidate)
        if known is None:
            known = self._latencies[candidate] = self._over_links(candidate)
        return known

    def _over_links(self, candidate: Candidate) -> np.ndarray:
        held = candidate.batch_s[-1] + candidate.edge_s
        plan = candidate.plan
        if candidate.pool_index < 0 or plan.network is None:
            return np.full(LINK_GRID, held)
        network = self.profiles.network(plan.network)
        rate_u = (np.arange(LINK_GRID) + 0.5) / LINK_GRID
        rtt_u = ((np.arange(LINK_GRID) * 7) % LINK_GRID + 0.5) / LINK_GRID
        up = candidate.cost.bytes_up / network.up_bytes_per_s.at_many(rate_u)
        down = candidate.cost.bytes_down / network.down_bytes_per_s.at_many(rate_u)
        return np.asarray(held + up + down + network.rtt_s.at_many(rtt_u))

    def slacks(self, candidate: Candidate, within_s: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Seconds that a request may wait and still be in time, and how often each is met (weights that sum to 1).

        In time is inside the class's SLO, or `within_s`; infinite without either. A node's loss costs the work again.
        """
        key = (candidate, within_s)
        if key not in self._slacks:
            self._slacks[key] = self._find_slacks(candidate, within_s)
        return self._slacks[key]

    def _find_slacks(self, candidate: Candidate, within_s: float | None) -> tuple[np.ndarray, np.ndarray]:
        due_s = self.scenario.promises[candidate.request_class].deadline_s() if within_s is None else within_s
        slack = due_s - self.latencies(candidate)
        weights = np.full(LINK_GRID, 1.0 / LINK_GRID)
        if candidate.pool_index < 0 or not (rate := self._preemption_rate(candidate)):
            return slack, weights
        lost = 1.0 - math.exp(-rate * candidate.batch_s[-1])
        again = slack - candidate.batch_s[-1]
        return np.concatenate([slack, again]), np.concatenate([(1.0 - lost) * weights, lost * weights])

    def _preemption_rate(self, candidate: Candidate) -> float:
        return self._specs[candidate.pool_index].preemptions_per_s

    @property
    def _specs(self) -> list[Pool]:
        return list(self.scenario.pools.values())

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
        return Flow(share * rate * self.strain.get(name, 1.0) / len(candidate.batch_s), hold, candidate.degree, cv)

    def assess(self, mixes: Mixes, replicas: Mapping[str, int]) -> Sizing:
        """What the formula predicts of mixes on so many nodes."""
        waits = {name: self._pool_wait(index, mixes, replicas[name]) for index, name in enumerate(self.scenario.pools)}
        edges = [self.edge_wait(site, mixes) for site in self.scenario.edge]
        attainment = {
            name: sum(
                share * self.share_in_time(option, self.wait_of(option, waits), edge=edges[option.fleet_index])
                for share, option in mix
            )
            for name, mix in mixes.items()
        }
        missed = sum(max(0.0, self.wanted(name) - got) for name, got in attainment.items())
        return Sizing(
            mixes=mixes,
            replicas=dict(replicas),
            rent_usd_per_hour=sum(count * self.unit_rent[name] for name, count in replicas.items() if count),
            egress_usd_per_hour=sum(self.egress_usd_per_hour(o, share) for share, o in _parts(mixes)),
            waits=waits,
            attainment=attainment,
            missed=missed + self._edge_overload(mixes),
            quality=self._quality(mixes),
        )

    def _pool_wait(self, index: int, mixes: Mixes, nodes: int) -> Wait:
        spec = self._specs[index]
        flows = [self.flow(option, share) for share, option in _parts(mixes) if option.pool_index == index]
        return pool_wait(nodes * spec.availability, spec.gpus_per_node, flows)

    def edge_busy(self, option: Candidate, site: str) -> float:
        """Share of the time for which a fleet's devices are busy with a candidate, if all of its class has it."""
        busy = self.rates[option.request_class][0] * option.edge_s / self.scenario.edge[site].replicas
        return self.strain.get(site, 1.0) * busy

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

    def _edge_overload(self, mixes: Mixes) -> float:
        """By how much edge fleets are asked for more than their devices can do."""
        load: dict[int, float] = {}
        for share, option in _parts(mixes):
            busy = share * self.rates[option.request_class][0] * option.edge_s
            load[option.fleet_index] = load.get(option.fleet_index, 0.0) + busy
        fleets = list(self.scenario.edge.values())
        return sum(max(0.0, busy / fleets[i].replicas - EDGE_LOAD_MOST) for i, busy in load.items() if i >= 0)

    def _quality(self, mixes: Mixes) -> float | None:
        """Mean CLIP score over the requests served; None if any is unknown."""
        scores = [(share * self.rates[o.request_class][0], o.quality) for share, o in _parts(mixes)]
        total = sum(rate for rate, _ in scores)
        if not total or any(score is None for _, score in scores):
            return None
        return sum(rate * (score or 0.0) for rate, score in scores) / total

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
