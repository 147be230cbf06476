from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hybridsd_sim.workload import describe_trace, stream
from hybridsd_sim.workload.gentd26 import GenTD26Generator, popularity, stickiness

# Published by the trace; computed from lora_request_trace.csv of alibaba/clusterdata, cluster-trace-v2026-GenAI.
GENTD26 = {
    "requests": 26_823,
    "gap_mean_s": 74.17,
    "gap_median_s": 15.0,
    "gap_cv": 12.0,
    "gap_cv_short": 3.574,
    "long_gaps": 66,
    "peak_hour_requests": 436,
    "peak_to_mean_busy_hour": 6.014,
}
GENTD26_SPAN_S = 1_989_367.0


@pytest.fixture(scope="module")
def realisations():
    """A dozen descriptions of what the generator makes of the trace's 23 days."""
    return [GenTD26Generator().trace(partial(stream, 26, number), GENTD26_SPAN_S).summary() for number in range(12)]


@pytest.mark.parametrize("figure", GENTD26)
def test_the_published_rhythm_is_one_the_generator_makes(realisations, figure):
    """Each published figure of the 23 days lies within 2.5 standard deviations of the generator's realisations."""
    values = np.array([getattr(summary, figure) for summary in realisations])
    assert abs(values.mean() - GENTD26[figure]) < 2.5 * values.std(ddof=1)
    assert values.mean() == pytest.approx(GENTD26[figure], rel=0.2)


def test_the_mix_is_the_published_one(realisations):
    """Steps, images, LoRA and base models have the published shares, within sampling error."""
    mean = {
        "steps 30": np.mean([s.num_inference_steps["30"] for s in realisations]),
        "steps 40": np.mean([s.num_inference_steps["40"] for s in realisations]),
        **{f"images {n}": np.mean([s.num_images[str(n)] for s in realisations]) for n in (1, 4, 8, 2)},
        "lora": np.mean([s.lora_share for s in realisations]),
        **{f"top {n}": np.mean([s.base_model_top_share[str(n)] for s in realisations]) for n in (1, 5, 10)},
        "switch": np.mean([s.base_model_switch_share for s in realisations]),
    }
    published = [0.906, 0.051, 0.58, 0.19, 0.15, 0.08, 0.17, 0.307, 0.705, 0.867, 0.75]
    assert list(mean.values()) == pytest.approx(published, abs=0.004)
    assert all(80 <= summary.base_models <= 86 for summary in realisations)


def test_popularity_falls_with_rank():
    """86 shares that sum to one, never rise, and reach the published 30.7, 70.5 and 86.7%."""
    shares = popularity()
    assert len(shares) == 86
    assert np.cumsum(shares)[[0, 4, 9, 85]] == pytest.approx([0.307, 0.705, 0.867, 1.0])
    assert (np.diff(shares) < 0).all()


def test_requests_stick_to_a_model():
    """Independent draws would change the model in more than the published 75%: a request sometimes repeats the last."""
    independent = 1.0 - float((popularity() ** 2).sum())
    assert independent > 0.75
    assert (1.0 - stickiness()) * independent == pytest.approx(0.75)


def test_an_empty_stretch_is_no_trace():
    """A span before the first request has no trace to give."""
    with pytest.raises(ValueError, match="no request arrives"):
        GenTD26Generator().trace(partial(stream, 1, 0), 1e-6)


@pytest.mark.skipif("HYBRIDSD_TRACES" not in os.environ, reason="HYBRIDSD_TRACES does not name a folder of real traces")
def test_the_real_trace_says_what_was_published():
    """Reading the real file gives the published statistics."""
    path = next(Path(os.environ["HYBRIDSD_TRACES"]).glob("*gentd26_requests.csv"))
    summary = describe_trace(path)
    for figure, value in GENTD26.items():
        assert getattr(summary, figure) == pytest.approx(value, rel=0.001)
    assert summary.start == "2024-11-15 16:57:50"
    assert summary.num_inference_steps["30"] == pytest.approx(0.906, abs=0.0015)
    assert summary.num_inference_steps["40"] == pytest.approx(0.051, abs=0.0005)
    assert [round(summary.num_images[n], 2) for n in ("1", "4", "8", "2")] == [0.58, 0.19, 0.15, 0.08]
    assert summary.lora_share == pytest.approx(0.17, abs=0.005)
    assert (summary.base_models, summary.users) == (86, 4247)
    assert list(summary.base_model_top_share.values()) == pytest.approx([0.307, 0.705, 0.867], abs=0.0005)
    assert summary.base_model_switch_share == pytest.approx(0.75, abs=0.005)
    assert summary.status["SUCCEED"] == pytest.approx(0.984, abs=0.0005)
    assert summary.request_type["TXT_2_IMG"] == pytest.approx(0.911, abs=0.0005)
    expected = {"mean": 28.7, "p50": 23, "p90": 53, "p95": 69, "p99": 106, "max": 567}
    assert summary.execution_s == pytest.approx(expected, abs=0.05)
