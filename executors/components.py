"""The UNet as AsyncDiff cuts it: its units as modules, what they cost, components and the tensors between them.

A *unit* is the smallest part that can be placed on a device (`hybridsd_sim.unet`); a *component* is a run of units in
execution order. Components are written as bounds: component n holds the units `bounds[n]` to `bounds[n + 1] - 1`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from executors.denoiser import Conditioning, predict
from executors.group import Group, synchronised_clock
from executors.models import described, replica
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.partition import balanced_cut
from hybridsd_sim.unet import PIXELS_PER_LATENT, Unit, unet_units

TIME_EMBEDDING = "time_embedding"
"""The one unit that every rank computes: it reads no image, and its output goes to every resnet."""
EVALUATIONS = 5
"""Whole evaluations behind a measured cost; its median is not moved by one slow one."""


def units_of(unet: UNet2DConditionModel) -> tuple[Unit, ...]:
    """The units of a UNet, with the work of the smallest image: names and connections depend on no size."""
    config = described(unet.config)
    smallest_px = PIXELS_PER_LATENT << (len(config["block_out_channels"]) - 1)
    return unet_units(config, smallest_px, smallest_px)


def unit_modules(unet: UNet2DConditionModel, name: str) -> tuple[nn.Module, ...]:
    """The modules of the unit of this name in execution order; the last one's output is the unit's."""
    if name == TIME_EMBEDDING:
        added = getattr(unet, "add_embedding", None)
        return (unet.time_embedding, added) if added is not None else (unet.time_embedding,)
    if name == "conv_in":
        return (unet.conv_in,)
    if name == "conv_out":
        return (unet.conv_norm_out, unet.conv_act, unet.conv_out)
    block, part = (_kind_and_number(text) for text in name.split("."))
    owner = unet.mid_block if block[0] == "mid" else getattr(unet, f"{block[0]}_blocks")[block[1]]
    return (getattr(owner, f"{part[0]}s")[part[1]],)


def _kind_and_number(text: str) -> tuple[str, int]:
    """`resnet2` is (resnet, 2); a sampler, the only one of its block, has no number."""
    kind, number = re.fullmatch(r"([a-z]+)(\d*)", text).groups()  # type: ignore[union-attr]
    return kind, int(number or 0)


def bounds_by_macs(units: Sequence[Unit], components: int) -> list[int]:
    """The cut whose heaviest component has the fewest multiply-accumulates, as the planner cuts."""
    return balanced_cut([unit.macs for unit in units], components)


def balanced_bounds(
    unet: UNet2DConditionModel, conditioning: Conditioning, group: Group, latents: Tensor, components: int
) -> list[int]:
    """The cut whose slowest component is fastest, by the time of every unit on rank 0's device; the same on every rank.

    `latents` (images, C, H, W) give the size; their values do not matter.
    """
    count = len(units_of(unet))
    nanoseconds = torch.zeros(count, dtype=torch.int64, device=group.device)
    if group.rank == 0:
        measured = [round(seconds * 1e9) for seconds in unit_seconds(unet, conditioning, latents)]
        nanoseconds = torch.tensor(measured, dtype=torch.int64, device=group.device)
    return balanced_cut(group.broadcast(nanoseconds, 0).tolist(), components)


@torch.inference_mode()
def unit_seconds(unet: UNet2DConditionModel, conditioning: Conditioning, latents: Tensor) -> list[float]:
    """Seconds of every unit in a whole evaluation, the median of several; 0 for the time embedding.

    The device is synchronised around every unit, so that launches do not hide behind the work of the unit before. The
    UNet must carry no hooks yet and gets none.
    """
    names = [unit.name for unit in units_of(unet)]
    own = replica(unet)
    watches = {name: _Stopwatch(latents.device) for name in names if name != TIME_EMBEDDING}
    for name, watch in watches.items():
        for module in unit_modules(own, name):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(watch, "hybridsd-stopwatch")
    runs = []
    for _ in range(1 + EVALUATIONS):
        predict(own, latents, torch.tensor(1), conditioning)
        runs.append([watches[name].read() if name in watches else 0.0 for name in names])
    return [median(seconds) for seconds in zip(*runs[1:], strict=True)]  # the first evaluation prepares kernels


class _Stopwatch(ModelHook):
    """Sums the seconds of a unit's modules."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._total_s, self._started_s = device, 0.0, 0.0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._started_s = synchronised_clock(self._device)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._total_s += synchronised_clock(self._device) - self._started_s
        return output

    def read(self) -> float:
        """The sum so far, which starts anew."""
        total_s, self._total_s = self._total_s, 0.0
        return total_s


def check_bounds(bounds: Sequence[int], units: Sequence[Unit], components: int) -> None:
    """Raises `InputError` where the bounds do not cut these units into as many non-empty components."""
    rising = all(start < stop for start, stop in pairwise(bounds))
    if len(bounds) != components + 1 or bounds[0] != 0 or bounds[-1] != len(units) or not rising:
        rule = f"must rise from 0 to {len(units)}, the number of units, in {components} steps: one a component"
        raise InputError(Problem("bounds", str([*bounds]), rule))


def arrivals(units: Sequence[Unit], bounds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each component the units of earlier ones whose outputs it reads, as input or over a skip connection."""
    readers = _readers(units)
    return tuple(
        tuple(unit for unit in range(start) if any(start <= reader < stop for reader in readers[unit]))
        for start, stop in pairwise(bounds)
    )


def _readers(units: Sequence[Unit]) -> list[list[int]]:
    """For each unit the units that take its output: the next one and the resnet at the end of its skip connection."""
    position = {unit.name: index for index, unit in enumerate(units)}
    return [
        [] if unit.name == TIME_EMBEDDING else [index + 1, *([position[unit.skip_to]] if unit.skip_to else [])]
        for index, unit in enumerate(units)
    ]


def incoming_elements(units: Sequence[Unit], bounds: Sequence[int]) -> tuple[int, ...]:
    """For each component the elements per latent that arrive from other components in every round."""
    return tuple(sum(units[unit].out_elements for unit in arriving) for arriving in arrivals(units, bounds))
