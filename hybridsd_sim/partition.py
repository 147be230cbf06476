"""How a UNet divides over GPUs: stripes with halos, gathered keys and values, components and the tensors between them.

The arithmetic behind `methods`, from the layers themselves: nothing here knows a method's rules or an interconnect's
speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hybridsd_sim.unet import Layer, Unit, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoising:
    """The UNet evaluations that a method spreads over ranks: a stage of `num_steps` steps of one model at one size.

    `latents` counts the latents of one evaluation: images, doubled under classifier-free guidance (`guided`).
    `latent_elements` is the size of one latent. Bytes are counted at `element_bytes` an element.
    """

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    num_steps: int
    latents: int
    guided: bool
    latent_elements: int
    family: str = ""
    element_bytes: int = 2

    def noise_bytes(self) -> float:
        """Bytes of the predicted noise of one evaluation."""
        return float(self.latent_elements * self.latents * self.element_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """What the busiest rank does in one round: multiply-accumulates, launches, and the exchange it waits for.

    `ops_share` is its share of the model's kernel launches. `received_bytes` arrive in `messages` collectives; `window`
    is the share of the rank's own compute behind which they may hide: 0 blocks, 1 is the whole round. `latents` are
    those the rank holds.
    """

    macs_conv: float
    macs_linear: float
    macs_attention: float
    latents: float
    ops_share: float = 1.0
    received_bytes: float = 0.0
    messages: int = 0
    window: float = 0.0

    @property
    def macs(self) -> float:
        return self.macs_conv + self.macs_linear + self.macs_attention


def whole(job: Denoising, latents: float | None = None) -> RankWork:
    """One rank evaluates the whole UNet on `latents` latents (all of them by default)."""
    count = job.latents if latents is None else latents
    total = work(job.layers)
    return RankWork(
        macs_conv=total.macs_conv * count,
        macs_linear=total.macs_linear * count,
        macs_attention=total.macs_attention * count,
        latents=count,
    )


def stripe_work(job: Denoising, branch: int, latents: float, key_share: float) -> RankWork:
    """One rank's stripe: 1/branch of every layer that works on the image, all of the layers that do not.

    Self-attention scores fresh queries against `key_share` of all keys (1 is the whole image).
    """
    totals = {"conv": 0.0, "linear": 0.0, "attention": 0.0}
    for layer in job.layers:
        group = "attention" if layer.op.endswith("attention") else layer.op
        if group in totals:
            share = 1.0 / branch if layer.rows else 1.0
            totals[group] += layer.macs * share * (key_share if layer.op == "self_attention" else 1.0) * latents
    return RankWork(
        macs_conv=totals["conv"], macs_linear=totals["linear"], macs_attention=totals["attention"], latents=latents
    )


def component_work(job: Denoising, components: int) -> RankWork:
    """The heaviest of `components` contiguous parts of the UNet, and the tensors and noise that every round moves."""
    bounds = balanced_cut([unit.macs for unit in job.units], components)
    loads = [sum(unit.macs for unit in job.units[a:b]) for a, b in pairwise(bounds)]
    total = sum(loads)
    share = max(loads) / total
    everything = whole(job)
    sent = boundary_elements(job.units, bounds[1:-1]) * job.latents * job.element_bytes
    return RankWork(
        macs_conv=everything.macs_conv * share,
        macs_linear=everything.macs_linear * share,
        macs_attention=everything.macs_attention * share,
        latents=job.latents,
        ops_share=max(b - a for a, b in pairwise(bounds)) / len(job.units),
        received_bytes=sent + job.noise_bytes(),
        messages=boundary_tensors(job.units, bounds[1:-1]) + 1,
    )


def kv_bytes(job: Denoising, latents: float) -> float:
    """Bytes of the keys and values of all self-attention layers, whole image."""
    return sum(layer.kv_elements for layer in job.layers) * latents * job.element_bytes


def halo_bytes(job: Denoising, latents: float) -> float:
    """Bytes of the upper and lower boundary rows that one stripe gives its neighbours, over all convolutions.

    The first convolution reads the whole latent, which every rank holds.
    """
    elements = sum(layer.halo_elements for layer in job.layers if layer.unit != "conv_in")
    return 2 * elements * latents * job.element_bytes


def exchanged_layers(job: Denoising) -> int:
    """Layers that exchange something: self-attentions, convolutions with a halo, GroupNorms."""
    return sum(bool(layer.kv_elements or layer.halo_elements) or layer.op == "group_norm" for layer in job.layers)


def balanced_cut(loads: Sequence[int], parts: int) -> list[int]:
    """Bounds of the contiguous cut of `loads` into `parts` non-empty parts whose heaviest part is lightest."""
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
    return _walk_back(choice, len(loads), parts)


def _walk_back(choice: list[list[int]], end: int, parts: int) -> list[int]:
    bounds = [end]
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
