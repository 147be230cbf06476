"""The chosen plan among others: what it saves, the frontier, plans of other kinds, and every plan that was simulated.

Reads the plain data of `contents` and writes blocks of `markup`. A section without anything to show is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.breakdown import weakest
from hybridsd_sim.report.choices import BENEATH
from hybridsd_sim.report.markup import Block, Bullets, Cell, Fold, Heading, Paragraph, Picture, Table, answered, cell
from hybridsd_sim.report.numbers import DASH, MINUS, Show, clip, listed, number, percent
from hybridsd_sim.report.tally import SIMULATED

Data = Mapping[str, Any]
EXPECTED = ("cloud only", "edge only", "static switch")
"""Baselines that a capacity plan is held against wherever they can serve every class."""
FEW = 12
"""Rows of a table that stands open; longer ones are opened by the reader."""
CHECK = (
    "To check the plan against a running service, give its address to the script beside this page: python load_test.py "
    "--url ADDRESS. It replays the scenario's own requests at their own times, and holds what it "
    "measures against every promise and against this simulation."
)
NOWHERE = "a queue grows without end"


def compared(data: Data) -> Iterator[Block]:
    """What the chosen plan saves against plans of other kinds, at which loss of quality, and their figures."""
    yield Heading("What it saves", "savings")
    if data["savings"]:
        yield Bullets(tuple(saving["said"] for saving in data["savings"]))
    own = own_figures(data)
    rows = [_policy_row(own, data, None), *(_policy_row(point, data, own) for point in data["baselines"])]
    head = (
        "Policy", "Feasible", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)",
        "Edge energy (J/image)", "The chosen plan saves",
    )  # fmt: skip
    caption = f"The chosen plan against others, each with its own best pools; {BENEATH}"
    yield Table(caption, head, tuple(rows), strong=frozenset({0}), words=frozenset({0, 1}))
    absent = [name for name in EXPECTED if not any(point["name"].startswith(name) for point in data["baselines"])]
    if absent:
        yield Paragraph(f"Not compared: {listed(absent)}. No legal plan of that kind serves every class.", "note")


def own_figures(data: Data) -> dict[str, Any]:
    """The chosen plan's figures in the shape of another plan's."""
    run, figures = data["runs"][0], data["runs"][0]["summary"][ALL]
    ends = ("value", "low", "high")
    return {
        "name": run["name"],
        "known_by": "simulation",
        "feasible": data["feasible"],
        "reason": run["verdict"][0]["reason"],
        "usd_per_hour": run["usd_per_hour"],
        "latency_p95_s": [figures["latency_p95_s"][end] for end in ends],
        "slo_attainment": [figures["slo_attainment"][end] for end in ends],
        "quality": figures["quality_mean"]["value"],
        "edge_energy_j_per_image": figures["edge_energy_j_per_image"]["value"],
        "replicas": run["replicas"],
    }


def _policy_row(point: Data, data: Data, chosen: Data | None) -> tuple[Cell, ...]:
    own = "chosen" if chosen is None else point["name"]
    figures: Data = next((run["summary"][ALL] for run in data["runs"] if run["name"] == own), {})

    def noted(key: str, show: Show, figure: str) -> Cell:
        said = {key: figures.get(figure, {}).get(key, "") for key in ("note", "kind")}
        return cell({"value": point[key], **said}, show)

    return (
        Cell(point["name"]),
        _answer(point),
        noted("usd_per_hour", number, "rent_usd_per_hour"),
        _interval(point["latency_p95_s"], number, figures.get("latency_p95_s")),
        _interval(point["slo_attainment"], percent, figures.get("slo_attainment")),
        noted("quality", clip, "quality_mean"),
        noted("edge_energy_j_per_image", number, "edge_energy_j_per_image"),
        Cell("") if chosen is None else _saving(chosen, point),
    )


def _answer(point: Data) -> Cell:
    """Whether a plan holds; the reason where it does not."""
    return answered(point["feasible"], "" if point["feasible"] else point["reason"])


def _interval(values: Sequence[float | None], show: Show, figure: Data | None = None) -> Cell:
    said = {"note": (figure or {}).get("note", ""), "kind": SIMULATED}
    return cell({"value": values[0], "low": values[1], "high": values[2], **said}, show)


def _saving(chosen: Data, other: Data) -> Cell:
    """Dollars saved in per cent, and the quality lost for them."""
    loss = _loss(chosen["quality"], other["quality"])
    if chosen["usd_per_hour"] is None or other["usd_per_hour"] is None:
        return Cell(DASH, "no price")
    if not other["usd_per_hour"]:
        return Cell(DASH, f"it rents nothing\n{loss}")
    saved = 1.0 - chosen["usd_per_hour"] / other["usd_per_hour"]
    return Cell(f"{100 * saved:.1f} %".replace("-", MINUS), loss)


def _loss(chosen: float | None, other: float | None) -> str:
    if chosen is None or other is None:
        return "loss of quality not known"
    change = chosen - other
    return "same quality" if abs(change) < 5e-5 else f"quality {MINUS if change < 0 else '+'}{abs(change):.4f}"


def frontier(data: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """Plans that no other beats in cost, latency and quality, as figure and table, and near plans of other kinds."""
    drawn = [picture for picture in pictures if picture.name == "frontier"]
    if not data["frontier"] and not data["alternatives"]:
        return
    yield Heading("Frontier and alternatives", "frontier")
    if data["frontier"]:
        yield from drawn
        yield folded(_frontier(data), f"The frontier: {len(data['frontier'])} plans")
    if data["alternatives"]:
        yield _nearly_as_good(data)


def _frontier(data: Data) -> Table:
    points = sorted(
        data["frontier"], key=lambda point: (point["usd_per_hour"] or 0.0, point["latency_p95_s"][0] or 0.0)
    )
    rows = tuple((*figures(point, data), Cell(point["known_by"])) for point in points)
    head = ("Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)", "Known by")
    caption = (
        "Plans that no other beats in rent, p95 latency and quality together, the cheapest first; beneath a figure "
    )
    return Table(f"{caption}its 95% interval where it was simulated", head, rows, words=frozenset({0, 5}))


def _nearly_as_good(data: Data) -> Table:
    rows = []
    for point in data["alternatives"]:
        plans = "; ".join(f"{name}: {label}" for name, label in point["labels"].items())
        known = Cell(point["known_by"])
        rows.append((Cell(point["name"]), *figures(point, data), known, Cell(plans)))
    head = (
        "Other kind of plan", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)", "Known by",
        "Plans",
    )  # fmt: skip
    caption = "Nearly as cheap, and of another kind"
    return Table(caption, head, tuple(rows), words=frozenset({0, 1, 6, 7}))


def figures(point: Data, data: Data) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    """Nodes, rent, p95 latency, share inside SLO and quality of a plan."""
    quality = cell({"value": point["quality"], "kind": SIMULATED}, clip)
    share = _interval(point["slo_attainment"], percent)
    return _nodes(point), _rent(point, data), _p95(point), share, quality


def _p95(point: Data) -> Cell:
    unknown = {} if point["feasible"] else {"note": NOWHERE}
    return _interval(point["latency_p95_s"], number, unknown)


def _rent(point: Data, data: Data) -> Cell:
    """What a plan's nodes cost an hour: as well known as the worst known of their prices."""
    kinds = [rate["kind"] for rate in data["rates"] if point["replicas"].get(rate["where"])]
    return cell({"value": point["usd_per_hour"], "kind": weakest(kinds)})


def _nodes(point: Data) -> Cell:
    return Cell(", ".join(f"{count} × {pool}" for pool, count in point["replicas"].items() if count) or "none")


def evidence(data: Data) -> Iterator[Block]:
    """Every capacity plan that the search tried, in its order."""
    if not data["evidence"]:
        return
    yield Heading("Evidence", "evidence")
    holding = sum(point["feasible"] for point in data["evidence"])
    yield Paragraph(f"{data['evidence_said']} {holding} of them held every promise.")
    yield folded(_tried(data), f"All {len(data['evidence'])} in the order of the search")
    yield Paragraph(CHECK, "note")


def _tried(data: Data) -> Table:
    rows = []
    for point in data["evidence"]:
        nodes, rent, p95, share, quality = figures(point, data)
        known, answer = Cell(point["known_by"]), answered(point["feasible"], point["reason"])
        rows.append((Cell(point["name"]), nodes, rent, p95, share, quality, known, answer))
    head = (
        "Name", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)", "Known by", "Feasible",
    )  # fmt: skip
    return Table(f"In the order of the search; {BENEATH}", head, tuple(rows), words=frozenset({0, 1, 6, 7}))


def folded(table: Table, summary: str) -> Block:
    """A table; a long one is for the reader to open."""
    return table if len(table.rows) <= FEW else Fold(summary, (table,))
