"""What every figure is drawn with, and how it becomes SVG text: matplotlib's only door.

The same drawing gives the same bytes: ids hang on a fixed salt, no dates are written, and text stays text, measured
with the font that matplotlib brings along. Colours are Okabe and Ito's, which colour-blind readers can tell apart;
lines differ in dash, markers in shape and bars in hatching as well.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain, repeat
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

Dashes = Literal["-"] | tuple[float, tuple[float, ...]]

WIDTH_IN = 7.6

INK, SOFT, FAINT = "#1f2933", "#5a6672", "#dfe4ea"

LINES: tuple[tuple[str, Dashes], ...] = (
    ("#0072b2", "-"),
    ("#d55e00", (0, (6, 2))),
    ("#009e73", (0, (2, 1.2))),
    ("#cc79a7", (0, (6, 1.5, 1.5, 1.5))),
    ("#56b4e9", (0, (1, 1))),
    ("#e69f00", (0, (8, 2, 2, 2, 2, 2))),
    ("#000000", (0, (4, 1))),
)
"""Colour and dashes of each run, the chosen one first."""

PROMISE: Dashes = (0, (4, 3))
"""Dashes of an SLO."""

MARKERS = ("s", "D", "^", "v", "P", "X", "p")

KIND_MARKERS = {"measured": "o", "quoted": "s", "modelled": "^"}

NOTE_LETTERS = 126
"""Letters of the small note below a figure that fit its width."""

LEGEND_LETTERS = 110
"""Letters of a legend's row, seven for each marker among them."""

COLOURS = 40
"""Steps of a colour scale: matplotlib turns finer ones into pixels."""

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": FAINT,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridsd_sim",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def styled() -> Any:
    """A context in which figures look as they should, whatever the user's own settings are."""
    return matplotlib.style.context(["default", STYLE])


def canvas(height_in: float) -> Figure:
    """An empty figure of the report's width."""
    return Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def to_svg(name: str, title: str, figure: Figure) -> str:
    """The figure as one <svg> element: titled, in the reader's own fonts, with ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", FONTS)
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    head, _, body = text.partition(">")
    return f'{head} role="img" aria-label="{escape(title)}">\n <title>{escape(title)}</title>{body}'.rstrip()


def note(figure: Figure, text: str) -> None:
    """The small note below a figure: what its intervals are, and the kinds of its numbers."""
    lines = textwrap.wrap(text, NOTE_LETTERS)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=SOFT)


def plain(value: float, _position: float = 0.0) -> str:
    """A tick's number without exponents."""
    return f"{value:,.10g}"


def per_cent(value: float, _position: float = 0.0) -> str:
    """A tick's share as per cent."""
    return f"{value:.0%}"


def stretch(axes: Axes, values: Sequence[float], *, most: float = 8.0) -> None:
    """A logarithmic x axis with plain numbers where the values span more than `most`, else one from 0."""
    known = [value for value in values if value > 0]
    if known and max(known) / min(known) > most:
        axes.set_xscale("log")
        wide = max(known) / min(known) > 100
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0.0)
    axes.xaxis.set_major_formatter(plain)


def few_ticks(axes: Axes) -> None:
    """Plain numbers on logarithmic axes: at powers of ten, or at round numbers where the ends are close."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        wide = LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 3.0))
        axis.set_major_locator(wide if high / low > 8 else MaxNLocator(3, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())


def whole_ticks(axes: Axes, steps: Sequence[int], most: int = 6) -> None:
    """Ticks at the steps themselves, or at round ones where there are too many."""
    if len(steps) <= most:
        axes.set_xticks(list(steps))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(most - 1, integer=True))


def colours(values: Sequence[float]) -> ScalarMappable:
    """A scale of colours over the values, readable in grey and by colour-blind people."""
    shades = matplotlib.colormaps["cividis"].resampled(COLOURS)
    return ScalarMappable(Normalize(min(values, default=0.0), max(values, default=1.0)), shades)


def colour_bar(figure: Figure, axes: Axes, scale: ScalarMappable, label: str) -> None:
    """The scale beside its axes."""
    figure.colorbar(scale, ax=axes, label=label, format=plain, pad=0.01, ticks=MaxNLocator(5))


def legend(figure: Figure, axes: Axes) -> None:
    """One legend above the figure for the labels of one panel."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=_columns(list(unique)))


def _columns(labels: Sequence[str]) -> int:
    """As many columns of a legend as fit the figure's width."""
    return max(1, min(len(labels), LEGEND_LETTERS // (max(map(len, labels)) + 7)))


def legend_of_fills(figure: Figure, fills: Mapping[str, tuple[str, str]]) -> None:
    """One legend above the figure for fills and hatchings by name."""
    handles = [Patch(fc=fill, hatch=hatch, ec=INK, lw=0.4, label=name) for name, (fill, hatch) in fills.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=_columns(list(fills)))


def legend_of_kinds(figure: Figure, kinds: Sequence[str], *, chosen: bool = True) -> None:
    """One legend above the figure for the markers of the kinds, and for the promise and the chosen step."""
    look: dict[str, Any] = {"linestyle": "", "color": "white", "markeredgecolor": INK, "markersize": 6}
    handles = [Line2D([], [], marker=KIND_MARKERS[kind], label=kind, **look) for kind in kinds]
    if chosen:
        handles.append(Line2D([], [], color=INK, linestyle=PROMISE, linewidth=1.1, label="SLO"))
        handles.append(Line2D([], [], color=INK, linewidth=6, alpha=0.13, label="chosen"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def name_below(axes: Axes, x: float, y: float, text: str) -> None:
    """A small label beside a vertical line, on the side that has room."""
    left, right = axes.transData.inverted().transform(axes.transAxes.transform([(0.0, 0.0), (1.0, 0.0)]))[:, 0]
    middle = axes.transData.inverted().transform(axes.transAxes.transform([(0.55, 0.0)]))[0, 0]
    room = x < middle and left < right
    axes.annotate(
        text,
        (x, y),
        xytext=(4 if room else -4, 0),
        textcoords="offset points",
        ha="left" if room else "right",
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0},
    )


def steps_from_zero(x: Sequence[float], y: Sequence[float], end: float) -> tuple[list[float], list[float]]:
    """A rising curve begun at 0 and carried on to `end`."""
    return list(chain(x[:1], x, [end])), list(chain([0.0], y, repeat(y[-1], 1)))
