"""The U-Net as a table of layers: its config read and checked, and every layer's shapes, parameters and work.

The config is that of diffusers' `UNet2DConditionModel`. Only fields that differ from its defaults need be written; a
whole `config.json` is read too. Two fields of our own describe pruned models: `resnet_inner_channels`, the width
between the two convolutions of each resnet, and `self_attention_heads`, the heads that the self-attention of each
attention block keeps (their width unchanged), both in execution order (Hybrid-SD 224M: arXiv 2408.06646).

The layers are those of diffusers, in execution order, counted without torch and without weights. All figures are for
ONE latent: classifier-free guidance runs a batch of two. A multiply-accumulate is one MAC; FLOPs are 2 x MACs. Norms,
activations and sums count no MACs, as in torch.utils.flop_counter. A *layer* is one module or one attention product; a
*unit* is what AsyncDiff can place on a device: `time_embedding`, `conv_in`, a resnet, an attention block (a whole
Transformer2DModel), a sampler, `conv_out` (with the norm before it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridsd_sim.errors import InputError, Problem, validation_rule

NORM_GROUPS = 32
"""Groups of every GroupNorm in Stable Diffusion's UNets; channel counts are multiples of it."""


_Count = Annotated[int, Field(gt=0)]

_Channels = Annotated[int, Field(gt=0, multiple_of=NORM_GROUPS)]

_Depths = tuple[_Count | tuple[_Count, ...], ...]

_Rows = tuple[int | tuple[int, ...], ...]

_T = TypeVar("_T")

_PER_LEVEL = "needs a whole number above 0, or a list of one per level"

_PER_LAYER = f"{_PER_LEVEL}; a level may itself be a list of one per layer"

_MULTIPLES = f"needs a list of positive multiples of {NORM_GROUPS}"


# Fields of diffusers that change no layer's shape.
_WITHOUT_LAYERS = frozenset(
    (
        *("_class_name", "_diffusers_version", "_name_or_path", "act_fn", "addition_embed_type_num_heads"),
        *("addition_time_embed_dim", "center_input_sample", "dropout", "flip_sin_to_cos", "freq_shift"),
        *("mid_block_scale_factor", "norm_eps", "resnet_out_scale_factor", "resnet_skip_time_act", "sample_size"),
        *("time_embedding_act_fn", "timestep_post_act", "upcast_attention"),
    )
)


# Fields of diffusers that would change the layers, each with the one value supported.
_ONLY: Mapping[str, object] = {
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "norm_num_groups": NORM_GROUPS,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}


class UNetConfig(BaseModel):
    """The fields that shape the layers, with diffusers' defaults.

    As in diffusers, `attention_head_dim` is the number of heads. A description is the rule that a refused value breaks.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    in_channels: _Count = 4
    out_channels: _Count = 4
    block_out_channels: tuple[_Channels, ...] = Field((320, 640, 1280, 1280), min_length=1, description=_MULTIPLES)
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...] = (
        *("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    )
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...] = (
        *("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    layers_per_block: _Count | tuple[_Count, ...] = Field(2, description=_PER_LEVEL)
    transformer_layers_per_block: _Count | _Depths = Field(1, description=_PER_LAYER)
    reverse_transformer_layers_per_block: _Depths | None = Field(None, description=_PER_LAYER)
    attention_head_dim: _Count | tuple[_Count, ...] = Field(8, description=_PER_LEVEL)
    cross_attention_dim: _Count = Field(1280, description="needs a whole number above 0, the same at every level")
    use_linear_projection: bool = False
    time_cond_proj_dim: _Count | None = None
    addition_embed_type: Literal["text_time"] | None = None
    projection_class_embeddings_input_dim: _Count | None = None
    resnet_inner_channels: tuple[_Channels, ...] | None = Field(None, description=_MULTIPLES)
    self_attention_heads: tuple[_Count, ...] | None = None


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A checked config spread out: one entry per level, shallow first (`up_depths`: deep first, as executed).

    A depth is the number of transformer blocks of one attention block; 0 stands for no attention block.
    `inner_channels` and `self_heads` hold the pruned units, by name.
    """

    config: UNetConfig
    heads: tuple[int, ...]
    down_depths: tuple[tuple[int, ...], ...]
    mid_depths: tuple[int, ...]
    up_depths: tuple[tuple[int, ...], ...]
    inner_channels: Mapping[str, int] = field(default_factory=dict)
    self_heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def channels(self) -> tuple[int, ...]:
        return self.config.block_out_channels

    @property
    def time_width(self) -> int:
        """Width of the time embedding that every resnet projects."""
        return 4 * self.channels[0]


def config_text(config: Mapping[str, Any]) -> str:
    """The fields that matter as one hashable value; JSON tells 1 from 1.0 and from true, where a tuple would not."""
    fields = {str(key): value for key, value in config.items() if key not in _WITHOUT_LAYERS}
    for key, only in _ONLY.items():
        if key in fields and type(fields[key]) is type(only) and fields[key] == only:
            del fields[key]
    return json.dumps(fields, sort_keys=True, default=repr)


@lru_cache(maxsize=64)
def blueprint(text: str) -> Blueprint:
    """The blueprint of a config written by `config_text`. Raises `InputError` with everything found wrong."""
    config = _parse(text)
    _refuse(_length_problems(config))
    layers = _per_level(config.layers_per_block, config)
    down: _Rows = _per_level(config.transformer_layers_per_block, config)
    up = config.reverse_transformer_layers_per_block or down[::-1]
    up_layers = tuple(count + 1 for count in layers[::-1])
    _refuse([*_depth_problems(config, layers, up_layers), *_width_problems(config)])
    mid: tuple[int, ...] = ()
    if config.mid_block_type is not None:
        # diffusers builds UNetMidBlock2D with a single resnet and no attention here (SSD-1B, Vega)
        mid = (_row(down[-1], 1)[0], 0) if config.mid_block_type == "UNetMidBlock2DCrossAttn" else (0,)
    plan = Blueprint(
        config=config,
        heads=_per_level(config.attention_head_dim, config),
        down_depths=_depths(down, config.down_block_types, layers),
        mid_depths=mid,
        up_depths=_depths(up, config.up_block_types, up_layers),
    )
    return _pruned(plan)


def _per_level(value: _T | tuple[_T, ...], config: UNetConfig) -> tuple[_T, ...]:
    return value if isinstance(value, tuple) else (value,) * len(config.block_out_channels)


def _depths(entries: _Rows, types: Iterable[str], layers: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    rows = zip(entries, types, layers, strict=True)
    return tuple(_row(entry, count) if kind.startswith("CrossAttn") else (0,) * count for entry, kind, count in rows)


def _row(entry: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,) * count


def _pruned(plan: Blueprint) -> Blueprint:
    """The blueprint with the pruned widths and heads given to their units, in execution order."""
    rows = [
        *((f"down{level}", depths) for level, depths in enumerate(plan.down_depths)),
        ("mid", plan.mid_depths),
        *((f"up{order}", depths) for order, depths in enumerate(plan.up_depths)),
    ]
    resnets = [f"{block}.resnet{index}" for block, depths in rows for index in range(len(depths))]
    attentions = [f"{block}.attention{index}" for block, depths in rows for index, depth in enumerate(depths) if depth]
    widths, heads = plan.config.resnet_inner_channels, plan.config.self_attention_heads
    problems = [
        _problem(name, values, f"needs one entry for each of these {len(units)}: {', '.join(units)}")
        for name, values, units in (
            ("resnet_inner_channels", widths, resnets),
            ("self_attention_heads", heads, attentions),
        )
        if values is not None and len(values) != len(units)
    ]
    _refuse(problems)
    inner = dict(zip(resnets, widths or (), strict=False))
    return replace(plan, inner_channels=inner, self_heads=dict(zip(attentions, heads or (), strict=False)))


# ---- What is refused, and why ---------------------------------------------------------------------------------------


def _refuse(problems: Iterable[Problem]) -> None:
    if found := tuple(problems):
        raise InputError(found)


def _problem(name: str, value: object, rule: str, remedy: str = "") -> Problem:
    return Problem(f"config.{name}", json.dumps(value), rule, remedy)


def _parse(text: str) -> UNetConfig:
    try:
        return UNetConfig.model_validate_json(text)
    except ValidationError as error:
        values = json.loads(text)
        # Reversed, so that the first complaint about a field is the one that stays.
        rules = {str(item["loc"][0]): validation_rule(item) for item in reversed(error.errors())}
        problems = []
        for name in sorted(rules):
            rule, remedy = rules[name], ""
            if name in _ONLY:
                rule = f"only {json.dumps(_ONLY[name])} is supported"
            elif name in UNetConfig.model_fields:
                rule = UNetConfig.model_fields[name].description or rule
            else:
                close = get_close_matches(name, UNetConfig.model_fields, n=1)
                rule, remedy = "no such field", f"Did you mean {close[0]}?" if close else ""
            problems.append(_problem(name, values[name], rule, remedy))
        raise InputError(problems) from None


def _length_problems(config: UNetConfig) -> Iterator[Problem]:
    levels = len(config.block_out_channels)
    for name, value in config:
        description = UNetConfig.model_fields[name].description
        per_level = name.endswith("block_types") or description in (_PER_LEVEL, _PER_LAYER)
        if per_level and isinstance(value, tuple) and len(value) != levels:
            yield _problem(name, value, f"needs one entry for each of the {levels} levels of block_out_channels")


def _depth_problems(config: UNetConfig, layers: tuple[int, ...], up_layers: tuple[int, ...]) -> Iterator[Problem]:
    down, up = config.transformer_layers_per_block, config.reverse_transformer_layers_per_block
    for name, value, counts in (
        ("transformer_layers_per_block", down, layers),
        ("reverse_transformer_layers_per_block", up, up_layers),
    ):
        rows = zip(value, counts, strict=True) if isinstance(value, tuple) else ()
        for entry, count in rows:
            if isinstance(entry, tuple) and len(entry) != count:
                yield _problem(name, entry, f"this level has {count} layers and needs one entry for each")
    if isinstance(down, tuple) and up is None and any(isinstance(entry, tuple) for entry in down):
        rule = "diffusers reads one entry per layer only with reverse_transformer_layers_per_block beside it"
        yield _problem("transformer_layers_per_block", down, rule)


def _width_problems(config: UNetConfig) -> Iterator[Problem]:
    heads = _per_level(config.attention_head_dim, config)
    levels = zip(config.block_out_channels, heads, config.down_block_types, config.up_block_types[::-1], strict=True)
    for index, (width, count, *blocks) in enumerate(levels, 1):
        mid = config.mid_block_type if index == len(heads) else None
        if width % count and any("CrossAttn" in str(block) for block in (*blocks, mid)):
            rule = f"is the number of heads of a level of {width} channels and must divide them"
            yield _problem("attention_head_dim", count, rule)
    if config.addition_embed_type and not config.projection_class_embeddings_input_dim:
        rule = "needs a whole number above 0 with addition_embed_type text_time"
        yield _problem("projection_class_embeddings_input_dim", None, rule, "SDXL has 2816.")


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

    `config` holds diffusers' fields and, for pruned models, the two of our own. Sizes are multiples of
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


def _attention(
    place: _Place, width: int, inner: int, *, head_width: int, text_width: int | None = None
) -> Iterator[Layer]:
    """Attention over the image itself, or over the text where `text_width` is given: projections around the products.

    The products, scores and weighted values of every image token over all keys, have no parameters.
    """
    keys = TEXT_TOKENS if text_width else place.tokens
    source_width, vectors = text_width or width, TEXT_TOKENS if text_width else 0
    yield _linear(place.at("to_q"), width, inner, bias=False)
    yield _linear(place.at("to_k"), source_width, inner, bias=False, vectors=vectors)
    yield _linear(place.at("to_v"), source_width, inner, bias=False, vectors=vectors)
    queries, read = place.tokens * inner, 2 * keys * inner
    yield Layer(
        path=place.path,
        unit=place.unit,
        op="cross_attention" if text_width else "self_attention",
        params=0,
        macs=2 * queries * keys,
        rows=place.rows,
        tokens=place.tokens,
        in_elements=queries + read,
        out_elements=queries,
        kv_elements=0 if text_width else read,
        head_width=head_width,
    )
    yield _linear(place.at("to_out.0"), inner, width)


def _transformer(plan: Blueprint, place: _Place, level: int, depth: int) -> Iterator[Layer]:
    """An attention block: `depth` transformer blocks between two projections (diffusers' Transformer2DModel)."""
    width, text_width = plan.channels[level], plan.config.cross_attention_dim
    head_width = width // plan.heads[level]
    self_width = plan.self_heads.get(place.unit, plan.heads[level]) * head_width

    def projection(name: str) -> Layer:
        at = place.at(name)
        return _linear(at, width, width) if plan.config.use_linear_projection else _conv(at, width, width, kernel=1)

    yield _norm(place.at("norm"), "group_norm", width)
    yield projection("proj_in")
    for index in range(depth):
        block = place.at(f"transformer_blocks.{index}")
        yield _norm(block.at("norm1"), "layer_norm", width)
        yield from _attention(block.at("attn1"), width, self_width, head_width=head_width)
        yield _norm(block.at("norm2"), "layer_norm", width)
        yield from _attention(block.at("attn2"), width, width, head_width=head_width, text_width=text_width)
        yield _norm(block.at("norm3"), "layer_norm", width)
        yield _linear(block.at("ff.net.0.proj"), width, 8 * width)  # GEGLU: value and gate, each 4 x width
        yield _linear(block.at("ff.net.2"), 4 * width, width)
    yield projection("proj_out")


# ---- Blocks, in execution order -------------------------------------------------------------------------------------


def _network_layers(plan: Blueprint, rows: int, width: int) -> Iterator[Layer]:
    levels = range(len(plan.channels))
    grids = [(rows >> level, width >> level) for level in levels]
    config, embedding = plan.config, _Place("time_embedding", "time_embedding")
    if config.time_cond_proj_dim:
        yield _linear(embedding.at("cond_proj"), config.time_cond_proj_dim, plan.channels[0], bias=False, vectors=1)
    yield from _perceptron(embedding, plan.channels[0], plan.time_width)
    if config.addition_embed_type and config.projection_class_embeddings_input_dim:
        added = replace(embedding, path="add_embedding")
        yield from _perceptron(added, config.projection_class_embeddings_input_dim, plan.time_width)
    yield _conv(_Place("conv_in", "conv_in", rows, width), plan.config.in_channels, plan.channels[0])
    for level in levels:
        yield from _down_block(plan, level, grids)
    middle, deepest = _Place("mid_block", "mid", *grids[-1]), levels[-1]
    for index, depth in enumerate(plan.mid_depths):
        yield from _pair(plan, middle, index, deepest, channels=plan.channels[deepest], depth=depth)
    for level in reversed(levels):
        yield from _up_block(plan, level, grids)
    yield _norm(_Place("conv_norm_out", "conv_out", rows, width), "group_norm", plan.channels[0])
    yield _conv(_Place("conv_out", "conv_out", rows, width), plan.channels[0], plan.config.out_channels)


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
    yield _norm(resnet.at("norm1"), "group_norm", channels)
    yield _conv(resnet.at("conv1"), channels, inner)
    yield _linear(resnet.at("time_emb_proj"), plan.time_width, inner, vectors=1)
    yield _norm(resnet.at("norm2"), "group_norm", inner)
    yield _conv(resnet.at("conv2"), inner, out_channels)
    if channels != out_channels:
        yield _conv(resnet.at("conv_shortcut"), channels, out_channels, kernel=1)
    if depth:
        yield from _transformer(plan, block.member("attention", index), level, depth)


@lru_cache(maxsize=64, typed=True)
def _layers(text: str, height_px: int, width_px: int) -> tuple[Layer, ...]:
    plan = blueprint(text)
    factor = PIXELS_PER_LATENT << (len(plan.channels) - 1)
    rule = f"must be a multiple of {factor}: {PIXELS_PER_LATENT} pixels per latent element, halved between levels"
    problems, sizes = [], dict[str, object](height_px=height_px, width_px=width_px)
    for name, size_px in sizes.items():
        whole = size_px if isinstance(size_px, int) and not isinstance(size_px, bool) else 0
        if whole < factor or whole % factor:
            below = whole // factor * factor
            nearest = [str(size) for size in (below, below + factor) if size > 0] or [str(factor)]
            problems.append(Problem(name, repr(size_px), rule, f"Nearest: {' and '.join(nearest)}."))
    _refuse(problems)
    return tuple(_network_layers(plan, height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT))


@lru_cache(maxsize=64, typed=True)
def _units(text: str, height_px: int, width_px: int) -> tuple[Unit, ...]:
    groups: dict[str, list[Layer]] = {}
    for layer in _layers(text, height_px, width_px):
        groups.setdefault(layer.unit, []).append(layer)
    # Over a skip connection the up path's resnets take the down path's outputs back, last first. A resnet followed by
    # an attention block hands its output to that block alone.
    takers = [name for name in groups if name.startswith("up") and ".resnet" in name]
    givers = [
        name
        for name in groups
        if name == "conv_in"
        or (name.startswith("down") and (".resnet" not in name or name.replace("resnet", "attention") not in groups))
    ]
    skips = dict(zip(reversed(givers), takers, strict=True))
    sums = {name: total_work(layers) for name, layers in groups.items()}
    return tuple(
        Unit(name, sums[name].macs, sums[name].params, layers[-1].out_elements, skips.get(name))
        for name, layers in groups.items()
    )
