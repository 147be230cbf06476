"""Step costs, devices, GPUs, models, links, prices, quality: typed rows with sources; says what it does not have.

A profiles folder holds `catalog/*.csv` (one table a file), `quoted/*.csv` (published cost rows) and
`measured/<device>/<model>.csv` with `<model>.meta.yaml` beside it (written by the executors). Sources that disagree are
all kept. Where one row must be chosen, measured goes before quoted before modelled, then the newer source before the
older, then the earlier line; `prefer` names sources to take before all others, best first (any part of their text will
do). Nothing is extrapolated.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from hybridsd_sim.errors import InputError, MissingDataError, Problem, unknown_name
from hybridsd_sim.plan import Kind
from hybridsd_sim.profile_rows import (
    TABLES,
    Component,
    CostRow,
    EdgeDevice,
    Gpu,
    Interconnect,
    Meta,
    Model,
    Network,
    Price,
    QualityRow,
    Quantiles,
    Row,
    Runtime,
    columns_of,
    mentions,
    row_problems,
)

__all__ = [
    "Component", "CostRow", "EdgeDevice", "Gpu", "Interconnect", "Meta", "Model", "Network", "Price", "Profiles",
    "QualityRow", "Quantiles", "Row", "Runtime", "data_folder", "load_profiles",
]  # fmt: skip

_KIND_ORDER: Mapping[Kind, int] = {"measured": 0, "quoted": 1, "modelled": 2}
_LISTS = ("prices", "quality", "costs")
_StepKey = tuple[str, str, str, tuple[int, int], int]
NamedT = TypeVar("NamedT")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Profiles:
    """Everything that is known about hardware, models, links, prices and quality, by name; see `load_profiles`.

    `costs` are the quoted rows and then the measured ones. `metas` describe the measured files, as `device/model`.
    `digest` is the SHA-256 of all the files. Asking for a name that is not there raises `MissingDataError`.
    """

    gpus: Mapping[str, Gpu]
    edge_devices: Mapping[str, EdgeDevice]
    models: Mapping[str, Model]
    components: Mapping[str, Component]
    interconnects: Mapping[str, Interconnect]
    networks: Mapping[str, Network]
    runtimes: Mapping[str, Runtime]
    prices: tuple[Price, ...]
    quality: tuple[QualityRow, ...]
    costs: tuple[CostRow, ...]
    metas: Mapping[str, Meta]
    digest: str
    _steps: Mapping[_StepKey, Sequence[CostRow]]

    def __repr__(self) -> str:
        counts = f"{len(self.gpus)} GPUs, {len(self.models)} models, {len(self.costs)} cost rows"
        return f"Profiles({counts}, {self.digest[:8]})"

    def gpu(self, name: str) -> Gpu:
        return _named("gpu", name, self.gpus)

    def edge_device(self, name: str) -> EdgeDevice:
        return _named("edge device", name, self.edge_devices)

    def model(self, name: str) -> Model:
        return _named("model", name, self.models)

    def component(self, name: str) -> Component:
        return _named("component", name, self.components)

    def interconnect(self, name: str) -> Interconnect:
        return _named("interconnect", name, self.interconnects)

    def network(self, name: str) -> Network:
        return _named("network", name, self.networks)

    def runtime(self, name: str) -> Runtime:
        return _named("runtime", name, self.runtimes)

    def device(self, name: str) -> Gpu | EdgeDevice:
        """The GPU or edge device of that name; a card that is both is given as a GPU."""
        both: dict[str, Gpu | EdgeDevice] = {**self.edge_devices, **self.gpus}
        return _named("device", name, both)

    def peak_flop_per_s(self, device: str) -> float | None:
        """The datasheet's dense fp16 peak of a GPU or edge device; None where no datasheet gives one."""
        return self.device(device).fp16_flop_per_s

    def cost_rows(
        self, *, device: str | None = None, model: str | None = None, component: str = "step", **more: object
    ) -> tuple[CostRow, ...]:
        """The cost rows that hold these values, None standing for any; `more` names other columns."""
        wanted = {"device": device, "model": model, "component": component, **more}
        tests = [(key, value) for key, value in wanted.items() if value is not None]
        return tuple(row for row in self.costs if all(getattr(row, key) == value for key, value in tests))

    def step_row(
        self,
        device: str,
        runtime: str,
        model: str,
        size: tuple[int, int],
        *,
        latents: int,
        precision: str | None = None,
        prefer: Sequence[str] = (),
    ) -> CostRow | None:
        """The row that timed this very UNet call on one device (`size`: height and width in px), or None.

        A model of the same config serves as well (SD 1.4 and 1.5 are one network). Where the runtime's calls hold at
        most `max_unet_batch` latents, the row is that of a full call, of which the caller makes several.
        """
        limit = self.runtime(runtime).max_unet_batch
        held = min(latents, limit) if limit else latents
        rows = self._steps.get((device, runtime, _architecture(self.model(model)), size, held), ())
        fitting = [row for row in rows if precision in (None, row.precision)]
        return min(fitting, key=lambda row: _rank(row, prefer), default=None)

    def component_row(
        self, device: str, runtime: str, component: Component, size: tuple[int, int], *, prefer: Sequence[str] = ()
    ) -> CostRow | None:
        """The row that timed one prompt or image (`size`: height and width in px) on one device, or None."""
        wanted = size if component.component == "vae_decode" else (0, 0)
        rows = self.cost_rows(
            device=device, model=component.name, component=component.component, runtime=runtime, batch_size=1, degree=1
        )
        fitting = [row for row in rows if (row.height_px, row.width_px) == wanted]
        return min(fitting, key=lambda row: _rank(row, prefer), default=None)

    def model_load(self, device: str, *, prefer: Sequence[str] = ()) -> CostRow:
        """Seconds until another model is ready: the device's own row, else the one for any device."""
        rows = [row for row in self.costs if row.component == "model_load" and row.device in (device, "*")]
        if not rows:
            raise MissingDataError(Problem("model_load", device, "no row says how long a model load takes"))
        return min(rows, key=lambda row: (row.device == "*", _rank(row, prefer)))

    def gpu_price(self, gpu: str, purchase: str = "on_demand", provider: str | None = None) -> Price | None:
        """USD per GPU-hour: the first row of `provider`, else the row marked default; None where nobody sells it."""
        return self._price(f"gpu:{gpu}", purchase, provider)

    def usd(self, item: str, provider: str | None = None) -> float:
        """USD for a GiB of `egress` or a kWh of `electricity`: the first row of `provider`, else the default one."""
        if price := self._price(item, "", provider):
            return price.usd
        known = [row.provider for row in self.prices if row.item == item]
        raise MissingDataError(unknown_name(f"price of {item}", provider or "default", known))

    def _price(self, item: str, purchase: str, provider: str | None) -> Price | None:
        rows = (row for row in self.prices if (row.item, row.purchase) == (item, purchase))
        return next((row for row in rows if (row.provider == provider if provider else row.default)), None)

    def egress_usd_per_gib(self, provider: str | None = None) -> float:
        return self.usd("egress", provider)

    def with_costs(self, rows: Sequence[CostRow]) -> Profiles:
        """The same with these cost rows in front, such as a user's own measurement."""
        costs = (*rows, *self.costs)
        said = "".join(row.model_dump_json() for row in rows)
        digest = hashlib.sha256(f"{self.digest}{said}".encode()).hexdigest()
        return replace(self, costs=costs, digest=digest, _steps=_steps_of(costs, self.models))

    def nearest(self, device: str, model: str, *, component: str = "step") -> str:
        """A sentence that names the rows nearest to a device and model, for messages about missing rows."""
        rows = sorted(
            (row for row in self.costs if row.component == component and row.degree == 1),
            key=lambda row: (row.device != device, row.model != model, _rank(row, ())),
        )
        close = (row for row in rows if device == row.device or model == row.model)
        said = dict.fromkeys(
            f"{row.model} {row.height_px}x{row.width_px} on {row.device} ({row.runtime})" for row in close
        )
        return f"Nearest rows: {', '.join(list(said)[:3])}." if said else f"No {component} row has {device} or {model}."


def _named(what: str, name: str, known: Mapping[str, NamedT]) -> NamedT:
    if name not in known:
        raise MissingDataError(unknown_name(what, name, tuple(known)))
    return known[name]


def _rank(row: CostRow, prefer: Sequence[str]) -> tuple[int, int, _Newest]:
    place = next((index for index, name in enumerate(prefer) if name in row.source), len(prefer))
    return place, _KIND_ORDER[row.kind], _Newest(row.source_date)


class _Newest(str):
    """A date that sorts before older ones; what does not begin with a year sorts last."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        mine, theirs = (text if text[:1].isdigit() else "" for text in (self[:], other[:]))
        return mine > theirs


def _steps_of(costs: Sequence[CostRow], models: Mapping[str, Model]) -> dict[_StepKey, list[CostRow]]:
    """The one-GPU step rows by what they timed, each list in the order of the rows."""
    networks = {name: _architecture(model) for name, model in models.items()}
    steps: dict[_StepKey, list[CostRow]] = {}
    for row in costs:
        if row.component == "step" and row.degree == 1 and row.rank is None:
            size = (row.height_px, row.width_px)
            steps.setdefault((row.device, row.runtime, networks[row.model], size, row.latents), []).append(row)
    return steps


def _architecture(model: Model) -> str:
    """A text that is the same for models of the same network."""
    return json.dumps(model.config, sort_keys=True)


def data_folder(kind: Literal["profiles", "scenarios"]) -> Path:
    """The shipped folder of profiles or scenarios: inside the installed package, else at the top of the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    rule = "is missing from this installation"
    raise InputError(Problem(f"shipped {kind}", str(package / "_data" / kind), rule, "Install the package again."))


def load_profiles(path: str | Path | None = None) -> Profiles:
    """Read a profiles folder; None means the shipped one.

    A folder without `catalog/` is laid over the shipped one: its quoted and measured rows join. Raises `InputError`
    with everything wrong in every file, each with file and line.
    """
    folders = [data_folder("profiles")] if path is None else _folders(Path(path))
    read = _Read()
    for folder in folders:
        read.folder(folder)
    read.check_names()
    if read.problems:
        raise InputError(read.problems)
    return read.profiles()


def _folders(path: Path) -> list[Path]:
    if (path / "catalog").is_dir():
        return [path]
    if (path / "quoted").is_dir() or (path / "measured").is_dir():
        return [data_folder("profiles"), path]
    raise InputError(Problem(str(path), "not a profiles folder", "needs catalog/, quoted/ or measured/ inside"))


class _Read:
    """Reads folders and keeps what it finds, good rows and problems alike, with the file and line of each."""

    def __init__(self) -> None:
        self.tables: dict[str, list[tuple[str, Any]]] = {name: [] for name in (*TABLES, "costs")}
        self.metas: dict[str, Meta] = {}
        self.problems: list[Problem] = []
        self.hash = hashlib.sha256()

    def folder(self, folder: Path) -> None:
        """Read the catalogue, where there is one, then quoted rows, then measured ones."""
        if (folder / "catalog").is_dir():
            for name, shape in TABLES.items():
                self.tables[name] += self._table(folder, folder / "catalog" / f"{name}.csv", shape)
        for file in sorted(folder.glob("quoted/*.csv")):
            self._costs(folder, file, ("quoted", "modelled"))
        for file in sorted(folder.glob("measured/*/*.csv")):
            self._meta(folder, file, self._costs(folder, file, ("measured",)))

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
                for column, name, known in mentions(row, names):
                    if name not in known:
                        self.problems.append(unknown_name(f"{place}: {column}", name, tuple(known)))
        prices = self.tables["prices"]
        defaults = Counter((row.item, row.purchase) for _, row in prices if row.default)
        for key, place in {(row.item, row.purchase): place for place, row in reversed(prices)}.items():
            if defaults[key] != 1:
                rule = f"has {defaults[key]} rows with default true, and needs exactly one"
                self._refuse(f"{place}: default", " ".join(filter(None, key)), rule)

    def profiles(self) -> Profiles:
        """What was read, by name."""
        tables: dict[str, Any] = {name: [row for _, row in rows] for name, rows in self.tables.items()}
        for name, rows in tables.items():
            tables[name] = tuple(rows) if name in _LISTS else {row.name: row for row in rows}
        steps = _steps_of(tables["costs"], tables["models"])
        return Profiles(**tables, metas=self.metas, digest=self.hash.hexdigest(), _steps=steps)
