"""What was computed before, kept on disk by content hash: one small JSON file per entry.

A file is written under another name and then renamed, so that a reader or an interrupted writer never leaves half of
one. It carries its key and a checksum: what is damaged, foreign or unreadable counts as absent. Floats come back bit
for bit; NaN and the infinities are written as Python's `json` writes them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

MOST_FILES = 20_000
"""Entries that a folder keeps from one run to the next; a file takes about 4 KB."""
UNFINISHED_S = 3600.0
"""Age at which a file that was never renamed is taken to be left over from a run that was killed."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of entries by key, shared by any number of processes. Keys are hexadecimal digests and suffixes.

    Constructing it touches nothing. Writing is best effort: on a full or read-only disk an entry is not kept.
    """

    folder: Path

    def get(self, key: str) -> Any:
        """What was put there under the key, or None."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            data = entry["data"]
            sound = (entry["key"], entry["check"]) == (key, _checksum(data))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        if not sound:
            return None
        with suppress(OSError):
            os.utime(path)  # the oldest files are removed first: what is used stays
        return data

    def put(self, key: str, data: Any) -> None:
        """Keep plain data (what JSON can hold, floats included that are not finite) under the key."""
        text = json.dumps({"key": key, "check": _checksum(data), "data": data})
        path = self._path(key)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, text)

    def tidy(self, most: int = MOST_FILES) -> int:
        """Remove the entries used longest ago beyond `most`, and what killed writers left; how many entries stay."""
        entries = sorted(self._entries(".json"), key=lambda entry: entry[0], reverse=True)
        old_s = time.time() - UNFINISHED_S
        left_over = [path for used_s, path in self._entries(".part") if used_s < old_s]
        for path in [*left_over, *(path for _, path in entries[most:])]:
            path.unlink(missing_ok=True)
        return min(len(entries), most)

    def __len__(self) -> int:
        return sum(1 for _ in self._entries(".json"))

    def __bool__(self) -> bool:
        return True  # an empty store is a store

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _entries(self, suffix: str) -> Iterator[tuple[float, Path]]:
        """Time of last use and path of every file; one that another process removes meanwhile is left out."""
        for path in self.folder.glob(f"??/*{suffix}"):
            with suppress(OSError):
                yield path.stat().st_mtime, path


def default_folder() -> Path:
    """`$HYBRIDSD_CACHE`, else `$XDG_CACHE_HOME/hybridsd-sim`, else `~/.cache/hybridsd-sim`."""
    if own := os.environ.get("HYBRIDSD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybridsd-sim"


def opened(folder: Path) -> Store:
    """The store in a folder, made and tidied. Raises `OSError` where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder):
        pass
    store = Store(folder)
    store.tidy()
    return store


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        written = Path(file.name)
        try:
            file.write(text)
            file.close()
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise


def _checksum(data: Any) -> str:
    return sha256(json.dumps(data).encode()).hexdigest()
