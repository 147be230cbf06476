"""Two saved runs side by side: verdicts, what was asked differently, every figure with its change, and both curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.choices import sentence
from hybridsd_sim.report.glossary import NAMES
from hybridsd_sim.report.markup import Block, Cell, Heading, Paragraph, Picture, Table, cell
from hybridsd_sim.report.numbers import DASH, MINUS, number
from hybridsd_sim.report.pages import cards, shown, words

Data = Mapping[str, Any]
SIDES = ("A", "B")
SAME = 5e-4
"""Figures this close, relatively, are called the same: the tables show three digits."""


def side_by_side(first: Data, second: Data) -> dict[str, Any]:
    """Data for the figures: every run of both reports under one scenario, the runs named by their side."""
    sides = zip(SIDES, (first, second), strict=True)
    runs = [{**run, "name": f"{side}: {run['name']}"} for side, data in sides for run in _shown(data)]
    classes = {**second["scenario"]["classes"], **first["scenario"]["classes"]}
    return {"kind": "comparison", "scenario": {**first["scenario"], "classes": classes}, "runs": runs}


def _shown(data: Data) -> Sequence[Data]:
    """The chosen plan of a capacity plan; every policy of a simulation."""
    runs: Sequence[Data] = data["runs"]
    return runs[:1] if data["kind"] == "plan" else runs


def compare_page(first: tuple[Data, Data], second: tuple[Data, Data], pictures: Sequence[Picture]) -> Iterator[Block]:
    """The comparison of two runs, each given as (data, provenance)."""
    yield Heading("Two runs side by side", "top", 1)
    for side, (data, provenance) in zip(SIDES, (first, second), strict=True):
        yield Paragraph(f"{side} is {provenance['run_id']}: {data['scenario']['name']}, {_ran(data)}.", "note")
    yield Heading("Verdicts", "verdict")
    for side, (data, _) in zip(SIDES, (first, second), strict=True):
        for run in _shown(data):
            yield Heading(f"{side}: {run['name']}", f"verdict-{side}-{run['name'].replace(' ', '-')}", 3)
            yield cards(run)
        if data["kind"] == "plan":
            yield Paragraph(sentence(data))
    yield Heading("What differs in the question", "question")
    yield _asked(first[1], second[1])
    yield Heading("Figures side by side", "compared")
    yield from _tables(first[0], second[0])
    yield Heading("Figures", "figures")
    yield from pictures
    yield from words()


def _ran(data: Data) -> str:
    return "capacity plan" if data["kind"] == "plan" else f"{len(data['runs'])} policies simulated"


def _asked(first: Data, second: Data) -> Block:
    ours, theirs = ({**dict(_leaves(p["scenario"])), **_made_by(p)} for p in (first, second))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    if not keys:
        return Paragraph("Nothing: scenario, profiles and version are the same.", "note")
    rows = tuple((Cell(key), Cell(_shown_value(ours, key)), Cell(_shown_value(theirs, key))) for key in keys)
    caption = "Keys of the resolved scenario, and what made the runs"
    return Table(caption, ("Key", *SIDES), rows, words=frozenset({0, 1, 2}))


def _made_by(provenance: Data) -> dict[str, Any]:
    return {key: provenance[key] for key in ("version", "ran", "profiles_digest")}


def _shown_value(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "absent"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _tables(first: Data, second: Data) -> Iterator[Block]:
    """A table for each run and class that both have."""
    by_name = {run["name"]: run for run in _shown(second)}
    pairs = [(run, by_name[run["name"]]) for run in _shown(first) if run["name"] in by_name]
    if not pairs:
        yield Paragraph("The two reports have no policy in common.", "note")
    for ours, theirs in pairs:
        classes = [name for name in ours["summary"] if name in theirs["summary"]]
        for name in classes if len(classes) > 2 else [ALL]:
            yield _table(f"{ours['name']}, {name}", ours["summary"][name], theirs["summary"][name])


def _table(title: str, ours: Data, theirs: Data) -> Table:
    rows = []
    for key in [key for key in ours if ours[key]["value"] is not None or theirs[key]["value"] is not None]:
        sides = (cell(figures[key], shown(key)) for figures in (ours, theirs))
        rows.append((Cell(NAMES.get(key, key)), *sides, _change(ours[key], theirs[key]), Cell(ours[key]["unit"])))
    head = ("Figure", *SIDES, "B against A", "Unit")
    return Table(f"{title}; beneath a figure its 95% interval", head, tuple(rows), words=frozenset({0, 4}))


def _change(ours: Data, theirs: Data) -> Cell:
    """B against A, and whether the intervals are apart: if they overlap, chance may explain the change."""
    before, after = ours["value"], theirs["value"]
    if before is None or after is None:
        return Cell(DASH, "one side is not known")
    if abs(after - before) <= SAME * max(abs(before), abs(after)):
        return Cell("same")
    change = _ratio(after / before) if before else f"from 0 to {number(after)}"
    known = [end for figure in (ours, theirs) for end in (figure["low"], figure["high"])]
    if None in known:
        return Cell(change, "no interval")
    apart = theirs["low"] > ours["high"] or theirs["high"] < ours["low"]
    return Cell(change, "beyond chance" if apart else "within chance")


def _ratio(ratio: float) -> str:
    return f"× {number(ratio)}" if ratio >= 10 else f"{100 * (ratio - 1):+.1f} %".replace("-", MINUS)
