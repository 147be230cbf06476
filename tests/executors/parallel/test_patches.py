"""DistriFusion, PCPP and guidance parallelism against the whole model on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from executors.models import build_unet, replica, seeded_conditioning, seeded_latents
from executors.parallel import Group, SingleDenoiser, denoising_of, resolve_settings, run_ranks
from executors.parallel.pcpp import used_tokens
from hybridsd_sim.errors import IllegalPlanError, InputError
from hybridsd_sim.perf.parallel_methods import SYNC_MODES
from hybridsd_sim.perf.partition import halo_bytes, kv_bytes
from rank_work import Case, Trajectory, denoiser_of, run_case
from small_models import HEIGHT_PX, SMALL, WIDTH_PX

STEPS = 6
EXACT = 1e-5
"""Relative error that float32 rounding leaves when the same sums are taken in another order."""


@lru_cache(maxsize=128)
def run(method: str, degree: int, **options: bool | float | str) -> tuple[Trajectory, ...]:
    """Every rank's latents and traffic in a small run."""
    return tuple(run_ranks(run_case, degree, args=(Case(method, options, steps=STEPS),)))


def reference() -> list[Tensor]:
    """The latents of one device with the whole model."""
    return run("single", 1)[0].latents


def error(latents: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((latents - wanted).norm() / wanted.norm())


def worst_error(ranks: tuple[Trajectory, ...]) -> float:
    """Largest relative distance from the reference over all steps."""
    return max(error(ours, whole) for ours, whole in zip(ranks[0].latents, reference(), strict=True))


# ---- What is exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("method", ["distrifusion", "pcpp"])
def test_full_sync_is_the_whole_model(method, degree):
    """Stripes that gather everything before every layer compute what one device computes."""
    assert worst_error(run(method, degree, sync_mode="full_sync")) < EXACT


@pytest.mark.parametrize("mode", SYNC_MODES)
@pytest.mark.parametrize("method", ["distrifusion", "pcpp"])
def test_a_run_of_warmup_steps_is_the_whole_model(method, mode):
    """Synchronous steps are exact in every mode, so a run of nothing else is."""
    assert worst_error(run(method, 2, sync_mode=mode, warmup_steps=STEPS)) < EXACT


@pytest.mark.parametrize("degree", [2, 4])
def test_splitting_the_guidance_changes_nothing(degree):
    """Half the ranks hold the empty prompt and half the prompt: the same noise."""
    assert worst_error(run("distrifusion", degree, sync_mode="full_sync", guidance_split=True)) < EXACT


def test_split_guidance_goes_stale_like_half_as_many_stripes():
    """Four ranks with split guidance are two stripes: after the warm-up they differ from the whole as two ranks do."""
    split, pair = run("distrifusion", 4, guidance_split=True, warmup_steps=2), run("distrifusion", 2, warmup_steps=2)
    assert error(split[0].latents[-1], pair[0].latents[-1]) < EXACT
    assert worst_error(pair) > 100 * EXACT


def test_guidance_parallelism_is_the_whole_model():
    """Two branches on two ranks are one batch of two."""
    assert worst_error(run("cfg_parallel", 2)) < EXACT


@pytest.mark.parametrize("method", ["distrifusion", "pcpp", "cfg_parallel"])
def test_degree_one_is_single_to_the_bit(method):
    """A group of one rank adds nothing."""
    ours = run(method, 1)[0].latents
    assert all(torch.equal(step, whole) for step, whole in zip(ours, reference(), strict=True))


@pytest.mark.parametrize("mode", ["full_sync", "sync_gn", "corrected_async_gn", "stale_gn"])
@pytest.mark.parametrize("method", ["distrifusion", "pcpp"])
def test_where_nothing_changes_stale_is_fresh(method, mode):
    """Shown the same latents and timestep again and again, stale activations are right ones: the noise stays exact."""
    options = {"sync_mode": mode, "warmup_steps": 1} | ({"partial": 1.0} if method == "pcpp" else {})
    ours = run_ranks(repeat_one_step, 2, args=(Case(method, options),))[0]
    whole = run_ranks(repeat_one_step, 1, args=(Case(),))[0]
    assert max(error(noise, whole[0]) for noise in ours) < EXACT


@torch.inference_mode()
def repeat_one_step(group: Group, case: Case) -> list[Tensor]:
    """The noise of the same latents at the same timestep, four times."""
    denoiser = denoiser_of(group, case)
    latents = seeded_latents(build_unet(SMALL, seed=1), images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX)
    timesteps = torch.full((4,), 500)
    denoiser.begin(timesteps)
    return [denoiser.noise(latents, step, timesteps[step]) for step in range(4)]


def test_all_ranks_hold_the_same_latents():
    """The noise is gathered, so every rank's sampler does the same."""
    for ranks in (run("distrifusion", 3, warmup_steps=2), run("pcpp", 4, warmup_steps=2), run("cfg_parallel", 2)):
        for rank in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank.latents, ranks[0].latents, strict=True))


@pytest.mark.parametrize("mode", SYNC_MODES)
def test_pcpp_that_sees_both_stripes_whole_is_distrifusion(mode):
    """With two ranks and p = 1 a stripe and its one neighbour are the image."""
    ours = run("pcpp", 2, partial=1.0, warmup_steps=2, sync_mode=mode)[0].latents
    theirs = run("distrifusion", 2, warmup_steps=2, sync_mode=mode)[0].latents
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_sending_whole_stripes_changes_bytes_and_nothing_else():
    """The public PCPP code sends what it does not use."""
    lean, public = run("pcpp", 3, warmup_steps=2), run("pcpp", 3, warmup_steps=2, whole_stripes=True)
    assert all(torch.equal(a, b) for a, b in zip(lean[1].latents, public[1].latents, strict=True))
    assert lean[1].traffic.received_bytes < public[1].traffic.received_bytes


def test_the_public_variance_factor_shifts_the_result_a_little():
    """n / (n - 1) in GroupNorm is the public code's; without it full_sync is exact, with it nearly."""
    shifted = worst_error(run("distrifusion", 2, sync_mode="full_sync", unbiased_variance=True))
    assert EXACT < shifted < 0.05


# ---- What goes stale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "degree"), [("distrifusion", 2), ("distrifusion", 4), ("pcpp", 3)])
def test_more_warmup_steps_leave_less_error(method, degree):
    """Every further synchronous step brings the final latents closer to the whole model's."""
    errors = [error(run(method, degree, warmup_steps=n)[0].latents[-1], reference()[-1]) for n in (1, 2, 4, STEPS)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


def test_more_denoising_steps_leave_less_error():
    """Neighbouring steps of a longer run differ less, so what is one step old is closer to fresh."""
    errors = []
    for steps in (10, 20, 40):
        whole, ours = Case(steps=steps, guidance_scale=1.0), Case("distrifusion", {"warmup_steps": 1}, steps=steps)
        wanted = run_ranks(run_case, 1, args=(whole,))[0].latents[-1]
        stale = run_ranks(run_case, 2, args=(replace(ours, guidance_scale=1.0),))[0].latents[-1]
        errors.append(error(stale, wanted))
    assert errors == sorted(errors, reverse=True)


def test_modes_that_share_more_err_less():
    """Fresh moments err less than corrected ones, and those less than stale ones or the stripe's own (figure 9)."""
    modes = ("sync_gn", "corrected_async_gn", "stale_gn", "separate_gn")
    fresh, corrected, *rest = (worst_error(run("distrifusion", 2, warmup_steps=3, sync_mode=mode)) for mode in modes)
    assert fresh < corrected < min(rest)


def test_a_denoiser_forgets_the_run_before():
    """A second run with the same denoiser gives the same latents as the first."""
    first, second = run_ranks(run_twice, 2, args=(Case("pcpp", {"warmup_steps": 1}),))[0]
    assert torch.equal(first, second)


@torch.inference_mode()
def run_twice(group: Group, case: Case) -> list[Tensor]:
    """The last noise of two runs of one denoiser over falling timesteps."""
    denoiser = denoiser_of(group, case)
    latents = seeded_latents(build_unet(SMALL, seed=1), images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX)
    timesteps = torch.tensor([900, 600, 300])
    last = []
    for _ in range(2):
        denoiser.begin(timesteps)
        last.append([denoiser.noise(latents, step, timesteps[step]) for step in range(3)][-1])
    return last


# ---- Bytes ----------------------------------------------------------------------------------------------------------


def job(steps: int = STEPS):
    """The small run as the planner counts it."""
    unet = build_unet(SMALL, seed=1)
    conditioning = seeded_conditioning(unet, guidance_scale=5.0)
    return denoising_of(unet, conditioning, images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX, steps=steps)


def moments_bytes(layers) -> float:
    """Two float32 moments for each of 32 groups of every GroupNorm, for both latents of a guided step."""
    return sum(layer.op == "group_norm" for layer in layers) * 2 * 32 * 2 * 4


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_distrifusion_moves_the_bytes_of_the_formula(degree):
    """A rank receives (N-1)/N of all keys and values, N-1 times a stripe's edges, moments and the others' noise."""
    counted = job()
    a_step = kv_bytes(counted, 2) * (degree - 1) / degree + halo_bytes(counted, 2) * (degree - 1)
    a_step += moments_bytes(counted.layers) * (degree - 1) + counted.noise_bytes() * (degree - 1) / degree
    for rank in run("distrifusion", degree, warmup_steps=2):
        assert rank.traffic.received_bytes == a_step * STEPS
        assert rank.traffic.sent_bytes == rank.traffic.received_bytes


@pytest.mark.parametrize(("partial", "whole_stripes"), [(0.3, False), (0.3, True), (0.0, False)])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_pcpp_moves_the_bytes_of_the_formula(degree, partial, whole_stripes):
    """After the warm-up a rank receives its neighbours' stripe ends: p of a stripe, or all of it in the public code."""
    counted, warmup, options = job(), 2, {"partial": partial, "whole_stripes": whole_stripes}
    gathered = kv_bytes(counted, 2) * (degree - 1) / degree
    others = halo_bytes(counted, 2) * (degree - 1) + moments_bytes(counted.layers) * (degree - 1)
    others += counted.noise_bytes() * (degree - 1) / degree
    for rank, seen in enumerate(run("pcpp", degree, warmup_steps=warmup, **options)):
        neighbours = (rank > 0) + (rank < degree - 1)
        ends = neighbours * _ends_bytes(counted.layers, degree, 1.0 if whole_stripes else partial)
        assert seen.traffic.received_bytes == STEPS * others + warmup * gathered + (STEPS - warmup) * ends


def _ends_bytes(layers, degree: int, share: float) -> int:
    """Keys and values of one stripe end, over all self-attentions, for two latents in float32."""
    total = 0
    for layer in layers:
        if layer.kv_elements:
            width = layer.kv_elements // (2 * layer.tokens)
            total += 2 * width * used_tokens(layer.tokens // degree, share)
    return total * 2 * 4


@pytest.mark.parametrize("method", ["distrifusion", "cfg_parallel"])
def test_half_the_precision_is_half_the_bytes(method):
    """In bfloat16 everything but GroupNorm's moments travels in two bytes an element, the noise too."""
    options = {"sync_mode": "separate_gn", "warmup_steps": 1} if method == "distrifusion" else {}
    cases = [Case(method, options, steps=STEPS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    full, half = (run_ranks(run_case, 2, args=(case,))[0].traffic.received_bytes for case in cases)
    moments = moments_bytes(job().layers) if method == "distrifusion" else 0
    assert half - moments == (full - moments) / 2


def test_no_sync_moves_the_noise_alone():
    """After the warm-up nothing but the predicted noise travels."""
    short, long = (run_ranks(run_case, 2, args=(Case("distrifusion", NO_SYNC, steps=n),))[0].traffic for n in (3, 5))
    assert long.received_bytes - short.received_bytes == 2 * 4 * (HEIGHT_PX // 16) * (WIDTH_PX // 8) * 2 * 4


NO_SYNC: Mapping[str, object] = {"sync_mode": "no_sync", "warmup_steps": 2}


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_divide_are_refused_with_those_that_would():
    """24 rows, halved once, divide by 2, 3, 4, 6 and 12; five stripes are refused and these are named."""
    with pytest.raises(IllegalPlanError, match="Stripe counts that fit this size: 1, 2, 3, 4, 6, 12"):
        resolve_settings("distrifusion", job(), 5, {})


def test_fused_projections_are_refused():
    """Keys that are not computed on their own cannot be gathered on their own."""
    unet = build_unet(SMALL, seed=1)
    unet.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        run_ranks(denoise_fused, 2, args=(unet,))


def denoise_fused(group: Group, unet) -> None:
    """Try to put hooks on a UNet with fused projections."""
    from executors.parallel.distrifusion import DistriFusionDenoiser

    conditioning = seeded_conditioning(unet, guidance_scale=5.0)
    DistriFusionDenoiser(
        replica(unet), conditioning, group, settings=resolve_settings("distrifusion", job(), group.size, {})
    )


def test_single_evaluates_one_branch_without_guidance():
    """At guidance 1 there is one branch, and its noise is the UNet's own."""
    unet = build_unet(SMALL, seed=1)
    conditioning = seeded_conditioning(unet, guidance_scale=1.0)
    latents = seeded_latents(unet, images=1, height_px=64, width_px=64)
    with torch.inference_mode():
        ours = SingleDenoiser(unet, conditioning).noise(latents, 0, torch.tensor(500))
        theirs = unet(latents, 500, conditioning.embeds).sample
    assert torch.equal(ours, theirs)
