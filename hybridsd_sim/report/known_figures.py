"""The two figures on how well numbers are known: latency by kind, and predicted against published step times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridsd_sim.report import canvas as draw_with
from hybridsd_sim.report.canvas import INK, KIND_MARKERS, LINES, SOFT, Axes, Data, Figure
from hybridsd_sim.report.numbers import number

KIND_FILLS = {"measured": ("#0072b2", ""), "quoted": ("#ffffff", "////"), "modelled": ("#f3c27b", "\\\\")}
"""Fill and hatching of each kind."""
MOST_BARS = 16
"""Plans that fit the figure; the table has all."""
WIDEST = 2.5
"""The axis ends here even where an interval does not."""
COLUMNS = 3


def known(data: Data) -> Figure | None:
    """How much of each plan's idle latency is measured, quoted and modelled, with its 90% interval, all in per cent."""
    plans = [plan for plan in data.get("plans", ()) if plan["totals"][0]["value"]][:MOST_BARS]
    if not plans:
        return None
    figure = draw_with.canvas(1.35 + 0.36 * len(plans))
    axes = figure.add_subplot()
    for row, plan in enumerate(plans):
        _bar(axes, row, plan)
    axes.set_yticks(range(len(plans)), [_called(plan) for plan in plans])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="share of the plan's idle latency", xlim=(0.0, _end(plans)))
    axes.xaxis.set_major_formatter(draw_with.per_cent)
    found = [kind for kind in KIND_FILLS if any(plan["shares"][kind] for plan in plans)]
    draw_with.legend_of_fills(figure, {kind: KIND_FILLS[kind] for kind in found})
    more = f" The first {len(plans)} of {len(data['plans'])} plans." if len(plans) < len(data["plans"]) else ""
    draw_with.note(figure, f"Whiskers: 90% intervals of the latency; beside them the latency itself.{more}")
    return figure


def _called(plan: Data) -> str:
    text = f"{', '.join(plan['runs'])}: {plan['request_class']}"
    return text if len(text) <= 44 else f"{text[:43]}…"


def _end(plans: Sequence[Data]) -> float:
    widest: float = max(plan["totals"][0]["high"] / plan["totals"][0]["value"] for plan in plans)
    return min(WIDEST, 1.18 * max(1.0, widest))


def _bar(axes: Axes, row: int, plan: Data) -> None:
    left, total = 0.0, plan["totals"][0]
    for kind, (fill, hatch) in KIND_FILLS.items():
        share = plan["shares"][kind]
        axes.barh(row, share, left=left, height=0.62, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.4)
        left += share
    ends = [min(total[end] / total["value"], WIDEST) for end in ("low", "high")]
    axes.plot(ends, [row, row], color=INK, linewidth=1.3, marker="|", markersize=7, zorder=4)
    place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
    axes.annotate(f"{number(total['value'])} s", (max(1.0, ends[1]), row), annotation_clip=False, **place)


def calibration(data: Data) -> Figure | None:
    """Step times under each device's law against the published or measured rows that it was fitted to."""
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
        _panel(axes, fit)
        axes.set_xlabel("published step (s)" if position >= len(fits) - COLUMNS else "")
        axes.set_ylabel("predicted (s)" if position % COLUMNS == 0 else "")
    found = {row["kind"] for fit in fits for row in fit["rows"]}
    draw_with.legend_of_kinds(figure, [kind for kind in KIND_MARKERS if kind in found], chosen=False)
    draw_with.note(
        figure, "Logarithmic axes. On the line, the law gives what was timed; bands hold 90% of quoted rows."
    )
    return figure


def _panel(axes: Axes, fit: Data) -> None:
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
