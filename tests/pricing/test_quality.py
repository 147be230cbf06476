"""What pictures are worth: published scores come back, losses are monotone, the unknown stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CLOUD, REQUEST, hybrid
from hybridsd_sim import Plan, Profiles, Stage
from hybridsd_sim.estimate import Estimate, Kind
from hybridsd_sim.perf import denoising, find_method
from hybridsd_sim.pricing import PredictionQuery
from hybridsd_sim.pricing.prediction import predict_cost, to_json
from hybridsd_sim.pricing.quality import (
    MEASURE_NAMES,
    Measure,
    Quality,
    loss_of,
    method_loss,
    quality_of,
    switch_curve,
    switch_loss,
    with_interval,
)
from hybridsd_sim.profiles import QualityRow

PAIRS = [("sd14", "bk-sdm-tiny"), ("sd14", "bk-sdm-small"), ("sd14", "hybrid-sd-224m"), ("sdxl", "koala-700m")]
MEASURES = st.sampled_from(list(MEASURE_NAMES))
MODELS = st.sampled_from(["sd14", "sd15", "sd21", "sdxl", "ssd-1b", "bk-sdm-small"])


def on_gpus(
    method: str, degree: int, *, model: str = "sd15", steps: int = 50, stop: int = 0, **options: object
) -> Stage:
    """A stage of the cloud that does the first `stop` steps, by default all of them."""
    how = tuple(sorted(options.items()))
    return Stage(start=0, stop=stop or steps, model=model, site=CLOUD, method=method, degree=degree, options=how)  # type: ignore[arg-type]


def cloud_only(stage: Stage) -> Plan:
    """A plan of one stage."""
    return Plan(stages=(stage,), text_encode_site="cloud", vae_site="cloud")


def lost(stage: Stage, profiles: Profiles, measure: Measure = "clip", *, steps: int = 50) -> float:
    """The loss of a stage's method, which is known."""
    found = method_loss(stage, steps, profiles, measure).estimate
    assert found.known
    return found.value


def scores(quality: Quality) -> dict[str, float | None]:
    """The scores of a plan by measure."""
    return {measure: getattr(quality, measure).value_or_none for measure in MEASURE_NAMES}


@st.composite
def settings(draw: st.DrawFn) -> dict[str, object]:
    """A method with published losses, its stride and a number of GPUs at which some model was published."""
    if draw(st.booleans()):
        return {"method": "distrifusion", "degree": draw(st.integers(2, 8))}
    stride = draw(st.integers(1, 2))
    return {"method": "asyncdiff", "stride": stride, "degree": draw(st.integers(stride + 1, 4))}


# ---- Hand-over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "clip", "fid"),
    [(25, 0.2993, 12.22), (10, 0.2887, 13.75), (5, 0.2734, 15.39), (0, 0.2611, 16.71)],
)
def test_published_switch_steps_give_their_published_score(profiles: Profiles, k: int, clip: float, fid: float) -> None:
    """SD 1.4 with the 224M model (Hybrid SD, table H1); the ends are the models alone."""
    quality = quality_of(hybrid(k), profiles)

    assert quality.clip.value == pytest.approx(clip)
    assert quality.fid.value == pytest.approx(fid)
    assert quality.clip.kind == quality.fid.kind == "quoted"


@pytest.mark.parametrize(("k", "fid"), [(25, 12.22), (20, 12.84), (15, 13.55), (10, 14.59), (5, 15.92), (0, 16.85)])
def test_the_longest_table_tells_the_fid_of_a_pair(profiles: Profiles, k: int, fid: float) -> None:
    """SD 1.4 with BK-SDM tiny has six FIDs in Hybrid SD's table H3 and four in ObCLIP's, printed as precisely."""
    quality = quality_of(hybrid(k, small="bk-sdm-tiny"), profiles, wanted="sd14")

    assert quality.fid.value == pytest.approx(fid)
    assert quality.fid.kind == "quoted"


@pytest.mark.parametrize(("k", "lost_clip"), [(10, 0.0079), (5, 0.0203), (0, 0.0334)])
def test_the_most_precise_table_tells_the_clip_of_a_pair(profiles: Profiles, k: int, lost_clip: float) -> None:
    """SD 1.4 with BK-SDM tiny has CLIP to four decimals in ObCLIP's tables 3 and 5, to two in Hybrid SD's H3."""
    quality = quality_of(hybrid(k, small="bk-sdm-tiny"), profiles, wanted="sd14")

    assert quality.clip.value == pytest.approx(0.2993 - lost_clip)


@given(st.sampled_from(PAIRS), st.sampled_from(["clip", "fid"]), st.integers(1, 60), st.data())
def test_a_later_switch_never_loses_more(
    profiles: Profiles, pair: tuple[str, str], measure: Measure, steps: int, data: st.DataObject
) -> None:
    """For every pair and number of steps the loss falls with the switch step, inside what was published."""
    k = data.draw(st.integers(0, steps - 1))
    earlier, later = (switch_loss(profiles, *pair, step / steps, measure).estimate.value for step in (k, k + 1))

    assert 0.0 <= later <= earlier <= max(loss for _, loss, _ in switch_curve(profiles, *pair, measure))


@given(st.integers(0, 24))
def test_more_cloud_steps_never_lose_quality(profiles: Profiles, k: int) -> None:
    """Between published points scores are interpolated; CLIP rises with the switch step, FID falls."""
    earlier, later = (quality_of(hybrid(step), profiles) for step in (k, k + 1))

    assert earlier.clip.value <= later.clip.value + 1e-12
    assert earlier.fid.value >= later.fid.value - 1e-12


@given(st.lists(st.floats(0.2, 0.3, allow_nan=False).map(lambda score: round(score, 4)), min_size=4, max_size=4))
def test_noisy_tables_are_made_monotone_upwards(profiles: Profiles, printed: list[float]) -> None:
    """Whatever a table prints, the loss falls with the switch step and is never less than a printed one.

    It is called quoted only where it is the printed one.
    """
    base = next(row for row in profiles.quality if row.table == "hybrid-sd H1" and row.large_model == "sd14")
    steps = (0, 5, 10, 20)
    rows = [
        base.model_copy(update={"table": "noise", "small_model": "bk-sdm-base", "switch_step": k, "clip": score})
        for k, score in zip(steps, printed, strict=True)
    ]
    noisy = replace(profiles, quality=(base.model_copy(update={"table": "noise", "clip": 0.25}), *rows))
    losses = [switch_loss(noisy, "sd14", "bk-sdm-base", k / 25, "clip").estimate for k in steps]
    values = [loss.value for loss in losses]

    assert values == sorted(values, reverse=True)
    for loss, value, score in zip(losses, values, printed, strict=True):
        assert value >= max(0.0, 0.25 - score) - 1e-9
        assert (loss.kind == "quoted") == (abs(value - (0.25 - score)) < 1e-9)


def test_between_published_points_the_label_says_modelled(profiles: Profiles) -> None:
    """Nobody published k = 7."""
    quality = quality_of(hybrid(7), profiles)

    assert quality.clip.kind == quality.fid.kind == "modelled"
    assert "interpolated" in quality.clip.note


@pytest.mark.parametrize(("large", "small"), PAIRS)
@pytest.mark.parametrize("measure", ["clip", "fid"])
def test_every_published_pair_has_its_curve(profiles: Profiles, large: str, small: str, measure: Measure) -> None:
    """At least two published switch steps and both ends, all of one study, losses falling to zero at cloud-only."""
    losses = [loss for _, loss, _ in switch_curve(profiles, large, small, measure)]

    assert len(losses) >= 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_a_pair_without_a_study_has_no_score(profiles: Profiles) -> None:
    """SDXL handed over to Segmind Vega was never published: None, with the reason."""
    stages = (
        Stage(start=0, stop=10, model="sdxl", site=CLOUD),
        Stage(start=10, stop=25, model="segmind-vega", site=replace(CLOUD, name="other")),
    )
    quality = quality_of(Plan(stages=stages, text_encode_site="cloud", vae_site="other"), profiles)

    assert scores(quality) == {"clip": None, "fid": None, "lpips": None}
    assert "segmind-vega" in quality.clip.note
    assert "segmind-vega" in quality.fid.note


# ---- Parallel methods -----------------------------------------------------------------------------------------------


def method_rows(profiles: Profiles) -> list[tuple[QualityRow, Measure, float]]:
    """Every loss that a table prints for a method with its number of synchronous steps."""
    return [
        (row, measure, loss)
        for row in profiles.quality
        if row.method in ("asyncdiff", "distrifusion") and row.warmup_steps is not None
        for measure in MEASURE_NAMES
        if (loss := loss_of(row, profiles.quality, measure)) is not None
    ]


def contradicts(row: QualityRow, measure: Measure, loss: float, profiles: Profiles) -> bool:
    """Whether a printed loss breaks a law: better than one or fewer GPUs, or worse than fewer synchronous steps."""
    alike = [
        (other, theirs)
        for other, kind, theirs in method_rows(profiles)
        if (other.large_model, other.method, other.options, other.num_inference_steps, kind)
        == (row.large_model, row.method, row.options, row.num_inference_steps, measure)
    ]
    return loss < 0 or any(
        (other.degree < row.degree and theirs > loss and other.warmup_steps == row.warmup_steps)
        or (other.degree == row.degree and (other.warmup_steps or 0) < (row.warmup_steps or 0) and theirs < loss)
        for other, theirs in alike
    )


def test_published_configurations_give_their_published_loss(profiles: Profiles) -> None:
    """AsyncDiff's tables 1 and 2 and DistriFusion's table 1, each row quoted unless it breaks a law by its noise.

    A row that does is modelled: by a loss no better than that of one GPU, by the larger loss of fewer GPUs, or by no
    more than that of fewer synchronous steps.
    """
    told = 0
    for row, measure, loss in method_rows(profiles):
        options = dict(item.split("=") for item in row.options.split(";") if item)
        typed = {key: int(value) for key, value in options.items()} | {"warmup_steps": row.warmup_steps}
        stage = on_gpus(row.method, row.degree, model=row.large_model, steps=row.num_inference_steps, **typed)
        found = method_loss(stage, row.num_inference_steps, profiles, measure).estimate
        if contradicts(row, measure, loss, profiles):
            assert found.kind == "modelled"
        else:
            assert (found.value, found.kind) == (pytest.approx(loss, abs=1e-9), "quoted")
            assert [text.split(" table")[0] for text in found.sources] == [row.source.split(" table")[0]]
            told += 1
    assert told > 70


@pytest.mark.parametrize(
    ("model", "degree", "stride", "clip"),
    [
        ("sd21", 2, 1, 0.3159), ("sd21", 3, 1, 0.3156), ("sd21", 4, 1, 0.3140), ("sd21", 3, 2, 0.3143),
        ("sd21", 4, 2, 0.3122), ("sd15", 2, 1, 0.3062), ("sd15", 3, 1, 0.3058), ("sd15", 4, 1, 0.3052),
        ("sd15", 3, 2, 0.3046), ("sd15", 4, 2, 0.3017),
    ],
)  # fmt: skip
def test_asyncdiff_by_default_gives_the_score_of_its_paper(
    profiles: Profiles, model: str, degree: int, stride: int, clip: float
) -> None:
    """CLIP of AsyncDiff, table 1, at 50 steps without a word on the warm-up."""
    quality = quality_of(cloud_only(on_gpus("asyncdiff", degree, model=model, stride=stride)), profiles)

    assert (quality.clip.value, quality.clip.kind) == (pytest.approx(clip), "quoted")


@given(MODELS, settings())
def test_without_a_word_the_warmup_is_the_methods_own(
    profiles: Profiles, model: str, setting: dict[str, object]
) -> None:
    """Leaving `warmup_steps` out loses what the method's default loses."""
    stage = on_gpus(**setting, model=model)  # type: ignore[arg-type]
    job = denoising(stage, replace(REQUEST, model=model), profiles)
    default = find_method(stage.method).settings(job, {})["warmup_steps"]
    said = on_gpus(**setting, model=model, warmup_steps=default)  # type: ignore[arg-type]

    assert method_loss(said, 50, profiles, "clip") == method_loss(stage, 50, profiles, "clip")


@given(MODELS, settings(), MEASURES, st.integers(20, 100), st.data())
def test_more_synchronous_steps_never_lose_more(
    profiles: Profiles, model: str, setting: dict[str, object], measure: Measure, steps: int, data: st.DataObject
) -> None:
    """From one synchronous step to all of them, where nothing is lost."""
    warmup = data.draw(st.integers(1, steps - 1))
    fewer, more, every = (
        lost(on_gpus(**setting, model=model, steps=steps, warmup_steps=w), profiles, measure, steps=steps)  # type: ignore[arg-type]
        for w in (warmup, warmup + 1, steps)
    )

    assert fewer >= more >= every == 0.0


@given(MODELS, settings(), MEASURES, st.integers(20, 100), st.integers(1, 30))
def test_more_gpus_never_lose_less(
    profiles: Profiles, model: str, setting: dict[str, object], measure: Measure, steps: int, warmup: int
) -> None:
    """At the same stride and warm-up; published degrees and those between them."""
    common = {**setting, "model": model, "steps": steps, "warmup_steps": warmup}
    more = method_loss(on_gpus(**{**common, "degree": setting["degree"] + 1}), steps, profiles, measure).estimate  # type: ignore[operator,arg-type]

    assert not more.known or lost(on_gpus(**common), profiles, measure, steps=steps) <= more.value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "degree", "options"),
    [
        ("single", 1, {}),
        ("cfg_parallel", 2, {}),
        ("asyncdiff", 1, {}),
        ("distrifusion", 1, {}),
        ("pcpp", 1, {}),
        ("distrifusion", 8, {"sync_mode": "full_sync"}),
        ("pcpp", 4, {"sync_mode": "full_sync"}),
        ("distrifusion", 2, {"guidance_split": True}),
        ("pcpp", 2, {"guidance_split": True}),
        ("pcpp", 4, {"warmup_steps": 50}),
    ],
)
def test_what_computes_the_same_loses_nothing(
    profiles: Profiles, method: str, degree: int, options: dict[str, object]
) -> None:
    """One GPU, guidance parallelism, one stripe a branch, or every step synchronous: the scores are one GPU's."""
    plans = [cloud_only(on_gpus(method, degree, **options)), cloud_only(on_gpus("single", 1))]
    parallel, one = (quality_of(plan, profiles) for plan in plans)

    assert scores(parallel) == scores(one)
    assert [getattr(parallel, m).sources for m in MEASURE_NAMES] == [getattr(one, m).sources for m in MEASURE_NAMES]
    assert [getattr(parallel, m).kind for m in MEASURE_NAMES] == [getattr(one, m).kind for m in MEASURE_NAMES]
    assert [getattr(parallel, m).note for m in MEASURE_NAMES] == [getattr(one, m).note for m in MEASURE_NAMES]
    assert parallel.lpips.value == 0.0


def test_asyncdiffs_table_of_matched_speedups_is_foreseen(profiles: Profiles) -> None:
    """Table 3 prints no warm-up and is not read; at 9 synchronous steps, which table 2 gives its third row, it holds.

    Its CLIP to 0.0003 and its LPIPS to 0.04 on configurations whose warm-up nobody varied; its FID is no worse.
    """
    for degree, stride, clip, fid, lpips in (
        (2, 1, 0.3159, 27.79, 0.0944), (3, 2, 0.3149, 27.71, 0.2117), (4, 2, 0.3140, 28.03, 0.1940),
    ):  # fmt: skip
        stage = on_gpus("asyncdiff", degree, model="sd21", stride=stride, warmup_steps=9)
        assert lost(stage, profiles) == pytest.approx(0.3160 - clip, abs=3e-4)
        assert lost(stage, profiles, "lpips") == pytest.approx(lpips, abs=0.04)
        assert lost(stage, profiles, "fid") >= fid - 27.87


@given(st.sampled_from(["sd21", "sdxl"]), st.integers(3, 49), st.sampled_from([(2, 1), (3, 1), (4, 1), (3, 2)]))
def test_every_configuration_gains_by_warmup_what_the_published_one_did(
    profiles: Profiles, model: str, warmup: int, configuration: tuple[int, int]
) -> None:
    """The share of the loss that is left is that of three components at stride 2, and labelled modelled."""
    degree, stride = configuration
    default, warmed = (
        on_gpus("asyncdiff", degree, model=model, stride=stride, **how) for how in ({}, {"warmup_steps": warmup})
    )  # type: ignore[arg-type]
    ours, theirs = (on_gpus("asyncdiff", 4, model=model, stride=2, **how) for how in ({"warmup_steps": warmup}, {}))  # type: ignore[arg-type]

    share = lost(ours, profiles) / lost(theirs, profiles)
    assert lost(warmed, profiles) == pytest.approx(share * lost(default, profiles), abs=2e-6)
    assert share == 1.0 or method_loss(warmed, 50, profiles, "clip").estimate.kind == "modelled"


def test_fewer_synchronous_steps_than_published_are_marked(profiles: Profiles) -> None:
    """SDXL was published from 3 synchronous steps on: one loses at least as much, and says so."""
    found = method_loss(on_gpus("asyncdiff", 4, model="sdxl", stride=2, warmup_steps=1), 50, profiles, "clip").estimate

    assert (found.value, found.kind) == (pytest.approx(0.0093), "modelled")
    assert "may lose more" in found.note


@pytest.mark.parametrize(
    ("degree", "steps", "fid", "lpips", "kind"),
    [
        (2, 50, 0.2, 0.146, "quoted"),
        (4, 50, 0.2, 0.183, "quoted"),
        (6, 50, 0.4, 0.211, "modelled"),
        (8, 50, 0.4, 0.211, "quoted"),
        (8, 25, 0.7, 0.161, "quoted"),
        (8, 40, 0.4, 0.211, "modelled"),
    ],
)
def test_distrifusion_loses_what_its_paper_says(
    profiles: Profiles, degree: int, steps: int, fid: float, lpips: float, kind: str
) -> None:
    """SDXL, DistriFusion table 1; between published degrees the next larger counts, else the nearest step count."""
    stage = on_gpus("distrifusion", degree, model="sdxl", steps=steps)
    losses = [method_loss(stage, steps, profiles, measure).estimate for measure in ("fid", "lpips")]

    assert [loss.value for loss in losses] == [pytest.approx(fid), pytest.approx(lpips)]
    assert {loss.kind for loss in losses} == {kind}


@pytest.mark.parametrize(("degree", "clip"), [(2, 0.3159), (4, 0.3143), (8, 0.3131)])
def test_distrifusions_clip_is_known_for_sd21(profiles: Profiles, degree: int, clip: float) -> None:
    """AsyncDiff's table 3 scored it on SD 2.1; other models take its loss, marked as modelled."""
    own, other = (quality_of(cloud_only(on_gpus("distrifusion", degree, model=m)), profiles) for m in ("sd21", "sdxl"))

    assert (own.clip.value, own.clip.kind) == (pytest.approx(clip), "quoted")
    assert other.clip.value == pytest.approx(0.3464 - (0.3160 - clip))
    assert other.clip.kind == "modelled"
    assert "other models" in other.clip.note


@pytest.mark.parametrize(
    ("method", "degree", "options", "reason"),
    [
        ("pcpp", 2, {}, "pcpp"),
        ("pcpp", 4, {"partial": 1.0}, "pcpp"),
        ("distrifusion", 16, {}, "16 GPUs"),
        ("asyncdiff", 5, {"stride": 2}, "5 GPUs"),
        ("distrifusion", 4, {"sync_mode": "no_sync"}, "no_sync"),
        ("distrifusion", 4, {"sync_mode": "stale_gn"}, "stale_gn"),
    ],
)
def test_an_unmeasured_setting_has_no_score(
    profiles: Profiles, method: str, degree: int, options: dict[str, object], reason: str
) -> None:
    """Nobody published these, so they have no score at all, never a loss of 0; they meet no floor."""
    quality = quality_of(cloud_only(on_gpus(method, degree, **options)), profiles)

    assert scores(quality) == {"clip": None, "fid": None, "lpips": None}
    assert all(reason in note for note in (quality.clip.note, quality.fid.note, quality.lpips.note))


@pytest.mark.parametrize("degree", [2, 4])
def test_pcpp_that_sees_the_whole_image_is_distrifusion(profiles: Profiles, degree: int) -> None:
    """On two stripes with all of the neighbour, attention sees the same stale image; the label is modelled."""
    options = {"guidance_split": degree == 4}
    pcpp = method_loss(on_gpus("pcpp", degree, model="sdxl", partial=1.0, **options), 50, profiles, "fid").estimate
    distrifusion = method_loss(on_gpus("distrifusion", degree, model="sdxl", **options), 50, profiles, "fid").estimate

    assert pcpp.value == distrifusion.value
    assert pcpp.kind == "modelled"
    assert "counted as distrifusion" in pcpp.note


@given(st.sampled_from([2, 4, 6, 8]), st.integers(1, 49))
def test_guidance_split_loses_no_more(profiles: Profiles, degree: int, warmup: int) -> None:
    """Fewer stripes on as many GPUs: never counted as worse, and never quoted, as it was not published."""
    split, plain = (
        method_loss(
            on_gpus("distrifusion", degree, model="sdxl", warmup_steps=warmup, guidance_split=how), 50, profiles, "fid"
        ).estimate
        for how in (True, False)
    )

    assert split.value <= plain.value
    assert split.value == 0.0 or split.kind == "modelled"


# ---- Both, and what was published otherwise -------------------------------------------------------------------------


@given(st.integers(1, 25), settings(), st.integers(1, 25))
def test_losses_add_up(profiles: Profiles, k: int, setting: dict[str, object], warmup: int) -> None:
    """A hand-over after a parallel method is never better than either alone, in CLIP and in FID.

    Where both lose something the result is modelled.
    """
    how = {"method": setting["method"], "degree": setting["degree"]}
    given_options = {key: value for key, value in setting.items() if key not in how} | {"warmup_steps": warmup}
    how["options"] = tuple(sorted(given_options.items()))
    both, handed = quality_of(hybrid(k, **how), profiles), quality_of(hybrid(k), profiles)
    assert both.clip.value <= handed.clip.value
    assert both.fid.value >= handed.fid.value
    if warmup < k < 25:
        spread = quality_of(hybrid(25, **how), profiles)
        assert both.clip.value <= spread.clip.value
        assert both.fid.value >= spread.fid.value
        assert both.clip.kind == "modelled"


@given(MODELS, st.sampled_from([*MEASURE_NAMES]), settings(), st.integers(1, 60), st.integers(1, 60))
def test_the_unknown_is_none_with_a_reason(
    profiles: Profiles, model: str, measure: Measure, setting: dict[str, object], steps: int, warmup: int
) -> None:
    """Of any plan each score is either a number with its kind and sources, or None with the reason."""
    stage = on_gpus(**setting, model=model, steps=steps, warmup_steps=warmup)  # type: ignore[arg-type]
    quality = quality_of(cloud_only(stage), profiles, size=(768, 768), sampler="euler")
    score: Estimate = getattr(quality, measure)

    assert score.known or score.note
    assert measure == "lpips" or not score.known or score.value > 0


def test_a_model_that_nobody_scored_has_no_score(profiles: Profiles) -> None:
    """BK-SDM base stands in no table; what it would lose by a method does not help."""
    quality = quality_of(cloud_only(on_gpus("single", 1, model="bk-sdm-base")), profiles)

    assert (quality.clip.known, quality.fid.known) == (False, False)
    assert quality.clip.note == "no published CLIP score for bk-sdm-base"
    assert quality.fid.note == "no published FID for bk-sdm-base"


def test_far_fewer_steps_than_published_have_no_score(profiles: Profiles) -> None:
    """At 30 steps the 25-step score is taken and marked; at 8 nobody knows; without guidance nobody knows either."""
    plans = [hybrid(steps, steps=steps) for steps in (30, 8)]
    more, fewer = (quality_of(plan, profiles) for plan in plans)

    assert (more.clip.value, more.clip.kind) == (pytest.approx(0.2993), "modelled")
    assert (fewer.clip.known, fewer.fid.known) == (False, False)
    assert "25 steps" in fewer.clip.note
    assert scores(quality_of(plans[0], profiles, guided=False)) == {"clip": None, "fid": None, "lpips": None}


@pytest.mark.parametrize(("steps", "clip", "kind"), [(50, 0.3156, "quoted"), (25, 0.3139, "modelled")])
def test_fewer_steps_make_asyncdiff_lose_more(profiles: Profiles, steps: int, clip: float, kind: str) -> None:
    """SD 2.1 on three components lost 0.0004 CLIP at 50 DDIM steps, 0.0021 at 25 of DPM-Solver (tables 1, 6, 7)."""
    quality = quality_of(cloud_only(on_gpus("asyncdiff", 3, model="sd21", steps=steps)), profiles)

    assert (quality.clip.value, quality.clip.kind) == (pytest.approx(clip), kind)


def test_another_size_keeps_the_score_and_loses_the_label(profiles: Profiles) -> None:
    """SD 1.4's score was published at 512 px: there it is quoted, at 768 px it is modelled."""
    here, there = (quality_of(hybrid(25), profiles, size=(px, px)) for px in (512, 768))

    assert (here.clip.kind, there.clip.kind) == ("quoted", "modelled")
    assert scores(here) == scores(there)
    assert "512 px" in there.clip.note


@pytest.mark.parametrize(
    ("plan", "same", "other"),
    [
        (hybrid(10), "dpmsolver++", "ddim"),
        (hybrid(10), "dpmsolver", "euler"),
        (cloud_only(on_gpus("asyncdiff", 3)), "ddim", "dpmsolver++"),
    ],
)
def test_another_sampler_keeps_the_score_and_loses_the_label(
    profiles: Profiles, plan: Plan, same: str, other: str
) -> None:
    """Hybrid SD drew with DPM-Solver, AsyncDiff with DDIM: with another sampler nobody knows better, and it says so."""
    here, there = (quality_of(plan, profiles, sampler=sampler) for sampler in (same, other))

    assert (here.clip.kind, there.clip.kind) == ("quoted", "modelled")
    assert scores(here) == scores(there)
    assert f"not {other}" in there.clip.note


def test_predict_says_the_fid_beside_the_clip_score(profiles: Profiles) -> None:
    """`quality` stays the CLIP score; what is unknown is null, with its reason once."""
    known, unknown, scored = (
        to_json(predict_cost(PredictionQuery(model=model, gpu="a100-sxm-80gb", **more), profiles))  # type: ignore[arg-type]
        for model, more in (("sdxl", {}), ("bk-sdm-base", {}), ("sdxl", {"method": "pcpp", "degree": 2}))
    )

    assert (known["quality"], known["quality_fid"]) == (0.3464, 30.67)
    assert (unknown["quality"], unknown["quality_fid"]) == (None, None)
    assert {"quality", "quality_fid"} <= set(unknown["unknown"])
    assert scored["quality_fid"] is None
    assert "pcpp" in scored["unknown"]["quality"]
    assert "quality_fid" not in scored["unknown"]


@given(st.sampled_from(["clip", "fid"]), st.floats(0.0, 100.0))
def test_an_interval_holds_its_score_and_is_wider_where_none_was_printed(measure: Measure, value: float) -> None:
    """Printed scores reach as far as printings differ, modelled ones further; none goes below 0."""
    kinds: tuple[Kind, ...] = ("quoted", "modelled")
    quoted, modelled = (with_interval(Estimate(value, kind=kind), measure) for kind in kinds)

    assert 0.0 <= modelled.low <= quoted.low <= value < quoted.high < modelled.high


def test_no_score_has_no_interval() -> None:
    """What nobody knows, or printed once only, has no width."""
    assert with_interval(Estimate.unknown("nobody looked"), "clip").interval_or_none is None
    assert with_interval(Estimate(0.2, kind="quoted"), "lpips").interval_or_none is None
