"""Latents into images: the autoencoders of Stable Diffusion, the whole one and the tiny one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from executors.weights import PLACE, fill, load, read_config
from hybridsd_sim.errors import InputError, Problem, unknown_name

Vae = AutoencoderKL | AutoencoderTiny


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
        vae = AutoencoderTiny() if name == "taesd" else _autoencoder_kl(scaling_factor)
    return fill(vae, seed=seed, device=device, dtype=dtype)


def _autoencoder_kl(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scaling_factor,
    )


def load_vae(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """The autoencoder of a folder: AutoencoderKL or AutoencoderTiny, as its config says."""
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    said = read_config(folder).get("_class_name")
    if said not in kinds:
        raise InputError(Problem(PLACE, str(folder), f"_class_name {said!r} must be one of {', '.join(kinds)}"))
    vae: Vae = load(kinds[said], folder, device=device, dtype=dtype)
    return vae


@torch.inference_mode()
def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Images (images, 3, 8 x rows, 8 x columns), values around -1 to 1, of latents (images, 4, rows, columns)."""
    images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return images
