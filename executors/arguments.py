"""What people write after an option, read: lists, numbers, sizes, a method's options, addresses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from hybridsd_sim.errors import InputError, Problem


def split(values: Sequence[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list without repetitions."""
    return list(dict.fromkeys(name.strip() for value in values or () for name in value.split(",") if name.strip()))


def read_numbers(values: Sequence[str] | None, place: str) -> list[int]:
    """Whole numbers; 1 where none is given."""
    return [_number(text, place) for text in split(values) or ["1"]]


def _number(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(Problem(place, repr(text), "must be a whole number")) from None


def read_loads(values: Sequence[str], place: str) -> list[float]:
    """Utilisations, above 0 and below 1."""
    return [_load(text, place) for text in split(values)]


def _load(text: str, place: str) -> float:
    try:
        load = float(text)
    except ValueError:
        load = math.nan
    if not 0.0 < load < 1.0:
        raise InputError(Problem(place, repr(text), "must be a number above 0 and below 1", "For example 0.3,0.6."))
    return load


def read_sizes(values: Sequence[str] | None) -> list[tuple[int, int]]:
    """Sizes as (height_px, width_px); one number is a square."""
    sizes = []
    for text in split(values) or ["512"]:
        sides = [_number(part, "--sizes") for part in text.split("x")]
        if len(sides) > 2:
            rule = "must be one number, or height x width"
            raise InputError(Problem("--sizes", repr(text), rule, "Such as 512x768."))
        sizes.append((sides[0], sides[-1]))
    return sizes


def read_options(given: Sequence[str] | None) -> dict[str, Any]:
    """A method's options with typed values: true and false, numbers, and text."""
    options: dict[str, Any] = {}
    for pair in split(given):
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not key or not equals:
            raise InputError(Problem("--option", repr(pair), "needs KEY=VALUE", "For example --option stride=2."))
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def read_address(text: str, place: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(Problem(place, repr(text), "needs HOST:PORT", "For example 127.0.0.1:8471."))
    return host, int(port)
