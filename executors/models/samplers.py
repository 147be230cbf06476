"""Samplers: Stable Diffusion's noise schedule, and the state that must cross a switch between two machines.

A sampler is a diffusers scheduler object; its steps are deterministic. Its timesteps are set when it is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem, unknown_name

NOISE_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The schedule that Stable Diffusion was trained with, and how its pipelines pick timesteps from it."""

MAX_STEPS = 998
"""1000 training steps less the offset of 1 and the interval that DPM-Solver++ leaves at the end: more run off them."""

PREDICTIONS: Mapping[str, str] = {"epsilon": "epsilon", "v": "v_prediction"}
"""What a UNet predicts, in the catalogue's words and in diffusers'."""


_SAMPLERS: Mapping[str, tuple[type, Mapping[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}

SAMPLERS = tuple(_SAMPLERS)
"""Names of the samplers: DDIM with eta 0, Euler without churn, DPM-Solver++ 2M (second order, multistep)."""


@dataclass(frozen=True, slots=True, eq=False)
class SamplerState:
    """What a sampler remembers of the steps done.

    `history`: past model outputs that coming steps still need, the oldest first, each the latents' shape. `order`
    counts the steps that have warmed a multistep solver up. `step` is the next step's index; None where a sampler does
    not count.
    """

    history: tuple[Tensor, ...] = ()
    order: int = 0
    step: int | None = None


def build_sampler(
    name: str, num_inference_steps: int, *, prediction: str = "epsilon", device: torch.device | str = "cpu"
) -> Any:
    """A diffusers sampler with its timesteps set.

    Initial noise N(0, 1) must be multiplied by its `init_noise_sigma`. `prediction` is `epsilon` or `v`. Raises
    `InputError` for another name, prediction or a number of steps outside 1 to `MAX_STEPS`.
    """
    problems = [] if name in SAMPLERS else [unknown_name("sampler", name, SAMPLERS)]
    if prediction not in PREDICTIONS:
        problems.append(Problem("prediction", repr(prediction), f"a UNet predicts {' or '.join(PREDICTIONS)}"))
    if not 1 <= num_inference_steps <= MAX_STEPS:
        rule = f"the schedule has 1000 training steps, so a run has 1 to {MAX_STEPS}"
        problems.append(Problem("num_inference_steps", str(num_inference_steps), rule))
    if problems:
        raise InputError(problems)
    kind, options = _SAMPLERS[name]
    sampler = kind(**NOISE_SCHEDULE, **options, prediction_type=PREDICTIONS[prediction])
    with warnings.catch_warnings():  # diffusers makes arrays of tensors in a way that NumPy 2 deprecates
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        sampler.set_timesteps(num_inference_steps, device=device)
    return sampler


def sampler_name(sampler: Any) -> str:
    """The name that `build_sampler` knows it by. Raises `InputError` for a sampler of another kind."""
    for name, (kind, _) in _SAMPLERS.items():
        if type(sampler) is kind:
            return name
    raise InputError(unknown_name("sampler", type(sampler).__name__, SAMPLERS))


def sampler_prediction(sampler: Any) -> str:
    """What the sampler takes a UNet to predict, in the catalogue's words."""
    return next(ours for ours, theirs in PREDICTIONS.items() if theirs == sampler.config.prediction_type)


def history_size(name: str, step: int) -> int:
    """Latent-sized tensors that a sampler carries into step `step`: order 2 needs the one before, once there is one.

    A solver of order n keeps n - 1 past model outputs (DPM-Solver++, arXiv 2211.01095); DDIM and Euler keep none.
    """
    return min(_solver_order(name) - 1, step)


def _solver_order(name: str) -> int:
    order: int = _SAMPLERS[name][1].get("solver_order", 1)
    return order


def sampler_state(sampler: Any) -> SamplerState:
    """What `resume` needs to go on after the steps that `sampler` has done, on this machine or on another.

    A solver of order n keeps n outputs but the coming step drops the oldest, so n - 1 of them travel.
    """
    outputs = getattr(sampler, "model_outputs", [])[1:]
    return SamplerState(
        history=tuple(output for output in outputs if output is not None),
        order=getattr(sampler, "lower_order_nums", 0),
        step=getattr(sampler, "step_index", None),
    )


def resume(sampler: Any, state: SamplerState, step: int) -> None:
    """Make a freshly built sampler go on at step `step` as the one that `state` was taken from would, to the bit.

    Raises `InputError` if the state belongs to another step or holds a history that this sampler cannot use.
    """
    name = sampler_name(sampler)
    problems = []
    size = history_size(name, step)
    if state.step not in (None, step):
        problems.append(Problem("sampler state", f"of step {state.step}", f"the run goes on at step {step}"))
    if len(state.history) != size:
        rule, remedy = f"{name} carries {size} past model outputs into step {step}", "Take it where the run stopped."
        problems.append(Problem("sampler history", f"{len(state.history)} tensors", rule, remedy))
    order = min(step, _solver_order(name)) if size else 0
    if state.order != order:
        problems.append(Problem("sampler order", str(state.order), f"{name} has order counter {order} at step {step}"))
    if problems:
        raise InputError(problems)
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(step)
    if hasattr(sampler, "model_outputs"):
        outputs = [tensor.to(sampler.timesteps.device) for tensor in state.history]
        sampler.model_outputs = [None] * (sampler.config.solver_order - len(outputs)) + outputs
        sampler.lower_order_nums = state.order
