"""The figures of a report, drawn from the plain data of `data.contents`; one without anything to show is left out.

Cost against latency, latency curves, dollars and GPU-seconds by component, load over time, the switch step, and how
well it is all known: latency by kind, and step times as predicted and as published. `FIGURES` names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from hybridsd_sim.estimate import exact, money, number
from hybridsd_sim.reporting import figure_style as draw_with
from hybridsd_sim.reporting.figure_style import INK, KIND_MARKERS, LINES, MARKERS, PROMISE, SOFT
from hybridsd_sim.reporting.labels import Data, listed
from hybridsd_sim.reporting.plan_sections import own_figures
from hybridsd_sim.reporting.run_data import COMPONENTS, HANDOVER, IDLE, TRANSFER, UNSPLIT
from hybridsd_sim.scenario import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

KIND_FILLS = {"measured": ("#0072b2", ""), "quoted": ("#ffffff", "////"), "modelled": ("#f3c27b", "\\\\")}
"""Fill and hatching of each kind."""

MOST_BARS = 16
"""Plans that fit the figure; the table has all."""

WIDEST = 2.5
"""The axis ends here even where an interval does not."""

COLUMNS = 3

FILLS = {
    COMPONENTS["text_encode"]: ("#56b4e9", ""),
    COMPONENTS["denoise_warmup"]: ("#e69f00", "||||"),
    COMPONENTS["denoise"]: ("#0072b2", ""),
    COMPONENTS["vae_decode"]: ("#009e73", "////"),
    HANDOVER: ("#f0e442", "----"),
    TRANSFER: ("#cc79a7", "\\\\\\\\"),
    COMPONENTS["model_load"]: ("#d55e00", "xxxx"),
    UNSPLIT: ("#9aa5b1", ""),
    IDLE: ("#ffffff", "////"),
}
"""Fill and hatching of each component, in the order of stacking."""

TOTALS = {"usd": "metered_usd_per_image", "gpu_seconds": "gpu_seconds_per_image"}


def known(data: Data) -> Figure | None:
    """How much of each plan's idle latency is measured, quoted and modelled, with its 90% interval, all in per cent."""
    plans = [plan for plan in data.get("plans", ()) if plan["totals"][0]["value"]][:MOST_BARS]
    if not plans:
        return None
    figure = draw_with.canvas(1.35 + 0.36 * len(plans))
    axes = figure.add_subplot()
    place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
    for row, plan in enumerate(plans):
        left, total = 0.0, plan["totals"][0]
        for kind, (fill, hatch) in KIND_FILLS.items():
            share = plan["shares"][kind]
            axes.barh(row, share, left=left, height=0.62, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.4)
            left += share
        ends = [min(total[end] / total["value"], WIDEST) for end in ("low", "high")]
        axes.plot(ends, [row, row], color=INK, linewidth=1.3, marker="|", markersize=7, zorder=4)
        axes.annotate(f"{number(total['value'])} s", (max(1.0, ends[1]), row), annotation_clip=False, **place)
    names = (f"{', '.join(plan['runs'])}: {plan['request_class']}" for plan in plans)
    axes.set_yticks(range(len(plans)), [name if len(name) <= 44 else f"{name[:43]}…" for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    widest = max(plan["totals"][0]["high"] / plan["totals"][0]["value"] for plan in plans)
    axes.set(xlabel="share of the plan's idle latency", xlim=(0.0, min(WIDEST, 1.18 * max(1.0, widest))))
    axes.xaxis.set_major_formatter(draw_with.per_cent)
    found = [kind for kind in KIND_FILLS if any(plan["shares"][kind] for plan in plans)]
    draw_with.legend_of_fills(figure, {kind: KIND_FILLS[kind] for kind in found})
    more = f" The first {len(plans)} of {len(data['plans'])} plans." if len(plans) < len(data["plans"]) else ""
    draw_with.note(figure, f"Whiskers: 90% intervals of the latency; beside them the latency itself.{more}")
    return figure


def calibration(data: Data) -> Figure | None:
    """Step times under each device's fit against the published or measured rows that it was fitted to."""
    fits = [fit for fit in data.get("calibration", ()) if fit["rows"]]
    if not fits:
        return None
    rows = -(-len(fits) // COLUMNS)
    figure = draw_with.canvas(1.1 + 2.25 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for position, fit in enumerate(fits):
        axes = grid[position // COLUMNS][position % COLUMNS]
        _draw_fit(axes, fit)
        axes.set_xlabel("published step (s)" if position >= len(fits) - COLUMNS else "")
        axes.set_ylabel("predicted (s)" if position % COLUMNS == 0 else "")
    found = {row["kind"] for fit in fits for row in fit["rows"]}
    draw_with.legend_of_kinds(figure, [kind for kind in KIND_MARKERS if kind in found], chosen=False)
    draw_with.note(
        figure, "Logarithmic axes. On the line, the law gives what was timed; bands hold 90% of quoted rows."
    )
    return figure


def _draw_fit(axes: Axes, fit: Data) -> None:
    """Predicted against published seconds of a fit's rows, logarithmic, with the band that holds 90% of quoted rows."""
    times = [row[key] for row in fit["rows"] for key in ("published_s", "predicted_s")]
    ends = [min(times) / 1.5, max(times) * 1.5]
    width = 1.0 + fit["row_reach"]
    axes.fill_between(ends, [end / width for end in ends], [end * width for end in ends], color=SOFT, alpha=0.15, lw=0)
    axes.plot(ends, ends, color=SOFT, linewidth=1.0)
    for row in fit["rows"]:
        look: dict[str, Any] = {
            "marker": KIND_MARKERS[row["kind"]],
            "color": LINES[0][0],
            "s": 22,
            "linewidth": 0.5,
            "alpha": 0.8,
        }
        axes.scatter(row["published_s"], row["predicted_s"], edgecolor=INK, zorder=3, **look)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    draw_with.few_ticks(axes)
    axes.set_title(f"{fit['device']}\n{fit['runtime']}, {fit['precision']}", fontsize=8.5)
    axes.set_visible(True)


def draw(data: Data, names: Sequence[str] = ()) -> dict[str, str]:
    """The figures of these names, or all that the data hold, as SVG text."""
    with draw_with.styled():
        drawn = {name: (title, make(data)) for name, (title, make) in FIGURES.items() if not names or name in names}
        return {name: draw_with.to_svg(name, title, figure) for name, (title, figure) in drawn.items() if figure}


def _kinds(data: Data) -> str:
    kinds = [kind for kind in KIND_MARKERS if any(kind in run["kinds"] for run in data["runs"])]
    return f"simulated from {listed(kinds)} step times" if kinds else "nothing served"


def frontier(data: Data) -> Figure | None:
    """Dollars an hour against p95 latency, with quality as colour: the frontier, the baselines and the chosen plan."""
    points = [(point, "o", 42, f"on the frontier, by {point['known_by']}") for point in data.get("frontier", ())]
    points += [(p, mark, 75, p["name"]) for p, mark in zip(data.get("baselines", ()), cycle(MARKERS), strict=False)]
    points += [(own_figures(data), "*", 260, "chosen")] if data["kind"] == "plan" else []
    points = [
        item for item in points if item[0]["usd_per_hour"] is not None and item[0]["latency_p95_s"][0] is not None
    ]
    if not points:
        return None
    figure = draw_with.canvas(4.4)
    axes = figure.add_subplot()
    known = [point["quality"] for point, *_ in points if point["quality"] is not None]
    scale = draw_with.colours(known)
    for point, marker, size, label in points:
        _plot_point(axes, point, label, marker, size, scale)
    if known:
        draw_with.colour_bar(figure, axes, scale, "quality (CLIP score, 0 to 1)")
    axes.margins(x=0.08)
    draw_with.stretch(axes, [point["latency_p95_s"][0] for point, *_ in points])
    axes.set(xlabel="p95 latency, arrival to image (s)", ylabel="rent (US$ an hour)")
    axes.set_ylim(bottom=0.0)
    draw_with.legend(figure, axes)
    ways = listed(sorted({point["known_by"] for point in data.get("frontier", ())}))
    modelled = f"; frontier modelled by {ways}" if ways else ""
    draw_with.note(figure, f"Whiskers: 95% intervals. Named plans {_kinds(data)}{modelled}.")
    return figure


def _plot_point(axes: Axes, point: Data, label: str, marker: str, size: float, scale: ScalarMappable) -> None:
    """A plan with the whiskers of its latency and, crossed out where it is not feasible, what is wrong with it."""
    (middle, low, high), usd, quality = point["latency_p95_s"], point["usd_per_hour"], point["quality"]
    if low is not None and high is not None:
        axes.plot([low, high], [usd, usd], color=SOFT, linewidth=1.2, marker="|", markersize=7, zorder=2, clip_on=False)
    wrong = ([] if point["feasible"] else ["not feasible"]) + ([] if quality is not None else ["quality unknown"])
    look: dict[str, Any] = {
        "marker": marker,
        "s": size,
        "color": ["#ffffff" if quality is None else scale.to_rgba(quality)],
        "label": f"{label} ({', '.join(wrong)})" if wrong else label,
    }
    axes.scatter(middle, usd, edgecolor=INK, linewidth=0.8, zorder=3, clip_on=False, **look)
    if not point["feasible"]:
        axes.scatter(middle, usd, s=size * 0.5, marker="x", color=INK, linewidth=1.0, zorder=4, clip_on=False)


def latency(data: Data) -> Figure | None:
    """Share of requests served within a time, per class and run, with the promise as a dashed line."""
    classes = [name for name in data["scenario"]["classes"] if any(name in run["latency"] for run in data["runs"])]
    if not classes:
        return None
    columns = min(2, len(classes))
    rows = -(-len(classes) // columns)
    figure = draw_with.canvas(3.6 if rows == 1 else 2.4 * rows + 0.7)
    for position, name in enumerate(classes):
        axes = figure.add_subplot(rows, columns, position + 1)
        _latency_panel(axes, data, name)
        axes.set_title(name if len(classes) > 1 else "")
        axes.set_xlabel("latency, arrival to image (s)" if position >= len(classes) - columns else "")
        axes.set_ylabel("share of requests" if position % columns == 0 else "")
    draw_with.legend(figure, figure.axes[0])
    draw_with.note(figure, f"Bands: 95% intervals from batches of the run; {_kinds(data)}.")
    return figure


def _latency_panel(axes: Axes, data: Data, name: str) -> None:
    """The curves of a class, a line for each run, with their bands and its SLO."""
    spec = data["scenario"]["classes"][name]
    curves = [run["latency"].get(name) for run in data["runs"]]
    ends = [value for curve in curves if curve for value in (curve["latency_s"][0], curve["latency_s"][-1])]
    ends += [spec["slo_s"]] if spec["slo_s"] else []
    end = 1.15 * max(ends)
    for run, curve, (colour, dashes) in zip(data["runs"], curves, cycle(LINES), strict=False):
        axes.plot([], [], color=colour, linestyle=dashes, label=run["name"])
        if curve is None:
            continue
        x, share = draw_with.steps_from_zero(curve["latency_s"], curve["share"], end)
        axes.step(x, share, where="post", color=colour, linestyle=dashes)
        if None not in curve["low"]:
            low, high = (draw_with.steps_from_zero(curve["latency_s"], curve[side], end)[1] for side in ("low", "high"))
            axes.fill_between(x, low, high, step="post", color=colour, alpha=0.16, linewidth=0)
    axes.set_ylim(0.0, 1.04)
    axes.set_xlim(0.8 * min(ends), end)
    draw_with.stretch(axes, ends)
    axes.yaxis.set_major_formatter(draw_with.per_cent)
    if spec["slo_s"] is not None:
        axes.axvline(spec["slo_s"], color=INK, linestyle=PROMISE, linewidth=1.1)
        axes.axhline(spec["slo_percentile"] / 100, color=SOFT, linestyle=(0, (1, 2)), linewidth=0.9)
        draw_with.name_below(
            axes, spec["slo_s"], 0.04, f"SLO {exact(spec['slo_s'])} s for {exact(spec['slo_percentile'])}%"
        )


def components(data: Data) -> Figure | None:
    """Dollars and GPU-seconds by component, stacked, per class and run; what was rented and not used under `all`."""
    classes = list(data["scenario"]["classes"])
    owners = [ALL, *(classes if len(classes) > 1 else ())]
    bars: list[tuple[str, Data, dict[str, Data]]] = []
    rows: list[float] = []
    first_rows: dict[str, float] = {}
    for group, owner in enumerate(owners):
        for run in (run for run in data["runs"] if owner in run["summary"]):
            found = {item["component"]: item for item in run["components"] if item["request_class"] == owner}
            # one below the other, with room for a title above each group
            rows.append(len(bars) + 1.6 * group)
            bars.append((owner, run, {name: found[name] for name in FILLS if name in found}))
            first_rows.setdefault(owner, rows[-1])
    names = {name for _, _, stack in bars for name in stack}
    if not names:
        return None
    figure = draw_with.canvas(0.25 * (len(bars) + 1.6 * len(owners)) + 1.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, times in zip(panels, ("usd", "gpu_seconds"), (1000.0, 1.0), strict=True):
        ends = [
            _stack_bar(axes, row, s, run["summary"][owner], key, times)
            for row, (owner, run, s) in zip(rows, bars, strict=True)
        ]
        axes.set_xlim(0.0, max(1.22 * max(ends), axes.get_xlim()[1]))
        axes.xaxis.set_major_formatter(draw_with.plain)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(rows, [run["name"] for _, run, _ in bars])
    panels[0].set_ylim(rows[-1] + 0.6, -1.6)
    place: dict[str, Any] = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "weight": "bold"}
    for owner, row in first_rows.items():
        panels[0].annotate("all requests, with idle nodes" if owner == ALL else owner, (0.0, row - 0.95), **place)
    panels[0].set_xlabel("US$ per 1,000 images")
    panels[1].set_xlabel("GPU-seconds an image")
    draw_with.legend_of_fills(figure, {name: fill for name, fill in FILLS.items() if name in names})
    draw_with.note(figure, f"Whiskers: 95% intervals of what was metered; {_kinds(data)}.")
    return figure


def _stack_bar(axes: Axes, row: float, stack: Mapping[str, Data], summary: Data, key: str, times: float) -> float:
    """Draw one stacked bar with its whisker and its total; returns where it ends."""
    total, left = summary[TOTALS[key]], 0.0
    unknown = any(item[key] is None for item in stack.values())
    for name, item in stack.items() if not unknown else ():
        fill, hatch = FILLS[name]
        axes.barh(row, item[key] * times, left=left, height=0.66, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.4)
        left += item[key] * times
    end = left
    ends = [0.0 if total[side] is None else total[side] * times for side in ("low", "high")]
    if IDLE not in stack and number(ends[0]) != number(ends[1]):
        axes.plot(ends, [row, row], color=INK, linewidth=1.2, marker="|", markersize=6, zorder=4)
        end = max(left, ends[1])
    show = money if key == "usd" else number
    text = "no price" if unknown else show(left) if stack else "0" if summary["served"]["value"] else "nothing served"
    axes.annotate(text, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    return end


def load(data: Data) -> Figure | None:
    """Utilisation and queue of each rented pool over time, of the run that the report is about."""
    run, scenario = data["runs"][0], data["scenario"]
    if not run["series"]:
        return None
    figure = draw_with.canvas(4.2)
    panels = figure.subplots(2, 1, sharex=True)
    horizon_s = scenario["horizon_s"]
    scale, unit = (3600.0, "h") if horizon_s >= 7200 else (60.0, "min") if horizon_s >= 300 else (1.0, "s")
    for series, (colour, dashes) in zip(run["series"], cycle(LINES), strict=False):
        time, label = (
            [value / scale for value in series["time_s"]],
            f"{series['pool']} ({series['gpus']} GPU{'s' * (series['gpus'] > 1)})",
        )
        for axes, line in zip(panels, (series["busy"], series["queue"]), strict=True):
            axes.plot(time, line["value"], color=colour, linestyle=dashes, label=label)
            if scenario["replications"] > 1:
                axes.fill_between(time, line["low"], line["high"], color=colour, alpha=0.16, linewidth=0)
    for axes in panels:
        axes.axvspan(0.0, scenario["warmup_s"] / scale, color="#eef1f4", linewidth=0, zorder=0)
        axes.set_xlim(0.0, horizon_s / scale)
        axes.set_ylim(bottom=0.0)
    panels[0].set(ylabel="busy GPUs (share)", ylim=(0.0, 1.04))
    panels[0].yaxis.set_major_formatter(draw_with.per_cent)
    panels[1].set(ylabel="requests waiting", xlabel=f"simulated time ({unit})")
    draw_with.legend(figure, panels[0])
    lines, several = "One replication: no interval.", scenario["replications"]
    if several > 1:
        lines = f"Lines: mean of {several} replications; bands: from the lowest to the highest of them."
    draw_with.note(figure, f"{lines} Grey: warm-up. Run: {run['name']}, {_kinds(data)}.")
    return figure


def switch(data: Data) -> Figure | None:
    """Idle latency with its 90% interval, and dollars an image, against the switch step, per class.

    Steps without a price are missing below; the chosen steps are shaded, the SLO is a dashed line.
    """
    curves = {name: curve for name, curve in data.get("switch_curve", {}).items() if curve}
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = draw_with.canvas(4.4 if rows == 1 else 3.6 * rows)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for axes in grid.flat:
        axes.set_visible(False)
    for position, (name, curve) in enumerate(curves.items()):
        row, side = divmod(position, columns)
        upper, lower = grid[2 * row][side], grid[2 * row + 1][side]
        _switch_panels(upper, lower, curve, data["scenario"]["classes"][name])
        upper.set(title=name, ylabel="idle latency (s)" if side == 0 else "")
        lower.set(xlabel="switch step", ylabel="US$ per\n1,000 images" if side == 0 else "")
    found = {point["kind"] for curve in curves.values() for point in curve}
    draw_with.legend_of_kinds(figure, [kind for kind in KIND_MARKERS if kind in found])
    draw_with.note(figure, "Bands: 90% intervals of the prediction for one request on an idle fleet.")
    return figure


def _switch_panels(upper: Axes, lower: Axes, curve: Sequence[Data], spec: Data) -> None:
    """Latency above and dollars below of a class against the switch step, the chosen steps shaded."""
    steps = [point["switch_step"] for point in curve]
    low, high = ([point[end] for point in curve] for end in ("low_s", "high_s"))
    upper.fill_between(steps, low, high, color=LINES[0][0], alpha=0.18, linewidth=0)
    _marked(upper, [(point, point["latency_s"]) for point in curve], LINES[0][0])
    priced = [point for point in curve if point["usd_per_image"] is not None]
    _marked(lower, [(point, 1000.0 * point["usd_per_image"]) for point in priced], LINES[1][0])
    if spec["slo_s"] is not None:
        upper.axhline(spec["slo_s"], color=INK, linestyle=PROMISE, linewidth=1.1)
    for axes in (upper, lower):
        for point in curve:
            if point["chosen"]:
                axes.axvline(point["switch_step"], color=INK, linewidth=6, alpha=0.13, zorder=1)
        axes.set_visible(True)
        axes.set_ylim(bottom=0.0)
        axes.set_xlim(-0.04 * spec["num_inference_steps"], 1.04 * spec["num_inference_steps"])
        draw_with.whole_ticks(axes, steps)
        axes.yaxis.set_major_formatter(draw_with.plain)


def _marked(axes: Axes, points: Sequence[tuple[Data, float]], colour: str) -> None:
    """A line whose markers say the kind of each point."""
    axes.plot([point["switch_step"] for point, _ in points], [value for _, value in points], color=colour, zorder=2)
    for point, value in points:
        look: dict[str, Any] = {"marker": KIND_MARKERS[point["kind"]], "color": colour, "s": 26, "clip_on": False}
        axes.scatter(point["switch_step"], value, edgecolor=INK, linewidth=0.6, zorder=3, **look)


FIGURES = {
    "frontier": ("Cost against latency, with quality as colour", frontier),
    "latency": ("Latency of requests by policy, with the promise", latency),
    "components": ("Cost and GPU-seconds by component", components),
    "load": ("Utilisation and queue over time", load),
    "switch": ("Latency and cost against the switch step", switch),
    "known": ("How much of the latency is measured, quoted and modelled", known),
    "calibration": ("Step times as predicted and as published", calibration),
}
"""Name of each figure's file, its title, and what draws it."""
