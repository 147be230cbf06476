"""Reads profiles folders: every table and every cost row checked, all problems at once with file and line.

A folder holds `catalog/*.csv`, `fitted/*.csv`, `quoted/*.csv` and `measured/<device>/<model>.csv` with
`<model>.meta.yaml` beside it.
Rows of a later folder replace those of earlier ones that timed the very same and are no better known.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hybridsd_sim.cost_rows import CostRow, Meta
from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.fitted_rows import FITTED, Population
from hybridsd_sim.plan import KIND_ORDER, Kind
from hybridsd_sim.profile_rows import (
    TABLES,
    EdgeDevice,
    Gpu,
    Interconnect,
    Model,
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
        networks = {row.name: row.network for _, row in self.tables["models"]}
        worst = len(KIND_ORDER)
        best: dict[tuple[object, ...], int] = {}
        for _, row in self.tables["costs"]:
            what = _timed(row, networks)
            best[what] = min(best.get(what, worst), KIND_ORDER[row.kind])
        kept = [pair for pair in before if KIND_ORDER[pair[1].kind] < best.get(_timed(pair[1], networks), worst)]
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
            if header and self._header_is_right(f"{path}:1", header, shape):
                for cells in lines:
                    found += self._row(f"{path}:{lines.line_num}", header, cells, shape)
        except csv.Error as error:
            self._refuse(f"{path}:{lines.line_num}", str(error), "must be CSV")
        return found

    def _header_is_right(self, place: str, header: list[str], shape: type[Row]) -> bool:
        needed = columns_of(shape)
        before = len(self.problems)
        for column, times in Counter(header).items():
            if column not in needed:
                close = get_close_matches(column, needed, n=1)
                remedy = f"Did you mean {close[0]}?" if close else f"Columns: {', '.join(needed)}."
                self._refuse(place, f"column {column!r}", "no such column", remedy)
            elif times > 1:
                self._refuse(place, f"column {column!r}", "stands there twice")
        for column, required in needed.items():
            if required and column not in header:
                self._refuse(place, f"column {column!r}", "is missing")
        return len(self.problems) == before

    def _row(self, place: str, header: list[str], cells: list[str], shape: type[Row]) -> list[tuple[str, Any]]:
        if len(cells) != len(header):
            self._refuse(place, f"{len(cells)} cells", f"the header has {len(header)}; cells with commas need quotes")
            return []
        said = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
        try:
            return [(place, shape.model_validate(said, strict=False))]
        except ValidationError as error:
            self.problems += row_problems(error, place, said)
            return []

    def _costs(self, folder: Path, file: Path, kinds: tuple[Kind, ...]) -> list[tuple[str, Any]]:
        rows = self._table(folder, file, CostRow)
        self.tables["costs"] += rows
        for place, row in rows:
            if row.kind not in kinds:
                self._refuse(f"{place}: kind", repr(row.kind), f"rows of this folder are {' or '.join(kinds)}")
        return rows

    def _meta(self, folder: Path, file: Path, rows: list[tuple[str, Any]]) -> None:
        device, path = file.parent.name, file.with_suffix(".meta.yaml")
        text, said = self._text(folder, path), None
        if not text.strip():
            return
        try:
            # BaseLoader leaves every scalar a text, which the shape then reads as it reads CSV cells.
            said = yaml.load(text, yaml.BaseLoader)  # noqa: S506
            meta = Meta.model_validate(said, strict=False)
        except yaml.YAMLError as error:
            self._refuse(str(path), " ".join(str(error).split()), "must be YAML")
        except ValidationError as error:
            self.problems += row_problems(error, str(path), said if isinstance(said, dict) else {})
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


def _timed(row: CostRow, networks: Mapping[str, str]) -> tuple[object, ...]:
    """What a row timed: rows of two folders that agree in this contradict each other."""
    which = row.device, row.runtime, row.precision, networks.get(row.model, row.model), row.component, row.rank
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
