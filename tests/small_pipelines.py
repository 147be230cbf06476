"""Small models with every part and weights of their own, which a worker has loaded in a moment."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from executors.models import build_unet, build_vae, fill
from executors.models.encoders import FIRST_TOKEN, LAST_TOKEN
from own_catalogue import MODELS, own_catalogue

WIDTH = 8
"""The width of the small text encoder, and of the cross-attention of models that go with it."""


def small_catalogue(folder: Path) -> Path:
    """`own_catalogue`, its small models made for the small text encoder."""
    path = own_catalogue(folder) / "catalog" / "models.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    for row in rows:
        if row["name"] in MODELS:
            row["config"] = json.dumps(_config(row["name"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def small_pipeline(folder: Path, name: str, *, seed: int) -> Path:
    """A diffusers folder of a small model: UNet, autoencoder, text encoder and a tokenizer of the letters a and b.

    The seed is the UNet's: all else is the same in every folder, as in models that can take over from one another.
    """
    build_unet(_config(name), seed=seed).save_pretrained(folder / "unet")
    build_vae("taesd", seed=0).save_pretrained(folder / "vae")
    _text_encoder().save_pretrained(folder / "text_encoder")
    _write_tokenizer(folder / "tokenizer")
    return folder


def _config(name: str) -> dict[str, object]:
    return MODELS[name] | {"cross_attention_dim": WIDTH}


def _text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    return fill(encoder, seed=0, device="cpu", dtype=torch.float32)


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    words = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "<|startoftext|>": FIRST_TOKEN, "<|endoftext|>": LAST_TOKEN}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}), encoding="utf-8")
