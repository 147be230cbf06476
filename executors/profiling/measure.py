"""How each component of a profile is timed: denoising steps on one rank or many, and everything around them.

A step is timed as `denoiser.denoise` runs it: the UNet, guidance, the exchanges, the sampler's step. The steps of a run
follow one another without a barrier, which would let tensors arrive while no clock runs; the gathered noise at the end
of each step keeps the ranks together. The time of a step of several processes is that of its slowest rank.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from ..hybrid import ExpectedTransfer, LatentTransfer, capture_transfer, parse, serialise
from ..models import (
    Pipeline,
    build_sampler,
    build_text_encoder,
    build_vae,
    decode,
    embed,
    load_unet,
    seeded_conditioning,
    seeded_latents,
    token_ids,
)
from ..parallel import (
    AsyncDiffDenoiser,
    Distributed,
    Group,
    build_denoiser,
    denoise,
    rank_unet,
    synchronised_clock,
)
from .devices import DeviceMeter, LocalDevice
from .grid import GUIDANCE_SCALE, ProfileTarget
from .timing import Meter, Stopwatch, Timing, measure

METERED = ("text_encode", "vae_decode", "model_load")
"""Components that run with nothing else in memory, so that the peak is their own."""

_HANDOVER_STEPS, _HANDOVER_STEP = 25, 10

_ACKNOWLEDGED = b"\x06"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProtocol:
    """Untimed runs, timed runs, and how the UNet runs."""

    warmup_runs: int = 3
    runs: int = 10
    runtime: str = "eager"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank measured of one component; `comm_bytes` is what it received in a run, `note` how it was made."""

    timing: Timing
    comm_bytes: int | None = None
    note: str = ""


# ---- Denoising steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """Steps of a run that are timed as one component: laps of `steps_a_lap` steps from `start` on."""

    component: str
    start: int
    laps: int
    steps_a_lap: int = 1

    @property
    def stop(self) -> int:
        return self.start + self.laps * self.steps_a_lap


def time_steps(
    group: Group, model: Pipeline, target: ProfileTarget, protocol: RunProtocol, threads: int
) -> dict[str, Measured]:
    """One rank's times of a steady step and of a synchronous one, by component, as far as the target asks for them.

    A round of AsyncDiff with stride 2 serves two steps; each is given half of it.
    """
    if group.device.type == "cpu":
        torch.set_num_threads(threads)  # which every thread has to be told
    spans, settings = _spans(target, protocol)
    unet = prepare_unet(rank_unet(model, group), protocol.runtime)
    conditioning = seeded_conditioning(
        unet, images=target.batch_size, guidance_scale=GUIDANCE_SCALE if target.guidance else 1.0
    )
    latents = seeded_latents(unet, images=target.batch_size, height_px=target.height_px, width_px=target.width_px)
    denoiser = build_denoiser(target.method, unet, conditioning, group, settings, latents=latents, timed_cut=True)
    # a last round that nobody times: there, some methods have nothing left to send
    sampler = build_sampler("ddim", spans[-1].stop + spans[-1].steps_a_lap, device=group.device)
    recorder = Recorder(group, spans, replays=protocol.runtime == "compiled" and group.device.type == "cuda")
    denoise(denoiser, sampler, latents * sampler.init_noise_sigma, on_step=recorder)
    note = ""
    if isinstance(denoiser, AsyncDiffDenoiser):  # without its cut by measured times a row cannot be made again
        note = f"cut at units {', '.join(map(str, denoiser.bounds))}"
    return {component: replace(measured, note=note) for component, measured in recorder.measured.items()}


def _spans(target: ProfileTarget, protocol: RunProtocol) -> tuple[list[Span], dict[str, Any]]:
    """Which steps are timed, and the method's settings with as many synchronous steps as that takes."""
    settings, stride = dict(target.settings), int(target.settings.get("stride", 1))
    spans, synchronous = [], int(settings.get("warmup_steps", 0))
    if "step_warmup" in target.components:
        spans.append(Span("step_warmup", protocol.warmup_runs, protocol.runs))
        synchronous = spans[0].stop
    if "warmup_steps" in settings:
        settings["warmup_steps"] = synchronous
    if "step" in target.components:
        untimed = -(-protocol.warmup_runs // stride) * stride
        spans.append(Span("step", synchronous + untimed, protocol.runs, stride))
    return spans, settings


def prepare_unet(unet: UNet2DConditionModel, runtime: str) -> UNet2DConditionModel:
    """The UNet as a runtime wants it: channels last on a GPU, compiled (there into CUDA graphs) if asked for."""
    on_gpu = unet.device.type == "cuda"
    if on_gpu:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers wraps it as a plain function
    if runtime == "compiled":
        torch.compiler.reset()  # graphs of another size would count against the limit of recompilations
        unet.compile(mode="reduce-overhead" if on_gpu else None, dynamic=False)
    return unet


class Recorder:
    """Times the spans of a run on one rank; called after every step. `measured` holds what is done, by component.

    `replays`: timed steps replay CUDA graphs, so that their peak memory is that of the untimed steps, which count from
    now on.
    """

    def __init__(self, group: Group, spans: Sequence[Span], *, replays: bool = False) -> None:
        self.measured: dict[str, Measured] = {}
        self._group, self._spans, self._replays = group, spans, replays
        # ranks in one process share its memory and the device's energy, so neither is any rank's own
        self._own = group.size == 1 or isinstance(group, Distributed)
        self._watch, self._received = Stopwatch(group.clock, self._meter()), 0

    def __call__(self, step: int, latents: Tensor) -> None:
        done = step + 1
        for span in self._spans:
            if span.start < done <= span.stop and (done - span.start) % span.steps_a_lap == 0:
                self._watch.lap()
            if done == span.stop:
                timing, per_step = self._watch.timing(), 1.0 / span.steps_a_lap
                samples_s = tuple(seconds * per_step for seconds in timing.samples_s)
                energy_j = None if timing.energy_j is None else timing.energy_j * per_step
                received = (self._group.traffic.received_bytes - self._received) * per_step / span.laps
                comm_bytes = round(received) if self._group.size > 1 else None
                timing = replace(timing, samples_s=samples_s, energy_j=energy_j)
                self.measured[span.component] = Measured(timing, comm_bytes)
            if done == span.start:
                meter = self._watch.meter if self._replays else self._meter()
                self._watch, self._received = Stopwatch(self._group.clock, meter), self._group.traffic.received_bytes
                self._watch.start()

    def _meter(self) -> Meter:
        return DeviceMeter(self._group.device, peak_from_now=self._replays) if self._own else Meter()


def slowest(ranks: Sequence[Measured]) -> Measured:
    """The step as a whole from what every rank measured: each sample is the slowest rank's, energy is the sum.

    Memory and bytes received are those of the rank with most of them. Memory or energy that one rank lacks is None.
    """
    samples_s = tuple(max(samples) for samples in zip(*(rank.timing.samples_s for rank in ranks), strict=True))
    peaks = [rank.timing.peak_memory_bytes for rank in ranks]
    energies = [rank.timing.energy_j for rank in ranks]
    timing = Timing(
        samples_s,
        max((peak for peak in peaks if peak is not None), default=None) if None not in peaks else None,
        sum(energy for energy in energies if energy is not None) if None not in energies else None,
    )
    return Measured(timing, max(rank.comm_bytes or 0 for rank in ranks), ranks[0].note)


# ---- Everything else ------------------------------------------------------------------------------------------------


def time_part(model: Pipeline, target: ProfileTarget, protocol: RunProtocol, here: LocalDevice) -> Measured:
    """The time of a component that is no denoising step: one prompt, a batch of images, one load, one payload.

    Memory and energy are read for the components in `METERED` alone. `comm_bytes` is the size of the payload, where
    there is one.
    """
    with _PARTS[target.components[0]](model, target) as (action, comm_bytes):
        timing = measure(
            action,
            clock=partial(synchronised_clock, torch.device(here.device)),
            warmup_runs=protocol.warmup_runs,
            runs=protocol.runs,
            meter=DeviceMeter(here.device) if target.components[0] in METERED else Meter(),
        )
    return Measured(timing, comm_bytes)


_Part = Iterator[tuple[Callable[[], object], int | None]]


@contextmanager
def _text_encode(model: Pipeline, target: ProfileTarget) -> _Part:
    if model.weights:
        encoder = model.text_encoders[model.encoder_names.index(target.table)]
    else:
        encoder = build_text_encoder(target.table, device=model.device, dtype=model.dtype)
    ids = token_ids(["a photograph of an astronaut riding a horse"])
    yield lambda: embed((encoder,), (ids,)), None


@contextmanager
def _vae_decode(model: Pipeline, target: ProfileTarget) -> _Part:
    vae = model.vae if model.weights else build_vae(target.table, device=model.device, dtype=model.dtype)
    shape = (target.batch_size, vae.config["latent_channels"], target.height_px // 8, target.width_px // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    yield lambda: decode(vae, latents), None


@contextmanager
def _model_load(model: Pipeline, _: ProfileTarget) -> _Part:
    """From safetensors that the system's file cache holds, as for a server that switches between models."""
    with tempfile.TemporaryDirectory(prefix="hybridsd-load-") as temporary:
        folder = Path(temporary)
        if model.weights:
            folder = model.weights / "unet"
        else:
            replace(model).unet.save_pretrained(folder)  # a copy that nobody keeps

        def load() -> None:
            for parameter in load_unet(folder, device=model.device, dtype=model.dtype).parameters():
                parameter.clone()  # read once: on a CPU, loading only maps the file into memory

        yield load, None


@contextmanager
def _handover(model: Pipeline, target: ProfileTarget) -> _Part:
    """Either end of a hand-over: the transfer written, or read."""
    transfer, precision = _sample_transfer(model, target)
    payload = serialise(transfer, precision)
    if target.components[0] == "handover_serialise":
        yield lambda: serialise(transfer, precision), len(payload)
    else:
        expected = ExpectedTransfer(latent_space=transfer.latent_space, prediction=transfer.prediction)
        yield lambda: parse(payload, expected), len(payload)


@contextmanager
def _exchange(model: Pipeline, target: ProfileTarget) -> _Part:
    """One round over a TCP connection of this host: the payload there, one byte back."""
    payload = serialise(*_sample_transfer(model, target))

    def acknowledge() -> None:
        """Answer every payload, until the sender hangs up."""
        connection, _ = listener.accept()
        with connection:
            left = len(payload)
            while received := len(connection.recv(min(left, 2**20))):
                left -= received
                if not left:
                    connection.sendall(_ACKNOWLEDGED)
                    left = len(payload)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=acknowledge, daemon=True)
        receiver.start()
        with socket.create_connection(listener.getsockname()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def exchange() -> None:
                connection.sendall(payload)
                connection.recv(1)

            yield exchange, len(payload)
        receiver.join()


def _sample_transfer(model: Pipeline, target: ProfileTarget) -> tuple[LatentTransfer, str]:
    """A latent transfer in the middle of a run with embeddings, on the model's device, and the payload's precision."""
    scale = GUIDANCE_SCALE if target.guidance else 1.0
    conditioning = seeded_conditioning(model.unet, images=target.batch_size, guidance_scale=scale)
    latents = seeded_latents(model.unet, images=target.batch_size, height_px=target.height_px, width_px=target.width_px)
    sampler = build_sampler("ddim", _HANDOVER_STEPS, prediction=model.prediction)
    transfer = capture_transfer(sampler, latents, _HANDOVER_STEP, latent_space="profiled", conditioning=conditioning)
    return transfer, "fp32" if model.dtype == torch.float32 else "fp16"


_PARTS = {
    "text_encode": _text_encode,
    "vae_decode": _vae_decode,
    "model_load": _model_load,
    "handover_serialise": _handover,
    "handover_parse": _handover,
    "exchange": _exchange,
}
