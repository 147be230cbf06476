"""The config of a UNet: read, checked, and spread out level by level.

The config is that of diffusers' `UNet2DConditionModel`. Only fields that differ from its defaults need be written; a
whole `config.json` is read too. Two fields of our own describe pruned models: `resnet_inner_channels`, the width
between the two convolutions of each resnet, and `self_attention_heads`, the heads that the self-attention of each
attention block keeps (their width unchanged), both in execution order (Hybrid-SD 224M: arXiv 2408.06646).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridsd_sim.errors import InputError, Problem

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
    said = {key: value for key, value in fields.items() if not _is_only(key, value)}
    return json.dumps(said, sort_keys=True, default=repr)


def _is_only(key: str, value: object) -> bool:
    return key in _ONLY and type(value) is type(_ONLY[key]) and value == _ONLY[key]


@lru_cache(maxsize=64)
def blueprint(text: str) -> Blueprint:
    """The blueprint of a config written by `config_text`. Raises `InputError` with everything found wrong."""
    config = _read(text)
    _refuse(_length_problems(config))
    layers = _per_level(config.layers_per_block, config)
    down: _Rows = _per_level(config.transformer_layers_per_block, config)
    up = config.reverse_transformer_layers_per_block or down[::-1]
    up_layers = tuple(count + 1 for count in layers[::-1])
    _refuse([*_depth_problems(config, layers, up_layers), *_other_problems(config)])
    plan = Blueprint(
        config=config,
        heads=_per_level(config.attention_head_dim, config),
        down_depths=_depths(down, config.down_block_types, layers),
        mid_depths=_mid_depths(config, down[-1]),
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


def _mid_depths(config: UNetConfig, deepest: int | tuple[int, ...]) -> tuple[int, ...]:
    if config.mid_block_type is None:
        return ()
    # diffusers builds UNetMidBlock2D with a single resnet and no attention here (SSD-1B, Vega)
    return (_row(deepest, 1)[0], 0) if config.mid_block_type == "UNetMidBlock2DCrossAttn" else (0,)


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


def _read(text: str) -> UNetConfig:
    try:
        return UNetConfig.model_validate_json(text)
    except ValidationError as error:
        said = json.loads(text)
        messages = {str(item["loc"][0]): item["msg"] for item in reversed(error.errors())}  # the first of each field
        raise InputError(_field_problem(name, said[name], messages[name]) for name in sorted(messages)) from None


def _field_problem(name: str, value: object, message: str) -> Problem:
    if name in _ONLY:
        return _problem(name, value, f"only {json.dumps(_ONLY[name])} is supported")
    if name not in UNetConfig.model_fields:
        close = get_close_matches(name, UNetConfig.model_fields, n=1)
        return _problem(name, value, "no such field", f"Did you mean {close[0]}?" if close else "")
    rule = UNetConfig.model_fields[name].description or message.replace("Input should", "must")
    return _problem(name, value, rule)


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


def _other_problems(config: UNetConfig) -> Iterator[Problem]:
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
