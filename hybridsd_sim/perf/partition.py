"""How a UNet divides over GPUs: stripes with halos, gathered keys and values, components and the tensors between them.

The arithmetic behind `parallel_methods`, from the layers themselves: nothing here knows a method's rules or an
interconnect's speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from hybridsd_sim.perf.roofline import Kernels, LayerTable
from hybridsd_sim.perf.unet import Layer, Unit

TIME_EMBEDDING = "time_embedding"
"""The one unit that every rank computes: it reads no image, and its output goes to every resnet."""


Exchange = Literal["none", "gather", "stripes", "broadcasts"]
"""How ranks talk: not at all, one small gather, many small tensors a layer each, or whole activations one by one."""

Cut = tuple[tuple[str, ...], ...]
"""Modules of each component of an AsyncDiff cut: units (`up1.resnet0`) or whole blocks (`down0`, `mid`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoising:
    """The UNet evaluations that a method spreads over ranks: a stage of `num_steps` steps of one model at one size.

    `latents` counts the latents of one evaluation: images, doubled under classifier-free guidance (`guided`).
    `latent_elements` is the size of one latent. Bytes are counted at `element_bytes` an element, weights at
    `weight_bytes`. `public_cuts` are those of AsyncDiff's public code for this network, by number of components.
    """

    table: LayerTable
    units: tuple[Unit, ...]
    num_steps: int
    latents: int
    guided: bool
    latent_elements: int
    family: str = ""
    element_bytes: float = 2.0
    weight_bytes: float = 2.0
    public_cuts: Mapping[int, Cut] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.table.layers

    def noise_bytes(self) -> float:
        """Bytes of the predicted noise of one evaluation."""
        return float(self.latent_elements * self.latents * self.element_bytes)

    def kernels(
        self,
        latents: float | None = None,
        *,
        stripe: float = 1.0,
        key_share: float = 1.0,
        units: Sequence[str] | None = None,
    ) -> Kernels:
        """A rank's share of one evaluation; see `LayerTable.kernels`."""
        return self.table.kernels(
            self.latents if latents is None else latents,
            stripe=stripe,
            key_share=key_share,
            units=units,
            weight_bytes=self.weight_bytes,
            element_bytes=self.element_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """What one rank does in one round: kernels, and the exchange that it waits for.

    `received_bytes` arrive in `messages` collectives, `blocking_messages` of which wait for everybody; `window` is the
    share of the rank's own compute behind which each of the others may hide: 0 blocks too, 1 is the whole round.
    `reused_ops` are those of modules that only hand their cached outputs on. `latents` are those the rank holds. For
    broadcasts, `received_bytes` are all that cross the link in a round, the rank's own among them.
    """

    kernels: Kernels
    latents: float
    exchange: Exchange = "none"
    received_bytes: float = 0.0
    messages: int = 0
    blocking_messages: int = 0
    window: float = 0.0
    reused_ops: float = 0.0

    @property
    def macs(self) -> float:
        return self.kernels.flops / 2.0


def whole(job: Denoising, latents: float | None = None) -> RankWork:
    """One rank evaluates the whole UNet on `latents` latents (all of them by default)."""
    count = job.latents if latents is None else latents
    return RankWork(kernels=job.kernels(count), latents=count)


def stripe_work(job: Denoising, branch: int, latents: float, key_share: float) -> RankWork:
    """One rank's stripe: 1/branch of every layer that works on the image, all of the layers that do not.

    Self-attention scores fresh queries against `key_share` of all keys (1 is the whole image). Keys and values of other
    stripes are copied beside its own, and every convolution's input beside its neighbours' rows: read and written once.
    """
    own = job.kernels(latents, stripe=1.0 / branch, key_share=key_share)
    if branch == 1:
        return RankWork(kernels=own, latents=latents)
    joined = job.table.exchanged.joined_elements * job.element_bytes * latents / branch
    copied = 2.0 * (kv_bytes(job, latents) * key_share + joined)
    return RankWork(kernels=own.and_bytes(copied), latents=latents)


def component_works(job: Denoising, components: int, *, public_cut: bool) -> tuple[RankWork, ...]:
    """Each of `components` parts of the UNet, and the tensors that every round moves between them.

    With `public_cut`, those of AsyncDiff's public code where it has this network: every module that it lists broadcasts
    what it put out. Otherwise contiguous parts whose heaviest is lightest, and only the tensors that cross a cut.
    """
    if public_cut and components in job.public_cuts:
        cut = job.public_cuts[components]
        modules = [module for component in cut for module in component]
        sent = sum(_listed_elements(job, module) for module in modules) * job.latents * job.element_bytes
        parts = [[unit for module in component for unit in _members(job, module)] for component in cut]
        return tuple(
            RankWork(
                kernels=job.kernels(units=[TIME_EMBEDDING, *units]),
                latents=job.latents,
                exchange="broadcasts",
                received_bytes=sent,
                messages=len(modules),
            )
            for units in parts
        )
    bounds = balanced_cut([unit.macs for unit in job.units], components)
    sent = boundary_elements(job.units, bounds[1:-1]) * job.latents * job.element_bytes
    names = [unit.name for unit in job.units]
    return tuple(
        RankWork(
            kernels=job.kernels(units=[TIME_EMBEDDING, *names[start:stop]]),
            latents=job.latents,
            exchange="broadcasts",
            received_bytes=sent + job.noise_bytes(),
            messages=boundary_tensors(job.units, bounds[1:-1]) + 1,
        )
        for start, stop in pairwise(bounds)
    )


def _members(job: Denoising, module: str) -> list[str]:
    """Units of a module: itself, or all of a block's."""
    return [unit.name for unit in job.units if unit.name == module or unit.name.startswith(f"{module}.")]


def _listed_elements(job: Denoising, module: str) -> int:
    """Elements that a listed module hands on, for one latent: a block its output and its skip connections.

    The last entry stands for two modules, the final norm and the final convolution.
    """
    if module == "conv_out":
        return sum(layer.out_elements for layer in job.layers if layer.unit == module)
    members = set(_members(job, module))
    units = [unit for unit in job.units if unit.name in members]
    skips = sum(unit.out_elements for unit in units if unit.skip_to) if len(units) > 1 else 0
    return units[-1].out_elements + skips


def kv_bytes(job: Denoising, latents: float) -> float:
    """Bytes of the keys and values of all self-attention layers, whole image."""
    return job.table.exchanged.kv_elements * latents * job.element_bytes


def halo_bytes(job: Denoising, latents: float) -> float:
    """Bytes of the upper and lower boundary rows that one stripe gives its neighbours, over all convolutions.

    The first convolution reads the whole latent, which every rank holds.
    """
    return 2 * job.table.exchanged.halo_elements * latents * job.element_bytes


def balanced_cut(loads: Sequence[int], parts: int) -> list[int]:
    """Bounds of the contiguous cut of `loads` into `parts` non-empty parts whose heaviest part is lightest.

    `parts` + 1 bounds, from 0 to the number of loads, found by dynamic programming over prefixes.
    """
    prefix = [0]
    for load in loads:
        prefix.append(prefix[-1] + load)
    best = [[float(total)] for total in prefix]
    choice: list[list[int]] = [[0] for _ in prefix]
    for part in range(1, parts):
        for end in range(len(prefix)):
            options = [(max(best[cut][part - 1], prefix[end] - prefix[cut]), cut) for cut in range(part, end)]
            value, cut = min(options, default=(float("inf"), 0))
            best[end].append(value)
            choice[end].append(cut)
    bounds = [len(loads)]  # the best cuts, traced back from the end
    for part in range(parts - 1, 0, -1):
        bounds.append(choice[bounds[-1]][part])
    return [0, *reversed(bounds)]


def boundary_elements(units: Sequence[Unit], cuts: Sequence[int]) -> int:
    """Elements of every tensor that crosses a cut, counted once: the running activation and the pending skips."""
    return sum(units[index].out_elements for index in _crossing(units, cuts))


def boundary_tensors(units: Sequence[Unit], cuts: Sequence[int]) -> int:
    """How many tensors cross a cut."""
    return len(_crossing(units, cuts))


def _crossing(units: Sequence[Unit], cuts: Sequence[int]) -> set[int]:
    position = {unit.name: index for index, unit in enumerate(units)}
    crossing = {cut - 1 for cut in cuts}
    for index, unit in enumerate(units):
        target = position[unit.skip_to] if unit.skip_to else index
        crossing |= {index for cut in cuts if index < cut <= target}
    return crossing


def elements_of(height_px: int, width_px: int) -> int:
    """Elements of one latent: 4 x H/8 x W/8."""
    return 4 * (height_px // 8) * (width_px // 8)
