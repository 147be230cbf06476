"""Cost, latency and quality together: the capacity plans of which none is better in one without being worse in another.

Epsilon-constraint over the formulation. Dollars and quality come from it directly; the latency axis is a limit L that
95% of the requests of every plan of a mix must keep (`Condition.within_s`). Fleets come first: the cheapest, that of
the best quality, the fastest, and for rents in between those of the best quality within no L and within a tight one.
On every fleet the best quality is then looked for within some L between the least that it can keep and none, and on the
largest ones nodes are added while that still shortens waits.

Every plan found is evaluated on the scenario's own requests by the compiled recursion, or by formula alone where that
does not apply. The formula is careful about SLOs: on each fleet it is asked for the smallest of `TRAFFIC_FACTORS` at
which the plan that comes out still holds. The promises of the scenario hold for every point; what another one beats is
left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hybridsd_sim.planning.analytic import Sizing
from hybridsd_sim.planning.evaluation import EvaluatedPlan, dominates, same_figures
from hybridsd_sim.planning.milp import Condition, Formulation, Solution
from hybridsd_sim.planning.planner import (
    BIG,
    Planner,
    budgeted_goal,
    evaluate_quickly,
    latency_limits_s,
    quickest_level,
    strict_condition,
)

NAME = "frontier"

Fleet = tuple[int, ...]
"""Nodes of each pool, in the scenario's order."""

SOLVES, SOLVES_BIG = 200, 24
"""Programs that one frontier solves at most; of big formulations, far fewer."""

FLEETS = 9
"""Rents between the cheapest and the dearest fleet at which the best quality is looked for."""

FLEETS_EVALUATED = 14
"""Fleets on which plans are evaluated at most."""

LATENCIES = 32
"""Limits L from the fastest plan to the slowest one, geometrically spaced."""

LEVELS = 6
"""Limits L tried on one fleet."""

TRAFFIC_FACTORS = (0.72, 0.82, 0.91, 1.0)
"""Factors on the traffic that the formula is asked for, the smallest first."""

SAME_QUALITY = 2e-5
"""CLIP scores closer than this are one."""

NEARLY = 0.1
"""Share by which the formula may be wrong when it compares the latencies of two plans."""

FALLS = 0.01
"""Share by which one more node must shorten the p95 latency to be worth a point."""

NODES_ADDED_MOST = 6
"""Most nodes added to a fleet of one pool only to shorten waits."""

TIME_LIMIT_S = 10.0
"""Seconds after which the solver's best solution so far is taken."""


def frontier(planner: Planner, chosen: EvaluatedPlan) -> tuple[EvaluatedPlan, ...]:
    """The plans that no other beats in rent, p95 latency of all requests and mean quality, the cheapest first.

    `chosen` is among them, or beaten by one of them, if it holds. Where no plan keeps every promise by formula, there
    is only `chosen`, or nothing if that does not hold either.
    """
    points = [chosen] if chosen.feasible else []
    if points and chosen.deployment is not None and quickest_level(planner.scenario, chosen.deployment) == "simulate":
        # Where the recursion does not apply all other points are by formula, so this one is too.
        sizing = planner.sizer.assess(planner.priced(chosen.deployment), chosen.deployment.replicas)
        points = [EvaluatedPlan.from_formula(chosen.name, sizing, planner.sizer)]
    condition = strict_condition(planner)
    if condition is not None:
        curve = _Curve(planner, condition)
        points += curve.points([curve.fleet(point.deployment.replicas) for point in points if point.deployment])
    best: list[EvaluatedPlan] = []
    for point in points:
        if not any(dominates(other, point) or same_figures(other, point) for other in best):
            best = [other for other in best if not dominates(point, other)] + [point]

    def rent_and_latency(point: EvaluatedPlan) -> tuple[float, float]:
        return math.inf if point.usd_per_hour is None else point.usd_per_hour, point.latency_p95_s[0]

    return tuple(sorted(best, key=rent_and_latency))


@dataclass(slots=True)
class _Curve:
    """The formulation within each limit L, its solutions, and the plans that were evaluated."""

    planner: Planner
    condition: Condition
    limits_s: list[float | None] = field(default_factory=list)
    _formulations: dict[int, Formulation] = field(default_factory=dict)
    _solutions: dict[tuple[int, Fleet, float], Solution | None] = field(default_factory=dict)
    _evaluated: dict[object, EvaluatedPlan] = field(default_factory=dict)
    _solved: int = 0
    _best: float = math.inf

    def __post_init__(self) -> None:
        self.limits_s = [*latency_limits_s(self.condition, LATENCIES), None]

    def points(self, known: Sequence[Fleet]) -> list[EvaluatedPlan]:
        """Every plan that was evaluated and holds: on the fleets found, those `known`, and some with more nodes."""
        every = [*known, *sorted(self._fleets() - {*known}, key=lambda fleet: (self._rent(fleet), fleet))]
        fleets = [every[at] for at in sorted({round(at) for at in np.linspace(0, len(every) - 1, FLEETS_EVALUATED)})]
        factors = self._least_traffic_factors(fleets)
        found = {fleet: self._tradeoffs(fleet, factors[fleet]) for fleet in fleets}
        rivals = [sizing for sizings in found.values() for sizing in sizings]
        least_loaded = [self._least_loaded(mine[0]) for mine in found.values() if mine]
        self._evaluate([*rivals, *(self._swapped(rivals) if rivals else ()), *least_loaded])
        # More nodes only where neither each other nor what is known on other fleets beats them by formula.
        larger = [more for mine in found.values() for more in self._with_more_nodes(mine, fleets)]
        by_formula = [EvaluatedPlan.from_formula("", one, self.planner.sizer) for one in (*larger, *rivals)]
        unbeaten = (not any(dominates(other, point) for other in by_formula) for point in by_formula)
        self._evaluate([one for one, best in zip(larger, unbeaten, strict=False) if best])
        return [point for point in self._evaluated.values() if point.feasible]

    def fleet(self, replicas: Mapping[str, int]) -> Fleet:
        """Nodes in the scenario's order of pools."""
        return tuple(replicas.get(name, 0) for name in self.planner.scenario.pools)

    def _replicas(self, fleet: Fleet) -> dict[str, int]:
        return dict(zip(self.planner.scenario.pools, fleet, strict=True))

    def _rent(self, fleet: Fleet) -> float:
        rents = self.planner.sizer.unit_rent
        return sum(count * rents[name] for name, count in self._replicas(fleet).items() if count)

    def _solve(self, level: int, **constraints: Any) -> Solution | None:
        """A solution within the limit of a level; None also when enough programs were solved."""
        if level not in self._formulations:
            self._formulations[level] = Formulation([replace(self.condition, within_s=self.limits_s[level])])
        formulation = self._formulations[level]
        if self._solved >= (SOLVES if formulation.size < BIG else SOLVES_BIG):
            return None
        self._solved += 1
        return formulation.solve(budgeted_goal(self.planner, time_limit_s=TIME_LIMIT_S, **constraints))

    def _fleets(self) -> set[Fleet]:
        """The cheapest fleet, that of the best quality, the fastest, and between their rents those of best quality."""
        none = len(self.limits_s) - 1
        cheapest = self._solve(none, minimise="usd_per_hour")
        finest = self._solve(none, minimise="quality_loss")
        if cheapest is None or finest is None:
            return set()
        least = self._sizing(finest).quality
        self._best = _score(self._sizing(finest))
        limit = {} if least is None else {"quality": least - SAME_QUALITY}
        tight = bisect_left(range(none), x=True, key=lambda level: self._solve(level, minimise="nothing") is not None)
        fastest = self._solve(tight, minimise="usd_per_hour") or cheapest
        ends = [cheapest, self._solve(none, minimise="usd_per_hour", **limit) or finest, fastest]
        fleets = {self.fleet(end.replicas) for end in ends}
        rents = [self._rent(fleet) for fleet in fleets]
        span, nodes = max(rents) - min(rents), [r for r in self.planner.sizer.unit_rent.values() if 0.0 < r < math.inf]
        if not nodes or not math.isfinite(span):
            return fleets
        step = max(min(nodes), span / FLEETS)  # a node of the cheapest pool, or more
        for rent in [min(rents) + step * count * (1.0 + 1e-9) for count in range(math.ceil(span / step))]:
            for level in (none, (tight + none) // 2):
                solution = self._solve(level, minimise="quality_loss", usd_per_hour=rent)
                fleets |= {self.fleet(solution.replicas)} if solution else set()
        return fleets

    def _finest(self, level: int, fleet: Fleet, traffic_factor: float) -> Solution | None:
        """The best quality on a fleet within the limit of a level."""
        key = (level, fleet, traffic_factor)
        if key not in self._solutions:
            constraints = {"replicas": self._replicas(fleet), "traffic_factor": traffic_factor}
            self._solutions[key] = self._solve(level, minimise="quality_loss", **constraints)
        return self._solutions[key]

    def _least_traffic_factors(self, fleets: Sequence[Fleet]) -> dict[Fleet, float]:
        """For each fleet the least factor at which the plan of the best quality holds, by halving; 1 if none does."""
        none, last = len(self.limits_s) - 1, len(TRAFFIC_FACTORS) - 1
        high, held = dict.fromkeys(fleets, last), dict.fromkeys(fleets, last)
        low = dict.fromkeys(fleets, -1)
        for fleet in fleets:  # less traffic gains nothing where the formula has the best quality already
            solution = self._finest(none, fleet, 1.0)
            if solution is not None and _score(self._sizing(solution)) >= self._best - SAME_QUALITY:
                low[fleet] = last
        while unsure := [fleet for fleet in fleets if high[fleet] - low[fleet] > 1]:
            middle = {fleet: (low[fleet] + high[fleet]) // 2 for fleet in unsure}
            solutions = {fleet: self._finest(none, fleet, TRAFFIC_FACTORS[at]) for fleet, at in middle.items()}
            sizings = {fleet: self._sizing(solution) for fleet, solution in solutions.items() if solution}
            points = dict(zip(sizings, self._evaluate(list(sizings.values())), strict=True))
            for fleet, at in middle.items():
                if fleet in points and not points[fleet].feasible:
                    low[fleet] = at
                else:  # it holds, or the formula has a plan at less traffic alone
                    high[fleet] = at
                    held[fleet] = at if fleet in points else held[fleet]
        return {fleet: TRAFFIC_FACTORS[at] for fleet, at in held.items()}

    def _tradeoffs(self, fleet: Fleet, least_factor: float) -> list[Sizing]:
        """The best quality within some limits on one fleet, the tightest limit first; of equal quality the fastest.

        Without a limit at the factor that was found to hold; so within limits too where the formula has no plan else.
        """
        none = len(self.limits_s) - 1
        usual = least_factor if self._finest(none, fleet, 1.0) is None else 1.0
        tight = bisect_left(range(none), x=True, key=lambda level: self._finest(level, fleet, usual) is not None)
        found: list[Sizing] = []
        for level in sorted({round(level) for level in np.linspace(tight, none, LEVELS)}):
            solution = self._finest(level, fleet, least_factor if level == none else usual)
            sizing = None if solution is None else self._sizing(solution)
            if sizing and not any(_score(sizing) <= _score(other) + SAME_QUALITY for other in found):
                found.append(sizing)
        return found

    def _swapped(self, sizings: Sequence[Sizing]) -> list[Sizing]:
        """For each plan the best picture that is about as fast, with one class served wholly by a single plan.

        The latency that 95% of all requests keep is not the limit that every plan keeps: a slower plan may do, or one
        plan alone wait less than two. By formula, with plans that are in use somewhere.
        """
        sizer, found = self.planner.sizer, []
        used = {name: list(dict.fromkeys(o for s in sizings for _, o in s.mixes[name])) for name in sizings[0].mixes}
        for sizing in sizings:
            slowest_s = (1.0 + NEARLY) * sizer.quantile(sizing, 0.95)
            mixes = [{**sizing.mixes, name: ((1.0, o),)} for name, options in used.items() for o in options]
            others = [sizer.assess(each, sizing.replicas) for each in mixes]
            finer = [o for o in others if o.missed <= 0.0 and _score(o) > _score(sizing) - SAME_QUALITY]
            best: list[tuple[float, Sizing]] = []
            for other in sorted(finer, key=_score, reverse=True):
                if best and _score(other) < _score(best[0][1]) - SAME_QUALITY:
                    break
                p95_s = sizer.quantile(other, 0.95)
                best += [(p95_s, other)] if p95_s <= slowest_s else []
            found += [min(best, key=lambda pair: pair[0])[1]] if best else []
        return found

    def _least_loaded(self, sizing: Sizing) -> Sizing:
        """The same fleet with each class on the plan that loads it least, of those no slower than its own slowest.

        A limit that every plan keeps is met as soon as the slowest class is within it. That others could be quicker, or
        leave more room to the slowest, it does not ask.
        """
        nodes, mixes = self.fleet(sizing.replicas), dict(sizing.mixes)
        for name, mix in sizing.mixes.items():
            slowest_s = max(option.full_batch_latency_s for _, option in mix)
            able = [
                option
                for option in self.condition.plans[name]
                if option is not None
                and option.full_batch_latency_s <= slowest_s
                and (option.pool_index < 0 or nodes[option.pool_index])
            ]
            mixes[name] = ((1.0, min(able, key=lambda o: (o.gpu_seconds, o.full_batch_latency_s))),)
        return self.planner.sizer.assess(mixes, sizing.replicas)

    def _with_more_nodes(self, sizings: Sequence[Sizing], fleets: Sequence[Fleet]) -> Iterator[Sizing]:
        """The fastest and the finest mix with more nodes of one pool, as long as these shorten the p95 latency.

        By formula, and only fleets that no better mix was looked for on.
        """
        sizer = self.planner.sizer
        for sizing in {id(end): end for end in (*sizings[:1], *sizings[-1:])}.values():
            for pool, spec in self.planner.scenario.pools.items():
                nodes, p95_s = sizing.replicas[pool], sizer.quantile(sizing, 0.95)
                for more in range(nodes + 1, min(nodes + NODES_ADDED_MOST, spec.replicas_max) + 1 if nodes else 0):
                    larger = sizer.assess(sizing.mixes, {**sizing.replicas, pool: more})
                    shorter_s = sizer.quantile(larger, 0.95)
                    dear = larger.rent_usd_per_hour > (sizer.rent_limit_usd_per_hour or math.inf)
                    if dear or shorter_s > (1.0 - FALLS) * p95_s or self.fleet(larger.replicas) in fleets:
                        break
                    p95_s = shorter_s
                    yield larger

    def _sizing(self, solution: Solution) -> Sizing:
        return self.planner.sizer.assess(solution.mixes, solution.replicas)

    def _evaluate(self, sizings: Sequence[Sizing]) -> list[EvaluatedPlan]:
        """The plans' figures on the scenario's own requests, or by formula where the recursion does not apply."""
        fresh = {self._key(sizing): sizing for sizing in sizings if self._key(sizing) not in self._evaluated}
        plans = evaluate_quickly(self.planner, [(NAME, sizing) for sizing in fresh.values()])
        self._evaluated.update(zip(fresh, plans, strict=True))
        return [self._evaluated[self._key(sizing)] for sizing in sizings]

    def _key(self, sizing: Sizing) -> object:
        parts = [(id(o), round(share, 5)) for mix in sizing.mixes.values() for share, o in mix]
        return self.fleet(sizing.replicas), tuple(parts)


def _score(sizing: Sizing) -> float:
    """Mean CLIP score; an unknown one counts worst."""
    return -1.0 if sizing.quality is None else sizing.quality
