"""The parallel methods as they run: which class carries a method out, and the UNet that each rank gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.perf import PIXELS_PER_LATENT, Denoising

from ..models import Conditioning, Model, replica
from .asyncdiff import AsyncDiff, balanced_bounds, bounds_by_macs
from .denoiser import CfgParallel, Denoiser, Single, job_of
from .distrifusion import DistriFusion
from .group import Group
from .pcpp import Pcpp


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
    (images, C, H, W), the same in every run; `timed_cut` cuts by the time of every unit on this device instead.
    """
    if group.size == 1:
        return Single(unet, conditioning)
    if method == "cfg_parallel":
        return CfgParallel(unet, conditioning, group)
    if method == "asyncdiff":
        components = group.size - int(settings["stride"]) + 1
        bounds = (
            balanced_bounds(unet, conditioning, group, latents, components)
            if timed_cut
            else bounds_by_macs(_job(unet, conditioning, latents).units, components)
        )
        return AsyncDiff(unet, conditioning, group, settings=settings, bounds=bounds)
    kind = {"distrifusion": DistriFusion, "pcpp": Pcpp}[method]
    return kind(unet, conditioning, group, settings=settings)


def own_unet(model: Model, group: Group) -> UNet2DConditionModel:
    """The UNet for one rank: modules of its own, on its device. Ranks in one process share the weights."""
    here = model if torch.device(model.device) == group.device else replace(model, device=group.device)
    unet: UNet2DConditionModel = replica(here.unet)
    return unet


def _job(unet: UNet2DConditionModel, conditioning: Conditioning, latents: Tensor) -> Denoising:
    images, _, rows, columns = latents.shape
    height_px, width_px = rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT
    return job_of(unet, conditioning, images=images, height_px=height_px, width_px=width_px, steps=1)
