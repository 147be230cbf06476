"""The numbers in a network: drawn from a seed, or read from a local diffusers folder; never from the hub.

Seeded weights make every architecture runnable without a download: seconds, bytes and memory do not depend on what
the weights are. A folder is read as diffusers' `save_pretrained` writes it, config.json and safetensors, and refused
with a reason where a file is missing, cut short or of another network.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from hybridsd_sim.errors import InputError, Problem, RunError

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
        in_place = parameter.dtype == torch.float32
        numbers = parameter if in_place else torch.empty(parameter.shape, device=parameter.device)
        numbers.uniform_(-1.0, 1.0, generator=generator)  # on a CPU normal ones take eight times as long
        if parameter.dim() > 1:
            numbers.mul_(math.sqrt(3.0 / parameter[0].numel()))
        else:
            numbers.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
        if not in_place:
            parameter.copy_(numbers)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):  # the only one whose content, forgotten on the meta device, is known
            raise RunError(f"the buffer {name} has no known content, so seeded weights cannot be made; load real ones")
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    return module


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises `InputError` where there is none, or none that can be read."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` for a file that is missing, unreadable or holds something else."""
    if not path.is_file():
        remedy = "Name a folder that diffusers' save_pretrained wrote."
        raise InputError(Problem(PLACE, str(path), "there is no such file", remedy))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(PLACE, str(path), f"is not readable as JSON ({error})", "Write it again.")) from error
    if not isinstance(fields, dict):
        raise InputError(Problem(PLACE, str(path), "must hold a JSON object", "Write it again."))
    return fields


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
    return prepare_for_evaluation(model, device, dtype)


def prepare_for_evaluation(module: ModuleT, device: torch.device | str, dtype: torch.dtype) -> ModuleT:
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
