"""The denoising loop, what it asks of every parallel method, and the two methods that leave the UNet whole.

A `Denoiser` holds one rank's model and conditioning. It is told the timesteps once and then asked for the guided noise
of one step after the other; where several ranks work together, each rank runs the same loop and receives the same
noise. `SingleDenoiser` is the reference: one device evaluates both branches of classifier-free guidance in one batch.
`CfgParallelDenoiser` gives each of two ranks one branch, and the noises are exchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.errors import IllegalPlanError, Problem
from hybridsd_sim.perf import PIXELS_PER_LATENT, Denoising, Method, find_method, layer_table, unet_units

from ..models import Conditioning
from .group import Group

Option = bool | int | float | str

FIXED_OPTIONS: Mapping[str, Option] = MappingProxyType({"public_cut": False})
"""Options of which the executors know one value only."""


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


def predict_noise(unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet's noise for every branch: (branches x images, C, H, W), in the UNet's precision.

    `latents` (images, C, H, W) are given to every branch; `timestep` is a scalar tensor of the sampler's.
    """
    batch = torch.cat([latents] * conditioning.branches).to(unet.dtype)
    added = dict(conditioning.added) or None
    noise: Tensor = unet(batch, timestep, conditioning.embeds, added_cond_kwargs=added, return_dict=False)[0]
    return noise


def apply_guidance(noise: Tensor, guidance_scale: float, precision: torch.dtype) -> Tensor:
    """The noise of each image, in this precision, from that of every branch.

    Above 1 the scale is that of classifier-free guidance (arXiv 2207.12598) over two branches, the empty prompts first;
    the formula is diffusers', where a scale of 1 is the prompt's noise alone.
    """
    noise = noise.to(precision)
    if guidance_scale <= 1.0:
        return noise
    empty, prompted = noise.chunk(2)
    return empty + guidance_scale * (prompted - empty)


def match_memory_format(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the other's memory layout: what arrived from a rank is flat, and layers want channels last.

    Values stay; only the strides change.
    """
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


def denoising_of(
    unet: UNet2DConditionModel, conditioning: Conditioning, *, images: int, height_px: int, width_px: int, steps: int
) -> Denoising:
    """The same UNet evaluations as the planner sees them. Raises `InputError` for a UNet that it cannot count.

    Guidance doubles the latents of a step. Sizes are in pixels; bytes follow the UNet's own precision.
    """
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


def resolve_settings(method: str, job: Denoising, degree: int, options: Mapping[str, Option]) -> dict[str, Any]:
    """The method's options with its defaults filled in. Raises `IllegalPlanError` with every rule that is broken."""
    rules = find_method(method)
    problems = [*rules.problems(job, degree, options), *fixed_option_problems(rules, options)]
    if problems:
        raise IllegalPlanError(problems)
    return rules.settings(job, with_fixed_options(rules, options))


def with_fixed_options(rules: Method, options: Mapping[str, Option]) -> dict[str, Option]:
    """The options with those filled in of which the executors know one value only (`FIXED_OPTIONS`)."""
    return {**options, **{key: value for key, value in FIXED_OPTIONS.items() if key in rules.defaults}}


def fixed_option_problems(rules: Method, options: Mapping[str, Option]) -> list[Problem]:
    """Options that ask for what the executors do not do: legal values of `FIXED_OPTIONS` other than theirs.

    What the method itself refuses, an option that it does not have or a value of another type, is left to its own
    `problems`, so that no option is refused twice with two remedies.
    """
    why = "the executors cut AsyncDiff's components by their cost, for any network"
    return [
        Problem(
            f"{rules.name} option {key}", str(options[key]).lower(), why, f"Leave it out, or say {str(value).lower()}."
        )
        for key, value in FIXED_OPTIONS.items()
        if key in rules.defaults and type(options.get(key)) is type(value) and options[key] != value
    ]


def at_option(problem: Problem, rules: Method) -> Problem:
    """The problem at `--option KEY` where it is about an option of the method, else as it is."""
    own = f"{rules.name} option"
    if problem.place in rules.defaults:
        return replace(problem, place=f"--option {problem.place}")
    return (
        replace(problem, place=f"--option{problem.place.removeprefix(own)}")
        if problem.place.startswith(own)
        else problem
    )


class SingleDenoiser(Denoiser):
    """One device does everything; every other method is held against it."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning) -> None:
        self.unet = unet
        self.conditioning = conditioning

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        noise = predict_noise(self.unet, latents, timestep, self.conditioning)
        return apply_guidance(noise, self.conditioning.guidance_scale, latents.dtype)


class CfgParallelDenoiser(Denoiser):
    """One rank of two: rank 0 holds the empty prompt, rank 1 the prompt. Alone, a rank does both."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning, group: Group) -> None:
        self.unet, self.group = unet, group
        self.guidance_scale = conditioning.guidance_scale
        self.conditioning = conditioning.branch(group.rank) if group.size > 1 else conditioning

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        own = predict_noise(self.unet, latents, timestep, self.conditioning)
        return apply_guidance(torch.cat(self.group.all_gather(own)), self.guidance_scale, latents.dtype)
