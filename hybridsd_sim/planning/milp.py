"""The formulation: which mix of plans serves each class, on how many nodes of each pool, as a mixed-integer program.

Symbols: classes i with `rate_i` requests a second; plans j of a class, `w_ij` node-seconds of their pool a request,
`h_ij` seconds of its worker group, `r_ij` residual demand, `egress_ij` dollars a request, `q_ij` CLIP score, `e_ij`
seconds of an edge device; pools p of `rent_p` dollars an hour a node; states s of a pool with `n_s` nodes and `load_s`
node-seconds a second, caps of an edge fleet on the time that its devices are busy (`capacity_states`); conditions b,
one unless the plan must hold under several scenarios; `f` the goal's factor on all traffic and `c_p` the correction
factor of a pool (`Sizer.correction_factors`).

    x_ij in [0, 1]      share of class i served by plan j                        the same under every condition
    u_ib in [0, 1]      share of class i turned away                             0 unless that is what is minimised
    n_p  integer        nodes rented                                             the same under every condition
    z_bps in {0, 1}     pool p is run in state s

    minimise   sum_p rent_p n_p + 3600 sum_ij rate_i egress_ij x_ij              [USD per hour], or another figure
    subject to sum_j x_ij + u_i = 1                                              everybody is served
               sum_s z_bps <= 1,   sum_s n_s z_bps <= n_p                        one state, on rented nodes
               sum_j x_ij <= sum of z_bps over the states s in which plan k is in time,  the SLO at its percentile
                             j over the plans of class i that are so in no other state
               c_p f sum_ij rate_i w_ij x_ij <= sum_s load_s z_bps               the load of pool p [nodes]
               sum_ij mean rate_i w_ij x_ij <= sum_s n_s z_bps                   and its time, come what may
               sum_ij rate_i h_ij (r_ij - H) x_ij <= M (1 - z of states with residual H)     the kind of its jobs
               f sum_ij rate_i e_ij x_ij <= devices times a cap under which plan j is in time   edge fleets
               sum_p rent_p n_p <= budget,  mean q >= floor,  ...                what is asked (`Goal`)

Every part of a mix keeps its class's promises by itself: nobody is late so that the average holds. No-good cuts take
fleets out: some pool must have more nodes than each of them. Solved by HiGHS through scipy, as one sparse matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hybridsd_sim.planning.analytic import NO_WAIT, Mixes, Sizer
from hybridsd_sim.planning.capacity_states import (
    BOTH,
    EdgeStates,
    ServiceDemand,
    States,
    edge_states,
    pool_states,
    service_demand,
)
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.workload import mean_rate_per_s

Minimise = Literal["usd_per_hour", "quality_loss", "turned_away_per_s", "load", "nothing"]


UNKNOWN_RENT = 1e6
"""Dollars an hour of a node whose price nobody knows: it is rented when nothing else will do, and keeps no budget."""

GAP, LARGE_GAP, LARGE = 1e-4, 1e-3, 2000
"""Relative gap at which the solver stops; the second for programs of so many columns."""

OUT_OF_TIME = 1
"""Status of scipy's `milp` where a limit ended the search."""

SMALLEST_SHARE = 0.005
"""Parts of a mix below this are given to the others."""

TIE = 1e-6
"""Weight of the dollars where something else is minimised: the cheapest of equals."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Part = tuple[int, Ints, Floats]
"""Some entries of a row: its number, their columns and their weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """An objective and its constraints. Dollars are an hour; None constrains nothing.

    `minimise` "load" is the rent of the nodes while they are busy: the least loaded of the plans that meet the rest;
    "nothing" asks only whether there is one. `usd_per_hour` bounds the rent, `total_usd_per_hour` rent and egress
    together. `quality` is the least mean CLIP score. `turned_away_per_s` bounds what is turned away. `traffic_factor`
    multiplies the traffic: below 1 the formula is taken to be too careful by so much. `replicas` fixes nodes. Fleets
    of `no_good_cuts`, and smaller ones, are not to be used, nor plans `without` which it has to do.
    """

    minimise: Minimise = "usd_per_hour"
    usd_per_hour: float | None = None
    total_usd_per_hour: float | None = None
    quality: float | None = None
    turned_away_per_s: float | None = 0.0
    traffic_factor: float = 1.0
    replicas: Mapping[str, int] | None = None
    no_good_cuts: tuple[Mapping[str, int], ...] = ()
    without: frozenset[Candidate] = frozenset()
    time_limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution: mixes, nodes, what they cost by the formulation, and a bound below which nothing is left."""

    mixes: Mixes
    replicas: Mapping[str, int]
    objective: float
    bound: float


@dataclass(frozen=True, slots=True)
class Condition:
    """One scenario's side of the formulation: its formula, and its price of every plan, aligned over conditions.

    `plans[class][j]` is plan j of the class as this scenario prices it; None where it cannot run there. `within_s`
    replaces every class's SLO at its percentile where it is tighter: 95% of the requests of every plan inside it.
    `relaxed` classes may be late: they only have to be served. `slowdowns` are the factors on seconds, by site, that
    the prices hold already. `name` is the scenario's, where there are several.
    """

    sizer: Sizer
    plans: Mapping[str, Sequence[Candidate | None]]
    within_s: float | None = None
    relaxed: frozenset[str] = frozenset()
    slowdowns: Mapping[str, float] = field(default_factory=dict)
    name: str = ""


class Rows:
    """Rows of `A x <= b`, gathered in parts. Load rows keep their work apart, so that a traffic factor can scale it."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._most: list[float] = []
        self._scaled: list[Part] = []

    def at_most(self, columns: Sequence[int] | Ints, weights: Sequence[float] | Floats, most: float) -> None:
        """`weights x <= most` over some columns."""
        self._parts.append(self._part(columns, weights))
        self._most.append(most)

    def load(self, columns: Sequence[int] | Ints, asked: Floats, given: Floats) -> None:
        """`traffic_factor * asked x + given z <= 0`."""
        self._scaled.append(self._part(columns[: len(asked)], asked))
        self._parts.append(self._part(columns[len(asked) :], given))
        self._most.append(0.0)

    def _part(self, columns: Sequence[int] | Ints, weights: Sequence[float] | Floats) -> Part:
        return len(self._most), np.asarray(columns, dtype=np.int64), np.asarray(weights, dtype=np.float64)

    def with_traffic_factor(self, traffic_factor: float) -> Rows:
        """A copy whose loads are multiplied, to which more rows may be added."""
        rows = Rows()
        scaled = [(row, columns, weights * traffic_factor) for row, columns, weights in self._scaled]
        rows._parts = [*self._parts, *scaled]
        rows._most = list(self._most)
        return rows

    def constraint(self, size: int) -> LinearConstraint:
        """All rows as one sparse matrix of `size` columns."""
        rows = np.repeat([row for row, _, _ in self._parts], [len(columns) for _, columns, _ in self._parts])
        columns = np.concatenate([columns for _, columns, _ in self._parts])
        weights = np.concatenate([weights for _, _, weights in self._parts])
        matrix = coo_array((weights, (rows, columns)), shape=(len(self._most), size)).tocsr()
        return LinearConstraint(matrix, ub=np.array(self._most))


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """A condition: `demands[p]` are (column of x, demand) of pool p, `edges` (columns of x, states) of edge fleets.

    `first` are the first columns of the states of each pool, then of each of these fleets, and the end.
    """

    condition: Condition
    demands: list[list[tuple[int, ServiceDemand]]]
    states: list[States]
    first: list[int]
    edges: list[tuple[list[int], EdgeStates]]


class Formulation:
    """The program of one or several conditions: built once, solved many times for different goals.

    `gave_up` says whether the solver ever ran out of time without a solution: then None was no proof.
    """

    def __init__(self, conditions: Sequence[Condition]) -> None:
        first = conditions[0]
        self.gave_up = False
        self.sizer = first.sizer
        self.pools = list(self.sizer.scenario.pools)
        self.classes = list(first.plans)
        self._columns = [(name, j) for name in self.classes for j in range(len(first.plans[name]))]
        self._options: list[Candidate | None] = [first.plans[name][j] for name, j in self._columns]
        self._rates = np.array([self.sizer.rates[name][0] for name, _ in self._columns])
        self._turned = len(self._columns)
        self._nodes = self._turned + len(self.classes)
        at = self._nodes + len(self.pools)
        self._blocks: list[_Block] = []
        for condition in conditions:
            block = self._block(condition, at)
            self._blocks.append(block)
            at = block.first[-1]
        self.size = at
        self._rows = Rows()
        for block in self._blocks:
            rates = {name: rate for name, (rate, _) in block.condition.sizer.rates.items()}
            for index in range(len(self.pools)):
                if block.demands[index]:
                    self._add_pool(block, index, rates)
            for index, (columns, states) in enumerate(block.edges, len(self.pools)):
                z = np.arange(block.first[index], block.first[index + 1])
                self._rows.at_most(z, np.ones(len(z)), 1.0)
                self._add_service(columns, states.caps <= states.most[:, None], z)
                self._rows.load([*columns, *z], states.busy, -states.caps)
        for sizer in (block.condition.sizer for block in self._blocks[1:]):  # the first one's budget is the goal's
            if (limit := sizer.rent_limit_usd_per_hour) is not None:
                rent = [min(sizer.unit_rent.get(name, 0.0), UNKNOWN_RENT) for name in self.pools]
                self._rows.at_most(range(self._nodes, self._nodes + len(self.pools)), rent, limit)

    def _block(self, condition: Condition, at: int) -> _Block:
        """What a condition adds to the program; its states stand from column `at` on."""
        scenario, rates = condition.sizer.scenario, condition.sizer.rates
        edges: list[tuple[list[int], EdgeStates]] = []
        for index, site in enumerate(scenario.edge):  # those fleets that could be too busy
            mine = [
                (column, option)
                for column, (name, j) in enumerate(self._columns)
                if (option := condition.plans[name][j]) is not None and option.fleet_index == index and option.edge_s
            ]
            promised = [_promise(option, condition) for _, option in mine]
            caps = edge_states(site, [option for _, option in mine], condition.sizer, promised)
            edges += [] if caps is None else [([column for column, _ in mine], caps)]
        queued = {column for columns, _ in edges for column in columns}
        demands: list[list[tuple[int, ServiceDemand]]] = [[] for _ in self.pools]
        for column, (name, j) in enumerate(self._columns):
            option = condition.plans[name][j]
            if option is not None and option.pool_index >= 0:
                pool, alone = option.plan.cloud_stages[0].site.name, BOTH if column in queued else 1.0
                demand = service_demand(
                    option, scenario.pools[pool], condition.sizer, *_promise(option, condition), alone
                )
                demands[self.pools.index(pool)].append((column, demand))
        states = []
        for pool, jobs in zip(self.pools, demands, strict=True):
            load_most = self._together((c, rates[self._columns[c][0]][0] * demand.node_s) for c, demand in jobs)
            states.append(pool_states(scenario.pools.get(pool), [demand for _, demand in jobs], load_most))
        first = [at + int(n) for n in np.cumsum([0, *(len(s) for s in states)])]
        last = np.cumsum([first[-1], *(len(states.caps) for _, states in edges)]).tolist()
        return _Block(condition, demands, states, [*first, *last[1:]], edges)

    def _together(self, each: Iterable[tuple[int, float]]) -> float:
        """The most that values of columns come to, each class wholly on one of its plans; at least 0."""
        most: dict[str, float] = {}
        for column, value in each:
            name = self._columns[column][0]
            most[name] = max(most.get(name, 0.0), float(value))
        return sum(most.values())

    def _add_pool(self, block: _Block, index: int, rates: Mapping[str, float]) -> None:
        states, rows = block.states[index], self._rows
        scenario, demands = block.condition.sizer.scenario, block.demands[index]
        z = np.arange(block.first[index], block.first[index + 1])
        rows.at_most(z, np.ones(len(z)), 1.0)
        rows.at_most([*z, self._nodes + index], [*states.nodes, -1.0], 0.0)
        columns = [column for column, _ in demands]
        self._add_service(columns, states.serves, z)
        busy = np.array([rates[self._columns[c][0]] * demand.node_s for c, demand in demands])
        correction = block.condition.sizer.correction_factors.get(self.pools[index], 1.0)
        rows.load([*columns, *z], busy * correction, -states.load)
        # No fleet does more than its time, whatever traffic factor is asked: the load at the mean rates is at most 1.
        mean = {name: mean_rate_per_s(spec.arrivals) for name, spec in scenario.requests.items()}
        busy_mean = [mean[self._columns[column][0]] * demand.node_s for column, demand in demands]
        there = states.nodes * scenario.pools[self.pools[index]].availability
        rows.at_most([*columns, *z], [*busy_mean, *(-there)], 0.0)
        # The mean residual work of the pool's jobs is bounded where a state says so; the longest bounds nothing.
        per_batch = np.array([rates[self._columns[c][0]] / len(w.candidate.batch_s) for c, w in demands])
        for residual_s in np.unique(states.residual_s)[:-1].tolist():
            excess = per_batch * [2.0 * demand.hold_s * (demand.residual_s - residual_s) for _, demand in demands]
            most = self._together(zip(columns, excess, strict=True))
            bound = z[states.residual_s == residual_s]
            rows.at_most([*columns, *bound], [*excess, *(most for _ in bound)], most)

    def _add_service(self, columns: Sequence[int], serves: np.ndarray, z: np.ndarray) -> None:
        """A plan needs a state in which it is in time, and so do those of its class together that need no other."""
        classes = np.array([self._columns[column][0] for column in columns])
        for name in dict.fromkeys(classes):
            mine = np.flatnonzero(classes == name)
            for pattern in np.unique(serves[mine], axis=0):
                within = [columns[k] for k in mine[~(serves[mine] & ~pattern).any(axis=1)]]
                self._rows.at_most([*within, *z[pattern]], [1.0] * len(within) + [-1.0] * pattern.sum(), 0.0)

    def solve(self, goal: Goal) -> Solution | None:
        """The best mix and fleet for a goal; None where no plan meets it, or none was found in time (`gave_up`)."""
        rows = self._rows.with_traffic_factor(goal.traffic_factor)
        low, high, whole = self._bounds(goal)
        for columns, weights, least in self._constraints(goal):
            rows.at_most(columns, [-w for w in weights], -least)
        found = milp(
            self._objective(goal.minimise),
            integrality=whole,
            bounds=Bounds(low, high),
            constraints=rows.constraint(self.size),
            options={"mip_rel_gap": GAP if self.size < LARGE else LARGE_GAP, "time_limit": goal.time_limit_s},
        )
        if found.x is None:
            self.gave_up |= found.status == OUT_OF_TIME
            return None
        mixes = {}
        for i, name in enumerate(self.classes):
            parts = [
                (float(found.x[column]), option)
                for column, ((of, _), option) in enumerate(zip(self._columns, self._options, strict=True))
                if of == name and option is not None and found.x[column] >= SMALLEST_SHARE
            ]
            total = sum(share for share, _ in parts)
            served = 1.0 - float(found.x[self._turned + i])
            served = 1.0 if served > 1.0 - SMALLEST_SHARE else served
            scaled = [(share * served / total, option) for share, option in parts]
            mixes[name] = tuple(sorted(scaled, key=lambda part: -part[0]))
        nodes = found.x[self._nodes : self._nodes + len(self.pools)]
        replicas = {name: round(float(count)) for name, count in zip(self.pools, nodes, strict=True)}
        bound: float | None = found.get("mip_dual_bound")  # None where nothing had to be branched on
        bound = found.fun if bound is None else bound
        return Solution(mixes, replicas, float(found.fun), float(bound))

    def _bounds(self, goal: Goal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = np.zeros(self.size), np.ones(self.size)
        for column, (name, j) in enumerate(self._columns):
            high[column] = float(self._options[column] not in goal.without)
            for condition in (block.condition for block in self._blocks):
                option = condition.plans[name][j]
                if option is None:
                    high[column] = 0.0
                elif option.pool_index < 0:  # at the edge alone no state of a pool says whether it is in time
                    within_s, allowed = _promise(option, condition)
                    if condition.sizer.share_in_time(option, NO_WAIT, within_s) < 1.0 - allowed:
                        high[column] = 0.0
        if goal.turned_away_per_s == 0.0:
            high[self._turned : self._nodes] = 0.0
        for index, (name, spec) in enumerate(self.sizer.scenario.pools.items()):
            column = self._nodes + index
            low[column], high[column] = spec.replicas_min, spec.replicas_max
            if goal.replicas is not None:
                low[column] = high[column] = goal.replicas[name]
        whole = np.ones(self.size)
        whole[: self._nodes] = 0.0
        return low, high, whole

    def _rent(self) -> np.ndarray:
        return np.array([min(self.sizer.unit_rent[name], UNKNOWN_RENT) for name in self.pools])

    def _dollars(self) -> np.ndarray:
        cost = np.zeros(self.size)
        cost[: self._turned] = [0.0 if o is None else self.sizer.egress_usd_per_hour(o) for o in self._options]
        cost[self._nodes : self._nodes + len(self.pools)] = self._rent()
        return cost

    def _objective(self, minimise: Minimise) -> np.ndarray:
        dollars = self._dollars()
        if minimise in {"usd_per_hour", "nothing"}:
            return dollars if minimise == "usd_per_hour" else 0.0 * dollars
        cost = TIE * dollars
        if minimise == "quality_loss":
            cost[: self._turned] += self._rates * [1.0 - _score(option) for option in self._options]
        elif minimise == "turned_away_per_s":
            cost[self._turned : self._nodes] += [self.sizer.rates[name][0] for name in self.classes]
        else:
            for block in self._blocks:  # the rent of the nodes while they are busy, under each condition
                rates = block.condition.sizer.rates
                for rent, demands in zip(self._rent(), block.demands, strict=True):
                    for column, demand in demands:
                        cost[column] += rent * rates[self._columns[column][0]][0] * demand.node_s
        return cost

    def _constraints(self, goal: Goal) -> Iterator[tuple[Sequence[int], Sequence[float], float]]:
        """The goal's own constraints, as (columns, weights, least weighted sum)."""
        nodes = range(self._nodes, self._nodes + len(self.pools))
        shares = range(self._turned)
        if goal.usd_per_hour is not None:
            yield nodes, list(-self._rent()), -goal.usd_per_hour
        if goal.total_usd_per_hour is not None:
            dollars = self._dollars()
            used = [*shares, *nodes]
            yield used, list(-dollars[used]), -goal.total_usd_per_hour
        if goal.quality is not None:
            gain = self._rates * (np.array([_score(option) for option in self._options]) - goal.quality)
            yield shares, list(gain), 0.0
        if goal.turned_away_per_s:
            rates = [self.sizer.rates[name][0] for name in self.classes]
            yield range(self._turned, self._nodes), [-rate for rate in rates], -goal.turned_away_per_s
        for name in self.classes:  # sum of shares is 1: at most by `at_least` here, at least by the twin
            mine = [c for c, (of, _) in enumerate(self._columns) if of == name]
            columns = [*mine, self._turned + self.classes.index(name)]
            yield columns, [1.0] * len(columns), 1.0
            yield columns, [-1.0] * len(columns), -1.0
        for fleet in goal.no_good_cuts:  # some pool has more nodes in its state than the fleet, under some condition
            larger = [
                int(block.first[index] + k)
                for block in self._blocks
                for index, name in enumerate(self.pools)
                for k in np.flatnonzero(block.states[index].nodes > fleet[name])
            ]
            yield larger, [1.0] * len(larger), 1.0


def _promise(option: Candidate, condition: Condition) -> tuple[float | None, float]:
    """Seconds within which requests of the plan must be served (None: the SLO), and the share that may be late."""
    sizer, within_s = condition.sizer, condition.within_s
    if option.request_class in condition.relaxed:
        return math.inf, 1.0
    allowed = 1.0 - sizer.wanted(option.request_class)
    if within_s is not None and within_s < sizer.scenario.promises[option.request_class].deadline_s():
        return within_s, min(allowed, 0.05)
    return None, allowed


def _score(option: Candidate | None) -> float:
    """The CLIP score that counts: an unknown one is none."""
    return 0.0 if option is None or option.quality is None else option.quality
