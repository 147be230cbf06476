"""What each figure shows, in words: its caption, and alternative text with the numbers that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.figures import FIGURES
from hybridsd_sim.report.markup import Picture
from hybridsd_sim.report.numbers import number, percent
from hybridsd_sim.report.tally import IDLE

Data = Mapping[str, Any]
KINDS = ("measured", "quoted", "modelled")
CAPTIONS = {
    "frontier": (
        "Rent against latency; colour is quality. Circles are capacity plans that no other beats in all three; the "
        "named plans are simulated, with 95% intervals."
    ),
    "latency": "Share of requests served within a time. At the SLO, a curve should be above the dotted line.",
    "components": "Where dollars and GPU-seconds go. Hatched white: idle nodes, and requests outside the counted time.",
    "load": "How busy the rented GPUs are, and how many requests wait for them.",
    "switch": "What another switch step would do, on an idle fleet: latency with its 90% interval, and metered cost.",
    "known": "What each plan's idle latency is made of, and how far its 90% interval reaches.",
    "calibration": "Each device's law against the one-GPU rows that it was fitted to.",
}


def pictures(data: Data, drawn: Mapping[str, str]) -> list[Picture]:
    """The drawn figures with caption, alternative text and the kinds of the numbers behind them."""
    found = []
    for name, svg in drawn.items():
        behind = _behind(name, data)
        kinds = tuple(kind for kind in KINDS if kind in behind)
        found.append(Picture(name, FIGURES[name][0], svg, " ".join(DESCRIBE[name](data)), CAPTIONS[name], kinds))
    return found


def _behind(name: str, data: Data) -> set[str]:
    """The kinds of the numbers that a figure shows."""
    if name == "switch":
        return {point["kind"] for curve in data["switch_curve"].values() for point in curve}
    if name == "known":
        return {kind for plan in data["plans"] for kind, share in plan["shares"].items() if share}
    if name == "calibration":
        return {row["kind"] for fit in data["calibration"] for row in fit["rows"]} | {"modelled"}
    kinds = {kind for run in data["runs"] for kind in run["kinds"]}
    return kinds | {"modelled"} if name == "frontier" else kinds


def _frontier(data: Data) -> Iterator[str]:
    count = len(data["frontier"])
    yield f"Scatter plot of rent in US$ an hour against p95 latency in seconds, with {count} plans on the frontier."
    run = data["runs"][0]
    yield _place("chosen", run["usd_per_hour"], run["summary"][ALL]["latency_p95_s"]["value"])
    for point in data["baselines"]:
        yield _place(point["name"], point["usd_per_hour"], point["latency_p95_s"][0])


def _place(name: str, usd: float | None, seconds: float | None) -> str:
    return f"{name.capitalize()}: {number(usd)} US$ an hour at {number(seconds)} s."


def _latency(data: Data) -> Iterator[str]:
    yield "Curves of the share of requests served within a time, a panel for each request class, a line for each run."
    for name, spec in data["scenario"]["classes"].items():
        limit = "any time" if spec["slo_s"] is None else f"{number(spec['slo_s'])} s"
        shares = [(run["name"], run["summary"][name]) for run in data["runs"] if name in run["summary"]]
        text = ", ".join(f"{run} {percent(figures['slo_attainment']['value'])}" for run, figures in shares)
        yield f"{name} within {limit}: {text}."


def _components(data: Data) -> Iterator[str]:
    yield "Stacked bars of dollars and of GPU-seconds an image by component, for each run."
    for run in data["runs"]:
        mine = [item for item in run["components"] if item["request_class"] == ALL and item["usd"] is not None]
        used = sum(item["usd"] for item in mine if item["component"] != IDLE)
        idle = sum(item["usd"] for item in mine if item["component"] == IDLE)
        dollars = f"{number(1000.0 * used)} used and {number(1000.0 * idle)} idle"
        yield f"{run['name'].capitalize()}: {dollars}, in US$ per 1,000 images."


def _load(data: Data) -> Iterator[str]:
    yield "Lines over time: share of busy GPUs above, requests waiting below."
    for series in data["runs"][0]["series"]:
        busy, queue = series["busy"]["value"], series["queue"]["value"]
        mean = sum(busy) / len(busy)
        yield f"{series['pool']}: {percent(mean)} busy on average, at most {number(float(max(queue)))} waiting."


def _switch(data: Data) -> Iterator[str]:
    yield "Latency and cost against the switch step, for each request class."
    for name, curve in data["switch_curve"].items():
        if curve:
            points = ", ".join(f"step {point['switch_step']}: {number(point['latency_s'])} s" for point in curve)
            yield f"{name}: {points}."


def _known(data: Data) -> Iterator[str]:
    yield "Stacked bars of the share of each plan's idle latency that is measured, quoted and modelled."
    for plan in data["plans"]:
        parts = ", ".join(f"{percent(share)} {kind}" for kind, share in plan["shares"].items())
        total = plan["totals"][0]
        ends = f"{number(total['value'])} s, 90% interval {number(total['low'])} to {number(total['high'])} s"
        yield f"{', '.join(plan['runs'])}, {plan['request_class']}: {ends}; {parts}."


def _calibration(data: Data) -> Iterator[str]:
    yield "Scatter plots of predicted against published seconds a step, a panel for each device, runtime and precision."
    for fit in data["calibration"]:
        if fit["rows"]:
            yield f"{fit['device']}, {fit['runtime']}, {fit['precision']}: {len(fit['rows'])} rows."


DESCRIBE = {
    "frontier": _frontier, "latency": _latency, "components": _components, "load": _load, "switch": _switch,
    "known": _known, "calibration": _calibration,
}  # fmt: skip
"""What makes the alternative text of each figure."""
