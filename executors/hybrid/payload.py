"""The latent transfer: what crosses a switch between two machines, as safetensors bytes.

The latents cross as they are (Hybrid SD, arXiv 2408.06646), with the solver's history, so that a second-order sampler
goes on without a restart, and the prompt's embeddings unless the receiver encodes the prompt itself. A SHA-256 over all
of it guards against damage on the way; it is no signature, so it does not guard against a forger.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hybridsd_sim.errors import InputError, Problem, unknown_name

from ..models import Conditioning, SamplerState, sampler_name, sampler_prediction, sampler_state

FORMAT = "hybridsd-handover"

VERSION = "1"

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}

_PLACE = "hand-over"

_AGREED = ("latent_space", "prediction", "sampler", "num_inference_steps", "step")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentTransfer:
    """A run stopped before step `step`, with all that another machine needs to go on.

    `latents`: (images, C, H, W), float32. `latent_space` and `prediction` are the catalogue's words (`sd1`, `epsilon`).
    `embeds` and `added` are those of a `Conditioning`; `embeds` None lets the receiver encode the prompt itself.
    """

    latents: Tensor
    step: int
    num_inference_steps: int
    sampler: str
    prediction: str
    latent_space: str
    guidance_scale: float
    state: SamplerState = field(default_factory=SamplerState)
    embeds: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def conditioning(self) -> Conditioning | None:
        """What to condition the next model on; None if it was left to the receiver."""
        if self.embeds is None:
            return None
        return Conditioning(embeds=self.embeds, guidance_scale=self.guidance_scale, added=self.added)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTransfer:
    """What a receiver can go on with; None accepts anything.

    `embeds_width` is the width of the embeddings that its model wants and None when it encodes the prompt itself;
    `added` names the added conditions that must then come too.
    """

    latent_space: str
    prediction: str
    sampler: str | None = None
    num_inference_steps: int | None = None
    step: int | None = None
    shape: tuple[int, ...] | None = None
    channels: int | None = None
    embeds_width: int | None = None
    added: tuple[str, ...] = ()


def capture_transfer(
    sampler: Any,
    latents: Tensor,
    step: int,
    *,
    latent_space: str,
    conditioning: Conditioning,
    with_embeds: bool = True,
) -> LatentTransfer:
    """The latent transfer of a run whose sampler has done the steps before `step`.

    `with_embeds` False leaves the embeddings out, for a receiver that encodes the prompt itself.
    """
    return LatentTransfer(
        latents=latents,
        step=step,
        num_inference_steps=len(sampler.timesteps),
        sampler=sampler_name(sampler),
        prediction=sampler_prediction(sampler),
        latent_space=latent_space,
        guidance_scale=conditioning.guidance_scale,
        state=sampler_state(sampler),
        embeds=conditioning.embeds if with_embeds else None,
        added=conditioning.added if with_embeds else {},
    )


# ---- Writing --------------------------------------------------------------------------------------------------------


def serialise(transfer: LatentTransfer, precision: str = "fp32") -> bytes:
    """The transfer as bytes of a safetensors file, its tensors in `fp32` or `fp16`.

    Tensors are named `latents`, `history.N`, `embeds` and `added.NAME`; the header's metadata say which run they
    continue. Raises `InputError` for another precision and for tensors with NaN or infinity, which fp16 makes of
    values beyond 65504.
    """
    if precision not in PRECISIONS:
        raise InputError(unknown_name("precision", precision, tuple(PRECISIONS)))
    named = {"latents": transfer.latents}
    named |= {f"history.{index}": tensor for index, tensor in enumerate(transfer.state.history)}
    if transfer.embeds is not None:
        named["embeds"] = transfer.embeds
    named |= {f"added.{name}": tensor for name, tensor in transfer.added.items()}
    tensors = {
        # a copy in memory of its own, which safetensors asks for
        name: tensor.detach().to("cpu", PRECISIONS[precision]).clone(memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "precision": precision,
        "step": str(transfer.step),
        "num_inference_steps": str(transfer.num_inference_steps),
        "sampler": transfer.sampler,
        "order": str(transfer.state.order),
        "prediction": transfer.prediction,
        "latent_space": transfer.latent_space,
        "guidance_scale": repr(float(transfer.guidance_scale)),
        "shape": _shape_text(transfer.latents.shape),
    }
    if problems := list(_not_finite(tensors)):
        raise InputError(problems)
    return save(tensors, {**metadata, "checksum": checksum(tensors, metadata)})


def _shape_text(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape))


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal over metadata and tensors by name, whatever order a file keeps them in."""
    plain_config = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([metadata, plain_config], sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_finite(tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    for name, tensor in tensors.items():
        if count := int((~torch.isfinite(tensor)).sum()):
            remedy = "Use fp32, or look for the step that overflowed."
            yield Problem(f"{_PLACE} {name}", f"{count} values are NaN or infinite", "must be finite", remedy)


# ---- Reading --------------------------------------------------------------------------------------------------------


def parse(data: bytes, expected: ExpectedTransfer) -> LatentTransfer:
    """The transfer that `serialise` wrote, its tensors in float32 on the CPU.

    Raises `InputError` for bytes that are damaged, of another format or version, or no continuation of a run that
    `expected` describes; it names everything that does not agree.
    """
    tensors, metadata = _unpack(data)
    # In memory of their own: a view into the bytes is aligned otherwise, which can change sums.
    own = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    try:
        step = int(metadata["step"])
        history = tuple(own[name] for name in sorted(own) if name.startswith("history."))
        transfer = LatentTransfer(
            latents=own["latents"],
            step=step,
            num_inference_steps=int(metadata["num_inference_steps"]),
            sampler=metadata["sampler"],
            prediction=metadata["prediction"],
            latent_space=metadata["latent_space"],
            guidance_scale=float(metadata["guidance_scale"]),
            state=SamplerState(history=history, order=int(metadata["order"]), step=step),
            embeds=own.get("embeds"),
            added={name.removeprefix("added."): own[name] for name in own if name.startswith("added.")},
        )
    except (KeyError, ValueError) as error:
        raise _damaged(f"no valid entry {error}", "must have every entry of its format") from error
    own_problems = [*_not_finite(tensors), *_inconsistent(transfer, tensors, metadata)]
    if problems := own_problems or list(_unexpected(transfer, expected)):
        raise InputError(problems)
    return transfer


def _unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a whole file in this format; refused where its checksum does not agree."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")  # safetensors: the header's length, the header as JSON, the tensors
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(f"{len(data)} bytes ({error})", "must be a whole safetensors file") from error
    written = (metadata.get("format"), metadata.get("version"))
    if written != (FORMAT, VERSION):
        rule = f"must be {FORMAT} version {VERSION}"
        remedy = "Run the same release on both sides."
        raise InputError(Problem(f"{_PLACE} format", f"{written[0]} version {written[1]}", rule, remedy))
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    if metadata.get("checksum") != (actual := checksum(tensors, rest)):
        raise _damaged(f"checksum {metadata.get('checksum')}", f"its contents have {actual}")
    return tensors, metadata


def _damaged(value: str, rule: str) -> InputError:
    return InputError(
        Problem(_PLACE, value, rule, "It was damaged on the way or another program wrote it: send it anew.")
    )


def _inconsistent(
    transfer: LatentTransfer, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[Problem]:
    """Entries that contradict one another, from a writer that did not use `serialise`."""
    wanted = PRECISIONS.get(metadata.get("precision", ""))
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            rule = f"must have the precision announced, {metadata.get('precision')}"
            yield Problem(f"{_PLACE} {name}", str(tensor.dtype), rule)
    if not math.isfinite(transfer.guidance_scale):
        yield Problem(f"{_PLACE} guidance_scale", str(transfer.guidance_scale), "must be finite")
    shape = _shape_text(transfer.latents.shape)
    if metadata.get("shape") != shape or transfer.latents.ndim != 4:
        yield Problem(f"{_PLACE} latents", shape, f"must be images x C x H x W as announced: {metadata.get('shape')}")
    for tensor in transfer.state.history:
        if tensor.shape != transfer.latents.shape:
            yield Problem(f"{_PLACE} history", _shape_text(tensor.shape), f"must have the latents' shape, {shape}")
    if not 0 <= transfer.step <= transfer.num_inference_steps:
        yield Problem(f"{_PLACE} step", str(transfer.step), f"must lie in 0 to {transfer.num_inference_steps}")


def _unexpected(transfer: LatentTransfer, expected: ExpectedTransfer) -> Iterator[Problem]:
    """What the receiver cannot go on with."""
    remedy = "Both sides must run the same job with models of one latent space."
    pairs = [(name, getattr(transfer, name), getattr(expected, name)) for name in _AGREED]
    shape = tuple(transfer.latents.shape)
    pairs += [("shape", shape, expected.shape), ("channels", shape[1], expected.channels)]
    for name, given, wanted in pairs:
        if wanted not in (None, given):
            yield Problem(f"{_PLACE} {name}", str(given), f"this side runs {wanted}", remedy)
    if expected.embeds_width is None:
        return
    conditioning = transfer.conditioning
    if conditioning is None:
        remedy = "Send them along."
        yield Problem(f"{_PLACE} embeds", "none", "this side has no text encoder, so it needs the embeddings", remedy)
        return
    rows, width, embeds = conditioning.branches * len(transfer.latents), expected.embeds_width, conditioning.embeds
    if embeds.shape[::2] != (rows, width):
        rule = f"must be {rows} (branches x images) times tokens times a width of {width}"
        yield Problem(f"{_PLACE} embeds", _shape_text(embeds.shape), rule, "Both models must share a text encoder.")
    for name in expected.added:
        if name not in conditioning.added or len(conditioning.added[name]) != rows:
            rule = f"this side's model needs added condition {name}, {rows} rows of it"
            yield Problem(f"{_PLACE} added", ", ".join(conditioning.added) or "none", rule)
