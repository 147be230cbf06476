"""Shadow prices: what a little more money, time, quality or traffic buys or costs.

Nodes are whole, so a price at the margin is that of a finite step: a dollar an hour, a second of every SLO, 0.005 of
CLIP, a tenth of the traffic. Before and after are both answers of the formulation, with what simulations taught the
formula, so that their difference is the change and not the formula's own error. "Nothing" is a true answer: where a
dollar buys no node it buys nothing. Costs are rent and metered egress at the planning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from hybridsd_sim.capacity import Evaluated, Margin
from hybridsd_sim.milp import GAP, Answer, Condition, Formulation, Goal
from hybridsd_sim.planner import Planner
from hybridsd_sim.variants import BIG, agreeing_headroom, first_that, latency_limits_s, solve, varied, whole_condition

DOLLARS, SECONDS, CLIP, TRAFFIC = 1.0, 1.0, 0.005, 0.1
"""The steps: USD an hour, seconds of SLO, CLIP score of every floor, and share of the traffic."""
LATENCIES, LATENCIES_BIG = 48, 8
"""Latencies that the fastest plan is looked for among, a few per cent apart; fewer for big formulations."""


def margins(planner: Planner, chosen: Evaluated) -> tuple[Margin, ...]:
    """What one more dollar, one more second, and a little more or less quality and traffic buy or cost.

    Where `chosen` holds on a cheaper fleet than the formula believes, the formula is asked for as much less traffic as
    makes it agree. Costs None mean that no plan holds there. A step that the scenario has no use for (a second of SLO
    where nobody is promised one) is left out; where as few as possible are to be turned away, nothing is told.
    """
    if planner.scenario.search.minimise == "turned_away_per_s":
        return ()
    condition = whole_condition(planner)
    headroom = 1.0 if condition is None else agreeing_headroom(planner, condition, chosen.usd_per_hour)
    base = solve(planner, headroom=headroom)
    before = None if base is None else base.objective
    found = list(_of_money(planner, condition, _dollars(planner, chosen), headroom)) if base and condition else []
    for change, other in _changed(planner):
        answer = solve(other, headroom=headroom)
        after = None if answer is None else answer.objective
        if before is not None and after is not None and abs(after - before) <= 2.0 * GAP * max(before, after):
            after = before  # the solver knows no difference smaller than its gap
        found.append(Margin(change, "usd_per_hour", before, after))
    return tuple(found)


def _changed(planner: Planner) -> Iterator[tuple[str, Planner]]:
    """The planner under each change whose cost is asked."""
    requests = planner.scenario.requests
    later = {f"requests.{name}.slo_s": s.slo_s + SECONDS for name, s in requests.items() if s.slo_s is not None}
    if later:
        yield "one more second of every SLO", varied(planner, later)
    for sign, what in ((1.0, "more"), (-1.0, "less")):
        floors = {name: s.quality_floor for name, s in requests.items() if s.quality_floor is not None}
        moved = {f"requests.{name}.quality_floor": _share(floor + sign * CLIP) for name, floor in floors.items()}
        if moved:
            yield f"{CLIP:g} of CLIP {what} on every quality floor", varied(planner, moved)
    for sign, what in ((1.0, "more"), (-1.0, "less")):
        yield f"ten per cent {what} traffic", varied(planner, {}, traffic=1.0 + sign * TRAFFIC)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _dollars(planner: Planner, chosen: Evaluated) -> float:
    """The rent to which one more dollar is added: the plan's, or the budget where something else is minimised."""
    rent = math.inf if chosen.usd_per_hour is None else chosen.usd_per_hour
    limit = planner.sizer.rent_limit_usd_per_hour
    return rent if limit is None or planner.scenario.search.minimise == "usd_per_hour" else limit


def _of_money(planner: Planner, condition: Condition, rent: float, headroom: float) -> Iterator[Margin]:
    """What latency can fall to and quality rise to for one dollar of rent an hour more.

    The latency is what 95% of the requests of every plan keep.
    """
    if not math.isfinite(rent):
        return
    whole = Formulation([condition])
    limits_s = latency_limits_s(condition, LATENCIES if whole.size < BIG else LATENCIES_BIG)

    def fits(level: int, dollars: float) -> bool:
        formulation = Formulation([replace(condition, within_s=limits_s[level])])
        return formulation.solve(Goal(minimise="nothing", usd_per_hour=dollars, headroom=headroom)) is not None

    first = first_that(lambda level: fits(level, rent), len(limits_s))
    if first < len(limits_s):
        sooner = first > 0 and fits(first - 1, rent + DOLLARS)
        then = first_that(lambda level: fits(level, rent + DOLLARS), first - 1) if sooner else first
        yield Margin("one more dollar an hour", "latency_p95_s", limits_s[first], limits_s[then])
    goals = [Goal(minimise="quality_loss", usd_per_hour=rent + more, headroom=headroom) for more in (0.0, DOLLARS)]
    before, after = (_quality(planner, whole.solve(goal)) for goal in goals)
    if before is not None and after is not None:
        yield Margin("one more dollar an hour", "quality", before, max(before, after))


def _quality(planner: Planner, answer: Answer | None) -> float | None:
    """The mean quality of an answer; None where there is none or its quality is not known."""
    return None if answer is None else planner.sizer.assess(answer.mixes, answer.replicas).quality
