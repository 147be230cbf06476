"""`hybridsd-sim run`: one image in the words of the command line, checked, made into models and stages, and written.

With an address it is half of a hybrid run: the cloud's side, which hands over to an edge, or that edge itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hybridsd_sim.errors import IllegalPlanError, InputError, Problem, unknown_name
from hybridsd_sim.perf import Denoising, find_method
from hybridsd_sim.profiles import Profiles, load_profiles

from .hybrid import PRECISIONS as PAYLOADS
from .hybrid import Address, ImageRun, check_address, check_switch, generate_image, open_listener, serve_unet
from .models import Pipeline, build_sampler, load_pipeline
from .parallel import TIMEOUT_S, Carrier, Option, at_option, resolve_settings
from .profiling import PRECISIONS, denoising_at, is_first_process

MAX_TIMEOUT_S = 86400.0
"""A day; sockets and torch cannot count much further."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
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


def make_image(wanted: RunOptions, out: Path | None, edge: Address | None) -> dict[str, Any]:
    """Make the image, write it, and say what it took. Raises `InputError` for what cannot be run here.

    The result has the `seconds` of each component and the `bytes` of each exchange; `RunError` says which part failed.
    Under torchrun the first process writes the file.
    """
    check_options(wanted)
    if out is None or out.suffix.lower() != ".png":
        raise InputError(Problem("--out", "nothing" if out is None else str(out), "the image is a .png file"))
    if not out.absolute().parent.is_dir():
        raise InputError(Problem("--out", str(out), "there is no such folder", "Make it first."))
    if edge is not None:
        check_address(edge, "--edge")
    profiles = load_profiles(wanted.profiles)
    run = _image_run(wanted, profiles, edge)
    picture = generate_image(run)
    if is_first_process():
        picture.write_png(out)
    return {
        "image": str(out),
        "model": wanted.model,
        "method": run.method,
        "degree": run.degree,
        "ranks": run.carrier,
        "height_px": run.height_px,
        "width_px": run.width_px,
        "seconds": dict(picture.seconds),
        "bytes": dict(picture.bytes),
    }


def run_edge(wanted: RunOptions, address: Address, say: Callable[[str], None]) -> None:
    """Serve the last steps of other processes' runs until interrupted; `say` is told where.

    `say` gets HOST:PORT once the UNet is built. Whoever reaches the port may use it.
    """
    check_options(wanted)
    profiles = load_profiles(wanted.profiles)
    row, model = profiles.model(wanted.model), _model(wanted, wanted.model, wanted.weights, profiles)
    with open_listener(address) as listener:
        unet = model.unet  # built before anybody is told to call
        host, port = listener.getsockname()
        say(f"{host}:{port}")
        serve_unet(
            listener, unet, latent_space=row.latent_space, prediction=model.prediction, timeout_s=wanted.timeout_s
        )


def check_options(wanted: RunOptions) -> None:
    """Set the threads that were asked for. Raises `InputError` with every option that means nothing here."""
    known = (("--precision", wanted.precision, tuple(PRECISIONS)), ("--payload", wanted.payload, tuple(PAYLOADS)))
    problems = [unknown_name(place, name, names) for place, name, names in known if name not in names]
    if wanted.device not in {"cpu", "cuda"}:
        problems.append(unknown_name("--device", wanted.device, ("cpu", "cuda")))
    elif wanted.device == "cuda" and not torch.cuda.is_available():
        problems.append(Problem("--device", "cuda", "no CUDA device is here", "Use --device cpu."))
    problems += [
        Problem(place, str(size_px), "an image has at least one row and column", "Leave it out for native.")
        for place, size_px in (("--height-px", wanted.height_px), ("--width-px", wanted.width_px))
        if size_px is not None and size_px < 1
    ]
    if not math.isfinite(wanted.guidance_scale):
        rule, remedy = "must be a finite number", "Above 1 guides; 1 does not."
        problems.append(Problem("--guidance-scale", str(wanted.guidance_scale), rule, remedy))
    if not 0 < wanted.timeout_s <= MAX_TIMEOUT_S:
        rule = f"must be above 0 and at most {MAX_TIMEOUT_S:g} seconds, a day"
        problems.append(Problem("--timeout-s", str(wanted.timeout_s), rule, f"The default is {TIMEOUT_S:g}."))
    if problems:
        raise InputError(problems)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)


def _image_run(wanted: RunOptions, profiles: Profiles, edge: Address | None) -> ImageRun:
    row = profiles.model(wanted.model)
    if wanted.small_model and edge:
        raise InputError(Problem("--edge", f"with {wanted.small_model}", "the edge has its own model", "Keep one."))
    small = _model(wanted, wanted.small_model, wanted.small_weights, profiles) if wanted.small_model else None
    if small and (space := profiles.model(small.name).latent_space) != row.latent_space:
        rule = f"its latent space is {space}, that of {wanted.model} is {row.latent_space}"
        raise InputError(Problem("--small-model", small.name, rule, "Choose models of one latent space."))
    size = (wanted.height_px or wanted.width_px or row.native_px, wanted.width_px or wanted.height_px or row.native_px)
    job = denoising_at(row, size, 1, guided=wanted.guidance_scale > 1.0, precision=wanted.precision)
    build_sampler(wanted.sampler, wanted.num_inference_steps)  # refused now rather than after the models are built
    carrier: Carrier = "nccl" if wanted.device == "cuda" else "gloo"
    run = ImageRun(
        model=_model(wanted, wanted.model, wanted.weights, profiles),
        latent_space=row.latent_space,
        prompt=wanted.prompt,
        method=wanted.method,
        degree=wanted.degree,
        settings=_method_settings(wanted, job),
        carrier="loopback" if wanted.ranks == "loopback" or wanted.degree == 1 else carrier,
        small=small,
        edge=edge,
        switch_step=wanted.switch_step,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        height_px=size[0],
        width_px=size[1],
        sampler=wanted.sampler,
        seed=wanted.seed,
        payload=wanted.payload,
        threads=wanted.threads,
        timeout_s=wanted.timeout_s,
    )
    check_switch(run)
    return run


def _method_settings(wanted: RunOptions, job: Denoising) -> dict[str, Any]:
    """The method's settings, or its problems at the options of the command line."""
    try:
        return resolve_settings(wanted.method, job, wanted.degree, wanted.options)
    except IllegalPlanError as error:
        rules, flags = find_method(wanted.method), {"degree": "--degree", "guidance_scale": "--guidance-scale"}
        found = (at_option(problem, rules) for problem in error.problems)
        raise IllegalPlanError(
            replace(problem, place=flags.get(problem.place, problem.place)) for problem in found
        ) from None


def _model(wanted: RunOptions, name: str, weights: Path | None, profiles: Profiles) -> Pipeline:
    return load_pipeline(
        profiles.model(name).name,
        weights=weights,
        device=wanted.device,
        dtype=PRECISIONS[wanted.precision],
        profiles=profiles,
    )
