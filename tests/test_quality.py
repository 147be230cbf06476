"""What pictures are worth: published scores come back, losses are monotone, the unknown stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CLOUD, hybrid
from hybridsd_sim import Plan, Profiles, Stage
from hybridsd_sim.quality import quality_of, switch_curve


@pytest.mark.parametrize(("k", "clip"), [(25, 0.2993), (10, 0.2887), (5, 0.2734), (0, 0.2611)])
def test_published_switch_steps_give_their_published_score(profiles: Profiles, k: int, clip: float) -> None:
    """SD 1.4 with the 224M model (Hybrid SD, table H1); the ends are the models alone."""
    quality = quality_of(hybrid(k), profiles)

    assert quality.clip == pytest.approx(clip)
    assert quality.kind == "quoted"


@given(st.integers(0, 24))
def test_more_cloud_steps_never_lose_quality(profiles: Profiles, k: int) -> None:
    """Between published points the score is interpolated, and it rises with the switch step."""
    scores = [quality_of(hybrid(step), profiles) for step in (k, k + 1)]

    assert (scores[0].clip or 0) <= (scores[1].clip or 0) + 1e-12


def test_between_published_points_the_label_says_modelled(profiles: Profiles) -> None:
    """Nobody published k = 7."""
    assert quality_of(hybrid(7), profiles).kind == "modelled"


@pytest.mark.parametrize(
    ("large", "small"),
    [("sd14", "bk-sdm-tiny"), ("sd14", "bk-sdm-small"), ("sd14", "hybrid-sd-224m"), ("sdxl", "koala-700m")],
)
def test_every_published_pair_has_its_curve(profiles: Profiles, large: str, small: str) -> None:
    """At least two published switch steps and both ends, all of one study, losses falling to zero at cloud-only."""
    losses = [loss for _, loss, _ in switch_curve(profiles, large, small)]

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

    assert quality.clip is None
    assert "segmind-vega" in quality.note


def test_guidance_parallelism_loses_nothing(profiles: Profiles) -> None:
    """It computes what one GPU computes."""
    scores = {
        quality_of(hybrid(25, method=m, degree=d), profiles).clip for m, d in (("single", 1), ("cfg_parallel", 2))
    }

    assert len(scores) == 1


def test_asyncdiff_loses_what_its_paper_says(profiles: Profiles) -> None:
    """SD 1.5, four components, stride 1: CLIP 30.52 against 30.63 (AsyncDiff, table 1)."""
    plans = [
        Plan(
            stages=(Stage(start=0, stop=50, model="sd15", site=CLOUD, **how),),
            text_encode_site="cloud",
            vae_site="cloud",
        )
        for how in ({}, {"method": "asyncdiff", "degree": 4, "options": (("stride", 1),)})
    ]
    base, parallel = (quality_of(plan, profiles).clip or 0 for plan in plans)

    assert base - parallel == pytest.approx(0.0011, abs=1e-6)


def test_an_unmeasured_method_has_no_score(profiles: Profiles) -> None:
    """PCPP published no CLIP score, so a plan with it has none and meets no floor."""
    quality = quality_of(hybrid(25, method="pcpp", degree=2), profiles)

    assert quality.clip is None
    assert "pcpp" in quality.note


def test_far_fewer_steps_than_published_have_no_score(profiles: Profiles) -> None:
    """At 30 steps the 25-step score is taken and marked; at 8 nobody knows; without guidance nobody knows either."""
    plans = [hybrid(steps, steps=steps) for steps in (30, 8)]
    more, fewer = (quality_of(plan, profiles) for plan in plans)

    assert (more.clip, more.kind) == (pytest.approx(0.2993), "modelled")
    assert fewer.clip is None
    assert "25 steps" in fewer.note
    assert quality_of(plans[0], profiles, guided=False).clip is None


def test_another_size_keeps_the_score_and_loses_the_label(profiles: Profiles) -> None:
    """SD 1.4's score was published at 512 px: there it is quoted, at 768 px it is modelled."""
    here, there = (quality_of(hybrid(25), profiles, size=(px, px)) for px in (512, 768))

    assert (here.kind, there.kind) == ("quoted", "modelled")
    assert here.clip == there.clip
    assert "512 px" in there.note
