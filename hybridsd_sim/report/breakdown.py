"""What each plan takes, part by part, and how well each part is known: interval, kind, sources, and what they sum to.

The ends of a total's interval are the sums of its parts' ends, as if all parts erred the same way: parts of one device
do, and where they do not the interval is too wide rather than too narrow. A total is of the weakest kind among the
parts that make it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridsd_sim.plan import KIND_ORDER, Kind
from hybridsd_sim.quality import score_interval
from hybridsd_sim.report.rates import EGRESS, Rate

if TYPE_CHECKING:
    from hybridsd_sim.cost import Part, PlanCost

Data = dict[str, Any]
OVER_USERS = "at the network's median rates; the interval spans users and moments"
"""What the interval of a transfer is: not doubt, but who asks and when."""


def breakdowns(served: Iterable[tuple[str, str, PlanCost]], rates: Mapping[str, Rate]) -> list[Data]:
    """Every plan of every class once: the runs that follow it, its parts, its totals and its shares by kind.

    `served` names a run, a request class, and the cost of a plan by which that run serves the class.
    """
    found: dict[Any, Data] = {}
    for run, request_class, cost in served:
        key = request_class, cost.plan
        if key not in found:
            found[key] = {"runs": [], "request_class": request_class, **_breakdown(cost, rates)}
        if run not in found[key]["runs"]:
            found[key]["runs"].append(run)
    return list(found.values())


def _breakdown(cost: PlanCost, rates: Mapping[str, Rate]) -> Data:
    return {
        "label": cost.plan.label,
        "parts": [_part(part) for part in cost.parts],
        "totals": [_latency(cost), _money(cost, rates), _energy(cost, rates), *_scores(cost)],
        "shares": shares(cost.parts),
    }


def _part(part: Part) -> Data:
    figures = {"component": part.name, "where": part.where, "value": part.seconds, "unit": "s"}
    bounds = {"low": part.low_s, "high": part.high_s, "kind": part.kind, "sources": list(part.sources)}
    note = part.note or (OVER_USERS if part.tier == "network" and part.seconds else "")
    return {**figures, **bounds, "note": note, "within": part.within, "critical": part.critical}


def shares(parts: Sequence[Part]) -> dict[Kind, float]:
    """How much of the latency is of each kind; they sum to 1 unless nothing takes time."""
    critical = [part for part in parts if part.critical]
    total = sum(part.seconds for part in critical) or 1.0
    return {kind: sum(part.seconds for part in critical if part.kind == kind) / total for kind in KIND_ORDER}


def weakest(kinds: Iterable[Kind]) -> Kind:
    """The least known of these kinds; modelled where there is none."""
    return max(kinds, key=KIND_ORDER.__getitem__, default="modelled")


def _latency(cost: PlanCost) -> Data:
    critical = [part for part in cost.parts if part.critical]
    kind = weakest(part.kind for part in critical if part.seconds > 0)
    ends, sources = cost.latency_interval_s, [part.sources for part in critical]
    return _total("latency_s", cost.latency_s, "s", ends, kind, sources)


def _money(cost: PlanCost, rates: Mapping[str, Rate]) -> Data:
    """US$ an image: the pool's price for the seconds of its gang, and what is sent to the edge."""
    charged = [(part, part.usd, rates.get(EGRESS if part.tier == "network" else part.where)) for part in cost.parts]
    return _product("metered_usd_per_image", "US$", charged, cost.request.num_images, "nothing is paid for")


def _energy(cost: PlanCost, rates: Mapping[str, Rate]) -> Data:
    """Joules an image: the device's power for the seconds in which it works."""
    spent = [(part, part.energy_j, rates.get(part.where)) for part in cost.parts]
    return _product("edge_energy_j_per_image", "J", spent, cost.request.num_images, "nothing runs at the edge")


def _product(
    name: str, unit: str, amounts: Sequence[tuple[Part, float | None, Rate | None]], images: int, if_none: str
) -> Data:
    """A sum of seconds times rates: both have a range and a kind. Bytes are known, so that only their rate counts."""
    some = [(part, amount, rate) for part, amount, rate in amounts if amount != 0]
    missing = [part.unknown or (rate.note if rate else "") for part, amount, rate in some if amount is None]
    ends = [0.0, 0.0]
    for part, amount, rate in some:
        for side, share in enumerate(_reach(part, rate)):
            ends[side] += share * (amount or 0.0) / images
    kinds = [part.kind for part, *_ in some if part.tier != "network"] + [rate.kind for *_, rate in some if rate]
    sources = [(*part.sources, *(rate.sources if rate else ())) for part, _, rate in some]
    value = None if missing else sum(amount or 0.0 for _, amount, _ in some) / images
    note = "; ".join(dict.fromkeys(filter(None, missing))) if missing else "" if some else if_none
    return _total(name, value, unit, None if missing else (ends[0], ends[1]), weakest(kinds), sources, note)


def _reach(part: Part, rate: Rate | None) -> tuple[float, float]:
    """The ends of a part's dollars or joules as shares of their middle."""
    low, high = rate.reach if rate else (1.0, 1.0)
    if part.tier == "network" or not part.seconds:
        return low, high
    return low * part.low_s / part.seconds, high * part.high_s / part.seconds


def _scores(cost: PlanCost) -> Iterator[Data]:
    """What the pictures are worth: the CLIP score, or why nobody knows it; other scores where somebody does."""
    quality = cost.quality
    ends = score_interval("clip", quality.clip, quality.kind)
    yield _total("quality_clip", quality.clip, "CLIP", ends, quality.kind, [quality.sources], quality.note)
    others = (("quality_fid", "FID", quality.fid_score), ("quality_lpips", "LPIPS", quality.lpips_score))
    for name, unit, score in others:
        if score.value is not None:
            ends = score_interval(unit.lower(), score.value, score.kind)
            yield _total(name, score.value, unit, ends, score.kind, [score.sources], score.note)


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
