"""The models of one rank and what it does with them: a prompt into conditioning, steps, latents into a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem, RunError, unknown_name
from hybridsd_sim.perf import PIXELS_PER_LATENT
from hybridsd_sim.profiles import load_profiles

from ..hybrid import PRECISIONS as PAYLOADS
from ..hybrid import ExpectedTransfer, LatentTransfer, OnStep, expected_transfer
from ..models import Conditioning, Pipeline, build_sampler, decode, load_pipeline, resume, seeded_latents
from ..parallel import Denoiser, Group, build_denoiser, denoise, denoising_of, rank_unet, resolve_settings
from ..profiling import PRECISIONS
from .tasks import Gang, Task

SEATS = 16
"""Denoisers that a rank of several keeps, for as many models, sizes and guidance scales."""


@dataclass(frozen=True, slots=True)
class _Seat:
    """A denoiser for task after task: to put hooks on a UNet can take as long as a step of it.

    `held` is what it is conditioned on; the next prompt is written into the same tensors, of which it may hold views.
    """

    denoiser: Denoiser
    held: Conditioning

    def take(self, conditioning: Conditioning) -> Denoiser:
        self.held.embeds.copy_(conditioning.embeds)
        for name, tensor in self.held.added.items():
            tensor.copy_(conditioning.added[name])
        return self.denoiser


class Stage:
    """What a rank of a gang works with: every rank has the UNets, and rank 0 loads both ends of an image too.

    Raises `InputError` for models, weights and profiles that are not there.
    """

    def __init__(self, gang: Gang, group: Group) -> None:
        self.gang, self.group = gang, group
        profiles = load_profiles(gang.profiles)
        self._latent_spaces = {name: profiles.model(name).latent_space for name in gang.models}
        self.models: Mapping[str, Pipeline] = {
            name: load_pipeline(
                profiles.model(name).name,
                weights=gang.weights.get(name),
                vae=gang.vae,
                device=group.device,
                dtype=PRECISIONS[gang.precision],
                profiles=profiles,
            )
            for name in gang.models
        }
        self._settings = lru_cache(maxsize=64)(self._legal_settings)
        self._seats: dict[object, _Seat] = {}
        for model in self.models.values():
            _ = model.unet

    def load_ends(self) -> None:
        """Build text encoders and decoders now, so that no task waits for them."""
        for model in self.models.values():
            _ = model.text_encoders, model.tokenizers, model.vae

    # ---- What can be done -------------------------------------------------------------------------------------------

    def check(self, task: Task) -> None:
        """Raises `InputError` for a task that this gang cannot do, whatever state it goes on from."""
        if task.model not in self.models:
            raise InputError(unknown_name("model", task.model, tuple(self.models)))
        problems = [] if task.payload in PAYLOADS else [unknown_name("payload", task.payload, tuple(PAYLOADS))]
        if not 0 <= task.stop <= task.num_inference_steps:
            rule = f"must lie in 0 to {task.num_inference_steps}, the number of steps"
            problems.append(Problem("stop", str(task.stop), rule))
        elif task.decode and task.stop < task.num_inference_steps:
            rule = f"the latents are no image before step {task.num_inference_steps}"
            problems.append(Problem("decode", f"after step {task.stop}", rule, "Let them be handed over."))
        if not math.isfinite(task.guidance_scale):
            problems.append(Problem("guidance_scale", str(task.guidance_scale), "must be a finite number"))
        if problems:
            raise InputError(problems)
        self._settings(task.model, task.height_px, task.width_px, task.guidance_scale)

    def _legal_settings(self, model: str, height_px: int, width_px: int, guidance_scale: float) -> Mapping[str, Any]:
        unprompted = Conditioning(embeds=torch.empty(0), guidance_scale=guidance_scale)
        unet = self.models[model].unet
        job = denoising_of(unet, unprompted, images=1, height_px=height_px, width_px=width_px, steps=1)
        return resolve_settings(self.gang.method, job, self.gang.degree, self.gang.options)

    def expected(self, task: Task) -> ExpectedTransfer:
        """What a hand-over must be for the task to go on from it."""
        model = self.models[task.model]
        own = expected_transfer(model.unet, self.latent_space(task), model.prediction)
        shape = (1, own.channels or 0, task.height_px // PIXELS_PER_LATENT, task.width_px // PIXELS_PER_LATENT)
        return replace(own, sampler=task.sampler, num_inference_steps=task.num_inference_steps, shape=shape)

    # ---- What is done -----------------------------------------------------------------------------------------------

    def latent_space(self, task: Task) -> str:
        """The catalogue's word for where the task's latents live."""
        return self._latent_spaces[task.model]

    def encode(self, task: Task) -> Conditioning:
        """The conditioning of the task's prompt."""
        return self.models[task.model].encode(
            [task.prompt], height_px=task.height_px, width_px=task.width_px, guidance_scale=task.guidance_scale
        )

    def noise(self, task: Task) -> Tensor:
        """Standard normal latents (1, C, H, W) of the task's seed."""
        unet = self.models[task.model].unet
        return seeded_latents(unet, images=1, height_px=task.height_px, width_px=task.width_px, seed=task.seed)

    def sampler(self, task: Task) -> Any:
        """A sampler for this task alone. Raises `InputError` for one that cannot be built."""
        prediction = self.models[task.model].prediction
        return build_sampler(task.sampler, task.num_inference_steps, prediction=prediction, device=self.group.device)

    def steps(self, task: Task, begun: LatentTransfer, sampler: Any) -> Callable[[OnStep], Tensor]:
        """What does the task's steps from where `begun` stands, with all ranks of the gang, and returns the latents."""
        resume(sampler, begun.state, begun.step)
        denoiser, latents = self._denoiser(task, begun), begun.latents.to(self.group.device)
        return lambda on_step: denoise(denoiser, sampler, latents, start=begun.step, stop=task.stop, on_step=on_step)

    def picture(self, task: Task, latents: Tensor) -> Tensor:
        """The image (3, H, W) of final latents, values in 0 to 1. Raises `RunError` for one with NaN or infinity."""
        image = decode(self.models[task.model].vae, latents.to(self.group.device))[0]
        pixels = (image.float().cpu() / 2 + 0.5).clamp(0, 1)
        if not torch.isfinite(pixels).all():
            raise RunError("the image holds NaN or infinite values; run it with fp32")
        return pixels

    def _denoiser(self, task: Task, begun: LatentTransfer) -> Denoiser:
        unet = self.models[task.model].unet
        if begun.conditioning is None:
            raise RunError("the hand-over has no embeddings")
        conditioning = begun.conditioning.to(self.group.device, unet.dtype)
        if self.group.size == 1:
            return build_denoiser("single", unet, conditioning, self.group, {}, latents=begun.latents)
        key = (task.model, begun.latents.shape, conditioning.guidance_scale, conditioning.embeds.shape)
        if key not in self._seats:
            while len(self._seats) >= SEATS:
                del self._seats[next(iter(self._seats))]
            self._seats[key] = self._seat(task, begun, conditioning)
        return self._seats[key].take(conditioning)

    def _seat(self, task: Task, begun: LatentTransfer, conditioning: Conditioning) -> _Seat:
        added = {name: tensor.clone() for name, tensor in conditioning.added.items()}
        held = replace(conditioning, embeds=conditioning.embeds.clone(), added=added)
        settings = self._settings(task.model, task.height_px, task.width_px, task.guidance_scale)
        unet = rank_unet(self.models[task.model], self.group)
        return _Seat(build_denoiser(self.gang.method, unet, held, self.group, settings, latents=begun.latents), held)


def png(pixels: Tensor) -> bytes:
    """The image (3, H, W), values in 0 to 1, as a PNG file."""
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="PNG")
    return file.getvalue()
