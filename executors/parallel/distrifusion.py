"""DistriFusion, displaced patch parallelism (arXiv 2402.19481, section 4), and the stripes it shares with PCPP.

Every rank holds the whole latent; its first convolution reads the rank's own rows, and from there on its UNet sees a
horizontal stripe. Hooks on three kinds of layer bring in what a stripe lacks: rows beyond its edges (convolutions), the
moments of the whole image (GroupNorm), keys and values of the other stripes (self-attention). In synchronous steps that
is gathered before the layer runs. Afterwards a layer takes what its neighbours had one step ago, and its own fresh
tensors travel while the next layers run. The predicted noise is gathered at the end of every step, so that all ranks
hold the same latent. Public code: mit-han-lab/distrifuser, `modules/pp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 torch's own name for it
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from hybridsd_sim.errors import InputError, Problem

from ..models import Conditioning
from .denoiser import Denoiser, apply_guidance, match_memory_format, predict_noise
from .group import Group, Pending

TENSORS_PER_MESSAGE = 60
"""Tensors that travel as one message after the warm-up, as in the public code."""

HOOK = "hybridsd-stripe"


@dataclass(slots=True)
class TensorBucket:
    """Tensors of one precision that will travel, or travel already, as one message."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    pending: Pending[Any] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        self.shapes[name] = tensor.shape
        self.tensors.append(tensor)

    def packed(self) -> Tensor:
        """All tensors as one, which lets go of them."""
        flat = torch.cat([tensor.reshape(-1) for tensor in self.tensors])
        self.tensors.clear()
        return flat

    def unpacked(self, flat: Tensor) -> dict[str, Tensor]:
        """Every tensor of another rank's message: all ranks pack the same shapes in the same order."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


class StaleExchange:
    """Everybody's tensors as of the previous step, layer by layer; the owner of all traffic between stripes.

    `swap` gives a layer the tensors of all ranks: fresh ones in a synchronous step, otherwise those of the step before
    while its own sets out for the next step. A `frozen` exchange keeps what the last synchronous step left.
    """

    def __init__(self, group: Group, *, frozen: bool = False) -> None:
        self.group, self.frozen, self.synchronous = group, frozen, True
        self._held: dict[str, list[Tensor]] = {}
        self._packing: dict[torch.dtype, TensorBucket] = {}
        self._travelling: dict[str, TensorBucket] = {}

    def forget(self) -> None:
        """Drop everything that is held, as before a run; what still travels is awaited first."""
        for bucket in {id(bucket): bucket for bucket in self._travelling.values()}.values():
            self._arrive(bucket)
        self._held.clear()
        self._packing.clear()

    def swap(self, name: str, fresh: Tensor) -> list[Tensor]:
        """Everybody's tensor of this name, by rank; the own one is always fresh.

        Fresh ones of the other ranks are those of a synchronous step; otherwise theirs are one step old.
        """
        if self.synchronous:
            return self.gather(name, fresh)
        everyone = [*self.stale(name)]
        everyone[self.group.rank] = fresh
        if not self.frozen:
            bucket = self._packing.setdefault(fresh.dtype, TensorBucket())
            bucket.add(name, fresh)
            if len(bucket.shapes) == TENSORS_PER_MESSAGE:
                self._send(self._packing.pop(fresh.dtype))
        return everyone

    def gather(self, name: str, fresh: Tensor) -> list[Tensor]:
        """Everybody's fresh tensor of this name, by rank, awaited here and held for the next step."""
        self._held[name] = self.group.all_gather(fresh)
        return self._held[name]

    def stale(self, name: str) -> list[Tensor]:
        """Everybody's tensor of this name as of the last step that sent it, the own one too."""
        if name in self._travelling:
            self._arrive(self._travelling[name])
        return self._held[name]

    def flush(self) -> None:
        """Send what is packed; called at the end of a step."""
        for bucket in self._packing.values():
            self._send(bucket)
        self._packing.clear()

    def _send(self, bucket: TensorBucket) -> None:
        bucket.pending = self.group.start_all_gather(bucket.packed())
        self._travelling |= dict.fromkeys(bucket.shapes, bucket)

    def _arrive(self, bucket: TensorBucket) -> None:
        by_rank = [bucket.unpacked(flat) for flat in bucket.pending.wait()] if bucket.pending else []
        for name in bucket.shapes:
            self._held[name] = [tensors[name] for tensors in by_rank]
            del self._travelling[name]


# ---- Hooks: one per kind of layer -----------------------------------------------------------------------------------


class FirstConvolution(ModelHook):
    """Cuts the rank's rows out of the whole latent, with the true rows around them.

    From (branches x images, C, H, W) to (branches x images, C', H / ranks, W): every rank holds the whole latent, so
    nothing is exchanged here.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def new_forward(self, module: nn.Conv2d, latents: Tensor) -> Tensor:
        margin = int(module.padding[0])
        rows = latents.shape[2] // self.group.size
        padded = F.pad(latents, (0, 0, margin, margin))
        return _convolve(module, padded.narrow(2, self.group.rank * rows, rows + 2 * margin))


class Convolution(ModelHook):
    """Puts the neighbours' edge rows above and below the stripe; beyond the image there are zeros.

    What travels is the first and last `padding` rows of a stripe, (branches x images, C, 2 x padding, W).
    """

    def __init__(self, name: str, exchange: StaleExchange) -> None:
        super().__init__()
        self.name, self.exchange = name, exchange

    def new_forward(self, module: nn.Conv2d, stripe: Tensor) -> Tensor:
        margin, rank = int(module.padding[0]), self.exchange.group.rank
        edges = torch.cat([stripe[:, :, :margin], stripe[:, :, -margin:]], dim=2)
        everyone = self.exchange.swap(self.name, edges)
        beyond = torch.zeros_like(edges[:, :, :margin])
        above = everyone[rank - 1][:, :, margin:] if rank > 0 else beyond
        below = everyone[rank + 1][:, :, :margin] if rank + 1 < len(everyone) else beyond
        pieces = [match_memory_format(above, stripe), stripe, match_memory_format(below, stripe)]
        return _convolve(module, torch.cat(pieces, dim=2))


def _convolve(module: nn.Conv2d, padded: Tensor) -> Tensor:
    """The convolution of rows that already carry their vertical padding."""
    padding = (0, int(module.padding[1]))
    return F.conv2d(padded, module.weight, module.bias, module.stride, padding, module.dilation, module.groups)


class Normalisation(ModelHook):
    """GroupNorm over the whole image from every stripe's moments; `mode` says which of them may be a step old.

    `full_sync` and `sync_gn` gather fresh moments; `stale_gn` takes those of the step before; `corrected_async_gn`
    adds to the stale average what the own moments have changed by; `separate_gn` and `no_sync` take the own alone.

    The moments are the mean and the mean of squares of every group, in float32. `unbiased` multiplies the variance by
    n / (n - 1) for the n elements of a group in a stripe, as the public code does; torch's GroupNorm does not.
    """

    def __init__(self, name: str, exchange: StaleExchange, mode: str, *, unbiased: bool = False) -> None:
        super().__init__()
        self.name, self.exchange, self.mode, self.unbiased = name, exchange, mode, unbiased

    def new_forward(self, module: nn.GroupNorm, stripe: Tensor) -> Tensor:
        groups = stripe.unflatten(1, (module.num_groups, -1)).float()
        variance, mean = torch.var_mean(groups, dim=tuple(range(2, groups.dim())), correction=0)
        own = torch.stack([mean, variance + mean.square()])
        mean, square = self._image_moments(own)
        wide = square - mean.square()
        # a corrected stale variance may turn out negative; the stripe's own then stands in
        variance = torch.where(wide < 0, variance, wide)
        if self.unbiased:
            elements = groups[0, 0].numel()
            variance = variance * (elements / (elements - 1))
        # (x - mean) / sqrt(variance + eps) x weight + bias, in one multiplication and addition per element
        per_group = module.num_channels // module.num_groups
        scale = torch.rsqrt(variance + module.eps).repeat_interleave(per_group, dim=1)
        shift = -mean.repeat_interleave(per_group, dim=1) * scale
        if module.affine:
            scale, shift = scale * module.weight, shift * module.weight + module.bias
        shape = (*scale.shape, *(1 for _ in stripe.shape[2:]))
        return torch.addcmul(shift.view(shape), stripe, scale.view(shape)).to(stripe.dtype)

    def _image_moments(self, own: Tensor) -> Tensor:
        """The moments of the whole image as this mode knows them."""
        if self.exchange.synchronous or self.mode in {"full_sync", "sync_gn"}:
            return _mean(self.exchange.gather(self.name, own))
        if self.mode in {"separate_gn", "no_sync"}:
            return own
        if self.mode == "stale_gn":
            return _mean(self.exchange.swap(self.name, own))
        stale = self.exchange.stale(self.name)
        self.exchange.swap(self.name, own)
        return _mean(stale) + own - stale[self.exchange.group.rank]


def _mean(by_rank: Sequence[Tensor]) -> Tensor:
    return torch.stack([*by_rank]).mean(0)


class KeysOfAll(ModelHook):
    """Lets a stripe's queries see the keys (or values) of the whole image: stale ones of the others, fresh own.

    From (branches x images, tokens / ranks, inner width) to (branches x images, tokens, inner width).
    """

    def __init__(self, name: str, exchange: StaleExchange) -> None:
        super().__init__()
        self.name, self.exchange = name, exchange

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return torch.cat(self.exchange.swap(self.name, output), dim=1)


# ---- The whole network ----------------------------------------------------------------------------------------------


def self_attentions(unet: UNet2DConditionModel) -> Iterator[tuple[str, Attention]]:
    """Every self-attention with its path. Raises `InputError` for attention that computes keys in another way."""
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and not module.is_cross_attention:
            if module.fused_projections:
                raise InputError(Problem(name, "fused projections", "must be separate", "Call unfuse_qkv_projections."))
            yield name, module


def hook_layers(unet: UNet2DConditionModel, exchange: StaleExchange, *, mode: str, unbiased: bool) -> None:
    """Put the hooks on every convolution with a halo and on every GroupNorm."""
    for name, module in unet.named_modules():
        if module is unet.conv_in:
            register(module, FirstConvolution(exchange.group))
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            if module.padding_mode != "zeros":
                raise InputError(Problem(f"{name}.padding_mode", module.padding_mode, "must be zeros"))
            register(module, Convolution(name, exchange))
        elif isinstance(module, nn.GroupNorm):
            register(module, Normalisation(name, exchange, mode, unbiased=unbiased))


def register(module: nn.Module, hook: ModelHook) -> None:
    """Put a hook on a module of the rank's own model."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


class StripeDenoiser(Denoiser):
    """One rank of a patch-parallel run. Subclasses say what self-attention sees.

    `settings` are the method's options with their defaults. With `guidance_split` the first half of the ranks holds
    stripes of the empty prompt and the second half those of the prompt.
    """

    def __init__(
        self, unet: UNet2DConditionModel, conditioning: Conditioning, group: Group, *, settings: Mapping[str, Any]
    ) -> None:
        self.unet, self.group, self.settings = unet, group, settings
        self.guidance_scale = conditioning.guidance_scale
        self.split = bool(settings["guidance_split"]) and group.size > 1
        self.conditioning = conditioning.branch(group.rank * 2 // group.size) if self.split else conditioning
        self.branch = group.split(_halves(group.size)) if self.split else group
        self.exchange = StaleExchange(self.branch, frozen=settings["sync_mode"] == "no_sync")
        self.steps_done = 0
        if self.branch.size > 1:
            hook_layers(unet, self.exchange, mode=settings["sync_mode"], unbiased=bool(settings["unbiased_variance"]))
            self.hook_attention()

    def hook_attention(self) -> None:
        """Put hooks on what computes keys and values."""
        for name, attention in self_attentions(self.unet):
            register(attention.to_k, KeysOfAll(f"{name}.to_k", self.exchange))
            register(attention.to_v, KeysOfAll(f"{name}.to_v", self.exchange))

    def begin(self, timesteps: Tensor) -> None:
        super().begin(timesteps)
        self.steps_done = 0
        self.exchange.forget()

    def noise(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        always = self.settings["sync_mode"] == "full_sync"
        self.begin_step(synchronous=always or self.steps_done < self.settings["warmup_steps"])
        stripe = predict_noise(self.unet, latents, timestep, self.conditioning)
        self.end_step()
        self.steps_done += 1
        stripes = self.group.all_gather(stripe)
        if self.split:
            halves = (torch.cat([stripes[rank] for rank in half], dim=2) for half in _halves(len(stripes)))
            whole = torch.cat([*halves])
        else:
            whole = torch.cat(stripes, dim=2)
        return apply_guidance(whole, self.guidance_scale, latents.dtype)

    def begin_step(self, *, synchronous: bool) -> None:
        self.exchange.synchronous = synchronous

    def end_step(self) -> None:
        self.exchange.flush()


def _halves(size: int) -> tuple[range, range]:
    return range(size // 2), range(size // 2, size)


class DistriFusionDenoiser(StripeDenoiser):
    """One rank of DistriFusion: self-attention sees the whole image."""
