"""The figures that predictions are held against, table by table, and what is left out of the fits for each.

Cost rows that no registered table takes, such as a user's own measurements, form a table for each source or measured
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hybridsd_sim.profiles import CostRow, Profiles
from hybridsd_sim.published import Group, Published, PublishedRow, Table, what_is_timed
from hybridsd_sim.reproduce import Prediction, predict_cost_row, predict_figure


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

    def predict(self, profiles: Profiles) -> Prediction:
        row = self.row
        return predict_cost_row(row, profiles) if isinstance(row, CostRow) else predict_figure(row, profiles)


def cases_of(profiles: Profiles, published: Published) -> dict[str, tuple[Table, list[Case]]]:
    """Every table with its cases, registered ones first; tables without rows are left out."""
    found: dict[str, tuple[Table, list[Case]]] = {name: (table, []) for name, table in published.tables.items()}
    for figure in published.rows:
        table, cases = found[figure.table]
        cases.append(_figure_case(table, figure, profiles))
    for row in profiles.costs:
        if what_is_timed(row) is not None:
            table = next((table for table in published.tables.values() if table.holds(row)), None) or _own_table(row)
            found.setdefault(table.name, (table, []))[1].append(_cost_case(table, row, profiles))
    return {name: pair for name, pair in found.items() if pair[1]}


def _own_table(row: CostRow) -> Table:
    """The table of a cost row that no registered table takes: of its measured device, or of its source."""
    several = "" if row.degree == 1 else ", several processes" if row.kind == "measured" else ", several GPUs"
    what = f"measured {row.device}" if row.kind == "measured" else row.source
    said = {"kind": row.kind, "source": row.source, "source_date": row.source_date}
    name = f"{what}{several}"
    return Table.model_validate({"name": name, "title": name, "group": "device_model", **said})


def _cost_case(table: Table, row: CostRow, profiles: Profiles) -> Case:
    low, high = row.seconds_p05 or row.seconds_median, row.seconds_p95 or row.seconds_median
    key = _key(table, _group(table.group, row.device, row.model, row.width_px, profiles))
    return Case(
        table=table.name, label=_cost_label(row), source=row.source, published=row.seconds_median, low=low, high=high,
        counts=table.counts, notes=row.notes if table.counts else table.notes, key=key, row=row,
    )  # fmt: skip


def _figure_case(table: Table, row: PublishedRow, profiles: Profiles) -> Case:
    key = _key(table, _group(table.group, row.device or "", row.model, row.sides_px[0], profiles))
    return Case(
        table=table.name, label=_figure_label(row), source=row.source, published=row.value, low=row.value,
        high=row.value, counts=row.counts, notes=row.notes, key=key, row=row,
    )  # fmt: skip


def _group(kind: Group, device: str, model: str, width_px: int, profiles: Profiles) -> str:
    """The group of a row."""
    if kind == "resolution":
        return f"{width_px} px"
    network = _network(model, profiles)
    return {"model": network, "device": device, "device_model": f"{network} on {device}"}[kind]


@lru_cache(maxsize=256)
def _network(model: str, profiles: Profiles) -> str:
    """The first name of a model's network: SD 1.4 and 1.5 are left out together."""
    if model not in profiles.models:
        return model
    network = profiles.model(model).network
    return next(name for name, other in profiles.models.items() if other.network == network)


def _key(table: Table, group: str) -> GroupKey:
    """A device is left out with the rows of all publications, a resolution or model with its own publication's."""
    return GroupKey(table.group, "" if table.group.startswith("device") else table.source, group)


def leaves_out(key: GroupKey, profiles: Profiles) -> Callable[[CostRow], bool]:
    """Whether a cost row belongs to the group."""
    return lambda row: (
        row.source.startswith(key.source)
        and _group(key.kind, row.device, row.model, row.width_px, profiles) == key.name
    )


def _cost_label(row: CostRow) -> str:
    """What the row timed, in a few words; usual settings are left out."""
    words = [row.model, row.component.replace("_", " ")]
    words += [f"{row.width_px}x{row.height_px} px"] if row.width_px else []
    words += [f"batch {row.batch_size}"] if row.batch_size > 1 else []
    words += [f"{row.method} x{row.degree}", row.options.replace(";", " ")] if row.degree > 1 else []
    return " ".join(filter(None, [*words, "on", row.device, row.runtime, row.precision]))


def _figure_label(row: PublishedRow) -> str:
    to = "/".join(f"{side}" for side in row.sides_px)
    words = [row.quantity, row.model]
    words += [f"and {row.small_model}"] if row.small_model else []
    words += [f"switch step {row.switch_step}"] if row.switch_step is not None else []
    words += [f"{to} px", *([f"{row.num_inference_steps} steps"] if row.num_inference_steps > 1 else [])]
    words += [f"{row.method} x{'/'.join(map(str, row.degrees))}"] if row.method != "single" else []
    return " ".join([*words, *([f"on {row.device}"] if row.device else [])])
