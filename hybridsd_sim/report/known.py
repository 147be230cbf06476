"""How the numbers behind the plans are known: shares by kind, every part with its interval, and the rates behind money.

Reads the plain data of `contents` and writes blocks of `markup`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.report.choices import ranged
from hybridsd_sim.report.glossary import PARTS
from hybridsd_sim.report.markup import MARKS, Block, Cell, Fold, Heading, Paragraph, Picture, Table
from hybridsd_sim.report.numbers import DASH, Show, clip, interval, listed, number, percent, reach

Data = Mapping[str, Any]
TIE = "\N{NO-BREAK SPACE}"
NO_SOURCE = "this model's own rule"
TWO_INTERVALS = (
    "A 90% interval says how well a time is known. The 95% intervals of simulated figures say only what chance does in "
    "the run, with these times taken as they stand. The same stands in parts.csv, a figure a line."
)


def sources_of(data: Data) -> tuple[str, ...]:
    """Every source behind the plans, the rates and the calibration once, in the order of the page."""
    figures = [figure for plan in data["plans"] for figure in (*plan["parts"], *plan["totals"])]
    laws = (*data["calibration"], *data["constants"])
    return tuple(dict.fromkeys(source for each in (*figures, *data["rates"], *laws) for source in each["sources"]))


def how_known(data: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The section that tells which numbers are measured, quoted or modelled, and how wide each is."""
    mine = [plan for plan in data["plans"] if data["runs"][0]["name"] in plan["runs"]]
    shown = mine if data["kind"] == "plan" else []
    sources = sources_of(data)
    yield Heading("How these numbers are known", "known")
    for plan in shown:
        yield Paragraph(_in_words(plan), "lead")
    yield Paragraph(_counted(mine, data["rates"], data["runs"][0]["name"]))
    yield Paragraph(TWO_INTERVALS, "note")
    yield _shares(data["plans"])
    yield from (picture for picture in pictures if picture.name == "known")
    yield Heading("Part by part", "parts", 3)
    for plan in data["plans"]:
        whose = f"{', '.join(plan['runs'])}, {plan['request_class']}: {plan['label']}"
        yield Fold(whose, (_parts(plan, sources),), opened=plan in shown)
    yield Heading("Prices and powers", "rates", 3)
    yield _rates(data["rates"], sources)


def _in_words(plan: Data) -> str:
    """A plan's idle latency, its interval, and what it is made of."""
    total, shares = plan["totals"][0], plan["shares"]
    low, high, far = number(total["low"]), number(total["high"]), reach(total)
    made_of = listed([f"{percent(share)} {kind}" for kind, share in shares.items() if share]) or "nothing"
    width = f"{low} to {high} s at 90%" + (f" ({far})" if far else "")
    return f"{plan['request_class']}: {number(total['value'])} s on an idle fleet, {width}; {made_of}."


def _counted(plans: Sequence[Data], rates: Sequence[Data], run: str) -> str:
    """How many numbers stand behind the plans of a run, by kind."""
    figures = [part for plan in plans for part in plan["parts"] if part["value"]]
    figures += [total for plan in plans for total in plan["totals"] if total["figure"].startswith("quality")]
    figures = [figure for figure in (*figures, *rates) if figure["value"] is not None]
    count = Counter(figure["kind"] for figure in figures)
    outside = sum(not part["within"] for plan in plans for part in plan["parts"])
    said = listed([f"{count[kind]} are {kind} {MARKS[kind]}" for kind in MARKS])
    text = f"Of the {len(figures)} times, scores, prices and powers behind the run {run}, {said}."
    lies = "of the times lies" if outside == 1 else "of the times lie"
    return f"{text} {outside} {lies} outside what was timed on the device." if outside else text


def _shares(plans: Sequence[Data]) -> Table:
    rows = []
    for plan in plans:
        name = Cell(plan["request_class"], ", ".join(plan["runs"]))
        shares = (Cell(percent(share)) for share in plan["shares"].values())
        rows.append((name, Cell(plan["label"]), ranged(plan["totals"][0]), *shares))
    head = ("Request class", "Plan", "Idle latency (s)", *(f"{MARKS[kind]}{TIE}{kind}" for kind in MARKS))
    caption = "How much of each plan's idle latency is known in which way; beneath a latency its 90% interval"
    return Table(caption, head, tuple(rows), words=frozenset({0, 1}))


def _parts(plan: Data, sources: Sequence[str]) -> Table:
    """Every part of a plan, then what they sum to."""
    steady = any(part["component"] == "denoise_warmup" for part in plan["parts"])
    rows = [_part(part, sources, steady=steady) for part in plan["parts"]]
    totals = [_total(total, sources) for total in plan["totals"]]
    head = ("Part", "Where", "Value", "90% interval", "Kind", "Source and note")
    strong = frozenset(range(len(rows), len(rows) + len(totals)))
    return Table(
        "Parts of one request on an idle fleet, and what they sum to",
        head,
        (*rows, *totals),
        strong=strong,
        words=frozenset({0, 1, 4, 5}),
    )


def _part(part: Data, sources: Sequence[str], *, steady: bool) -> tuple[Cell, ...]:
    name = PARTS.get(part["component"], part["component"].replace("_", " "))
    name += ", steady steps" if steady and part["component"] == "denoise" else ""
    beside = "" if part["critical"] else "beside the cloud's work: not in the latency"
    return _line(part, Cell(name, beside), part["where"], number, sources, outside=not part["within"])


def _total(total: Data, sources: Sequence[str]) -> tuple[Cell, ...]:
    show = clip if total["figure"] in {"quality_clip", "quality_lpips"} else number
    return _line(total, Cell(PARTS[total["figure"]]), "", show, sources)


def _line(
    figure: Data, name: Cell, where: str, show: Show, sources: Sequence[str], *, outside: bool = False
) -> tuple[Cell, ...]:
    """A figure with its interval, kind, sources and note; without a value, a dash and the reason."""
    known = figure["value"] is not None
    return (
        name,
        Cell(where),
        Cell(f"{show(figure['value'])} {figure['unit']}") if known else Cell(DASH, figure["note"] or "not known"),
        _interval(figure, show) if known else Cell(""),
        Cell(figure["kind"], kind=figure["kind"]) if known else Cell(""),
        _grounds(figure, sources, outside=outside),
    )


def _interval(figure: Data, show: Show) -> Cell:
    if figure["low"] is None and figure["high"] is None:
        return Cell("none given")
    return Cell(interval(figure, show) or show(figure["value"]), reach(figure))


def _grounds(figure: Data, sources: Sequence[str], *, outside: bool = False) -> Cell:
    """What a figure rests on: numbers of sources, and its note."""
    found = tuple(sorted(sources.index(source) + 1 for source in figure["sources"]))
    note = f"outside what was timed: {figure['note']}" if outside else figure["note"]
    return Cell("" if found else NO_SOURCE, note if figure["value"] is not None else "", sources=found)


def _rates(rates: Sequence[Data], sources: Sequence[str]) -> Table:
    """Prices and powers."""
    rows = tuple(_line(rate, Cell(rate["item"]), "", number, sources) for rate in rates)
    head = ("Price or power", "", "Value", "Range", "Kind", "Source and note")
    shown = tuple((row[0], *row[2:]) for row in rows)
    caption = "What seconds and bytes are turned into money and joules with; ranges are their sources' own"
    return Table(caption, (head[0], *head[2:]), shown, words=frozenset({0, 3, 4}))
