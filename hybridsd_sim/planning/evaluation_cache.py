"""Evaluations of earlier runs, kept on disk by what shapes their figures: one small JSON file per entry.

An entry is found by the SHA-256 of everything that shapes its figures, and only while that holds. The program belongs
to it, so that a changed one never takes up old figures: every source file of the package, and the versions of the
libraries that draw and add up numbers. A trace counts by its content, not by its path. What the digest leaves out of a
scenario are names, limits and the rest of the search space; everything else is in it, also keys to come.

Files are written atomically, so that neither readers nor killed writers, of any number of processes and machines on a
shared disk, ever see half of one (SQLite in write-ahead mode, as in diskcache, excludes network disks). Each carries
its key and a checksum: what is damaged, foreign or unreadable counts as absent. Floats come back bit for bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from hybridsd_sim.files import write_atomically
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.version import __version__

MOST_FILES = 20_000
"""Entries that a folder keeps from one run to the next; a file takes about 4 KB."""

UNFINISHED_S = 3600.0
"""Age at which a file that was never renamed is taken to be left over from a run that was killed."""


SEEN = {"seed", "horizon_s", "warmup_s", "requests", "edge", "pools"}
"""Keys of a scenario that shape figures; of `search` only `prefer_sources` does."""

LIMITS_OF_CLASS = {"quality_floor", "edge_energy_j", "usd_per_image"}
"""Keys of a request class that shape no figure, but only what is thought of it."""

SIZES_OF_POOL = {"replicas", "replicas_min", "replicas_max"}
"""Keys of a pool in whose place the deployment says how many nodes there are."""

LIBRARIES = ("numba", "numpy", "scipy", "simpy")
"""What figures are computed with: another version may round another way or draw other numbers."""


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
        with suppress(OSError):
            write_atomically(self._path(key), text.encode())

    def tidy(self, most: int = MOST_FILES) -> int:
        """Remove the entries used longest ago beyond `most`, and what killed writers left; how many entries stay."""
        entries = sorted(self._entries(".json"), key=lambda entry: entry[0], reverse=True)
        old_s = time.time() - UNFINISHED_S
        left_over = [path for used_s, path in self._entries(".tmp") if used_s < old_s]
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


def open_store(folder: Path) -> Store:
    """The store in a folder, which is made and tidied. Raises `OSError` where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder):
        pass
    store = Store(folder)
    store.tidy()
    return store


def _checksum(data: Any) -> str:
    return sha256(json.dumps(data).encode()).hexdigest()


def content_digest(
    scenario: Scenario, profiles: Profiles, deployment: Deployment, *, level: str, slowdowns: Mapping[str, float]
) -> str:
    """SHA-256 of everything that shapes the figures of a deployment over a given number of replications.

    Of the pools only those count that are rented, or named by a plan. Slowdowns of 1 are none.
    """
    sites = {site for mix in deployment.plans.values() for part in mix for site in part.plan.sites}
    sites |= {name for name, nodes in deployment.replicas.items() if nodes}
    classes = []
    for name, spec in scenario.requests.items():
        seen = spec.model_dump(mode="json", exclude=LIMITS_OF_CLASS)
        if (path := spec.arrivals.path) is not None:
            with suppress(OSError):  # where it cannot be read, the path counts, and the run will say so
                about = Path(path).stat()
                seen["arrivals"]["path"] = _file_digest(path, about.st_mtime_ns, about.st_size)
        mix = [(float(part.share), part.plan.to_dict()) for part in deployment.plans.get(name, ())]
        classes.append((name, seen, mix))
    content = [
        program_digest(),
        profiles.digest,
        level,
        sorted((name, float(factor)) for name, factor in slowdowns.items() if factor != 1.0),
        [scenario.seed, scenario.horizon_s, scenario.warmup_s, scenario.search.prefer_sources],
        classes,
        [(name, fleet.model_dump(mode="json")) for name, fleet in scenario.edge.items()],
        [
            (name, deployment.replicas.get(name, 0), pool.model_dump(mode="json", exclude=SIZES_OF_POOL))
            for name, pool in scenario.pools.items()
            if name in sites
        ],
        sorted(set(deployment.plans) - set(scenario.requests)),  # a run refuses what the scenario does not have
        sorted(sites - {*scenario.pools, *scenario.edge}),
    ]
    return sha256(json.dumps(content).encode()).hexdigest()


@lru_cache(maxsize=16)  # a trace is read once, not for every plan; time and size tell when it changed
def _file_digest(path: str, mtime_ns: int, size: int) -> str:  # noqa: ARG001 -- part of the key
    return sha256(Path(path).read_bytes()).hexdigest()


@cache
def program_digest() -> str:
    """SHA-256 of what computes figures: the version, every source file of the package, and the libraries' versions."""
    folder = Path(__file__).parents[1]
    digest = sha256(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        digest.update(f"\0{name} {version(name)}".encode())
    return digest.hexdigest()
