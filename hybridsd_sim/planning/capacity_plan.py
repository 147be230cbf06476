"""A capacity plan and the plans it was compared with: the types, and their figures by simulation or by formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hybridsd_sim.estimate import Estimate
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.planning.analytic import Mixes, Sizer, Sizing
from hybridsd_sim.planning.evaluation import Evaluation
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.simulation import SimResult, Verdict

Interval = tuple[float, float, float]
"""A value with the ends of its 95% interval."""


POLICY_OF = {"simulate": "planned", "screen": "screened"}
"""How a plan's figures were found, by the level of its evaluation."""


@dataclass(frozen=True, slots=True)
class Margin:
    """What a small change of a limit or of the traffic buys or costs: a shadow price over a finite step.

    `change` is the step in words (`one more second of SLO`), `figure` what it moves (`usd_per_hour`, `latency_p95_s`,
    `quality`), `before` and `after` its values by the corrected formula; None where no plan holds.
    """

    change: str
    figure: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A constraint of the smallest conflicting set, and the least change of it alone that makes a plan possible.

    `needed` None means that no change of this one alone helps.
    """

    constraint: str
    asked: float | None
    needed: float | None
    unit: str


@dataclass(frozen=True, slots=True)
class Variation:
    """The plan under other conditions: what was varied, in words, and what came out when it was simulated."""

    name: str
    result: EvaluatedPlan


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure the plan is, given the intervals of the modelled step costs.

    `probability` is the share of `draws` of the costs in which every promise holds; `asked` is `budget.confidence`;
    `by_class` the same for each request class by itself. `level` says which rung of the ladder tested the draws.
    """

    probability: float
    asked: float | None
    draws: int
    by_class: Mapping[str, float]
    level: str


@dataclass(frozen=True, slots=True)
class Saving:
    """The chosen plan against the best plan of another kind; figures None where one of the two is unknown.

    `usd_per_hour` and `share` are what is saved (negative where the chosen plan costs more), `quality` the change of
    the mean CLIP score. `holds` says whether the other plan keeps every promise, and `reason` why not. `unserved` are
    the shares of requests that the chosen plan and the other one do not serve.
    """

    other: str
    holds: bool
    reason: str
    usd_per_hour: float | None
    share: float | None
    quality: float | None
    unserved: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class EvaluatedPlan:
    """A capacity plan with its figures: (value, low, high) at 95% where it was simulated, by formula otherwise.

    `policy` is `planned` for a simulated plan, `screened` for one by the compiled recursion and `analytic` for one by
    formula alone. `usd_per_hour` is the rent. `labels` are the plans of each class, with their shares where there are
    several.
    """

    name: str
    deployment: Deployment | None
    policy: str
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
            policy=POLICY_OF[evaluation.level],
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
            policy="analytic",
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


@dataclass(frozen=True, eq=False)
class CapacityPlan:
    """The answer: what to rent and how to serve each class, what it was compared with, and the evidence.

    `evidence` are all plans evaluated in the search, in its order. `cost_usd_per_hour` is rent and egress at the
    planning rates; `bound_usd_per_hour` is how low the search found no plan that it could not rule out, by the same
    rates. `conflict` is an irreducible infeasible set of constraints, empty where a plan meets all of them; `robust` is
    the plan under each named scenario, where that was asked.
    """

    scenario: Scenario
    feasible: bool
    explanation: tuple[str, ...]
    deployment: Deployment
    mixes: Mixes
    chosen_result: SimResult
    frontier: tuple[EvaluatedPlan, ...]
    baselines: tuple[EvaluatedPlan, ...]
    baseline_results: Mapping[str, SimResult]
    alternatives: tuple[EvaluatedPlan, ...]
    evidence: tuple[EvaluatedPlan, ...]
    switch_curve: Mapping[str, tuple[Candidate, ...]]
    refusals: Mapping[tuple[str, str], int]
    profiles_digest: str
    bound_usd_per_hour: float | None = None
    cost_usd_per_hour: float | None = None
    margins: tuple[Margin, ...] = ()
    conflict: tuple[Relaxation, ...] = ()
    sensitivity: tuple[Variation, ...] = ()
    confidence: Confidence | None = None
    robust: tuple[Variation, ...] = ()
    savings: tuple[Saving, ...] = ()

    @property
    def chosen(self) -> Mapping[str, Candidate]:
        """Per class the plan that serves most of its requests."""
        return {name: mix[0][1] for name, mix in self.mixes.items() if mix}

    @property
    def replicas_opt(self) -> Mapping[str, int]:
        """Nodes to rent in each pool."""
        return self.deployment.replicas

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of the nodes, dollars an hour; None where a price is unknown."""
        return self.chosen_result.usd_per_hour

    @property
    def verdict(self) -> Verdict:
        """What the simulation of the chosen plan says of its promises, and whether that can be believed."""
        return self.chosen_result.verdict


def saving(plan: EvaluatedPlan, other: EvaluatedPlan) -> Saving:
    """What a plan saves against another, and how its pictures differ."""
    dollars, against = plan.usd_per_hour, other.usd_per_hour
    saved = None if dollars is None or against is None else against - dollars
    return Saving(
        other=other.name,
        holds=other.feasible,
        reason="" if other.feasible else other.reason,
        usd_per_hour=saved,
        share=saved / against if saved is not None and against else None,
        quality=None if plan.quality is None or other.quality is None else plan.quality - other.quality,
        unserved=(plan.unserved_share, other.unserved_share),
    )


def labels(mixes: Mixes) -> dict[str, str]:
    """The plans of each class, with their shares where there are several or some requests are turned away."""
    return {name: " + ".join(_labelled(share, option) for share, option in mix) for name, mix in mixes.items()}


def _labelled(share: float, option: Candidate) -> str:
    return option.plan.label if share > 1.0 - 1e-9 else f"{share:.0%} {option.plan.label}"


def _interval(figure: Estimate) -> Interval:
    return figure.value, figure.low, figure.high


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def same_figures(one: EvaluatedPlan, other: EvaluatedPlan) -> bool:
    """Whether two plans cost, take and look the same."""
    return all(abs(a - b) < 1e-9 for a, b in zip(_figures(one), _figures(other), strict=True))


def dominates(one: EvaluatedPlan, other: EvaluatedPlan) -> bool:
    """Whether one plan is nowhere worse than the other in dollars, latency and quality, and better somewhere."""
    mine, theirs = _figures(one), _figures(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _figures(point: EvaluatedPlan) -> tuple[float, ...]:
    """Rounded, so that means of the same numbers in another order are the same."""
    dollars = math.inf if point.usd_per_hour is None else point.usd_per_hour
    quality = -1.0 if point.quality is None else point.quality
    return tuple(round(figure, 9) for figure in (dollars, point.latency_p95_s[0], -quality))
