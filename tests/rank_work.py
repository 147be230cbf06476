"""What the ranks of the executors' tests do; in a module of its own, so that started processes can import it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from executors.models import build_sampler, build_unet, seeded_conditioning, seeded_latents
from executors.parallel import (
    AsyncDiffDenoiser,
    Denoiser,
    Group,
    SingleDenoiser,
    denoise,
    denoising_of,
    resolve_settings,
)
from executors.parallel.asyncdiff import cut_by_macs
from executors.parallel.denoiser import CfgParallelDenoiser
from executors.parallel.distrifusion import DistriFusionDenoiser
from executors.parallel.group import Traffic
from executors.parallel.pcpp import PcppDenoiser
from small_models import HEIGHT_PX, SMALL, WIDTH_PX


@dataclass(frozen=True)
class Case:
    """One small run: a method with its options, on the small UNet."""

    method: str = "single"
    options: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "ddim"
    steps: int = 6
    guidance_scale: float = 5.0
    dtype: torch.dtype = torch.float32
    config: Mapping[str, Any] = field(default_factory=lambda: SMALL)


@dataclass(frozen=True)
class Trajectory:
    """The latents after every step, and what the rank said to the others on the way."""

    latents: list[Tensor]
    traffic: Traffic


def unet_of(group: Group, case: Case) -> UNet2DConditionModel:
    """The same seeded weights for every rank, drawn on the CPU: a GPU draws other numbers from the same seed."""
    return build_unet(case.config, seed=1, dtype=case.dtype).to(group.device)


def run_case(group: Group, case: Case) -> Trajectory:
    """Denoise seeded latents on this rank and keep every step."""
    latents = seeded_latents(unet_of(group, case), images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX)
    sampler = build_sampler(case.sampler, case.steps, device=group.device)
    denoiser = denoiser_of(group, case)
    before = group.traffic.received_bytes, group.traffic.sent_bytes, group.traffic.messages
    kept: list[Tensor] = []
    start = latents * sampler.init_noise_sigma
    denoise(denoiser, sampler, start, on_step=lambda _, now: kept.append(now.cpu().clone()))
    received, sent, messages = before
    said = group.traffic
    traffic = Traffic(said.sent_bytes - sent, said.received_bytes - received, said.messages - messages)
    return Trajectory(kept, traffic)


def denoiser_of(group: Group, case: Case) -> Denoiser:
    """The rank's denoiser on a model of its own; AsyncDiff's cut is that of the arithmetic, the same in every run."""
    unet = unet_of(group, case)
    conditioning = seeded_conditioning(unet, guidance_scale=case.guidance_scale)
    job = denoising_of(unet, conditioning, images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX, steps=case.steps)
    settings = resolve_settings(case.method, job, group.size, case.options)
    if case.method == "asyncdiff":
        bounds = cut_by_macs(job.units, max(1, group.size - settings["stride"] + 1))
        return AsyncDiffDenoiser(unet, conditioning, group, settings=settings, bounds=bounds)
    patches = {"distrifusion": DistriFusionDenoiser, "pcpp": PcppDenoiser}
    if case.method in patches:
        return patches[case.method](unet, conditioning, group, settings=settings)
    return (
        CfgParallelDenoiser(unet, conditioning, group)
        if case.method == "cfg_parallel"
        else SingleDenoiser(unet, conditioning)
    )


def run_cases(group: Group, cases: Sequence[Case]) -> list[Trajectory]:
    """Several runs one after the other, which spares starting processes for each."""
    torch.set_num_threads(1)
    return [run_case(group, case) for case in cases]
