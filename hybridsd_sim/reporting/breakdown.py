"""How well each plan's numbers are known: its parts with interval, kind and sources, their sums, the rates behind them.

The first half makes plain data from costs and profiles (`breakdowns`, `rates_of`), the second the section of a page
that shows it (`provenance_blocks`). The ends of a total's interval are the sums of its parts' ends, as if all parts
erred the same way: parts of one device do, and where they do not the interval is too wide rather than too narrow. A
total is of the weakest kind among the parts that make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from hybridsd_sim.estimate import (
    DASH,
    KIND_ORDER,
    NAN,
    Estimate,
    Kind,
    Show,
    interval,
    money,
    number,
    percent,
    score,
    weakest,
)
from hybridsd_sim.plan import Site
from hybridsd_sim.reporting.blocks import MARKS, Block, Cell, Fold, Heading, Paragraph, Picture, Table, ranged
from hybridsd_sim.reporting.labels import PARTS, Data, interval_line, listed, reach

if TYPE_CHECKING:
    from hybridsd_sim.pricing import Part, PlanCost
    from hybridsd_sim.profiles import Price, Profiles


EGRESS = "network"
"""Stands for the way down to the edge, which is paid by the byte."""

OWN = "the scenario's own figure"

OVER_USERS = "at the network's median rates; the interval spans users and moments"
"""What the interval of a transfer says: not how well it is known, but how users and moments differ."""

TIE = "\N{NO-BREAK SPACE}"

SHOWN: Mapping[str, Show] = {"quality_clip": score, "quality_lpips": score, "metered_usd_per_image": money}
"""How totals are written that are no plain numbers."""

NO_SOURCE = "this model's own rule"

TWO_INTERVALS = (
    "A 90% interval says how well a time is known. The 95% intervals of simulated figures say only what chance does in "
    "the run, with these times taken as they stand. The same stands in parts.csv, a figure a line."
)


@dataclass(frozen=True, slots=True)
class Rate:
    """A price or a power: `figure` in `unit`, its interval the range that its source gives, NaN where it gives none.

    `where` is the site that it belongs to, `EGRESS` for what leaves the cloud.
    """

    where: str
    item: str
    unit: str
    figure: Estimate

    @property
    def reach(self) -> tuple[float, float]:
        """The ends of the range as shares of the value; 1 where there is no range."""
        value = self.figure.value
        if not value or not self.figure.known:
            return 1.0, 1.0
        low, high = (value if isnan(end) else end for end in self.figure.interval)
        return min(1.0, low / value), max(1.0, high / value)

    def to_dict(self) -> dict[str, Any]:
        """As reports save it: None for what is unknown."""
        figure = self.figure
        value, low, high = (None if isnan(each) else each for each in (figure.value, figure.low, figure.high))
        return {
            "where": self.where, "item": self.item, "value": value, "unit": self.unit, "low": low, "high": high,
            "kind": figure.kind, "sources": figure.sources, "note": figure.note,
        }  # fmt: skip


def rates_of(sites: Mapping[str, Site], profiles: Profiles) -> dict[str, Rate]:
    """The rate of each site by its name, and that of the way down to the edge."""
    rates = [(price_of if site.tier == "cloud" else power_of)(site, profiles) for site in sites.values()]
    egress = next((row for row in profiles.prices if row.item == "egress" and row.default), None)
    if egress is not None:
        rates.append(Rate(EGRESS, "GiB sent to the edge", "US$", _listed_price(egress)))
    return {rate.where: rate for rate in rates}


def price_of(site: Site, profiles: Profiles) -> Rate:
    """US$ per GPU-hour of a cloud site: the scenario's own price, else the catalogue's."""
    item, unit = f"GPU-hour of {site.name} ({site.device}, {site.purchase.replace('_', ' ')})", "US$"
    if site.usd_per_device_hour is not None:
        return Rate(site.name, item, unit, Estimate(site.usd_per_device_hour, kind="quoted", sources=(OWN,)))
    row = profiles.gpu_price(site.device, site.purchase, site.provider)
    if row is None:
        return Rate(site.name, item, unit, Estimate.unknown(f"no {site.purchase} price for {site.device}"))
    return Rate(site.name, item, unit, _listed_price(row))


def _listed_price(row: Price) -> Estimate:
    low, high = (NAN if end is None else end for end in (row.low, row.high))
    note = "; ".join(filter(None, (row.provider, row.source_date, row.notes)))
    return Estimate(row.usd, low, high, row.kind, (row.source,), note)


def power_of(site: Site, profiles: Profiles) -> Rate:
    """Watts of an edge device while it generates: the scenario's own figure, else the catalogue's."""
    item = f"Power of {site.name} ({site.device})"
    if site.power_w is not None:
        return Rate(site.name, item, "W", Estimate(site.power_w, kind="quoted", sources=(OWN,)))
    device = profiles.edge_device(site.device)
    if device.power_w is None:
        return Rate(site.name, item, "W", Estimate.unknown(f"no power figure for {site.device}"))
    low, high = (NAN if end is None else end for end in (device.power_low_w, device.power_high_w))
    kind = device.power_kind or "modelled"
    return Rate(site.name, item, "W", Estimate(device.power_w, low, high, kind, (device.power_source,)))


def breakdowns(served: Iterable[tuple[str, str, PlanCost]], rates: Mapping[str, Rate]) -> list[Data]:
    """Every plan of every class once: the runs that follow it, its parts, its totals and its shares by kind.

    `served` names a run, a request class, and the cost of a plan by which that run serves the class.
    """
    found: dict[Any, Data] = {}
    for run, request_class, cost in served:
        key = request_class, cost.plan
        if key not in found:
            parts = []
            for part in cost.parts:
                seconds = part.seconds
                note = seconds.note or (OVER_USERS if part.tier == "network" and seconds.value else "")
                parts.append({
                    "component": part.name, "where": part.where, "value": seconds.value, "unit": "s",
                    "low": seconds.low, "high": seconds.high, "kind": seconds.kind, "sources": list(seconds.sources),
                    "note": note, "within": seconds.within, "critical": part.critical,
                })  # fmt: skip
            found[key] = {
                "runs": [],
                "request_class": request_class,
                "label": cost.plan.label,
                "parts": parts,
                "totals": list(_totals(cost, rates)),
                "shares": shares(cost.parts),
            }
        if run not in found[key]["runs"]:
            found[key]["runs"].append(run)
    return list(found.values())


def shares(parts: Sequence[Part]) -> dict[Kind, float]:
    """How much of the latency is of each kind; they sum to 1 unless nothing takes time.

    Only parts on the critical path count: those beside it take no time of the user's.
    """
    critical = [part.seconds for part in parts if part.critical]
    total = sum(seconds.value for seconds in critical) or 1.0
    return {kind: sum(seconds.value for seconds in critical if seconds.kind == kind) / total for kind in KIND_ORDER}


def _totals(cost: PlanCost, rates: Mapping[str, Rate]) -> Iterator[Data]:
    """Latency, US$ and joules an image, then what the pictures are worth.

    Dollars are the pool's price for the seconds of its worker group and what is sent to the edge, joules the device's
    power for the seconds in which it works. The CLIP score, or why nobody knows it, is always there, others where
    known.
    """
    critical = [part.seconds for part in cost.parts if part.critical]
    kind = weakest(seconds.kind for seconds in critical if seconds.value > 0)
    timed_by = [seconds.sources for seconds in critical]
    yield _total("latency_s", cost.latency_s, "s", cost.latency_interval_s, kind, timed_by)
    images = cost.request.num_images
    charged = [(part, part.usd, rates.get(EGRESS if part.tier == "network" else part.where)) for part in cost.parts]
    yield _product("metered_usd_per_image", "US$", charged, images, "nothing is paid for")
    spent = [(part, part.energy_j, rates.get(part.where)) for part in cost.parts]
    yield _product("edge_energy_j_per_image", "J", spent, images, "nothing runs at the edge")
    clip, fid, lpips = cost.quality.clip, cost.quality.fid, cost.quality.lpips
    for name, unit, found in (("clip", "CLIP", clip), ("fid", "FID", fid), ("lpips", "LPIPS", lpips)):
        if found.known or found is clip:
            figures = (found.value_or_none, unit, found.interval_or_none, found.kind, [found.sources], found.note)
            yield _total(f"quality_{name}", *figures)


def _product(
    name: str, unit: str, amounts: Sequence[tuple[Part, float | None, Rate | None]], images: int, if_none: str
) -> Data:
    """A sum of seconds times rates: both have a range and a kind. Bytes are known, so that only their rate counts."""
    some = [(part, amount, rate) for part, amount, rate in amounts if amount != 0]
    missing = [part.unknown or (rate.figure.note if rate else "") for part, amount, rate in some if amount is None]
    ends = [0.0, 0.0]
    for part, amount, rate in some:
        far, seconds = (rate.reach if rate else (1.0, 1.0)), part.seconds
        if part.tier != "network" and seconds.value:
            far = (far[0] * seconds.low / seconds.value, far[1] * seconds.high / seconds.value)
        for side, share in enumerate(far):
            ends[side] += share * (amount or 0.0) / images
    kinds = [part.seconds.kind for part, *_ in some if part.tier != "network"]
    kinds += [rate.figure.kind for *_, rate in some if rate]
    sources = [(*part.seconds.sources, *(rate.figure.sources if rate else ())) for part, _, rate in some]
    value = None if missing else sum(amount or 0.0 for _, amount, _ in some) / images
    note = "; ".join(dict.fromkeys(filter(None, missing))) if missing else "" if some else if_none
    return _total(name, value, unit, None if missing else (ends[0], ends[1]), weakest(kinds), sources, note)


def _total(
    name: str, value: float | None, unit: str, ends: tuple[float, float] | None, kind: Kind,
    sources: Sequence[tuple[str, ...]], note: str = "",
) -> Data:  # fmt: skip
    low, high = ends or (None, None)
    said = list(dict.fromkeys(source for each in sources for source in each))
    return {
        "figure": name, "value": value, "low": low, "high": high, "unit": unit, "kind": kind, "sources": said,
        "note": note,
    }  # fmt: skip


def sources_of(data: Data) -> tuple[str, ...]:
    """Every source behind the plans, the rates and the calibration once, in the order of the page.

    A source's number on the page is its position here, from 1.
    """
    figures = [figure for plan in data["plans"] for figure in (*plan["parts"], *plan["totals"])]
    fits = (*data["calibration"], *data["constants"])
    return tuple(dict.fromkeys(source for each in (*figures, *data["rates"], *fits) for source in each["sources"]))


def provenance_blocks(data: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The section that tells which numbers are measured, quoted or modelled, and how wide each is."""
    mine = [plan for plan in data["plans"] if data["runs"][0]["name"] in plan["runs"]]
    shown = mine if data["kind"] == "plan" else []
    sources = sources_of(data)
    yield Heading("How these numbers are known", "known")
    for plan in shown:
        total, far = plan["totals"][0], reach(plan["totals"][0])
        made_of = listed([f"{percent(share)} {kind}" for kind, share in plan["shares"].items() if share]) or "nothing"
        width = f"{interval(total['low'], total['high'])} s at 90%" + (f" ({far})" if far else "")
        latency = f"{plan['request_class']}: {number(total['value'])} s on an idle fleet"
        yield Paragraph(f"{latency}, {width}; {made_of}.", "lead")
    yield Paragraph(_count_figures(mine, data["rates"], data["runs"][0]["name"]))
    yield Paragraph(TWO_INTERVALS, "note")
    rows: list[tuple[Cell, ...]] = []
    for plan in data["plans"]:
        name = Cell(plan["request_class"], ", ".join(plan["runs"]))
        by_kind = (Cell(percent(share)) for share in plan["shares"].values())
        rows.append((name, Cell(plan["label"]), ranged(plan["totals"][0]), *by_kind))
    head = ("Request class", "Plan", "Idle latency (s)", *(f"{MARKS[kind]}{TIE}{kind}" for kind in MARKS))
    caption = "How much of each plan's idle latency is known in which way; beneath a latency its 90% interval"
    yield Table(caption, head, tuple(rows), words=frozenset({0, 1}))
    yield from (picture for picture in pictures if picture.name == "known")
    yield Heading("Part by part", "parts", 3)
    for plan in data["plans"]:
        whose = f"{', '.join(plan['runs'])}, {plan['request_class']}: {plan['label']}"
        yield Fold(whose, (_parts(plan, sources),), opened=plan in shown)
    yield Heading("Prices and powers", "rates", 3)
    rows = []
    for rate in data["rates"]:
        item, _, *rest = _line(rate, Cell(rate["item"]), "", money if rate["unit"] == "US$" else number, sources)
        rows.append((item, *rest))
    head = ("Price or power", "Value", "Range", "Kind", "Source and note")
    caption = "What seconds and bytes are turned into money and joules with; ranges are their sources' own"
    yield Table(caption, head, tuple(rows), words=frozenset({0, 3, 4}))


def _count_figures(plans: Sequence[Data], rates: Sequence[Data], run: str) -> str:
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


def _parts(plan: Data, sources: Sequence[str]) -> Table:
    """Every part of a plan, then what they sum to."""
    steady = any(part["component"] == "denoise_warmup" for part in plan["parts"])
    rows = []
    for part in plan["parts"]:
        name = PARTS.get(part["component"], part["component"].replace("_", " "))
        name += ", steady steps" if steady and part["component"] == "denoise" else ""
        beside = "" if part["critical"] else "beside the cloud's work: not in the latency"
        outside = not part["within"]
        rows.append(_line(part, Cell(name, beside), part["where"], number, sources, outside=outside))
    totals = [
        _line(total, Cell(PARTS[total["figure"]]), "", SHOWN.get(total["figure"], number), sources)
        for total in plan["totals"]
    ]
    head = ("Part", "Where", "Value", "90% interval", "Kind", "Source and note")
    strong = frozenset(range(len(rows), len(rows) + len(totals)))
    return Table(
        "Parts of one request on an idle fleet, and what they sum to",
        head,
        (*rows, *totals),
        strong=strong,
        words=frozenset({0, 1, 4, 5}),
    )


def _line(
    figure: Data, name: Cell, where: str, show: Show, sources: Sequence[str], *, outside: bool = False
) -> tuple[Cell, ...]:
    """A figure with its interval, kind, sources and note; without a value, a dash and the reason."""
    grounds = tuple(sorted(sources.index(source) + 1 for source in figure["sources"]))
    if figure["value"] is None:
        dash, blank = Cell(DASH, figure["note"] or "not known"), Cell("")
        return name, Cell(where), dash, blank, blank, Cell("" if grounds else NO_SOURCE, "", sources=grounds)
    note = f"outside what was timed: {figure['note']}" if outside else figure["note"]
    ends = Cell(interval_line(figure, show) or show(figure["value"]), reach(figure))
    if figure["low"] is None and figure["high"] is None:
        ends = Cell("none given")
    return (
        name,
        Cell(where),
        Cell(f"{show(figure['value'])} {figure['unit']}"),
        ends,
        Cell(figure["kind"], kind=figure["kind"]),
        Cell("" if grounds else NO_SOURCE, note, sources=grounds),
    )
