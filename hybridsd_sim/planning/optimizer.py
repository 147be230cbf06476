"""The capacity plan: what to rent and how to serve each class, confirmed by simulation, with what a planner asks next.

The search (`search`) finds the plan: the MILP (`milp`) proposes, the compiled recursion and the simulation dispose. The
same search over plans of one kind gives the baselines. Around the answer stand the frontier and near-optimal plans that
differ in kind, what a small change of each limit buys or costs, how the plan fares under other conditions and under the
uncertainty of its step costs, and, where nothing holds, which constraints conflict.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.planning.alternatives import alternatives, margins
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.capacity_plan import CapacityPlan, Confidence, saving
from hybridsd_sim.planning.confidence import confidence, confident_search
from hybridsd_sim.planning.evaluation import (
    EvaluatedPlan,
    Evaluation,
    EvaluationJob,
    Evaluator,
    evaluate,
    evaluate_with_records,
    find_evaluation,
)
from hybridsd_sim.planning.evaluation_cache import Store
from hybridsd_sim.planning.explanation import explain
from hybridsd_sim.planning.frontier import frontier
from hybridsd_sim.planning.infeasibility import irreducible_infeasible_set
from hybridsd_sim.planning.milp import Formulation, Solution
from hybridsd_sim.planning.planner import Keep, Planner, quickest_level
from hybridsd_sim.planning.robustness import robust_conditions, robust_variations, sensitivity
from hybridsd_sim.planning.search import Found, PlanSearch
from hybridsd_sim.pricing import Candidate, CandidateSet, find_candidates
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulation import SimResult

CLOUD_ONLY, EDGE_ONLY, STATIC_SWITCH = "cloud only", "edge only", "static switch"

SHARE_TOLERANCE = 0.02
"""How far from the static share a switch step may lie and still count as it."""


class Mapper(Protocol):
    """`map`, or anything that fans out like it and keeps the order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]: ...


def optimize(
    scenario: Scenario,
    profiles: Profiles,
    *,
    map: Mapper | None = None,  # noqa: A002 - as the builtin, which it stands for
    store: Store | None = None,
    robust: Mapping[str, Scenario] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> CapacityPlan:
    """The capacity plan that is best by `search.minimise` among those that keep every promise, with its evidence.

    `map` fans out independent simulations and never changes the answer; `store` keeps finished ones, so that a search
    that was interrupted goes on; `robust` are scenarios under which the plan must hold too; `progress` hears bound,
    incumbent and gap. An infeasible scenario returns the plan that misses least, with `feasible` False and the smallest
    set of constraints that conflict. Raises `InputError` for names that the profiles do not hold.
    """
    if robust and any(one.budget.confidence is not None for one in (scenario, *robust.values())):
        rule = "does not go with several scenarios"
        remedy = "Plan for one scenario at that confidence, or for all of them without it."
        raise InputError(Problem("budget.confidence", str(scenario.budget.confidence), rule, remedy))
    progress("pricing candidate plans")
    found = find_candidates(scenario, profiles)
    trials = _Trials(map or builtins.map, store)
    planner = Planner(scenario, profiles, found, Sizer(scenario, profiles), trials, progress)
    chosen = _chosen(planner, robust or {})
    progress("planning and simulating the baselines")
    less = ", for the base scenario" if robust else "" if scenario.budget.confidence is None else ", at median costs"
    share = scenario.search.static_switch
    kinds = {CLOUD_ONLY: CLOUD_ONLY, EDGE_ONLY: EDGE_ONLY, STATIC_SWITCH: f"{STATIC_SWITCH} {share:.0%}"}
    jobs = [(scenario, profiles, found, store, kind, f"{name}{less}") for kind, name in kinds.items()]
    outcomes = zip(jobs, (map or builtins.map)(_baseline, jobs), strict=True)
    baselines = {job[-1]: outcome for job, outcome in outcomes if outcome is not None}
    plan = _assemble(planner, trials, chosen, baselines)
    progress("looking around the plan")
    plan = _add_context(plan, planner, chosen, robust or {})
    return replace(plan, explanation=tuple(explain(plan, found, planner.sizer)))


@dataclass(frozen=True, slots=True)
class _SearchOutcome:
    """A search's answer, every plan that it evaluated, and how sure the answer is where that was searched for."""

    found: Found
    evaluated: tuple[EvaluatedPlan, ...]
    confidence: Confidence | None = None

    @property
    def feasible(self) -> bool:
        """Whether the answer holds, and as surely as was asked."""
        sure = self.confidence
        return self.found.feasible and (sure is None or sure.asked is None or sure.probability >= sure.asked)


@dataclass(slots=True)
class _Trials:
    """Tries jobs, several at a time where `fan_out` can; keeps the records of the last one it simulated itself."""

    fan_out: Mapper
    store: Store | None
    last: tuple[str, SimResult] | None = field(default=None, repr=False)

    def __call__(self, jobs: Sequence[EvaluationJob]) -> list[Evaluation]:
        if len(jobs) != 1:
            return list(self.fan_out(Evaluator(self.store), jobs))
        (job,) = jobs
        if job.level == "screen" or (self.store and find_evaluation(job, self.store)):
            return [evaluate(job, self.store)]
        result, evaluation = evaluate_with_records(job, self.store)
        self.last = (job.key, result)
        return [evaluation]

    def records(self, job: EvaluationJob) -> SimResult:
        """The run behind a simulated job, simulated again unless it was the last one."""
        if self.last is not None and self.last[0] == job.key:
            return self.last[1]
        return evaluate_with_records(job)[0]


def _chosen(planner: Planner, robust: Mapping[str, Scenario]) -> _SearchOutcome:
    """The plan for the scenario, for all scenarios, or at the confidence that is asked."""
    if robust:
        conditions = robust_conditions(planner, robust)
        return _best(PlanSearch(conditions, planner.evaluate, quickest_level, "robust plan", planner.progress))
    asked = planner.scenario.budget.confidence
    if asked is None:
        return _best(planner.search("plan"))
    confident = confident_search(planner, asked)
    if confident.found is None:
        return replace(_best(planner.search("plan")), evaluated=confident.evaluated)
    return _SearchOutcome(confident.found, confident.evaluated, confident.confidence)


def _best(search: PlanSearch) -> _SearchOutcome:
    """What the search finds; where no plan is in reach of every promise, the one that misses least."""
    condition = search.conditions[0]
    infeasible = condition.relaxed or any(not options for options in condition.plans.values())
    found = None if infeasible else search.run()
    if found is None:  # the plan that turns fewest away when nobody's SLO counts, within the budget if that can be
        formulation = Formulation([replace(condition, relaxed=frozenset(condition.plans))])
        goal = search.goal(minimise="turned_away_per_s", turned_away_per_s=None)
        solution = formulation.solve(goal) or formulation.solve(replace(goal, usd_per_hour=None))
        found = search.simulate(solution or Solution({}, dict.fromkeys(search.scenario.pools, 0), 0.0, 0.0))
    return _SearchOutcome(found, tuple(search.evaluated))


def _baseline(
    job: tuple[Scenario, Profiles, CandidateSet, Store | None, str, str],
) -> tuple[_SearchOutcome, SimResult] | None:
    """Cloud only, edge only or the paper's static switch, with its own best pools and the scenario's promises.

    By a planner of its own, so that they can run side by side and none learns from another. None where no plan of some
    class is of the kind.
    """
    scenario, profiles, found, store, kind, name = job
    trials = _Trials(builtins.map, store)
    planner = Planner(scenario, profiles, found, Sizer(scenario, profiles), trials)
    share = scenario.search.static_switch
    keep: Mapping[str, Keep] = {
        CLOUD_ONLY: lambda option: option.edge_steps == 0,
        EDGE_ONLY: lambda option: option.cloud_steps == 0,
        STATIC_SWITCH: lambda o: bool(o.edge_steps) and abs(o.switch_share - share) < SHARE_TOLERANCE,
    }
    search = planner.search(name, keep[kind])
    if any(not options for options in search.conditions[0].plans.values()):
        return None
    outcome = _best(search)
    return outcome, trials.records(_job(planner, outcome.found))


def _job(planner: Planner, found: Found) -> EvaluationJob:
    return EvaluationJob(planner.scenario, planner.profiles, found.evaluations[0].deployment)


def _assemble(
    planner: Planner,
    trials: _Trials,
    chosen: _SearchOutcome,
    baselines: Mapping[str, tuple[_SearchOutcome, SimResult]],
) -> CapacityPlan:
    """The plan, its baselines and the evidence."""
    found, dollars = chosen.found, planner.scenario.search.minimise == "usd_per_hour"
    shown = {name: _summarise(name, outcome.found) for name, (outcome, _) in baselines.items()}
    evidence = [*chosen.evaluated, *(one for outcome, _ in baselines.values() for one in outcome.evaluated)]
    return CapacityPlan(
        scenario=planner.scenario,
        feasible=chosen.feasible,
        explanation=(),
        deployment=found.evaluations[0].deployment,
        mixes=found.mixes,
        chosen_result=trials.records(_job(planner, found)),
        frontier=(),
        baselines=tuple(shown.values()),
        baseline_results={name: result for name, (_, result) in baselines.items()},
        alternatives=(),
        evidence=tuple(evidence),
        switch_curve={
            name: tuple(_switch_curve(planner.found.by_class[name], mix[0][1]))
            for name, mix in found.mixes.items()
            if mix
        },
        refusals=planner.found.refusal_counts(),
        profiles_digest=planner.profiles.digest,
        bound_usd_per_hour=found.bound if dollars and chosen.confidence is None else None,
        cost_usd_per_hour=found.sizing.usd_per_hour if math.isfinite(found.sizing.usd_per_hour) else None,
        savings=tuple(saving(_summarise("plan", found), other) for other in shown.values()),
    )


def _summarise(name: str, found: Found) -> EvaluatedPlan:
    return EvaluatedPlan.from_evaluation(name, found.evaluations[0], found.mixes)


def _add_context(
    plan: CapacityPlan, planner: Planner, chosen: _SearchOutcome, robust: Mapping[str, Scenario]
) -> CapacityPlan:
    """The plan with what a planner asks next; where nothing holds, with the constraints that conflict."""
    if not chosen.found.feasible:
        return replace(plan, conflict=irreducible_infeasible_set(planner))
    found = chosen.found
    shown = _summarise("plan", found)
    if not robust and chosen.confidence is None:  # else the plan keeps more than these would be asked to
        plan = replace(
            plan,
            frontier=frontier(planner, shown),
            alternatives=alternatives(planner, shown),
            margins=margins(planner, shown),
        )
    return replace(
        plan,
        sensitivity=sensitivity(planner, plan.deployment),
        confidence=chosen.confidence
        or confidence(planner, found.mixes, found.replicas, None, known=found.evaluations[0]),
        robust=robust_variations(chosen.found, robust),
    )


def _switch_curve(options: Sequence[Candidate], chosen: Candidate) -> Iterator[Candidate]:
    """The cheapest plan of each switch step, if possible with the cloud stage and the small model of the chosen one."""

    def sides(option: Candidate) -> tuple[list[object], list[object]]:
        cloud, edge = option.plan.cloud_stages[:1], option.plan.edge_stages[:1]
        return [(stage.site, stage.method, stage.degree) for stage in cloud], [stage.model for stage in edge]

    by_step: dict[int, list[Candidate]] = {}
    for option in options:
        by_step.setdefault(option.cloud_steps, []).append(option)
    wanted = sides(chosen)
    for step in sorted(by_step):
        alike = [
            option
            for option in by_step[step]
            if all(not mine or not theirs or mine == theirs for mine, theirs in zip(sides(option), wanted, strict=True))
        ]
        yield min(alike or by_step[step], key=lambda option: (option.usd_or_inf, option.latency_s))
