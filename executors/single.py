"""The reference: one device evaluates the whole UNet, both branches of the guidance in one batch."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor

from executors.denoiser import Conditioning, Denoiser, guide, predict


class Single(Denoiser):
    """One device does everything; every other method is held against it."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning) -> None:
        self.unet = unet
        self.conditioning = conditioning

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        noise = predict(self.unet, latents, timestep, self.conditioning)
        return guide(noise, self.conditioning.guidance_scale, latents.dtype)
