"""The section on calibration: what each device's speed rests on, and how far its law misses the rows it was fitted to.

Reads the plain data of `contents` and writes blocks of `markup`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import expm1
from typing import Any

from hybridsd_sim.report.glossary import PARAMETERS
from hybridsd_sim.report.markup import Block, Cell, Fold, Heading, Paragraph, Picture, Table
from hybridsd_sim.report.numbers import DASH, MINUS, number, percent, reach, scaled

Data = Mapping[str, Any]
ABOUT = (
    "Steps that nobody timed follow from a law of their device: kernels at their rates, a cost for each operation, and "
    "the host that launches them. A law has few parameters, fitted to the device's own one-GPU rows and to what other "
    "devices have in common; where rows are few, the latter decides and intervals are wide. All of it is modelled. The "
    "same stands in calibration.csv and calibration_rows.csv."
)


def calibrated(data: Data, pictures: Sequence[Picture], sources: Sequence[str]) -> Iterator[Block]:
    """Parameters with their intervals, and residuals, of every device, runtime and precision of plans and pools."""
    yield Heading("Calibration", "calibration")
    yield Paragraph(ABOUT, "note")
    yield _overview(data["calibration"], sources)
    yield from _parameters(data["calibration"])
    yield from (picture for picture in pictures if picture.name == "calibration")
    for fit in data["calibration"]:
        if fit["rows"]:
            said = f"{fit['device']}, {fit['runtime']}, {fit['precision']}: {_counted(fit['rows'])}"
            yield Fold(said, (_residuals(fit, sources),))
    yield _constants(data["constants"], sources)


def _whose(fit: Data) -> Cell:
    return Cell(fit["device"], f"{fit['runtime']}, {fit['precision']}")


def _counted(rows: Sequence[Data]) -> str:
    return "1 row and its error" if len(rows) == 1 else f"{len(rows)} rows and their errors"


def _overview(fits: Sequence[Data], sources: Sequence[str]) -> Table:
    """How many rows each law was fitted to, how far it misses them, and where a row is expected around it."""
    rows = tuple(
        (
            _whose(fit),
            Cell(number(len(fit["rows"]))),
            *_errors(fit["rows"]),
            Cell(DASH if fit["row_reach"] is None else f"± {percent(fit['row_reach'])}"),
            _rests_on(fit, sources),
        )
        for fit in fits
    )
    head = ("Device", "Rows fitted", "Mean error", "Worst error", "90% of quoted rows", "Rests on")
    return Table("What the laws of the plans and of all pools rest on", head, rows, words=frozenset({0, 5}))


def _errors(rows: Sequence[Data]) -> tuple[Cell, Cell]:
    """Mean and worst relative error of the law over its rows."""
    if not rows:
        return Cell(DASH, "no rows"), Cell(DASH, "no rows")
    errors = [abs(expm1(row["log_ratio"])) for row in rows]
    worst = max(errors)
    return Cell(percent(sum(errors) / len(rows))), Cell(percent(worst), _step(rows[errors.index(worst)]))


def _rests_on(fit: Data, sources: Sequence[str]) -> Cell:
    found = tuple(sources.index(source) + 1 for source in fit["sources"])
    if fit["rows"]:
        return Cell("its own rows", sources=found)
    return Cell("datasheet and population" if fit["parameters"] else "nothing", fit["note"], sources=found)


def _step(row: Data) -> str:
    latents = f"{row['latents']} latent{'s' * (row['latents'] > 1)}"
    return f"{row['model']}, {row['width_px']}×{row['height_px']} px, {latents}"


def _parameters(fits: Sequence[Data]) -> Iterator[Table]:
    """The laws' parameters side by side."""
    known = [fit for fit in fits if fit["parameters"]]
    if known:
        names = [one["name"] for one in known[0]["parameters"]]
        rows = tuple((_whose(fit), *(_parameter(one) for one in fit["parameters"])) for fit in known)
        head = ("Device", *(PARAMETERS.get(name, name) for name in names))
        yield Table("Parameters of the laws; beneath each its 90% interval", head, rows)


def _parameter(one: Data) -> Cell:
    """A fitted parameter with its unit, the ends of its interval beneath."""
    if one["value"] is None:
        return Cell(DASH, one["note"])
    show, unit = scaled(one["value"], one["unit"])
    value = Cell(f"{show(one['value'])} {unit}".rstrip(), mark="modelled")
    if one["low"] == one["high"]:
        return value
    return replace(value, sub=f"{show(one['low'])}–{show(one['high'])} {unit}".rstrip() + f"\n{reach(one)}")


def _residuals(fit: Data, sources: Sequence[str]) -> Table:
    rows = tuple(
        (
            Cell(_step(row)),
            Cell(number(row["published_s"]), mark=row["kind"]),
            Cell(number(row["predicted_s"]), mark="modelled"),
            Cell(f"{100 * expm1(row['log_ratio']):+.1f} %".replace("-", MINUS)),
            Cell(row["source_date"], sources=(sources.index(row["source"]) + 1,)),
        )
        for row in fit["rows"]
    )
    head = ("Step", "Published (s)", "Predicted (s)", "Error", "Source")
    return Table("What was published or measured, and what the law makes of it", head, rows, words=frozenset({0, 4}))


def _constants(constants: Sequence[Data], sources: Sequence[str]) -> Table:
    rows = tuple(
        (
            Cell(PARAMETERS.get(one["name"], one["name"].replace("_", " "))),
            _parameter(one),
            Cell(number(one["rows"]), "" if one["rows"] else "believed before any row"),
            Cell(one["meaning"], sources=tuple(sources.index(source) + 1 for source in one["sources"])),
        )
        for one in constants
    )
    head = ("Constant", "Value", "Rows fitted", "What it is")
    return Table("Constants that all devices share; beneath each its 90% interval", head, rows, words=frozenset({0, 3}))
