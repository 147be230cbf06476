"""What a profiling run will measure: the grid that was asked for, as targets that are legal, with their work.

Everything that is wrong with a grid is said before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from diffusers.models import UNet2DConditionModel

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.perf import METHODS, Denoising, find_method
from hybridsd_sim.profiles import Model, Profiles

from ..models import Conditioning, build_unet
from ..parallel import Option, at_option, denoising_of, fixed_option_problems, with_fixed_options
from .devices import PRECISIONS
from .timing import check_runs

STEP_COMPONENTS = ("step", "step_warmup")

COMPONENTS = (
    *STEP_COMPONENTS, "vae_decode", "text_encode", "model_load", "handover_serialise", "handover_parse", "exchange",
)  # fmt: skip

RUNTIMES = ("eager", "compiled")

GUIDANCE_SCALE = 7.5

Ranks = Literal["process", "loopback"]

_COUNTED_STEPS = 100
"""Steps for which a method's phases are asked: more than any warm-up, so that both phases are there."""

_TRIFLE_FLOP = 1e9
"""Stands for the work of components that compute next to nothing, when the time left is guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A grid as it was asked for: every combination of these, as far as it is legal.

    `sizes` are (height_px, width_px); `guidance` holds True for guided steps, False for plain ones, or both. `options`
    go to the methods that have them. `ranks`: in processes of their own, each with its device (also where it is None),
    or in loopback.
    """

    models: Sequence[str]
    sizes: Sequence[tuple[int, int]] = ((512, 512),)
    methods: Sequence[str] = ("single",)
    degrees: Sequence[int] = (1,)
    batch_sizes: Sequence[int] = (1,)
    guidance: Sequence[bool] = (True,)
    runtime: str = "eager"
    precision: str = "fp32"
    components: Sequence[str] = STEP_COMPONENTS
    options: Mapping[str, Option] = field(default_factory=dict)
    ranks: Ranks | None = None
    warmup_runs: int = 3
    runs: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTarget:
    """One measurement: a single component of a model, or the steps of a method at one degree.

    `table` is the model's name, or the component's own for text encoders and autoencoders. `flop` is the work of one
    run of each component, that of the busiest rank; 0 where it is not arithmetic.
    """

    model: str
    table: str
    components: tuple[str, ...]
    height_px: int = 0
    width_px: int = 0
    batch_size: int = 1
    guidance: bool = False
    method: str = "single"
    degree: int = 1
    settings: Mapping[str, Option] = field(default_factory=dict)
    flop: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f" {self.height_px}x{self.width_px}" if self.height_px else ""
        batch = f" batch {self.batch_size}" if self.batch_size > 1 else ""
        guidance = " guided" if self.guidance else ""
        ranks = f" {self.method} x{self.degree}" if self.degree > 1 else ""
        return f"{self.table} {'+'.join(self.components)}{size}{batch}{guidance}{ranks}"

    @property
    def weight(self) -> float:
        """How long it may take, compared with other targets."""
        return sum(max(flop, _TRIFLE_FLOP) for flop in self.flop.values()) * self.degree

    def options(self, ranks: str) -> str:
        """The row's options. The number of synchronous steps is left out: their cost does not depend on it."""
        shown = {key: value for key, value in self.settings.items() if key != "warmup_steps"}
        if self.degree > 1:
            shown["ranks"] = ranks
        return ";".join(f"{key}={option_text(value)}" for key, value in sorted(shown.items()))


def option_text(value: Option) -> str:
    """An option's value as it stands in a row."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_targets(sweep: Sweep, profiles: Profiles) -> tuple[list[ProfileTarget], list[Problem]]:
    """What of the grid is legal, in the order of measuring, and why the rest is not.

    Raises `InputError` for names nobody knows, for options that no method of the grid has, and for a method that is
    legal nowhere in the grid.
    """
    check_runs(sweep.warmup_runs, sweep.runs)
    if problems := list(_sweep_problems(sweep, profiles)):
        raise InputError(problems)
    targets: dict[str, ProfileTarget] = {}
    refused: list[Problem] = []
    for name in sweep.models:
        model = profiles.model(name)
        steps: list[ProfileTarget] = []
        for method in sweep.methods if set(STEP_COMPONENTS) & {*sweep.components} else ():
            legal, problems = _method_targets(sweep, model, method)
            if not legal:
                raise InputError(problems)
            steps += legal
            refused += problems
        for target in (*steps, *_part_targets(sweep, model, profiles)):
            targets.setdefault(str(target), target)  # two models may have one autoencoder
    return list(targets.values()), refused


def _sweep_problems(sweep: Sweep, profiles: Profiles) -> Iterator[Problem]:
    known = (
        ("--models", sweep.models, tuple(profiles.models)),
        ("--methods", sweep.methods, tuple(METHODS)),
        ("--components", sweep.components, COMPONENTS),
        ("--runtime", (sweep.runtime,), RUNTIMES),
        ("--precision", (sweep.precision,), tuple(PRECISIONS)),
    )
    for place, names, there in known:
        yield from (unknown_name(place, name, there) for name in names if name not in there)
    for place, numbers in (("--degrees", sweep.degrees), ("--batch-sizes", sweep.batch_sizes)):
        yield from (Problem(place, str(number), "must be at least 1") for number in numbers if number < 1)
    own = sorted({key for name in sweep.methods if name in METHODS for key in METHODS[name].defaults})
    for key, value in sweep.options.items():
        if key == "warmup_steps":
            rule = "synchronous and steady steps are timed apart, so their number changes no row"
            yield Problem(f"--option {key}", option_text(value), rule, "Leave it out.")
        elif key not in own:
            yield Problem(f"--option {key}", option_text(value), "no method of the grid has this option")
    parallel = [name for name in sweep.methods if name != "single"]
    if sweep.runtime == "compiled" and parallel and set(STEP_COMPONENTS) & {*sweep.components}:
        rule = "the exchanges between ranks stand inside the UNet, where a compiled graph cannot wait for them"
        yield Problem("--runtime compiled", ", ".join(parallel), rule, "Measure parallel methods with --runtime eager.")


# ---- Denoising steps ------------------------------------------------------------------------------------------------


def _method_targets(sweep: Sweep, model: Model, method: str) -> tuple[list[ProfileTarget], list[Problem]]:
    """The targets of one method. Degree 1 of any method is `single`, so parallel methods begin at 2."""
    degrees = [degree for degree in sweep.degrees if (degree == 1) == (method == "single")]
    if not degrees:
        rule = f"{method} runs {'at degree 1' if method == 'single' else 'from degree 2'}"
        return [], [Problem("--degrees", ", ".join(map(str, sweep.degrees)), rule)]
    rules = find_method(method)
    asked = {key: value for key, value in sweep.options.items() if key in rules.defaults}
    options = with_fixed_options(rules, asked)
    legal: list[ProfileTarget] = []
    refused: list[Problem] = []
    for size, batch_size, guided, degree in product(sweep.sizes, sweep.batch_sizes, sweep.guidance, degrees):
        try:
            job = denoising_at(model, size, batch_size, guided=guided, precision=sweep.precision)
        except InputError as error:
            refused += error.problems
            continue
        where = f"{model.name} {size[0]}x{size[1]} {method} x{degree}: "
        if problems := [*rules.problems(job, degree, asked), *fixed_option_problems(rules, asked)]:
            refused += [replace(p, place=where + p.place) for p in (at_option(p, rules) for p in problems)]
            continue
        # of the busiest rank
        rounds = {phase.name: 2.0 * phase.work.macs for phase in rules.phases(job, degree, options)}
        settings = rules.settings(job, options)
        flop = {"step": rounds.get("steady", rounds.get("warmup", 0.0)) / int(settings.get("stride", 1))}
        if "warmup" in rounds:
            flop["step_warmup"] = rounds["warmup"]
        flop = {name: flop[name] for name in STEP_COMPONENTS if name in flop and name in sweep.components}
        if not flop:
            rule = f"{method} has no such steps"
            refused.append(Problem(where + "--components", ", ".join(sweep.components), rule))
            continue
        target = ProfileTarget(
            model=model.name, table=model.name, components=tuple(flop), height_px=size[0], width_px=size[1],
            batch_size=batch_size, guidance=guided, method=method, degree=degree, settings=settings, flop=flop,
        )  # fmt: skip
        legal.append(target)
    return legal, refused


def denoising_at(model: Model, size: tuple[int, int], batch_size: int, *, guided: bool, precision: str) -> Denoising:
    """The UNet evaluations of a model at a size (height_px, width_px), as `perf.Method` asks for them."""
    conditioning = Conditioning(embeds=torch.empty(0), guidance_scale=GUIDANCE_SCALE if guided else 1.0)
    unet = _shapes(json.dumps(dict(model.config), sort_keys=True), precision)
    height_px, width_px = size
    return denoising_of(
        unet, conditioning, images=batch_size, height_px=height_px, width_px=width_px, steps=_COUNTED_STEPS
    )


@lru_cache(maxsize=16)
def _shapes(config: str, precision: str) -> UNet2DConditionModel:
    return build_unet(json.loads(config), device="meta", dtype=PRECISIONS[precision])


# ---- Everything else ------------------------------------------------------------------------------------------------


def _part_targets(sweep: Sweep, model: Model, profiles: Profiles) -> Iterator[ProfileTarget]:
    for component in sweep.components:
        if component == "text_encode":
            for name in model.text_encoders:
                flop = profiles.component(name).flop(512, 512)
                yield ProfileTarget(model=model.name, table=name, components=(component,), flop={component: flop})
        elif component == "vae_decode":
            for name, size, batch in product(
                dict.fromkeys((model.vae, model.small_vae)), sweep.sizes, sweep.batch_sizes
            ):
                flop = profiles.component(name).flop(*size) * batch
                yield _sized(model, name, component, size, batch, guided=False, flop=flop)
        elif component == "model_load":
            yield ProfileTarget(model=model.name, table=model.name, components=(component,), flop={component: 0.0})
        elif component not in STEP_COMPONENTS:
            for size, batch, guided in product(sweep.sizes, sweep.batch_sizes, sweep.guidance):
                yield _sized(model, model.name, component, size, batch, guided=guided, flop=0.0)


def _sized(
    model: Model, table: str, component: str, size: tuple[int, int], batch: int, *, guided: bool, flop: float
) -> ProfileTarget:
    return ProfileTarget(
        model=model.name, table=table, components=(component,), height_px=size[0], width_px=size[1],
        batch_size=batch, guidance=guided, flop={component: flop},
    )  # fmt: skip
