"""Planners of small scenarios, and what several tests measure of capacity plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridsd_sim import Profiles, Scenario
from hybridsd_sim.planning import EvaluatedPlan
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.evaluation import Evaluation, EvaluationJob, evaluate
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.pricing import find_candidates

SHORT = {"horizon_s": 240, "warmup_s": 40, "replications": 2}
"""Enough requests for a p95 latency, few enough for many trials."""


SMALL = {"horizon_s": 240, "warmup_s": 30, "replications": 2, "search.replications_max": 2}
"""The same, with no more replications where a promise is undecided."""


@dataclass(slots=True)
class Trials:
    """Evaluates jobs one after the other and remembers them, call by call."""

    calls: list[Sequence[EvaluationJob]] = field(default_factory=list)

    def __call__(self, jobs: Sequence[EvaluationJob]) -> list[Evaluation]:
        self.calls.append(jobs)
        return [evaluate(job) for job in jobs]

    @property
    def jobs(self) -> list[EvaluationJob]:
        """The jobs of all calls."""
        return [job for jobs in self.calls for job in jobs]


def planner_of(
    scenario: Scenario,
    profiles: Profiles,
    trials: Callable[[Sequence[EvaluationJob]], list[Evaluation]] | None = None,
    **changes: Any,
) -> Planner:
    """A planner of the scenario with some dotted keys changed, that evaluates plans with `trials`."""
    changed = scenario.with_overrides(changes) if changes else scenario
    found = find_candidates(changed, profiles)
    return Planner(changed, profiles, found, Sizer(changed, profiles), trials or Trials())


def chosen_by(planner: Planner) -> EvaluatedPlan:
    """The plan that the search finds, as the recursion sees it."""
    found = planner.search("chosen").run()
    assert found is not None
    return EvaluatedPlan.from_evaluation("chosen", found.evaluations[0], found.mixes)


def hypervolume(points: list[EvaluatedPlan], worst: tuple[float, float, float]) -> float:
    """Volume of dollars, seconds and CLIP score between `worst` and the points, each figure as it is."""
    boxes = sorted(
        (p.usd_per_hour, p.latency_p95_s[0], p.quality)
        for p in points
        if p.usd_per_hour < worst[0] and p.latency_p95_s[0] < worst[1] and p.quality > worst[2]
    )
    volume = 0.0
    for index, (dollars, _, _) in enumerate(boxes):
        until = boxes[index + 1][0] if index + 1 < len(boxes) else worst[0]
        volume += (until - dollars) * _area([box[1:] for box in boxes[: index + 1]], worst[1], worst[2])
    return volume


def _area(boxes: list[tuple[float, float]], slowest_s: float, poorest: float) -> float:
    area, best = 0.0, poorest
    for seconds, quality in sorted(boxes):
        if quality > best:
            area, best = area + (slowest_s - seconds) * (quality - best), quality
    return area
