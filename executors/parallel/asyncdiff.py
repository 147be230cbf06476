"""AsyncDiff: the UNet cut into components that run side by side (arXiv 2406.06911; code czg1225/AsyncDiff).

A *unit* is the smallest part that can be placed on a device (`unet_units`); a *component* is a run of units in
execution order. Components are written as bounds: component n holds the units `bounds[n]` to `bounds[n + 1] - 1`.

Every rank holds the whole UNet and, after the synchronous steps, computes one component of it on inputs that the other
components made one round ago. The UNet's own forward runs through on every rank: a hook on each unit computes it where
it is the rank's own, hands out the output of the last round where the rank's own units read it, and otherwise a blank
of the right shape that nobody reads.

Stride 1 (degree = components): every step is a round, and the last rank has its noise. Stride 2 (degree = components +
1): a round serves two steps. The ranks compute their components for the second step's timestep already, from the
latent of the first; one more rank runs the last component for the first step's timestep, whose noise it has. The
tensors between components travel once a round, behind the noise and the sampler's step.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, pairwise
from statistics import median
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf import PIXELS_PER_LATENT, TIME_EMBEDDING, Unit, balanced_cut, unet_units

from ..models import Conditioning, plain_config, replica
from .denoiser import Denoiser, apply_guidance, match_memory_format, predict_noise
from .group import Group, Pending, synchronised_clock

HOOK = "hybridsd-component"

EVALUATIONS = 5
"""Whole evaluations behind a measured cost; its median is not moved by one slow one."""


def list_units(unet: UNet2DConditionModel) -> tuple[Unit, ...]:
    """The units of a UNet, with the work of the smallest image: names and connections depend on no size."""
    config = plain_config(unet.config)
    smallest_px = PIXELS_PER_LATENT << (len(config["block_out_channels"]) - 1)
    return unet_units(config, smallest_px, smallest_px)


def unit_modules(unet: UNet2DConditionModel, name: str) -> tuple[nn.Module, ...]:
    """The modules of the unit of this name in execution order; the last one's output is the unit's.

    Names are those of `unet_units`: `conv_in`, `down0.resnet2`, `mid.attention0`, `up1.upsampler`, `conv_out`.
    """
    if name == TIME_EMBEDDING:
        added = getattr(unet, "add_embedding", None)
        return (unet.time_embedding, added) if added is not None else (unet.time_embedding,)
    if name == "conv_in":
        return (unet.conv_in,)
    if name == "conv_out":
        return (unet.conv_norm_out, unet.conv_act, unet.conv_out)
    # `down0.resnet2` and the like; a sampler, the only one of its block, has no number
    found = re.fullmatch(r"([a-z]+)(\d*)\.([a-z]+)(\d*)", name)
    if found is None:
        raise ValueError(f"{name} is no unit of a UNet")
    block, block_number, part, number = found.groups()
    owner = unet.mid_block if block == "mid" else getattr(unet, f"{block}_blocks")[int(block_number or 0)]
    module: nn.Module = getattr(owner, f"{part}s")[int(number or 0)]
    return (module,)


def cut_by_macs(units: Sequence[Unit], components: int) -> list[int]:
    """The cut whose heaviest component has the fewest multiply-accumulates, as the planner cuts.

    Bounds of `components` runs of units: component n holds the units `bounds[n]` to `bounds[n + 1] - 1`.
    """
    return balanced_cut([unit.macs for unit in units], components)


def cut_by_time(
    unet: UNet2DConditionModel, conditioning: Conditioning, group: Group, latents: Tensor, components: int
) -> list[int]:
    """The cut whose slowest component is fastest, by the time of every unit on rank 0's device; the same on every rank.

    `latents` (images, C, H, W) give the size; their values do not matter.
    """
    count = len(list_units(unet))
    nanoseconds = torch.zeros(count, dtype=torch.int64, device=group.device)
    if group.rank == 0:
        measured = [round(seconds * 1e9) for seconds in time_units(unet, conditioning, latents)]
        nanoseconds = torch.tensor(measured, dtype=torch.int64, device=group.device)
    return balanced_cut(group.broadcast(nanoseconds, 0).tolist(), components)


@torch.inference_mode()
def time_units(unet: UNet2DConditionModel, conditioning: Conditioning, latents: Tensor) -> list[float]:
    """Seconds of every unit in a whole evaluation, the median of several; 0 for the time embedding.

    The device is synchronised around every unit, so that launches do not hide behind the work of the unit before. The
    UNet must carry no hooks yet and gets none.
    """
    names = [unit.name for unit in list_units(unet)]
    own = replica(unet)
    watches = {name: _UnitTimer(latents.device) for name in names if name != TIME_EMBEDDING}
    for name, watch in watches.items():
        for module in unit_modules(own, name):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(watch, "hybridsd-stopwatch")
    runs = []
    for _ in range(1 + EVALUATIONS):
        predict_noise(own, latents, torch.tensor(1), conditioning)
        runs.append([watches[name].read() if name in watches else 0.0 for name in names])
    return [median(seconds) for seconds in zip(*runs[1:], strict=True)]  # the first evaluation prepares kernels


class _UnitTimer(ModelHook):
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


def incoming_units(units: Sequence[Unit], bounds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each component the units of earlier ones whose outputs it reads, as input or over a skip connection."""
    # The output of a unit goes to the next one and to the resnet at the end of its skip connection.
    position = {unit.name: index for index, unit in enumerate(units)}
    readers = [
        [] if unit.name == TIME_EMBEDDING else [index + 1, *([position[unit.skip_to]] if unit.skip_to else [])]
        for index, unit in enumerate(units)
    ]
    return tuple(
        tuple(unit for unit in range(start) if any(start <= reader < stop for reader in readers[unit]))
        for start, stop in pairwise(bounds)
    )


def incoming_elements(units: Sequence[Unit], bounds: Sequence[int]) -> tuple[int, ...]:
    """For each component the elements per latent that arrive from other components in every round.

    Times latents (branches x images) and the precision's bytes that is what the component's rank receives.
    """
    return tuple(sum(units[unit].out_elements for unit in arriving) for arriving in incoming_units(units, bounds))


class UnitOutputs:
    """Which units a rank computes now, and the outputs of units that it holds: what the hooks of a rank share.

    `held` are the outputs, by unit, of units that the rank `needs`: to compute its own component, or to send them.
    """

    def __init__(self, needs: Collection[int]) -> None:
        self.computing = range(0)
        self.held: dict[int, Tensor] = {}
        self._needs = needs
        self._blanks: dict[int, Tensor] = {}

    def put(self, unit: int, output: Tensor) -> None:
        """A unit was computed: keep its output if it is needed, otherwise only its shape."""
        if unit in self._needs:
            self.held[unit] = output
        elif unit not in self._blanks:
            self._blanks[unit] = output.new_zeros(1).expand(output.shape)

    def get(self, unit: int) -> Tensor:
        """What stands for a unit that is not computed: its output of the last round, or a blank."""
        return self.held[unit] if unit in self.held else self._blanks[unit]

    def clear(self) -> None:
        """Forget all outputs and shapes, as before a run."""
        self.held.clear()
        self._blanks.clear()


class UnitHook(ModelHook):
    """Computes its unit or passes on what stands for it."""

    def __init__(self, unit: int, outputs: UnitOutputs) -> None:
        super().__init__()
        self._unit, self._outputs, self._in_tuple = unit, outputs, False

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._unit not in self._outputs.computing:
            output = self._outputs.get(self._unit)
            return (output,) if self._in_tuple else output
        result = _original_forward(self)(*args, **kwargs)
        self._in_tuple = isinstance(result, tuple)  # an attention block's is
        self._outputs.put(self._unit, result[0] if self._in_tuple else result)
        return result


class InnerHook(ModelHook):
    """Computes an inner module of a unit with its unit, otherwise lets the input through."""

    def __init__(self, unit: int, outputs: UnitOutputs) -> None:
        super().__init__()
        self._unit, self._outputs = unit, outputs

    def new_forward(self, module: nn.Module, hidden: Tensor) -> Tensor:
        computed: Tensor = _original_forward(self)(hidden) if self._unit in self._outputs.computing else hidden
        return computed


def _original_forward(hook: ModelHook) -> Callable[..., Any]:
    """The forward of the module that a hook is registered on, without the hook."""
    forward: Callable[..., Any] | None = hook.fn_ref.original_forward
    if forward is None:
        raise ValueError("the hook is registered on no module")
    return forward


class Boundaries:
    """The tensors between components: in every round one message from a rank to each that reads its units' outputs."""

    def __init__(self, group: Group, units: Sequence[Unit], bounds: Sequence[int]) -> None:
        last = len(bounds) - 2
        reads = incoming_units(units, bounds)
        by_rank = [reads[min(rank, last)] for rank in range(group.size)]  # an extra rank reads what the last one reads

        def message(sender: int, receiver: int) -> list[int]:
            return [unit for unit in by_rank[receiver] if bisect_right(bounds, unit) - 1 == sender]

        ranks = range(group.size)
        self.group = group
        self.incoming = {rank: part for rank in ranks if (part := message(rank, group.rank))}
        self.outgoing = {rank: part for rank in ranks if (part := message(group.rank, rank))}
        self._pending: Pending[dict[int, Tensor]] | None = None

    @property
    def units(self) -> set[int]:
        """The units whose outputs this rank sends or receives."""
        return {*chain(*self.incoming.values(), *self.outgoing.values())}

    def send(self, held: Mapping[int, Tensor]) -> None:
        """Set the round's messages on their way; `held` has the outputs to send and the shapes of those to come."""
        outgoing = {rank: torch.cat([held[unit].flatten() for unit in part]) for rank, part in self.outgoing.items()}
        incoming = {
            rank: held[part[0]].new_empty(sum(held[unit].numel() for unit in part))
            for rank, part in self.incoming.items()
        }
        self._pending = self.group.start_exchange(outgoing, incoming)

    def receive(self, held: dict[int, Tensor]) -> None:
        """Await the messages under way, if any, and put what they bring in the place of older outputs."""
        if self._pending is None:
            return
        arrived, self._pending = self._pending.wait(), None
        for rank, message in arrived.items():
            shapes = {unit: held[unit].shape for unit in self.incoming[rank]}
            pieces = message.split([shape.numel() for shape in shapes.values()])
            for (unit, shape), piece in zip(shapes.items(), pieces, strict=True):
                held[unit] = match_memory_format(piece.view(shape), held[unit])


class AsyncDiffDenoiser(Denoiser):
    """One rank of AsyncDiff, on a UNet whose modules are its own.

    `settings` are the method's with their defaults: `stride` and `warmup_steps`, the synchronous steps at the start of
    a run. `bounds` cut the UNet's units into degree - stride + 1 components; a rank alone has all units, whatever the
    stride. Raises `InputError` for any other bounds.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioning: Conditioning,
        group: Group,
        *,
        settings: Mapping[str, Any],
        bounds: Sequence[int],
    ) -> None:
        self.unet, self.conditioning, self.group = unet, conditioning, group
        self.stride: int = settings["stride"] if group.size > 1 else 1
        self.warmup_steps: int = settings["warmup_steps"]
        units = list_units(unet)
        components = group.size - self.stride + 1
        check_bounds(bounds, units, components)
        self.bounds = tuple(bounds)
        own = min(group.rank, components - 1)
        self.is_extra = group.rank == components
        self.every_unit, self.own_units = range(len(units)), range(bounds[own], bounds[own + 1])
        self.boundaries = Boundaries(group, units, bounds)
        self.outputs = UnitOutputs(self.boundaries.units)
        self.timesteps, self.steps_done = torch.empty(0), 0
        for index, unit in enumerate(units):
            if unit.name != TIME_EMBEDDING:
                *inner, last = unit_modules(unet, unit.name)
                for module in inner:
                    _register(module, InnerHook(index, self.outputs))
                _register(last, UnitHook(index, self.outputs))

    def begin(self, timesteps: Tensor) -> None:
        self.boundaries.receive(self.outputs.held)  # what an abandoned run left under way
        self.outputs.clear()
        self.timesteps, self.steps_done = timesteps, 0

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        """The guided noise of a step; a step that shares the round of the step before does not look at its latents."""
        place = (self.steps_done - self.warmup_steps) % self.stride
        synchronous = self.steps_done < self.warmup_steps
        self.steps_done += 1
        if synchronous:
            noise = self._evaluate(latents, timestep, self.every_unit)
        else:
            if place == 0:
                self._round_noise = self._compute_round(latents, step)
            # the own noise stays as it is for the round's other step
            source, noise = self.group.size - 1 - place, self._round_noise
            noise = self.group.broadcast(noise if self.group.rank == source else noise.new_empty(noise.shape), source)
        return apply_guidance(noise, self.conditioning.guidance_scale, latents.dtype)

    def _compute_round(self, latents: Tensor, step: int) -> Tensor:
        """Compute the own component on what the last round made; the noise where that is the last component.

        The extra rank works for `step`, the others for the last step of the round. A round that the run's end cuts
        short leaves them nothing to do.
        """
        self.boundaries.receive(self.outputs.held)
        own_step = step if self.is_extra else step + self.stride - 1
        if own_step < len(self.timesteps):
            noise = self._evaluate(latents, self.timesteps[own_step], self.own_units)
        else:
            noise = self.outputs.get(self.every_unit[-1])
        if step + self.stride < len(self.timesteps):
            self.boundaries.send(self.outputs.held)
        return noise

    def _evaluate(self, latents: Tensor, timestep: Tensor, units: range) -> Tensor:
        """The noise of every branch in the UNet's precision, of which only these units are computed."""
        self.outputs.computing = units
        return predict_noise(self.unet, latents, timestep, self.conditioning)


def _register(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
