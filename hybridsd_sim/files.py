"""The folders that ship with the package, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from hybridsd_sim.errors import InputError, Problem


def data_folder(kind: Literal["profiles", "scenarios"]) -> Path:
    """The shipped folder of profiles or scenarios: inside the installed package, else at the top of the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    rule = "is missing from this installation"
    raise InputError(Problem(f"shipped {kind}", str(package / "_data" / kind), rule, "Install the package again."))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder to write to: renamed to `path` at the end, so that nobody sees half a file.

    Where the block raises, `path` stays as it was. The temporary file is gone in either case.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def canonical_json(data: object) -> bytes:
    """JSON with sorted keys and no spare room: the same data gives the same bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
