"""Every layer of a UNet from its config: shapes, parameters, work.

The config is that of diffusers' `UNet2DConditionModel` (only fields that differ from its defaults need be written); the
layers are those of diffusers, in execution order, counted without torch and without weights. All figures are for ONE
latent: classifier-free guidance runs a batch of two. A multiply-accumulate is one MAC; FLOPs are 2 x MACs. Norms,
activations and sums count no MACs, as in torch.utils.flop_counter.

A *layer* is one module or one attention product. A *unit* is what AsyncDiff can place on a device: `time_embedding`,
`conv_in`, a resnet, an attention block (a whole Transformer2DModel), a sampler, `conv_out` (with the norm before it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf.unet_config import Blueprint, blueprint, config_text

Op = Literal["conv", "linear", "self_attention", "cross_attention", "group_norm", "layer_norm"]


PIXELS_PER_LATENT = 8
"""Pixels of the image behind one element of the latent, in each direction (AutoencoderKL and TAESD)."""


TEXT_TOKENS = 77
"""Length of a CLIP prompt, padding included."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a UNet at one size, for one latent.

    `rows` and `tokens` (rows x width) are those of the grid that the layer writes; both are 0 for work that does not
    depend on the image (time embeddings, keys and values of the text), which patch parallelism repeats on every device.
    `macs` of an attention op are the score and value products alone; its projections are linear layers beside it.
    `in_elements` are what it reads: for attention the queries, keys and values, `head_width` wide in every head.
    `kv_elements` (self-attention): keys and values together. `halo_elements` (convolutions wider than 1 x 1): the input
    rows beyond ONE edge of a stripe, padding x input width x input channels. DistriFusion publishes both edges of every
    stripe, so a device sends 2 x halo_elements a latent for each convolution but `conv_in`, whose input every device
    holds whole (arXiv 2402.19481; distrifuser `modules/pp/conv2d.py`).
    """

    path: str
    unit: str
    op: Op
    params: int
    macs: int
    rows: int
    tokens: int
    in_elements: int
    out_elements: int
    kv_elements: int = 0
    halo_elements: int = 0
    head_width: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """A resnet, attention block, sampler or end piece: the smallest part that can be placed on a device of its own.

    `macs` include the attention products. `skip_to` names the up-path resnet that takes this unit's output a second
    time, by concatenation, besides the unit that follows; None where only the next unit needs it.
    """

    name: str
    macs: int
    params: int
    out_elements: int
    skip_to: str | None = None


@dataclass(frozen=True, slots=True)
class WorkTotals:
    """Parameters and multiply-accumulates by kind of a set of layers, for one latent."""

    params: int
    macs_conv: int
    macs_linear: int
    macs_attention: int

    @property
    def macs(self) -> int:
        return self.macs_without_attention + self.macs_attention

    @property
    def macs_without_attention(self) -> int:
        """MACs as thop and fvcore count them (and Hybrid SD and AsyncDiff print them): no score and value products."""
        return self.macs_conv + self.macs_linear


def unet_layers(config: Mapping[str, Any], height_px: int, width_px: int) -> tuple[Layer, ...]:
    """Every layer of the UNet with this config at this image size, in execution order.

    `config` holds diffusers' fields and, for pruned models, those of `unet_config`. Sizes are multiples of
    8 x 2^(levels - 1) pixels. Raises `InputError` for fields, block types and sizes that are not supported.
    """
    return _layers(config_text(config), height_px, width_px)


def unet_units(config: Mapping[str, Any], height_px: int, width_px: int) -> tuple[Unit, ...]:
    """The units of `unet_layers` in execution order, with the skip connections that a cut between devices may cross."""
    return _units(config_text(config), height_px, width_px)


def unet_params(config: Mapping[str, Any]) -> int:
    """Number of parameters, which no image size changes."""
    smallest_px = PIXELS_PER_LATENT << len(blueprint(config_text(config)).channels)
    return total_work(unet_layers(config, smallest_px, smallest_px)).params


def total_work(layers: Iterable[Layer]) -> WorkTotals:
    """Parameters and MACs of any set of layers, summed by kind."""
    params, macs = 0, dict.fromkeys(("conv", "linear", "attention", "norm"), 0)
    for layer in layers:
        params += layer.params
        macs[layer.op.rpartition("_")[2]] += layer.macs
    return WorkTotals(params, macs["conv"], macs["linear"], macs["attention"])


# ---- Layers: one builder per kind -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where layers stand: module path, unit and activation grid."""

    path: str
    unit: str
    rows: int = 0
    width: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    def at(self, name: str) -> _Place:
        """A module inside this one, of the same unit."""
        return _Place(f"{self.path}.{name}", self.unit, self.rows, self.width)

    def member(self, kind: str, index: int) -> _Place:
        """A resnet or attention block of this block: a unit of its own."""
        return _Place(f"{self.path}.{kind}s.{index}", f"{self.unit}.{kind}{index}", self.rows, self.width)


def _conv(place: _Place, channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1) -> Layer:
    weights = channels * out_channels * kernel * kernel
    return Layer(
        path=place.path,
        unit=place.unit,
        op="conv",
        params=weights + out_channels,
        macs=weights * place.tokens,
        rows=place.rows,
        tokens=place.tokens,
        in_elements=channels * place.tokens * stride * stride,
        out_elements=out_channels * place.tokens,
        halo_elements=(kernel // 2) * place.width * stride * channels,
    )


def _linear(place: _Place, width: int, out_width: int, *, bias: bool = True, vectors: int = 0) -> Layer:
    """A linear layer over the image tokens, or over `vectors` that do not depend on the image."""
    weights = width * out_width
    count = vectors or place.tokens
    return Layer(
        path=place.path,
        unit=place.unit,
        op="linear",
        params=weights + (out_width if bias else 0),
        macs=weights * count,
        rows=0 if vectors else place.rows,
        tokens=0 if vectors else place.tokens,
        in_elements=width * count,
        out_elements=out_width * count,
    )


def _norm(place: _Place, op: Literal["group_norm", "layer_norm"], channels: int) -> Layer:
    elements = channels * place.tokens
    return Layer(place.path, place.unit, op, 2 * channels, 0, place.rows, place.tokens, elements, elements)


def _products(place: _Place, width: int, *, keys: int, head_width: int, op: Op) -> Layer:
    """Scores and weighted values of every image token over `keys` tokens; no parameters."""
    queries, read = place.tokens * width, 2 * keys * width
    return Layer(
        path=place.path,
        unit=place.unit,
        op=op,
        params=0,
        macs=2 * queries * keys,
        rows=place.rows,
        tokens=place.tokens,
        in_elements=queries + read,
        out_elements=queries,
        kv_elements=read if op == "self_attention" else 0,
        head_width=head_width,
    )


def _resnet(place: _Place, channels: int, out_channels: int, *, inner: int, time_width: int) -> Iterator[Layer]:
    yield _norm(place.at("norm1"), "group_norm", channels)
    yield _conv(place.at("conv1"), channels, inner)
    yield _linear(place.at("time_emb_proj"), time_width, inner, vectors=1)
    yield _norm(place.at("norm2"), "group_norm", inner)
    yield _conv(place.at("conv2"), inner, out_channels)
    if channels != out_channels:
        yield _conv(place.at("conv_shortcut"), channels, out_channels, kernel=1)


def _attention(
    place: _Place, width: int, inner: int, *, head_width: int, text_width: int | None = None
) -> Iterator[Layer]:
    """Attention over the image itself, or over the text where `text_width` is given."""
    keys = TEXT_TOKENS if text_width else place.tokens
    source_width, vectors = text_width or width, TEXT_TOKENS if text_width else 0
    yield _linear(place.at("to_q"), width, inner, bias=False)
    yield _linear(place.at("to_k"), source_width, inner, bias=False, vectors=vectors)
    yield _linear(place.at("to_v"), source_width, inner, bias=False, vectors=vectors)
    op: Op = "cross_attention" if text_width else "self_attention"
    yield _products(place, inner, keys=keys, head_width=head_width, op=op)
    yield _linear(place.at("to_out.0"), inner, width)


def _transformer_block(
    place: _Place, width: int, *, self_width: int, head_width: int, text_width: int
) -> Iterator[Layer]:
    yield _norm(place.at("norm1"), "layer_norm", width)
    yield from _attention(place.at("attn1"), width, self_width, head_width=head_width)
    yield _norm(place.at("norm2"), "layer_norm", width)
    yield from _attention(place.at("attn2"), width, width, head_width=head_width, text_width=text_width)
    yield _norm(place.at("norm3"), "layer_norm", width)
    yield _linear(place.at("ff.net.0.proj"), width, 8 * width)  # GEGLU: value and gate, each 4 x width
    yield _linear(place.at("ff.net.2"), 4 * width, width)


def _transformer(plan: Blueprint, place: _Place, level: int, depth: int) -> Iterator[Layer]:
    width = plan.channels[level]
    head_width = width // plan.heads[level]
    self_width = plan.self_heads.get(place.unit, plan.heads[level]) * head_width

    def projection(name: str) -> Layer:
        at = place.at(name)
        return _linear(at, width, width) if plan.config.use_linear_projection else _conv(at, width, width, kernel=1)

    yield _norm(place.at("norm"), "group_norm", width)
    yield projection("proj_in")
    for index in range(depth):
        block = place.at(f"transformer_blocks.{index}")
        text_width = plan.config.cross_attention_dim
        yield from _transformer_block(block, width, self_width=self_width, head_width=head_width, text_width=text_width)
    yield projection("proj_out")


# ---- Blocks: the walk through the network ---------------------------------------------------------------------------


def _walk(plan: Blueprint, rows: int, width: int) -> Iterator[Layer]:
    levels = range(len(plan.channels))
    grids = [(rows >> level, width >> level) for level in levels]
    yield from _time_embedding(plan)
    yield _conv(_Place("conv_in", "conv_in", rows, width), plan.config.in_channels, plan.channels[0])
    for level in levels:
        yield from _down_block(plan, level, grids)
    yield from _mid_block(plan, _Place("mid_block", "mid", *grids[-1]))
    for level in reversed(levels):
        yield from _up_block(plan, level, grids)
    yield _norm(_Place("conv_norm_out", "conv_out", rows, width), "group_norm", plan.channels[0])
    yield _conv(_Place("conv_out", "conv_out", rows, width), plan.channels[0], plan.config.out_channels)


def _time_embedding(plan: Blueprint) -> Iterator[Layer]:
    config, place = plan.config, _Place("time_embedding", "time_embedding")
    if config.time_cond_proj_dim:
        yield _linear(place.at("cond_proj"), config.time_cond_proj_dim, plan.channels[0], bias=False, vectors=1)
    yield from _perceptron(place, plan.channels[0], plan.time_width)
    if config.addition_embed_type and config.projection_class_embeddings_input_dim:
        added = replace(place, path="add_embedding")
        yield from _perceptron(added, config.projection_class_embeddings_input_dim, plan.time_width)


def _perceptron(place: _Place, width: int, out_width: int) -> Iterator[Layer]:
    yield _linear(place.at("linear_1"), width, out_width, vectors=1)
    yield _linear(place.at("linear_2"), out_width, out_width, vectors=1)


def _down_block(plan: Blueprint, level: int, grids: Sequence[tuple[int, int]]) -> Iterator[Layer]:
    block, width = _Place(f"down_blocks.{level}", f"down{level}", *grids[level]), plan.channels[level]
    for index, depth in enumerate(plan.down_depths[level]):
        channels = plan.channels[max(level - 1, 0)] if index == 0 else width
        yield from _pair(plan, block, index, level, channels=channels, depth=depth)
    if level + 1 < len(grids):
        sampler = _Place(f"{block.path}.downsamplers.0.conv", f"{block.unit}.downsampler", *grids[level + 1])
        yield _conv(sampler, width, width, stride=2)


def _mid_block(plan: Blueprint, block: _Place) -> Iterator[Layer]:
    level = len(plan.channels) - 1
    for index, depth in enumerate(plan.mid_depths):
        yield from _pair(plan, block, index, level, channels=plan.channels[level], depth=depth)


def _up_block(plan: Blueprint, level: int, grids: Sequence[tuple[int, int]]) -> Iterator[Layer]:
    order, width, depths = len(grids) - 1 - level, plan.channels[level], plan.up_depths[-1 - level]
    block = _Place(f"up_blocks.{order}", f"up{order}", *grids[level])
    for index, depth in enumerate(depths):
        hidden = plan.channels[level + 1] if index == 0 and order else width
        skip = plan.channels[max(level - 1, 0)] if index == len(depths) - 1 else width
        yield from _pair(plan, block, index, level, channels=hidden + skip, depth=depth)
    if level:
        sampler = _Place(f"{block.path}.upsamplers.0.conv", f"{block.unit}.upsampler", *grids[level - 1])
        yield _conv(sampler, width, width)


def _pair(plan: Blueprint, block: _Place, index: int, level: int, *, channels: int, depth: int) -> Iterator[Layer]:
    """A resnet and, where `depth` is not 0, the attention block after it."""
    resnet, out_channels = block.member("resnet", index), plan.channels[level]
    inner = plan.inner_channels.get(resnet.unit, out_channels)
    yield from _resnet(resnet, channels, out_channels, inner=inner, time_width=plan.time_width)
    if depth:
        yield from _transformer(plan, block.member("attention", index), level, depth)


@lru_cache(maxsize=64, typed=True)
def _layers(text: str, height_px: int, width_px: int) -> tuple[Layer, ...]:
    plan = blueprint(text)
    factor = PIXELS_PER_LATENT << (len(plan.channels) - 1)
    sizes = {"height_px": height_px, "width_px": width_px}
    if problems := [problem for name, size in sizes.items() for problem in _size_problems(name, size, factor)]:
        raise InputError(problems)
    return tuple(_walk(plan, height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT))


def _size_problems(name: str, size_px: object, factor: int) -> Iterator[Problem]:
    whole = size_px if isinstance(size_px, int) and not isinstance(size_px, bool) else 0
    if whole < factor or whole % factor:
        rule = f"must be a multiple of {factor}: {PIXELS_PER_LATENT} pixels per latent element, halved between levels"
        below = whole // factor * factor
        nearest = [str(size) for size in (below, below + factor) if size > 0] or [str(factor)]
        yield Problem(name, repr(size_px), rule, f"Nearest: {' and '.join(nearest)}.")


@lru_cache(maxsize=64, typed=True)
def _units(text: str, height_px: int, width_px: int) -> tuple[Unit, ...]:
    groups: dict[str, list[Layer]] = {}
    for layer in _layers(text, height_px, width_px):
        groups.setdefault(layer.unit, []).append(layer)
    skips = _skips(groups)
    sums = {name: total_work(layers) for name, layers in groups.items()}
    return tuple(
        Unit(name, sums[name].macs, sums[name].params, layers[-1].out_elements, skips.get(name))
        for name, layers in groups.items()
    )


def _skips(names: Collection[str]) -> dict[str, str]:
    """Who feeds whom over a skip connection: the up path's resnets take the down path's outputs back, last first."""
    takers = [name for name in names if name.startswith("up") and ".resnet" in name]
    givers = [
        name
        for name in names  # a resnet followed by an attention block hands its output to that block alone
        if name == "conv_in"
        or (name.startswith("down") and (".resnet" not in name or name.replace("resnet", "attention") not in names))
    ]
    return dict(zip(reversed(givers), takers, strict=True))
