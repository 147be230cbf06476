"""The first requests of a run as a trace for Perfetto (https://ui.perfetto.dev): who held which GPU or device when.

A process is a pool or an edge fleet; a thread is one GPU of a node, or one edge device. A gang shows on every GPU it
held. Waiting is an asynchronous slice beside the pool, and an arrow leads from the cloud to the edge at a hand-over.
Format: Chrome trace events (Trace Event Format, Google, 2016); times in microseconds from the start of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_REQUESTS = 2000
"""Requests shown, first come first: about a megabyte, which the viewer opens at once."""
Event = dict[str, Any]
Row = Mapping[str, Any]
Place = tuple[str, str]


def trace(rows: Sequence[Row], gpus_per_node: Mapping[str, int], horizon_s: float) -> dict[str, Any]:
    """Trace events of the first requests in `rows` (the columns of `requests.parquet`, a mapping for each request)."""
    rows = rows[:MOST_REQUESTS]
    processes = {place: number for number, place in enumerate(_places(rows), 1)}
    events = [*_waits(rows, processes, horizon_s), *_cloud(rows, processes, gpus_per_node, horizon_s)]
    events += [*_edge(rows, processes, horizon_s), *_arrows(events, rows, processes)]
    events.sort(key=lambda event: (event["ts"], event["pid"], event.get("tid", 0), -event.get("dur", 0)))
    return {"displayTimeUnit": "ms", "traceEvents": [*_labels(events, processes, gpus_per_node), *events]}


def _places(rows: Sequence[Row]) -> list[Place]:
    """Pools first, then edge fleets, as (kind, name)."""
    return [
        (kind, name) for kind in ("pool", "fleet") for name in sorted({r[kind] for r in rows if r[kind] is not None})
    ]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _end(value: float, horizon_s: float) -> float:
    return horizon_s if math.isnan(value) else min(value, horizon_s)


def _cloud(
    rows: Sequence[Row], processes: Mapping[Place, int], gpus_per_node: Mapping[str, int], horizon_s: float
) -> Iterator[Event]:
    """A slice on each GPU that a gang held; the model load inside the first one. A batch lies on the same GPUs."""
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
    args = {
        "class": row["request_class"],
        "latency_s": _rounded(row["finish_s"] - row["arrival_s"]),
        "plan": row["plan"],
    }
    name = f"{row['request_class']} {row['request']}"
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": max(0, stop - start), "args": args}


def _rounded(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 6)


def _edge(rows: Sequence[Row], processes: Mapping[Place, int], horizon_s: float) -> Iterator[Event]:
    for row in rows:
        if row["fleet"] is not None and not math.isnan(row["edge_start_s"]) and row["edge_start_s"] < horizon_s:
            start, stop = _microseconds(row["edge_start_s"]), _microseconds(_end(row["edge_stop_s"], horizon_s))
            yield _slice(row, processes["fleet", row["fleet"]], row["device"] + 1, start, stop)


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
    """An arrow from the end of the cloud's slice to the start of the edge's."""
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


def _labels(events: list[Event], processes: Mapping[Place, int], gpus_per_node: Mapping[str, int]) -> Iterator[Event]:
    """Names of processes and threads."""
    for (kind, name), pid in processes.items():
        title = f"{'edge fleet' if kind == 'fleet' else 'pool'} {name}"
        yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": title}}
    places = {pid: place for place, pid in processes.items()}
    for pid, tid in sorted({(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}):
        kind, name = places[pid]
        size = gpus_per_node[name] if kind == "pool" else 1
        node, gpu = divmod(tid - 1, size)
        text = f"device {tid - 1}" if kind == "fleet" else f"node {node}" if size == 1 else f"node {node} GPU {gpu}"
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": text}}
