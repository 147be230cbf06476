"""Turns what `verify` found into text for the terminal. Returns strings; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.show import sentences, table

Data = Mapping[str, Any]
HEADER = (
    "table", "rows", "fitted", "error", "worst", "in interval", "rows held out", "error held out", "worst held out",
    "in interval held out", "order",
)  # fmt: skip
SHOWN = 3
"""Rows named with one reason; the JSON has all."""
LEGEND = (
    "error: mean of |predicted / published - 1|.",
    "held out: with the row's own group (a resolution, a model or a device) left out of all rows and fits.",
    "rows held out: those that can still be predicted then; the figures held out are over these alone.",
    "fitted: rows that shaped a law or a constant.",
    "in interval: share of published values inside the predicted 90% interval.",
)


def verification_text(data: Data, width: int) -> str:
    """A line a table, the worst row of each, then what is out of order, not counted or not predicted."""
    tables = data["tables"]
    rows = [_line(found) for found in tables]
    rows.append(_total(data))
    worst = [_worst(found) for found in tables if found["worst_row"]]
    notes = [note for found in tables for note in _notes(found)]
    text = (
        table(HEADER, rows, width),
        sentences(LEGEND, width),
        table(("table", "worst row", "published", "predicted", "error"), worst, width),
        sentences(notes, width),
    )
    return "\n".join(filter(None, text))


def _line(found: Data) -> tuple[Any, ...]:
    error, worst, error_out, worst_out = (
        percent(found[key]) for key in ("mare", "worst", "mare_held_out", "worst_held_out")
    )
    inside, inside_out = _shares(found)
    order = {None: "", True: "right", False: f"{len(found['wrong_order'])} wrong"}[found["ranking_right"]]
    everything = found["rows"], found["calibration_rows"], error, worst, inside
    return found["name"], *everything, found["held_out_rows"], error_out, worst_out, inside_out, order


def _total(data: Data) -> tuple[Any, ...]:
    rows, fitted, held_out = (
        sum(found[key] for found in data["tables"]) for key in ("rows", "calibration_rows", "held_out_rows")
    )
    inside, inside_out = _shares(data)
    return "all", rows, fitted, "", "", inside, held_out, "", "", inside_out, ""


def _shares(found: Data) -> tuple[str, str]:
    return percent(found["coverage90"], 0), percent(found["coverage90_held_out"], 0)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def _worst(found: Data) -> tuple[Any, ...]:
    known = [case for case in found["cases"] if case["counts"] and case["error"] is not None]
    case = max(known, key=lambda case: abs(case["error"]))
    return found["name"], case["label"], case["published"], case["predicted"], _off(case)


def _notes(found: Data) -> Iterator[str]:
    name, cases = found["name"], found["cases"]
    if found["wrong_order"]:
        yield f"{name}, not in the published order: {_some([' and '.join(pair) for pair in found['wrong_order']])}."
    outliers = [case for case in cases if not case["counts"]]
    for reason in dict.fromkeys(case["notes"] for case in outliers):
        those = [f"{case['label']} ({_off(case)})" for case in outliers if case["notes"] == reason]
        yield f"{name}, not counted: {_some(those)}. Because: {reason}."
    if found["kept_when_held_out"]:
        because = f": {found['notes']}" if found["notes"] else ""
        shaped = f"constants of the catalogue that {found['kept_when_held_out']} of its figures shaped"
        yield f"{name}, held out, keeps {shaped}{because}."
    known = [case for case in cases if not case["why"]]
    yield from _missing(f"{name}, not predicted", cases, "why")
    yield from _missing(f"{name}, not predicted when held out", known, "why_held_out")


def _missing(what: str, cases: Sequence[Data], key: str) -> Iterator[str]:
    """The cases without a prediction, by the reason that they give under `key`."""
    for reason in dict.fromkeys(case[key] for case in cases if case[key]):
        yield f"{what}: {_some([case['label'] for case in cases if case[key] == reason])}. {reason}"


def _some(labels: Sequence[str]) -> str:
    more = f"; and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return "; ".join(labels[:SHOWN]) + more


def _off(case: Data) -> str:
    return "not predicted" if case["error"] is None else f"{100 * case['error']:+.1f}%"
