"""What others published and we predict: the tables that predictions are held against, and the figures in them.

Times of one component or step are cost rows and stay with the profiles; `tables.csv` says which of them form a table.
What is no cost row (traffic, FLOPs, speed-ups, ratios, latencies end to end) stands in the other files of
`profiles/published/`, a figure a row, with the plan that it belongs to and the quantity that it is.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.profile_rows import Count, Name, Positive, Row, columns_of, row_problems
from hybridsd_sim.profiles import CostRow, data_folder

REGISTRY = "tables.csv"
Group = Literal["resolution", "model", "device", "device_model"]
"""What is left out of the fits together, to see how well the rest predicts it: a resolution or model of a publication,
or a device everywhere; where a device has no datasheet, and nothing can be said without its rows, one model on it."""
Takes = Literal["one_gpu", "multi_gpu", "exchange"]
RowT = TypeVar("RowT", bound=Row)


class Table(Row):
    """A table: which cost rows it takes, and what of it is left out of the fits together.

    It takes cost rows whose source begins with `source`, and continues with one of `parts` where there are any.
    `takes` None is a table of `PublishedRow`s alone. Where `counts` is false the cost rows are shown and not counted,
    for the reason in `notes`.
    """

    name: Name
    title: Name
    takes: Takes | None = None
    parts: tuple[Name, ...] = ()
    counts: bool = True
    group: Group

    @field_validator("parts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(";")) if isinstance(value, str) else value

    def holds(self, row: CostRow) -> bool:
        """Whether this cost row belongs to the table."""
        place = row.source.removeprefix(self.source)
        named = row.source.startswith(self.source) and (not self.parts or place.strip() in self.parts)
        return named and self.takes == what_is_timed(row)


class PublishedRow(Row):
    """One published figure: the quantity, its value, and the plan that it belongs to.

    `model` names a component for quantities of a decoder. With a `small_model`, a plan hands over at `switch_step`, and
    a ratio divides by the small model's. `degrees` and `sides_px` (of square images) are single values, but for ranges
    and ratios. Rows that do not count are outliers, with the reason in `notes`. `fitted` are those from which a
    constant of the catalogue was derived; it stays when the figure is left out.
    """

    table: Name
    quantity: Name
    value: Positive
    counts: bool = True
    fitted: bool = False
    model: Name
    small_model: Name | None = None
    switch_step: Annotated[int, Field(ge=0)] | None = None
    device: Name | None = None
    runtime: Name = "eager"
    precision: Name = "fp16"
    method: Name = "single"
    degrees: tuple[Count, ...] = (1,)
    options: str = ""
    sides_px: tuple[Count, ...]
    num_inference_steps: Count = 1
    batch_size: Count = 1
    guidance: bool = True

    @field_validator("degrees", "sides_px", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(";")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _outliers_need_a_reason(self) -> PublishedRow:
        if not (self.counts or self.notes):
            raise ValueError("a row that does not count says why in notes")
        return self


@dataclass(frozen=True, slots=True)
class Published:
    """The registered tables by name, in the order of the registry, and the figures that are no cost rows."""

    tables: Mapping[str, Table]
    rows: tuple[PublishedRow, ...]


def what_is_timed(row: CostRow) -> Takes | None:
    """What kind of table a cost row fits; None for those that no law predicts, such as a rank's own clock."""
    if row.rank is not None:
        return None
    if row.component == "exchange" and row.degree > 1:
        return "exchange"
    if row.degree > 1:
        return "multi_gpu" if row.component in {"step", "step_warmup"} else None
    return "one_gpu" if row.component in {"step", "vae_decode", "text_encode"} else None


def load_published(path: str | Path | None = None) -> Published:
    """Read a folder of published tables; None means the shipped one.

    Raises `InputError` with everything wrong in every file, each with file and line.
    """
    folder = Path(path) if path is not None else data_folder("profiles") / "published"
    problems: list[Problem] = []
    tables = list(_rows(folder / REGISTRY, Table, problems))
    files = sorted(file for file in folder.glob("*.csv") if file.name != REGISTRY)
    rows = [found for file in files for found in _rows(file, PublishedRow, problems)]
    problems += _name_problems(tables, rows)
    if problems:
        raise InputError(problems)
    return Published({table.name: table for _, table in tables}, tuple(row for _, row in rows))


def _name_problems(tables: Sequence[tuple[str, Table]], rows: Sequence[tuple[str, PublishedRow]]) -> Iterator[Problem]:
    names = Counter(table.name for _, table in tables)
    for place, table in tables:
        if names[table.name] > 1:
            yield Problem(f"{place}: name", repr(table.name), "stands in the file more than once")
    for place, row in rows:
        if row.table not in names:
            yield unknown_name(f"{place}: table", row.table, list(names))


def _rows(file: Path, shape: type[RowT], problems: list[Problem]) -> Iterator[tuple[str, RowT]]:
    """The rows of a file, each with its place; what is wrong joins `problems`. Empty cells are left out."""
    try:
        lines = csv.reader(file.read_text("utf-8-sig").splitlines(), strict=True)
        header = next(lines, [])
        if wrong := list(_header_problems(f"{file}:1", header, columns_of(shape))):
            problems += wrong
            return
        for cells in lines:
            yield from _row(f"{file}:{lines.line_num}", header, cells, shape, problems)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(Problem(str(file), str(error), "must be a CSV file in UTF-8"))


def _header_problems(place: str, header: Sequence[str], needed: Mapping[str, bool]) -> Iterator[Problem]:
    for column, times in Counter(header).items():
        if column not in needed or times > 1:
            yield Problem(place, f"column {column!r}", "no such column" if times == 1 else "stands there twice")
    for column, required in needed.items():
        if required and column not in header:
            yield Problem(place, f"column {column!r}", "is missing")


def _row(
    place: str, header: Sequence[str], cells: Sequence[str], shape: type[RowT], problems: list[Problem]
) -> Iterator[tuple[str, RowT]]:
    if len(cells) != len(header):
        rule = f"the header has {len(header)}; cells with commas need quotes"
        problems.append(Problem(place, f"{len(cells)} cells", rule))
        return
    said = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    try:
        yield place, shape.model_validate(said, strict=False)
    except ValidationError as error:
        problems += row_problems(error, place, said)
