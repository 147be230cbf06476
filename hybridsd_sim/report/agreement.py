"""The report of a calibration: live runs beside their replays in simulation, figure by figure and curve over curve.

Plain data in, a page out; what was run and how it was compared is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridsd_sim.report import canvas as draw_with
from hybridsd_sim.report.canvas import INK, LINES, PROMISE, Axes, Figure
from hybridsd_sim.report.folder import write_pages
from hybridsd_sim.report.glossary import NAMES
from hybridsd_sim.report.markup import Block, Bullets, Cell, Fold, Heading, Paragraph, Picture, Table, Terms, answered
from hybridsd_sim.report.numbers import DASH, MINUS, number, percent

Data = Mapping[str, Any]
MEASURED = ("measured", "modelled")
SHARES = frozenset({"utilisation", "slo_attainment"})
"""Figures that are shares of 1: they differ by points of a per cent, all others by per cent of the live figure."""
_OWN_NAMES = {"utilisation": "Busiest worker's utilisation", "held_mean_s": "Mean time held by it (s)"}
_WORDS = {True: "as near as asked", False: "not as near as asked", None: "nothing is asked at this load"}
_ASKED = ("latency_p50_s", "latency_mean_s", "latency_p95_s", "served_per_s")


def write_agreement(data: Data, folder: Path) -> Path:
    """Write `index.html`, `report.md` and the figures into a folder; returns the page.

    `data["runs"]` has for each run its `name`, `kind`, `load`, `driver`, `requests`, `block`, `holds`, `void`, `drift`,
    `drift_limit`, `tries`, `plan`, `slo_s`, `late_s` (the latest request), `stack_s` (what the machine adds to the
    network), the `figures` of the comparison, both sorted latencies in seconds under `live` and `simulated`, the
    `steps` of each device and the measured `rows`; `data["made_by"]` are terms for the provenance.
    """
    shown = list(_pictures(data["runs"]))
    return write_pages(Path(folder), "Simulated against live", list(_page(data, shown)), shown)


# ---- Page -----------------------------------------------------------------------------------------------------------


def _page(data: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    runs = data["runs"]
    yield Heading("Simulated against live", "top", 1)
    yield Heading("Verdict", "verdict")
    yield Paragraph(_verdict(runs), "lead")
    yield _overview(runs)
    yield Paragraph(_how(runs), "note")
    yield Heading("Latency, curve over curve", "figures")
    yield from pictures
    yield Heading("Every figure", "details")
    for run in runs:
        yield Fold(f"{_called(run)}: {_WORDS[run['holds']]}", _details(run))
    yield Heading("Provenance", "provenance")
    yield Terms(tuple(data["made_by"]))


def _verdict(runs: Sequence[Data]) -> str:
    sound = [run for run in runs if not run["void"] and run["holds"] is not None]
    near = sum(run["holds"] for run in sound)
    requests = sum(run["requests"] for run in runs)
    text = f"The simulation is as near as is asked in {near} of {len(sound)} runs."
    lost = sum(run["void"] for run in runs)
    void = f" {lost} more are void: their steps drifted." if lost else ""
    return f"{text}{void} {requests:,} requests were served live."


def _overview(runs: Sequence[Data]) -> Table:
    head = ("Run", "Requests", *(NAMES[name] for name in _ASKED), "Step drift", "Near enough")
    rows = tuple(
        (
            Cell(_called(run)),
            Cell(number(run["requests"])),
            *(_off(_figure(run, name)) for name in _ASKED),
            Cell(percent(run["drift"]), "void" if run["void"] else ""),
            Cell(DASH) if run["holds"] is None else answered(run["holds"]),
        )
        for run in runs
    )
    return Table("Simulated against live, in per cent of the live figure; beneath, its 95% interval", head, rows)


def _how(runs: Sequence[Data]) -> str:
    drivers = " and ".join(dict.fromkeys(run["driver"] for run in runs))
    blocks = f"{min(run['block'] for run in runs)} to {max(run['block'] for run in runs)}"
    return (
        "Cost rows were measured on the workers themselves before each run and are not fitted to it. The simulation "
        "plays the live arrivals again, over the same links. Intervals: moving block bootstrap over requests, live and "
        f"simulated drawn together, in blocks of {blocks} requests. Load driver: {drivers}. Utilisation and SLO "
        "attainment differ in points of a per cent; throughput is one figure a run and has no interval."
    )


def _details(run: Data) -> tuple[Block, ...]:
    facts = (
        f"Plan: {run['plan']}. Promise: {number(run['slo_s'])} s.",
        f"Median steps before, during and after: {'; '.join(_steps(*item) for item in run['steps'].items())}.",
        f"Tries: {run['tries']}. The median step drifted by {_most(run)}.",
        f"To the model of the network the machine adds {number(1000 * run['stack_s'])} ms, measured before the run.",
        f"The latest request was sent {number(1000 * run['late_s'])} ms after it was due.",
    )
    head = ("Figure", "Live", "Simulated", "Simulated against live", "Asked", "Near enough")
    rows = tuple(
        (
            Cell(_name(figure)),
            Cell(_shown(figure, figure["live"])),
            Cell(_shown(figure, figure["simulated"])),
            _off(figure),
            Cell(DASH if figure["limit"] is None else f"± {percent(figure['limit'])}"),
            Cell(DASH) if figure["limit"] is None else answered(figure["holds"]),
        )
        for figure in run["figures"]
    )
    return Bullets(facts), Table("Live and simulated", head, rows), _measured(run["rows"])


def _most(run: Data) -> str:
    return f"{percent(run['drift'])}; up to {percent(run['drift_limit'])} are allowed"


def _measured(rows: Sequence[Data]) -> Table:
    head = ("Part", "Model", "Device", "Median (s)", "p05 to p95 (s)", "Samples")
    cells = tuple(
        (
            Cell(row["component"]), Cell(row["model"]), Cell(row["device"]), Cell(number(row["seconds_median"])),
            Cell(f"{number(row['seconds_p05'])}–{number(row['seconds_p95'])}"), Cell(number(row["num_samples"])),
        )
        for row in rows
    )  # fmt: skip
    return Table("Measured before the run", head, cells, words=frozenset({0, 1, 2}))


def _steps(device: str, seconds: Sequence[float]) -> str:
    return f"{device} {', '.join(number(1000 * second) for second in seconds)} ms"


def _called(run: Data) -> str:
    return f"{run['kind']} at load {run['load']:g}"


def _figure(run: Data, name: str) -> Data:
    found: Data = next(figure for figure in run["figures"] if figure["name"] == name)
    return found


def _name(figure: Data) -> str:
    name: str = figure["name"]
    return _OWN_NAMES.get(name) or NAMES[name]


def _shown(figure: Data, value: float) -> str:
    return percent(value) if figure["name"] in SHARES else number(value)


def _off(figure: Data) -> Cell:
    """How far the simulation is off, with the interval beneath."""
    if figure["off"] is None:
        return Cell(DASH, "nothing live to compare with")
    unit = " points" if figure["name"] in SHARES else " %"
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
            svg = draw_with.to_svg(f"latency-{kind}", title, _drawn(mine))
        caption = "Share of requests served within a time, live and in the simulation of the same arrivals."
        yield Picture(f"latency-{kind}", title, svg, " ".join(_told(mine)), caption, MEASURED)


def _drawn(runs: Sequence[Data]) -> Figure:
    figure = draw_with.canvas(3.0)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        _panel(axes, run)
        axes.set_title(f"load {run['load']:g}")
        axes.set_xlabel("latency (s)")
    panels[0].set_ylabel("share of requests")
    panels[0].yaxis.set_major_formatter(draw_with.per_cent)
    draw_with.legend(figure, panels[0])
    return figure


def _panel(axes: Axes, run: Data) -> None:
    end = 1.1 * max(max(run[side]) for side in ("live", "simulated"))
    for side, (colour, dashes) in zip(("live", "simulated"), LINES, strict=False):
        share = [(position + 1) / len(run[side]) for position in range(len(run[side]))]
        x, y = draw_with.steps_from_zero(run[side], share, end)
        axes.step(x, y, where="post", color=colour, linestyle=dashes, label=side)
    axes.set(xlim=(0.0, end), ylim=(0.0, 1.04))
    if run["slo_s"] is not None and run["slo_s"] <= end:
        axes.axvline(run["slo_s"], color=INK, linestyle=PROMISE, linewidth=1.1)
        draw_with.name_below(axes, run["slo_s"], 0.04, "SLO")


def _told(runs: Sequence[Data]) -> Iterator[str]:
    for run in runs:
        median, tail = (_figure(run, name) for name in ("latency_p50_s", "latency_p95_s"))
        yield (
            f"At load {run['load']:g} the median latency is {number(median['live'])} s live and "
            f"{number(median['simulated'])} s simulated, the 95th percentile {number(tail['live'])} s and "
            f"{number(tail['simulated'])} s."
        )
