"""What a worker of the live service is, what it is asked to do, and what it answers.

Times are seconds of `time.monotonic()`, which all processes of one machine share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from executors.denoiser import Option
from hybridsd_sim.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A worker: `degree` processes that work as one, of which rank 0 speaks for all.

    `models` are names of the catalogue, all loaded before the worker is up; with `weights` a model's parts come from
    its folder. `vae` names another decoder for models without weights. A process has `threads` CPU threads; `cpus` are
    the CPU of each rank, by its number on Linux, and none leaves the choice to the system. `options` are the method's,
    `profiles` a profiles folder of one's own.
    """

    name: str
    pool: str
    models: tuple[str, ...]
    method: str = "single"
    degree: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)
    threads: int = 1
    cpus: tuple[int, ...] = ()
    device: str = "cpu"
    precision: str = "fp32"
    weights: Mapping[str, Path] = field(default_factory=dict)
    profiles: Path | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.cpus and len(self.cpus) != self.degree:
            msg = f"worker {self.name}: {len(self.cpus)} CPUs for {self.degree} ranks"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A contiguous run of steps of one request on one worker.

    `key` is the caller's, unique among the tasks under way. Steps before `stop` are done here; where `stop` is
    `num_inference_steps` the latents are final, and `decode` then makes the image of them. `begun` is a serialised
    hand-over to go on from, of another site or a checkpoint of this one; None begins with noise from `seed`. Whenever
    a multiple of `checkpoint_every` steps of the image is done, the state is sent as a hand-over of precision
    `payload`; 0 never sends it. From one in fp32 a single device goes on to the bit; a parallel method does its
    synchronous steps again first.
    """

    key: str
    model: str
    prompt: str = ""
    seed: int = 0
    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    stop: int
    begun: bytes | None = None
    decode: bool = False
    payload: str = "fp32"
    checkpoint_every: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A task that is done: a PNG if `is_image`, else a serialised hand-over, and the seconds that each part took.

    The worker held the task from `start_s` to `stop_s`. Parts that the task did not have took 0 s. `step_s` has an
    entry for every step done, in order; `serialise_s` is that of the payload, PNG too, and of all checkpoints.
    """

    payload: bytes
    is_image: bool
    start_s: float
    stop_s: float
    text_encode_s: float
    vae_decode_s: float
    step_s: tuple[float, ...]
    parse_s: float
    serialise_s: float


class WorkerLost(RunError):  # noqa: N818 -- what happened to it, as in `except WorkerLost`
    """The worker died with the task.

    `checkpoint` is the last state that it had sent, a serialised hand-over from which a task like this one goes on at
    step `step`; None and 0 where it had sent nothing.
    """

    def __init__(self, reason: str, *, checkpoint: bytes | None = None, step: int = 0) -> None:
        super().__init__(reason)
        self.checkpoint = checkpoint
        self.step = step


class Cancelled(RunError):  # noqa: N818 -- likewise
    """The task was cancelled, in the queue or between two steps."""
