"""How figures are written: three significant digits, shares as per cent, published scores in full, unknowns a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DASH, MINUS = "—", "\N{MINUS SIGN}"
SIGNIFICANT = 3
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
Show = Callable[[float | None], str]


def number(value: float | None) -> str:
    """Three significant digits with separated thousands; whole numbers in full; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{SIGNIFICANT - 1}e}".partition("e")
    if int(exponent) < -5:
        return f"{mantissa}e{int(exponent)}"
    rounded = float(f"{mantissa}e{exponent}")
    return f"{rounded:,.{max(0, SIGNIFICANT - 1 - int(exponent))}f}".replace("-", MINUS)


def scaled(value: float, unit: str) -> tuple[Show, str]:
    """How figures of this size are written, and their unit with its prefix (`TFLOP/s`, `µs`); a share has none."""
    if unit == "share":
        return number, ""
    size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), PREFIXES[-1])
    short = {"bytes/s": "B/s"}.get(unit, unit)
    return lambda figure: DASH if figure is None else number(figure / size), f"{prefix}{short}"


def percent(share: float | None) -> str:
    """A share of 1 as per cent; nothing but all is called 100 %, and nothing but none 0 %."""
    if share is None or not math.isfinite(share):
        return DASH
    if share in {0.0, 1.0}:
        return "100 %" if share else "0 %"
    if not 0.0001 <= share <= 0.9999:
        return "< 0.01 %" if share < 0.5 else "> 99.99 %"
    return f"{100 * share:.{1 if 0.001 <= share <= 0.999 else 2}f} %"


def clip(score: float | None) -> str:
    """A CLIP score with the four decimals of the published tables."""
    return DASH if score is None or not math.isfinite(score) else f"{score:.4f}"


def interval(figure: Mapping[str, Any], show: Show) -> str:
    """The interval of a figure at the digits shown; nothing where it does not differ from the figure there.

    A question mark stands for an end that the run is too short to tell.
    """
    low, high = figure.get("low"), figure.get("high")
    if low is None and high is None:
        return "no interval" if figure.get("note") else ""
    ends = tuple("?" if end is None else show(end) for end in (low, high))
    if set(ends) == {show(figure["value"])}:
        return ""
    beyond = next((end for end in ends if end[0] in "<>"), "")
    return beyond or f"{ends[0].removesuffix(' %')}–{ends[1]}"


def reach(figure: Mapping[str, Any]) -> str:
    """How far the ends of an interval lie from its figure, in per cent of it; nothing where that cannot be said."""
    value, low, high = (figure.get(end) for end in ("value", "low", "high"))
    if not value or low is None or high is None:
        return ""
    down, up = (f"{100 * share:.{0 if share >= 0.0995 else 1}f}" for share in (1.0 - low / value, high / value - 1.0))
    return f"± {up} %" if down == up else f"{MINUS}{down} % / +{up} %"


def listed(items: Sequence[str]) -> str:
    """One, two and three."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
