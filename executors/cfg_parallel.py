"""Guidance parallelism: one rank evaluates the empty prompt and the other the prompt; the noises are exchanged."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from executors.denoiser import Conditioning, Denoiser, guide, predict
from executors.group import Group


class CfgParallel(Denoiser):
    """One rank of two: rank 0 holds the empty prompt, rank 1 the prompt. Alone, a rank does both."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning, group: Group) -> None:
        self.unet, self.group = unet, group
        self.guidance_scale = conditioning.guidance_scale
        self.conditioning = conditioning.branch(group.rank) if group.size > 1 else conditioning

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        own = predict(self.unet, latents, timestep, self.conditioning)
        return guide(torch.cat(self.group.all_gather(own)), self.guidance_scale, latents.dtype)
