"""What machines read of a result: CSV tables, the requests as parquet, a timeline and a load test.

- `tables`: a figure a line, with interval, unit, kind and, where it is empty, the reason.
- `write_rows`, `first_rows`: a row per request of every run, written block by block.
- `trace`: the first requests of a run for Perfetto (https://ui.perfetto.dev): who held which GPU or device when. A
  process is a pool or an edge fleet, a thread one GPU or edge device; a worker group shows on every GPU it held.
  Format: Chrome trace events (Trace Event Format, Google, 2016); times in microseconds from the start of the run.
- `load_test_data`: the requests of the scenario's own first replication and what the simulation expects of them: a
  lead-in, which fills the service and is not counted, then a window long enough for every class with an SLO to show its
  percentile. The script that sends them, `load_test.py`, needs nothing else.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hybridsd_sim.reporting.labels import Data
from hybridsd_sim.reporting.load_test import ADMITTED, FORMAT
from hybridsd_sim.scenario import ALL
from hybridsd_sim.simulation import COLUMNS, INTEGER_COLUMNS, STATUS_NAMES, Records, column
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, stream

if TYPE_CHECKING:
    from hybridsd_sim.planning import CapacityPlan
    from hybridsd_sim.scenario import Scenario
    from hybridsd_sim.simulation import SimResult


FIGURE = ("value", "low", "high", "unit", "kind", "note")

WHOSE = ("device", "runtime", "precision")

TABLE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "summary.csv": ("policy", "request_class", "figure", *FIGURE),
    "pools.csv": ("policy", "pool", "figure", *FIGURE),
    "parts.csv": ("policy", "request_class", "plan", "figure", "where", "in_latency", *FIGURE, "sources"),
    "calibration.csv": (*WHOSE, "parameter", *FIGURE, "rows", "sources"),
    "calibration_rows.csv": (
        *WHOSE, "model", "height_px", "width_px", "latents", "published_s", "predicted_s", "log_ratio", "kind",
        "source", "source_date",
    ),
}  # fmt: skip
"""Columns of each table. `log_ratio` is the natural logarithm of predicted over published seconds."""

BLOCK_ROWS = 32768
"""Requests written at a time."""

MOST_REQUESTS = 2000
"""Requests of a timeline, first come first: about a megabyte, which the viewer opens at once."""

ENOUGH = 459
"""Requests of a class that show its 99th percentile: the largest of so many exceeds it 99 times in 100."""

MOST = 5000
"""Requests of a load test, lead-in and all."""

MOST_LEAD_IN = 1000
"""Requests of the lead-in, which are not counted."""

BODY = ("model", "height_px", "width_px", "num_inference_steps", "guidance_scale", "num_images", "sampler")
"""What a class of a load test posts with each of its requests."""

EXPECTED = (
    "latency_p50_s", "latency_p95_s", "latency_p99_s", "latency_mean_s", "slo_attainment", "served_per_s",
)  # fmt: skip

ENDS = (("value", ""), ("low", "_low"), ("high", "_high"))
"""A figure and the ends of its interval, with what their columns' names end in."""

Event = dict[str, Any]

Row = Mapping[str, Any]

Place = tuple[str, str]


def tables(data: Data) -> dict[str, bytes]:
    """Every table of a report by the name of its file, CSV in UTF-8; the same data give the same bytes.

    Numbers stand in full, so that they read back as they were; lists are joined by semicolons.
    """
    summary = (
        {"policy": run["name"], "request_class": name, "figure": key, **figure}
        for run in data["runs"]
        for name, row in run["summary"].items()
        for key, figure in row.items()
    )
    pools = (
        {"policy": run["name"], "pool": row["pool"], "figure": key, **figure}
        for run in data["runs"]
        for row in run["pools"]
        for key, figure in row.items()
        if key != "pool"
    )
    rows = ({**{key: fit[key] for key in WHOSE}, **row} for fit in data["calibration"] for row in fit["rows"])
    lines = (summary, pools, _parts(data), _parameters(data), rows)
    found = {}
    for (name, columns), each in zip(TABLE_COLUMNS.items(), lines, strict=True):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({key: "; ".join(v) if isinstance(v, list) else v for key, v in line.items()} for line in each)
        found[name] = text.getvalue().encode()
    return found


def _parts(data: Data) -> Iterator[Data]:
    """Every part and total of every plan, and the prices and powers behind them."""
    for plan in data["plans"]:
        whose = {"policy": "; ".join(plan["runs"]), "request_class": plan["request_class"], "plan": plan["label"]}
        for part in plan["parts"]:
            outside = "" if part["within"] else "outside what was timed"
            note = "; ".join(filter(None, (outside, part["note"])))
            yield {**whose, **part, "figure": part["component"], "in_latency": part["critical"], "note": note}
        yield from ({**whose, **total} for total in plan["totals"])
    for rate in data["rates"]:
        yield {**rate, "figure": rate["item"]}


def _parameters(data: Data) -> Iterator[Data]:
    """Every fitted parameter of every device, a line for a fit without any, then the constants that devices share."""
    for fit in data["calibration"]:
        whose = {**{key: fit[key] for key in (*WHOSE, "note", "sources")}, "rows": len(fit["rows"]), "kind": "modelled"}
        for parameter in fit["parameters"] or [{"name": "", "note": ""}]:
            yield {**whose, **parameter, "parameter": parameter["name"], "note": parameter["note"] or fit["note"]}
    for constant in data["constants"]:
        yield {**constant, "parameter": constant["name"], "kind": "modelled", "note": constant["meaning"]}


def write_rows(path: Path, runs: Mapping[str, SimResult]) -> None:
    """Write the requests of every run, in order of run, replication and arrival; a million need little memory."""
    blocks = (
        _table(records, records.rows()[first : first + BLOCK_ROWS], name)
        for name, result in runs.items()
        for records in result.replications
        for first in range(0, max(1, len(records)), BLOCK_ROWS)
    )
    writer = None
    try:
        for table in blocks:
            if writer is None:
                # Times compress best with their bytes sorted by significance, names as dictionaries.
                times = [field.name for field in table.schema if pa.types.is_floating(field.type)]
                names = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
                encoding = {"compression": "zstd", "use_dictionary": names, "use_byte_stream_split": times}
                writer = pq.ParquetWriter(path, table.schema, **encoding)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _table(records: Records, rows: np.ndarray, policy: str) -> Any:
    """A block of a replication: names for indexes, whole numbers for counts, the meaning of each column beside it."""
    same = {"policy": pa.array([policy], pa.string()), "replication": pa.array([records.replication], pa.int64())}
    columns = {name: pa.chunked_array([value.take(np.zeros(len(rows), np.int64))]) for name, value in same.items()}
    fields = [pa.field(name, value.type) for name, value in columns.items()]
    named = {
        "class_index": ("request_class", records.classes),
        "plan_index": ("plan", records.plans),
        "status": ("status", STATUS_NAMES),
        "reason": ("reason", records.reasons),
        "pool_index": ("pool", records.pools),
        "fleet_index": ("fleet", records.fleets),
    }
    for name, meaning in COLUMNS:
        values, label = column(rows, name), name
        if name in named:
            # Null for -1. Two plans may have one name, which is why this is no pandas category.
            label, names = named[name]
            codes = values.astype(np.int32)
            known = pa.array(list(names), pa.string())
            columns[label] = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), known).cast(pa.string())
        else:
            columns[label] = pa.array(values.astype(np.int64) if name in INTEGER_COLUMNS else values)
        fields.append(pa.field(label, columns[label].type, metadata={"meaning": meaning}))
    return pa.table(columns, schema=pa.schema(fields))


def first_rows(path: Path, most: int) -> list[dict[str, Any]]:
    """The first requests of the first replication of the first run, as mappings; NaN for times that do not apply.

    Reads no more than `most` rows of the file, however long it is; other columns without a value are None.
    """
    batch = next(pq.ParquetFile(path).iter_batches(batch_size=most), None)
    rows: list[dict[str, Any]] = [] if batch is None else batch.to_pylist()
    mine = [row for row in rows if (row["policy"], row["replication"]) == (rows[0]["policy"], rows[0]["replication"])]
    return [{key: math.nan if v is None and key.endswith("_s") else v for key, v in row.items()} for row in mine]


def trace(rows: Sequence[Row], gpus_per_node: Mapping[str, int], horizon_s: float) -> dict[str, Any]:
    """Trace events of the first requests in `rows` (the columns of `requests.parquet`, a mapping for each request).

    Slices (`X`) are the work on a GPU or an edge device, asynchronous pairs (`b`, `e`) the waits before it, flows (`s`,
    `f`) the hand-over from the cloud to the edge. What lasts beyond `horizon_s` ends there. Records name nodes, not
    GPUs: a request is shown on those of its node that were free first.
    """
    rows = rows[:MOST_REQUESTS]
    places = [(kind, name) for kind in ("pool", "fleet") for name in sorted({r[kind] for r in rows} - {None})]
    processes = {place: number for number, place in enumerate(places, 1)}
    events = [*_waits(rows, processes, horizon_s), *_cloud(rows, processes, gpus_per_node, horizon_s)]
    edge = []
    for row in rows:
        if row["fleet"] is not None and not math.isnan(row["edge_start_s"]) and row["edge_start_s"] < horizon_s:
            start, stop = _microseconds(row["edge_start_s"]), _microseconds(_end(row["edge_stop_s"], horizon_s))
            edge.append(_slice(row, processes["fleet", row["fleet"]], row["device"] + 1, start, stop))
    events += [*edge, *_arrows(events, rows, processes)]
    events.sort(key=lambda event: (event["ts"], event["pid"], event.get("tid", 0), -event.get("dur", 0)))
    names: list[Event] = []
    for (kind, name), pid in processes.items():
        title = f"{'edge fleet' if kind == 'fleet' else 'pool'} {name}"
        names.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": title}})
    for pid, tid in sorted({(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}):
        kind, name = places[pid - 1]
        size = gpus_per_node[name] if kind == "pool" else 1
        node, gpu = divmod(tid - 1, size)
        title = f"device {tid - 1}" if kind == "fleet" else f"node {node}" if size == 1 else f"node {node} GPU {gpu}"
        names.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": title}})
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *events]}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _end(value: float, horizon_s: float) -> float:
    return horizon_s if math.isnan(value) else min(value, horizon_s)


def _cloud(
    rows: Sequence[Row], processes: Mapping[Place, int], gpus_per_node: Mapping[str, int], horizon_s: float
) -> Iterator[Event]:
    """A slice on each GPU that a worker group held, the model load in the first one; a batch lies on the same GPUs."""
    free: dict[tuple[int, int], list[int]] = {}
    batches: dict[tuple[Any, ...], list[tuple[list[int], list[int]]]] = {}
    held = [row for row in rows if row["pool"] is not None and not math.isnan(row["cloud_start_s"])]
    for row in sorted(held, key=lambda row: (row["cloud_start_s"], row["request"])):
        pid, node, size = processes["pool", row["pool"]], row["node"], gpus_per_node[row["pool"]]
        start, stop = _microseconds(row["cloud_start_s"]), _microseconds(_end(row["cloud_stop_s"], horizon_s))
        slots = free.setdefault((pid, node), [0] * size)
        waiting = batches.setdefault((pid, node, start, stop, row["request_class"], row["plan"]), [])
        if waiting:
            mine, begins = waiting.pop()
        else:
            mine = sorted(range(size), key=lambda slot: (slots[slot] > start, slot))[: row["degree"]]
            begins = [max(start, slots[slot]) for slot in mine]
            waiting += [(mine, begins)] * (int(row.get("batch_size", 1)) - 1)
        for position, (slot, begin) in enumerate(zip(mine, begins, strict=True)):
            slots[slot] = max(start, stop, slots[slot])
            event = _slice(row, pid, node * size + slot + 1, begin, stop)
            yield event if position == 0 else {key: value for key, value in event.items() if key != "args"}
        if row["model_load_s"] > 0 and mine:
            load = min(_microseconds(row["model_load_s"]), stop - start)
            yield {
                "name": "model load",
                "ph": "X",
                "pid": pid,
                "tid": node * size + mine[0] + 1,
                "ts": start,
                "dur": load,
            }


def _slice(row: Row, pid: int, tid: int, start: int, stop: int) -> Event:
    latency_s = row["finish_s"] - row["arrival_s"]
    args = {
        "class": row["request_class"],
        "latency_s": None if math.isnan(latency_s) else round(latency_s, 6),
        "plan": row["plan"],
    }
    name = f"{row['request_class']} {row['request']}"
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": max(0, stop - start), "args": args}


def _waits(rows: Sequence[Row], processes: Mapping[Place, int], horizon_s: float) -> Iterator[Event]:
    """Waiting for GPUs or for the user's device, as pairs of begin and end."""
    for row in rows:
        for side, kind in (("cloud", "pool"), ("edge", "fleet")):
            ready = row[f"{side}_ready_s"]
            if row[kind] is None or math.isnan(ready) or ready >= horizon_s:
                continue
            begin, end = _microseconds(ready), _microseconds(_end(row[f"{side}_start_s"], horizon_s))
            if end > begin:
                pid = processes[kind, row[kind]]
                event = {"name": f"waiting {row['request']}", "cat": "wait", "id": row["request"], "pid": pid}
                yield {**event, "ph": "b", "ts": begin, "tid": 0}
                yield {**event, "ph": "e", "ts": end, "tid": 0}


def _arrows(events: list[Event], rows: Sequence[Row], processes: Mapping[Place, int]) -> Iterator[Event]:
    """An arrow from the end of the slice in the cloud, which is among `events`, to the start of the one at the edge."""
    tracks = {event["name"]: event["tid"] for event in events if "args" in event}
    for row in rows:
        if row["pool"] is None or row["fleet"] is None or math.isnan(row["edge_start_s"]):
            continue
        flow = {"name": "hand-over", "cat": "handover", "id": row["request"]}
        tid = tracks[f"{row['request_class']} {row['request']}"]
        leave, reach = _microseconds(row["cloud_stop_s"]) - 1, _microseconds(row["edge_start_s"])
        yield {**flow, "ph": "s", "pid": processes["pool", row["pool"]], "tid": tid, "ts": leave}
        yield {
            **flow,
            "ph": "f",
            "bp": "e",
            "pid": processes["fleet", row["fleet"]],
            "tid": row["device"] + 1,
            "ts": reach,
        }


def load_test_data(plan: CapacityPlan) -> Data:
    """What `load_test.json` holds; the same plan gives the same data. No requests where none arrive.

    `requests` are in order of `arrival_s`, in seconds from the first one sent; those before `count_from_s` fill the
    service and are not counted. `bodies` has what a class posts with each of them, `expected` the simulated figures
    with 95% intervals by class and for all, `too_few` the classes with an SLO of which fewer than 459 requests are
    counted.
    """
    scenario = plan.scenario
    sent, lead_in = _draw_requests(scenario)
    origin_s = float(sent.arrival_s[0]) if len(sent) else 0.0
    from_s = float(sent.arrival_s[lead_in]) - origin_s if lead_in < len(sent) else 0.0
    counts = np.bincount(sent.class_index[lead_in:], minlength=len(scenario.requests)).tolist()
    # too few for the percentile of a class with an SLO to show
    too_few = {
        name: count
        for (name, spec), count in zip(scenario.requests.items(), counts, strict=True)
        if spec.slo_s is not None and count < ENOUGH
    }
    figures = plan.chosen_result.summary.droplevel(0).to_dict("index")
    expected: dict[str, Data] = {}
    for name in (*scenario.requests, ALL):
        spec = scenario.requests.get(name)
        expected[name] = {"slo_s": spec.slo_s, "slo_percentile": spec.slo_percentile} if spec else {"slo_s": None}
        for key in EXPECTED:
            ends = {end: float(figures[name][key + tail]) for end, tail in ENDS}
            expected[name][key] = {end: value if math.isfinite(value) else None for end, value in ends.items()}
    return {
        "format": FORMAT,
        "scenario": scenario.name,
        "scenario_digest": scenario.digest,
        "feasible": plan.feasible,
        "count_from_s": round(from_s, 6),
        "bodies": {name: {key: getattr(spec, key) for key in BODY} for name, spec in scenario.requests.items()},
        "expected": expected,
        **({"promised_to": ADMITTED} if scenario.search.minimise == "turned_away_per_s" else {}),
        "too_few": too_few,
        "requests": _requests(scenario, sent, origin_s),
    }


def _draw_requests(scenario: Scenario) -> tuple[ArrivalChunk, int]:
    """The requests to send, from the first replication, and how many of them are the lead-in.

    The lead-in is the last of the warm-up. Then come as many as it takes for every class with an SLO (for every class
    where none has one) to show its percentile, if `MOST` are enough for that.
    """
    chunks, after = [], 0
    for chunk in arrival_chunks(scenario, 0):
        chunks.append(chunk)
        after += int((chunk.arrival_s >= scenario.warmup_s).sum())
        if after >= MOST:
            break
    drawn = ArrivalChunk.join(chunks)
    counted = int(np.searchsorted(drawn.arrival_s, scenario.warmup_s))
    first = max(0, counted - MOST_LEAD_IN)
    most = min(len(drawn), first + MOST)
    promised = [n for n, spec in enumerate(scenario.requests.values()) if spec.slo_s is not None]
    last = counted
    for index in promised or range(len(scenario.requests)):
        mine = counted + np.flatnonzero(drawn.class_index[counted:] == index)
        last = max(last, int(mine[ENOUGH - 1]) + 1 if len(mine) >= ENOUGH else most)
    return drawn.take(slice(first, min(last, most))), counted - first


def _requests(scenario: Scenario, drawn: ArrivalChunk, origin_s: float) -> list[Data]:
    """Each request in order: when it is sent, its class, a seed of its own, and what it asks unlike its class."""
    classes = list(scenario.requests.items())
    seeds = stream(scenario.seed, 0, "load test").integers(2**31, size=len(drawn)).tolist()
    names = ("arrival_s", "class_index", "base_model", "num_images", "num_inference_steps")
    columns = [getattr(drawn, name).tolist() for name in names]
    found = []
    for row, seed in zip(zip(*columns, strict=True), seeds, strict=True):
        arrival_s, index, *asked = row
        name, spec = classes[index]
        request = {"arrival_s": round(arrival_s - origin_s, 6), "request_class": name, "seed": seed}
        own = (0, spec.num_images, spec.num_inference_steps)
        found.append(request | {key: v for key, v, same in zip(names[2:], asked, own, strict=True) if v != same})
    return found
