"""The folders that ship with the package, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical_json(data: object) -> bytes:
    """JSON with sorted keys and no spare room: the same data gives the same bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
