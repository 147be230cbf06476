"""Predictions held against every published and measured table: how far off, how sure, and how far off without help.

Every figure is predicted twice: with everything that is known, and with the figure's own group left out of all rows and
fits (a resolution, a model or a device, as its table says). The second is the one to quote, but where figures shaped a
constant of the catalogue: that stays (`shaping_figures` of a table counts them).

A table is a line of `profiles/published/tables.csv`. The cost rows that it names in `profiles/quoted` and its rows in
the other files of that folder are its cases: to add one, write the line and the rows; code is needed only for a
quantity that `published_predictions` does not know. Cost rows that no registered table takes, such as a user's own
measurements, form a table for each source or measured device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from statistics import fmean
from typing import Any

from hybridsd_sim.errors import InputError
from hybridsd_sim.estimate import Estimate
from hybridsd_sim.perf import is_multi_gpu_time, is_shared_memory_time, own_fits
from hybridsd_sim.perf import refit as fit_again
from hybridsd_sim.pricing.published_predictions import predict_cost_row, predict_figure, read_options
from hybridsd_sim.profiles import (
    CostRow,
    Group,
    Profiles,
    Published,
    PublishedRow,
    PublishedTable,
    alike,
    load_published,
    timing_kind,
)


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What is left out together: rows of one publication (of all, where `source` is empty) in one group."""

    kind: Group
    source: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One published figure of a table. `low` and `high` are the source's own range, where it gives one."""

    table: str
    label: str
    source: str
    published: float
    low: float
    high: float
    counts: bool
    notes: str
    key: GroupKey
    row: CostRow | PublishedRow

    def predict(self, profiles: Profiles) -> Estimate:
        row = self.row
        return predict_cost_row(row, profiles) if isinstance(row, CostRow) else predict_figure(row, profiles)


def cases_of(profiles: Profiles, published: Published) -> dict[str, tuple[PublishedTable, list[Case]]]:
    """Every table with its cases, registered ones first; tables without rows are left out.

    Cost rows that no registered table takes form one for each measured device, or else for each source.
    """
    found: dict[str, tuple[PublishedTable, list[Case]]] = {
        name: (table, []) for name, table in published.tables.items()
    }
    for figure in published.rows:
        table, cases = found[figure.table]
        cases.append(_figure_case(table, figure, profiles))
    for row in profiles.costs:
        if timing_kind(row) is not None:
            holder = next((table for table in published.tables.values() if table.holds(row)), None)
            if holder is None:
                measured = row.kind == "measured"
                name = f"measured {row.device}" if measured else row.source
                if row.degree > 1:
                    name += ", several processes" if measured else ", several GPUs"
                own = {"name": name, "title": name, "group": "device_model"}
                provenance = {"kind": row.kind, "source": row.source, "source_date": row.source_date}
                holder = PublishedTable.model_validate(own | provenance)
            found.setdefault(holder.name, (holder, []))[1].append(_cost_case(holder, row, profiles))
    return {name: pair for name, pair in found.items() if pair[1]}


def _cost_case(table: PublishedTable, row: CostRow, profiles: Profiles) -> Case:
    """A cost row as a case; its label says in a few words what it timed, and leaves usual settings out."""
    words = [row.model, row.component.replace("_", " ")]
    words += [f"{row.width_px}x{row.height_px} px"] if row.width_px else []
    words += [f"batch {row.batch_size}"] if row.batch_size > 1 else []
    words += [f"{row.method} x{row.degree}", row.options.replace(";", " ")] if row.degree > 1 else []
    label = " ".join(filter(None, [*words, "on", row.device, row.runtime, row.precision]))
    low, high = row.seconds_p05 or row.seconds_median, row.seconds_p95 or row.seconds_median
    key = _key(table, _group(table.group, row.device, row.model, row.width_px, profiles))
    return Case(
        table=table.name, label=label, source=row.source, published=row.seconds_median, low=low, high=high,
        counts=table.counts, notes=row.notes if table.counts else table.notes, key=key, row=row,
    )  # fmt: skip


def _figure_case(table: PublishedTable, row: PublishedRow, profiles: Profiles) -> Case:
    """A published figure as a case; its label names the quantity and its plan, and leaves usual settings out."""
    words = [row.quantity, row.model]
    words += [f"and {row.small_model}"] if row.small_model else []
    words += [f"switch step {row.switch_step}"] if row.switch_step is not None else []
    words += [f"{'/'.join(map(str, row.sides_px))} px"]
    words += [f"{row.num_inference_steps} steps"] if row.num_inference_steps > 1 else []
    words += [f"{row.method} x{'/'.join(map(str, row.degrees))}"] if row.method != "single" else []
    words += [f"on {row.device}"] if row.device else []
    key = _key(table, _group(table.group, row.device or "", row.model, row.sides_px[0], profiles))
    return Case(
        table=table.name, label=" ".join(words), source=row.source, published=row.value, low=row.value,
        high=row.value, counts=row.counts, notes=row.notes, key=key, row=row,
    )  # fmt: skip


def _group(kind: Group, device: str, model: str, width_px: int, profiles: Profiles) -> str:
    """The group of a row."""
    if kind == "resolution":
        return f"{width_px} px"
    alike = _architecture_name(model, profiles)
    return {"model": alike, "device": device, "device_model": f"{alike} on {device}"}[kind]


@lru_cache(maxsize=256)
def _architecture_name(model: str, profiles: Profiles) -> str:
    """The first model of the same architecture: SD 1.4 and 1.5 are left out together."""
    if model not in profiles.models:
        return model
    architecture = profiles.model(model).architecture
    return next(name for name, other in profiles.models.items() if other.architecture == architecture)


def _key(table: PublishedTable, group: str) -> GroupKey:
    """A device is left out with the rows of all publications, a resolution or model with its own publication's."""
    return GroupKey(table.group, "" if table.group.startswith("device") else table.source, group)


def leaves_out(key: GroupKey, profiles: Profiles) -> Callable[[CostRow], bool]:
    """Whether a cost row belongs to the group."""
    return lambda row: (
        row.source.startswith(key.source)
        and _group(key.kind, row.device, row.model, row.width_px, profiles) == key.name
    )


Refit = Callable[..., Profiles]

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A case with what was predicted, from everything and with its group left out; None, with the reason, where not."""

    case: Case
    predicted: Estimate | None
    held_out: Estimate | None
    fitted: bool = False
    why: str = ""
    why_held_out: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over published, less 1."""
        return None if self.predicted is None else self.predicted.value / self.case.published - 1

    @property
    def held_out_error(self) -> float | None:
        return None if self.held_out is None else self.held_out.value / self.case.published - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTable:
    """A table with all its cases; the figures are over those that count and were predicted."""

    table: PublishedTable
    cases: Sequence[Checked]
    counted: Sequence[Checked] = field(init=False)

    def __post_init__(self) -> None:
        kept = tuple(found for found in self.cases if found.case.counts and found.predicted is not None)
        object.__setattr__(self, "counted", kept)

    @property
    def calibration_rows(self) -> int:
        """How many of the cases' rows were used in a fit or for a constant, those that do not count too."""
        return sum(found.fitted for found in self.cases)

    @property
    def shaping_figures(self) -> int:
        """How many of the figures shaped a constant of the catalogue, which no leaving out takes back."""
        return sum(found.fitted and isinstance(found.case.row, PublishedRow) for found in self.cases)

    @property
    def mare(self) -> float | None:
        """Mean absolute relative error."""
        return _mean(abs(found.error) for found in self.counted if found.error is not None)

    @property
    def worst(self) -> Checked | None:
        return max(self.counted, key=lambda found: abs(found.error or 0.0), default=None)

    @property
    def mare_held_out(self) -> float | None:
        errors = (found.held_out_error for found in self.counted)
        return _mean(abs(error) for error in errors if error is not None)

    @property
    def worst_held_out(self) -> float | None:
        errors = (found.held_out_error for found in self.counted)
        return max((abs(error) for error in errors if error is not None), default=None)

    @property
    def coverage90(self) -> float | None:
        """Share of published values inside the predicted 90% interval; None where the quantity has none."""
        return coverage(self.counted)

    @property
    def coverage90_held_out(self) -> float | None:
        return coverage(self.counted, held_out=True)

    @property
    def wrong_order(self) -> list[tuple[Checked, Checked]]:
        """Pairs of configurations that the prediction does not put in the published order."""
        pairs = (pair for pair in combinations(self.counted, 2) if _ranked(*pair))
        return [(a, b) for a, b in pairs if (_value(a) - _value(b)) * (a.case.published - b.case.published) <= 0]

    @property
    def ranking_right(self) -> bool | None:
        """Whether all comparable configurations come in the published order; None where none are comparable."""
        pairs = any(_ranked(a, b) for a, b in combinations(self.counted, 2))
        return not self.wrong_order if pairs else None


def coverage(cases: Iterable[Checked], *, held_out: bool = False) -> float | None:
    """Share of published values inside the predicted interval, over cases that have one."""
    found = ((case.held_out if held_out else case.predicted, case.case.published) for case in cases)
    inside = [p.low <= value <= p.high for p, value in found if p and p.interval_or_none is not None]
    return _mean(inside)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _value(found: Checked) -> float:
    return 0.0 if found.predicted is None else found.predicted.value


def _ranked(a: Checked, b: Checked) -> bool:
    """Whether two cases are configurations of one job, ranked by one publication, and published apart.

    One job: the same model, size, step and number of steps on several devices. Configurations stand in one table or
    figure of the source, or share a degree.
    """
    one, other = a.case.row, b.case.row
    if not (isinstance(one, CostRow) and isinstance(other, CostRow) and one.degree > 1 and other.degree > 1):
        return False
    comparable = a.case.source == b.case.source or one.degree == other.degree
    apart = a.case.high < b.case.low or b.case.high < a.case.low
    return _job(one) == _job(other) and comparable and apart


def _job(row: CostRow) -> tuple[object, ...]:
    steps = read_options(row.options).get("num_inference_steps")
    return row.device, row.runtime, row.model, row.component, row.height_px, row.width_px, row.latents, steps


# ---- Predicting -----------------------------------------------------------------------------------------------------


def verify_tables(profiles: Profiles, *, progress: Progress | None = None) -> dict[str, Any]:
    """The shipped tables, and whatever the profiles measured, checked, as data."""
    return to_json(check_tables(profiles, load_published(), progress=progress))


def check_tables(
    profiles: Profiles, published: Published, *, refit: Refit = fit_again, progress: Progress | None = None
) -> list[CheckedTable]:
    """Every table checked. `refit(profiles, without=...)` gives the profiles without some cost rows, fitted again.

    `progress` is called with a line on what comes next.
    """
    tables = cases_of(profiles, published)
    cases = [case for _, found in tables.values() for case in found]
    report = progress or (lambda _: None)
    report(f"predicting {len(cases)} figures")
    used = used_in_fits(profiles)
    checked = {}
    for case in cases:
        prediction, why = _predicted(case, profiles)
        fitted = case.row in used if isinstance(case.row, CostRow) else case.row.fitted
        checked[id(case)] = Checked(case=case, predicted=prediction, held_out=None, fitted=fitted, why=why)
    keys = list(dict.fromkeys(case.key for case in cases))
    for number, key in enumerate(keys, 1):
        report(f"leaving out {number} of {len(keys)}: {key.name}")
        without = leaves_out(key, profiles)
        held = refit(profiles, without=without) if any(map(without, profiles.costs)) else profiles
        for case in (case for case in cases if case.key == key):
            prediction, why = _predicted(case, held)
            checked[id(case)] = replace(checked[id(case)], held_out=prediction, why_held_out=why)
    return [CheckedTable(table=table, cases=[checked[id(case)] for case in found]) for table, found in tables.values()]


def used_in_fits(profiles: Profiles) -> frozenset[CostRow]:
    """The cost rows that shaped a device's fit or one of the constants that devices share."""
    fits = own_fits(profiles)
    used = {row for fit in fits for row in fit.rows}
    timed = {(fit.device, fit.runtime, fit.precision) for fit in fits}
    for row in profiles.costs:
        alone = row.component in {"vae_decode", "text_encode"} and row.batch_size == row.degree == 1
        shapes_ratio = alone and (row.device, row.runtime, alike(row.precision)) in timed
        if shapes_ratio or is_multi_gpu_time(row) or is_shared_memory_time(row):
            used.add(row)
    return frozenset(used)


def _predicted(case: Case, profiles: Profiles) -> tuple[Estimate | None, str]:
    try:
        return case.predict(profiles), ""
    except InputError as error:
        return None, str(error)


# ---- As data --------------------------------------------------------------------------------------------------------


def to_json(tables: Sequence[CheckedTable]) -> dict[str, Any]:
    """What `verify --format json` prints: every table with its figures and cases, and the coverage of all intervals."""
    cases = [found for table in tables for found in table.counted]
    return {
        "tables": [_table_data(table) for table in tables],
        "coverage90": coverage(cases),
        "coverage90_held_out": coverage(cases, held_out=True),
    }


def _table_data(table: CheckedTable) -> dict[str, Any]:
    cases = []
    for found in table.cases:
        case, predicted = found.case, found.predicted
        low, high = (predicted and predicted.interval_or_none) or (None, None)
        cases.append(
            {
                "label": case.label,
                "published": case.published,
                "predicted": None if predicted is None else predicted.value,
                "low": low,
                "high": high,
                "error": found.error,
                "held_out": None if found.held_out is None else found.held_out.value,
                "held_out_error": found.held_out_error,
                "fitted": found.fitted,
                "counts": case.counts,
                "why": found.why,
                "why_held_out": found.why_held_out,
                "notes": case.notes,
                "source": case.source,
            }
        )
    worst = table.worst
    return {
        "name": table.table.name,
        "title": table.table.title,
        "source": table.table.source,
        "group": table.table.group,
        "notes": table.table.notes,
        "rows": len(table.counted),
        "calibration_rows": table.calibration_rows,
        "kept_when_held_out": table.shaping_figures,
        "mare": table.mare,
        "worst": None if worst is None or worst.error is None else abs(worst.error),
        "worst_row": None if worst is None else worst.case.label,
        "mare_held_out": table.mare_held_out,
        "worst_held_out": table.worst_held_out,
        "held_out_rows": sum(found.held_out is not None for found in table.counted),
        "coverage90": table.coverage90,
        "coverage90_held_out": table.coverage90_held_out,
        "ranking_right": table.ranking_right,
        "wrong_order": [[a.case.label, b.case.label] for a, b in table.wrong_order],
        "cases": cases,
    }
