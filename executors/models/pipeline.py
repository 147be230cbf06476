"""A model with all its parts, found by its name in the catalogue or by the path of its config.

Every part is built when it is first asked for, from seeded weights or from a local diffusers folder, and the first
inputs of a run are drawn so that every device starts from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.perf import PIXELS_PER_LATENT, TEXT_TOKENS, unet_layers, unet_params
from hybridsd_sim.profiles import Profiles, load_profiles

from .encoders import (
    ENCODERS_OF_WIDTH,
    Conditioning,
    TextEncoder,
    Vae,
    build_text_encoders,
    build_vae,
    encode,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    time_ids,
)
from .unet import added_width, build_unet, load_unet, plain_config
from .weights import PLACE, read_config, read_json

_LATENT_SCALE = {False: 0.18215, True: 0.13025}
"""AutoencoderKL's scaling factor in Stable Diffusion 1 and 2, and in SDXL."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A UNet and what belongs to it; every part is built when it is first asked for.

    `prediction` is what the UNet predicts: `epsilon` or `v`. With `weights` every part comes from that folder, and a
    part that it lacks is refused; without, all weights are seeded.
    """

    name: str
    config: Mapping[str, Any]
    prediction: str
    encoder_names: tuple[str, ...]
    vae_name: str
    weights: Path | None
    seed: int
    device: torch.device | str
    dtype: torch.dtype

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        if self.weights:
            return load_unet(self.weights / "unet", device=self.device, dtype=self.dtype)
        return build_unet(self.config, seed=self.seed, device=self.device, dtype=self.dtype)

    @cached_property
    def vae(self) -> Vae:
        if self.weights:
            return load_vae(self.weights / "vae", device=self.device, dtype=self.dtype)
        scale = _LATENT_SCALE[self._takes_pooled_text]
        return build_vae(self.vae_name, scaling_factor=scale, seed=self.seed, device=self.device, dtype=self.dtype)

    @cached_property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        if self.weights:
            folders = self._folders("text_encoder")
            return tuple(load_text_encoder(folder, device=self.device, dtype=self.dtype) for folder in folders)
        if not self.encoder_names:
            width = self.config.get("cross_attention_dim")
            remedy = f"Known widths: {', '.join(map(str, ENCODERS_OF_WIDTH))}; or use seeded_conditioning."
            raise InputError(Problem("config.cross_attention_dim", str(width), "no text encoder of this width", remedy))
        return build_text_encoders(self.encoder_names, seed=self.seed, device=self.device, dtype=self.dtype)

    @cached_property
    def tokenizers(self) -> tuple[Any, ...] | None:
        """One per text encoder; None without a weights folder, where prompts become seeded token ids."""
        return tuple(load_tokenizer(folder) for folder in self._folders("tokenizer")) if self.weights else None

    def encode(
        self, prompts: Sequence[str], *, height_px: int, width_px: int, guidance_scale: float = 7.5
    ) -> Conditioning:
        """The conditioning of one image per prompt, from this model's text encoders."""
        return encode(
            self.text_encoders,
            prompts,
            height_px=height_px,
            width_px=width_px,
            guidance_scale=guidance_scale,
            tokenizers=self.tokenizers,
        )

    @property
    def _takes_pooled_text(self) -> bool:
        return self.config.get("addition_embed_type") == "text_time"

    def _folders(self, part: str) -> Iterator[Path]:
        if self.weights:
            yield self.weights / part
            if self._takes_pooled_text:
                yield self.weights / f"{part}_2"


def load_pipeline(
    name: str,
    *,
    weights: Path | None = None,
    vae: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    profiles: Profiles | None = None,
) -> Pipeline:
    """The model of a catalogue name, or of a path to a config.json or to the folder that holds it.

    `weights` is a diffusers pipeline folder (unet/, and where they are needed vae/, text_encoder/, tokenizer/ and their
    `_2`); its UNet must be the network that is named. `vae` chooses another autoencoder than the model's own. Raises
    `InputError` for unknown names, unsupported configs, folders that are missing and UNets that differ.
    """
    known = profiles or load_profiles()
    # a file or folder that happens to be called as a catalogue model is must be written `./`
    is_path = "/" in name or name.endswith(".json") or (name not in known.models and Path(name).exists())
    if is_path:
        parts = _from_path(name)
    else:
        row = known.model(name)
        parts = {
            "name": row.name,
            "config": plain_config(row.config),
            "prediction": row.prediction,
            "encoder_names": row.text_encoders,
            "vae_name": row.vae,
        }
    if weights is not None:
        # Weights under another model's name would put that name on their times and images.
        config = plain_config(read_config(weights / "unet"))
        smallest_px = PIXELS_PER_LATENT << (len(config.get("block_out_channels", "1234")) + 2)
        if unet_layers(config, smallest_px, smallest_px) != unet_layers(parts["config"], smallest_px, smallest_px):
            own = f"the UNet in this folder has {unet_params(config):,} parameters"
            remedy = "Name its config.json as the model, or another folder."
            raise InputError(
                Problem(PLACE, str(weights / "unet"), f"{own} in other layers than {parts['name']}", remedy)
            )
        parts["config"] = config
        sampler = weights / "scheduler" / "scheduler_config.json"
        if sampler.is_file() and (predicted := read_json(sampler).get("prediction_type")):
            parts["prediction"] = {"v_prediction": "v"}.get(predicted, predicted)
    unet_params(parts["config"])
    parts["vae_name"] = vae or parts["vae_name"]
    return Pipeline(**parts, weights=weights, seed=seed, device=device, dtype=dtype)


def _from_path(name: str) -> dict[str, Any]:
    """A config.json, the folder around it, or a pipeline folder with unet/config.json."""
    path = Path(name).resolve()
    file = path if path.suffix == ".json" else (path / "unet" if (path / "unet").is_dir() else path) / "config.json"
    config = plain_config(read_json(file))
    folder = file.parent.parent if file.parent.name == "unet" else file.parent
    return {
        "name": folder.name if file.stem == "config" else file.stem,
        "config": config,
        "prediction": "epsilon",
        "encoder_names": ENCODERS_OF_WIDTH.get(config.get("cross_attention_dim", 1280), ()),
        "vae_name": "autoencoder-kl",
    }


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def seeded_conditioning(
    unet: UNet2DConditionModel, *, images: int = 1, guidance_scale: float = 7.5, seed: int = 0
) -> Conditioning:
    """Random conditioning of the right widths for this UNet, in its precision and on its device; no text encoder.

    Embeddings are (branches x images, 77, cross_attention_dim), two branches under guidance; UNets of SDXL's kind get
    pooled embeddings and the time ids of a 1024 x 1024 px image. Drawn on the CPU: the same on every device.
    """
    config = plain_config(unet.config)
    generator = torch.Generator().manual_seed(seed)
    rows = images * (2 if guidance_scale > 1.0 else 1)
    embeds = torch.randn((rows, TEXT_TOKENS, config["cross_attention_dim"]), generator=generator)
    added = {}
    if width := added_width(config):
        pooled = torch.randn((rows, width), generator=generator)
        added = {"text_embeds": pooled, "time_ids": time_ids(pooled, 1024, 1024)}
    conditioning = Conditioning(embeds=embeds, guidance_scale=guidance_scale, added=added)
    return conditioning.to(unet.device, unet.dtype)


def seeded_latents(unet: UNet2DConditionModel, *, images: int, height_px: int, width_px: int, seed: int = 0) -> Tensor:
    """Standard normal latents (images, C, height_px / 8, width_px / 8) in float32, on the UNet's device.

    Drawn on the CPU: the same on every device. Raises `InputError` for sizes that this UNet cannot halve often enough.
    """
    config = plain_config(unet.config)
    unet_layers(config, height_px, width_px)
    shape = (images, config["in_channels"], height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device)
