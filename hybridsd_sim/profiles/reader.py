"""Reads profiles folders: every table and every cost row checked, all problems at once with file and line.

A folder holds `catalog/*.csv`, `fitted/*.csv`, `quoted/*.csv` and `measured/<device>/<model>.csv` with
`<model>.meta.yaml` beside it.
Rows of a later folder replace those of earlier ones that timed the very same and are no better known.

`profiles/published/` holds what predictions are compared with: `tables.csv` says which cost rows form a published
table, the other files hold the published figures that are no cost rows (traffic, FLOPs, speed-ups, latencies end to
end), a figure a row, with the plan that it belongs to and the quantity that it is.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.estimate import KIND_ORDER, Kind
from hybridsd_sim.files import data_folder
from hybridsd_sim.profiles.lookup import Profiles
from hybridsd_sim.profiles.schema import (
    FITTED,
    TABLES,
    CostRow,
    Count,
    EdgeDevice,
    Gpu,
    Interconnect,
    Meta,
    Model,
    Name,
    Population,
    Positive,
    Price,
    PublicCut,
    Row,
    columns_of,
    row_problems,
)

_OPTIONAL = ("cuts",)

_LISTS = ("prices", "quality", "cuts", "populations", "costs")


def read_folders(folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Meta], str]:
    """Every table by name, the metas by `device/model`, and the SHA-256 of all the files.

    `prices`, `quality`, `cuts`, `populations` and `costs` are tuples of rows, other tables are rows by name. Raises
    `InputError` with everything wrong in every file.
    """
    reader = _Reader()
    for folder in folders:
        reader.folder(folder)
    reader.check_names()
    if reader.problems:
        raise InputError(reader.problems)
    tables: dict[str, Any] = {name: [row for _, row in rows] for name, rows in reader.tables.items()}
    for name, rows in tables.items():
        tables[name] = tuple(rows) if name in _LISTS else {row.name: row for row in rows}
    return tables, reader.metas, reader.hash.hexdigest()


class _Reader:
    """Reads folders and keeps what it finds, good rows and problems alike, with the file and line of each."""

    def __init__(self) -> None:
        self.tables: dict[str, list[tuple[str, Any]]] = {name: [] for name in (*TABLES, *FITTED, "costs")}
        self.metas: dict[str, Meta] = {}
        self.problems: list[Problem] = []
        self.hash = hashlib.sha256()

    def folder(self, folder: Path) -> None:
        """Read the catalogue, where there is one, then quoted rows, then measured ones, over what was read before."""
        before, self.tables["costs"] = self.tables["costs"], []
        if (folder / "catalog").is_dir():
            for name, shape in TABLES.items():
                if name in _OPTIONAL and not (folder / "catalog" / f"{name}.csv").is_file():
                    continue
                self.tables[name] += self._table(folder, folder / "catalog" / f"{name}.csv", shape)
        for name, shape in FITTED.items():
            if (file := folder / "fitted" / f"{name}.csv").is_file():
                self.tables[name] = self._table(folder, file, shape)
        for file in sorted(folder.glob("quoted/*.csv")):
            self._costs(folder, file, ("quoted", "modelled"))
        for file in sorted(folder.glob("measured/*/*.csv")):
            self._meta(folder, file, self._costs(folder, file, ("measured",)))
        architectures = {row.name: row.architecture for _, row in self.tables["models"]}
        worst = len(KIND_ORDER)
        best: dict[tuple[object, ...], int] = {}
        for _, row in self.tables["costs"]:
            what = _timed(row, architectures)
            best[what] = min(best.get(what, worst), KIND_ORDER[row.kind])
        kept = [pair for pair in before if KIND_ORDER[pair[1].kind] < best.get(_timed(pair[1], architectures), worst)]
        self.tables["costs"][:0] = kept

    def _refuse(self, place: str, value: str, rule: str, remedy: str = "") -> None:
        self.problems.append(Problem(place, value, rule, remedy))

    def _text(self, folder: Path, path: Path) -> str:
        """The file's text, which joins the digest; empty, with a problem, where there is none."""
        try:
            content = path.read_bytes().replace(b"\r\n", b"\n")
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self._refuse(str(path), type(error).__name__, "must be a UTF-8 file that can be read")
            return ""
        if not text.strip():
            self._refuse(str(path), "empty", "must say something")
        self.hash.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
        return text

    def _table(self, folder: Path, path: Path, shape: type[Row]) -> list[tuple[str, Any]]:
        lines = csv.reader(self._text(folder, path).splitlines(), strict=True)
        found: list[tuple[str, Any]] = []
        try:
            header = next(lines, [])
            wrong = _header_problems(f"{path}:1", header, shape) if header else []
            self.problems += wrong
            if header and not wrong:
                for cells in lines:
                    found += _row(f"{path}:{lines.line_num}", header, cells, shape, self.problems)
        except csv.Error as error:
            self._refuse(f"{path}:{lines.line_num}", str(error), "must be CSV")
        return found

    def _costs(self, folder: Path, file: Path, kinds: tuple[Kind, ...]) -> list[tuple[str, Any]]:
        rows = self._table(folder, file, CostRow)
        self.tables["costs"] += rows
        for place, row in rows:
            if row.kind not in kinds:
                self._refuse(f"{place}: kind", repr(row.kind), f"rows of this folder are {' or '.join(kinds)}")
        return rows

    def _meta(self, folder: Path, file: Path, rows: list[tuple[str, Any]]) -> None:
        device, path = file.parent.name, file.with_suffix(".meta.yaml")
        text, values = self._text(folder, path), None
        if not text.strip():
            return
        try:
            # BaseLoader leaves every scalar a text, which the shape then reads as it reads CSV cells.
            values = yaml.load(text, yaml.BaseLoader)  # noqa: S506
            meta = Meta.model_validate(values, strict=False)
        except yaml.YAMLError as error:
            self._refuse(str(path), " ".join(str(error).split()), "must be YAML")
        except ValidationError as error:
            self.problems += row_problems(error, str(path), values if isinstance(values, dict) else {})
        else:
            self.metas[f"{device}/{file.stem}"] = meta
            for place, name in ((str(path), meta.device), *((place, row.device) for place, row in rows)):
                if name != device:
                    self._refuse(f"{place}: device", repr(name), f"must be its folder's, {device!r}")

    def check_names(self) -> None:
        """Names are unique in their table, every name that a row mentions exists, every price has one default."""
        tables = self.tables.items()
        names = {table: Counter(row.name for _, row in rows if hasattr(row, "name")) for table, rows in tables}
        for table, rows in tables:
            for place, row in rows:
                if names[table][getattr(row, "name", "")] > 1:
                    self._refuse(f"{place}: name", repr(row.name), "stands in the table more than once")
                for column, name, known in _mentions(row, names):
                    if name not in known:
                        self.problems.append(unknown_name(f"{place}: {column}", name, tuple(known)))
        prices = self.tables["prices"]
        defaults = Counter((row.item, row.purchase) for _, row in prices if row.default)
        for key, place in {(row.item, row.purchase): place for place, row in reversed(prices)}.items():
            if defaults[key] != 1:
                rule = f"has {defaults[key]} rows with default true, and needs exactly one"
                self._refuse(f"{place}: default", " ".join(filter(None, key)), rule)


def _timed(row: CostRow, architectures: Mapping[str, str]) -> tuple[object, ...]:
    """What a row timed: rows of two folders that agree in this contradict each other."""
    which = row.device, row.runtime, row.precision, architectures.get(row.model, row.model), row.component, row.rank
    # two images unguided are one image guided for the UNet, and not for what is handed over
    work = (row.latents,) if row.component.startswith("step") else (row.batch_size, row.guidance)
    return *which, row.height_px, row.width_px, *work, row.method, row.degree, row.options


def _mentions(row: Row, names: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str, Collection[str]]]:
    """Every name that a row mentions: its column, the name, and the names that exist."""
    if isinstance(row, Gpu):
        yield "default_interconnect", row.default_interconnect, names["interconnects"]
    elif isinstance(row, EdgeDevice):
        yield "default_runtime", row.default_runtime, names["runtimes"]
    elif isinstance(row, Interconnect) and row.beyond_pairs:
        yield "beyond_pairs", row.beyond_pairs, names["interconnects"]
    elif isinstance(row, Model):
        yield from (("text_encoders", name, names["components"]) for name in row.text_encoders)
        yield from (("vae", name, names["components"]) for name in (row.vae, row.small_vae))
    elif isinstance(row, PublicCut):
        yield "model", row.model, names["models"]
    elif isinstance(row, Population):
        yield "runtime", row.runtime, names["runtimes"]
    elif isinstance(row, Price) and row.item.startswith("gpu:"):
        yield "item", row.item.removeprefix("gpu:"), names["gpus"]
    elif isinstance(row, CostRow):
        whose = "components" if row.component in {"vae_decode", "text_encode"} else "models"
        yield "device", row.device, {*names["gpus"], *names["edge_devices"], "*"}
        yield "runtime", row.runtime, {*names["runtimes"], "*"}
        yield "model", row.model, names[whose] if row.component.startswith("step") else {*names[whose], "*"}


REGISTRY = "tables.csv"

Group = Literal["resolution", "model", "device", "device_model"]
"""What is left out of the fits together, to see how well the rest predicts it: a resolution or model of a publication,
or a device everywhere; where a device has no datasheet, and nothing can be said without its rows, one model on it."""

Takes = Literal["one_gpu", "multi_gpu", "exchange"]

RowT = TypeVar("RowT", bound=Row)


class PublishedTable(Row):
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
        return named and self.takes == timing_kind(row)


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

    tables: Mapping[str, PublishedTable]
    rows: tuple[PublishedRow, ...]


def timing_kind(row: CostRow) -> Takes | None:
    """What kind of table a cost row fits; None for those that no fit predicts, such as a rank's own clock."""
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
    tables = list(_rows(folder / REGISTRY, PublishedTable, problems))
    files = sorted(file for file in folder.glob("*.csv") if file.name != REGISTRY)
    rows = [found for file in files for found in _rows(file, PublishedRow, problems)]
    names = Counter(table.name for _, table in tables)
    for place, table in tables:
        if names[table.name] > 1:
            problems.append(Problem(f"{place}: name", repr(table.name), "stands in the file more than once"))
    problems += [
        unknown_name(f"{place}: table", row.table, list(names)) for place, row in rows if row.table not in names
    ]
    if problems:
        raise InputError(problems)
    return Published({table.name: table for _, table in tables}, tuple(row for _, row in rows))


def _rows(file: Path, shape: type[RowT], problems: list[Problem]) -> Iterator[tuple[str, RowT]]:
    """The rows of a file, each with its place; what is wrong joins `problems`. Empty cells are left out."""
    try:
        lines = csv.reader(file.read_text("utf-8-sig").splitlines(), strict=True)
        header = next(lines, [])
        if wrong := _header_problems(f"{file}:1", header, shape):
            problems += wrong
            return
        for cells in lines:
            yield from _row(f"{file}:{lines.line_num}", header, cells, shape, problems)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(Problem(str(file), str(error), "must be a CSV file in UTF-8"))


def _header_problems(place: str, header: Sequence[str], shape: type[Row]) -> list[Problem]:
    """What is wrong with a table's columns, which are those of its rows: unknown, twice there, or missing."""
    needed, found = columns_of(shape), []
    for column, times in Counter(header).items():
        if column not in needed:
            close = get_close_matches(column, needed, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"Columns: {', '.join(needed)}."
            found.append(Problem(place, f"column {column!r}", "no such column", remedy))
        elif times > 1:
            found.append(Problem(place, f"column {column!r}", "stands there twice"))
    missing = [column for column, required in needed.items() if required and column not in header]
    return found + [Problem(place, f"column {column!r}", "is missing") for column in missing]


def _row(
    place: str, header: Sequence[str], cells: Sequence[str], shape: type[RowT], problems: list[Problem]
) -> Iterator[tuple[str, RowT]]:
    if len(cells) != len(header):
        rule = f"the header has {len(header)}; cells with commas need quotes"
        problems.append(Problem(place, f"{len(cells)} cells", rule))
        return
    values = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    try:
        yield place, shape.model_validate(values, strict=False)
    except ValidationError as error:
        problems += row_problems(error, place, values)


_PARTS = ("catalog", "quoted", "measured")


def load_profiles(path: str | Path | Sequence[str | Path] | None = None) -> Profiles:
    """Read a profiles folder; None means the shipped one.

    A folder without `catalog/` is laid over the shipped one: its cost rows join, and replace those that timed the very
    same; so are several folders, each over those before. Raises `InputError` with everything wrong in every file, each
    with file and line.
    """
    given = [Path(folder) for folder in ([path] if isinstance(path, str | Path) else path or [])]
    rule = "needs catalog/, quoted/ or measured/ inside"
    if strange := [folder for folder in given if not any((folder / part).is_dir() for part in _PARTS)]:
        raise InputError(Problem(str(folder), "not a profiles folder", rule) for folder in strange)
    complete = [folder for folder in given if (folder / "catalog").is_dir()]
    if len(complete) > 1:
        raise InputError(Problem(str(complete[1]), "a second catalog/", "only one of the folders may hold one"))
    others = [folder for folder in given if folder not in complete]
    tables, metas, digest = read_folders([*(complete or [data_folder("profiles")]), *others])
    return Profiles(**tables, metas=metas, digest=digest)
