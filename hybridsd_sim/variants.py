"""A scenario whose promises, limits, fleets or traffic differ: the same plans judged anew, none priced again.

What a plan costs and how long it takes does not depend on what is promised or on how many ask. So a changed SLO, floor,
limit, budget, number of nodes or rate needs no new candidates, and a formulation of the changed scenario is there in
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hybridsd_sim.candidates import Candidate, CandidateSet, limits_of
from hybridsd_sim.milp import Answer, Condition, Formulation, Goal
from hybridsd_sim.planner import Planner
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.sizing import Sizer

BIG = 2000
"""Columns from which a formulation takes seconds and not milliseconds, so that it is asked less."""
HEADROOMS = (0.7, 0.76, 0.82, 0.88, 0.94, 0.97, 1.0)
"""Factors on the traffic at which the formula is held against a plan that holds, the boldest first."""


def varied(planner: Planner, changes: Mapping[str, Any], *, traffic: float = 1.0) -> Planner:
    """The planner of a scenario with other values at dotted keys, and `traffic` times the requests of every class.

    `changes` may touch SLOs, floors, limits, budgets and numbers of nodes and devices; what the formula learnt stays.
    Raises `InputError` for a value that no scenario may have.
    """
    known = planner.sizer
    scenario = planner.scenario.with_overrides(changes) if changes else planner.scenario
    sizer = Sizer(
        scenario,
        planner.profiles,
        rates={name: (rate * traffic, cv) for name, (rate, cv) in known.rates.items()},
        load_factors=dict(known.load_factors),
        strain=dict(known.strain),
    )
    return replace(planner, scenario=scenario, found=_judged(planner.found, scenario), sizer=sizer)


def _judged(found: CandidateSet, scenario: Scenario) -> CandidateSet:
    """The same candidates, each told anew whether it keeps the floor and the limits of its class."""
    return replace(
        found,
        by_class={name: tuple(_judge(options, scenario, name)) for name, options in found.by_class.items()},
    )


def _judge(options: Sequence[Candidate], scenario: Scenario, name: str) -> list[Candidate]:
    floor, limits = scenario.requests[name].quality_floor, limits_of(scenario, name)
    judged = []
    for option in options:
        kept = (floor is None or (option.quality is not None and option.quality >= floor)) and limits.hold(option.cost)
        judged.append(option if kept == option.meets_floor else replace(option, meets_floor=kept))
    return judged


def whole_condition(planner: Planner) -> Condition | None:
    """The scenario's side of the formulation with every promise kept; None where a class has no plan that could."""
    condition = planner.condition()
    return None if condition.forgiven else condition


def solve(planner: Planner, **asked: Any) -> Answer | None:
    """The best answer to a goal under the scenario's budgets; None where no plan keeps every promise."""
    condition = whole_condition(planner)
    return None if condition is None else Formulation([condition]).solve(goal_of(planner, **asked))


def goal_of(planner: Planner, **asked: Any) -> Goal:
    """A goal under the scenario's budgets that serves everybody; a limit in `asked` holds besides the budgets."""
    limits = [planner.sizer.rent_limit_usd_per_hour, asked.pop("usd_per_hour", None)]
    least = min((limit for limit in limits if limit is not None), default=None)
    return Goal(usd_per_hour=least, turned_away_per_s=0.0, **asked)


def agreeing_headroom(planner: Planner, condition: Condition, rent_usd_per_hour: float | None) -> float:
    """The factor on the traffic at which the formula's cheapest fleet rents for no more than a plan that holds.

    1 where the formula is not too careful, or not by this alone; the simulation has then the last word.
    """
    if rent_usd_per_hour is None:
        return 1.0
    formulation, most = Formulation([condition]), rent_usd_per_hour * (1.0 + 1e-6)

    def too_careful(at: int) -> bool:
        goal = goal_of(planner, minimise="nothing", usd_per_hour=most, headroom=HEADROOMS[at])
        return formulation.solve(goal) is None

    first = first_that(too_careful, len(HEADROOMS))
    return HEADROOMS[first - 1] if first else 1.0


def latency_limits_s(condition: Condition, count: int) -> list[float]:
    """Limits on the p95 latency, seconds: from the fastest that every class can have to the longest that matters.

    That is the longest SLO, or for a class without one twice its slowest plan; geometrically spaced.
    """
    sizer = condition.sizer
    slow = {
        name: [float(np.quantile(sizer.latencies(option), 0.95)) for option in options if option is not None]
        for name, options in condition.plans.items()
    }
    fastest = max(min(mine) for mine in slow.values())
    longest = max(sizer.scenario.requests[name].slo_s or 2.0 * max(mine) for name, mine in slow.items())
    return [float(limit) for limit in np.geomspace(fastest, max(longest, 1.01 * fastest), count)]


def first_that(holds: Callable[[int], bool], count: int) -> int:
    """The first of 0, 1, ..., count - 1 that holds, where all after it hold too; `count` where none does."""
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
