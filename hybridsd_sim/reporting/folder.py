"""A run's folder: what is saved, what is drawn from it, and how neither is ever seen half done.

Data first (`provenance.json`, `plan.yaml`, the tables of `exports`, `requests.parquet`, `capacity.json`, and a
plan's load test), then pages, figures and the timeline from those files alone, so that a saved run drawn again gives
the same bytes. A new folder is filled beside its place under a hidden name and moved there in one step; a failure
leaves what was there.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version as installed
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.files import canonical_json, write_atomically
from hybridsd_sim.reporting.rendering import write_pages
from hybridsd_sim.version import __version__

if TYPE_CHECKING:
    from hybridsd_sim.planning import CapacityPlan
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario
    from hybridsd_sim.simulation import SimResult


FORMAT = 3
"""Raised whenever `capacity.json` changes so that older runs cannot be drawn."""

SAVED = (
    "provenance.json", "plan.yaml", "summary.csv", "pools.csv", "parts.csv", "calibration.csv", "calibration_rows.csv",
    "requests.parquet", "capacity.json", "load_test.json", "load_test.py",
)  # fmt: skip

DRAWN = ("index.html", "report.md", "figures", "timeline.json.gz")

LIBRARIES = ("matplotlib", "numpy", "pandas", "pyarrow", "scipy", "simpy")


def run_id(scenario: Scenario, profiles_digest: str | None, seed: int, version: str, extra: str = "") -> str:
    """Name of a run's folder: the scenario's name and a hash of scenario, profiles, seed, version and `extra`.

    `extra` says what was run: `plan`, or the names of the simulated policies joined by commas.
    """
    content = [scenario.digest, profiles_digest, seed, version, extra]
    return f"{scenario.name}-{sha256(canonical_json(content)).hexdigest()[:12]}"


def write_report(
    result: CapacityPlan | Sequence[SimResult],
    folder: Path,
    *,
    draw: bool = True,
    profiles: Profiles | None = None,
    profiles_digest: str | None = None,
) -> Path:
    """Save a capacity plan, or simulations side by side, into the run's folder and draw it; returns its `index.html`.

    `folder` appears whole or not at all, and takes the place of an earlier report; `draw` False saves the data only.
    `profiles` are those that the result was made with; without them they are read again from where the scenario names
    them. `profiles_digest` tells which they were, for simulations, which do not carry it. Raises `InputError` if the
    profiles are others, or if the folder holds anything that no report wrote.
    """
    if isinstance(result, Sequence) and not result:
        raise InputError(Problem("results", "[]", "a report needs at least one simulation"))
    from hybridsd_sim.profiles import load_profiles

    digest = profiles_digest if isinstance(result, Sequence) else result.profiles_digest
    scenario = result[0].scenario if isinstance(result, Sequence) else result.scenario
    known = profiles or load_profiles(scenario.search.profiles)
    if digest not in (None, known.digest):  # kinds, intervals and fits of others would be wrong
        rule = f"the result was made with others ({str(digest)[:12]})"
        raise InputError(Problem("profiles", known.digest[:12], rule, "Give write_report the `profiles` of the run."))
    with _replaced(Path(folder)) as fresh:
        _save(result, fresh, known, digest or (profiles.digest if profiles else None))
        if draw:
            _draw(fresh)
    return Path(folder) / "index.html"


def draw_report(folder: Path) -> Path:
    """Draw a saved run again from its files; returns its `index.html`.

    Reads nothing of the run but its folder, so that the same files give the same page, byte for byte. Raises
    `InputError` for a folder that is no saved run, and for one whose files are damaged.
    """
    with _damage_told(folder):
        return _draw(folder)


def _draw(folder: Path) -> Path:
    """Draw what a folder holds, just saved or long ago; a file that lacks something raises what it may."""
    from hybridsd_sim.reporting import figures, pages
    from hybridsd_sim.reporting.exports import MOST_REQUESTS, first_rows, trace
    from hybridsd_sim.reporting.pages import pictures

    data, provenance = read_run(folder)
    shown = pictures(data, figures.draw(data))
    make = pages.plan_page if data["kind"] == "plan" else pages.simulation_page
    title = f"{data['scenario']['name']}: {'capacity plan' if data['kind'] == 'plan' else 'simulation'}"
    gpus = {name: pool["gpus_per_node"] for name, pool in data["scenario"]["pools"].items()}
    with _reading(folder / "requests.parquet"):
        rows = first_rows(folder / "requests.parquet", MOST_REQUESTS)
    events = trace(rows, gpus, data["scenario"]["horizon_s"])
    write_atomically(folder / "timeline.json.gz", gzip.compress(canonical_json(events), mtime=0))
    return write_pages(folder, title, list(make(data, provenance, shown)), shown)


def compare_reports(a: Path, b: Path, folder: Path) -> Path:
    """Draw two saved runs side by side in `folder`; returns its `index.html`. Raises `InputError` as `draw_report`."""
    from hybridsd_sim.reporting import figures
    from hybridsd_sim.reporting.comparison import compare_page, side_by_side
    from hybridsd_sim.reporting.pages import pictures

    first, second = read_run(Path(a)), read_run(Path(b))
    with _damage_told(f"{a}, {b}"):
        data = side_by_side(first[0], second[0])
        shown = pictures(data, figures.draw(data, ("latency", "components")))
    with _replaced(Path(folder)) as fresh, _damage_told(f"{a}, {b}"):
        write_pages(fresh, "Two runs side by side", list(compare_page(first, second, shown)), shown)
    return Path(folder) / "index.html"


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data and the provenance of a saved run. Raises `InputError` if they are missing or of another format."""
    remedy = "Name a folder that `plan` or `simulate` wrote."
    missing = [
        name for name in ("capacity.json", "provenance.json", "requests.parquet") if not (folder / name).is_file()
    ]
    if missing:
        raise InputError(Problem(str(folder), "no saved run", f"lacks {', '.join(missing)}", remedy))
    data, provenance = (_read_mapping(folder / name) for name in ("capacity.json", "provenance.json"))
    if data.get("format") != FORMAT:
        rule = f"this version draws format {FORMAT}"
        raise InputError(Problem(str(folder), f"format {data.get('format')}", rule, "Run the scenario again."))
    return data, provenance


def _read_mapping(path: Path) -> dict[str, Any]:
    with _reading(path):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
        raise ValueError("no mapping of keys")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file of a run cannot be read, and why."""
    try:
        yield
    except (OSError, ValueError) as error:  # of JSON, of UTF-8, of Arrow
        raise _damaged(path, error) from error


@contextmanager
def _damage_told(where: Path | str) -> Iterator[None]:
    """Say which saved run lacks something, or has something of another shape, that its pages need."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where, error) from error


def _damaged(where: Path | str, error: Exception) -> InputError:
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(Problem(str(where), found, "is damaged, so that it cannot be drawn", "Run the scenario again."))


def _save(result: CapacityPlan | Sequence[SimResult], folder: Path, profiles: Profiles, digest: str | None) -> None:
    """Write everything that a run is drawn from, provenance first and the requests last."""
    from hybridsd_sim.reporting.data import CHOSEN, contents, named
    from hybridsd_sim.reporting.exports import load_test_data, tables, write_rows
    from hybridsd_sim.scenario import dump_yaml

    data = contents(result, profiles)
    if isinstance(result, Sequence):
        runs, scenario, extra = named(result), result[0].scenario, ",".join(run.policy for run in result)
    else:
        runs, scenario, extra = {CHOSEN: result.chosen_result, **result.baseline_results}, result.scenario, "plan"
        write_atomically(folder / "plan.yaml", dump_yaml(result.deployment.to_dict()).encode())
        # What checks the plan against a running service: a file that people can add to, and the script that sends it.
        load = load_test_data(result)
        requests = ",\n    ".join(json.dumps(request, allow_nan=False) for request in load["requests"])
        head = json.dumps({**load, "requests": []}, indent=2, allow_nan=False)
        text = head.replace('"requests": []', f'"requests": [\n    {requests}\n  ]')
        write_atomically(folder / "load_test.json", f"{text}\n".encode())
        script = (files("hybridsd_sim.reporting") / "load_test.py").read_bytes()
        write_atomically(folder / "load_test.py", script)
    provenance = json.dumps(_provenance(scenario, digest, extra), sort_keys=True, indent=2, allow_nan=False)
    write_atomically(folder / "provenance.json", f"{provenance}\n".encode())
    # not sorted: the order of classes, pools and runs counts
    saved = json.dumps({"format": FORMAT, **data}, separators=(",", ":"), allow_nan=False)
    write_atomically(folder / "capacity.json", saved.encode())
    for name, content in tables(data).items():
        write_atomically(folder / name, content)
    write_rows(folder / "requests.parquet", runs)


def _provenance(scenario: Scenario, digest: str | None, extra: str) -> dict[str, Any]:
    """What made the run: versions, digests, seed and the resolved scenario; no folder, host or date."""
    resolved = _without_folders(scenario.to_dict())
    return {
        "package": "hybridsd_sim",
        "version": __version__,
        "libraries": {name: installed(name) for name in LIBRARIES},
        "ran": extra,
        "run_id": run_id(scenario, digest, scenario.seed, __version__, extra),
        "seed": scenario.seed,
        "profiles_digest": digest,
        "scenario_digest": scenario.digest,
        "overrides_applied": resolved.pop("overrides_applied"),
        "scenario": resolved,
    }


def _without_folders(value: Any) -> Any:
    """The same data with every absolute path cut down to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return (
        re.sub(r"(?<![\w./:])(?:~|\.\.)?/(?:[^/\s'\"]+/)*([^/\s'\"]+)", r"\1", value)
        if isinstance(value, str)
        else value
    )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when all went well, and is gone when not."""
    folder = folder.resolve()
    strangers = sorted({path.name for path in folder.iterdir()} - {*SAVED, *DRAWN}) if folder.is_dir() else []
    if strangers or (folder.exists() and not folder.is_dir()):
        rule = f"holds {', '.join(strangers[:3])}, which no report wrote" if strangers else "is a file"
        raise InputError(Problem(str(folder), "folder of the report", rule, "Name a new folder, or empty this one."))
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
