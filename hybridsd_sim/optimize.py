"""Searches plans and replica counts: the cheapest capacity plan that holds every promise, confirmed by simulation.

For request classes i with candidates C_i (priced plans that meet the class's quality floor, energy limit and, on an
idle fleet, its SLO percentile) and pools p with n_p nodes:

    minimise    sum_p n_p * rent_p  +  sum_i rate_i * egress_usd(c_i)            [USD per hour]
    subject to  c_i in C_i                                                       one plan per class
                P(wait_p(i) + latency(c_i) <= slo_i) >= percentile_i             by `queueing`, then by simulation
                replicas_min_p <= n_p <= replicas_max_p,   rent <= budget

The search is a coordinate descent over classes from several starts (cheapest, all in one pool, all at the edge, each
parallel degree), every step sized by `sizing`. The result is simulated; what the formula got wrong is fed back as load
factors or extra nodes, and where there is slack a node is taken away and the simulation asked again.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hybridsd_sim.candidates import Candidate, CandidateSet, find_candidates, prune
from hybridsd_sim.capacity import CapacityPlan, Evaluated, analytic, dominates, evaluated, same_figures
from hybridsd_sim.explain import explain
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.records import column
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulate import SimResult, simulate
from hybridsd_sim.sizing import Sizer, Sizing

ROUNDS = 8
"""Simulations after which a plan that still misses its promises is called infeasible."""
CLOUD_ONLY, EDGE_ONLY, STATIC_SWITCH = "cloud only", "edge only", "static switch"
SLO_SCALES = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0)
"""Factors on every SLO that span the frontier's latency axis."""
FLOOR_STEPS = (-0.02, -0.01, -0.005, 0.0, 0.003, 0.006, 0.01)
"""Changes of every quality floor (CLIP) that span the frontier's quality axis."""
SLACK = 1e-9
"""Rounding that a sum of missed shares may show."""
SHARE_TOLERANCE = 0.02
"""How far from the static share a switch step may lie and still count as it."""
NEAR_OPTIMAL = 1.3
"""Alternatives cost at most this much more than the chosen plan."""


class Mapper(Protocol):
    """`map`, or anything that fans out like it and keeps the order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]: ...


def optimize(
    scenario: Scenario,
    profiles: Profiles,
    *,
    map: Mapper | None = None,  # noqa: A002 - the contract's name
    progress: Callable[[str], None] = lambda _: None,
) -> CapacityPlan:
    """The cheapest capacity plan that holds every promise of the scenario, with its evidence.

    `map` fans out the independent simulations; `progress` hears what is being done. An infeasible scenario returns the
    plan that misses least, with `feasible` False and the binding constraint in `explanation`. Raises `InputError` for
    names that the profiles do not hold.
    """
    progress("pricing candidate plans")
    found = find_candidates(scenario, profiles)
    search = _Search(scenario, profiles, found, Sizer(scenario, profiles))
    progress("searching plans and replicas")
    confirmed = search.confirm(search.choices(), "chosen", progress)
    progress("sizing and simulating the baselines")
    baselines = _baselines(search, map or builtins.map)
    plan = CapacityPlan(
        scenario=scenario,
        feasible=confirmed.evaluated.feasible,
        explanation=(),
        deployment=confirmed.deployment,
        mixes={name: ((1.0, option),) for name, option in confirmed.sizing.chosen.items()},
        chosen_result=confirmed.result,
        frontier=tuple(search.frontier()),
        baselines=tuple(baseline.evaluated for baseline in baselines.values()),
        baseline_results={name: baseline.result for name, baseline in baselines.items()},
        alternatives=tuple(search.alternatives(confirmed.sizing)),
        evidence=tuple(search.evidence),
        switch_curve=search.switch_curve(confirmed.sizing.chosen),
        refusals=found.refusal_counts(),
        profiles_digest=profiles.digest,
    )
    return replace(plan, explanation=tuple(explain(plan, found, search.sizer)))


@dataclass(frozen=True, slots=True)
class _Confirmed:
    sizing: Sizing
    deployment: Deployment
    result: SimResult
    evaluated: Evaluated


@dataclass(slots=True)
class _Search:
    """Candidates, a sizer, and the evidence gathered so far."""

    scenario: Scenario
    profiles: Profiles
    found: CandidateSet
    sizer: Sizer
    evidence: list[Evaluated] = field(default_factory=list)

    def choices(self, keep: Callable[[Candidate], bool] = lambda _: True) -> dict[str, list[Candidate]]:
        """Per class the candidates worth trying: within its promises if any are, not dominated, cheapest first."""
        return {
            name: self._of_class(name, [o for o in options if keep(o)]) for name, options in self.found.by_class.items()
        }

    def _of_class(self, name: str, options: Sequence[Candidate]) -> list[Candidate]:
        floor = [option for option in options if option.meets_floor]
        within = [option for option in floor if self.sizer.idle_attainment(option) >= self.sizer.wanted(name)]
        if within:
            return prune(within)
        # Nothing holds: the least bad ones are the fastest of those that keep quality, else the best pictures.
        return sorted(floor, key=lambda o: o.latency_s)[:3] or sorted(options, key=lambda o: -(o.quality or 0.0))[:3]

    def best(self, choices: Mapping[str, Sequence[Candidate]], *, thorough: bool = True) -> Sizing | None:
        """The best sizing that coordinate descent finds; None if a class has no candidate at all.

        A thorough search starts from every kind of gang, another one from the cheapest plans only.
        """
        if any(not options for options in choices.values()):
            return None
        starts = list(_starts(choices))
        sizings = [self._descend(start, choices) for start in (starts if thorough else starts[:1])]
        return min(sizings, key=self._objective)

    def _descend(self, chosen: dict[str, Candidate], choices: Mapping[str, Sequence[Candidate]]) -> Sizing:
        best = self.sizer.size(chosen)
        improved = True
        while improved:
            improved = False
            for name, options in choices.items():
                for option in options:
                    if option is best.chosen[name]:
                        continue
                    trial = self.sizer.size({**best.chosen, name: option})
                    if self._objective(trial) < self._objective(best):
                        best, improved = trial, True
        return best

    def _objective(self, sizing: Sizing) -> tuple[float, ...]:
        """Smaller is better: promises missed, then what the scenario minimises, then load, then latency."""
        over = max(0.0, sizing.rent_usd_per_hour - (self.scenario.budget.usd_per_hour or math.inf))
        missed = round(sizing.missed, 9) + (over if math.isfinite(over) else 0.0)
        latency = sum(option.latency_s for option in sizing.chosen.values())
        dollars = (round(sizing.usd_per_hour, 6), sizing.load_usd_per_hour)
        if self.scenario.search.minimise == "latency_p95_s":
            return (missed, latency, *dollars)
        return (missed, *dollars, latency)

    def confirm(
        self, choices: Mapping[str, Sequence[Candidate]], name: str, progress: Callable[[str], None] = lambda _: None
    ) -> _Confirmed:
        """Search, simulate, feed back what the formula got wrong, until the simulation agrees or `ROUNDS` are spent."""
        attempt = 0
        while True:
            attempt += 1
            sizing = self.best(choices)
            if sizing is None:
                sizing = self.sizer.size({cls: options[0] for cls, options in choices.items() if options})
            progress(f"simulating {name}, try {attempt}")
            last = self.simulated(sizing, name)
            if last.evaluated.feasible:
                return self._without_slack(last, name)
            if not self._learn(last) or attempt >= ROUNDS:
                return last

    def simulated(self, sizing: Sizing, name: str) -> _Confirmed:
        """Simulate a sizing as it would be deployed."""
        deployment = Deployment.pure(sizing.replicas, {cls: option.plan for cls, option in sizing.chosen.items()})
        result = simulate(self.scenario, self.profiles, policy="planned", plan=deployment)
        confirmed = _Confirmed(sizing, deployment, result, evaluated(name, deployment, result, sizing))
        self.evidence.append(confirmed.evaluated)
        return confirmed

    def _learn(self, confirmed: _Confirmed) -> bool:
        """Correct the formula by the run: measured load, and more nodes. False if nothing can help."""
        grew = False
        late = set(self._late_classes(confirmed))
        for index, name in enumerate(self.scenario.pools):
            spec, used = self.scenario.pools[name], confirmed.sizing.replicas[name]
            mine = {cls for cls, option in confirmed.sizing.chosen.items() if option.pool_index == index}
            if not mine & late:
                continue
            ratio = measured_load_ratio(confirmed, index)
            known = self.sizer.load_factors.get(name, 1.0)
            factor, extra = known * ratio if ratio > 1.05 else known, self.sizer.extra_nodes.get(name, 0)
            if used < spec.replicas_max:
                extra = used + max(1, used // 10) - max(1, spec.replicas_min)
                grew = True
            self.sizer.learn(name, factor, extra)
        return grew

    def _late_classes(self, confirmed: _Confirmed) -> Iterator[str]:
        """Classes that were measured and missed their SLO: the only promise that more nodes can mend."""
        summary = confirmed.result.summary
        for name in self.scenario.requests:
            attained = float(summary.xs(name, level="request_class").iloc[0]["slo_attainment"])
            if attained < self.sizer.wanted(name):
                yield name

    def _without_slack(self, confirmed: _Confirmed, name: str) -> _Confirmed:
        """The fewest nodes of each pool on which the simulation still holds every promise, by halving."""
        best = confirmed
        for index, (pool, spec) in enumerate(self.scenario.pools.items()):
            used = any(option.pool_index == index for option in best.sizing.chosen.values())
            too_few = max(spec.replicas_min, int(used)) - 1
            while best.sizing.replicas[pool] - too_few > 1:
                nodes = (best.sizing.replicas[pool] + too_few) // 2
                fewer = self.sizer.with_replicas(best.sizing, {**best.sizing.replicas, pool: nodes})
                trial = self.simulated(fewer, f"{name}, {nodes} of {pool}")
                if trial.evaluated.feasible:
                    best = trial
                else:
                    too_few = nodes
        return replace(best, evaluated=replace(best.evaluated, name=name))

    def frontier(self) -> Iterator[Evaluated]:
        """Capacity plans by formula that no other beats in dollars, latency and quality together."""
        points: list[Evaluated] = []
        for scale in SLO_SCALES:
            for step in FLOOR_STEPS:
                point = self._point(scale, step)
                if point is not None and not any(same_figures(point, known) for known in points):
                    points.append(point)
        yield from (point for point in points if not any(dominates(other, point) for other in points))

    def _point(self, scale: float, step: float) -> Evaluated | None:
        moved = {}
        for name, spec in self.scenario.requests.items():
            if spec.slo_s is not None:
                moved[f"requests.{name}.slo_s"] = spec.slo_s * scale
        scenario = self.scenario.with_overrides(moved) if moved else self.scenario
        sizer = Sizer(scenario, self.profiles, rates=self.sizer.rates, load_factors=self.sizer.load_factors)
        other = _Search(scenario, self.profiles, self.found, sizer)
        sizing = other.best(other.choices(lambda option: _above(option, scenario, step)), thorough=False)
        return None if sizing is None or not self._holds(sizing) else analytic("frontier", sizing, sizer)

    def alternatives(self, chosen: Sizing) -> Iterator[Evaluated]:
        """Near-optimal plans that differ in kind: one pool only, one method only, no hand-over, always a hand-over."""
        for name, keep in _kinds(self.scenario):
            sizing = self.best(self.choices(keep))
            if sizing is None or not self._holds(sizing) or sizing.chosen == chosen.chosen:
                continue
            if sizing.rent_usd_per_hour <= NEAR_OPTIMAL * chosen.rent_usd_per_hour:
                yield analytic(name, sizing, self.sizer)

    def _holds(self, sizing: Sizing) -> bool:
        """Whether a sizing keeps, by formula, what it was sized for, and every floor, limit and budget."""
        budget = self.scenario.budget
        images = sum(
            self.sizer.rates[name][0] * 3600 * spec.num_images for name, spec in self.scenario.requests.items()
        )
        return (
            sizing.missed <= SLACK
            and all(option.meets_floor for option in sizing.chosen.values())
            and (budget.usd_per_hour is None or sizing.rent_usd_per_hour <= budget.usd_per_hour)
            and (budget.usd_per_image is None or sizing.rent_usd_per_hour <= budget.usd_per_image * images)
        )

    def switch_curve(self, chosen: Mapping[str, Candidate]) -> dict[str, tuple[Candidate, ...]]:
        """Per class the chosen kind of plan at every switch step: same pool, method and small model if it has any."""
        return {name: tuple(_curve(self.found.by_class[name], option)) for name, option in chosen.items()}


def _starts(choices: Mapping[str, Sequence[Candidate]]) -> Iterator[dict[str, Candidate]]:
    yield {name: options[0] for name, options in choices.items()}
    kinds = sorted({(option.pool_index, option.degree) for options in choices.values() for option in options})
    for kind in kinds:
        yield {
            name: next((o for o in options if (o.pool_index, o.degree) == kind), options[0])
            for name, options in choices.items()
        }


def _above(option: Candidate, scenario: Scenario, step: float) -> bool:
    """Whether the option keeps its class's floor moved by `step`."""
    floor = scenario.requests[option.request_class].quality_floor
    return floor is None or (option.quality is not None and option.quality >= floor + step)


def _kinds(scenario: Scenario) -> Iterator[tuple[str, Callable[[Candidate], bool]]]:
    for index, name in enumerate(scenario.pools):
        yield f"only pool {name}", lambda o, i=index: o.pool_index in (i, -1)  # type: ignore[misc]
    for method in scenario.search.methods:
        yield f"only {method}", lambda o, m=method: all(s.method == m for s in o.plan.cloud_stages)  # type: ignore[misc]
    yield "no hand-over", lambda o: not (o.cloud_steps and o.edge_steps)
    yield "always a hand-over", lambda o: bool(o.cloud_steps and o.edge_steps)


def _curve(options: Sequence[Candidate], chosen: Candidate) -> Iterator[Candidate]:
    by_step: dict[int, list[Candidate]] = {}
    for option in options:
        by_step.setdefault(option.cloud_steps, []).append(option)
    for step in sorted(by_step):
        alike = [option for option in by_step[step] if _alike(option, chosen)]
        yield min(alike or by_step[step], key=lambda option: (option.usd_or_inf, option.latency_s))


def _alike(option: Candidate, chosen: Candidate) -> bool:
    mine, theirs = option.plan.cloud_stages, chosen.plan.cloud_stages
    same_cloud = not mine or not theirs or (mine[0].site, mine[0].method, mine[0].degree) == (
        theirs[0].site, theirs[0].method, theirs[0].degree
    )  # fmt: skip
    small, wanted = option.plan.edge_stages, chosen.plan.edge_stages
    return same_cloud and (not small or not wanted or small[0].model == wanted[0].model)


def _baselines(search: _Search, fan_out: Mapper) -> dict[str, _Confirmed]:
    """Cloud only, edge only and the paper's static switch, each with its own best pools and the same promises."""
    done = {name: _baseline_job(search, name) for name in (CLOUD_ONLY, EDGE_ONLY, STATIC_SWITCH)}
    found: dict[str, _Confirmed] = {}
    for confirmed, evidence in fan_out(_baseline, list(done.values())):
        search.evidence += evidence
        if confirmed is not None:
            found[confirmed.evaluated.name] = confirmed
    return found


def _baseline_job(search: _Search, kind: str) -> tuple[_Search, str]:
    """A search of its own, so that baselines can run side by side and none learns from another."""
    known = search.sizer
    sizer = Sizer(search.scenario, search.profiles, rates=known.rates, load_factors=dict(known.load_factors))
    return _Search(search.scenario, search.profiles, search.found, sizer), kind


def _baseline(job: tuple[_Search, str]) -> tuple[_Confirmed | None, list[Evaluated]]:
    search, kind = job
    share = search.scenario.search.static_switch
    choices = search.choices(lambda option: _is_kind(option, kind, share))
    if any(not options for options in choices.values()):
        return None, []
    name = f"{kind} {share:.0%}" if kind == STATIC_SWITCH else kind
    return search.confirm(choices, name), search.evidence


def _is_kind(option: Candidate, kind: str, share: float) -> bool:
    if kind == CLOUD_ONLY:
        return option.edge_steps == 0
    if kind == EDGE_ONLY:
        return option.cloud_steps == 0
    return bool(option.edge_steps) and abs(option.switch_share - share) < SHARE_TOLERANCE


def measured_load_ratio(confirmed: _Confirmed, pool_index: int) -> float:
    """GPU-seconds that a pool's requests held over those their plans predicted; above 1 by model loads and mixes."""
    held = predicted = 0.0
    options = list(confirmed.sizing.chosen.values())
    names = list(confirmed.result.scenario.requests)
    by_class = {names.index(o.request_class): o.cloud_s * o.degree for o in options if o.pool_index == pool_index}
    for records in confirmed.result.replications:
        rows = records.rows()
        rows = rows[(column(rows, "pool_index") == pool_index) & (column(rows, "status") == 0)]
        held += float(column(rows, "gpu_seconds").sum())
        predicted += sum(by_class.get(int(index), 0.0) for index in column(rows, "class_index"))
    return held / predicted if predicted else 1.0
