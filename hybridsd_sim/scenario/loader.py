"""Reads a scenario's file and resolves it: base, overrides and call become one `Scenario`.

A file holds a base, `overrides` (named blocks that set anything, nested or by dotted key) and `scenarios` (names for
lists of overrides or of other scenarios). Precedence: call > override > base; the module `overrides` merges them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from hybridsd_sim.errors import InputError, Problem, shown
from hybridsd_sim.files import data_folder
from hybridsd_sim.scenario.overrides import Blocks, apply_changes, check_blocks, entries, flag_alone
from hybridsd_sim.scenario.schema import Scenario, class_problems
from hybridsd_sim.scenario.yaml_source import Reading, load_yaml, plain, read_value


def load_scenario(
    path: str | Path, *, scenario: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Scenario:
    """Read a scenario from a file, or a shipped one by its bare name, and resolve it.

    `scenario` names one of the file's scenarios or overrides. `overrides` are `{"dotted.key": value}` and outrank the
    file; their text is read as YAML, so that what a command line passes (`"1e-3"`, `"[1, 2]"`) means what it means in a
    file. Paths in the file are relative to it, those in `overrides` to the working directory. Raises `InputError` with
    all problems at once.

    >>> from hybridsd_sim import load_scenario
    >>> busy = load_scenario("quickstart", scenario="busy-on-lte", overrides={"horizon_s": "1e3"})
    >>> busy.horizon_s, busy.edge["phones"].network
    (1000.0, 'lte')
    """
    file = _find(path)
    reading = Reading(str(file), call="--set")
    data = reading.read(_read_text(file))
    if not isinstance(data, dict):
        reading.flag("", shown(data), "must be a mapping of keys", "See scenarios/quickstart.yaml.")
        return reading.finish(None)
    given = {key: data.pop(key) for key in ("overrides", "scenarios") if key in data}
    blocks = reading.check(Blocks, given) or Blocks()
    values = {key: read_value(value, f"--set {key}") for key, value in (overrides or {}).items()}
    call = json.loads(json.dumps(values, default=plain))
    return _resolve(reading, data, blocks, chosen=scenario, folder=file.absolute().parent, call=call)


def named_blocks(path: str | Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a file's scenarios, and those of its overrides: what `load_scenario` takes as `scenario`."""
    data = load_yaml(_read_text(file := _find(path)), str(file))
    return tuple(data.get("scenarios") or ()), tuple(data.get("overrides") or ())


def _resolve(
    reading: Reading, base: dict[str, Any], blocks: Blocks, *, chosen: str | None, folder: Path, call: Mapping[str, Any]
) -> Scenario:
    """The base with the overrides of the chosen scenario and of the call, checked. Raises `InputError`."""
    names = check_blocks(reading, blocks, chosen)
    known = entries(base, [*blocks.overrides.values(), call])
    for name, block in blocks.overrides.items():
        if name not in names:
            flag_alone(reading, Scenario, base, name=name, block=block, known=known)
    whole = Reading("").check(Scenario, base)  # for the log: None if the base needs an override to be valid
    data, defaults = deepcopy(base), whole.to_dict() if whole else {}
    log: list[str] = []
    for name in names:
        log += apply_changes(reading, data, blocks.overrides[name], f"overrides.{name}", known=known, defaults=defaults)
    _resolve_paths(data, folder)
    log += apply_changes(reading, data, call, reading.call, known=known, defaults=defaults)
    if log:
        before = data.get("overrides_applied")
        data["overrides_applied"] = [*(before if isinstance(before, list) else ()), *log]
    result = reading.check(Scenario, data)
    requests, fleets = data.get("requests"), data.get("edge")
    if result is None and isinstance(requests, Mapping) and isinstance(fleets, Mapping):
        # Something else is wrong: names and origins of classes are checked all the same, so that all problems show.
        origins = {name: spec.get("origin") for name, spec in requests.items() if isinstance(spec, Mapping)}
        for key, value, rule, remedy in class_problems(origins, fleets):
            reading.flag(key, shown(value), rule, remedy)
    return reading.finish(result)


def _find(path: str | Path) -> Path:
    """The file itself, or the shipped scenario of that bare name."""
    file = Path(path)
    if file.is_file() or file.name != str(path):
        return file
    shipped = data_folder("scenarios") / f"{path}.yaml"
    return shipped if shipped.is_file() else file


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problem = Problem(str(file), "not text", "a scenario is UTF-8 text", "Save the file as UTF-8.")
    except OSError as error:
        shipped = sorted(other.stem for other in data_folder("scenarios").glob("*.yaml"))
        remedy = f"Shipped scenarios: {', '.join(shipped)}."
        problem = Problem(str(file), error.strerror or "unreadable", "must be a file that can be read", remedy)
    raise InputError(problem)


def _resolve_paths(data: Mapping[str, Any], folder: Path) -> None:
    """Make the paths that the file names absolute."""
    requests = data.get("requests")
    for spec in requests.values() if isinstance(requests, Mapping) else ():
        arrivals = spec.get("arrivals") if isinstance(spec, Mapping) else None
        if isinstance(arrivals, dict) and isinstance(arrivals.get("path"), str):
            arrivals["path"] = str((folder / arrivals["path"]).resolve())
    search = data.get("search")
    if isinstance(search, dict) and isinstance(search.get("profiles"), list):
        search["profiles"] = [str((folder / str(given)).resolve()) for given in search["profiles"]]
