"""Live runs that were observed once, replayed: the simulator still agrees with them as nearly as was asked.

`tests/data/live` holds what `hybridsd-sim validate` wrote: the sound parts of the runs with the profile that
was known before each, and their replays.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from executors.validation import KINDS, LOADS
from executors.validation import recording as kept
from executors.validation.compare import compare, limits_at
from executors.validation.cost_rows import drift
from executors.validation.recording import TICK_S, replay
from hybridsd_sim.simulation import TIME_COLUMNS, column

DATA = Path(__file__).parents[2] / "data" / "live"
PARTS = kept.find(DATA / "runs")
RUNS = {run: list(parts) for run, parts in groupby(PARTS, key=lambda part: (part.kind, part.load))}
FEWEST = 2000
"""Requests of all runs together, at least."""


def test_the_kept_runs_are_sound():
    """Enough requests, all served, and in no part did steps drift beyond the limit."""
    assert set(RUNS) == {(kind, load) for kind in KINDS for load in LOADS}
    assert sum(len(part.late_s) for part in PARTS) >= FEWEST
    assert not [part.name for part in PARTS if part.void or part.drift_limit > 0.01]
    assert all(part.drift == drift(part.step_before_s, part.step_after_s) for part in PARTS)
    assert all(np.isfinite(part.times_s["finish_s"]).all() for part in PARTS)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "{}-{:g}".format(*run))
def test_the_simulation_agrees_with_the_live_run(run, catalogue, tmp_path):
    """p50, mean, p95 and throughput lie within the limits of the load, from the profiles known before its parts."""
    limits = limits_at(run[1])
    pairs = [(part.records(), replay(part, catalogue, tmp_path)) for part in RUNS[run]]
    found = compare(pairs, run[1], resamples=10)
    off = {name: found[name].off for name in limits}
    assert limits
    assert {name: share for name, share in off.items() if not abs(share) <= limits[name]} == {}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_replay_is_the_one_that_was_kept(part, catalogue, tmp_path):
    """Every time of every request is what it was when the validation was made: the simulator has not moved."""
    again = replay(part, catalogue, tmp_path).rows()
    before = kept.read_times(DATA / "replays" / f"{part.name}.parquet")
    for name in TIME_COLUMNS:
        np.testing.assert_allclose(column(again, name), before[name], rtol=0, atol=4 * TICK_S)
