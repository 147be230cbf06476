"""What the speed of each device rests on: fitted parameters, the rows behind them, and how far the law misses these.

For every (device, runtime, precision) of a report's plans and pools, and the constants that all devices share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp, expm1
from typing import TYPE_CHECKING, Any

from hybridsd_sim.calibration import Z90, fit_of
from hybridsd_sim.cost_rows import alike
from hybridsd_sim.errors import MissingDataError
from hybridsd_sim.plan import Site
from hybridsd_sim.transfers import CONSTANTS

if TYPE_CHECKING:
    from hybridsd_sim.calibration import Fit
    from hybridsd_sim.fitted_rows import MethodConstant
    from hybridsd_sim.profiles import CostRow, Profiles
    from hybridsd_sim.transfers import Constant

Data = dict[str, Any]
UNITS = (
    ("_flop_per_s", "FLOP/s"), ("_bytes_per_s", "bytes/s"), ("_s_per_op", "s"), ("seconds_per_op", "s"), ("_s", "s"),
)  # fmt: skip
"""Unit of a parameter by the end of its name; shares have none."""
WHOSE = ("device", "runtime", "precision")


def fits_of(sites: Iterable[Site], profiles: Profiles) -> list[Data]:
    """The fit of every device, runtime and precision of these sites once, sorted by name."""
    found = {_asked(site): site for site in sites}
    return [_fit(found[asked], profiles) for asked in sorted(found)]


def _asked(site: Site) -> tuple[str, str, str]:
    return site.device, site.runtime, alike(site.precision)


def _fit(site: Site, profiles: Profiles) -> Data:
    whose = dict(zip(WHOSE, _asked(site), strict=True))
    try:
        fit = fit_of(profiles, site.device, site.runtime, site.precision)
    except MissingDataError as error:
        return {**whose, "parameters": [], "rows": [], "row_reach": None, "note": error.problems[0].rule, "sources": []}
    return {
        **whose,
        "parameters": list(_parameters(fit, profiles)),
        "rows": [_row(row, residual) for row, residual in zip(fit.rows, fit.residuals, strict=True)],
        "row_reach": expm1(Z90 * fit.sigma),
        "note": fit.note,
        "sources": list(fit.sources),
    }


def _parameters(fit: Fit, profiles: Profiles) -> Iterator[Data]:
    """The law's parameters; a memory whose bandwidth no datasheet gives is not in it."""
    unbounded = getattr(profiles.device(fit.device), "memory_bandwidth_bytes_per_s", None) is None
    for name, ends in fit.parameters.items():
        unknown = unbounded and name == "memory_bytes_per_s"
        value, low, high = (None, None, None) if unknown else ends
        note = "no datasheet gives it" if unknown else ""
        yield {"name": name, "value": value, "low": low, "high": high, "unit": unit_of(name), "note": note}


def unit_of(parameter: str) -> str:
    """The unit that ends a parameter's name; a share has none."""
    return next((unit for end, unit in UNITS if parameter.endswith(end)), "share")


def _row(row: CostRow, residual: float) -> Data:
    """One timed row and what the law makes of it; `residual` is the logarithm of predicted over published."""
    return {
        "model": row.model, "height_px": row.height_px, "width_px": row.width_px, "latents": row.latents,
        "published_s": row.seconds_median, "predicted_s": row.seconds_median * exp(residual), "log_ratio": residual,
        "kind": row.kind, "source": row.source, "source_date": row.source_date,
    }  # fmt: skip


def constants_of(profiles: Profiles) -> list[Data]:
    """The constants that all devices share, with the rows that they were fitted to; 0 where none was looked at yet."""
    believed = {constant.name: constant for constant in CONSTANTS}
    return [
        _constant(name, profiles.constants.get(name), believed.get(name))
        for name in dict.fromkeys((*believed, *profiles.constants))
    ]


def _constant(name: str, row: MethodConstant | None, believed: Constant | None) -> Data:
    found = row or believed
    value, spread = (found.value, found.spread) if found else (0.0, 0.0)
    return {
        "name": name, "value": value, "low": value * exp(-Z90 * spread), "high": value * exp(Z90 * spread),
        "unit": unit_of(name), "meaning": believed.meaning if believed else row.notes if row else "",
        "rows": row.rows if row else 0, "sources": [row.source] if row else [],
    }  # fmt: skip
