"""The parallel methods as they run: which class carries a method out, and the UNet that each rank gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf import PIXELS_PER_LATENT

from ..models import Conditioning, Pipeline, replica
from .asyncdiff import AsyncDiffDenoiser, cut_by_macs, cut_by_time
from .denoiser import CfgParallelDenoiser, Denoiser, SingleDenoiser, denoising_of
from .distrifusion import DistriFusionDenoiser
from .group import Group
from .pcpp import PcppDenoiser

STRIPED: Mapping[str, type[DistriFusionDenoiser | PcppDenoiser]] = {
    "distrifusion": DistriFusionDenoiser,
    "pcpp": PcppDenoiser,
}
"""The methods that cut the image into stripes, one a rank."""


def build_denoiser(
    method: str,
    unet: UNet2DConditionModel,
    conditioning: Conditioning,
    group: Group,
    settings: Mapping[str, Any],
    *,
    latents: Tensor,
    timed_cut: bool = False,
) -> Denoiser:
    """This rank's denoiser of a method; a rank alone is `single`. The UNet's modules must be the rank's own.

    `settings` are the method's options with its defaults. AsyncDiff is cut by counted work at the size of `latents`
    (images, C, H, W), the same in every run; `timed_cut` cuts by the time of every unit on this device instead. Raises
    `InputError` for a method that is modelled and that nothing here carries out.
    """
    if group.size == 1:
        return SingleDenoiser(unet, conditioning)
    if method == "cfg_parallel":
        return CfgParallelDenoiser(unet, conditioning, group)
    if method == "asyncdiff":
        components = group.size - int(settings["stride"]) + 1
        if timed_cut:
            bounds = cut_by_time(unet, conditioning, group, latents, components)
        else:
            images, _, rows, columns = latents.shape
            height_px, width_px = rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT
            job = denoising_of(unet, conditioning, images=images, height_px=height_px, width_px=width_px, steps=1)
            bounds = cut_by_macs(job.units, components)
        return AsyncDiffDenoiser(unet, conditioning, group, settings=settings, bounds=bounds)
    if method not in STRIPED:
        remedy = f"Choose one of single, cfg_parallel, asyncdiff, {', '.join(STRIPED)}."
        raise InputError(Problem("method", method, "is modelled, but no executor runs it", remedy))
    return STRIPED[method](unet, conditioning, group, settings=settings)


def rank_unet(model: Pipeline, group: Group) -> UNet2DConditionModel:
    """The UNet for one rank: modules of its own, on its device. Ranks in one process share the weights."""
    here = model if torch.device(model.device) == group.device else replace(model, device=group.device)
    unet: UNet2DConditionModel = replica(here.unet)
    return unet
