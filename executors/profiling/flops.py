"""Work and bytes of a network, counted on torch's meta device: real modules run on shapes alone, without memory.

One count is one call on ONE latent, prompt or image; classifier-free guidance runs a batch of two. FLOPs are
2 x multiply-accumulates of convolutions, linear layers and attention products, as torch.utils.flop_counter counts them;
thop and fvcore, whose figures Hybrid SD and AsyncDiff print, leave the attention products out. Operations are ATen
calls that are no views, about the number of kernels that an eager run launches; as in the catalogue, the making of the
inputs (a UNet's latent and timestep, a decoder's latent, an encoder's ids) is among them and concatenations are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridsd_sim.errors import IllegalPlanError, InputError, Problem
from hybridsd_sim.perf import (
    PIXELS_PER_LATENT,
    TEXT_TOKENS,
    Denoising,
    balanced_cut,
    boundary_elements,
    boundary_tensors,
    find_method,
    layer_table,
    unet_layers,
    unet_units,
)
from hybridsd_sim.profiles import Profiles, load_profiles

from ..models import (
    ENCODERS,
    build_text_encoder,
    build_unet,
    build_vae,
    load_pipeline,
    plain_config,
    seeded_conditioning,
)

_VIEWS = (
    *("view", "reshape", "permute", "transpose", "expand", "slice", "select", "split", "chunk", "unsqueeze"),
    *("squeeze", "detach", "alias", "as_strided", "t.default", "unbind", "narrow", "size", "stride", "prim."),
    *("empty", "lift", "sym_"),
)
"""Parts of the names of ATen calls that are not counted: they move no data, but for `cat.default`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What one call of a module does: operations, and FLOPs by kind."""

    ops: int
    flop_conv: int
    flop_linear: int
    flop_attention: int

    @property
    def flop(self) -> int:
        return self.flop_without_attention_products + self.flop_attention

    @property
    def flop_without_attention_products(self) -> int:
        return self.flop_conv + self.flop_linear


class _Operations(TorchDispatchMode):
    """Counts ATen calls that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(part in str(func) for part in _VIEWS)
        return func(*args, **(kwargs or {}))


class _AttentionProducts(TorchFunctionMode):
    """Takes scaled_dot_product_attention as one operation: kernels fuse it, the meta device would take it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.flop = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = given["query"], given["key"], given["value"]
        self.count += 1
        # scores and weighted values: two products of every query with every key
        self.flop += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def count_calls(call: Callable[[], object]) -> Calls:
    """What a call on the meta device does.

    FLOPs are 2 x multiply-accumulates. Operations are ATen calls that are no views; an attention counts as one, whose
    two products are 2 x queries x keys x (key width + value width) FLOPs.
    """
    flops, operations, attention = FlopCounterMode(display=False), _Operations(), _AttentionProducts()
    with torch.no_grad(), flops, operations, attention:
        call()
    kinds = {str(op): int(count) for op, count in flops.get_flop_counts().get("Global", {}).items()}
    conv = sum(count for op, count in kinds.items() if "convolution" in op)
    return Calls(
        ops=operations.count + attention.count,
        flop_conv=conv,
        flop_linear=sum(kinds.values()) - conv,
        flop_attention=attention.flop,
    )


META = "meta"

GUIDED_LATENTS = 2
"""Latents of one guided image: what the exchange of parallel methods is reported for."""

FP16_BYTES = 2

COMPONENTS = (2, 3, 4)
"""Parts that AsyncDiff cuts a UNet into."""

Size = int | tuple[int, int]
"""Pixels: of a square, or height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A UNet cut into AsyncDiff's components: what crosses the cuts in one round, for one latent.

    `shares` are the components' shares of the multiply-accumulates.
    """

    components: int
    tensors: int
    elements: int
    shares: tuple[float, ...]

    @property
    def fp16_bytes(self) -> int:
        """Bytes of the tensors of one guided image."""
        return self.elements * GUIDED_LATENTS * FP16_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A UNet at one image size, for one latent.

    `kv_elements`: keys and values of all self-attentions. `halo_elements`: the input rows beyond ONE edge of a stripe
    over all convolutions wider than 1 x 1, but for the first, whose input every rank holds. Both as in
    `hybridsd_sim.perf.unet.Layer`, here read off the running modules.
    """

    model: str
    height_px: int
    width_px: int
    params: int
    calls: Calls
    kv_elements: int
    halo_elements: int
    self_attentions: int
    group_norms: int
    boundaries: tuple[Boundary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentCount:
    """A text encoder on one prompt of 77 tokens, or a VAE decoder on one image; `params` are the decoder's alone."""

    name: str
    component: str
    params: int
    calls: Calls


# ---- What parallel methods exchange ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What passed through the modules that exchange something."""

    kv_elements: int = 0
    halo_elements: int = 0
    self_attentions: int = 0
    group_norms: int = 0

    def attention_input(self, module: nn.Module, args: Any) -> None:
        self.self_attentions += 1

    def key_or_value(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kv_elements += output.numel()

    def convolution(self, module: nn.Conv2d, args: tuple[Tensor]) -> None:
        _, channels, _, width = args[0].shape
        self.halo_elements += int(module.padding[0]) * width * channels

    def group_norm(self, module: nn.Module, args: Any) -> None:
        self.group_norms += 1


@contextmanager
def _watched(unet: UNet2DConditionModel) -> Iterator[_Seen]:
    """Reads the shapes that pass through self-attentions, convolutions and GroupNorms while the context is open."""
    seen, handles = _Seen(), []
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and not module.is_cross_attention:
            handles += [
                module.register_forward_pre_hook(seen.attention_input),
                module.to_k.register_forward_hook(seen.key_or_value),
                module.to_v.register_forward_hook(seen.key_or_value),
            ]
        elif isinstance(module, nn.Conv2d) and name != "conv_in":
            handles.append(module.register_forward_pre_hook(seen.convolution))
        elif isinstance(module, nn.GroupNorm):
            handles.append(module.register_forward_pre_hook(seen.group_norm))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def boundaries(config: Mapping[str, Any], height_px: int, width_px: int) -> tuple[Boundary, ...]:
    """The tensors between 2, 3 and 4 components of AsyncDiff, cut so that the heaviest is lightest."""
    units = unet_units(config, height_px, width_px)
    loads = [unit.macs for unit in units]
    cuts = {components: balanced_cut(loads, components) for components in COMPONENTS}
    return tuple(
        Boundary(
            components=components,
            tensors=boundary_tensors(units, bounds[1:-1]),
            elements=boundary_elements(units, bounds[1:-1]),
            shares=tuple(sum(loads[start:stop]) / sum(loads) for start, stop in pairwise(bounds)),
        )
        for components, bounds in cuts.items()
    )


# ---- Models and components ------------------------------------------------------------------------------------------


def count_model(
    model: str | Mapping[str, Any], height_px: int, width_px: int, *, profiles: Profiles | None = None
) -> Count:
    """Count a UNet by running it on the meta device: a catalogue name, a path to a config.json, or a config itself.

    Raises `InputError` for unknown names, unsupported configs and sizes that do not fit.
    """
    name, config = _named(model, profiles)
    unet_layers(config, height_px, width_px)  # refuses sizes with the nearest that fit
    unet = build_unet(config, device=META)
    conditioning = seeded_conditioning(unet, guidance_scale=1.0)
    shape = (1, unet.config["in_channels"], height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT)
    guidance_width = unet.config["time_cond_proj_dim"]
    guidance = torch.zeros((1, guidance_width), device=META) if guidance_width else None
    with _watched(unet) as seen:
        calls = count_calls(
            lambda: unet(
                torch.zeros(shape, device=META),
                torch.zeros(1, device=META),
                conditioning.embeds,
                timestep_cond=guidance,
                added_cond_kwargs=dict(conditioning.added) or None,
            )
        )
    return Count(
        model=name,
        height_px=height_px,
        width_px=width_px,
        params=_params(unet),
        calls=calls,
        kv_elements=seen.kv_elements,
        halo_elements=seen.halo_elements,
        self_attentions=seen.self_attentions,
        group_norms=seen.group_norms,
        boundaries=boundaries(config, height_px, width_px),
    )


def _named(model: str | Mapping[str, Any], profiles: Profiles | None) -> tuple[str, dict[str, Any]]:
    if isinstance(model, str):
        found = load_pipeline(model, profiles=profiles)
        return found.name, dict(found.config)
    return "config", plain_config(model)


def count_component(name: str, height_px: int = 512, width_px: int = 512) -> ComponentCount:
    """Count a text encoder on one prompt, or a VAE decoder on one image, by name of the catalogue's components.

    Sizes are in pixels and mean nothing to an encoder. Raises `InputError` for other names.
    """
    if name in ENCODERS:
        encoder = build_text_encoder(name, device=META)
        calls = count_calls(lambda: encoder(input_ids=torch.zeros((1, TEXT_TOKENS), dtype=torch.long, device=META)))
        return ComponentCount(name=name, component="text_encode", params=_params(encoder), calls=calls)
    vae: Any = build_vae(name, device=META)
    shape = (1, 4, height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT)
    calls = count_calls(lambda: vae.decode(torch.zeros(shape, device=META)))
    return ComponentCount(name=name, component="vae_decode", params=_params(vae.decoder), calls=calls)


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- Tables ---------------------------------------------------------------------------------------------------------


def are_components(names: Sequence[str]) -> bool:
    """Whether these are text encoders and VAE decoders of the catalogue. Raises `InputError` for a mix with models."""
    known = load_profiles().components
    components = [name for name in names if name in known]
    if components and len(components) < len(names):
        models = ", ".join(name for name in names if name not in known)
        rule = f"{', '.join(components)}: components have other figures than models"
        raise InputError(Problem("--models", f"{models} with components", rule, "Count them one after the other."))
    return bool(components)


def count_rows(models: Iterable[str], sizes: Iterable[Size]) -> list[dict[str, Any]]:
    """One row per model and size; units are in the names of the columns, FLOPs and elements are those of one latent."""
    profiles = load_profiles()
    chosen = [_sides(size) for size in sizes]
    rows: list[dict[str, Any]] = []
    for model, size in product(models, chosen):
        count = count_model(model, *size, profiles=profiles)
        row = {
            "model": count.model,
            "height_px": count.height_px,
            "width_px": count.width_px,
            "params": count.params,
            "flop": count.calls.flop,
            "flop_without_attention_products": count.calls.flop_without_attention_products,
            "flop_conv": count.calls.flop_conv,
            "flop_linear": count.calls.flop_linear,
            "flop_attention": count.calls.flop_attention,
            "ops": count.calls.ops,
            "self_attentions": count.self_attentions,
            "kv_elements": count.kv_elements,
            "halo_elements": count.halo_elements,
            "group_norms": count.group_norms,
        }
        for boundary in count.boundaries:
            name = f"asyncdiff_{boundary.components}"
            row |= {
                f"{name}_tensors": boundary.tensors,
                f"{name}_elements": boundary.elements,
                f"{name}_fp16_bytes_per_guided_image": boundary.fp16_bytes,
            }
        rows.append(row)
    return rows


def component_rows(names: Iterable[str], sizes: Iterable[Size] = (512,)) -> list[dict[str, Any]]:
    """One row per text encoder, whose size is 0, and one per VAE decoder and size."""
    chosen = [_sides(size) for size in sizes]
    cases = [(name, size) for name in names for size in ([(0, 0)] if name in ENCODERS else chosen)]
    counted = [(size, count_component(name, *size)) for name, size in cases]
    return [
        {
            "component": count.component,
            "name": count.name,
            "height_px": height_px,
            "width_px": width_px,
            "params": count.params,
            "flop": count.calls.flop,
            "flop_conv": count.calls.flop_conv,
            "flop_linear": count.calls.flop_linear,
            "flop_attention": count.calls.flop_attention,
            "ops": count.calls.ops,
        }
        for (height_px, width_px), count in counted
    ]


def pcpp_bytes_rows(
    models: Iterable[str], sizes: Iterable[Size], degrees: Sequence[int], *, partial: float = 0.3
) -> list[dict[str, Any]]:
    """Bytes that the busiest rank receives in a steady step of one guided image at fp16, as `methods` prices them.

    `distrifusion` gathers every stripe; PCPP's public code sends neighbours whole stripes (before); here only the part
    that is used travels (after). Raises `IllegalPlanError` for degrees that the size cannot be cut into.
    """
    profiles = load_profiles()
    chosen = [_sides(size) for size in sizes]
    rows: list[dict[str, Any]] = []
    for (name, config), (height_px, width_px) in product([_named(model, profiles) for model in models], chosen):
        job = Denoising(  # fifty guided steps of one image, as the planner sees them
            table=layer_table(config, height_px, width_px),
            units=unet_units(config, height_px, width_px),
            num_steps=50,
            latents=GUIDED_LATENTS,
            guided=True,
            latent_elements=config.get("in_channels", 4) * height_px * width_px // PIXELS_PER_LATENT**2,
        )
        for degree in degrees:
            before = _steady_bytes("pcpp", job, degree, {"partial": partial, "whole_stripes": True})
            after = _steady_bytes("pcpp", job, degree, {"partial": partial})
            rows.append(
                {
                    "model": name,
                    "height_px": height_px,
                    "width_px": width_px,
                    "degree": degree,
                    "partial": partial,
                    "distrifusion_bytes": _steady_bytes("distrifusion", job, degree, {}),
                    "pcpp_whole_stripes_bytes": before,
                    "pcpp_used_part_bytes": after,
                    "saved_share": 1 - after / before if before else 0.0,
                }
            )
    return rows


def _steady_bytes(method: str, job: Denoising, degree: int, options: Mapping[str, bool | float]) -> float:
    rules = find_method(method)
    if problems := rules.problems(job, degree, options):
        raise IllegalPlanError(problems)
    return rules.phases(job, degree, options)[-1].work.received_bytes


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
