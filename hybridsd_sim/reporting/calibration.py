"""What the speed of each device rests on: fitted parameters, the rows behind them, and how far the fit misses these.

For every (device, runtime, precision) of a report's plans and pools, and for the constants that all devices share:
first as plain data (`fits_of`, `constants_of`), then as the section of a page that shows it (`calibration_section`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import exp, expm1
from typing import TYPE_CHECKING

from hybridsd_sim.errors import MissingDataError
from hybridsd_sim.estimate import DASH, Z90, interval, number, percent, scaled, signed
from hybridsd_sim.perf import CONSTANTS, fit_of
from hybridsd_sim.plan import Site
from hybridsd_sim.profiles import alike
from hybridsd_sim.reporting.blocks import Block, Cell, Fold, Heading, Paragraph, Picture, Table
from hybridsd_sim.reporting.labels import PARAMETERS, Data, reach

if TYPE_CHECKING:
    from hybridsd_sim.profiles import Profiles


UNITS = (
    ("_flop_per_s", "FLOP/s"), ("_bytes_per_s", "bytes/s"), ("_s_per_op", "s"), ("seconds_per_op", "s"), ("_s", "s"),
)  # fmt: skip
"""Unit of a parameter by the end of its name; shares have none."""

WHOSE = ("device", "runtime", "precision")

ABOUT = (
    "Steps that nobody timed follow from a law of their device: kernels at their rates, a cost for each operation, and "
    "the host that launches them. A law has few parameters, fitted to the device's own one-GPU rows and to what other "
    "devices have in common; where rows are few, the latter decides and intervals are wide. All of it is modelled. The "
    "same stands in calibration.csv and calibration_rows.csv."
)


def fits_of(sites: Iterable[Site], profiles: Profiles) -> list[Data]:
    """The fit of every device, runtime and precision of these sites once, sorted by name.

    Each has its `parameters` with the ends of their 90% intervals (None where no datasheet gives them), its `rows` with
    the published and the predicted seconds, and `row_reach`, the share by which a quoted row is expected around the fit
    at 90%: exp(1.645 s) - 1 for residuals of the standard deviation s in logarithms. Where there is no fit, the lists
    are empty, and `note` says why.
    """
    found = {(site.device, site.runtime, alike(site.precision)): site for site in sites}
    return [{**dict(zip(WHOSE, key, strict=True)), **_fit(found[key], profiles)} for key in sorted(found)]


def _fit(site: Site, profiles: Profiles) -> Data:
    try:
        fit = fit_of(profiles, site.device, site.runtime, site.precision)
    except MissingDataError as error:
        return {"parameters": [], "rows": [], "row_reach": None, "note": error.problems[0].rule, "sources": []}
    # a memory whose bandwidth no datasheet gives is not in the fit
    unbounded = getattr(profiles.device(fit.device), "memory_bandwidth_bytes_per_s", None) is None
    parameters = []
    for name, found in fit.parameters.items():
        unknown = unbounded and name == "memory_bytes_per_s"
        value, low, high = (None, None, None) if unknown else (found.value, found.low, found.high)
        note = "no datasheet gives it" if unknown else ""
        parameters.append({"name": name, "value": value, "low": low, "high": high, "unit": unit_of(name), "note": note})
    rows = [
        {
            "model": row.model, "height_px": row.height_px, "width_px": row.width_px, "latents": row.latents,
            "published_s": row.seconds_median, "predicted_s": row.seconds_median * exp(residual), "log_ratio": residual,
            "kind": row.kind, "source": row.source, "source_date": row.source_date,
        }
        for row, residual in zip(fit.rows, fit.residuals, strict=True)  # residuals: log of predicted over published
    ]  # fmt: skip
    return {
        "parameters": parameters,
        "rows": rows,
        "row_reach": expm1(Z90 * fit.sigma),
        "note": fit.note,
        "sources": list(fit.sources),
    }


def unit_of(parameter: str) -> str:
    """The unit that ends a parameter's name; a share has none."""
    return next((unit for end, unit in UNITS if parameter.endswith(end)), "share")


def constants_of(profiles: Profiles) -> list[Data]:
    """The constants that all devices share, with the ends of their 90% intervals and the rows behind them.

    One that no row was fitted to yet has its prior, and `rows` is 0.
    """
    priors = {constant.name: constant for constant in CONSTANTS}
    found = []
    for name in dict.fromkeys((*priors, *profiles.constants)):
        row, prior = profiles.constants.get(name), priors.get(name)
        known = row or prior
        value, spread = (known.value, known.spread) if known else (0.0, 0.0)
        found.append({
            "name": name, "value": value, "low": value * exp(-Z90 * spread), "high": value * exp(Z90 * spread),
            "unit": unit_of(name), "meaning": prior.meaning if prior else row.notes if row else "",
            "rows": row.rows if row else 0, "sources": [row.source] if row else [],
        })  # fmt: skip
    return found


def calibration_section(data: Data, pictures: Sequence[Picture], sources: Sequence[str]) -> Iterator[Block]:
    """Parameters with their intervals, and residuals, of every device, runtime and precision of plans and pools."""
    yield Heading("Calibration", "calibration")
    yield Paragraph(ABOUT, "note")
    yield _overview(data["calibration"], sources)
    fits = [fit for fit in data["calibration"] if fit["parameters"]]
    if fits:
        names = [one["name"] for one in fits[0]["parameters"]]
        parameters = tuple((_whose(fit), *(_parameter(one) for one in fit["parameters"])) for fit in fits)
        head = ("Device", *(PARAMETERS.get(name, name) for name in names))
        yield Table("Parameters of the laws; beneath each its 90% interval", head, parameters)
    yield from (picture for picture in pictures if picture.name == "calibration")
    for fit in data["calibration"]:
        if rows := fit["rows"]:
            counted = "1 row and its error" if len(rows) == 1 else f"{len(rows)} rows and their errors"
            whose = f"{fit['device']}, {fit['runtime']}, {fit['precision']}"
            yield Fold(f"{whose}: {counted}", (_residuals(fit, sources),))
    constants = tuple(
        (
            Cell(PARAMETERS.get(one["name"], one["name"].replace("_", " "))),
            _parameter(one),
            Cell(number(one["rows"]), "" if one["rows"] else "believed before any row"),
            Cell(one["meaning"], sources=tuple(sources.index(source) + 1 for source in one["sources"])),
        )
        for one in data["constants"]
    )
    head = ("Constant", "Value", "Rows fitted", "What it is")
    caption = "Constants that all devices share; beneath each its 90% interval"
    yield Table(caption, head, constants, words=frozenset({0, 3}))


def _whose(fit: Data) -> Cell:
    return Cell(fit["device"], f"{fit['runtime']}, {fit['precision']}")


def _overview(fits: Sequence[Data], sources: Sequence[str]) -> Table:
    """How many rows stand behind each fit, how far it misses them, and where a row is expected around it."""
    table = []
    for fit in fits:
        rows = fit["rows"]
        mean = worst = Cell(DASH, "no rows")
        if rows:
            errors = [abs(expm1(row["log_ratio"])) for row in rows]
            mean = Cell(percent(sum(errors) / len(rows)))
            worst = Cell(percent(max(errors)), _step(rows[errors.index(max(errors))]))
        band = Cell(DASH if fit["row_reach"] is None else f"±{percent(fit['row_reach'])}")
        ground = "its own rows" if rows else "datasheet and population" if fit["parameters"] else "nothing"
        numbers = tuple(sources.index(source) + 1 for source in fit["sources"])
        rests_on = Cell(ground, "" if rows else fit["note"], sources=numbers)
        table.append((_whose(fit), Cell(number(len(rows))), mean, worst, band, rests_on))
    head = ("Device", "Rows fitted", "Mean error", "Worst error", "90% of quoted rows", "Rests on")
    return Table("What the laws of the plans and of all pools rest on", head, tuple(table), words=frozenset({0, 5}))


def _step(row: Data) -> str:
    latents = f"{row['latents']} latent{'s' * (row['latents'] > 1)}"
    return f"{row['model']}, {row['width_px']}×{row['height_px']} px, {latents}"


def _parameter(one: Data) -> Cell:
    """A fitted parameter with its unit, the ends of its interval beneath."""
    if one["value"] is None:
        return Cell(DASH, one["note"])
    short = one["unit"].replace("bytes", "B")
    show, unit = (number, "") if short == "share" else scaled(one["value"], short)
    value = Cell(f"{show(one['value'])} {unit}".rstrip(), mark="modelled")
    if one["low"] == one["high"]:
        return value
    return replace(value, sub=f"{interval(one['low'], one['high'], show)} {unit}".rstrip() + f"\n{reach(one)}")


def _residuals(fit: Data, sources: Sequence[str]) -> Table:
    """A line for each row of a fit: as published, as predicted, and the error."""
    rows = tuple(
        (
            Cell(_step(row)),
            Cell(number(row["published_s"]), mark=row["kind"]),
            Cell(number(row["predicted_s"]), mark="modelled"),
            Cell(signed(expm1(row["log_ratio"]), percent)),
            Cell(row["source_date"], sources=(sources.index(row["source"]) + 1,)),
        )
        for row in fit["rows"]
    )
    head = ("Step", "Timed (s)", "Predicted (s)", "Error", "Source")
    return Table("What was published or measured, and what the law makes of it", head, rows, words=frozenset({0, 4}))
