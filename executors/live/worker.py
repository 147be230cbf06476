"""The process side of a worker: ranks that wait for tasks and do them one after the other, with the models they hold.

Rank 0 leads. It talks to the pool, encodes prompts and decodes images, and after every step looks into its queue and
tells the other ranks over pipes whether to go on, so that all agree on what they do next. Waiting is blocking: an idle
worker takes no processor time. The processes end when whoever started them does, in the middle of a step if need be.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem, RunError, unknown_name
from hybridsd_sim.perf import PIXELS_PER_LATENT
from hybridsd_sim.profiles import load_profiles

from ..hybrid import PRECISIONS as PAYLOADS
from ..hybrid import (
    ExpectedTransfer,
    LatentTransfer,
    OnStep,
    capture_transfer,
    expected_transfer,
    parse,
    serialise,
    to_cpu,
)
from ..models import Conditioning, Pipeline, build_sampler, decode, load_pipeline, resume, sampler_state, seeded_latents
from ..parallel import (
    Alone,
    Denoiser,
    Group,
    RankFailure,
    build_denoiser,
    denoise,
    denoising_of,
    join_rendezvous,
    rank_unet,
    resolve_settings,
    synchronised_clock,
)
from ..profiling import PRECISIONS
from .tasks import Channel, MessageKind, Task, TaskQueue, TaskResult, WorkerSpec

MAX_DENOISERS = 16
"""Denoisers that a rank of several keeps, for as many models, sizes and guidance scales."""

_CONTINUE, _STOP = b"+", b"-"

_GRACE_S = 2.0
"""A rank that cannot start leaves rank 0 that long to say what it saw of it."""


class _TaskStopped(Exception):  # noqa: N818 -- no error: nobody wants the task any more
    """Ends a task between two of its steps."""


def run_rank(
    spec: WorkerSpec, rank: int, port: int, ends: Sequence[Connection], channel_end: socket.socket | None
) -> None:
    """A rank's whole life, in its own process.

    The ranks of a worker of several meet at `port`. `ends` are rank 0's pipes to the others, or another's one from it;
    `channel_end` is rank 0's socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; whoever started us decides
    if parent := multiprocessing.parent_process():

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
    if spec.cpus:
        os.sched_setaffinity(0, {spec.cpus[rank]})
    torch.set_num_threads(spec.threads)
    try:
        if channel_end is not None:
            _lead(spec, port, ends, Channel(channel_end))
        else:
            _follow(spec, rank, port, ends[0])
    except Exception as error:
        if not isinstance(error, EOFError) and not RankFailure.of(error).lost_another:
            raise
    sys.exit(1)  # the pool or another rank has gone, and whoever noticed said so


def _lead(spec: WorkerSpec, port: int, followers: Sequence[Connection], channel: Channel) -> None:
    try:
        runner = ModelRunner(spec, _group(spec, 0, port))
        runner.load_ends()
        runner.group.barrier()
    except Exception as error:  # noqa: BLE001 -- raised again by the pool
        channel.send(MessageKind.failed, 0, RankFailure.of(error))
        return
    channel.send(MessageKind.up)
    GroupLeader(runner, channel, followers).serve()


def _follow(spec: WorkerSpec, rank: int, port: int, leader: Connection) -> None:
    try:
        runner = ModelRunner(spec, _group(spec, rank, port))
        runner.group.barrier()
    except Exception:
        leader.poll(_GRACE_S)  # what ails all ranks is rank 0's to tell
        raise

    def await_leader(*_: object) -> None:
        if leader.recv_bytes() == _STOP:
            raise _TaskStopped

    while True:
        task, begun = pickle.loads(leader.recv_bytes())  # noqa: S301 -- from rank 0
        do_steps = runner.steps(task, begun, runner.sampler(task))
        with suppress(_TaskStopped):
            do_steps(await_leader)


def _group(spec: WorkerSpec, rank: int, port: int) -> Group:
    if spec.degree == 1:
        return Alone(spec.device)
    return join_rendezvous(rank, spec.degree, kind="nccl" if spec.device.startswith("cuda") else "gloo", port=port)


@dataclass(slots=True)
class _TaskTimer:
    """The seconds of a task, as they come in."""

    device: torch.device
    start_s: float
    text_encode_s: float = 0.0
    vae_decode_s: float = 0.0
    parse_s: float = 0.0
    serialise_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    step_began_s: float = 0.0

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part."""
        began_s = self.now()
        yield
        setattr(self, part, getattr(self, part) + self.now() - began_s)

    def begin_step(self) -> None:
        self.step_began_s = self.now()

    def end_step(self) -> float:
        """Seconds of the step that ends here."""
        self.step_s.append(self.now() - self.step_began_s)
        return self.step_s[-1]

    def now(self) -> float:
        """Seconds of the clock that all processes share, the device's work finished."""
        synchronised_clock(self.device)
        return time.monotonic()

    def done(self, payload: bytes, *, is_image: bool) -> TaskResult:
        return TaskResult(
            payload=payload, is_image=is_image, start_s=self.start_s, stop_s=self.now(),
            text_encode_s=self.text_encode_s, vae_decode_s=self.vae_decode_s, step_s=tuple(self.step_s),
            parse_s=self.parse_s, serialise_s=self.serialise_s,
        )  # fmt: skip


class GroupLeader:
    """Rank 0 at work: takes tasks from its inbox, leads the ranks through their steps, and answers."""

    def __init__(self, runner: ModelRunner, channel: Channel, followers: Sequence[Connection]) -> None:
        self.runner, self.channel, self.followers = runner, channel, followers
        self.queue = TaskQueue(channel)
        self._in_steps = False

    def serve(self) -> None:
        """Do tasks until the pool has gone. A task that fails is answered with its error, and the next one is done.

        A worker whose ranks stopped in different places cannot go on: its rank 0 ends, and the pool starts a new one.
        """
        while True:
            ticket, task = self.queue.next()
            try:
                self.channel.send(MessageKind.done, ticket, self._run_task(ticket, task))
            except _TaskStopped:
                self.channel.send(MessageKind.cancelled, ticket)
            except Exception as error:  # noqa: BLE001 -- raised again by the pool
                failure = RankFailure.of(error)
                if not failure.lost_another:
                    self.channel.send(MessageKind.failed, ticket, failure)
                if self._in_steps and self.followers:
                    return

    def _run_task(self, ticket: int, task: Task) -> TaskResult:
        watch = _TaskTimer(self.runner.group.device, start_s=time.monotonic())
        self._in_steps = False
        self.runner.check(task)
        sampler = self.runner.sampler(task)
        if task.begun is not None:
            with watch.time("parse_s"):
                begun = parse(task.begun, self.runner.expected(task))
            if begun.guidance_scale != task.guidance_scale:
                rule = f"this side runs {task.guidance_scale}"
                raise InputError(Problem("hand-over guidance_scale", str(begun.guidance_scale), rule))
            if begun.step > task.stop:
                rule = f"this task stops before step {task.stop}"
                raise InputError(Problem("hand-over step", str(begun.step), rule))
        else:
            noise, space = self.runner.noise(task) * sampler.init_noise_sigma, self.runner.latent_space(task)
            with watch.time("text_encode_s"):
                conditioning = self.runner.encode(task)
            begun = to_cpu(capture_transfer(sampler, noise, 0, latent_space=space, conditioning=conditioning))
        if self.queue.is_cancelled(ticket):
            raise _TaskStopped
        latents = self._steps(ticket, task, begun, sampler, watch)
        if not task.decode:
            state = self._write_state(task, begun, sampler, latents, task.stop, watch)
            return watch.done(state, is_image=False)
        with watch.time("vae_decode_s"):
            pixels = self.runner.picture(task, latents)
        with watch.time("serialise_s"):
            image = encode_png(pixels)
        return watch.done(image, is_image=True)

    def _steps(self, ticket: int, task: Task, begun: LatentTransfer, sampler: Any, watch: _TaskTimer) -> Tensor:
        def on_step(step: int, latents: Tensor) -> None:
            self.channel.send(MessageKind.step, ticket, (step, watch.end_step()))
            if task.checkpoint_every and (step + 1) % task.checkpoint_every == 0 and step + 1 < task.stop:
                state = self._write_state(task, begun, sampler, latents, step + 1, watch)
                self.channel.send(MessageKind.checkpoint, ticket, (step + 1, state))
            cancelled = self.queue.is_cancelled(ticket)
            # to all ranks, so that none waits for another that stopped
            self._broadcast(_STOP if cancelled else _CONTINUE)
            if cancelled:
                raise _TaskStopped
            watch.begin_step()

        self._in_steps = True
        if self.followers:
            self._broadcast(pickle.dumps((replace(task, begun=None), begun)))
        do_steps = self.runner.steps(task, begun, sampler)
        watch.begin_step()
        latents = do_steps(on_step)
        self._in_steps = False
        return latents

    def _broadcast(self, message: bytes) -> None:
        for follower in self.followers:
            follower.send_bytes(message)

    def _write_state(
        self, task: Task, begun: LatentTransfer, sampler: Any, latents: Tensor, step: int, watch: _TaskTimer
    ) -> bytes:
        """The state before `step` as a latent transfer of the task's precision."""
        with watch.time("serialise_s"):
            state = replace(begun, latents=latents, step=step, state=sampler_state(sampler))
            return serialise(state, task.payload)


# ---- Models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ReusableDenoiser:
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


class ModelRunner:
    """What a rank of a worker works with: every rank has the UNets, and rank 0 loads both ends of an image too.

    Raises `InputError` for models, weights and profiles that are not there.
    """

    def __init__(self, spec: WorkerSpec, group: Group) -> None:
        self.spec, self.group = spec, group
        profiles = load_profiles(spec.profiles)
        self._latent_spaces = {name: profiles.model(name).latent_space for name in spec.models}
        self.models: Mapping[str, Pipeline] = {
            name: load_pipeline(
                profiles.model(name).name,
                weights=spec.weights.get(name),
                vae=spec.vae,
                device=group.device,
                dtype=PRECISIONS[spec.precision],
                profiles=profiles,
            )
            for name in spec.models
        }
        self._settings = lru_cache(maxsize=64)(self._legal_settings)
        self._denoisers: dict[object, _ReusableDenoiser] = {}
        for model in self.models.values():
            _ = model.unet

    def load_ends(self) -> None:
        """Build text encoders and decoders now, so that no task waits for them."""
        for model in self.models.values():
            _ = model.text_encoders, model.tokenizers, model.vae

    # ---- What can be done -------------------------------------------------------------------------------------------

    def check(self, task: Task) -> None:
        """Raises `InputError` for a task that this worker cannot do, whatever state it goes on from.

        Unknown models and payloads, steps beyond the last, decoding before it, and sizes, guidance or options that
        break a rule of the worker's method.
        """
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
        return resolve_settings(self.spec.method, job, self.spec.degree, self.spec.options)

    def expected(self, task: Task) -> ExpectedTransfer:
        """What a latent transfer must be for the task to go on from it."""
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
        """What does the task's steps from where `begun` stands, with all ranks of the worker; returns the latents.

        A denoiser of several ranks is kept for the next task of its model, size and guidance scale, up to
        `MAX_DENOISERS`; the one built first makes room. Raises `RunError` for a hand-over without embeddings and
        `InputError` for a sampler's state that does not fit.
        """
        resume(sampler, begun.state, begun.step)
        unet, latents = self.models[task.model].unet, begun.latents
        if begun.conditioning is None:
            raise RunError("the hand-over has no embeddings")
        conditioning = begun.conditioning.to(self.group.device, unet.dtype)
        if self.group.size == 1:
            denoiser = build_denoiser("single", unet, conditioning, self.group, {}, latents=latents)
        else:
            key = (task.model, latents.shape, conditioning.guidance_scale, conditioning.embeds.shape)
            if key not in self._denoisers:
                while len(self._denoisers) >= MAX_DENOISERS:
                    del self._denoisers[next(iter(self._denoisers))]
                added = {name: tensor.clone() for name, tensor in conditioning.added.items()}
                held = replace(conditioning, embeds=conditioning.embeds.clone(), added=added)
                settings = self._settings(task.model, task.height_px, task.width_px, task.guidance_scale)
                own = rank_unet(self.models[task.model], self.group)
                built = build_denoiser(self.spec.method, own, held, self.group, settings, latents=latents)
                self._denoisers[key] = _ReusableDenoiser(built, held)
            denoiser = self._denoisers[key].take(conditioning)
        latents = latents.to(self.group.device)
        return lambda on_step: denoise(denoiser, sampler, latents, start=begun.step, stop=task.stop, on_step=on_step)

    def picture(self, task: Task, latents: Tensor) -> Tensor:
        """The image (3, H, W) of final latents, values in 0 to 1. Raises `RunError` for one with NaN or infinity."""
        image = decode(self.models[task.model].vae, latents.to(self.group.device))[0]
        pixels = (image.float().cpu() / 2 + 0.5).clamp(0, 1)
        if not torch.isfinite(pixels).all():
            raise RunError("the image holds NaN or infinite values; run it with fp32")
        return pixels


def encode_png(pixels: Tensor) -> bytes:
    """The image (3, H, W), values in 0 to 1, as a PNG file.

    Eight bits a channel, rounded to the nearest level.
    """
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="PNG")
    return file.getvalue()
