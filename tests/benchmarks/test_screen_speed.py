"""How fast the recursion is against the simulation of the same requests, in the same run: `pytest tests/benchmarks`."""

from __future__ import annotations

import time
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hybridsd_sim import Profiles, Scenario, simulate
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import find_candidates
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.simulation import Inputs, screen

LEAST_GAIN = 50.0
"""Seconds of the simulation over those of the recursion: ten milliseconds on a machine that simulates 100,000 a second
or two."""


@pytest.fixture(scope="module")
def photo_app() -> Scenario:
    """The photo app, one replication of about 100,000 requests."""
    return load_scenario("photo-app", overrides={"replications": 1, "horizon_s": 8400.0})


@pytest.fixture(scope="module")
def hybrid(photo_app: Scenario, profiles: Profiles) -> Deployment:
    """Every class in the cloud first and on its own phone then: every kind of work that the recursion does."""
    found = find_candidates(photo_app, profiles).by_class
    plans = {
        name: next(o.plan for o in options if o.cloud_steps and o.edge_steps and o.pool_index == 0)
        for name, options in found.items()
    }
    return Deployment.pure({"a100": 12}, plans)


def test_a_configuration_is_screened_in_milliseconds(
    benchmark: BenchmarkFixture, photo_app: Scenario, profiles: Profiles, hybrid: Deployment
) -> None:
    """100,000 requests with attainment and p95 latency by class: at least `LEAST_GAIN` times as fast as simulated."""
    inputs = Inputs.of(photo_app, profiles)
    start = time.perf_counter()
    result = simulate(photo_app, profiles, policy="planned", plan=hybrid)
    simulated_s = time.perf_counter() - start

    def screened() -> tuple[dict[str, float], dict[str, float]]:
        tried = screen(photo_app, profiles, hybrid, inputs=inputs)
        return tried.attainment, tried.latency_p95_s

    attainment, latency_s = benchmark.pedantic(screened, rounds=30, warmup_rounds=3)
    seconds = median(benchmark.stats.stats.data)
    everyone = result.summary.loc[("planned", "all")]
    benchmark.extra_info["requests"] = len(inputs.replications[0])
    benchmark.extra_info["milliseconds"] = round(1e3 * seconds, 2)
    benchmark.extra_info["ratio"] = round(simulated_s / seconds)

    assert (attainment["all"], latency_s["all"]) == (everyone["slo_attainment"], everyone["latency_p95_s"])
    assert simulated_s / seconds >= LEAST_GAIN
