"""What stands around the UNet: CLIP text encoders that make conditioning of prompts, autoencoders that make images.

The text encoders are those of Stable Diffusion 1 (CLIP ViT-L/14), 2 (OpenCLIP ViT-H/14) and XL (both CLIP ViT-L and
OpenCLIP ViT-bigG/14); the autoencoders are Stable Diffusion's own and the tiny one (TAESD) that small devices use.
A `Conditioning` is what every UNet evaluation of a run takes from them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.perf import TEXT_TOKENS

from .weights import BROKEN, PLACE, broken, fill, load, read_config

Vae = AutoencoderKL | AutoencoderTiny

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection

FIRST_TOKEN, LAST_TOKEN = 49406, 49407
"""CLIP's marks around a prompt; the second also pads it."""

_KINDS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}

# OpenCLIP-H is used without its last layer: 23 of 24.
ENCODERS: dict[str, tuple[type[TextEncoder], dict[str, Any]]] = {
    "clip-l": (
        CLIPTextModel,
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    ),
    "openclip-h": (
        CLIPTextModel,
        {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
    ),
    "openclip-bigg": (
        CLIPTextModelWithProjection,
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
    ),
}

ENCODERS_OF_WIDTH = {768: ("clip-l",), 1024: ("openclip-h",), 2048: ("clip-l", "openclip-bigg")}
"""Which encoders fill a UNet's cross_attention_dim, in Stable Diffusion 1, 2 and XL."""

_AUTOENCODER_KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Stable Diffusion's autoencoder (`vae/config.json` of every release), but for its latents' scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What every UNet call is conditioned on, and the scale of classifier-free guidance.

    `embeds`: (branches x images, tokens, width); under guidance there are two branches, the empty prompts first, as in
    diffusers. `added` holds SDXL's `text_embeds` and `time_ids`, with the same first dimension.
    """

    embeds: Tensor
    guidance_scale: float
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    def branch(self, index: int) -> Conditioning:
        """One branch alone: 0 the empty prompts, 1 the prompts."""
        added = {name: tensor.chunk(2)[index] for name, tensor in self.added.items()}
        return replace(self, embeds=self.embeds.chunk(2)[index], added=added, guidance_scale=1.0)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another precision."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.added.items()}
        return replace(self, embeds=self.embeds.to(device, dtype), added=moved)


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def build_text_encoder(
    name: str, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder `clip-l`, `openclip-h` or `openclip-bigg` with seeded weights. Other names: `InputError`.

    The feed-forward layers are four times as wide as the hidden state, in all of CLIP. On `meta` it has shapes alone.
    """
    if name not in ENCODERS:
        raise InputError(unknown_name("text encoder", name, list(ENCODERS)))
    kind, fields = ENCODERS[name]
    width = fields["hidden_size"]
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(**fields, intermediate_size=4 * width, projection_dim=width))
    return fill(encoder, seed=seed, device=device, dtype=dtype)


def build_text_encoders(
    names: Sequence[str], *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[TextEncoder, ...]:
    """The text encoders of a model by name (`text_encoders` of a catalogue row), each with weights of its own."""
    return tuple(
        build_text_encoder(name, seed=seed + index, device=device, dtype=dtype) for index, name in enumerate(names)
    )


def load_text_encoder(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """The text encoder of a folder: a CLIPTextModel, with or without projection, as its config says.

    Raises `InputError` for another architecture and for files that are missing or broken.
    """
    architectures = read_config(folder).get("architectures") or []
    kind = next((_KINDS[name] for name in architectures if name in _KINDS), None)
    if kind is None:
        rule = f"config.json must name one of these architectures: {', '.join(_KINDS)}"
        raise InputError(Problem(PLACE, str(folder), rule, "Other text encoders are not supported."))
    encoder: TextEncoder = load(kind, folder, device=device, dtype=dtype)
    return encoder


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder. Raises `InputError` where its files are missing or broken."""
    if not folder.is_dir():
        remedy = "Copy the tokenizer beside its text encoder: prompts cannot be read without it."
        raise InputError(Problem(PLACE, str(folder), "there is no such folder", remedy))
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except BROKEN as error:
        raise broken(folder, error) from error
    return tokenizer


def token_ids(prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> Tensor:
    """Prompts as (prompts, 77) token ids. Without a tokenizer's files each prompt stands for ids seeded by its text.

    The ids begin with CLIP's first mark and are padded with its last; longer prompts are cut off. An empty prompt has
    no ids between the marks, as with a tokenizer.
    """
    if tokenizer is not None:
        read = tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        read_ids: Tensor = read.input_ids
        return read_ids
    ids = torch.full((len(prompts), TEXT_TOKENS), LAST_TOKEN)
    ids[:, 0] = FIRST_TOKEN
    for row, prompt in zip(ids, prompts, strict=True):
        if prompt:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            row[1:-1] = torch.randint(FIRST_TOKEN, (TEXT_TOKENS - 2,), generator=generator)
    return ids


@torch.inference_mode()
def embed(encoders: Sequence[TextEncoder], ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (prompts, 77, width) of one batch of ids per encoder, and the pooled ones of two encoders.

    One encoder gives its last hidden state; two (SDXL) give their last but one, side by side, and the second's pooled
    projection, as diffusers' pipelines do.
    """
    if len(encoders) == 1:
        return encoders[0](ids[0].to(encoders[0].device)).last_hidden_state, None
    outputs = [
        encoder(batch.to(encoder.device), output_hidden_states=True)
        for encoder, batch in zip(encoders, ids, strict=True)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


def encode(
    encoders: Sequence[TextEncoder],
    prompts: Sequence[str],
    *,
    height_px: int,
    width_px: int,
    guidance_scale: float = 7.5,
    tokenizers: Sequence[CLIPTokenizer] | None = None,
) -> Conditioning:
    """The conditioning of one image per prompt; under guidance the empty prompts come first.

    SDXL's empty prompts are zeros, as in its pipeline (`force_zeros_for_empty_prompt`), and its time ids are the
    image's size, no crop, and the size again.
    """
    readers: Sequence[CLIPTokenizer | None] = tokenizers or [None] * len(encoders)
    embeds, pooled = embed(encoders, [token_ids(prompts, reader) for reader in readers])
    if guidance_scale > 1.0:
        if pooled is not None:
            embeds, pooled = (torch.cat([torch.zeros_like(tensor), tensor]) for tensor in (embeds, pooled))
        else:
            empty, _ = embed(encoders, [token_ids([""], reader) for reader in readers])
            embeds = torch.cat([empty.expand_as(embeds), embeds])
    added = {} if pooled is None else {"text_embeds": pooled, "time_ids": time_ids(pooled, height_px, width_px)}
    return Conditioning(embeds=embeds, guidance_scale=guidance_scale, added=added)


def time_ids(pooled: Tensor, height_px: int, width_px: int, count: int = 6) -> Tensor:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2), in pixels, for every row of `pooled`: (rows, `count`).

    Original size, top left corner of the crop, target size, each as height and width.
    """
    row = torch.tensor([height_px, width_px, 0, 0, height_px, width_px][:count], dtype=pooled.dtype)
    return row.to(pooled.device).expand(len(pooled), count)


# ---- Images ----------------------------------------------------------------------------------------------------------


def build_vae(
    name: str,
    *,
    scaling_factor: float = 0.18215,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Vae:
    """The autoencoder `autoencoder-kl` or `taesd` with seeded weights. Raises `InputError` for other names.

    `scaling_factor` is that of autoencoder-kl's latents: 0.18215, in SDXL 0.13025; TAESD's latents are not scaled.
    """
    if name not in (known := ["autoencoder-kl", "taesd"]):
        raise InputError(unknown_name("autoencoder", name, known))
    with torch.device("meta"):
        fields = {**_AUTOENCODER_KL, "scaling_factor": scaling_factor}
        vae: Vae = AutoencoderTiny() if name == "taesd" else AutoencoderKL(**fields)
    return fill(vae, seed=seed, device=device, dtype=dtype)


def load_vae(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """The autoencoder of a folder: AutoencoderKL or AutoencoderTiny, as its config says.

    Raises `InputError` for another class and for files that are missing or broken.
    """
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    name = read_config(folder).get("_class_name")
    if name not in kinds:
        raise InputError(Problem(PLACE, str(folder), f"_class_name {name!r} must be one of {', '.join(kinds)}"))
    vae: Vae = load(kinds[name], folder, device=device, dtype=dtype)
    return vae


@torch.inference_mode()
def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Images (images, 3, 8 x rows, 8 x columns), values around -1 to 1, of latents (images, 4, rows, columns).

    Latents are divided by the autoencoder's `scaling_factor`, which brought them to unit variance for the UNet.
    """
    images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"], return_dict=False)[0]
    return images
