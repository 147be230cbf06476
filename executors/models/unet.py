"""UNets built from their configs, Stable Diffusion's and those pruned from it.

A UNet is any config of diffusers' `UNet2DConditionModel` that `unet_layers` can count; a model's name is only a way to
find a config. Pruned models (Hybrid SD, arXiv 2408.06646) keep fewer channels inside their resnets and
fewer heads in their self-attentions, layer by layer, which diffusers' own config cannot say.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf import unet_params

from .weights import BROKEN, ModuleT, broken, fill, load, prepare_for_evaluation, read_config, refuse_absent

PRUNING = ("resnet_inner_channels", "self_attention_heads")
"""Config fields of pruned models, which diffusers does not know; see `hybridsd_sim.perf.unet`."""

_TIME_IDS = 6


def build_unet(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> UNet2DConditionModel:
    """The UNet of a config with seeded weights, for evaluation; on the device `meta` its shapes alone.

    `config` holds the fields of diffusers' `UNet2DConditionModel`, and for pruned models those of
    `hybridsd_sim.perf.unet`; `dict(unet.config)` still describes the network. Raises `InputError` for parts that
    cannot be counted, with the reason.
    """
    return fill(_skeleton(config), seed=seed, device=device, dtype=dtype)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's config as plain JSON values, without diffusers' private fields."""
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return plain


def _skeleton(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The network on the meta device."""
    fields = plain_config(config)
    unet_params(fields)
    added_width(fields)
    pruning = {name: fields.pop(name) for name in PRUNING if name in fields}
    try:
        with torch.device("meta"):
            unet: UNet2DConditionModel = UNet2DConditionModel(**fields)
            _prune(unet, **pruning)
    except (TypeError, ValueError) as error:
        raise InputError(Problem("config", "UNet2DConditionModel", f"diffusers refuses it: {error}")) from error
    unet.register_to_config(**pruning)
    return unet


def added_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text embedding that a text_time UNet takes beside its time ids; 0 for other UNets.

    SDXL's 2816 inputs are a pooled embedding of 1280 and six time ids of 256 each. Raises `InputError` where the config
    leaves no room for an embedding.
    """
    if config.get("addition_embed_type") != "text_time":
        return 0
    width = config.get("addition_time_embed_dim")
    total = config["projection_class_embeddings_input_dim"]
    if not isinstance(width, int) or not 0 < width * _TIME_IDS < total:
        rule = f"text_time needs a width whose {_TIME_IDS} time embeddings leave room for a text embedding in {total}"
        raise InputError(Problem("config.addition_time_embed_dim", json.dumps(width), rule, "SDXL has 256."))
    return int(total) - width * _TIME_IDS


def _prune(
    unet: UNet2DConditionModel,
    *,
    resnet_inner_channels: Sequence[int] | None = None,
    self_attention_heads: Sequence[int] | None = None,
) -> None:
    """Narrow the resnets and self-attentions; the counted config has one entry for each, in execution order."""
    blocks = [block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if block is not None]
    if resnet_inner_channels is not None:
        resnets = [resnet for block in blocks for resnet in block.resnets]
        for resnet, channels in zip(resnets, resnet_inner_channels, strict=True):
            # the part between the two convolutions gets another width; input and output keep theirs
            outer = resnet.conv2.out_channels
            resnet.conv1 = nn.Conv2d(resnet.in_channels, channels, kernel_size=3, padding=1)
            resnet.time_emb_proj = nn.Linear(resnet.time_emb_proj.in_features, channels)
            resnet.norm2 = nn.GroupNorm(resnet.norm2.num_groups, channels, eps=resnet.norm2.eps)
            resnet.conv2 = nn.Conv2d(channels, outer, kernel_size=3, padding=1)
    if self_attention_heads is not None:
        transformers = [part for block in blocks for part in getattr(block, "attentions", ()) if part is not None]
        for transformer, heads in zip(transformers, self_attention_heads, strict=True):
            for attention in (block.attn1 for block in transformer.transformer_blocks):
                # heads keep their width
                outer, inner = attention.query_dim, heads * (attention.inner_dim // attention.heads)
                attention.to_q, attention.to_k, attention.to_v = (nn.Linear(outer, inner, bias=False) for _ in range(3))
                attention.to_out[0] = nn.Linear(inner, outer)
                attention.heads = attention.sliceable_head_dim = heads
                attention.inner_dim = attention.inner_kv_dim = inner


def replica(module: ModuleT) -> ModuleT:
    """The same module tree again over the SAME parameters and buffers: hooks of one are not hooks of the other.

    The module must carry no hooks yet: a copied hook would still call the module that it was made for.
    """
    if hooked := [name for name, part in module.named_modules() if hasattr(part, "_diffusers_hook")]:
        raise ValueError(f"copy a module before hooks are registered on it; hooked: {', '.join(hooked[:3])}")
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, dict(shared))


def load_unet(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """The UNet of a folder with config.json and safetensors. Raises `InputError` for anything missing or broken.

    A pruned network, which diffusers cannot build, is built here and given the file's numbers.
    """
    config = plain_config(read_config(folder))
    skeleton = _skeleton(config)
    if not any(config.get(name) for name in PRUNING):
        unet: UNet2DConditionModel = load(UNet2DConditionModel, folder, device=device, dtype=dtype)
        return unet
    try:
        report = skeleton.load_state_dict(
            load_file(folder / "diffusion_pytorch_model.safetensors"), strict=False, assign=True
        )
    except BROKEN as error:
        raise broken(folder, error) from error
    refuse_absent(folder, report.missing_keys)
    return prepare_for_evaluation(skeleton, device, dtype)
