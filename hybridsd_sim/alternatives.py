"""Near-optimal plans that differ in kind: what else could be done for little more money.

Calliope's "spores": the cheapest plan is one of many that cost about the same, and people have reasons of their own to
take another one. Each kind (one pool only, one parallel method only, without a hand-over, with one in every request,
without the pool most used, on demand only, spot only) gives its cheapest plan by formula, the calmest of those that
cost about the same, which is tried on the scenario's own requests. At first the formula is asked for as much less
traffic as makes it agree with the chosen plan; where nothing comes of that, for all of it, and then for some more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.capacity import Evaluated, analytic, evaluated
from hybridsd_sim.evaluations import Job
from hybridsd_sim.milp import Answer, Formulation
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planner import Keep, Planner, is_hybrid, quickest
from hybridsd_sim.search import CALM, deployment_of
from hybridsd_sim.variants import agreeing_headroom, goal_of, whole_condition

NEAR_OPTIMAL = 1.3
"""Alternatives rent for at most this many times as much as the chosen plan."""
MOST = 6
"""Alternatives told at most."""
ROOMS = (1.0, 1.15)
"""Factors on the traffic for which a kind is asked in the end, until its plan holds."""
SAME = 0.01
"""Plans that differ by less than this, in shares of the nodes and of the requests, are one."""


def alternatives(planner: Planner, chosen: Evaluated) -> tuple[Evaluated, ...]:
    """The cheapest plan of each kind that holds, differs from `chosen` and rents for little more; most different first.

    Figures are those of the compiled recursion, or by formula where it does not apply. Their names are the kinds. None
    where the price of the chosen plan is unknown.
    """
    if chosen.deployment is None or chosen.usd_per_hour is None:
        return ()
    waiting = dict(_kinds(planner, chosen.deployment))
    found: list[Evaluated] = []
    condition = whole_condition(planner)
    first = 1.0 if condition is None else agreeing_headroom(planner, condition, chosen.usd_per_hour)
    for room in dict.fromkeys((first, *ROOMS)):
        answers = {name: _cheapest(planner, keep, chosen.usd_per_hour, room) for name, keep in waiting.items()}
        tried = _tried(planner, {name: answer for name, answer in answers.items() if answer})
        found += [plan for plan in tried if plan.feasible]
        held = {plan.name for plan in found}
        waiting = {name: keep for name, keep in waiting.items() if name not in held}
    return tuple(_most_different(planner, chosen, found))


def _kinds(planner: Planner, chosen: Deployment) -> Iterator[tuple[str, Keep]]:
    """Kinds of plan by name; those which the chosen plan is of already are left out."""
    scenario, pools = planner.scenario, list(planner.scenario.pools)
    used = {(name, part.plan) for name, mix in chosen.plans.items() for part in mix}
    options = [o for mine in planner.found.by_class.values() for o in mine if (o.request_class, o.plan) in used]
    for name, keep in _all_kinds(planner, chosen, pools):
        if not all(keep(option) for option in options):
            yield name, keep
    for purchase, name in (("on_demand", "on demand only"), ("spot", "spot only")):
        bought = {index for index, spec in enumerate(scenario.pools.values()) if spec.purchase == purchase}
        if 0 < len(bought) < len(pools):
            yield name, lambda option, mine=bought: option.pool_index in {-1, *mine}  # type: ignore[misc]


def _all_kinds(planner: Planner, chosen: Deployment, pools: Sequence[str]) -> Iterator[tuple[str, Keep]]:
    if len(pools) > 1:
        for index, name in enumerate(pools):
            yield f"only pool {name}", lambda option, i=index: option.pool_index in {-1, i}  # type: ignore[misc]
        rents = [chosen.replicas.get(name, 0) * planner.sizer.unit_rent[name] for name in pools]
        used = max(range(len(pools)), key=lambda index: rents[index])
        yield f"without pool {pools[used]}", lambda option: option.pool_index != used
    for method in planner.scenario.search.methods:
        yield f"only {method}", lambda option, m=method: _only(option, m)  # type: ignore[misc]
    yield "no hand-over", lambda option: not is_hybrid(option)
    yield "always a hand-over", is_hybrid


def _only(option: Candidate, method: str) -> bool:
    return all(stage.method == method for stage in option.plan.cloud_stages)


def _cheapest(planner: Planner, keep: Keep, rent_usd_per_hour: float, room: float) -> Answer | None:
    """The calmest of the cheapest plans of a kind, within reach of the chosen rent; None where there is none."""
    condition = planner.condition(keep)
    if condition.forgiven:
        return None
    formulation = Formulation([condition])
    near = max(NEAR_OPTIMAL * rent_usd_per_hour, 0.0)
    goal = goal_of(planner, minimise="usd_per_hour", usd_per_hour=near, headroom=room)
    best = formulation.solve(goal)
    if best is None:
        return None
    calm = replace(goal, minimise="load", total_usd_per_hour=best.objective * (1.0 + CALM))
    return formulation.solve(calm) or best


def _tried(planner: Planner, answers: Mapping[str, Answer]) -> list[Evaluated]:
    """Each plan's figures by the quickest level, under the name of its kind."""
    scenario, found, jobs = planner.scenario, [], {}
    for name, answer in answers.items():
        deployment = deployment_of(answer.mixes, answer.replicas)
        if quickest(scenario, deployment) == "screen":
            jobs[name] = Job(scenario, planner.profiles, deployment, "screen")
        else:
            found.append(analytic(name, planner.sizer.assess(answer.mixes, answer.replicas), planner.sizer))
    for name, evaluation in zip(jobs, planner.evaluate(list(jobs.values())), strict=True):
        found.append(evaluated(name, evaluation, answers[name].mixes))
    return found


def _most_different(planner: Planner, chosen: Evaluated, found: Sequence[Evaluated]) -> Iterator[Evaluated]:
    """One after the other the plan that is furthest from the chosen one and from those told before."""
    told, left = [chosen], list(found)
    while left and len(told) <= MOST:
        distances = [min(distance(planner, plan, other) for other in told) for plan in left]
        furthest = max(range(len(left)), key=lambda index: distances[index])
        if distances[furthest] < SAME:
            return
        told.append(left.pop(furthest))
        yield told[-1]


def distance(planner: Planner, one: Evaluated, other: Evaluated) -> float:
    """How far apart two plans are: in rent of nodes that differ and in shares of requests that are served otherwise.

    Each is between 0, the same, and 1, nothing in common; their sum is told.
    """
    here, there = one.deployment, other.deployment
    if here is None or there is None:
        return math.inf
    rent = {name: min(usd, 1e6) for name, usd in planner.sizer.unit_rent.items()}
    nodes = {name: (here.replicas.get(name, 0) * usd, there.replicas.get(name, 0) * usd) for name, usd in rent.items()}
    both = sum(max(pair) for pair in nodes.values())
    moved = sum(abs(a - b) for a, b in nodes.values()) / both if both else 0.0
    rates = planner.sizer.rates
    total = sum(rate for rate, _ in rates.values())
    return moved + sum(rates[name][0] / total * (1.0 - _common(name, here, there)) for name in here.plans)


def _common(name: str, here: Deployment, there: Deployment) -> float:
    """The share of a class that two deployments serve alike."""
    mine, theirs = ({part.plan: part.share for part in each.plans.get(name, ())} for each in (here, there))
    return sum(min(share, theirs.get(plan, 0.0)) for plan, share in mine.items())
