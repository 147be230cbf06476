"""How long a job waits for its gang: multi-server queue formulas, the first rung of the ladder of fidelity.

A pool with `c` gangs at a time is treated as an M/G/c queue by Allen and Cunneen's approximation: the M/M/c probability
of waiting (Erlang C), and beyond it an exponential wait whose mean carries the variation of arrivals and service. It is
exact for M/M/c and for the mean wait of M/G/1; otherwise simulation confirms it.

Arrivals that come in bursts wait more often than Erlang says, evenly spaced ones less often. Hayward's approximation
(Fredericks 1980, for blocking) takes traffic of peakedness z on c servers as Poisson traffic on c / z: jobs of one
length have the peakedness of their arrivals' squared variation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
