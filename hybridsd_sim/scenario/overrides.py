"""Base, overrides, scenarios: which changes apply, in which order, and what they change. On plain data only.

An override is a block of changes, nested or by dotted key; a scenario is a list of overrides or of other scenarios.
Mappings merge, everything else is replaced, and null for a request class, an edge fleet or a pool removes it. Two
overrides of one scenario may not set the same key, so that their order never matters. A key that leads through a
request class, fleet or pool which nobody defines is a misspelling, not a new one. (After Calliope's scenario grammar.)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from pydantic import Field

from hybridsd_sim.errors import shown, unknown_name
from hybridsd_sim.scenario.yaml_source import Entries, Name, Reading, Written

Key = tuple[str, ...]

Change = tuple[Key, Any, str]

MAIN_KEYS = {"requests": "model", "edge": "device", "pools": "gpu"}
"""Blocks whose entries users name, with the key by which an override defines a new entry."""

ABSENT = object()


class Blocks(Written):
    """The two blocks of a scenario's file that resolve into the rest."""

    overrides: Entries[Mapping[str, Any]] = Field(default_factory=dict)
    """Named blocks of changes to the base, nested or by dotted key."""
    scenarios: Entries[tuple[Name, ...]] = Field(default_factory=dict)
    """Named lists of overrides, or of other scenarios."""


def check_blocks(reading: Reading, blocks: Blocks, chosen: str | None) -> list[str]:
    """Check every scenario of the file; the overrides of the chosen one, in order."""
    for name in blocks.scenarios:
        if name in blocks.overrides:
            rule, remedy = "may not also name an override", "Rename one; an override can be chosen like a scenario."
            reading.flag(f"scenarios.{name}", shown(name), rule, remedy)
        _flag_conflicts(reading, blocks, _unfold(reading, blocks, name, ()), f"scenarios.{name}")
    for name in blocks.overrides:
        _flag_conflicts(reading, blocks, [name], f"overrides.{name}")
    if chosen is None:
        return []
    if chosen not in {*blocks.overrides, *blocks.scenarios}:
        remedy = unknown_name("", chosen, [*blocks.scenarios, *blocks.overrides]).remedy
        reading.flag("scenarios", shown(chosen), "no such scenario or override in this file", remedy)
        return []
    return _unfold(reading, blocks, chosen, ())


def _unfold(reading: Reading, blocks: Blocks, name: str, above: Key) -> list[str]:
    """The overrides that a name stands for, each once, in order."""
    if name in blocks.overrides and (above or name not in blocks.scenarios):
        return [name]
    place = f"scenarios.{above[-1]}" if above else "scenarios"
    if name in above:
        path = " -> ".join([*above[above.index(name) :], name])
        reading.flag(place, path, "a scenario may not contain itself", "Remove one of the names.")
        return []
    if name not in blocks.scenarios:
        remedy = unknown_name("", name, [*blocks.overrides, *blocks.scenarios]).remedy
        reading.flag(place, shown(name), "no such override or scenario in this file", remedy)
        return []
    inner = [_unfold(reading, blocks, member, (*above, name)) for member in blocks.scenarios[name]]
    return list(dict.fromkeys(override for names in inner for override in names))


def _flag_conflicts(reading: Reading, blocks: Blocks, names: list[str], place: str) -> None:
    setters: dict[Key, str] = {}
    for name in names:
        for key, _, _ in changes(blocks.overrides[name], ""):
            for other, setter in setters.items():
                shorter = min(len(key), len(other))
                if key[:shorter] == other[:shorter]:
                    who = f"{name} twice" if name == setter else f"{setter} and {name}"
                    rule = "the overrides of one scenario may not set the same key"
                    reading.flag(place, f"{'.'.join(key)} set by {who}", rule, "Keep one of them.")
            setters[key] = name


def changes(block: Mapping[str, Any], place: str, above: Key = ()) -> Iterator[Change]:
    """Every key that a block sets, nested or dotted: (key, value, dotted path where it is written)."""
    for name, value in block.items():
        key, where = (*above, *name.split(".")), f"{place}.{name}" if place else name
        if isinstance(value, Mapping) and value:
            yield from changes(value, where, key)
        else:
            yield key, value, where


def entries(base: Mapping[str, Any], blocks: Collection[Mapping[str, Any]]) -> set[Key]:
    """Request classes, edge fleets and pools that the base has or a block defines, as ("pools", "name")."""
    known = {(kind, name) for kind in MAIN_KEYS if isinstance(base.get(kind), Mapping) for name in base[kind]}
    new = (key for block in blocks for key, _, _ in changes(block, ""))
    return known | {key[:2] for key in new if len(key) >= 3 and MAIN_KEYS.get(key[0]) == key[2]}


def flag_alone(
    reading: Reading,
    model: type[Written],
    base: Mapping[str, Any],
    *,
    name: str,
    block: Mapping[str, Any],
    known: set[Key],
) -> None:
    """Check an override that is not chosen, alone on the base. Only complaints about its own values count."""
    trial = replace(reading, lines=dict(reading.lines), problems=[])
    data = deepcopy(dict(base))
    apply_changes(trial, data, block, f"overrides.{name}", known=known)
    for kind, entry in known - entries(base, [block]):
        data.get(kind, {}).pop(entry, None)  # another override defines it
    trial.check(model, data, rules=False)
    own = {line for path, line in reading.lines.items() if path.startswith(f"overrides.{name}.")}
    reading.problems += [noted for noted in trial.problems if noted[0] in own and noted not in reading.problems]


def apply_changes(
    reading: Reading,
    data: dict[str, Any],
    block: Mapping[str, Any],
    place: str,
    *,
    known: set[Key],
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make the changes of a block that stands at `place`; the log of what changed, as `key: old -> new`.

    A block that came with the call stands at `reading.call`, which is no path of the file.
    `known` are the entries that a key may lead through; `defaults` give the old value of what the base leaves out.
    """
    log = []
    for key, value, where in changes(block, place):
        if key[0] in MAIN_KEYS and len(key) > 1 and key[:2] not in known:
            remedy = unknown_name("", key[1], sorted(entry for kind, entry in known if kind == key[0])).remedy
            line = reading.lines.get(where, 0)
            path = where if line else ".".join(key)
            reading.flag(path, shown(value), f"{key[0]} has no {shown(key[1])}", remedy, line)
            continue
        old = _get(data, key, _get(defaults or {}, key, ABSENT))
        _note_lines(reading, data, key, where)
        target = data
        for part in key[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        if value is None and len(key) == 2 and key[0] in MAIN_KEYS:
            target.pop(key[1], None)
        else:
            target[key[-1]] = value
        if old != value:
            log.append(f"{'.'.join(key)}: {'not set' if old is ABSENT else _bare(old)} -> {_bare(value)}")
    return log


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _get(data: Any, key: Key, default: Any) -> Any:
    for part in key:
        if not isinstance(data, Mapping) or part not in data:
            return default
        data = data[part]
    return data


def _note_lines(reading: Reading, data: Mapping[str, Any], key: Key, where: str) -> None:
    """Let problems of a changed value name the line of the override, or the call."""
    target, line = ".".join(key), reading.lines.get(where, 0)
    inside = {path.removeprefix(where): at for path, at in reading.lines.items() if path.startswith(f"{where}[")}
    for path in [path for path in reading.lines if path.startswith((f"{target}.", f"{target}["))]:
        del reading.lines[path]
    reading.lines |= {target: line, **{f"{target}{rest}": at for rest, at in inside.items()}}
    for end in range(1, len(key)):
        if not isinstance(_get(data, key[:end], None), Mapping):
            reading.lines[".".join(key[:end])] = line
