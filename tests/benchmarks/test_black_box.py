"""The frontier against black-box optimisers that have ten times as many simulations.

`python -m pytest tests/benchmarks/test_black_box.py -s` prints the table; it takes some minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import optuna
import pytest

from hybridsd_sim import Profiles
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.evaluation import EvaluatedPlan, Evaluation, EvaluationJob, dominates, evaluate, same_figures
from hybridsd_sim.planning.frontier import frontier
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.simulation import promises
from planners import hypervolume, planner_of

SCENARIOS = {
    "quickstart": {"horizon_s": 240, "warmup_s": 40, "replications": 2},
    "photo-app": {"horizon_s": 300, "warmup_s": 50, "replications": 2},
    "studio-2k": {"horizon_s": 3600, "warmup_s": 600, "replications": 2},
}
"""Shipped scenarios with horizons at which the recursion takes some ten milliseconds."""
SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "NSGA-II": lambda: optuna.samplers.NSGAIISampler(seed=1),
    "TPE": lambda: optuna.samplers.TPESampler(seed=1),
}
TIMES_AS_MANY, LEAST_TRIALS = 10, 200
"""Simulations of a black-box optimiser for each of ours, and at least."""
BEYOND = 0.1
"""Share of a figure's range by which the reference point is worse than the worst value of either side."""
HEADER = ("scenario", "sampler", "ours tried", "theirs tried", "volume ratio", "ours", "theirs", "theirs beaten")


@dataclass(frozen=True, slots=True)
class Ours:
    """A planner, the points of its frontier as the recursion sees them, and the evaluations that they took."""

    planner: Planner
    points: tuple[EvaluatedPlan, ...]
    evaluations: int


@pytest.fixture(scope="module")
def ours(profiles: Profiles) -> Callable[[str], Ours]:
    """By the name of a scenario: its frontier, drawn once."""

    @cache
    def draw(name: str) -> Ours:
        planner, tried = planner_of(load_scenario(name), profiles, **SCENARIOS[name]), []

        def counted(jobs: Sequence[EvaluationJob]) -> list[Evaluation]:
            tried.extend(jobs)
            return [evaluate(job) for job in jobs]

        planner.evaluate = counted
        found = planner.search("plan").run()
        points = frontier(planner, EvaluatedPlan.from_evaluation("plan", found.evaluations[0], found.mixes))
        count = len(tried)
        again = [screened(planner, point.deployment) for point in points]
        return Ours(planner, tuple(point for point in again if point.feasible), count)

    return draw


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[object, ...]]]:
    """Rows to be printed when all comparisons are done."""
    rows: list[tuple[object, ...]] = []
    yield rows
    for row in (HEADER, *rows):
        print("  ".join(f"{cell:>13.3f}" if isinstance(cell, float) else f"{cell!s:>13}" for cell in row))  # noqa: T201


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_black_box_optimiser_reaches_beyond_the_frontier(
    name: str, sampler: str, ours: Callable[[str], Ours], table: list[tuple[object, ...]]
) -> None:
    """With ten times the simulations it covers no more of cost, latency and quality, and beats no point."""
    mine = ours(name)
    trials = max(LEAST_TRIALS, TIMES_AS_MANY * mine.evaluations)
    theirs = black_box(mine.planner, SAMPLERS[sampler](), trials)
    worst = reference([*mine.points, *theirs])
    covered = volume(theirs, worst)
    ratio = volume(mine.points, worst) / covered if covered else math.inf
    beaten = sum(any(dominates(one, other) for one in mine.points) for other in theirs)
    table.append((name, sampler, mine.evaluations, trials, ratio, len(mine.points), len(theirs), beaten))

    assert ratio >= 1.0
    assert not [(figures(one), figures(other)) for one in theirs for other in mine.points if dominates(one, other)]


def black_box(planner: Planner, sampler: optuna.samplers.BaseSampler, trials: int) -> list[EvaluatedPlan]:
    """The points of an optimiser's front that keep every promise."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points: list[EvaluatedPlan] = []

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        deployment = suggested(trial, planner)
        evaluation = evaluate(EvaluationJob(planner.scenario, planner.profiles, deployment, "screen"))
        for promise in promises(planner.scenario, evaluation.classes):
            short = (promise.bound - promise.got.value) * (1.0 if promise.at_least else -1.0) / promise.bound
            broken = 1.0 if math.isnan(short) else max(short, 1e-9)
            trial.set_constraint(promise.subject, min(short, 0.0) if promise.kept else broken)
        points.append(EvaluatedPlan.from_evaluation("theirs", evaluation, {}))
        rent, p95_s, quality = figures(points[-1])
        return rent, planner.scenario.horizon_s if math.isnan(p95_s) else p95_s, quality

    study = optuna.create_study(directions=["minimize", "minimize", "maximize"], sampler=sampler)
    study.optimize(objective, n_trials=trials)
    kept: list[EvaluatedPlan] = []
    for point in points:  # what was tried twice counts once
        if point.feasible and not any(same_figures(point, other) for other in kept):
            kept.append(point)
    return [point for point in kept if not any(dominates(other, point) for other in kept)]


def suggested(trial: optuna.Trial, planner: Planner) -> Deployment:
    """A fleet and one plan for each class, by the optimiser's choices.

    Each trait of a plan is a choice of its own. Where no legal plan has them all, the one is taken that agrees in the
    first, then in the second, and so on: with five classes nearly every trial would be lost else.
    """
    plans = {}
    for name, options in planner.found.by_class.items():
        able = [(traits(option), option) for option in options if option.keeps_limits]
        wanted = {
            trait: trial.suggest_categorical(f"{name}: {trait}", sorted({mine[trait] for mine, _ in able}, key=str))
            for trait in able[0][0]
        }
        _, nearest = min(able, key=lambda pair: [pair[0][trait] != choice for trait, choice in wanted.items()])
        plans[name] = nearest.plan
    pools = planner.scenario.pools.items()
    return Deployment.pure({pool: trial.suggest_int(pool, 0, spec.replicas_max) for pool, spec in pools}, plans)


def traits(option: Candidate) -> Mapping[str, str | int]:
    """What tells the legal plans of one class apart, the weightiest first."""
    plan, none = option.plan, "none"
    cloud, edge = plan.cloud_stages, plan.edge_stages
    return {
        "pool": cloud[0].site.name if cloud else none,
        "method": f"{cloud[0].method} x{cloud[0].degree} {cloud[0].options}" if cloud else none,
        "cloud steps": option.cloud_steps,
        "small model": edge[-1].model if edge else none,
        "decoder": f"{plan.vae} on {plan.vae_site}" if not cloud or plan.vae_site != cloud[0].site.name else plan.vae,
    }


def screened(planner: Planner, deployment: Deployment | None) -> EvaluatedPlan:
    """A deployment's figures by the recursion, on the scenario's own requests."""
    assert deployment is not None
    return EvaluatedPlan.from_evaluation(
        "ours", evaluate(EvaluationJob(planner.scenario, planner.profiles, deployment, "screen")), {}
    )


def figures(point: EvaluatedPlan) -> tuple[float, float, float]:
    """Rent in dollars an hour, seconds that 95% of all requests keep, and mean CLIP score; unknown quality is 0."""
    assert point.usd_per_hour is not None
    return point.usd_per_hour, point.latency_p95_s[0], point.quality or 0.0


def volume(points: Sequence[EvaluatedPlan], worst: tuple[float, float, float]) -> float:
    """Volume between the points and `worst`; a plan of unknown quality counts as the worst and covers nothing."""
    return hypervolume([point for point in points if point.quality is not None], worst)


def reference(points: Sequence[EvaluatedPlan]) -> tuple[float, float, float]:
    """A point that is worse in everything than every plan whose quality is known."""
    known = [figures(point) for point in points if point.quality is not None]
    rents, latencies_s, qualities = zip(*known, strict=True)
    return (
        max(rents) + BEYOND * (max(rents) - min(rents)),
        max(latencies_s) + BEYOND * (max(latencies_s) - min(latencies_s)),
        min(qualities) - BEYOND * (max(qualities) - min(qualities)),
    )
