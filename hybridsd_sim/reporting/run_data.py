"""What each run did, tallied for a report: figures with reasons, latency curves, load over time, dollars by component.

Everything is plain data. A figure nobody knows is null beside a `note` that says why. Dollars and GPU-seconds by
component are those of the records, divided as the plan's own parts divide them, so that they sum to what was booked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsd_sim.estimate import Kind, weakest
from hybridsd_sim.reporting.labels import Data
from hybridsd_sim.scenario import ALL
from hybridsd_sim.simulation import SERVED, UNSERVED, column, judged, pool_table, student, utilisation_series

if TYPE_CHECKING:
    from hybridsd_sim.pricing import Candidate, Part, PlanCost
    from hybridsd_sim.reporting.breakdown import Rate
    from hybridsd_sim.simulation import SimResult


SERIES_BINS = 60

CURVE_POINTS = 121

SIMULATED: Kind = "modelled"
"""Kind of what a simulation says, however well its step times are known."""

IDLE, TRANSFER, HANDOVER, UNSPLIT = "idle or not counted", "transfer", "hand-over", "not broken down"

COMPONENTS = {
    "text_encode": "text encoder",
    "denoise_warmup": "denoising, warm-up steps",
    "denoise": "denoising",
    "vae_decode": "VAE decoder",
    "model_load": "model load",
}
"""What a part is called where parts are added up; every other cloud part belongs to the hand-over."""


def tally(name: str, result: SimResult, chosen: Sequence[Candidate], rates: Mapping[str, Rate]) -> Data:
    """One run as plain data; `chosen` are the candidates of the plan that it followed, if any.

    `summary` has the figures by class and for `all`, `pools` those by pool; `latency` each class's curve of the share
    served within x seconds; `series` busy share and queue over time; `components` US$ and GPU-seconds an image;
    `unserved` what was turned away, by class and reason; `kinds` how well the step times behind it are known.
    """
    known = {(option.request_class, option.plan.label): option for option in (*result.used.values(), *chosen)}
    rent_kind = weakest(rates[pool].figure.kind for pool, nodes in result.replicas.items() if nodes and pool in rates)
    pools = pool_table(result.scenario, result.policy, result.replications, result.replicas)
    return {
        "name": name,
        "policy": result.policy,
        "replications": len(result.replications),
        "replicas": dict(result.replicas),
        "usd_per_hour": result.usd_per_hour,
        "verdict": [{"name": f.name, "ok": f.ok, "reason": f.reason} for f in result.verdict.findings],
        "summary": _summary(result, known, rent_kind),
        # how many GPUs there are is a decision; what they did was simulated
        "pools": [
            {"pool": row["pool"]}
            | {
                key: {**figure, "kind": "" if key == "gpus" else SIMULATED}
                for key, figure in _tidy(row, pools.attrs["units"])
            }
            for row in pools.reset_index().to_dict("records")
        ],
        "latency": {cls: curve for cls in result.scenario.requests if (curve := _curve(result, cls))},
        "series": list(_series(result)),
        "components": list(_components(result, known)),
        "unserved": _unserved(result),
        "kinds": sorted(
            {part.seconds.kind for option in known.values() for part in option.cost.parts if part.seconds.value > 0}
        ),
    }


def _summary(
    result: SimResult, known: Mapping[tuple[str, str], Candidate], rent_kind: Kind
) -> dict[str, dict[str, Data]]:
    """Per class and for all: quantity to value, interval, unit, kind and, where something is not known, the reason."""
    frame = result.summary.reset_index()
    units = result.summary.attrs["units"]
    rows: dict[str, dict[str, Data]] = {}
    for row in frame.to_dict("records"):
        cls = str(row["request_class"])
        costs = [option.cost for (owner, _), option in known.items() if cls in (ALL, owner)]
        kinds = {"quality_mean": weakest(cost.quality.clip.kind for cost in costs), "rent_usd_per_hour": rent_kind}
        served = float(row.get("served", 1))
        rows[cls] = {}
        for key, figure in _tidy(row, units):
            figure["kind"] = kinds.get(key, SIMULATED)
            ends = [end for end in ("low", "high") if figure[end] is not None and not math.isfinite(figure[end])]
            if not math.isfinite(figure["value"]):
                figure["note"] = _explain_unknown(key, cls, costs, served)
            elif ends:
                figure["note"] = f"the run is too short to tell the {' and the '.join(ends)} end of the interval"
            rows[cls][key] = figure
    return rows


def _tidy(row: Mapping[Any, Any], units: Mapping[str, str]) -> Iterator[tuple[str, Data]]:
    """Columns `x`, `x_low`, `x_high` of a row folded into one figure each; text columns left out."""
    bounds = {f"{key}{end}" for key in row for end in ("_low", "_high")}
    for key, value in row.items():
        if key in bounds or isinstance(value, str):
            continue
        whole = isinstance(value, int | np.integer)
        figure = {"value": int(value) if whole else float(value), "low": None, "high": None, "unit": units[key]}
        yield key, figure | {end: float(row[f"{key}_{end}"]) for end in ("low", "high") if f"{key}_{end}" in row}


def _explain_unknown(key: str, cls: str, costs: Sequence[PlanCost], served: float) -> str:
    """Why a figure of a class is not known: what the plans behind it do not know, or the run cannot tell."""
    if key.startswith("rent_"):
        return "no price for a rented pool" if cls == ALL else "the classes share the nodes"
    if not served:
        return "no request was served"
    if key.startswith("quality"):
        return _first(cost.quality.clip.note for cost in costs if not cost.quality.clip.known)
    if "energy" in key:
        return _first(part.unknown for part in _all_parts(costs) if part.energy_j is None)
    if "usd" in key:
        return _first(part.unknown for part in _all_parts(costs) if part.usd is None)
    return "not estimable from this run"


def _first(notes: Iterator[str]) -> str:
    return next((note for note in notes if note), "nobody knows it for this plan")


def _all_parts(costs: Sequence[PlanCost]) -> Iterator[Part]:
    return (part for cost in costs for part in cost.parts)


def _curve(result: SimResult, cls: str) -> Data | None:
    """Share of a class's requests served within x seconds, with a 95% band from batches of the run.

    The denominator counts as SLO attainment does: served, unserved, and in flight past their deadline.
    """
    scenario = result.scenario
    batches = list(_batches(result, list(scenario.requests).index(cls)))
    everything = np.sort(np.concatenate([latency for latency, _ in batches])) if batches else np.empty(0)
    if not len(everything):
        return None
    grid = np.unique(np.quantile(everything, np.linspace(0.0, 1.0, CURVE_POINTS)))
    counted = sum(count for _, count in batches)
    share = np.searchsorted(everything, grid, side="right") / counted
    each = np.array([np.searchsorted(np.sort(lat), grid, side="right") / count for lat, count in batches if count])
    # half of the 95% Student interval of the mean; nothing is known of it with fewer than two batches
    half = student(len(each) - 1) * each.std(axis=0, ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return {"latency_s": grid, "share": share, "low": np.clip(share - half, 0, 1), "high": np.clip(share + half, 0, 1)}


def _batches(result: SimResult, class_index: int) -> Iterator[tuple[np.ndarray, int]]:
    """(Latencies of the served, requests counted) per replication, or per time batch below five replications."""
    start, end = result.scenario.warmup_s, result.scenario.horizon_s
    pieces = 1 if len(result.replications) >= 5 else 20 if len(result.replications) == 1 else 10
    edges = np.linspace(start, end, pieces + 1)
    for records in result.replications:
        rows = records.rows()
        which = np.flatnonzero(column(rows, "class_index") == class_index)
        arrival, status = column(rows, "arrival_s")[which], column(rows, "status")[which]
        latency = column(rows, "finish_s")[which] - arrival
        counted = judged(status, column(rows, "deadline_s")[which], end)
        for first, last in pairwise(np.searchsorted(arrival, edges)):
            served = status[first:last] == SERVED
            yield latency[first:last][served], int(counted[first:last].sum())


def _series(result: SimResult) -> Iterator[Data]:
    """Busy share and queue length of each rented pool over time: mean and range of the replications."""
    for index, (name, pool) in enumerate(result.scenario.pools.items()):
        gpus = result.replicas.get(name, 0) * pool.gpus_per_node
        if not gpus:
            continue
        runs = [
            utilisation_series(records, index, gpus, result.scenario.horizon_s, SERIES_BINS)
            for records in result.replications
        ]
        yield {
            "pool": name, "gpus": gpus, "time_s": runs[0][0],
            "busy": _range(np.array([run[1] for run in runs])), "queue": _range(np.array([run[2] for run in runs])),
        }  # fmt: skip


def _range(each: np.ndarray) -> Data:
    return {"value": each.mean(axis=0), "low": each.min(axis=0), "high": each.max(axis=0)}


def _components(result: SimResult, known: Mapping[tuple[str, str], Candidate]) -> Iterator[Data]:
    """Dollars and GPU-seconds an image by component, per class and for all; the idle rent comes last.

    That is the rent which no counted image bears: of idle nodes, and of requests from before or beyond the counted
    time.
    """
    scenario = result.scenario
    totals: dict[tuple[str, str], np.ndarray] = {}
    images = dict.fromkeys([*scenario.requests, ALL], 0.0)
    for cls, label, count, booked in _booked(result):
        option = known.get((cls, label))
        images[cls] += count * scenario.requests[cls].num_images
        for name, figures in _split(option, booked):
            for owner in (cls, ALL):
                totals[owner, name] = totals.get((owner, name), np.zeros(2)) + figures
    images[ALL] = sum(images.values())
    for (owner, name), (usd, gpu_s) in totals.items():
        if usd or gpu_s or math.isnan(usd):
            yield {
                "request_class": owner,
                "component": name,
                "usd": usd / images[owner],
                "gpu_seconds": gpu_s / images[owner],
            }
    gpus = sum(result.replicas.get(name, 0) * pool.gpus_per_node for name, pool in scenario.pools.items())
    if gpus and images[ALL]:
        seconds = (scenario.horizon_s - scenario.warmup_s) * len(result.replications)
        rent = math.nan if result.usd_per_hour is None else result.usd_per_hour * seconds / 3600
        on_gpus = [value for (owner, name), value in totals.items() if owner == ALL and name != TRANSFER]
        usd, gpu_s = np.maximum(0.0, np.array([rent, gpus * seconds]) - sum(on_gpus, np.zeros(2))) / images[ALL]
        yield {"request_class": ALL, "component": IDLE, "usd": usd, "gpu_seconds": gpu_s}


def _booked(result: SimResult) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """Per (class, plan) that served: class, label, requests, and (dollars, GPU-seconds, GPU-seconds of loading)."""
    for records in result.replications:
        rows = records.rows()
        counted = (column(rows, "status") == SERVED) & (column(rows, "arrival_s") >= result.scenario.warmup_s)
        codes = np.where(counted, column(rows, "plan_index") * len(records.classes) + column(rows, "class_index"), -1)
        load = np.nan_to_num(column(rows, "model_load_s")) * column(rows, "degree") / column(rows, "batch_size")
        for code in np.unique(codes[counted]):
            index, cls = divmod(int(code), len(records.classes))
            mine = codes == code
            sums = [column(rows, "usd")[mine].sum(), column(rows, "gpu_seconds")[mine].sum(), load[mine].sum()]
            yield records.classes[cls], records.plans[index], int(mine.sum()), np.array(sums)


def _split(option: Candidate | None, booked: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What was booked, divided as the plan's own parts divide it; loads as the records have them."""
    usd, gpu_s, load_s = booked
    if option is None:
        yield UNSPLIT, np.array([usd, gpu_s])
        return
    cost = option.cost
    cloud = [part.usd for part in cost.parts if part.tier == "cloud"]
    priced = [usd for usd in cloud if usd is not None]
    # dollars of a GPU-second; NaN if nobody knows them
    rate = sum(priced) / (cost.gpu_seconds or 1.0) if len(priced) == len(cloud) else math.nan
    yield COMPONENTS["model_load"], np.array([load_s * rate, load_s])
    for part in cost.parts:
        held_s = part.seconds.value * part.devices if part.tier == "cloud" else 0.0
        share_usd, share_s = _over(part.usd, cost.usd), _over(held_s, cost.gpu_seconds)
        name = TRANSFER if part.tier == "network" else COMPONENTS.get(part.name, HANDOVER)
        if part.tier != "edge":
            yield name, np.array([share_usd * (usd - load_s * rate), share_s * (gpu_s - load_s)])


def _over(part: float | None, total: float | None) -> float:
    if part is None or total is None:
        return math.nan
    return part / total if total else 0.0


def _unserved(result: SimResult) -> list[list[Any]]:
    """[class, reason, requests] of what was turned away after the warm-up."""
    counts: dict[tuple[str, str], int] = {}
    for records in result.replications:
        rows = records.rows()
        rows = rows[(column(rows, "status") == UNSERVED) & (column(rows, "arrival_s") >= result.scenario.warmup_s)]
        codes = column(rows, "class_index") * len(records.reasons) + column(rows, "reason")
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            cls, reason = divmod(int(code), len(records.reasons))
            key = (records.classes[cls], records.reasons[reason])
            counts[key] = counts.get(key, 0) + int(count)
    return [[*key, count] for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
