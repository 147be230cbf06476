"""One evaluation of a deployment: a job, its key, and the figures that come out, kept on disk by that key.

A job says everything: scenario, profiles, deployment, level of fidelity, slowdowns; its figures follow from it alone,
wherever it runs. What shapes them makes its key: the program and its libraries, the profiles, the deployment, and the
part of the scenario that a simulation of this deployment sees. A limit (budget, quality floor, energy) or a pool that
nobody rents shapes none, so that a scenario in which only those changed finds its figures again; whether its promises
hold is judged anew every time.

Replications are added while a promise is undecided, and the limits have a say in that. Figures are therefore kept by
the number of replications that they are over, and a job goes through n, 2n, ... in turn, kept or not.

An `EvaluatedPlan` is a deployment with its figures, by simulation, by the recursion or by formula.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hybridsd_sim.estimate import Estimate
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.planning.analytic import Mixes, Sizer, Sizing
from hybridsd_sim.planning.evaluation_cache import Store, content_digest
from hybridsd_sim.pricing import Candidate, Pricing, price_deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.simulation import (
    SERVED,
    UNITS,
    Finding,
    Records,
    SimResult,
    Verdict,
    area,
    column,
    feasibility,
    figures_of,
    joined,
    promises,
    simulate,
)
from hybridsd_sim.workload import mean_rate_per_s

if TYPE_CHECKING:
    from hybridsd_sim.simulation import Inputs


Level = Literal["screen", "simulate"]

MOST_REPLICATIONS = 4
"""Times `replications` that an undecided plan gets at most, where `search.replications_max` says nothing."""

KEPT_REQUESTS = 500_000
"""Requests that are kept drawn, some 100 bytes each."""

Parts = Mapping[str, Sequence[tuple[float, Candidate]]]
"""Per request class the shares of its requests and the priced plans that serve them."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """A deployment to be tried on a scenario's own requests.

    `slowdowns` are, by site (pool or edge fleet), factors on every second spent there: 1.1 is 10% slower.
    """

    scenario: Scenario
    profiles: Profiles
    deployment: Deployment
    level: Level = "simulate"
    slowdowns: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of what shapes the figures, and the numbers of replications that they may be over."""
        return f"{self.digest}-{self.scenario.replications}-{self.replications_most}"

    @property
    def replications_most(self) -> int:
        """Replications at which it stops, decided or not."""
        count, most = self.scenario.replications, self.scenario.search.replications_max
        return max(count, MOST_REPLICATIONS * count if most is None else most)

    def key_over(self, replications: int) -> str:
        """The key in the store of its figures over so many replications."""
        return f"{self.digest}-{replications}"

    @property
    def digest(self) -> str:
        """SHA-256 of what shapes the figures over a given number of replications."""
        return content_digest(self.scenario, self.profiles, self.deployment, level=self.level, slowdowns=self.slowdowns)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one deployment on one scenario.

    `classes` holds, by request class and for "all", the figures of `metrics.UNITS` with their 95% intervals.
    `rent_usd_per_hour` is None where a price is unknown. `egress_usd_per_hour` is metered traffic at the mean rate of
    the arrivals (`workload.mean_rate_per_s`), all of it served. `load_ratio` is, by pool, GPU-seconds held over those
    that the plans predict, 1 where nothing was served; `utilisation` the share of the rented GPU time that was busy,
    NaN for a pool that is not rented. `verdict` is by the promises and budgets of the job's own scenario.
    """

    level: Level
    deployment: Deployment
    classes: Mapping[str, Mapping[str, Estimate]]
    rent_usd_per_hour: float | None
    egress_usd_per_hour: float
    load_ratio: Mapping[str, float]
    utilisation: Mapping[str, float]
    replications: int
    verdict: Verdict

    @property
    def feasible(self) -> bool:
        """Whether every promise of the scenario is kept."""
        return self.verdict.feasible.ok

    @property
    def usd_per_hour(self) -> float | None:
        """Rent and egress; None where the rent is unknown."""
        return None if self.rent_usd_per_hour is None else self.rent_usd_per_hour + self.egress_usd_per_hour


@dataclass(frozen=True, slots=True)
class Evaluator:
    """`evaluate` with a store, as one callable that travels to other processes."""

    store: Store | None = None

    def __call__(self, job: EvaluationJob) -> Evaluation:
        return evaluate(job, self.store)


def evaluate(job: EvaluationJob, store: Store | None = None) -> Evaluation:
    """The figures of a job, read from the store where it has them, else computed and kept there.

    The scenario's `replications` are run, and doubled while a promise is undecided, up to `search.replications_max`;
    replication r is the same however many there are. Raises `InputError` for a deployment that does not fit the
    scenario, and what `screen` raises where the recursion does not apply.
    """
    count, result = job.scenario.replications, None
    while True:
        figures = store.get(job.key_over(count)) if store else None
        if figures is None:
            result = _run(job, count, result)
            figures = _figures(job, result, store)
        evaluation = _judged(job, figures)
        if not (count := _next_count(job, evaluation)):
            return evaluation


def evaluate_with_records(job: EvaluationJob, store: Store | None = None) -> tuple[SimResult, Evaluation]:
    """The run behind an evaluation, with the records of every request, and the evaluation.

    Records are not kept, so this always runs; the figures go to the store.
    """
    count, result = job.scenario.replications, None
    while True:
        result = _run(job, count, result)
        evaluation = _judged(job, _figures(job, result, store))
        if not (count := _next_count(job, evaluation)):
            return result, evaluation


def find_evaluation(job: EvaluationJob, store: Store) -> Evaluation | None:
    """The evaluation of a job where the store has all of it: nothing is run."""
    count = job.scenario.replications
    while (figures := store.get(job.key_over(count))) is not None:
        evaluation = _judged(job, figures)
        if not (count := _next_count(job, evaluation)):
            return evaluation
    return None


def undecided(evaluation: Evaluation, scenario: Scenario) -> bool:
    """Whether more replications may change what is thought of the deployment.

    So it is while the 95% interval of a promise reaches across its bound, unless another one is broken for sure: then
    the deployment is out, whatever becomes of the rest. A figure that nobody knows stays unknown.
    """
    asked = promises(scenario, evaluation.classes)
    lost = any(not promise.kept and not (promise.undecided and promise.got.known) for promise in asked)
    return not lost and any(promise.undecided for promise in asked)


def _next_count(job: EvaluationJob, evaluation: Evaluation) -> int:
    """Replications to go on to after an evaluation; 0 where it stands."""
    most = job.replications_most
    going_on = evaluation.replications < most and undecided(evaluation, job.scenario)
    return min(2 * evaluation.replications, most) if going_on else 0


def _run(job: EvaluationJob, count: int, before: SimResult | None) -> SimResult:
    """The job's first `count` replications; those that ran `before` are not run again."""
    numbers = range(len(before.replications) if before else 0, count)
    if job.level == "screen":
        from hybridsd_sim.simulation import screen

        inputs = _inputs(job.scenario, job.profiles, numbers)
        more = screen(job.scenario, job.profiles, job.deployment, slowdowns=job.slowdowns, inputs=inputs).result
    else:
        more = simulate(
            job.scenario,
            job.profiles,
            policy="planned",
            plan=job.deployment,
            slowdowns=job.slowdowns,
            replications=numbers,
        )
    return joined(before, more) if before else more


_drawn: deque[Inputs] = deque()
"""Requests of the scenarios screened last: drawing them takes longer than screening a deployment."""


def _inputs(scenario: Scenario, profiles: Profiles, numbers: range) -> Inputs:
    """The requests of some replications, drawn anew only where they were not drawn of late."""
    from hybridsd_sim.simulation import Inputs

    for known in _drawn:
        same = known.profiles is profiles and [each.replication for each in known.replications] == list(numbers)
        if same and known.scenario == scenario:
            return known
    drawn = Inputs.of(scenario, profiles, replications=numbers)
    _drawn.append(drawn)
    while len(_drawn) > 1 and sum(len(each) for inputs in _drawn for each in inputs.replications) > KEPT_REQUESTS:
        _drawn.popleft()
    return drawn


def _figures(job: EvaluationJob, result: SimResult, store: Store | None) -> dict[str, Any]:
    """Everything that an evaluation says, as plain data, put into the store; by pool only those that are rented."""
    options = price_deployment(Pricing(job.scenario, job.profiles, job.slowdowns), job.deployment).by_class
    # What leads to a pool without nodes is turned away and left out.
    served_at = {index for index, name in enumerate(job.scenario.pools) if job.deployment.replicas.get(name, 0)} | {-1}
    parts = {
        name: [(p.share, o) for p, o in zip(mix, options[name], strict=True) if o.pool_index in served_at]
        for name, mix in job.deployment.plans.items()
    }
    classes = {
        name: {figure: [row[figure].value, *row[figure].interval] for figure in UNITS}
        for name, row in figures_of(result.summary).items()
    }
    rented = [name for name, nodes in result.replicas.items() if nodes]
    egress_usd_per_hour = 0.0
    for name, mix in parts.items():
        usd = sum(share * sum(p.usd or 0.0 for p in o.cost.parts if p.tier == "network") for share, o in mix)
        egress_usd_per_hour += mean_rate_per_s(job.scenario.requests[name].arrivals) * 3600 * usd
    verdict = result.verdict
    figures = {
        "classes": classes,
        "rent_usd_per_hour": result.usd_per_hour,
        "egress_usd_per_hour": egress_usd_per_hour,
        "load_ratio": {name: load_ratio(result.replications, parts, name) for name in rented},
        "utilisation": {name: _utilisation(result, name) for name in rented},
        "replications": len(result.replications),
        "findings": [[f.name, f.ok, f.reason] for f in (verdict.stable, verdict.converged, verdict.in_domain)],
    }
    if store:
        store.put(job.key_over(len(result.replications)), figures)
    return figures


def _judged(job: EvaluationJob, figures: Mapping[str, Any]) -> Evaluation:
    """An evaluation from kept figures, judged by the job's present promises."""
    classes = {
        name: {figure: Estimate(*row[figure]) for figure in UNITS}
        for name, row in figures["classes"].items()
    }  # fmt: skip
    findings = [Finding(name, ok=ok, reason=reason) for name, ok, reason in figures["findings"]]
    pools = job.scenario.pools
    return Evaluation(
        level=job.level,
        deployment=job.deployment,
        classes=classes,
        rent_usd_per_hour=figures["rent_usd_per_hour"],
        egress_usd_per_hour=figures["egress_usd_per_hour"],
        load_ratio={name: figures["load_ratio"].get(name, 1.0) for name in pools},
        utilisation={name: figures["utilisation"].get(name, math.nan) for name in pools},
        replications=figures["replications"],
        verdict=Verdict(feasibility(job.scenario, classes), *findings),
    )


def _utilisation(result: SimResult, pool: str) -> float:
    """Share of a pool's rented GPU time after the warm-up in which a GPU was held, as in `pool_table`."""
    scenario, index = result.scenario, list(result.scenario.pools).index(pool)
    edges_s = np.array([scenario.warmup_s, scenario.horizon_s])
    held_gpu_s = 0.0
    for records in result.replications:
        mine = column(records.rows(), "pool_index") == index
        start_s, stop_s, degree, size, lost_gpu_s = (
            column(records.rows(), name)[mine]
            for name in ("cloud_start_s", "cloud_stop_s", "degree", "batch_size", "lost_gpu_s")
        )
        held_gpu_s += float(area(start_s, stop_s, degree / size, edges_s).sum())
        again = np.isnan(start_s) | (start_s >= scenario.warmup_s)  # what a lost node held counts where work began anew
        held_gpu_s += float(lost_gpu_s[again].sum())
    gpus_rented = result.replicas[pool] * scenario.pools[pool].gpus_per_node
    return min(1.0, held_gpu_s / (gpus_rented * float(np.diff(edges_s).sum()) * len(result.replications)))


def load_ratio(replications: Sequence[Records], parts: Parts, pool: str) -> float:
    """GPU-seconds that a pool's served requests held over those that their plans predict; 1 where none was served.

    Above 1 by model loads, by nodes that were taken away, and by requests that are larger than their class. A batch is
    predicted at the size that it had.
    """
    held = predicted = 0.0
    for records in replications:
        rows, index = records.rows(), records.pools.index(pool)
        mine = (column(rows, "pool_index") == index) & (column(rows, "status") == SERVED)
        held += float(column(rows, "gpu_seconds")[mine].sum() + column(rows, "lost_gpu_s")[mine].sum())
        predicted += _predicted_gpu_s(records, mine, parts, index)
    return held / predicted if predicted else 1.0


def _predicted_gpu_s(records: Records, mine: np.ndarray, parts: Parts, pool_index: int) -> float:
    """GPU-seconds that the plans of some requests predict, each part of a batch bearing its share."""
    names = ("class_index", "plan_index", "batch_size")
    columns = [column(records.rows(), name)[mine].astype(np.int64) for name in names]
    sizes = [int(each.max(initial=0)) + 1 for each in columns]
    counts = np.bincount(np.ravel_multi_index(columns, sizes), minlength=1)
    total = 0.0
    for code in np.flatnonzero(counts).tolist():
        class_index, plan_index, size = (int(index) for index in np.unravel_index(code, sizes))
        mix = [part for part in parts.get(records.classes[class_index], ()) if part[1].pool_index == pool_index]
        own = [part for part in mix if part[1].plan.label == records.plans[plan_index]]
        # A request of another size has a plan of its own; its class's mix predicts what one of the usual size takes.
        served = [(share, o.degree * o.batch_s[min(size, len(o.batch_s)) - 1] / size) for share, o in own or mix]
        mean_gpu_s = sum(share * gpu_s for share, gpu_s in served) / sum(share for share, _ in served)
        total += int(counts[code]) * mean_gpu_s
    return total


Interval = tuple[float, float, float]
"""A value with the ends of its 95% interval."""


@dataclass(frozen=True, slots=True)
class EvaluatedPlan:
    """A capacity plan with its figures: (value, low, high) at 95% where it was simulated, by formula otherwise.

    `level` is `simulate` for a simulated plan, `screen` for one by the compiled recursion and `formula` for one by
    formula alone. `usd_per_hour` is the rent. `labels` are the plans of each class, with their shares where there are
    several.
    """

    name: str
    deployment: Deployment | None
    level: Level | Literal["formula"]
    usd_per_hour: float | None
    latency_p95_s: Interval
    slo_attainment: Interval
    quality: float | None
    gpu_seconds_per_image: float | None
    edge_energy_j_per_image: float | None
    feasible: bool
    reason: str
    labels: Mapping[str, str]
    unserved_share: float = 0.0

    @classmethod
    def from_evaluation(cls, name: str, evaluation: Evaluation, mixes: Mixes) -> EvaluatedPlan:
        """A plan's figures by simulation or by the compiled recursion, with their 95% intervals."""
        everyone = evaluation.classes[ALL]
        feasible = evaluation.verdict.feasible
        return cls(
            name=name,
            deployment=evaluation.deployment,
            level=evaluation.level,
            usd_per_hour=evaluation.rent_usd_per_hour,
            latency_p95_s=_interval(everyone["latency_p95_s"]),
            slo_attainment=_interval(everyone["slo_attainment"]),
            quality=_known(everyone["quality_mean"].value),
            gpu_seconds_per_image=_known(everyone["gpu_seconds_per_image"].value),
            edge_energy_j_per_image=_known(everyone["edge_energy_j_per_image"].value),
            feasible=feasible.ok,
            reason=feasible.reason,
            labels=labels(mixes),
            unserved_share=_known(everyone["unserved_share"].value) or 0.0,
        )

    @classmethod
    def from_formula(cls, name: str, sizing: Sizing, sizer: Sizer) -> EvaluatedPlan:
        """A plan's figures by formula alone; the ends of their intervals are unknown (NaN)."""
        p95 = sizer.quantile(sizing, 0.95)
        total = sum(sizer.rates[cls][0] for cls in sizing.mixes)
        served = [(sizer.rates[cls][0] / total * share, o) for cls, mix in sizing.mixes.items() for share, o in mix]
        energy = [(weight, option.cost.edge_energy_j) for weight, option in served]
        plans = {cls: tuple(Share(share, o.plan) for share, o in mix) for cls, mix in sizing.mixes.items()}
        return cls(
            name=name,
            deployment=Deployment(dict(sizing.replicas), plans),
            level="formula",
            usd_per_hour=None if math.isinf(sizing.rent_usd_per_hour) else sizing.rent_usd_per_hour,
            latency_p95_s=(p95, math.nan, math.nan),
            slo_attainment=(
                sum(sizer.rates[c][0] / total * a for c, a in sizing.attainment.items()),
                math.nan,
                math.nan,
            ),
            quality=sizing.quality,
            gpu_seconds_per_image=sum(weight * option.cost.gpu_seconds for weight, option in served),
            edge_energy_j_per_image=None
            if any(e is None for _, e in energy)
            else sum(w * (e or 0.0) for w, e in energy),
            feasible=sizing.missed <= 1e-9,
            reason="by formula",
            labels=labels(sizing.mixes),
        )


def labels(mixes: Mixes) -> dict[str, str]:
    """The plans of each class, with their shares where there are several or some requests are turned away."""
    return {
        name: " + ".join(
            option.plan.label if share > 1.0 - 1e-9 else f"{share:.0%} {option.plan.label}" for share, option in mix
        )
        for name, mix in mixes.items()
    }


def _interval(figure: Estimate) -> Interval:
    return figure.value, figure.low, figure.high


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def same_figures(one: EvaluatedPlan, other: EvaluatedPlan) -> bool:
    """Whether two plans cost, take and look the same."""
    return all(abs(a - b) < 1e-9 for a, b in zip(_objectives(one), _objectives(other), strict=True))


def dominates(one: EvaluatedPlan, other: EvaluatedPlan) -> bool:
    """Whether one plan is nowhere worse than the other in dollars, latency and quality, and better somewhere."""
    mine, theirs = _objectives(one), _objectives(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _objectives(point: EvaluatedPlan) -> tuple[float, ...]:
    """Rounded, so that means of the same numbers in another order are the same."""
    dollars = math.inf if point.usd_per_hour is None else point.usd_per_hour
    quality = -1.0 if point.quality is None else point.quality
    return tuple(round(figure, 9) for figure in (dollars, point.latency_p95_s[0], -quality))
