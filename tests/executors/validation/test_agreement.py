"""How a live run and its replay are compared: laws of the statistics, the limits, and the report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.validation import KINDS, validate
from executors.validation import recording as kept
from executors.validation.compare import block_length, compare, limits_at, resample_blocks
from executors.validation.recording import TICK_S
from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.simulation import column
from validation_runs import observed_of, run_of, slower

# ---- Comparison -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_run_agrees_with_itself(kind, known, tmp_path):
    """Compared with itself a run is off by nothing, in every figure and at both ends of every interval."""
    run = run_of(kind, known, tmp_path)
    found = compare([(run, run)], 0.6, resamples=100)
    assert found.holds
    assert found.requests == len(run) == 100
    for figure in found.figures:
        assert figure.live == figure.simulated
        assert figure.off == 0.0
        assert figure.name == "served_per_s" or figure.low == figure.high == 0.0


@pytest.mark.parametrize("factor", [0.9, 1.03, 1.2])
def test_a_simulation_that_is_slower_by_a_share_is_off_by_that_share(factor, known, tmp_path):
    """Latencies and waits on a slower clock are off by its share, throughput by the reverse; utilisation not at all."""
    run = run_of(KINDS["hybrid"], known, tmp_path)
    found = compare([(run, slower(run, factor))], 0.6, resamples=100)
    for name in ("latency_mean_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "wait_mean_s", "held_mean_s"):
        figure = found[name]
        assert [figure.off, figure.low, figure.high] == pytest.approx([factor - 1.0] * 3)
    assert found["served_per_s"].off == pytest.approx(1.0 / factor - 1.0)
    assert found["utilisation"].off == pytest.approx(0.0, abs=1e-12)
    assert found["slo_attainment"].off == 0.0


def test_the_parts_of_a_run_are_compared_as_one(known, tmp_path):
    """Figures are those of all requests together; spans add up, so that time between parts counts for nothing."""
    run = run_of(KINDS["hybrid"], known, tmp_path)
    once, twice = (compare([(run, slower(run, 1.1))] * parts, 0.6, resamples=10) for parts in (1, 2))
    assert twice.requests == 2 * once.requests
    for one, both in zip(once.figures, twice.figures, strict=True):
        assert (both.live, both.simulated) == pytest.approx((one.live, one.simulated), rel=1e-2), one.name
    mixed = compare([(run, run), (run, slower(run, 1.1))], 0.6, resamples=10)
    assert mixed["latency_mean_s"].off == pytest.approx(0.05)


@pytest.mark.parametrize(("share", "load", "holds"), [(0.04, 0.6, True), (0.07, 0.6, False), (0.07, 0.8, True)])
def test_the_verdict_is_that_of_the_limits(share, load, holds, known, tmp_path):
    """Four per cent is near enough at a load of 0.6, seven are not; at 0.8 seven are."""
    run = run_of(KINDS["cloud"], known, tmp_path)
    assert compare([(run, slower(run, 1.0 + share))], load, resamples=10).holds is holds


def test_limits_are_looser_at_higher_loads_and_nothing_is_asked_beyond_them():
    """p50, mean and throughput within 5% and p95 within 10% up to 0.6; 10% and 15% up to 0.8."""
    assert limits_at(0.3) == limits_at(0.6)
    assert (limits_at(0.6)["latency_mean_s"], limits_at(0.6)["latency_p95_s"]) == (0.05, 0.10)
    assert (limits_at(0.8)["latency_p50_s"], limits_at(0.8)["latency_p95_s"]) == (0.10, 0.15)
    assert limits_at(0.9) == {}


def test_intervals_hold_the_difference_and_narrow_with_requests(known, tmp_path):
    """Noise on one side widens the interval of the mean around it; four times the requests halve it, about."""
    run = run_of(KINDS["cloud"], known, tmp_path)
    noise = np.random.default_rng(0).normal(0.0, 0.03, 400)
    widths = []
    for count in (100, 400):
        frame = np.concatenate([run.rows()] * 4)[:count]
        other = frame.copy()
        column(other, "finish_s")[:] += noise[:count]
        figure = compare([(replace(run, table=frame), replace(run, table=other))], 0.6)["latency_mean_s"]
        assert figure.low < figure.off < figure.high
        widths.append(figure.high - figure.low)
    assert 1.4 < widths[0] / widths[1] < 2.9


def test_runs_that_are_not_of_the_same_served_requests_are_refused(known, tmp_path):
    """A request more, or one that was not served, makes two runs incomparable."""
    run = run_of(KINDS["cloud"], known, tmp_path)
    lost = run.rows().copy()
    column(lost, "status")[7] = 1.0
    for other in (replace(run, table=run.rows()[:-1]), replace(run, table=lost)):
        with pytest.raises(RunError):
            compare([(run, run), (run, other)], 0.6)


@given(st.integers(1, 400), st.data())
def test_requests_are_drawn_again_in_blocks_of_neighbours(count, data):
    """Every series has as many requests as the run, all of the run's own, and whole blocks of neighbours."""
    block = data.draw(st.integers(1, count))
    draws = resample_blocks(count, block, 3, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert draws.shape == (3, count)
    assert draws.min() >= 0
    assert draws.max() < count
    inside = np.arange(1, count) % block != 0
    assert (np.diff(draws, axis=1)[:, inside] == 1).all()


def test_blocks_are_as_long_as_latencies_are_correlated():
    """One request for independent latencies and constant ones; longer the longer the memory; an eighth at most."""
    rng = np.random.default_rng(3)
    white = rng.normal(size=2000)
    assert block_length(white) <= 2
    assert block_length(np.ones(500)) == 1
    lengths = []
    for memory in (0.5, 0.9, 0.97):
        series = [0.0]
        for shock in white:
            series.append(memory * series[-1] + shock)
        lengths.append(block_length(np.array(series)))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]
    assert block_length(np.arange(80.0)) == 10


# ---- Report ----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_compared(known, tmp_path):
    """A page with a verdict, every figure, and the two curves of each run; void parts are told of and not compared."""
    run = run_of(KINDS["cloud"], known, tmp_path)
    kept.save(observed_of(run, known, KINDS["cloud"]), tmp_path / "runs")
    kept.save(observed_of(run, known, KINDS["cloud"], part=2, drift=0.02), tmp_path / "runs")
    kept.save(observed_of(run_of(KINDS["edge"], known, tmp_path), known, KINDS["edge"], drift=0.02), tmp_path / "runs")
    row, lost = validate(tmp_path / "out", runs=tmp_path / "runs")
    assert (lost["run"], lost["requests"], lost["void_parts"], lost["holds"]) == ("edge-0.7", 0, 1, None)
    assert row["run"] == "cloud-0.7"
    assert row["holds"]
    assert (row["requests"], row["parts"], row["void_parts"]) == (100, 1, 1)
    text = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    assert "1 of 2 parts of them are void" in text
    assert "Nothing is told of edge-0.7" in text
    assert "cloud at load 0.7" in text
    drawn = (tmp_path / "out" / "report" / "figures" / "latency-cloud.svg").read_text(encoding="utf-8")
    assert "simulated" in drawn
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())[0]["requests"] == 100
    (path,) = (tmp_path / "out" / "replays").iterdir()
    assert path.name == "cloud-0.7-1.parquet"
    np.testing.assert_allclose(
        kept.read_times(path)["finish_s"], column(run.rows(), "finish_s"), atol=4 * TICK_S, rtol=0
    )


def test_runs_of_which_nothing_is_sound_are_reported_all_the_same(known, tmp_path):
    """The page says that nothing can be told, and no run is compared."""
    void = observed_of(run_of(KINDS["cloud"], known, tmp_path), known, KINDS["cloud"], drift=0.02)
    kept.save(void, tmp_path / "runs")
    (lost,) = validate(tmp_path / "out", runs=tmp_path / "runs")
    assert (lost["parts"], lost["latency_p50_s_off"]) == (0, None)
    assert "Nothing is told of cloud-0.7" in (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")


def test_a_folder_without_runs_is_refused(tmp_path):
    """There is nothing to compare, and nothing is observed."""
    with pytest.raises(InputError, match="--from"):
        validate(tmp_path / "out", runs=tmp_path)
