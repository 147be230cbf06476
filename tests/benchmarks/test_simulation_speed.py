"""How fast the simulation is against bare SimPy, in the same run: `pytest tests/benchmarks`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import pytest
import simpy
from pytest_benchmark.fixture import BenchmarkFixture

from hybridsd_sim import Profiles, Scenario, SimResult, simulate
from hybridsd_sim.pricing import CandidateSet, find_candidates
from hybridsd_sim.scenario import load_scenario

LEAST_RATIO = 0.5
"""Requests a second that the simulation reaches at least, as a share of bare SimPy's."""


@pytest.fixture(scope="module")
def photo_app() -> Scenario:
    """The photo app, one replication of about 36,000 requests."""
    return load_scenario("photo-app", overrides={"replications": 1, "horizon_s": 3000.0, "warmup_s": 180.0})


@pytest.fixture(scope="module")
def options(photo_app: Scenario, profiles: Profiles) -> CandidateSet:
    """Its candidates, found once: the search space is not what is timed."""
    return find_candidates(photo_app, profiles)


def bare_requests_per_s(requests: int, timeouts: int) -> float:
    """Requests a second of a SimPy process per request that makes as many timeouts in all and decides nothing."""
    env = simpy.Environment()
    spare = timeouts - requests  # each arrival is a timeout of its own
    each, left_over = divmod(spare, requests)

    def request(count: int) -> Iterator[simpy.Event]:
        for _ in range(count):
            yield env.timeout(1.0)

    def arrivals() -> Iterator[simpy.Event]:
        for index in range(requests):
            env.process(request(each + (index < left_over)))
            yield env.timeout(0.1)

    env.process(arrivals())
    start = time.perf_counter()
    env.run()
    return requests / (time.perf_counter() - start)


@pytest.mark.parametrize("policy", ["static_switch", "cost_aware", "cloud_only"])
def test_simulation_is_at_least_half_as_fast_as_bare_simpy(
    benchmark: BenchmarkFixture, photo_app: Scenario, profiles: Profiles, options: CandidateSet, policy: str
) -> None:
    """With decisions, queues, records and metrics: at least `LEAST_RATIO` of a SimPy that only lets time pass."""
    ratios = []

    def both() -> SimResult:
        """The simulation and its reference one right after the other, so that a busy machine slows down both."""
        start = time.perf_counter()
        result = simulate(photo_app, profiles, policy=policy, options=options)
        assert len(result.summary)
        requests = len(result.replications[0])
        reached = requests / (time.perf_counter() - start)
        ratios.append(reached / bare_requests_per_s(requests, result.timeouts))
        benchmark.extra_info["requests_per_s"] = max(reached, benchmark.extra_info.get("requests_per_s", 0.0))
        return result

    benchmark.pedantic(both, rounds=7, warmup_rounds=1)
    benchmark.extra_info["ratio"] = median(ratios)

    assert median(ratios) >= LEAST_RATIO
