"""The measured files of a profiles folder: cost rows as CSV, how they were made as YAML beside it.

A file is rewritten whole under another name and then put in its place, so that a run cut off at any moment leaves whole
rows.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pydantic import ValidationError

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.files import write_atomically
from hybridsd_sim.profiles import CostRow, Meta, Row

KEYS = (
    "device", "runtime", "precision", "model", "component", "rank", "height_px", "width_px", "batch_size", "guidance",
    "method", "degree", "options",
)  # fmt: skip
"""The columns that say what a row measured: no two rows of a file agree in all of them."""

COLUMNS = (*(name for name in CostRow.model_fields if name not in Row.model_fields), *Row.model_fields)

Key = tuple[Any, ...]


def is_first_process() -> bool:
    """Whether this process speaks for all: under torchrun every rank has the same results, and the first writes."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def key_of(row: CostRow) -> Key:
    """What a row measured."""
    return tuple(getattr(row, name) for name in KEYS)


class MeasuredFile:
    """One measured file: the rows that it has, by what they measured, how they were made, and those put in now.

    Raises `InputError` for a file that is there and is not what the executors write.
    """

    def __init__(self, folder: Path, device: str, name: str) -> None:
        self.path = folder / "measured" / device / f"{name}.csv"
        self.rows: dict[Key, CostRow] = {key_of(row): row for row in _read(self.path)}
        self.meta = _read_meta(self._meta_path) if self.rows else None

    def __contains__(self, key: Key) -> bool:
        return key in self.rows

    def put(self, rows: Iterable[CostRow], meta: Meta) -> None:
        """Add rows, or renew those that measured the same, and write the file. `meta` must suit the rows there."""
        self.rows |= {key_of(row): row for row in rows}
        self.meta = merged_meta(self.meta, meta) if self.meta else meta
        if not is_first_process():
            return
        # the meta file first: rows without it would be refused
        # YAML, a line for each field, whose values are written as JSON, which YAML reads as it is
        fields = self.meta.model_dump(exclude_defaults=True).items()
        lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in fields]
        write_atomically(self._meta_path, "".join(lines).encode())
        write_atomically(self.path, _csv_text(self.rows.values()).encode())

    def problems(self, meta: Meta) -> list[Problem]:
        """Why rows made as `meta` says cannot be added: the folder cannot be written, or other rows speak otherwise."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            rule = f"cannot be written ({error.strerror or error})"
            return [Problem("--out", str(self.path.parent), rule, "Name a folder that can be.")]
        # what all rows of a file must share, by name
        there, now = (
            {"processor": of.processor, "driver": of.driver, **of.libraries, **of.protocol.model_dump()} if of else {}
            for of in (self.meta, meta)
        )
        return [
            Problem(
                f"{self._meta_path}: {name}",
                str(now.get(name, "none")),
                f"the rows that are there were measured with {there.get(name, 'none')}",
                "Name another --out folder, or remove the file and its meta.",
            )
            for name in sorted({*there, *now})
            if there and there.get(name) != now.get(name)
        ]

    @property
    def _meta_path(self) -> Path:
        return self.path.with_suffix(".meta.yaml")


def merged_meta(old: Meta, new: Meta) -> Meta:
    """The meta of rows of several runs: all commits, of each ceiling the largest that was seen, the newest date.

    Everything else is the new run's, but for the errors of a fit, which only a fit renews.
    """
    commits = dict.fromkeys([*old.commit.split(", "), new.commit])
    ceilings = {**old.ceilings, **new.ceilings}
    return new.model_copy(
        update={
            "commit": ", ".join(filter(None, commits)),
            "ceilings": {name: max(value, old.ceilings.get(name, value)) for name, value in ceilings.items()},
            "fit_errors": old.fit_errors,
        }
    )


def _read(path: Path) -> list[CostRow]:
    if not path.exists():
        return []
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines(), strict=True))
        return [CostRow.model_validate({k: v for k, v in line.items() if v}, strict=False) for line in lines]
    except (OSError, ValueError, csv.Error, ValidationError) as error:
        raise _not_ours(path, "rows", error) from error


def _read_meta(path: Path) -> Meta:
    """A meta file as it is written: a name and JSON on each line."""
    try:
        lines = [line.partition(":") for line in path.read_text(encoding="utf-8").splitlines()]
        return Meta.model_validate({name: json.loads(value) for name, _, value in lines}, strict=False)
    except (OSError, ValueError, ValidationError) as error:
        raise _not_ours(path, "meta", error) from error


def _not_ours(path: Path, what: str, error: Exception) -> InputError:
    rule = f"holds no {what} that can be added to ({str(error).splitlines()[0]})"
    return InputError(Problem("--out", str(path), rule, "Move it away, or name another folder."))


def _csv_text(rows: Iterable[CostRow]) -> str:
    """The rows in order of what they measured, column by column: numbers by size, nothing before them, words after."""

    def order(row: CostRow) -> Key:
        return tuple((key, 0) if isinstance(key, str) else ("", -1 if key is None else key) for key in key_of(row))

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=order):
        values = [getattr(row, name) for name in COLUMNS]
        cells = [f"{value:.6g}" if isinstance(value, float) else value for value in values]  # None makes an empty cell
        writer.writerow([str(cell).lower() if isinstance(cell, bool) else cell for cell in cells])
    return text.getvalue()
