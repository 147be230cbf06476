"""How long a decision takes in a service that is running: `pytest tests/benchmarks/test_decision_speed.py -s`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from heapq import heappop, heappush
from statistics import median

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hybridsd_sim import Profiles, Scenario, Scheduler, load_scenario
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import find_candidates
from hybridsd_sim.scheduling import Decision, RequestDone

CANDIDATES = 20
"""Plans of a draft on the pool: one GPU, or DistriFusion and AsyncDiff on two, four and eight; and one at the edge."""
LIMITS_US = {64: (20.0, 80.0), 4096: (700.0, np.inf)}
"""Most microseconds of a decision by the number of workers: the median, and what one in a hundred may take."""
ROUNDS, SETTLING, DECISIONS = 15, 12_000, 1000
LOAD = 0.8
"""Share of the GPUs that requests keep busy."""


@pytest.fixture(scope="module")
def studio() -> Scenario:
    """The studio's drafts on one pool of eight-GPU nodes."""
    return load_scenario(
        "studio-2k",
        overrides={
            "requests.final": None, "pools.pcie": None, "search.methods": ["single", "distrifusion", "asyncdiff"],
            "search.options": {"asyncdiff": {"stride": [1, 2]}}, "pools.nvlink.replicas_max": 4096,
        },
    )  # fmt: skip


class Traffic:
    """A service under way: requests arrive and end, and their ends are told.

    Every other request has a deadline that only many GPUs keep, and sometimes none do: then every candidate is weighed.
    Each takes what was predicted, with noise.
    """

    def __init__(self, scheduler: Scheduler, workers: int) -> None:
        self.scheduler = scheduler
        self.requests = [replace(scheduler.requests["draft"], slo_s=slo_s) for slo_s in (5.0, 1.2)]
        self.gap_s = 1.0 / workers
        self.gpus = 8 * workers
        self.now = 0.0
        self.random = np.random.default_rng(workers)
        self.ends: list[tuple[float, int]] = []
        self.durations_s: list[float] = []

    def __call__(self, decisions: int) -> None:
        """So many arrivals, with everything that happens meanwhile."""
        noise = np.exp(0.03 * self.random.standard_normal(decisions)).tolist()
        for index, gap in enumerate(self.random.exponential(1.0, decisions).tolist()):
            self.now += gap * self.gap_s
            while self.ends and self.ends[0][0] <= self.now:
                at_s, number = heappop(self.ends)
                self.scheduler.observe(RequestDone(number, at_s))
            start = time.perf_counter()
            decision = self.scheduler.decide(self.requests[index % 2], None, self.now)
            self.durations_s.append(time.perf_counter() - start)
            self._serve(decision, noise[index])

    def _serve(self, decision: Decision, noise: float) -> None:
        assert decision.candidate is not None
        assert decision.reason in ("cost_aware", "late")
        stop_s = self.now + decision.predicted_wait_s + noise * decision.candidate.cloud_s
        heappush(self.ends, (stop_s, decision.number))
        self.gap_s = 0.999 * self.gap_s + 0.001 * decision.candidate.gpu_seconds / (LOAD * self.gpus)


@pytest.mark.parametrize("workers", LIMITS_US)
def test_decide(benchmark: BenchmarkFixture, studio: Scenario, profiles: Profiles, workers: int) -> None:
    """Steady traffic on all workers: the median round keeps the limits of the median and of one in a hundred."""
    found = find_candidates(studio, profiles).by_class["draft"]
    assert sum(option.pool_index == 0 for option in found) == CANDIDATES
    assert {option.degree for option in found} == {0, 1, 2, 4, 8}
    plan = Deployment.pure({"nvlink": workers}, {"draft": found[-1].plan})
    scheduler = Scheduler.from_plan(plan, scenario=studio, policy="cost_aware", profiles=profiles)
    traffic = Traffic(scheduler, workers)
    traffic(SETTLING)
    rounds = []

    def once() -> None:
        traffic.durations_s.clear()
        traffic(DECISIONS)
        rounds.append(np.percentile(traffic.durations_s, [50, 99]) * 1e6)

    benchmark.pedantic(once, rounds=ROUNDS)
    p50_us, p99_us = (median(figures) for figures in zip(*rounds, strict=True))
    benchmark.extra_info |= {"p50_us": p50_us, "p99_us": p99_us, "load_average": os.getloadavg()[0]}

    assert p50_us < LIMITS_US[workers][0], benchmark.extra_info
    assert p99_us < LIMITS_US[workers][1], benchmark.extra_info
