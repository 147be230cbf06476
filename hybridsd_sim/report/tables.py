"""The CSV files beside the results: a figure a line, with interval, unit, kind and, where it is empty, the reason."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Data = Mapping[str, Any]
FIGURE = ("value", "low", "high", "unit", "kind", "note")
WHOSE = ("device", "runtime", "precision")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "summary.csv": ("policy", "request_class", "figure", *FIGURE),
    "pools.csv": ("policy", "pool", "figure", *FIGURE),
    "parts.csv": ("policy", "request_class", "plan", "figure", "where", "in_latency", *FIGURE, "sources"),
    "calibration.csv": (*WHOSE, "parameter", *FIGURE, "rows", "sources"),
    "calibration_rows.csv": (
        *WHOSE, "model", "height_px", "width_px", "latents", "published_s", "predicted_s", "log_ratio", "kind",
        "source", "source_date",
    ),
}  # fmt: skip
"""Columns of each table. `log_ratio` is the natural logarithm of predicted over published seconds."""


def tables(data: Data) -> dict[str, bytes]:
    """Every table of a report by the name of its file; the same data give the same bytes."""
    lines = (_summary(data), _pools(data), _parts(data), _parameters(data), _rows(data))
    return {name: _csv(COLUMNS[name], each) for name, each in zip(COLUMNS, lines, strict=True)}


def _summary(data: Data) -> Iterator[Data]:
    for run in data["runs"]:
        for name, row in run["summary"].items():
            yield from ({"policy": run["name"], "request_class": name, "figure": key, **row[key]} for key in row)


def _pools(data: Data) -> Iterator[Data]:
    for run in data["runs"]:
        for row in run["pools"]:
            figures = ((key, figure) for key, figure in row.items() if key != "pool")
            yield from ({"policy": run["name"], "pool": row["pool"], "figure": key, **each} for key, each in figures)


def _parts(data: Data) -> Iterator[Data]:
    """Every part and total of every plan, and the prices and powers behind them."""
    for plan in data["plans"]:
        whose = {"policy": "; ".join(plan["runs"]), "request_class": plan["request_class"], "plan": plan["label"]}
        for part in plan["parts"]:
            outside = "" if part["within"] else "outside what was timed"
            note = "; ".join(filter(None, (outside, part["note"])))
            yield {**whose, **part, "figure": part["component"], "in_latency": part["critical"], "note": note}
        yield from ({**whose, **total} for total in plan["totals"])
    for rate in data["rates"]:
        yield {**rate, "figure": rate["item"]}


def _parameters(data: Data) -> Iterator[Data]:
    for fit in data["calibration"]:
        whose = {**{key: fit[key] for key in (*WHOSE, "note", "sources")}, "rows": len(fit["rows"]), "kind": "modelled"}
        for parameter in fit["parameters"] or [{"name": "", "note": ""}]:
            yield {**whose, **parameter, "parameter": parameter["name"], "note": parameter["note"] or fit["note"]}
    for constant in data["constants"]:
        yield {**constant, "parameter": constant["name"], "kind": "modelled", "note": constant["meaning"]}


def _rows(data: Data) -> Iterator[Data]:
    for fit in data["calibration"]:
        yield from ({**{key: fit[key] for key in WHOSE}, **row} for row in fit["rows"])


def _csv(columns: tuple[str, ...], lines: Iterable[Data]) -> bytes:
    """Numbers in full, so that they read back as they were; lists joined by semicolons."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: "; ".join(v) if isinstance(v, list) else v for key, v in line.items()} for line in lines)
    return text.getvalue().encode()
