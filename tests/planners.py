"""Planners of small scenarios, and what several tests measure of capacity plans."""

from __future__ import annotations

from typing import Any

from hybridsd_sim import Profiles, Scenario
from hybridsd_sim.planning import EvaluatedPlan
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.evaluation import evaluate
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.pricing import find_candidates

SHORT = {"horizon_s": 240, "warmup_s": 40, "replications": 2}
"""Enough requests for a p95 latency, few enough for many trials."""


def planner_of(scenario: Scenario, profiles: Profiles, **changes: Any) -> Planner:
    """A planner of the scenario with some dotted keys changed, that tries plans one after the other."""
    changed = scenario.with_overrides(changes) if changes else scenario
    found = find_candidates(changed, profiles)
    return Planner(changed, profiles, found, Sizer(changed, profiles), lambda jobs: [evaluate(job) for job in jobs])


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
