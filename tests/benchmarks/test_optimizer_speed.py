"""How long planning takes on this machine: `pytest tests/benchmarks/test_optimizer_speed.py -s`."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from big_scenario import big_scenario
from hybridsd_sim import Profiles, load_scenario, optimize
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.evaluation import evaluate
from hybridsd_sim.planning.milp import Formulation, Goal, Solution
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.pricing import find_candidates

MOST_S = 30.0
"""Seconds for building and solving the program of the big scenario, and for planning the photo app."""
CLASSES = (20, 40, 50)
"""Request classes of the big scenario, over which growth is looked at."""
MOST_GROWTH = 1.5
"""Exponent of the seconds over the number of classes: 1 is linear, with room for what the solver makes of it."""


def solved(profiles: Profiles, classes: int) -> tuple[Solution | None, dict[str, float]]:
    """The cheapest plan of the big scenario by formula, and the seconds that each part of the way took."""
    times = [time.perf_counter()]
    scenario = big_scenario(classes)
    found = find_candidates(scenario, profiles)
    times.append(time.perf_counter())
    planner = Planner(scenario, profiles, found, Sizer(scenario, profiles), lambda jobs: [evaluate(j) for j in jobs])
    condition = planner.condition()
    times.append(time.perf_counter())
    formulation = Formulation([condition])
    times.append(time.perf_counter())
    answer = formulation.solve(Goal())
    times.append(time.perf_counter())
    parts = ("candidates", "condition", "formulation", "solve")
    return answer, dict(zip(parts, np.diff(times).round(2).tolist(), strict=True))


@pytest.fixture(scope="module")
def runs(profiles: Profiles) -> dict[int, tuple[Solution | None, dict[str, float]]]:
    """The big scenario with more and more classes."""
    return {classes: solved(profiles, classes) for classes in CLASSES}


def test_fifty_classes_are_priced_built_and_solved_in_half_a_minute(
    runs: dict[int, tuple[Solution | None, dict[str, float]]],
) -> None:
    """50 classes, 26 switch steps, 5 methods, 4 degrees, 6 pools: every class is served, by a solved program."""
    answer, parts = runs[50]

    assert answer is not None
    assert all(sum(share for share, _ in mix) == pytest.approx(1.0) for mix in answer.mixes.values())
    assert answer.bound >= 0.99 * answer.objective
    assert sum(parts.values()) < MOST_S, parts


def test_time_grows_about_linearly_with_the_classes(
    runs: dict[int, tuple[Solution | None, dict[str, float]]],
) -> None:
    """The slope of the logarithm of the seconds over that of the classes."""
    seconds = [sum(parts.values()) for _, parts in runs.values()]
    exponent = float(np.polyfit(np.log(CLASSES), np.log(seconds), 1)[0])
    print(f"\nseconds by classes {dict(zip(CLASSES, np.round(seconds, 1), strict=True))}, exponent {exponent:.2f}")  # noqa: T201

    assert exponent < MOST_GROWTH, runs


def test_the_photo_app_is_planned_in_half_a_minute(benchmark: BenchmarkFixture, profiles: Profiles) -> None:
    """Plan, baselines, frontier, margins and the rest, confirmed by simulation, in one process."""
    scenario = load_scenario("photo-app")

    plan = benchmark.pedantic(lambda: optimize(scenario, profiles), rounds=1)
    assert plan.feasible
    assert benchmark.stats.stats.max < MOST_S
