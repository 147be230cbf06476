"""The chosen plan as a load test: what to send, when, and what the simulation expects to be measured.

The requests are those of the scenario's own first replication: a lead-in at the end of the warm-up, which fills the
service and is not counted, then a window long enough for every class that has an SLO to show its percentile. The script
that sends them, `load_test.py`, stands beside the data and needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsd_sim.load_test import FORMAT
from hybridsd_sim.metrics import ALL
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, stream

if TYPE_CHECKING:
    from hybridsd_sim.capacity import CapacityPlan
    from hybridsd_sim.scenario import RequestClass, Scenario

Data = dict[str, Any]
ENOUGH = 459
"""Requests of a class that show its 99th percentile: the largest of so many exceeds it 99 times in 100."""
MOST = 5000
"""Requests of a load test, lead-in and all."""
MOST_LEAD_IN = 1000
"""Requests of the lead-in, which are not counted."""
BODY = ("model", "height_px", "width_px", "num_inference_steps", "guidance_scale", "num_images", "sampler")
EXPECTED = (
    "latency_p50_s", "latency_p95_s", "latency_p99_s", "latency_mean_s", "slo_attainment", "served_per_s",
)  # fmt: skip


def load_of(plan: CapacityPlan) -> Data:
    """What `load_test.json` holds; the same plan gives the same data. No requests where none arrive."""
    scenario = plan.scenario
    drawn = _drawn(scenario)
    first, counted, last = _window(scenario, drawn)
    origin_s = float(drawn.arrival_s[first]) if len(drawn) else 0.0
    from_s = float(drawn.arrival_s[counted]) - origin_s if counted < last else 0.0
    return {
        "format": FORMAT,
        "scenario": scenario.name,
        "scenario_digest": scenario.digest,
        "feasible": plan.feasible,
        "count_from_s": round(from_s, 6),
        "bodies": {name: {key: getattr(spec, key) for key in BODY} for name, spec in scenario.requests.items()},
        "expected": _expected(plan),
        "too_few": _too_few(scenario, drawn.class_index[counted:last]),
        "requests": _requests(scenario, drawn.take(slice(first, last)), origin_s),
    }


def _drawn(scenario: Scenario) -> ArrivalChunk:
    """The arrivals of the first replication, as far as a load test can need them."""
    chunks, after = [], 0
    for chunk in arrival_chunks(scenario, 0):
        chunks.append(chunk)
        after += int((chunk.arrival_s >= scenario.warmup_s).sum())
        if after >= MOST:
            break
    if not chunks:
        empty = np.empty(0)
        return ArrivalChunk(empty, *(empty.astype(np.int16),), *(empty,) * 3, *(empty.astype(np.int16),) * 3)
    columns = ArrivalChunk.__dataclass_fields__
    return ArrivalChunk(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in columns))


def _window(scenario: Scenario, drawn: ArrivalChunk) -> tuple[int, int, int]:
    """Positions of the first request to send, of the first to count, and after the last."""
    counted = int(np.searchsorted(drawn.arrival_s, scenario.warmup_s))
    first = max(0, counted - MOST_LEAD_IN)
    most = min(len(drawn), first + MOST)
    promised = [n for n, spec in enumerate(scenario.requests.values()) if spec.slo_s is not None]
    last = counted
    for index in promised or range(len(scenario.requests)):
        mine = counted + np.flatnonzero(drawn.class_index[counted:] == index)
        last = max(last, int(mine[ENOUGH - 1]) + 1 if len(mine) >= ENOUGH else most)
    return first, counted, min(last, most)


def _too_few(scenario: Scenario, counted: np.ndarray) -> dict[str, int]:
    """Classes with an SLO of which too few requests are counted to show their percentile, and how many are."""
    found = np.bincount(counted, minlength=len(scenario.requests)).tolist()
    specs = zip(scenario.requests.items(), found, strict=True)
    return {name: count for (name, spec), count in specs if spec.slo_s is not None and count < ENOUGH}


def _requests(scenario: Scenario, drawn: ArrivalChunk, origin_s: float) -> list[Data]:
    """Each request in order: when it is sent, its class, a seed of its own, and what it asks unlike its class."""
    classes = list(scenario.requests.items())
    seeds = stream(scenario.seed, 0, "load test").integers(2**31, size=len(drawn)).tolist()
    found = []
    for row, seed in zip(zip(*_columns(drawn), strict=True), seeds, strict=True):
        arrival_s, index, base_model, images, steps = row
        name, spec = classes[index]
        request = {"arrival_s": round(arrival_s - origin_s, 6), "request_class": name, "seed": seed}
        found.append(request | _unlike(spec, base_model, images, steps))
    return found


def _columns(drawn: ArrivalChunk) -> list[list[Any]]:
    names = ("arrival_s", "class_index", "base_model", "num_images", "num_inference_steps")
    return [getattr(drawn, name).tolist() for name in names]


def _unlike(spec: RequestClass, base_model: int, images: int, steps: int) -> Data:
    """What a request of a trace asks for that its class does not."""
    asked = {"base_model": (base_model, 0), "num_images": (images, spec.num_images)}
    asked["num_inference_steps"] = (steps, spec.num_inference_steps)
    return {key: value for key, (value, own) in asked.items() if value != own}


def _expected(plan: CapacityPlan) -> Data:
    """What the confirmed simulation says of every class and of all, with 95% intervals, and what is promised."""
    rows = plan.chosen_result.summary.droplevel(0).to_dict("index")
    found = {}
    for name in (*plan.scenario.requests, ALL):
        spec = plan.scenario.requests.get(name)
        promised = {"slo_s": spec.slo_s, "slo_percentile": spec.slo_percentile} if spec else {"slo_s": None}
        found[name] = promised | {key: _figure(rows[name], key) for key in EXPECTED}
    return found


def _figure(row: Mapping[Any, Any], key: str) -> dict[str, float | None]:
    ends = {end: float(row[key + tail]) for end, tail in (("value", ""), ("low", "_low"), ("high", "_high"))}
    return {end: value if math.isfinite(value) else None for end, value in ends.items()}
