"""What else could be done: near-optimal plans that differ in kind, and what a small change of each limit buys.

Alternatives are Calliope's "spores" (Lombardi et al., Joule 4, 2020): the cheapest plan is one of many that cost about
the same, and people have reasons of their own to take another one. Each kind (one pool only, one parallel method only,
without a switch, with one in every request, without the pool most used, on demand only, spot only) gives its cheapest
plan by formula, the least loaded of those that cost about the same, which is evaluated on the scenario's own requests.
At first the formula is asked for as much less traffic as makes it agree with the chosen plan; where nothing comes of
that, for all of it, and then for some more.

Margins are shadow prices over a finite step, because nodes are whole: a dollar an hour, a second of every SLO, 0.005 of
CLIP, a tenth of the traffic. Before and after are both solutions of the formulation, with what simulations taught the
formula, so that their difference is the change and not the formula's own error. "Nothing" is a true answer: where a
dollar buys no node it buys nothing. Costs are rent and metered egress at the planning rates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.capacity_plan import Margin
from hybridsd_sim.planning.evaluation import EvaluatedPlan
from hybridsd_sim.planning.milp import GAP, Condition, Formulation, Goal, Solution
from hybridsd_sim.planning.planner import (
    BIG,
    Keep,
    Planner,
    budgeted_goal,
    evaluate_quickly,
    fit_traffic_factor,
    is_hybrid,
    latency_limits_s,
    solve,
    strict_condition,
    vary,
)
from hybridsd_sim.planning.search import NEARLY_EQUAL

NEAR_OPTIMAL = 1.3
"""Alternatives rent for at most this many times as much as the chosen plan."""

MOST = 6
"""Alternatives given at most."""

LAST_TRAFFIC_FACTORS = (1.0, 1.15)
"""Factors on the traffic for which a kind is solved in the end, until its plan holds."""

SAME = 0.01
"""Plans that differ by less than this, in shares of the nodes and of the requests, are one."""

DOLLARS, SECONDS, CLIP, TRAFFIC = 1.0, 1.0, 0.005, 0.1
"""The steps: USD an hour, seconds of SLO, CLIP score of every floor, and share of the traffic."""

LATENCIES, LATENCIES_BIG = 48, 8
"""Latencies that the fastest plan is looked for among, a few per cent apart; fewer for big formulations."""


def alternatives(planner: Planner, chosen: EvaluatedPlan) -> tuple[EvaluatedPlan, ...]:
    """The cheapest plan of each kind that holds, differs from `chosen` and rents for little more; most different first.

    Figures are those of the compiled recursion, or by formula where it does not apply. Their names are the kinds. None
    where the price of the chosen plan is unknown.
    """
    if chosen.deployment is None or chosen.usd_per_hour is None:
        return ()
    waiting = _kinds(planner, chosen.deployment)
    found: list[EvaluatedPlan] = []
    condition = strict_condition(planner)
    first = 1.0 if condition is None else fit_traffic_factor(planner, condition, chosen.usd_per_hour)
    for factor in dict.fromkeys((first, *LAST_TRAFFIC_FACTORS)):
        solutions = {name: _cheapest(planner, keep, chosen.usd_per_hour, factor) for name, keep in waiting.items()}
        sizings = [(name, planner.sizer.assess(s.mixes, s.replicas)) for name, s in solutions.items() if s]
        feasible = [plan for plan in evaluate_quickly(planner, sizings) if plan.feasible]
        found += feasible
        for plan in feasible:
            del waiting[plan.name]
    # One after the other the plan that is furthest from the chosen one and from those picked before it.
    picked = [chosen]
    while found and len(picked) <= MOST:
        distances = [min(distance(planner, plan, other) for other in picked) for plan in found]
        furthest = max(range(len(found)), key=lambda index: distances[index])
        if distances[furthest] < SAME:
            break
        picked.append(found.pop(furthest))
    return tuple(picked[1:])


def _kinds(planner: Planner, chosen: Deployment) -> dict[str, Keep]:
    """Kinds of plan by name; those which the chosen plan is of already are left out."""
    scenario, pools = planner.scenario, list(planner.scenario.pools)
    kinds: dict[str, Keep] = {}
    if len(pools) > 1:
        for index, name in enumerate(pools):
            kinds[f"only pool {name}"] = lambda option, i=index: option.pool_index in {-1, i}  # type: ignore[misc]
        rents = [chosen.replicas.get(name, 0) * planner.sizer.unit_rent[name] for name in pools]
        used = max(range(len(pools)), key=lambda index: rents[index])
        kinds[f"without pool {pools[used]}"] = lambda option: option.pool_index != used
    for method in scenario.search.methods:
        kinds[f"only {method}"] = lambda option, m=method: all(s.method == m for s in option.plan.cloud_stages)  # type: ignore[misc]
    kinds |= {"no hand-over": lambda option: not is_hybrid(option), "always a hand-over": is_hybrid}
    plans = {(name, part.plan) for name, mix in chosen.plans.items() for part in mix}
    options = [o for mine in planner.found.by_class.values() for o in mine if (o.request_class, o.plan) in plans]
    kinds = {name: keep for name, keep in kinds.items() if not all(keep(option) for option in options)}
    for purchase, name in (("on_demand", "on demand only"), ("spot", "spot only")):
        bought = {index for index, spec in enumerate(scenario.pools.values()) if spec.purchase == purchase}
        if 0 < len(bought) < len(pools):
            kinds[name] = lambda option, mine=bought: option.pool_index in {-1, *mine}  # type: ignore[misc]
    return kinds


def _cheapest(planner: Planner, keep: Keep, rent_usd_per_hour: float, traffic_factor: float) -> Solution | None:
    """The least loaded of the cheapest plans of a kind, within reach of the chosen rent; None where there is none."""
    condition = planner.condition(keep)
    if condition.relaxed:
        return None
    formulation = Formulation([condition])
    near = max(NEAR_OPTIMAL * rent_usd_per_hour, 0.0)
    goal = budgeted_goal(planner, minimise="usd_per_hour", usd_per_hour=near, traffic_factor=traffic_factor)
    best = formulation.solve(goal)
    if best is None:
        return None
    least_loaded = replace(goal, minimise="load", total_usd_per_hour=best.objective * (1.0 + NEARLY_EQUAL))
    return formulation.solve(least_loaded) or best


def distance(planner: Planner, one: EvaluatedPlan, other: EvaluatedPlan) -> float:
    """How far apart two plans are: in rent of nodes that differ and in shares of requests that are served otherwise.

    Each is between 0, the same, and 1, nothing in common; their sum is returned.
    """
    here, there = one.deployment, other.deployment
    if here is None or there is None:
        return math.inf
    rent = {name: min(usd, 1e6) for name, usd in planner.sizer.unit_rent.items()}
    nodes = {name: (here.replicas.get(name, 0) * usd, there.replicas.get(name, 0) * usd) for name, usd in rent.items()}
    both = sum(max(pair) for pair in nodes.values())
    moved = sum(abs(a - b) for a, b in nodes.values()) / both if both else 0.0
    rates = planner.sizer.rates
    total, elsewhere = sum(rate for rate, _ in rates.values()), 0.0
    for name, mix in here.plans.items():
        theirs = {part.plan: part.share for part in there.plans.get(name, ())}
        common = sum(min(part.share, theirs.get(part.plan, 0.0)) for part in mix)
        elsewhere += rates[name][0] / total * (1.0 - common)
    return moved + elsewhere


def margins(planner: Planner, chosen: EvaluatedPlan) -> tuple[Margin, ...]:
    """What one more dollar, one more second, and a little more or less quality and traffic buy or cost.

    Where `chosen` holds on a cheaper fleet than by formula, the formula is asked for as much less traffic as
    makes it agree. Costs None mean that no plan holds there. A step that the scenario has no use for (a second of SLO
    where nobody is promised one) is left out; where as few as possible are to be turned away, there are none.
    """
    if planner.scenario.search.minimise == "turned_away_per_s":
        return ()
    condition = strict_condition(planner)
    traffic_factor = 1.0 if condition is None else fit_traffic_factor(planner, condition, chosen.usd_per_hour)
    base = solve(planner, traffic_factor=traffic_factor)
    before = None if base is None else base.objective
    found: list[Margin] = []
    if base and condition:
        # The rent to which one more dollar is added: the plan's, or the budget where something else is minimised.
        rent = math.inf if chosen.usd_per_hour is None else chosen.usd_per_hour
        limit = planner.sizer.rent_limit_usd_per_hour
        if limit is not None and planner.scenario.search.minimise != "usd_per_hour":
            rent = limit
        found += _margins_of_money(planner, condition, rent, traffic_factor)
    requests = planner.scenario.requests
    changed: dict[str, Planner] = {}
    later = {f"requests.{name}.slo_s": s.slo_s + SECONDS for name, s in requests.items() if s.slo_s is not None}
    if later:
        changed["one more second of every SLO"] = vary(planner, later)
    floors = {f"requests.{name}.quality_floor": s.quality_floor for name, s in requests.items()}
    for sign, what in ((1.0, "more"), (-1.0, "less")):
        moved = {key: min(1.0, max(0.0, floor + sign * CLIP)) for key, floor in floors.items() if floor is not None}
        if moved:
            changed[f"{CLIP:g} of CLIP {what} on every quality floor"] = vary(planner, moved)
    for sign, what in ((1.0, "more"), (-1.0, "less")):
        changed[f"ten per cent {what} traffic"] = vary(planner, {}, traffic=1.0 + sign * TRAFFIC)
    for change, other in changed.items():
        solution = solve(other, traffic_factor=traffic_factor)
        after = None if solution is None else solution.objective
        if before is not None and after is not None and abs(after - before) <= 2.0 * GAP * max(before, after):
            after = before  # the solver knows no difference smaller than its gap
        found.append(Margin(change, "usd_per_hour", before, after))
    return tuple(found)


def _margins_of_money(planner: Planner, condition: Condition, rent: float, traffic_factor: float) -> Iterator[Margin]:
    """What latency can fall to and quality rise to for one dollar of rent an hour more.

    The latency is what 95% of the requests of every plan keep.
    """
    if not math.isfinite(rent):
        return
    whole = Formulation([condition])
    limits_s = latency_limits_s(condition, LATENCIES if whole.size < BIG else LATENCIES_BIG)

    def fits(level: int, dollars: float) -> bool:
        formulation = Formulation([replace(condition, within_s=limits_s[level])])
        goal = Goal(minimise="nothing", usd_per_hour=dollars, traffic_factor=traffic_factor)
        return formulation.solve(goal) is not None

    first = bisect_left(range(len(limits_s)), x=True, key=lambda level: fits(level, rent))
    if first < len(limits_s):
        sooner = first > 0 and fits(first - 1, rent + DOLLARS)
        then = bisect_left(range(first - 1), x=True, key=lambda level: fits(level, rent + DOLLARS)) if sooner else first
        yield Margin("one more dollar an hour", "latency_p95_s", limits_s[first], limits_s[then])
    goals = [
        Goal(minimise="quality_loss", usd_per_hour=rent + more, traffic_factor=traffic_factor)
        for more in (0.0, DOLLARS)
    ]
    before, after = (
        None if finest is None else planner.sizer.assess(finest.mixes, finest.replicas).quality
        for finest in (whole.solve(goal) for goal in goals)
    )
    if before is not None and after is not None:
        yield Margin("one more dollar an hour", "quality", before, max(before, after))
