"""The chosen plan when something changes: limits, traffic, speeds, networks, and what nobody knows exactly.

Reads the plain data of `contents` and writes blocks of `markup`. A section without anything to show is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.report.choices import BENEATH
from hybridsd_sim.report.markup import Block, Bullets, Cell, Heading, Paragraph, Table, answered
from hybridsd_sim.report.numbers import listed, percent
from hybridsd_sim.report.other_plans import figures, folded, own_figures

Data = Mapping[str, Any]


def conflict(data: Data) -> Iterator[Block]:
    """Which constraints cannot be met together, and the least change of each alone that would do."""
    if data["conflict"]:
        yield Heading("What cannot hold together", "conflict")
        yield Paragraph(data["conflict_said"], "lead")
        yield Bullets(tuple(each["said"] for each in data["conflict"]))


def margins(data: Data) -> Iterator[Block]:
    """What a little more of each limit, or of the traffic, buys or costs."""
    if data["margins"]:
        yield Heading("What a change would buy", "margins")
        yield Bullets(tuple(margin["said"] for margin in data["margins"]))


def other_conditions(data: Data) -> Iterator[Block]:
    """The plan under other traffic, speeds and networks, under other scenarios, and its confidence."""
    if data["sensitivity"]:
        yield Heading("Under other conditions", "sensitivity")
        yield Paragraph(_held(data["sensitivity"], "conditions"))
        yield _varied(data["sensitivity"], data, "Condition", "The same plan, without any change to it")
    if data["robust"]:
        yield Heading("Named scenarios", "robust")
        yield Paragraph(_held(data["robust"], "scenarios"))
        yield _varied(data["robust"], data, "Scenario", "The plan in each scenario")
    if data["confidence"]:
        yield Heading("Confidence", "confidence")
        yield from _confidence(data["confidence"])


def _held(variations: Sequence[Data], what: str) -> str:
    """How many conditions the plan holds under, and the names of the others."""
    broken = [each["name"] for each in variations if not each["feasible"]]
    if not broken:
        return f"The plan holds in all {len(variations)} {what}."
    return f"The plan holds in {len(variations) - len(broken)} of {len(variations)} {what}, not in: {listed(broken)}."


def _varied(variations: Sequence[Data], data: Data, what: str, caption: str) -> Block:
    """What became of the plan under each condition; the first row is the plan under its own."""
    own = {**own_figures(data), "name": "as planned"}
    rows = []
    for each in (own, *variations):
        _, rent, p95, share, quality = figures(each, data)
        holds = answered(each["feasible"], "" if each["feasible"] else each["reason"])
        rows.append((Cell(each["name"]), holds, share, p95, rent, quality, Cell(each["known_by"])))
    head = (what, "Holds", "Inside SLO", "p95 latency (s)", "Rent (US$/h)", "Quality (CLIP)", "Known by")
    table = Table(f"{caption}; {BENEATH}", head, tuple(rows), strong=frozenset({0}), words=frozenset({0, 1, 6}))
    return folded(table, f"All {len(variations)}")


def _confidence(found: Data) -> Iterator[Block]:
    yield Paragraph(found["said"])
    if len(found["by_class"]) > 1:
        rows = tuple((Cell(name), Cell(percent(share), mark="modelled")) for name, share in found["by_class"].items())
        caption = f"Share of the {found['draws']:,} draws in which a class keeps its own promises"
        yield Table(caption, ("Request class", "Probability"), rows)
