"""Real architectures built from their configs: UNets, autoencoders and text encoders of Stable Diffusion.

Weights are seeded random numbers, or those of a local diffusers folder. A UNet is any config of diffusers'
`UNet2DConditionModel` that `unet_layers` can count, pruned ones included; a name is only a way to find a config.

The numbers in a model: drawn from a seed, or read from a local folder. Nothing here reaches for the network.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hybridsd_sim.errors import InputError, Problem, RunError
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

ModuleT = TypeVar("ModuleT", bound=nn.Module)

PLACE = "weights folder"

BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
"""What the libraries raise on files that are missing, cut short or of another network."""


def fill(module: ModuleT, *, seed: int, device: torch.device | str, dtype: torch.dtype) -> ModuleT:
    """Give a module that stands on the meta device memory and seeded weights; evaluation mode, no gradients.

    Weights of two dimensions and more have mean 0 and variance 1 / fan-in, so that activations stay of order 1 whatever
    the width; norm weights lie near 1; biases are small but not 0, so that a wrong edge shows. All numbers come from
    one generator on `device` and are drawn in float32, so that every precision holds the same network. On `meta` the
    module keeps its shapes alone.
    """
    module = nn.Module.to(module, dtype=dtype)  # diffusers' own `to` warns without a reason
    module = module.to_empty(device=device).eval().requires_grad_(requires_grad=False)
    if torch.device(device).type == "meta":
        return module
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        _draw(name, parameter, generator)
    for name, buffer in module.named_buffers():
        buffer.copy_(_constant(name, buffer))
    return module


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Give a parameter its numbers. Uniform ones: on a CPU normal ones take eight times as long and change nothing."""
    in_place = parameter.dtype == torch.float32
    numbers = parameter if in_place else torch.empty(parameter.shape, device=parameter.device)
    numbers.uniform_(-1.0, 1.0, generator=generator)
    if parameter.dim() > 1:
        numbers.mul_(math.sqrt(3.0 / parameter[0].numel()))
    else:
        numbers.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    if not in_place:
        parameter.copy_(numbers)


def _constant(name: str, buffer: Tensor) -> Tensor:
    """What a buffer held before the meta device forgot it."""
    if not name.endswith("position_ids"):
        raise RunError(f"the buffer {name} has no known content, so seeded weights cannot be made; load real ones")
    return torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises `InputError` where there is none, or none that can be read."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` for a file that is missing, unreadable or holds something else."""
    if not path.is_file():
        remedy = "Name a folder that diffusers' save_pretrained wrote."
        raise InputError(Problem(PLACE, str(path), "there is no such file", remedy))
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(PLACE, str(path), f"is not readable as JSON ({error})", "Write it again.")) from error
    if not isinstance(said, dict):
        raise InputError(Problem(PLACE, str(path), "must hold a JSON object", "Write it again."))
    return said


def load(kind: Any, folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model of class `kind` with a folder's weights (safetensors); evaluation mode, no gradients.

    Raises `InputError` for files that are missing or broken and for weights that the network needs and the file lacks.
    """
    read_config(folder)
    try:
        # diffusers may draw initial weights before it reads the file, which is no reason to move anybody's generator
        with torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except BROKEN as error:
        raise broken(folder, error) from error
    absent = [*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))]
    refuse_absent(folder, absent)
    return finished(model, device, dtype)


def finished(module: ModuleT, device: torch.device | str, dtype: torch.dtype) -> ModuleT:
    """The module on its device, in its precision, for evaluation only."""
    return module.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)


def broken(folder: Path, error: Exception) -> InputError:
    """The refusal of a folder that a library could not read, with the first line of its reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "It must hold a config.json and whole safetensors files; write it again with save_pretrained."
    return InputError(Problem(PLACE, str(folder), f"cannot be loaded ({reason})", remedy))


def refuse_absent(folder: Path, names: list[str]) -> None:
    """Refuse weights without these parameters: they would keep whatever numbers they were born with."""
    if names:
        shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        remedy = "The weights belong to another config, or the file was cut short."
        raise InputError(Problem(PLACE, str(folder), f"parameters are missing or of another shape: {shown}", remedy))


PRUNING = ("resnet_inner_channels", "self_attention_heads")
"""Config fields of pruned models, which diffusers does not know; see `hybridsd_sim.perf.unet_config`."""

_TIME_IDS = 6

_LATENT_SCALE = {False: 0.18215, True: 0.13025}
"""AutoencoderKL's scaling factor in Stable Diffusion 1 and 2, and in SDXL."""


# ---- UNets ----------------------------------------------------------------------------------------------------------


def build_unet(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> UNet2DConditionModel:
    """The UNet of a config with seeded weights, for evaluation; on the device `meta` its shapes alone.

    `config` holds the fields of diffusers' `UNet2DConditionModel`, and for pruned models those of
    `hybridsd_sim.perf.unet_config`; `dict(unet.config)` still describes the network. Raises `InputError` for parts that
    cannot be counted, with the reason.
    """
    return fill(_skeleton(config), seed=seed, device=device, dtype=dtype)


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's config as plain JSON values, without diffusers' private fields."""
    plain: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return plain


def _skeleton(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The network on the meta device."""
    fields = described(config)
    unet_params(fields)
    _added_width(fields)
    pruning = {name: fields.pop(name) for name in PRUNING if name in fields}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**fields)
            _prune(unet, **pruning)
    except (TypeError, ValueError) as error:
        raise InputError(Problem("config", "UNet2DConditionModel", f"diffusers refuses it: {error}")) from error
    unet.register_to_config(**pruning)
    return unet


def _added_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text embedding that a text_time UNet takes beside its time ids; 0 for other UNets."""
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
            _narrow_resnet(resnet, channels)
    if self_attention_heads is not None:
        transformers = [part for block in blocks for part in getattr(block, "attentions", ()) if part is not None]
        for transformer, heads in zip(transformers, self_attention_heads, strict=True):
            for block in transformer.transformer_blocks:
                _keep_heads(block.attn1, heads)


def _narrow_resnet(resnet: ResnetBlock2D, channels: int) -> None:
    """Give the part between the two convolutions another width; input and output keep theirs."""
    outer = resnet.conv2.out_channels
    resnet.conv1 = nn.Conv2d(resnet.in_channels, channels, kernel_size=3, padding=1)
    resnet.time_emb_proj = nn.Linear(resnet.time_emb_proj.in_features, channels)
    resnet.norm2 = nn.GroupNorm(resnet.norm2.num_groups, channels, eps=resnet.norm2.eps)
    resnet.conv2 = nn.Conv2d(channels, outer, kernel_size=3, padding=1)


def _keep_heads(attention: Attention, heads: int) -> None:
    """Leave this many heads of the same width."""
    outer, inner = attention.query_dim, heads * (attention.inner_dim // attention.heads)
    attention.to_q, attention.to_k, attention.to_v = (nn.Linear(outer, inner, bias=False) for _ in range(3))
    attention.to_out[0] = nn.Linear(inner, outer)
    attention.heads = attention.sliceable_head_dim = heads
    attention.inner_dim = attention.inner_kv_dim = inner


def replica(module: nn.Module) -> Any:
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
    """The UNet of a folder with config.json and safetensors. Raises `InputError` for anything missing or broken."""
    config = described(read_config(folder))
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
    return finished(skeleton, device, dtype)


# ---- A whole model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
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


def load_model(
    name: str,
    *,
    weights: Path | None = None,
    vae: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    profiles: Profiles | None = None,
) -> Model:
    """The model of a catalogue name, or of a path to a config.json or to the folder that holds it.

    `weights` is a diffusers pipeline folder (unet/, and where they are needed vae/, text_encoder/, tokenizer/ and their
    `_2`); its UNet must be the network that is named. `vae` chooses another autoencoder than the model's own. Raises
    `InputError` for unknown names, unsupported configs, folders that are missing and UNets that differ.
    """
    known = profiles or load_profiles()
    parts = _from_path(name) if _is_path(name, known) else _from_catalogue(name, known)
    if weights is not None:
        folder_config = read_config(weights / "unet")
        _refuse_other_network(parts["name"], parts["config"], folder_config, weights / "unet")
        parts |= {"config": described(folder_config), **_said_prediction(weights)}
    unet_params(parts["config"])
    parts["vae_name"] = vae or parts["vae_name"]
    return Model(**parts, weights=weights, seed=seed, device=device, dtype=dtype)


def _is_path(name: str, profiles: Profiles) -> bool:
    """Whether a file or folder is meant; one that happens to be called as a catalogue model is must be written `./`."""
    return "/" in name or name.endswith(".json") or (name not in profiles.models and Path(name).exists())


def _from_catalogue(name: str, profiles: Profiles) -> dict[str, Any]:
    row = profiles.model(name)
    return {
        "name": row.name,
        "config": described(row.config),
        "prediction": row.prediction,
        "encoder_names": row.text_encoders,
        "vae_name": row.vae,
    }


def _from_path(name: str) -> dict[str, Any]:
    """A config.json, the folder around it, or a pipeline folder with unet/config.json."""
    path = Path(name).resolve()
    file = path if path.suffix == ".json" else (path / "unet" if (path / "unet").is_dir() else path) / "config.json"
    config = described(read_json(file))
    folder = file.parent.parent if file.parent.name == "unet" else file.parent
    return {
        "name": folder.name if file.stem == "config" else file.stem,
        "config": config,
        "prediction": "epsilon",
        "encoder_names": ENCODERS_OF_WIDTH.get(config.get("cross_attention_dim", 1280), ()),
        "vae_name": "autoencoder-kl",
    }


def _refuse_other_network(name: str, wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Weights under another model's name would put that name on their times and images."""
    fields = described(found)
    size = PIXELS_PER_LATENT << (len(fields.get("block_out_channels", "1234")) + 2)
    if unet_layers(fields, size, size) != unet_layers(wanted, size, size):
        rule = f"the UNet in this folder has {unet_params(fields):,} parameters in other layers than {name}"
        raise InputError(Problem(PLACE, str(folder), rule, "Name its config.json as the model, or another folder."))


def _said_prediction(weights: Path) -> dict[str, str]:
    """What the folder's own sampler says that the UNet predicts, if there is one."""
    file = weights / "scheduler" / "scheduler_config.json"
    said = read_json(file).get("prediction_type") if file.is_file() else None
    return {"prediction": {"v_prediction": "v"}.get(said, said)} if said else {}


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def seeded_conditioning(
    unet: UNet2DConditionModel, *, images: int = 1, guidance_scale: float = 7.5, seed: int = 0
) -> Conditioning:
    """Random conditioning of the right widths for this UNet, in its precision and on its device; no text encoder.

    Embeddings are (branches x images, 77, cross_attention_dim), two branches under guidance; UNets of SDXL's kind get
    pooled embeddings and the time ids of a 1024 x 1024 px image. Drawn on the CPU: the same on every device.
    """
    config = described(unet.config)
    generator = torch.Generator().manual_seed(seed)
    rows = images * (2 if guidance_scale > 1.0 else 1)
    embeds = torch.randn((rows, TEXT_TOKENS, config["cross_attention_dim"]), generator=generator)
    added = {}
    if width := _added_width(config):
        pooled = torch.randn((rows, width), generator=generator)
        added = {"text_embeds": pooled, "time_ids": time_ids(pooled, 1024, 1024)}
    conditioning = Conditioning(embeds=embeds, guidance_scale=guidance_scale, added=added)
    return conditioning.to(unet.device, unet.dtype)


def seeded_latents(unet: UNet2DConditionModel, *, images: int, height_px: int, width_px: int, seed: int = 0) -> Tensor:
    """Standard normal latents (images, C, height_px / 8, width_px / 8) in float32, on the UNet's device.

    Drawn on the CPU: the same on every device. Raises `InputError` for sizes that this UNet cannot halve often enough.
    """
    config = described(unet.config)
    unet_layers(config, height_px, width_px)
    shape = (images, config["in_channels"], height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device)
