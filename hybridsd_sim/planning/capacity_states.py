"""The capacity of a pool, precomputed: how much work so many nodes take before waits break a promise.

A *state* of a pool is a number of nodes, a cap on their load, and what kind of jobs they see: worker groups of at most
so many GPUs whose residual work (E[S^2] / 2 E[S], what an arriving request still waits for) is at most so long. In a
state the wait has a known tail: with c worker groups at a time and utilisation u

    P(wait > t) = C(c / z, u c / z) exp(-t / tau),    tau = residual / (c (1 - u)),

Erlang's C, Hayward's peakedness z and Allen and Cunneen's scale (`analytic`). So each state serves a plan in time or
does not, and the MILP picks one state for each pool: its cap is not a utilisation chosen by hand but the highest one at
which the promise still holds. The caps kept for a pool are those of its own plans, at most `CAPS` for one number of
nodes.

An edge fleet has caps as well where its devices could be busy enough to make somebody late: one queue for all devices
that are shared, one for each device that has an owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from hybridsd_sim.planning.analytic import EDGE_IDLE, EDGE_LOAD_MOST, EVENNESS, Sizer, share_waiting
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import EdgeFleet, Pool

Floats = npt.NDArray[np.float64]

Ints = npt.NDArray[np.int64]

NO_FLOATS, NO_INTS = np.empty(0), np.empty(0, np.int64)

CAPS, FEWER_CAPS = 8, 3
"""Most caps on the load for one number of nodes and one kind of jobs; the second where a pool has `MANY` plans."""

KINDS, FEWER_KINDS = 5, 1
"""Most bounds on the residual work of a pool's jobs."""

NODE_COUNTS, FEWER_NODE_COUNTS = 48, 16
"""Most numbers of nodes that a pool's states span; beyond, every few."""

MANY = 60
"""Plans of a pool for which its states are fewer: programs of thousands of states take the solver minutes."""

ALIKE = 1.15
"""Residuals that differ by less than this factor are taken as one, the longer."""

BOTH = 0.5
"""Part of the lateness that waits may cause which is a pool's, and as much its devices', where both have queues."""

STABLE = 0.98
"""Highest cap: beyond it queues are too long to be measured."""

LOADS = np.concatenate([np.linspace(0.02, 0.9, 45), STABLE - np.geomspace(0.078, 0.0005, 24), [STABLE]])
"""Utilisations at which waits are looked at."""

SCALES_S = np.geomspace(1e-5, 1e7, 400)
"""Scales tau at which lateness is tabulated, seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class ServiceDemand:
    """A plan as its pool sees it.

    `hold_s`: seconds that its worker group holds its GPUs. `residual_s`: what of them an arriving request still waits
    for, in the mean, times the squared variation of arrivals. `node_s`: seconds of a whole node that a request takes.
    `late` tabulates, over `SCALES_S`, the share of waiting requests that are late; `late_without_wait` is the share
    late without any wait, `allowed` the share that may be late.
    """

    candidate: Candidate
    degree: int
    hold_s: float
    residual_s: float
    node_s: float
    late: Floats
    late_without_wait: float
    allowed: float
    rate_per_s: float
    peakedness: float


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """The states of one pool: arrays of one length; `serves[plan, state]` says who is in time in which.

    `load` is the node-seconds a second that may be asked for, `residual_s` and `degree` bound the kind of jobs.
    """

    nodes: Ints
    load: Floats
    residual_s: Floats
    degree: Ints
    serves: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True, slots=True, eq=False)
class EdgeStates:
    """Caps on the share of the time that an edge fleet's devices are busy.

    For each plan that uses it the share that it asks for, served to all of its class, and the most at which it is in
    time.
    """

    busy: Floats
    most: Floats
    caps: Floats


def service_demand(
    candidate: Candidate, spec: Pool, sizer: Sizer, within_s: float | None, allowed: float, alone: float = 1.0
) -> ServiceDemand:
    """The candidate as its pool sees it, late where it takes longer than its SLO, or than `within_s` if given.

    `alone` is the pool's part of the lateness that waits may cause: less than 1 where devices have queues as well.
    """
    flow = sizer.flow(candidate)
    slack, weights = sizer.slacks(candidate, within_s)
    mine = slack >= 0.0
    late = np.exp(-slack[mine] / SCALES_S[:, None]) @ weights[mine]
    late_without_wait = float(weights[~mine].sum())
    return ServiceDemand(
        candidate=candidate,
        degree=candidate.degree,
        hold_s=flow.hold_s,
        residual_s=flow.hold_s * max(EVENNESS, flow.arrival_cv**2) / 2.0,
        node_s=flow.hold_s / len(candidate.batch_s) / (spec.gpus_per_node // candidate.degree),
        late=late,
        late_without_wait=late_without_wait,
        allowed=late_without_wait + alone * (allowed - late_without_wait),
        rate_per_s=flow.rate_per_s,
        peakedness=flow.arrival_cv**2,
    )


def pool_states(spec: Pool | None, demands: Sequence[ServiceDemand], load_most: float) -> States:
    """Every state of a pool worth considering; `load_most` is the most node-seconds a second that it can be asked for.

    A pool that is not there, or that no plan uses, has none.
    """
    if spec is None or not demands or not spec.replicas_max:
        return States(NO_INTS, NO_FLOATS, NO_FLOATS, NO_INTS, np.empty((len(demands), 0), np.bool_))
    few = len(demands) > MANY
    # A few bounds on residual work, the longest first, no two alike.
    residuals: list[float] = []
    for value in sorted((demand.residual_s for demand in demands), reverse=True):
        if not residuals or value * ALIKE < residuals[-1]:
            residuals.append(value)
    bounds = FEWER_KINDS if few else KINDS
    if len(residuals) > bounds:
        spread = {round(index * (len(residuals) - 1) / max(bounds - 1, 1)) for index in range(bounds)}
        residuals = [residuals[at] for at in sorted(spread)]
    # Numbers of nodes from the fewest to what the whole demand could need, every few where there are too many.
    first, most = max(1, spec.replicas_min), FEWER_NODE_COUNTS if few else NODE_COUNTS
    last = min(spec.replicas_max, max(first, int(2.0 * load_most / spec.availability) + 3))
    counts: Iterable[int] = range(first, last + 1)
    if last - first >= most:
        counts = sorted({round(count) for count in np.geomspace(first, last, most)})
    peakedness, parts = _peakedness(demands), []
    for residual_s, degree, nodes in product(residuals, sorted({demand.degree for demand in demands}), counts):
        groups = nodes * spec.availability * (spec.gpus_per_node // degree)
        breaks = _break_points(demands, groups, residual_s, degree, peakedness)
        caps = _representatives(breaks[breaks > 0.0], FEWER_CAPS if few else CAPS)
        kinds = (np.full(len(caps), residual_s), np.full(len(caps), degree))
        load = caps * nodes * spec.availability
        parts.append((np.full(len(caps), nodes), load, *kinds, breaks[:, None] >= caps[None, :]))
    nodes_of, load_of, residual_of, degree_of, serves = zip(*parts, strict=True)
    return States(
        nodes=np.concatenate(nodes_of),
        load=np.concatenate(load_of),
        residual_s=np.concatenate(residual_of),
        degree=np.concatenate(degree_of),
        serves=np.hstack(serves),
    )


def _peakedness(demands: Sequence[ServiceDemand]) -> dict[str, float]:
    """What each class sees of the squared variation of gaps, were all classes there that can be.

    Its own bursts, in which its requests meet each other; those of the others by half, for it meets them at any time.
    """
    classes = {demand.candidate.request_class: demand for demand in demands}
    total = sum(demand.rate_per_s for demand in classes.values())
    beyond = {
        name: demand.rate_per_s / total * (demand.peakedness - 1.0) if total else 0.0
        for name, demand in classes.items()
    }
    return {name: round(1.0 + (own + sum(beyond.values())) / 2.0, 6) for name, own in beyond.items()}


def _break_points(
    demands: Sequence[ServiceDemand], groups: float, residual_s: float, degree: int, peakedness: Mapping[str, float]
) -> Floats:
    """For each plan the highest utilisation at which it is still in time; 0 where there is none."""
    seen = {name: _waiting(round(groups, 9), z) for name, z in peakedness.items()}
    waits = np.array([seen[demand.candidate.request_class] for demand in demands])
    scale = residual_s / (groups * (1.0 - LOADS))
    late = np.array([np.interp(np.log(scale), np.log(SCALES_S), demand.late) for demand in demands])
    late_without_wait, allowed = (
        np.array([getattr(demand, key) for demand in demands]) for key in ("late_without_wait", "allowed")
    )
    fits = np.array([demand.degree <= degree for demand in demands])
    holds = (late_without_wait[:, None] + waits * late <= allowed[:, None]) & fits[:, None]
    last = holds.shape[1] - np.argmax(holds[:, ::-1], axis=1) - 1
    return np.where(holds.any(axis=1), LOADS[last], 0.0)


def edge_states(
    site: str, options: Sequence[Candidate], sizer: Sizer, promised: Sequence[tuple[float | None, float]]
) -> EdgeStates | None:
    """The caps of an edge fleet; None where everybody is in time there however requests are mixed.

    `promised` are, by plan, the seconds within which its requests must be served (None: the SLO) and the share that
    may be late.
    """
    busy = np.array([sizer.edge_busy(option, site) for option in options])
    longest: dict[str, float] = {}
    for option, share in zip(options, busy.tolist(), strict=True):
        longest[option.request_class] = max(longest.get(option.request_class, 0.0), share)
    whole = sum(longest.values())
    if whole <= EDGE_IDLE:
        return None
    fleet = sizer.scenario.edge[site]
    most = np.array([edge_cap(option, fleet, sizer, *asked) for option, asked in zip(options, promised, strict=True)])
    most = np.minimum(most, whole)
    return None if (most >= whole).all() else EdgeStates(busy, most, _representatives(most[most > 0.0], CAPS))


def edge_cap(option: Candidate, fleet: EdgeFleet, sizer: Sizer, within_s: float | None, allowed: float) -> float:
    """The most of the time that an edge fleet may be busy for a plan to be in time there; 0 where it never is.

    Half of the lateness that waits may cause is left to the queue of its pool, if it uses one.
    """
    queues = fleet.replicas if fleet.ownership == "shared" else 1
    slack, weights = sizer.slacks(option, within_s)
    mine = slack >= 0.0
    scale = option.edge_s / 2.0 / (queues * (1.0 - LOADS))
    late = _waiting(float(queues), 1.0) * (np.exp(-slack[mine] / scale[:, None]) @ weights[mine])
    part = BOTH if option.pool_index >= 0 else 1.0
    holds = late <= part * (allowed - weights[~mine].sum())
    return min(float(LOADS[holds].max(initial=0.0)), EDGE_LOAD_MOST)


@lru_cache(maxsize=4096)
def _waiting(groups: float, peakedness: float) -> Floats:
    """The share of requests that wait, over `LOADS`."""
    return np.array([share_waiting(groups, load * groups, peakedness) for load in LOADS])


def _representatives(breaks: Floats, most: int) -> Floats:
    """The distinct break points, highest first; where there are too many, a few spread over them, the ends included."""
    distinct: Floats = np.unique(breaks)[::-1]
    if len(distinct) <= most:
        return distinct
    few = np.unique(np.linspace(0, len(distinct) - 1, most).round().astype(int))
    return np.asarray(distinct[few])
