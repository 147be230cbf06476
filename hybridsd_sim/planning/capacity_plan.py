"""The answer of planning: a capacity plan and what surrounds it: savings, margins, relaxations, confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.analytic import Mixes
from hybridsd_sim.planning.evaluation import EvaluatedPlan
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulation import SimResult, Verdict


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
    `by_class` the same for each request class by itself. `level` says by what the draws were tested.
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
