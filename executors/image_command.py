"""`hybridsd-sim run`: one image in the words of the command line, checked, made into models and stages, and written.

With an address it is half of a hybrid run: the cloud's side, which hands over to an edge, or that edge itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.profiles import Profiles, load_profiles

from .hybrid import PRECISIONS as PAYLOADS
from .hybrid import Address, ImageRun, check_address, check_switch, generate_image, open_listener, serve_unet
from .models import Pipeline, build_sampler, load_pipeline
from .parallel import TIMEOUT_S, Carrier, Option, resolve_settings
from .profiling import PRECISIONS, denoising_at, is_first_process

MAX_TIMEOUT_S = 86400.0
"""A day; sockets and torch cannot count much further."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A run in the words of the command line; see `hybridsd-sim run --help`.

    A side of the image that is None is as long as the other; with neither the image has the model's native size.
    """

    model: str
    small_model: str | None = None
    switch_step: int | None = None
    method: str = "single"
    degree: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)
    ranks: str = "loopback"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height_px: int | None = None
    width_px: int | None = None
    sampler: str = "ddim"
    seed: int = 0
    prompt: str = ""
    precision: str = "fp32"
    payload: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    timeout_s: float = TIMEOUT_S
    weights: Path | None = None
    small_weights: Path | None = None
    profiles: Path | None = None


def make_image(ask: Ask, out: Path | None, edge: Address | None) -> dict[str, Any]:
    """Make the image, write it, and say what it took. Raises `InputError` for what cannot be run here."""
    check_words(ask)
    path = _checked_file(out)
    if edge is not None:
        check_address(edge, "--edge")
    profiles = load_profiles(ask.profiles)
    run = _image_run(ask, profiles, edge)
    picture = generate_image(run)
    if is_first_process():
        picture.write_png(path)
    return {
        "image": str(path),
        "model": ask.model,
        "method": run.method,
        "degree": run.degree,
        "ranks": run.carrier,
        "height_px": run.height_px,
        "width_px": run.width_px,
        "seconds": dict(picture.seconds),
        "bytes": dict(picture.bytes),
    }


def be_edge(ask: Ask, address: Address, say: Callable[[str], None]) -> None:
    """Serve the last steps of other processes' runs until interrupted; `say` is told where."""
    check_words(ask)
    profiles = load_profiles(ask.profiles)
    row, model = profiles.model(ask.model), _model(ask, ask.model, ask.weights, profiles)
    with open_listener(address) as listener:
        unet = model.unet  # built before anybody is told to call
        host, port = listener.getsockname()
        say(f"{host}:{port}")
        serve_unet(listener, unet, latent_space=row.latent_space, prediction=model.prediction, timeout_s=ask.timeout_s)


def check_words(ask: Ask) -> None:
    """Raises `InputError` with every word and number that means nothing, and sets the threads that were asked for."""
    known = (("--precision", ask.precision, tuple(PRECISIONS)), ("--payload", ask.payload, tuple(PAYLOADS)))
    problems = [unknown_name(place, name, names) for place, name, names in known if name not in names]
    if ask.device not in {"cpu", "cuda"}:
        problems.append(unknown_name("--device", ask.device, ("cpu", "cuda")))
    elif ask.device == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("--device", "cuda", "no CUDA device is here", "Use --device cpu."))
    problems += _meaningless(ask)
    if problems:
        raise InputError(problems)
    if ask.threads:
        torch.set_num_threads(ask.threads)


def _meaningless(ask: Ask) -> Iterator[Problem]:
    for place, size_px in (("--height-px", ask.height_px), ("--width-px", ask.width_px)):
        if size_px is not None and size_px < 1:
            yield Problem(place, str(size_px), "an image has at least one row and column", "Leave it out for native.")
    if not math.isfinite(ask.guidance_scale):
        rule = "must be a finite number"
        yield Problem("--guidance-scale", str(ask.guidance_scale), rule, "Above 1 guides; 1 does not.")
    if not 0 < ask.timeout_s <= MAX_TIMEOUT_S:
        rule = f"must be above 0 and at most {MAX_TIMEOUT_S:g} seconds, a day"
        yield Problem("--timeout-s", str(ask.timeout_s), rule, f"The default is {TIMEOUT_S:g}.")


def _checked_file(out: Path | None) -> Path:
    """The image's path, before the work that it takes."""
    if out is None or out.suffix.lower() != ".png":
        raise InputError(Problem("--out", "nothing" if out is None else str(out), "the image is a .png file"))
    if not out.absolute().parent.is_dir():
        raise InputError(Problem("--out", str(out), "there is no such folder", "Make it first."))
    return out


def _image_run(ask: Ask, profiles: Profiles, edge: Address | None) -> ImageRun:
    row = profiles.model(ask.model)
    if ask.small_model and edge:
        raise InputError(Problem("--edge", f"with {ask.small_model}", "the edge has its own model", "Keep one."))
    small = _model(ask, ask.small_model, ask.small_weights, profiles) if ask.small_model else None
    if small and (space := profiles.model(small.name).latent_space) != row.latent_space:
        rule = f"its latent space is {space}, that of {ask.model} is {row.latent_space}"
        raise InputError(Problem("--small-model", small.name, rule, "Choose models of one latent space."))
    size = (ask.height_px or ask.width_px or row.native_px, ask.width_px or ask.height_px or row.native_px)
    job = denoising_at(row, size, 1, guided=ask.guidance_scale > 1.0, precision=ask.precision)
    build_sampler(ask.sampler, ask.num_inference_steps)  # refused now rather than after the models are built
    run = ImageRun(
        model=_model(ask, ask.model, ask.weights, profiles),
        latent_space=row.latent_space,
        prompt=ask.prompt,
        method=ask.method,
        degree=ask.degree,
        settings=resolve_settings(ask.method, job, ask.degree, ask.options),
        carrier=_carrier(ask),
        small=small,
        edge=edge,
        switch_step=ask.switch_step,
        num_inference_steps=ask.num_inference_steps,
        guidance_scale=ask.guidance_scale,
        height_px=size[0],
        width_px=size[1],
        sampler=ask.sampler,
        seed=ask.seed,
        payload=ask.payload,
        threads=ask.threads,
        timeout_s=ask.timeout_s,
    )
    check_switch(run)
    return run


def _model(ask: Ask, name: str, weights: Path | None, profiles: Profiles) -> Pipeline:
    return load_pipeline(
        profiles.model(name).name,
        weights=weights,
        device=ask.device,
        dtype=PRECISIONS[ask.precision],
        profiles=profiles,
    )


def _carrier(ask: Ask) -> Carrier:
    if ask.ranks == "loopback" or ask.degree == 1:
        return "loopback"
    return "nccl" if ask.device == "cuda" else "gloo"
