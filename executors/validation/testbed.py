"""What is served in a calibration: two small Stable Diffusion pipelines on disk, and a profiles folder that knows them.

The pipelines are real ones, whole and small: UNets that take some 40 to 60 ms for a guided step on one CPU thread, a
CLIP text encoder with a tokenizer of single bytes, and a tiny autoencoder. Their weights are seeded random numbers,
which cost what trained ones cost. The UNets are deep and narrow: their few megabytes of weights stay in the caches, so
that neighbours who use the memory, on this machine or on its host, disturb their steps little.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

from hybridsd_sim.files import data_folder
from hybridsd_sim.perf import TEXT_TOKENS, unet_layers, unet_params

from ..models import build_unet, fill

LARGE, SMALL = "testbed-large", "testbed-small"

TEXT_ENCODER, VAE = "testbed-clip", "testbed-vae"

CLOUD, EDGE = "testbed-cloud", "testbed-edge"
"""Devices: the processes that serve as the one and as the other, whose times differ a little although all is alike."""

SIZE_PX = 128

_WIDTH = 256

_UNET: Mapping[str, Any] = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 3,
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 8,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    LARGE: {**_UNET, "block_out_channels": [64, 64]},
    SMALL: {**_UNET, "block_out_channels": [32, 32]},
}

_SOURCE = {"kind": "modelled", "source": "hybridsd_sim.executors, seeded weights", "source_date": "2026-11"}


@dataclass(frozen=True, slots=True)
class Testbed:
    """A folder with the pipelines (diffusers' layout) and the profiles folder that has them in its catalogue."""

    folder: Path

    @property
    def profiles(self) -> Path:
        return self.folder / "profiles"

    @property
    def weights(self) -> dict[str, Path]:
        """The pipeline of each model."""
        return {name: self.folder / "pipelines" / name for name in CONFIGS}


def build_testbed(folder: Path) -> Testbed:
    """Write what is missing of the testbed into a folder."""
    testbed = Testbed(folder)
    write_catalogue(testbed.profiles)
    for name, path in testbed.weights.items():
        if not _is_of(CONFIGS[name], path):
            _write_pipeline(CONFIGS[name], path)
    return testbed


# ---- Pipelines ------------------------------------------------------------------------------------------------------


def _is_of(config: Mapping[str, Any], path: Path) -> bool:
    """Whether a pipeline lies there whose UNet has this configuration."""
    file = path / "unet" / "config.json"
    return file.is_file() and config.items() <= json.loads(file.read_text(encoding="utf-8")).items()


def _write_pipeline(config: Mapping[str, Any], path: Path) -> None:
    """Under another name first, so that an interrupted writer leaves no half of one."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    build_unet(config).save_pretrained(part / "unet")
    _seeded_vae().save_pretrained(part / "vae")
    _seeded_text_encoder().save_pretrained(part / "text_encoder")
    _write_tokenizer(part / "tokenizer")
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def _seeded_vae() -> AutoencoderTiny:
    narrow = {f"{side}_block_out_channels": (16,) * 4 for side in ("encoder", "decoder")}
    with torch.device("meta"):
        vae = AutoencoderTiny(**narrow, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    return fill(vae, seed=0, device="cpu", dtype=torch.float32)


def _seeded_text_encoder() -> CLIPTextModel:
    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=_WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=4 * _WIDTH, projection_dim=_WIDTH,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
    )  # fmt: skip
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    return fill(encoder, seed=0, device="cpu", dtype=torch.float32)


def _write_tokenizer(path: Path) -> None:
    """A CLIP tokenizer that merges nothing: every byte of a prompt is a token."""
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_TOKENS}
    (path / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def _vocabulary() -> dict[str, int]:
    """Tokens of single bytes in CLIP's letters, inside a word and at its end, and the two marks."""
    letters = list(_byte_letters())
    ends = (f"{letter}</w>" for letter in letters)
    return {token: index for index, token in enumerate([*letters, *ends, "<|startoftext|>", "<|endoftext|>"])}


def _byte_letters() -> Iterator[str]:
    """A visible letter for every byte: its own where it has one, as in GPT-2's and CLIP's vocabularies."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    yield from (chr(byte) for byte in sorted(visible))
    yield from (chr(0x100 + index) for index in range(0x100 - len(visible)))


# ---- Profiles -------------------------------------------------------------------------------------------------------


def write_catalogue(folder: Path) -> Path:
    """The shipped catalogue with the testbed's models, components and devices in it, in `folder`."""
    shipped = data_folder("profiles") / "catalog"
    catalogue = folder / "catalog"
    catalogue.mkdir(parents=True, exist_ok=True)
    for path in shipped.glob("*.csv"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        columns = list(rows[0])
        with (catalogue / path.name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, *_added(path.stem)])
    return folder


def _added(table: str) -> Iterator[dict[str, Any]]:
    """The testbed's rows of a table."""
    if table == "models":
        yield from (_model(name, config) for name, config in CONFIGS.items())
    elif table == "components":
        yield _component(TEXT_ENCODER, "text_encode", _seeded_text_encoder())
        yield _component(VAE, "vae_decode", _seeded_vae().decoder)
    elif table == "edge_devices":
        yield from (_device(name) for name in (CLOUD, EDGE))


def _model(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "label": name, "latent_space": "sd1", "prediction": "epsilon", "native_px": SIZE_PX,
        "config": json.dumps(config), "params": unet_params(config), "ops": len(unet_layers(config, SIZE_PX, SIZE_PX)),
        "text_encoders": TEXT_ENCODER, "text_embedding_bytes_fp16": 2 * TEXT_TOKENS * _WIDTH,
        "cross_attention_dim": _WIDTH, "vae": VAE, "small_vae": VAE, **_SOURCE,
        "notes": "ops are its layers; it is only ever timed",
    }  # fmt: skip


def _component(name: str, component: str, module: torch.nn.Module) -> dict[str, Any]:
    params = sum(parameter.numel() for parameter in module.parameters())
    uncounted = dict.fromkeys(("flop_conv_512", "flop_linear_512", "flop_attention_512"), 0)
    notes = "FLOPs not counted: it is only ever timed"
    return {"name": name, "component": component, "params": params, "ops": 1, **uncounted, **_SOURCE, "notes": notes}


def _device(name: str) -> dict[str, Any]:
    return {
        "name": name, "label": "One thread of the machine that was calibrated", "device_class": "cpu",
        "usable_memory_fraction": 0.8, "power_source": "unknown: not metered", "default_runtime": "eager",
        "default_precision": "fp32", **_SOURCE,
    }  # fmt: skip
