"""The search for one plan: the MILP proposes, trials on the scenario's own requests dispose.

A proposal is evaluated by the compiled recursion where it applies and by simulation where not. The search goes up
first: the least loaded of the cheapest plans by formula is evaluated; if it is late, the formula is corrected (by
`Sizer.correction_factors`: the traffic on a pool under which the formula would have been late too) and solved again,
until a plan holds (the *incumbent*). Then it goes down: corrections that were learnt from one plan are no proof against
another, so the formula is taken without them and trusted only where it says no at `TRUST` of the traffic. Of the plans
that it leaves and that are better than the incumbent, the most robust is evaluated, the one that is in time at the
highest traffic; while much may be saved, the most robust of those that would save half of it. A fleet on which its most
robust plan is late, and where trials are cheap another choice of plans too, gets a no-good cut that takes smaller
fleets along; plans far less robust than one that was late (`MISJUDGED`) are not evaluated. When nothing better is left,
the incumbent is the solution and what was cut off is the bound: the search's, no proof. Where going up finds nothing,
the most robust plan of all is where going down begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.planning.analytic import Mixes, Sizer, Sizing
from hybridsd_sim.planning.evaluation import EvaluatedPlan, Evaluation, EvaluationJob, Level
from hybridsd_sim.planning.milp import Condition, Formulation, Goal, Solution
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import Scenario

CORRECTION_STEP, CORRECTION_MOST = 1.02, 4.0
"""Least growth of the correction factor of a pool that was late, and its limit."""

EDGE_STEP = 1.2
"""Growth of the correction factor of an edge fleet whose devices had queues when its requests were late."""

ROUNDS = 24
"""Plans that one search tries at most."""

CLIMB = 8
"""Of these, at most, before one holds; the most robust plan of all is tried next."""

TRUST = 0.72
"""Share of the traffic at which the formula is trusted when it says no."""

TRAFFIC_FACTORS = tuple(np.geomspace(TRUST, 2.0, 31).tolist())
"""Traffic at which plans are asked to be in time, to find the most robust."""

MUCH = 0.1
"""Share of the incumbent's dollars that is worth a leap: half of what may still be saved is tried for."""

MISJUDGED = 0.85
"""Share of the traffic that a plan was late at, up to which the formula may have misjudged another one against it."""

BETTER = 0.005
"""What a plan must save, as a share of the dollars, to be worth trying."""

NEARLY_EQUAL = 0.004
"""What the least loaded of nearly equal plans may cost more, as a share of the dollars."""

FINER = {"quality_loss": 0.1, "turned_away_per_s": 2.0}
"""Factors on both where something else is minimised: a loss of 0.7 of CLIP is wanted to four digits."""

UNITS = {
    "usd_per_hour": "USD/h", "latency_p95_s": "s p95 latency by formula", "quality_loss": "requests/s times 1 - CLIP",
    "turned_away_per_s": "requests/s turned away",
}  # fmt: skip
"""What the incumbent's figure is called."""

LATENCIES = 60
"""Latencies tried where the latency is minimised: 7% apart or so."""


Evaluate = Callable[[Sequence[EvaluationJob]], list[Evaluation]]
"""Tries jobs, side by side where it can, in order."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: mixes and fleet, how they fared under each condition, and what was ruled out.

    `bound` is what every plan that is better by the scenario's objective was shown to miss; None where the search
    stopped before that was known.
    """

    mixes: Mixes
    replicas: Mapping[str, int]
    sizing: Sizing
    evaluations: tuple[Evaluation, ...]
    bound: float | None

    @property
    def feasible(self) -> bool:
        """Whether every promise is kept under every condition."""
        return all(one.feasible for one in self.evaluations)

    @property
    def simulated(self) -> bool:
        """Whether the evaluations are simulations, and not the recursion's."""
        return all(one.level == "simulate" for one in self.evaluations)


@dataclass(frozen=True, slots=True)
class _Target:
    """What the most robust plan had to do: stay under an objective; and the traffic at which it is in time."""

    objective: float
    traffic_factor: float

    def beyond(self, other: _Target) -> _Target:
        """The harder of both in each respect."""
        return _Target(max(self.objective, other.objective), max(self.traffic_factor, other.traffic_factor))


@dataclass(slots=True)
class PlanSearch:
    """One search over the plans of `conditions`; the first condition's scenario says what is minimised and its prices.

    `evaluated` are the plans in order, with why they were proposed. Formulas are corrected in place
    (`sizer.correction_factors`).
    """

    conditions: Sequence[Condition]
    evaluate: Evaluate
    levels: Callable[[Scenario, Deployment], Level]
    name: str
    progress: Callable[[str], None] = lambda _: None
    evaluated: list[EvaluatedPlan] = field(default_factory=list)
    _no_good_cuts: list[Mapping[str, int]] = field(default_factory=list)
    _seen: set[object] = field(default_factory=set)
    _plain: Formulation | None = None
    _reach: float | None = None
    _second: tuple[dict[str, int], frozenset[Candidate]] | None = None
    _target: _Target | None = None
    _late: _Target | None = None

    @property
    def scenario(self) -> Scenario:
        return self.conditions[0].sizer.scenario

    @property
    def sizer(self) -> Sizer:
        return self.conditions[0].sizer

    @property
    def _finer(self) -> float:
        return FINER.get(self.scenario.search.minimise, 1.0)

    @property
    def _better(self) -> float:
        return BETTER * self._finer

    def run(self) -> Found | None:
        """The best plan that holds; the last one tried where none does; None where the formula has none to try."""
        incumbent: Found | None = None
        last: Found | None = None
        proved = False
        while not proved and len(self.evaluated) < ROUNDS:
            proposal = self._proposal(incumbent)
            if proposal is not None:
                self._seen.add(_key(proposal))
                last = self._evaluate(proposal.mixes, proposal.replicas, None)
            elif incumbent is not None and not incumbent.simulated:
                last = incumbent = self._confirm(incumbent)
            else:
                proved = incumbent is not None
                break
            if last.feasible:
                incumbent, proved = last, proposal is None
            else:
                self._learn(last, incumbent)
                incumbent = incumbent if incumbent and incumbent.feasible else None
            self._report(incumbent)
        if incumbent is not None and not incumbent.simulated:
            incumbent = self._confirm(incumbent)
        exact = self.scenario.search.minimise != "latency_p95_s" and not (self._plain and self._plain.gave_up)
        if incumbent is not None and proved and exact:
            return replace(incumbent, bound=self.objective(incumbent.sizing) * (1.0 - self._better))
        return incumbent or last

    def _learn(self, last: Found, incumbent: Found | None) -> None:
        """What a plan that was late teaches.

        Going up, the formula of every condition is corrected under which it was late. Going down, or where there is
        nothing to correct, its fleet is ruled out; where trying costs little, once its late classes had a second choice
        of plans on it.
        """
        grew = False
        for condition, evaluation in zip(self.conditions, last.evaluations, strict=True):
            if not evaluation.feasible:
                grew = correct(condition.sizer, self.priced(condition, last.mixes), evaluation) or grew
        if not grew or incumbent is not None or self._plain is not None:
            if self._second is not None or last.simulated:
                self._no_good_cuts.append(dict(last.replicas))
                self._second = None
            else:
                late = late_classes(self.sizer, last.mixes, last.evaluations[0])
                used = frozenset(option for name in late for _, option in last.mixes[name] if option.pool_index >= 0)
                self._second = dict(last.replicas), used
        if self._target is not None:
            self._late = self._target if self._late is None else self._late.beyond(self._target)

    def _second_choice(self, incumbent: Found | None) -> Solution | None:
        """The least loaded plan on the fleet that was late, without the plans that were; None rules the fleet out."""
        fleet, used = self._second or ({}, frozenset())
        constraints: dict[str, Any] = {"minimise": "load", "replicas": fleet, "without": used, "traffic_factor": TRUST}
        if incumbent is not None:
            constraints |= self._limits(self.objective(incumbent.sizing), 1.0 - self._better)
        solution = self._plain.solve(self.goal(**constraints)) if self._plain and used else None
        if solution is None or _key(solution) in self._seen:
            self._no_good_cuts.append(fleet)
            self._second = None
            return None
        return solution

    def _proposal(self, incumbent: Found | None) -> Solution | None:
        """The least loaded of the best plans by formula; with an incumbent, the most robust of those better than it."""
        if self.scenario.search.minimise == "latency_p95_s":
            return None if incumbent else self._fastest()
        if incumbent is None and self._plain is None and len(self.evaluated) < CLIMB:
            formulation = Formulation(self.conditions)
            best = formulation.solve(self.goal(no_good_cuts=tuple(self._no_good_cuts)))
            if best is not None:
                constraints = {
                    "no_good_cuts": tuple(self._no_good_cuts),
                    **self._limits(best.objective, 1.0 + NEARLY_EQUAL * self._finer),
                }
                best = formulation.solve(self.goal(**{**constraints, "minimise": "load"})) or best
            if best is not None and _key(best) not in self._seen:
                return best
        if self._second is not None and (other := self._second_choice(incumbent)) is not None:
            return other
        while (robust := self._most_robust(incumbent)) is not None and _key(robust) in self._seen:
            self._no_good_cuts.append(dict(robust.replicas))  # going up it was late
        return robust

    def _most_robust(self, incumbent: Found | None) -> Solution | None:
        """The plan that the formula as it was has in time at the highest traffic, of those better than the incumbent.

        None where none is left at `TRUST` of the traffic.
        """
        if self._plain is None:
            plain = [replace(each, sizer=each.sizer.replace(correction_factors={})) for each in self.conditions]
            self._plain = Formulation(plain)
        best = None if incumbent is None else self.objective(incumbent.sizing)
        if best is not None and best <= 0.0:
            return None
        constraints: dict[str, Any] = {"no_good_cuts": tuple(self._no_good_cuts)}
        goal = 0.0
        if best is not None:
            constraints |= self._limits(best, 1.0 - self._better)
            reach = self._plain.solve(self.goal(**constraints, traffic_factor=TRUST))
            self._reach = best if reach is None else min(best, reach.bound)
            if reach is None:
                return None
            low = max(reach.objective, 0.0 if self._late is None else self._late.objective)
            goal = (best + low) / 2.0 if low < (1.0 - MUCH) * best else best * (1.0 - self._better)
            constraints |= self._limits(goal, 1.0)
        low, high, found = -1, len(TRAFFIC_FACTORS), None
        while high - low > 1:
            middle = (low + high) // 2
            least_loaded = self.goal(**constraints, minimise="load", traffic_factor=TRAFFIC_FACTORS[middle])
            solution = self._plain.solve(least_loaded)
            low, high, found = (low, middle, found) if solution is None else (middle, high, solution)
        # Far under the traffic that another plan was late at, it would be late as well.
        if found is None or (self._late and TRAFFIC_FACTORS[low] < MISJUDGED * self._late.traffic_factor):
            return None
        self._target = _Target(goal, TRAFFIC_FACTORS[low])
        return found

    def _fastest(self) -> Solution | None:
        """The least loaded plan of the shortest latency that 95% of every class's requests can have, by formula."""
        first = self.conditions[0]
        idle = [float(first.sizer.latencies(o).max()) for options in first.plans.values() for o in options if o]
        limits_s = np.geomspace(min(idle) / 2.0, 3.0 * max(idle), LATENCIES) if idle else np.empty(0)
        low, high, best = -1, len(limits_s), None
        while high - low > 1:
            middle = (low + high) // 2
            formulation = Formulation([replace(c, within_s=float(limits_s[middle])) for c in self.conditions])
            solution = formulation.solve(self.goal(minimise="load"))
            low, high, best = (middle, high, best) if solution is None else (low, middle, solution)
        return best

    def goal(self, **constraints: Any) -> Goal:
        """What the scenario minimises, under its budgets and with more `constraints` on top."""
        minimise, least = self.scenario.search.minimise, self.sizer.rent_limit_usd_per_hour
        away = None if minimise == "turned_away_per_s" else 0.0
        minimise = "usd_per_hour" if minimise == "latency_p95_s" else minimise
        known = {"minimise": minimise, "usd_per_hour": least, "turned_away_per_s": away}
        return Goal(**{**known, **constraints})

    def _limits(self, objective: float, factor: float) -> dict[str, float]:
        """What keeps a goal on one side of a value of the objective."""
        minimise = self.scenario.search.minimise
        if minimise == "usd_per_hour":
            return {"total_usd_per_hour": objective * factor}
        if minimise == "turned_away_per_s":
            return {"turned_away_per_s": max(objective * factor, 1e-9)}
        rate = sum(rate for rate, _ in self.sizer.rates.values())
        return {"quality": 1.0 - objective / rate * factor}

    def objective(self, sizing: Sizing) -> float:
        """The figure that the scenario minimises, of a plan by formula."""
        minimise = self.scenario.search.minimise
        if minimise == "usd_per_hour":
            return sizing.usd_per_hour
        if minimise == "latency_p95_s":
            return self.sizer.quantile(sizing, 0.95)
        rates = {name: rate for name, (rate, _) in self.sizer.rates.items()}
        if minimise == "turned_away_per_s":
            return sum(rates[name] * (1.0 - sum(share for share, _ in mix)) for name, mix in sizing.mixes.items())
        return sum(
            rates[name] * share * (1.0 - (o.quality or 0.0)) for name, mix in sizing.mixes.items() for share, o in mix
        )

    def simulate(self, solution: Solution) -> Found:
        """A plan, simulated whatever the formula thinks of it."""
        return self._evaluate(solution.mixes, solution.replicas, "simulate")

    def _confirm(self, found: Found) -> Found:
        """The same plan, simulated."""
        return self._evaluate(found.mixes, found.replicas, "simulate")

    def _evaluate(self, mixes: Mixes, replicas: Mapping[str, int], level: Level | None) -> Found:
        jobs = []
        for condition in self.conditions:
            scenario, profiles = condition.sizer.scenario, condition.sizer.profiles
            nodes = {name: replicas.get(name, 0) for name in scenario.pools}
            deployment = to_deployment(self.priced(condition, mixes), nodes)
            quickest = level or self.levels(scenario, deployment)
            jobs.append(EvaluationJob(scenario, profiles, deployment, quickest, condition.slowdowns))
        evaluations = tuple(self.evaluate(jobs))
        sizing = self.sizer.assess(mixes, replicas)
        at = next((k for k, one in enumerate(evaluations) if not one.feasible), 0)
        where = "" if len(evaluations) == 1 or evaluations[at].feasible else f" under {self.conditions[at].name}"
        self.evaluated.append(
            EvaluatedPlan.from_evaluation(f"{self.name}{where}: {fleet_text(replicas)}", evaluations[at], mixes)
        )
        return Found(mixes, replicas, sizing, evaluations, None)

    def priced(self, condition: Condition, mixes: Mixes) -> Mixes:
        """The same mixes as another condition prices them."""
        if condition is self.conditions[0]:
            return mixes
        at = {
            id(option): (name, j) for name, options in self.conditions[0].plans.items()
            for j, option in enumerate(options) if option is not None
        }  # fmt: skip
        found: dict[str, tuple[tuple[float, Candidate], ...]] = {}
        for name, mix in mixes.items():
            there = [(share, condition.plans[name][at[id(option)][1]]) for share, option in mix]
            found[name] = tuple((share, option) for share, option in there if option is not None)
        return found

    def _report(self, incumbent: Found | None) -> None:
        """Tell `progress` the bound, the incumbent and the gap."""
        if incumbent is None:
            self.progress(f"{self.name}: {len(self.evaluated)} tried, none holds yet")
            return
        best = self.objective(incumbent.sizing)
        bound = best if self._reach is None else self._reach
        gap = 0.0 if best <= 0.0 else 1.0 - bound / best
        unit = UNITS[self.scenario.search.minimise]
        self.progress(f"{self.name}: bound {bound:.2f}, incumbent {best:.2f} {unit}, gap {gap:.1%}")


def correct(sizer: Sizer, mixes: Mixes, evaluation: Evaluation) -> bool:
    """Raise the correction factors of pools and edge fleets whose classes were late; whether any was.

    The formula has them late then too. GPU-seconds held beyond those predicted (model loads, larger requests) go into
    the load factors first.
    """
    deployment, grew = evaluation.deployment, False
    for index, pool in enumerate(sizer.scenario.pools):
        late = [
            name
            for name in late_classes(sizer, mixes, evaluation)
            if any(o.pool_index == index for _, o in mixes[name])
        ]
        if not late:
            continue
        ratio = evaluation.load_ratio.get(pool, 1.0)
        if ratio > 1.05:
            sizer.load_factors[pool] = max(sizer.load_factors.get(pool, 1.0), ratio)
        got = {name: evaluation.classes[name]["slo_attainment"].value for name in late}
        known = sizer.correction_factors.get(pool, 1.0)
        sizer.correction_factors[pool] = _correction_factor(sizer, pool, mixes, deployment.replicas, got, known)
        grew = grew or sizer.correction_factors[pool] > known
    for index, site in enumerate(sizer.scenario.edge):
        late = [
            name
            for name in late_classes(sizer, mixes, evaluation)
            if any(o.fleet_index == index for _, o in mixes[name])
        ]
        if late and sizer.edge_wait(site, mixes).probability:
            sizer.correction_factors[site] = EDGE_STEP * sizer.correction_factors.get(site, 1.0)
            grew = True
    return grew


def late_classes(sizer: Sizer, mixes: Mixes, evaluation: Evaluation) -> list[str]:
    """Classes that missed their SLO among those let in: the only promise that more nodes can mend."""
    got = {name: evaluation.classes[name]["slo_attainment"].value for name in mixes}
    wanted = {name: sizer.wanted(name) * sum(share for share, _ in mix) for name, mix in mixes.items()}
    return [name for name, value in got.items() if not value >= wanted[name] * (1.0 - 1e-9)]


def _correction_factor(
    sizer: Sizer, pool: str, mixes: Mixes, replicas: Mapping[str, int], got: Mapping[str, float], known: float
) -> float:
    """The factor on a pool's traffic under which the formula gives the attainment that was met, or less."""
    low, high = known * CORRECTION_STEP, CORRECTION_MOST
    if low >= high:
        return high
    for _ in range(20):
        middle = (low + high) / 2.0
        sizer.correction_factors[pool] = middle
        attained = sizer.assess(mixes, {name: replicas.get(name, 0) for name in sizer.scenario.pools}).attainment
        enough = any(attained[name] <= max(value, 0.0) + 1e-6 for name, value in got.items())
        low, high = (low, middle) if enough else (middle, high)
    return high


def _key(solution: Solution) -> object:
    """What tells two proposals apart."""
    parts = [(id(option), round(share, 6)) for mix in solution.mixes.values() for share, option in mix]
    return tuple(solution.replicas.items()), tuple(parts)


def to_deployment(mixes: Mixes, replicas: Mapping[str, int]) -> Deployment:
    """Mixes and nodes as they are deployed."""
    plans = {name: tuple(Share(share, option.plan) for share, option in mix) for name, mix in mixes.items() if mix}
    return Deployment(dict(replicas), plans)


def fleet_text(replicas: Mapping[str, int]) -> str:
    """`3 x a100 and 1 x l40s`, or `no nodes`."""
    rented = [f"{count} x {name}" for name, count in replicas.items() if count]
    return " and ".join(rented) if rented else "no nodes"
