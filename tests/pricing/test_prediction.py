"""Laws of a prediction: images together, and a gang of GPUs against one of them over faster and slower links."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.estimate import interval, number
from hybridsd_sim.pricing import PredictionQuery, predict_plan
from hybridsd_sim.pricing.prediction import BANDWIDTH_STEP, predict_cost
from hybridsd_sim.reporting import prediction_text

ONE = PredictionQuery(model="sdxl", gpu="a100-sxm-80gb", runtime="cudagraph")
PAIR = replace(ONE, method="distrifusion", degree=2)
LINK = "nvlink3-switch"

gangs = st.sampled_from(
    [
        ("distrifusion", 2, 1024),
        ("distrifusion", 4, 1024),
        ("distrifusion", 8, 2048),
        ("pcpp", 4, 1024),
        ("asyncdiff", 2, 1024),
        ("asyncdiff", 4, 1024),
        ("cfg_parallel", 2, 1024),
    ]
)
bandwidths = st.floats(1e8, 1e13)


def at_bandwidth(profiles: Profiles, bytes_per_s: float) -> Profiles:
    """The profiles with the NVLink switch at another bandwidth."""
    link = profiles.interconnect(LINK)
    share = bytes_per_s / link.bandwidth_bytes_per_s
    keys = ("bandwidth_bytes_per_s", "bandwidth_low", "bandwidth_high")
    other = link.model_copy(update={key: getattr(link, key) * share for key in keys})
    return replace(profiles, interconnects={**profiles.interconnects, LINK: other})


# ---- Several GPUs against one ---------------------------------------------------------------------------------------


@given(gangs, bandwidths, bandwidths)
def test_a_faster_interconnect_takes_no_longer(
    profiles: Profiles, gang: tuple[str, int, int], one: float, other: float
) -> None:
    """Denoising falls with the interconnect's bandwidth, while as much is exchanged."""
    method, degree, px = gang
    ask = replace(ONE, method=method, degree=degree, height_px=px)
    slow, fast = (predict_cost(ask, at_bandwidth(profiles, b)) for b in sorted((one, other)))

    assert fast.denoise_s <= slow.denoise_s * (1 + 1e-9)
    assert fast.comm_bytes == slow.comm_bytes


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("method", ["distrifusion", "pcpp"])
def test_at_the_break_even_bandwidth_a_gang_is_as_fast_as_one_gpu(profiles: Profiles, method: str, degree: int) -> None:
    """There the speed-up is 1 to 1%; with twice the bandwidth the gang wins, with half of it one GPU does."""
    ask = replace(ONE, method=method, degree=degree)
    even = predict_plan(ask, profiles)["break_even_bandwidth_bytes_per_s"]
    half, same, twice = (predict_plan(ask, at_bandwidth(profiles, even * f))["speedup"] for f in (0.5, 1.0, 2.0))

    assert 1.0 <= same <= BANDWIDTH_STEP
    assert half < 1 < twice


@pytest.mark.parametrize("link", ["nvlink3-switch", "pcie3", "pcie4", "pcie5"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_gang_wins_above_its_break_even_bandwidth_and_loses_below(profiles: Profiles, link: str, degree: int) -> None:
    """The speed-up is above 1 exactly where the interconnect is faster than that, and the sentence says which."""
    figures = predict_plan(replace(ONE, method="distrifusion", degree=degree, interconnect=link), profiles)
    even, interval = figures["break_even_bandwidth_bytes_per_s"], figures["break_even_interval_bytes_per_s"]
    has = profiles.interconnect(link).bandwidth_bytes_per_s
    wins = figures["speedup"] >= 1

    assert wins == (has >= even / BANDWIDTH_STEP)
    assert interval[0] <= even <= interval[1]
    assert figures["speedup_interval"][0] <= figures["speedup"] <= figures["speedup_interval"][1]
    assert (
        f"On {link} distrifusion x{degree} is slower than one GPU; it pays from" in figures["against_one_gpu"]
    ) != wins


def test_the_speedup_compares_with_the_same_plan_on_one_gpu(profiles: Profiles) -> None:
    """It is the ratio of the two UNet loops, an own measurement of the step included."""
    for own in (None, 0.5):
        one, two = (replace(ask, measured_step_s=own) for ask in (ONE, PAIR))
        alone = predict_cost(one, profiles).denoise_s

        assert predict_plan(two, profiles)["speedup"] == pytest.approx(alone / predict_cost(two, profiles).denoise_s)


def test_a_handed_over_plan_compares_with_the_same_hand_over_from_one_gpu(profiles: Profiles) -> None:
    """The phone's steps stand on both sides, so that the speed-up is smaller and the break-even bandwidth the same."""
    alone = PredictionQuery(model="sd14", gpu="v100-sxm2-32gb", method="distrifusion", degree=4, height_px=1024)
    phone = {"small_model": "hybrid-sd-224m", "switch_step": 40, "edge_device": "snapdragon-8-elite"}
    handed = predict_plan(replace(alone, **phone), profiles)  # type: ignore[arg-type]
    whole = predict_plan(alone, profiles)

    assert (handed["speedup"] > 1) == (whole["speedup"] > 1)
    assert abs(handed["speedup"] - 1) < abs(whole["speedup"] - 1)


def test_one_gpu_has_nothing_to_compare(profiles: Profiles) -> None:
    """Every figure of the comparison is null, and the text does not mention it."""
    figures = predict_plan(ONE, profiles)
    compared = ("speedup", "speedup_interval", "break_even_bandwidth_bytes_per_s", "against_one_gpu")

    assert [figures[key] for key in compared] == [None] * len(compared)
    assert "one GPU" not in prediction_text(figures, 120)


def test_where_no_bandwidth_evens_them_the_sentence_says_who_wins(profiles: Profiles) -> None:
    """Guidance over two GPUs exchanges next to nothing and always pays; stripes of a launch-bound UNet never do."""
    always = predict_plan(replace(ONE, method="cfg_parallel", degree=2), profiles)
    never = predict_plan(PredictionQuery(model="sd15", gpu="a100-sxm-80gb", method="distrifusion", degree=8), profiles)

    assert always["speedup"] > 1 > never["speedup"]
    assert always["break_even_bandwidth_bytes_per_s"] is None
    assert never["break_even_bandwidth_bytes_per_s"] is None
    assert "would be the faster even at 1/1000 of the bandwidth" in always["against_one_gpu"]
    assert "no bandwidth would make it the faster" in never["against_one_gpu"]


def test_the_text_says_when_a_gang_pays_and_how_sure_each_part_is(profiles: Profiles) -> None:
    """The sentence stands in the text, and every part has its interval and its kind."""
    figures = predict_plan(replace(PAIR, interconnect="pcie3"), profiles)
    text = " ".join(prediction_text(figures, 400).split())

    assert figures["against_one_gpu"] in text
    for part in figures["parts"]:
        ends = interval(part["low_s"], part["high_s"]).replace("\N{EN DASH}", "-")
        assert f"{number(part['seconds'])} [{ends}]" in text
        assert part["kind"] in text


# ---- Images together ------------------------------------------------------------------------------------------------

UNTIMED = ("a10g", "l4")
"""GPUs whose batches were never timed together, so that one law gives all of them."""


@given(st.integers(1, 32), st.integers(1, 32), st.sampled_from(["sd15", "sdxl"]), st.sampled_from(UNTIMED))
def test_an_image_takes_no_longer_in_a_larger_batch(
    profiles: Profiles, one: int, other: int, model: str, gpu: str
) -> None:
    """More images together never take longer apiece under one law, nor less altogether."""
    ask = PredictionQuery(model=model, gpu=gpu, runtime="compiled", height_px=512, num_inference_steps=5)
    few, many = (predict_cost(replace(ask, num_images=n), profiles) for n in sorted((one, other)))

    assert many.latency_s / many.request.num_images <= few.latency_s / few.request.num_images * (1 + 1e-9)
    assert many.latency_s >= few.latency_s
    assert many.flops == pytest.approx(few.flops * many.request.num_images / few.request.num_images)


def test_batching_hardly_pays_for_sdxl(profiles: Profiles) -> None:
    """One SDXL image keeps a GPU busy: of eight together each still takes most of the time (DiffServe, Lambda)."""
    alone, eight = (predict_plan(replace(ONE, num_images=n), profiles) for n in (1, 8))

    assert 0.7 * alone["seconds_per_image"] < eight["seconds_per_image"] <= alone["seconds_per_image"]
    assert (alone["images"], eight["images"]) == (1, 8)
    assert eight["seconds_per_image"] == pytest.approx(eight["latency_s"] / 8)


def test_batches_are_bounded_by_memory(profiles: Profiles) -> None:
    """What fits one by one may not fit together, and the refusal names the device."""
    with pytest.raises(IllegalPlanError, match=r"--gpu: t4; needs .* GiB"):
        predict_cost(PredictionQuery(model="sdxl", gpu="t4", num_images=64), profiles)
    assert predict_cost(PredictionQuery(model="sdxl", gpu="t4"), profiles).latency_s > 0
