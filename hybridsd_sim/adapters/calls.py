"""Reads what a call to a served model asks for: from its arguments, whatever the engine's own names for them.

A serving system hands a router the arguments of a call. They may be a `Request`, a mapping, an object with fields
(a pydantic model, a dataclass), or plain keywords; what they leave out is that of the request's class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Request

__all__ = ["SPELLINGS", "Asked", "RequestOf", "asked_in", "completed"]

Asked = Request | Mapping[str, Any]
"""A request, or some of its fields by name."""
RequestOf = Callable[[Sequence[Any], Mapping[str, Any]], Asked]
"""What reads a request out of the positional and the keyword arguments of a call."""
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "request_class": ("request_class", "class"),
    "model": ("model",),
    "height_px": ("height_px", "height"),
    "width_px": ("width_px", "width"),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "num_images": ("num_images", "num_images_per_prompt"),
    "sampler": ("sampler",),
    "slo_s": ("slo_s",),
    "quality_floor": ("quality_floor",),
    "priority": ("priority",),
}
"""Fields of a request by the names they go by: ours first, then those of diffusers' pipelines."""
NUMBERS: Mapping[str, Callable[[Any], Any]] = {
    "height_px": int, "width_px": int, "num_inference_steps": int, "num_images": int, "priority": int,
    "guidance_scale": float, "slo_s": float, "quality_floor": float,
}  # fmt: skip


def asked_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Asked:
    """The request in the first argument of a call, or the fields found there and among the keywords.

    A keyword goes before a field of the first argument, whether that was given by position or by keyword.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, Request) else _fields_of(first) | _fields_of(kwargs)


def completed(asked: Asked, own: Mapping[str, Request]) -> Request:
    """The whole request; `own` is what each class asks for by itself.

    A request that names no class is of the only one. Raises `InputError` where there are several, and `ValueError` or
    `TypeError` for fields that are no numbers or no fields of a request.
    """
    if isinstance(asked, Request):
        return asked
    fields = {name: NUMBERS.get(name, str)(value) for name, value in asked.items()}
    if "request_class" not in fields and len(own) > 1:
        rule = f"the plan has several: {', '.join(own)}"
        raise InputError(Problem("request_class", "not given", rule, "Name one in the call, or give request_of."))
    name = fields.pop("request_class", next(iter(own)))
    of_class = own.get(name) or replace(next(iter(own.values())), request_class=name)
    return replace(of_class, **fields)


def _fields_of(source: Any) -> dict[str, Any]:
    found = {field: _first(source, names) for field, names in SPELLINGS.items()}
    return {field: value for field, value in found.items() if value is not None}


def _first(source: Any, names: Sequence[str]) -> Any:
    values = (source.get(name) if isinstance(source, Mapping) else getattr(source, name, None) for name in names)
    return next((value for value in values if value is not None), None)
