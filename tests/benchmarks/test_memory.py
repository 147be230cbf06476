"""How much memory a million requests take: `pytest tests/benchmarks`."""

from __future__ import annotations

import subprocess
import sys

MOST_BYTES = 500e6
SCRIPT = """
import resource
from hybridsd_sim import load_profiles, load_scenario, simulate
scenario = load_scenario("photo-app", overrides={"replications": 1, "horizon_s": 84000.0, "warmup_s": 180.0})
result = simulate(scenario, load_profiles(), policy="cost_aware")
result.summary, result.verdict
print(len(result.replications[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_million_requests_stay_under_half_a_gigabyte() -> None:
    """The peak of a whole process that simulates a million requests and draws up its metrics."""
    answer = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    requests, peak_bytes = map(float, answer.split())

    assert requests > 1_000_000
    assert peak_bytes < MOST_BYTES
