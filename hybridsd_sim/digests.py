"""What shapes the figures of an evaluation, as one SHA-256: kept figures are found by it, and only while it holds.

The program belongs to it, so that a changed one never takes up old figures: every source file of the package, and the
versions of the libraries that draw and add up numbers. A trace counts by its content, not by its path. What the digest
leaves out of a scenario are names, limits and the rest of the search space; everything else is in it, also keys that
will be added one day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import RequestClass, Scenario
from hybridsd_sim.version import __version__

SEEN = {"seed", "horizon_s", "warmup_s", "requests", "edge", "pools"}
"""Keys of a scenario that shape figures; of `search` only `prefer_sources` does."""
LIMITS_OF_CLASS = {"quality_floor", "edge_energy_j", "usd_per_image"}
"""Keys of a request class that shape no figure, but only what is thought of it."""
SIZES_OF_POOL = {"replicas", "replicas_min", "replicas_max"}
"""Keys of a pool in whose place the deployment says how many nodes there are."""
LIBRARIES = ("numba", "numpy", "scipy", "simpy")
"""What figures are computed with: another version may round another way or draw other numbers."""


def content_digest(
    scenario: Scenario, profiles: Profiles, deployment: Deployment, *, level: str, slowdowns: Mapping[str, float]
) -> str:
    """SHA-256 of everything that shapes the figures of a deployment over a given number of replications.

    Of the pools only those count that are rented, or named by a plan. Slowdowns of 1 are none.
    """
    sites = {site for mix in deployment.plans.values() for part in mix for site in part.plan.sites}
    sites |= {name for name, nodes in deployment.replicas.items() if nodes}
    content = [
        program_digest(),
        profiles.digest,
        level,
        sorted((name, float(factor)) for name, factor in slowdowns.items() if factor != 1.0),
        [scenario.seed, scenario.horizon_s, scenario.warmup_s, scenario.search.prefer_sources],
        [(name, _seen_of_class(spec), _mix(deployment, name)) for name, spec in scenario.requests.items()],
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


def _seen_of_class(spec: RequestClass) -> dict[str, Any]:
    data = spec.model_dump(mode="json", exclude=LIMITS_OF_CLASS)
    if spec.arrivals.path is not None:
        data["arrivals"]["path"] = _digest_of_file(spec.arrivals.path)
    return data


def _mix(deployment: Deployment, name: str) -> list[tuple[float, dict[str, Any]]]:
    return [(float(part.share), part.plan.to_dict()) for part in deployment.plans.get(name, ())]


def _digest_of_file(path: str) -> str:
    """SHA-256 of a trace; of its path where it cannot be read, which the run will say."""
    try:
        about = Path(path).stat()
        return _remembered_digest(path, about.st_mtime_ns, about.st_size)
    except OSError:
        return path


@lru_cache(maxsize=16)
def _remembered_digest(path: str, mtime_ns: int, size: int) -> str:  # noqa: ARG001 -- part of the key
    return sha256(Path(path).read_bytes()).hexdigest()


@cache
def program_digest() -> str:
    """SHA-256 of what computes figures: the version, every source file of the package, and the libraries' versions."""
    folder = Path(__file__).parent
    digest = sha256(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        digest.update(f"\0{name} {_version(name)}".encode())
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"
