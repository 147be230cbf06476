"""One image from prompt to pixels on real hardware: text encoder, the stages of a plan, VAE decoder, each timed.

A run has one stage, of any parallel method, or two: a large model up to the switch step and a small one from there, in
this process or at an edge that another process serves. What crosses the switch is the same `LatentTransfer` either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridsd_sim.errors import IllegalPlanError, Problem, RunError
from hybridsd_sim.files import atomic_path

from ..models import Conditioning, Pipeline, build_sampler, decode, seeded_latents
from ..parallel import (
    TIMEOUT_S,
    Carrier,
    Group,
    SingleDenoiser,
    build_denoiser,
    denoise,
    rank_unet,
    run_ranks,
    synchronised_clock,
)
from .edge import Address, finish_at_edge, finish_run
from .payload import LatentTransfer, capture_transfer, serialise


@dataclass(frozen=True, kw_only=True)
class ImageRun:
    """What one image takes. `model` does the steps before `switch_step` (None: all) and `small` the rest.

    `edge` is the address of a process that serves the small model; without it `small` runs here. `latent_space` is that
    of both models. `settings` are the method's options with its defaults. `carrier` says how the ranks of the first
    stage talk to each other. A rank or an edge that is silent for longer than `timeout_s` is lost.
    """

    model: Pipeline
    latent_space: str
    prompt: str = "a photograph of an astronaut riding a horse"
    method: str = "single"
    degree: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    carrier: Carrier = "loopback"
    small: Pipeline | None = None
    edge: Address | None = None
    switch_step: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height_px: int = 512
    width_px: int = 512
    sampler: str = "ddim"
    seed: int = 0
    payload: str = "fp32"
    threads: int | None = None
    timeout_s: float = TIMEOUT_S

    @property
    def stop(self) -> int:
        """The first step that the large model does not do."""
        return self.num_inference_steps if self.switch_step is None else self.switch_step


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """The image (3, H, W), values in 0 to 1, and what it took: seconds of each component, bytes of each exchange."""

    pixels: Tensor
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]

    def write_png(self, path: Path) -> None:
        """Save the image. Raises `RunError` where it cannot be written."""
        from PIL import Image

        levels = (self.pixels * 255).round().to(torch.uint8).permute(1, 2, 0)
        try:
            with atomic_path(path) as temporary:
                Image.fromarray(levels.contiguous().numpy()).save(temporary, format="PNG")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error}") from error


def generate_image(run: ImageRun) -> GeneratedImage:
    """Carry out a run. Raises `IllegalPlanError` for one that breaks a rule and `RunError` where a part of it fails.

    Pixels are the decoder's output x / 2 + 1/2, cut off at 0 and 1. An image with NaN or infinity is a failure too:
    some networks overflow in fp16. The seconds of the first stage are those of its slowest rank.
    """
    check_switch(run)
    clock = _Clock(run.model.device)
    with clock.time("load"):  # every part that this process runs, so that no component's time holds it
        for name in ("text_encoders", "tokenizers", "vae", *(("unet",) if run.carrier == "loopback" else ())):
            getattr(run.model, name)  # built when it is first asked for
        if run.small:
            _ = run.small.unet
    with clock.time("text_encode"):
        conditioning = run.model.encode(
            [run.prompt], height_px=run.height_px, width_px=run.width_px, guidance_scale=run.guidance_scale
        )
    # to other processes the run goes without weights, which each of them makes or loads itself
    sent = run if run.carrier == "loopback" else replace(run, model=replace(run.model), small=None)
    ranks = run_ranks(
        denoise_stage,
        run.degree,
        kind=run.carrier,
        args=(sent, conditioning.to("cpu") if run.degree > 1 else conditioning),
        device=str(run.model.device),
        threads=run.threads,
        timeout_s=run.timeout_s,
    )
    clock.seconds["denoise"] = max(rank.seconds for rank in ranks)
    clock.bytes["received_by_busiest_rank"] = max(rank.received_bytes for rank in ranks)
    latents = _denoise_rest(run, ranks[0].transfer, clock)
    with clock.time("vae_decode"):
        images = decode(run.model.vae, latents.to(run.model.device))
    pixels = (images[0].float().cpu() / 2 + 0.5).clamp(0, 1)
    if not torch.isfinite(pixels).all():
        raise RunError("the image holds NaN or infinite values; run it with fp32")
    return GeneratedImage(pixels, clock.seconds, clock.bytes)


def check_switch(run: ImageRun) -> None:
    """Raises `IllegalPlanError` where switch step, small model and edge do not go together.

    A second stage needs its first step, a first step needs a second stage, and it lies in 0 to the number of steps.
    """
    problems = []
    has_second = run.small is not None or run.edge is not None
    if run.switch_step is not None and not has_second:
        rule = "from there on another model denoises, and none is named"
        problems.append(Problem("--switch-step", str(run.switch_step), rule, "Add --small-model or --edge."))
    if has_second and run.switch_step is None:
        problems.append(Problem("--switch-step", "not given", "says which step is the small model's first"))
    if not 0 <= run.stop <= run.num_inference_steps:
        rule = f"must lie in 0 to {run.num_inference_steps}, the number of steps"
        problems.append(Problem("--switch-step", str(run.stop), rule))
    if problems:
        raise IllegalPlanError(problems)


@dataclass(frozen=True, slots=True)
class _StageDone:
    transfer: LatentTransfer | None
    seconds: float
    received_bytes: int


def denoise_stage(group: Group, run: ImageRun, conditioning: Conditioning) -> _StageDone:
    """One rank of the first stage; rank 0 brings back what the next stage needs, on the CPU."""
    unet = rank_unet(run.model, group)
    conditioning = conditioning.to(group.device, unet.dtype)
    sampler = build_sampler(run.sampler, run.num_inference_steps, prediction=run.model.prediction, device=group.device)
    latents = seeded_latents(unet, images=1, height_px=run.height_px, width_px=run.width_px, seed=run.seed)
    latents *= sampler.init_noise_sigma
    denoiser = build_denoiser(run.method, unet, conditioning, group, run.settings, latents=latents)
    started_s = group.clock()
    latents = denoise(denoiser, sampler, latents, stop=run.stop)
    seconds = group.clock() - started_s
    transfer = capture_transfer(sampler, latents, run.stop, latent_space=run.latent_space, conditioning=conditioning)
    return _StageDone(to_cpu(transfer) if group.rank == 0 else None, seconds, group.traffic.received_bytes)


def to_cpu(transfer: LatentTransfer) -> LatentTransfer:
    """The same with every tensor in the machine's memory: another process, or another device, goes on from there."""
    return replace(
        transfer,
        latents=transfer.latents.cpu(),
        state=replace(transfer.state, history=tuple(tensor.cpu() for tensor in transfer.state.history)),
        embeds=None if transfer.embeds is None else transfer.embeds.cpu(),
        added={name: tensor.cpu() for name, tensor in transfer.added.items()},
    )


def _denoise_rest(run: ImageRun, transfer: LatentTransfer | None, clock: _Clock) -> Tensor:
    """The final latents: those of the first stage, or of the second one, here or at the edge."""
    if transfer is None:
        raise RunError("rank 0 brought nothing back")
    if run.stop == run.num_inference_steps:
        return transfer.latents
    if run.edge is not None:
        clock.bytes["handover"] = len(serialise(transfer, run.payload))
        with clock.time("handover_and_denoise_edge"):
            return finish_at_edge(run.edge, transfer, precision=run.payload, timeout_s=run.timeout_s)
    small = run.small or run.model
    conditioning = transfer.conditioning
    if conditioning is None:
        raise RunError("the hand-over has no embeddings")
    denoiser = SingleDenoiser(small.unet, conditioning.to(small.device, small.dtype))
    with clock.time("denoise_small"):
        return finish_run(transfer, denoiser, device=small.device)


class _Clock:
    """Seconds of each component and bytes of each exchange, as they come in."""

    def __init__(self, device: torch.device | str) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self._now: Callable[[], float] = lambda: synchronised_clock(torch.device(device))

    @contextmanager
    def time(self, component: str) -> Iterator[None]:
        started_s = self._now()
        yield
        self.seconds[component] = self._now() - started_s
