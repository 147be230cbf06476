"""The denoising loop and what it asks of every method: the guided noise of a step.

A `Denoiser` holds one rank's model and conditioning. It is told the timesteps once and then asked for the noise of one
step after the other; where several ranks work together, each rank runs the same loop and receives the same noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.errors import IllegalPlanError, Problem
from hybridsd_sim.methods import Method, find_method
from hybridsd_sim.partition import Denoising
from hybridsd_sim.roofline import layer_table
from hybridsd_sim.unet import PIXELS_PER_LATENT, unet_units

Option = bool | int | float | str
EXECUTED: Mapping[str, Option] = MappingProxyType({"public_cut": False})
"""Options of which the executors know one value only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What every UNet call is conditioned on, and the scale of classifier-free guidance.

    `embeds`: (branches x images, tokens, width); under guidance there are two branches, the empty prompts first, as in
    diffusers. `added` holds SDXL's `text_embeds` and `time_ids`, with the same first dimension.
    """

    embeds: Tensor
    guidance_scale: float
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    def branch(self, index: int) -> Conditioning:
        """One branch alone: 0 the empty prompts, 1 the prompts."""
        added = {name: tensor.chunk(2)[index] for name, tensor in self.added.items()}
        return replace(self, embeds=self.embeds.chunk(2)[index], added=added, guidance_scale=1.0)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another precision."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.added.items()}
        return replace(self, embeds=self.embeds.to(device, dtype), added=moved)


class Denoiser(ABC):
    """Predicts the guided noise of a step, alone or as one rank of a group."""

    timesteps: Tensor

    def begin(self, timesteps: Tensor) -> None:
        """Prepare for a run over these timesteps, one a step, and forget any earlier run."""
        self.timesteps = timesteps

    @abstractmethod
    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        """The guided noise of step `step` for latents (images, C, H, W), the same shape.

        The latents are scaled as the sampler wants its model inputs.
        """


def predict(unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet's noise for every branch: (branches x images, C, H, W), in the UNet's precision."""
    batch = torch.cat([latents] * conditioning.branches).to(unet.dtype)
    added = dict(conditioning.added) or None
    noise: Tensor = unet(batch, timestep, conditioning.embeds, added_cond_kwargs=added, return_dict=False)[0]
    return noise


def guide(noise: Tensor, guidance_scale: float, precision: torch.dtype) -> Tensor:
    """The noise of each image, in this precision, from that of every branch.

    Above 1 the scale is that of classifier-free guidance over two branches, the empty prompts first.
    """
    noise = noise.to(precision)
    if guidance_scale <= 1.0:
        return noise
    empty, prompted = noise.chunk(2)
    return empty + guidance_scale * (prompted - empty)


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the other's memory layout: what arrived from a rank is flat, and layers want channels last."""
    channels_last = other.dim() == 4 and not other.is_contiguous() and tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


@torch.inference_mode()
def denoise(
    denoiser: Denoiser,
    sampler: Any,
    latents: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise latents (images, C, H, W) over the sampler's steps `[start, stop)` and return the latents after them.

    `on_step` is called after every step with its index and the latents.
    """
    timesteps = sampler.timesteps
    end = len(timesteps) if stop is None else stop
    denoiser.begin(timesteps[:end])
    for step in range(start, end):
        timestep = timesteps[step]
        noise = denoiser.noise(sampler.scale_model_input(latents, timestep), step, timestep)
        latents = sampler.step(noise, timestep, latents, return_dict=False)[0]
        if on_step:
            on_step(step, latents)
    return latents


def job_of(
    unet: UNet2DConditionModel, conditioning: Conditioning, *, images: int, height_px: int, width_px: int, steps: int
) -> Denoising:
    """The same UNet evaluations as the planner sees them. Raises `InputError` for a UNet that it cannot count."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    latent = config["in_channels"] * (height_px // PIXELS_PER_LATENT) * (width_px // PIXELS_PER_LATENT)
    return Denoising(
        table=layer_table(config, height_px, width_px),
        units=unet_units(config, height_px, width_px),
        num_steps=steps,
        latents=images * conditioning.branches,
        guided=conditioning.guided,
        latent_elements=latent,
        family="sdxl" if config.get("addition_embed_type") == "text_time" else "",
        element_bytes=unet.dtype.itemsize,
        weight_bytes=unet.dtype.itemsize,
    )


def legal_settings(method: str, job: Denoising, degree: int, options: Mapping[str, Option]) -> dict[str, Any]:
    """The method's options with its defaults filled in. Raises `IllegalPlanError` with every rule that is broken."""
    rules = find_method(method)
    problems = [*executed_problems(options), *rules.problems(job, degree, options)]
    if problems:
        raise IllegalPlanError(problems)
    return rules.settings(job, executed(rules, options))


def executed(rules: Method, options: Mapping[str, Option]) -> dict[str, Option]:
    """The options with those filled in of which the executors know one value only (`EXECUTED`)."""
    return {**options, **{key: value for key, value in EXECUTED.items() if key in rules.defaults}}


def executed_problems(options: Mapping[str, Option]) -> list[Problem]:
    """Options that ask for what the executors do not do."""
    return [
        Problem(f"option {key}", str(options[key]).lower(), why, f"Leave it out, or say {str(value).lower()}.")
        for key, value in EXECUTED.items()
        if options.get(key, value) != value
        for why in ["the executors cut AsyncDiff's components by their cost, for any network"]
    ]
