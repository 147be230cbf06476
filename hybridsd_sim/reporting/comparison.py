"""Two things side by side: two saved runs of a scenario, and live runs beside their replays in simulation.

`compare_page` tells verdicts, what was asked differently, every figure with its change, and both curves.
`write_agreement` writes the page of a validation, figure by figure and curve over curve: plain data in, a page out;
what was run and how it was compared is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridsd_sim.estimate import DASH, MINUS, exact, interval, number, percent, signed
from hybridsd_sim.reporting import figure_style as draw_with
from hybridsd_sim.reporting.blocks import (
    Block,
    Bullets,
    Cell,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
    Terms,
    answered,
    cell,
)
from hybridsd_sim.reporting.figure_style import INK, LINES, PROMISE
from hybridsd_sim.reporting.labels import NAMES, Data
from hybridsd_sim.reporting.pages import cards, shown, words
from hybridsd_sim.reporting.plan_sections import sentence
from hybridsd_sim.reporting.rendering import write_pages
from hybridsd_sim.scenario import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDES = ("A", "B")

SAME = 5e-4
"""Figures this close, relatively, are called the same: the tables show three digits."""

MEASURED = ("measured", "modelled")

SHARES = frozenset({"utilisation", "slo_attainment"})
"""Figures that are shares of 1: they differ by points of a per cent, all others by per cent of the live figure."""

MADE_BY = ("version", "ran", "profiles_digest")
"""What made a run, beside its scenario."""

HOW = (
    "Runs are made in short parts, because machines seldom keep their pace for long. Cost rows were measured on "
    "the workers themselves in a rehearsal, and brought to the pace that they had just before each part; they are "
    "not fitted to it. A part after which workers have another pace than before it is void. The simulation plays "
    "the live arrivals again, over the same links. Intervals: moving "
    "block bootstrap over requests, live and simulated drawn together, in blocks of {blocks} requests. Load "
    "driver: {drivers}. Utilisation and SLO attainment differ in points of a per cent; throughput is one figure a "
    "run and has no interval."
)

_OWN_NAMES = {"utilisation": "Busiest worker's utilisation", "held_mean_s": "Mean time held by it (s)"}

_WORDS = {True: "as near as asked", False: "not as near as asked", None: "nothing is asked at this load"}

_ASKED = ("latency_p50_s", "latency_mean_s", "latency_p95_s", "served_per_s")


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
        ran = "capacity plan" if data["kind"] == "plan" else f"{len(data['runs'])} policies simulated"
        yield Paragraph(f"{side} is {provenance['run_id']}: {data['scenario']['name']}, {ran}.", "note")
    yield Heading("Verdicts", "verdict")
    for side, (data, _) in zip(SIDES, (first, second), strict=True):
        for run in _shown(data):
            yield Heading(f"{side}: {run['name']}", f"verdict-{side}-{run['name'].replace(' ', '-')}", 3)
            yield cards(run)
        if data["kind"] == "plan":
            yield Paragraph(sentence(data))
    yield Heading("What differs in the question", "question")
    ours, theirs = (
        {**dict(_leaves(provenance["scenario"])), **{key: provenance[key] for key in MADE_BY}}
        for _, provenance in (first, second)
    )
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    if keys:
        rows = tuple((Cell(key), *(Cell(str(values.get(key, "absent"))) for values in (ours, theirs))) for key in keys)
        caption = "Keys of the resolved scenario, and what made the runs"
        yield Table(caption, ("Key", *SIDES), rows, words=frozenset({0, 1, 2}))
    else:
        yield Paragraph("Nothing: scenario, profiles and version are the same.", "note")
    yield Heading("Figures side by side", "compared")
    yield from _tables(first[0], second[0])
    yield Heading("Figures", "figures")
    yield from pictures
    yield from words()


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
    head = ("Figure", *SIDES, "B against A", "Unit")
    for both in pairs:
        classes = [name for name in both[0]["summary"] if name in both[1]["summary"]]
        for name in classes if len(classes) > 2 else [ALL]:
            rows = []
            for key, ours in both[0]["summary"][name].items():
                theirs = both[1]["summary"][name][key]
                if ours["value"] is not None or theirs["value"] is not None:
                    sides = (cell(figure, shown(key)) for figure in (ours, theirs))
                    rows.append((Cell(NAMES.get(key, key)), *sides, _change(ours, theirs), Cell(ours["unit"])))
            title = f"{both[0]['name']}, {name}; beneath a figure its 95% interval"
            yield Table(title, head, tuple(rows), words=frozenset({0, 4}))


def _change(ours: Data, theirs: Data) -> Cell:
    """B against A, and whether the intervals are apart: if they overlap, chance may explain the change."""
    before, after = ours["value"], theirs["value"]
    if before is None or after is None:
        return Cell(DASH, "one side is not known")
    if abs(after - before) <= SAME * max(abs(before), abs(after)):
        return Cell("same")
    if not before:
        change = f"from 0 to {number(after)}"
    else:
        ratio = after / before
        change = f"× {number(ratio)}" if ratio >= 10 else signed(ratio - 1.0, percent)
    known = [end for figure in (ours, theirs) for end in (figure["low"], figure["high"])]
    if None in known:
        return Cell(change, "no interval")
    apart = theirs["low"] > ours["high"] or theirs["high"] < ours["low"]
    return Cell(change, "beyond chance" if apart else "within chance")


def write_agreement(data: Data, folder: Path) -> Path:
    """Write `index.html`, `report.md` and the figures into a folder; returns the page.

    `data["runs"]` has for each run its `name`, `kind`, `load`, `driver`, `requests`, `block`, `holds`, `drift_limit`,
    `plan`, `slo_s`, the `figures` of the comparison, both sorted latencies in seconds under `live` and `simulated`, the
    `rows` measured before its first sound part, and its `parts`: `part` (the number), `requests`, `drift`, `void`, the
    `steps` of each device (seconds before, during, after), `stack_s` (what the machine adds to the network, or to
    asking), `late_s` (the latest request). `data["lost"]` are names of runs without a sound part, `data["made_by"]`
    terms for the provenance.
    """
    runs = data["runs"]
    pictures = list(_pictures(runs))
    blocks: list[Block] = [
        Heading("Simulated against live", "top", 1),
        Heading("Verdict", "verdict"),
        Paragraph(_verdict(runs, data["lost"]), "lead"),
    ]
    if runs:
        sizes = [run["block"] for run in runs]
        drivers = " and ".join(dict.fromkeys(run["driver"] for run in runs))
        blocks += [
            _overview(runs),
            Paragraph(HOW.format(blocks=f"{min(sizes)} to {max(sizes)}", drivers=drivers), "note"),
            Heading("Latency, curve over curve", "figures"),
            *pictures,
            Heading("Every figure", "details"),
            *(Fold(f"{_called(run)}: {_WORDS[run['holds']]}", _details(run)) for run in runs),
        ]
    blocks += [Heading("Provenance", "provenance"), Terms(tuple(data["made_by"]))]
    return write_pages(Path(folder), "Simulated against live", blocks, pictures)


# ---- Page -----------------------------------------------------------------------------------------------------------


def _verdict(runs: Sequence[Data], lost: Sequence[str]) -> str:
    """In how many runs the simulation is near enough, and what was left out."""
    asked = [run for run in runs if run["holds"] is not None]
    near = sum(run["holds"] for run in asked)
    requests = sum(run["requests"] for run in runs)
    parts = [part for run in runs for part in run["parts"]]
    void = sum(part["void"] for part in parts)
    text = f"The simulation is as near as is asked in {near} of {len(asked)} runs, of {requests:,} live requests."
    drifted = f" {void} of {len(parts)} parts of them are void, and left out: their steps drifted." if void else ""
    nothing = f" Nothing is told of {', '.join(lost)}: all that was run is void." if lost else ""
    return f"{text}{drifted}{nothing}"


def _overview(runs: Sequence[Data]) -> Table:
    head = ("Run", "Requests", *(NAMES[name] for name in _ASKED), "Largest drift", "Near enough")
    rows = tuple(
        (
            Cell(_called(run)),
            Cell(
                number(run["requests"]),
                "in one part" if len(_sound(run)) == 1 else f"in {number(len(_sound(run)))} parts",
            ),
            *(_off(_figure(run, name)) for name in _ASKED),
            Cell(percent(max(part["drift"] for part in _sound(run)))),
            Cell(DASH) if run["holds"] is None else answered(run["holds"]),
        )
        for run in runs
    )
    return Table("Simulated against live, in per cent of the live figure; beneath, its 95% interval", head, rows)


def _sound(run: Data) -> list[Data]:
    return [part for part in run["parts"] if not part["void"]]


def _details(run: Data) -> tuple[Block, ...]:
    """Every figure of a run live and simulated, its parts, and the costs measured before them."""
    facts = (
        f"Plan: {run['plan']}. Promise in the first sound part: {number(run['slo_s'])} s.",
        f"A part is void whose median step is by more than {percent(run['drift_limit'])} another after it than before.",
        "Steps before and after a part are those of workers that do one task after the other, no requests about.",
        "What the machine adds to the network, or to asking where none is crossed, was measured in the rehearsal.",
    )
    head = ("Figure", "Live", "Simulated", "Simulated against live", "Asked", "Near enough")
    figures = tuple(
        (
            Cell(_OWN_NAMES.get(figure["name"]) or NAMES[figure["name"]]),
            Cell(_written(figure, figure["live"])),
            Cell(_written(figure, figure["simulated"])),
            _off(figure),
            Cell(DASH if figure["limit"] is None else f"±{percent(figure['limit'])}"),
            Cell(DASH) if figure["limit"] is None else answered(figure["holds"]),
        )
        for figure in run["figures"]
    )
    devices = list(run["parts"][0]["steps"])
    steps = (f"Median step of {device}: before, during, after (ms)" for device in devices)
    parts_head = ("Part", "Requests", *steps, "Drift", "Latest request (ms)", "Added by the machine (ms)")
    parts = tuple(
        (
            Cell(number(part["part"])), Cell(number(part["requests"])),
            *(Cell(_milliseconds(*part["steps"][device])) for device in devices),
            Cell(percent(part["drift"]), "void" if part["void"] else ""),
            Cell(_milliseconds(part["late_s"])), Cell(_milliseconds(part["stack_s"])),
        )
        for part in run["parts"]
    )  # fmt: skip
    costs_head = ("Part", "Model", "Device", "Median (s)", "p05 to p95 (s)", "Samples")
    costs = tuple(
        (
            Cell(row["component"]), Cell(row["model"]), Cell(row["device"]), Cell(number(row["seconds_median"])),
            Cell(interval(row["seconds_p05"], row["seconds_p95"])), Cell(number(row["num_samples"])),
        )
        for row in run["rows"]
    )  # fmt: skip
    return (
        Bullets(facts),
        Table("Live and simulated", head, figures),
        Table("Parts of the run", parts_head, parts),
        Table("Costs known before the first sound part", costs_head, costs, words=frozenset({0, 1, 2})),
    )


def _milliseconds(*seconds: float) -> str:
    return ", ".join(number(1000 * second) for second in seconds)


def _called(run: Data) -> str:
    return f"{run['kind']} at load {exact(run['load'])}"


def _figure(run: Data, name: str) -> Data:
    found: Data = next(figure for figure in run["figures"] if figure["name"] == name)
    return found


def _written(figure: Data, value: float) -> str:
    return percent(value) if figure["name"] in SHARES else number(value)


def _off(figure: Data) -> Cell:
    """How far the simulation is off, with the interval beneath."""
    if figure["off"] is None:
        return Cell(DASH, "nothing live to compare with")
    unit = " points" if figure["name"] in SHARES else "%"
    ends = [figure[end] for end in ("low", "high")]
    beneath = "" if None in ends else " to ".join(_signed(end) for end in ends)
    return Cell(f"{_signed(figure['off'])}{unit}", beneath)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


# ---- Figures --------------------------------------------------------------------------------------------------------


def _pictures(runs: Sequence[Data]) -> Iterator[Picture]:
    """One figure for each kind, with a panel for each load."""
    for kind in dict.fromkeys(run["kind"] for run in runs):
        mine = [run for run in runs if run["kind"] == kind]
        title = f"Latency of {kind} serving"
        with draw_with.styled():
            figure = draw_with.canvas(3.0)
            panels = figure.subplots(1, len(mine), sharey=True, squeeze=False)[0]
            for axes, run in zip(panels, mine, strict=True):
                _draw_curves(axes, run)
            panels[0].set_ylabel("share of requests")
            panels[0].yaxis.set_major_formatter(draw_with.per_cent)
            draw_with.legend(figure, panels[0])
            svg = draw_with.to_svg(f"latency-{kind}", title, figure)
        alt = []
        for run in mine:
            median, tail = (_figure(run, name) for name in ("latency_p50_s", "latency_p95_s"))
            alt.append(
                f"At load {exact(run['load'])} the median latency is {number(median['live'])} s live and "
                f"{number(median['simulated'])} s simulated, the 95th percentile {number(tail['live'])} s and "
                f"{number(tail['simulated'])} s."
            )
        caption = "Share of requests served within a time, live and in the simulation of the same arrivals."
        yield Picture(f"latency-{kind}", title, svg, " ".join(alt), caption, MEASURED)


def _draw_curves(axes: Axes, run: Data) -> None:
    """Both latency curves of a run, and its SLO where it lies among them."""
    end = 1.1 * max(max(run[side]) for side in ("live", "simulated"))
    for side, (colour, dashes) in zip(("live", "simulated"), LINES, strict=False):
        share = [(position + 1) / len(run[side]) for position in range(len(run[side]))]
        x, y = draw_with.steps_from_zero(run[side], share, end)
        axes.step(x, y, where="post", color=colour, linestyle=dashes, label=side)
    axes.set(xlim=(0.0, end), ylim=(0.0, 1.04))
    if run["slo_s"] is not None and run["slo_s"] <= end:
        axes.axvline(run["slo_s"], color=INK, linestyle=PROMISE, linewidth=1.1)
        draw_with.name_below(axes, run["slo_s"], 0.04, "SLO")
    axes.set_title(f"load {exact(run['load'])}")
    axes.set_xlabel("latency (s)")
