"""What a planning run works with: the candidates worth trying, the formula, and the means to evaluate a plan.

`Planner` hands out conditions for the formulation and searches over some kind of plans; frontier, margins, infeasible
sets, robustness, confidence and sensitivity start from it. `vary` gives it for a scenario whose promises, limits,
fleets or traffic differ: what a plan costs and how long it takes depends on none of these, so the same candidates are
judged anew and none is priced again.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hybridsd_sim.plan import Deployment, tightest
from hybridsd_sim.planning.analytic import Mixes, Sizer, Sizing
from hybridsd_sim.planning.evaluation import EvaluatedPlan, EvaluationJob, Level
from hybridsd_sim.planning.milp import Condition, Formulation, Goal, Solution
from hybridsd_sim.planning.search import Evaluate, PlanSearch, to_deployment
from hybridsd_sim.pricing import Candidate, CandidateSet, Pricing, price_deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario

MANY, FEW = 1000, 4
"""Plans in all beyond which each class keeps so many on each pool, and the best picture: the rest hardly differ."""

LEAST_BAD = 3
"""Plans kept of a class for which none is in time."""

BIG = 2000
"""Columns from which a formulation takes seconds and not milliseconds, so that it is asked less."""

TRAFFIC_FACTORS = (0.7, 0.76, 0.82, 0.88, 0.94, 0.97, 1.0)
"""Factors on the traffic at which the formula is held against a plan that holds, the smallest first."""

Keep = Callable[[Candidate], bool]
"""Whether a plan is of the kind that is looked for."""


def any_plan(_: Candidate) -> bool:
    """Every plan."""
    return True


@dataclass(slots=True)
class Planner:
    """Candidates, formula and trials of one scenario. `sizer` carries what simulations taught the formula."""

    scenario: Scenario
    profiles: Profiles
    found: CandidateSet
    sizer: Sizer
    evaluate: Evaluate
    progress: Callable[[str], None] = lambda _: None

    def condition(self, keep: Keep = any_plan, *, within_s: float | None = None) -> Condition:
        """The scenario's side of the formulation: per class the plans worth trying, the cheapest first.

        Those within the class's promises on an idle fleet that no other beats; for a class that has none, the least bad
        ones, and the class is relaxed: it may be late.
        """
        plans: dict[str, list[Candidate]] = {}
        relaxed = set()
        for name, options in self.found.by_class.items():
            kept = [option for option in options if keep(option)]
            within = self.within_promises(kept)
            plans[name] = prune(within) if within else least_infeasible(kept)
            if not within:
                relaxed.add(name)
        if sum(map(len, plans.values())) > MANY:
            plans = {name: thin(options, FEW) for name, options in plans.items()}
        return Condition(self.sizer, plans, within_s, frozenset(relaxed))

    def within_promises(self, options: Sequence[Candidate]) -> list[Candidate]:
        """The options that keep floors and limits and, with nobody else there, their SLO."""
        wanted = {name: self.sizer.wanted(name) for name in self.scenario.requests}
        return [
            option
            for option in options
            if option.keeps_limits and self.sizer.idle_attainment(option) >= wanted[option.request_class]
        ]

    def priced(self, deployment: Deployment, scenario: Scenario | None = None) -> Mixes:
        """A deployment's mixes with the price of every plan, under the planner's scenario or another."""
        options = price_deployment(Pricing(scenario or self.scenario, self.profiles), deployment).by_class
        return {
            name: tuple((part.share, option) for part, option in zip(mix, options[name], strict=True))
            for name, mix in deployment.plans.items()
        }

    def search(self, name: str, keep: Keep = any_plan) -> PlanSearch:
        """A search over one kind of plans."""
        return PlanSearch([self.condition(keep)], self.evaluate, quickest_level, name, self.progress)

    def under(self, scenario: Scenario, found: CandidateSet | None = None) -> Planner:
        """The same means for another scenario, with what was learnt so far."""
        return replace(self, scenario=scenario, found=found or self.found, sizer=self.sizer.replace(scenario, rates={}))


def quickest_level(scenario: Scenario, deployment: Deployment) -> Level:
    """The quickest level of fidelity that tells how a deployment fares."""
    from hybridsd_sim.simulation import recursion_obstacle

    return "simulate" if recursion_obstacle(scenario, deployment) else "screen"


def evaluate_quickly(planner: Planner, plans: Sequence[tuple[str, Sizing]]) -> list[EvaluatedPlan]:
    """The figures of named plans on the scenario's own requests, in order, all of them in one call.

    By the compiled recursion; by formula alone where that does not apply.
    """
    found: dict[int, EvaluatedPlan] = {}
    jobs: dict[int, EvaluationJob] = {}
    for index, (name, sizing) in enumerate(plans):
        deployment = to_deployment(sizing.mixes, sizing.replicas)
        if quickest_level(planner.scenario, deployment) == "screen":
            jobs[index] = EvaluationJob(planner.scenario, planner.profiles, deployment, "screen")
        else:
            found[index] = EvaluatedPlan.from_formula(name, sizing, planner.sizer)
    for index, evaluation in zip(jobs, planner.evaluate(list(jobs.values())), strict=True):
        name, sizing = plans[index]
        found[index] = EvaluatedPlan.from_evaluation(name, evaluation, sizing.mixes)
    return [found[index] for index in range(len(plans))]


def least_infeasible(options: Sequence[Candidate]) -> list[Candidate]:
    """Where nothing holds: the fastest of those that keep floors and limits, else the best pictures, in time first."""
    floor = sorted((option for option in options if option.keeps_limits), key=lambda o: o.latency_s)
    return floor[:LEAST_BAD] or sorted(options, key=lambda o: (-(o.quality or 0.0), not o.meets_slo))[:1]


def is_hybrid(option: Candidate) -> bool:
    """Whether both sides denoise."""
    return bool(option.cloud_steps and option.edge_steps)


def vary(planner: Planner, changes: Mapping[str, Any], *, traffic: float = 1.0) -> Planner:
    """The planner of a scenario with other values at dotted keys, and `traffic` times the requests of every class.

    `changes` may touch SLOs, floors, limits, budgets and numbers of nodes and devices; what the formula learnt stays.
    Raises `InputError` for a value that no scenario may have.
    """
    scenario = planner.scenario.with_overrides(changes) if changes else planner.scenario
    rates = {name: (rate * traffic, cv) for name, (rate, cv) in planner.sizer.rates.items()}
    judged = {}
    for name, options in planner.found.by_class.items():
        kept = [option.cost.keeps_limits(scenario.promises[name]) for option in options]
        judged[name] = tuple(
            option if keeps == option.keeps_limits else replace(option, keeps_limits=keeps)
            for option, keeps in zip(options, kept, strict=True)
        )
    return replace(
        planner,
        scenario=scenario,
        found=replace(planner.found, by_class=judged),
        sizer=planner.sizer.replace(scenario, rates=rates),
    )


def strict_condition(planner: Planner) -> Condition | None:
    """The scenario's side of the formulation with every promise kept; None where a class has no plan that could."""
    condition = planner.condition()
    return None if condition.relaxed else condition


def solve(planner: Planner, **constraints: Any) -> Solution | None:
    """The best answer to a goal under the scenario's budgets; None where no plan keeps every promise."""
    condition = strict_condition(planner)
    return None if condition is None else Formulation([condition]).solve(budgeted_goal(planner, **constraints))


def budgeted_goal(planner: Planner, **constraints: Any) -> Goal:
    """A goal under the scenario's budgets that serves everybody; a limit in `constraints` holds besides the budgets."""
    most = tightest(planner.sizer.rent_limit_usd_per_hour, constraints.pop("usd_per_hour", None))
    return Goal(usd_per_hour=most, turned_away_per_s=0.0, **constraints)


def fit_traffic_factor(planner: Planner, condition: Condition, rent_usd_per_hour: float | None) -> float:
    """The factor on the traffic at which the formula's cheapest fleet rents for no more than a plan that holds.

    1 where the formula is not too careful, or not by this alone; the simulation has then the last word.
    """
    if rent_usd_per_hour is None:
        return 1.0
    formulation, most = Formulation([condition]), rent_usd_per_hour * (1.0 + 1e-6)

    def rejects(at: int) -> bool:
        goal = budgeted_goal(planner, minimise="nothing", usd_per_hour=most, traffic_factor=TRAFFIC_FACTORS[at])
        return formulation.solve(goal) is None

    first = bisect_left(range(len(TRAFFIC_FACTORS)), x=True, key=rejects)
    return TRAFFIC_FACTORS[first - 1] if first else 1.0


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
    longest = max(sizer.scenario.promises[name].slo_s or 2.0 * max(mine) for name, mine in slow.items())
    return [float(limit) for limit in np.geomspace(fastest, max(longest, 1.01 * fastest), count)]


def prune(options: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats: none on the same pool or at the edge alone is as good in every merit.

    Merits are GPU-seconds, dollars, latency, degree, quality and edge energy; GPU-seconds and latency are those of a
    full batch, so that a batch cap stays only where it lowers the load. Of equals the first is kept.
    """
    if not options:
        return []
    pools = np.array([option.pool_index for option in options])
    merits = np.array(
        [
            (
                option.gpu_seconds,
                option.usd_or_inf,
                option.full_batch_latency_s,
                option.degree,
                1.0 if option.quality is None else -option.quality,
                math.inf if option.cost.edge_energy_j is None else option.cost.edge_energy_j,
            )
            for option in options
        ]
    )
    order = np.lexsort(merits.T[::-1])
    kept: list[int] = []
    for pool in dict.fromkeys(pools.tolist()):
        rivals = order[(pools[order] == pool) | (pools[order] == -1)]
        # Rows stand in rising order, so that a row can only be beaten by one before it.
        best, front = np.empty((len(rivals), merits.shape[1])), 0
        for index in rivals:
            if not (best[:front] <= merits[index]).all(axis=1).any():
                best[front] = merits[index]
                front += 1
                if pools[index] == pool:
                    kept.append(int(index))
    return [options[index] for index in sorted(kept)]


def thin(options: Sequence[Candidate], most: int) -> list[Candidate]:
    """At most so many on each pool and at the edge, from the least load to the least latency, and the best picture."""
    kept: set[int] = set()
    for pool in {option.pool_index for option in options}:
        mine = [index for index, option in enumerate(options) if option.pool_index == pool]
        front: list[int] = []
        for index in sorted(mine, key=lambda i: (options[i].gpu_seconds, options[i].full_batch_latency_s)):
            if not front or options[index].full_batch_latency_s < options[front[-1]].full_batch_latency_s:
                front.append(index)
        kept |= {front[round(at)] for at in np.linspace(0, len(front) - 1, most).tolist()}
        kept.add(max(mine, key=lambda i: options[i].quality or 0.0))
    return [options[index] for index in sorted(kept)]
