"""The records of a run, a row per request, and the laws that every run obeys.

A `Records` holds one replication as one table of doubles, `COLUMNS` wide: twenty-odd machine words a request and
nothing else, so that a million requests take about 230 MB. A `RunRecorder` fills it while a run is on, with one call a
request. Names (classes, plans, pools) are kept beside it as tables that the integer columns index. NaN means "does not
apply": a cloud-only request has no edge times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hybridsd_sim.errors import RunError

if TYPE_CHECKING:
    import pandas as pd


COLUMNS: tuple[tuple[str, str], ...] = (
    ("request", "index in order of arrival"),
    ("class_index", "request class, index into classes"),
    ("plan_index", "plan, index into plans; -1 when rejected"),
    ("status", "0 served, 1 unserved, 2 in flight at the horizon"),
    ("reason", "why unserved, index into reasons; -1 when served"),
    ("arrival_s", "the user asks"),
    ("cloud_ready_s", "the request reaches the pool's queue"),
    ("cloud_start_s", "the worker group starts, for the last time if it was lost before"),
    ("cloud_stop_s", "the worker group is free again"),
    ("edge_ready_s", "everything the edge needs is there"),
    ("edge_start_s", "the edge device starts"),
    ("edge_stop_s", "the edge device is free again"),
    ("finish_s", "the user has the picture"),
    ("deadline_s", "arrival plus SLO; infinite without one"),
    ("model_load_s", "part of the cloud time spent loading a model"),
    ("transfer_s", "seconds on the access network"),
    ("degree", "GPUs held; 0 without a cloud stage"),
    ("pool_index", "pool, index into pools; -1 without"),
    ("node", "node of the pool; -1 without"),
    ("fleet_index", "edge fleet, index into fleets; -1 without an edge stage"),
    ("device", "edge device of the fleet; -1 without"),
    ("batch_size", "requests that shared the worker group; 1 alone"),
    ("restarts", "times that the worker group's node was taken away under it"),
    ("gpu_seconds", "GPUs times seconds held, divided by the batch; of the last start alone"),
    ("lost_gpu_s", "GPU-seconds held before a node was taken away, divided by the batch"),
    ("usd", "metered: GPU-seconds at the pool's price, lost ones apart, and egress"),
    ("edge_energy_j", "joules of the edge device; NaN when nobody knows its power"),
    ("bytes_down", "bytes to the edge"),
    ("quality", "CLIP score of the plan in 0..1; NaN when nobody knows"),
)
"""Column names with their meaning; seconds count from the start of the run."""

INTEGER_COLUMNS = frozenset({"request", "degree", "node", "device", "batch_size", "restarts"})
"""Columns of whole numbers."""

RAW_COLUMNS = (
    "request", "class_index", "plan_index", "status", "reason", "arrival_s", "cloud_ready_s", "cloud_start_s",
    "cloud_stop_s", "edge_ready_s", "edge_start_s", "edge_stop_s", "finish_s", "deadline_s", "model_load_s",
    "transfer_s", "node", "device",
)  # fmt: skip
"""The columns that a run must say of each request; the others follow from the plan."""

TIME_COLUMNS = tuple(
    name for name in RAW_COLUMNS if name.endswith("_s") and name not in {"deadline_s", "model_load_s", "transfer_s"}
)
"""Those of them that are moments; what lies beyond the horizon is NaN there."""

FLUSH_ROWS = 16384
"""Rows that a recorder collects before it writes them into the table."""

WIDTH = len(COLUMNS)

INDEX = {name: position for position, (name, _) in enumerate(COLUMNS)}

SERVED, UNSERVED, IN_FLIGHT = 0, 1, 2

STATUS_NAMES = ("served", "unserved", "in flight")

TOLERANCE_S = 1e-6
"""Rounding that sums of seconds may show."""


def in_time(finish_s: np.ndarray, deadline_s: np.ndarray) -> np.ndarray:
    """Whether each request has its image by its deadline, but for rounding; one without a finish (NaN) has not."""
    kept: np.ndarray = finish_s <= deadline_s + TOLERANCE_S
    return kept


def judged(status: np.ndarray, deadline_s: np.ndarray, horizon_s: float) -> np.ndarray:
    """Whether it is known of each request if it keeps its SLO: it has ended, or was due by the horizon."""
    known: np.ndarray = (status != IN_FLIGHT) | (deadline_s <= horizon_s)
    return known


TOLERANCE_DEVICES = 1e-6
"""Rounding that sums of parts of a worker group may show."""


class Sink(Protocol):
    """A caller's writer for streamed records: gets blocks of rows, `COLUMNS` wide, as they fill up."""

    def write(self, rows: np.ndarray) -> None: ...


@dataclass(slots=True)
class Records:
    """One replication: a block of rows and the names that its integer columns index."""

    classes: tuple[str, ...]
    pools: tuple[str, ...]
    fleets: tuple[str, ...]
    plans: tuple[str, ...]
    reasons: tuple[str, ...]
    replication: int = 0
    table: np.ndarray = field(default_factory=lambda: np.empty((0, WIDTH)))

    def rows(self) -> np.ndarray:
        """All rows as an array of shape (requests, COLUMNS), in order of arrival."""
        return self.table

    def __len__(self) -> int:
        return len(self.table)


def column(rows: np.ndarray, name: str) -> np.ndarray:
    """One column of a block of rows by its name."""
    return rows[:, INDEX[name]]


def to_frame(records: Records, policy: str) -> pd.DataFrame:
    """The replication as a table: names for indexes, integers for counts, units in the column names."""
    import pandas as pd

    rows = records.rows()
    names: dict[str, tuple[str, Sequence[str]]] = {
        "class_index": ("request_class", records.classes),
        "plan_index": ("plan", records.plans),
        "status": ("status", STATUS_NAMES),
        "reason": ("reason", records.reasons),
        "pool_index": ("pool", records.pools),
        "fleet_index": ("fleet", records.fleets),
    }
    data: dict[str, Any] = {"policy": policy, "replication": records.replication}
    for name, _ in COLUMNS:
        values = column(rows, name)
        if name in names:
            # One name may have several codes: a plan priced for several request sizes becomes one category.
            new, known = names[name]
            unique = list(dict.fromkeys(known))
            place = np.array([*(unique.index(label) for label in known), -1], dtype=np.int32)  # code -1 stays -1
            categories = pd.Index(unique, dtype="object")
            data[new] = pd.Categorical.from_codes(place[values.astype(np.int64)], categories=categories)
        else:
            data[name] = values.astype(np.int64) if name in INTEGER_COLUMNS else values
    return pd.DataFrame(data)


class PlanFacts(NamedTuple):
    """What a plan says of every request it serves, so that rows need not repeat it while the run is on."""

    label: str
    degree: int
    pool_index: int
    fleet_index: int
    usd: float
    usd_per_gpu_s: float
    edge_energy_j: float
    bytes_down: int
    quality: float
    batch_gpu_s: tuple[float, ...] = ()
    """GPU-seconds that each of 1, 2, ... requests denoised together bears."""


class GroupHistory(NamedTuple):
    """What happened to a request's worker group out of the ordinary: the columns of these names."""

    batch_size: int = 1
    restarts: int = 0
    lost_gpu_s: float = 0.0


class RunRecorder:
    """Fills `Records` while a run is on: raw rows in a flat list, spread out into the table block by block.

    `expected` is the number of requests to reserve memory for.
    """

    def __init__(self, records: Records, horizon_s: float, sink: Sink | None = None, *, expected: int = 0) -> None:
        self._records, self._horizon_s, self._sink = records, horizon_s, sink
        self._expected = max(expected, FLUSH_ROWS)
        self._raw: list[float] = []
        self.write: Callable[[tuple[float, ...]], None] = self._raw.extend
        """Record one request: its `RAW_COLUMNS`."""
        self._histories: list[tuple[int, GroupHistory]] = []
        self._plans: list[PlanFacts] = []
        self._count = self._used = 0

    def add_plan(self, facts: PlanFacts) -> int:
        """Enter a plan and return its `plan_index`."""
        self._plans.append(facts)
        return len(self._plans) - 1

    def write_with_history(self, row: tuple[float, ...], history: GroupHistory) -> None:
        """Record a request that shared its worker group or lost it. Few do, so that `write` takes no such columns."""
        self._histories.append((len(self._raw) // len(RAW_COLUMNS), history))
        self.write(row)

    def write_all(self, count: int, columns: Mapping[str, np.ndarray | float]) -> None:
        """Record every request of a run at once: each of `RAW_COLUMNS` as an array, or as one number for all."""
        self._records.table = self._spread(count, columns)
        self._count = self._used = count

    def flush_if_full(self) -> None:
        """Spread out the rows recorded so far once there are `FLUSH_ROWS`: call it now and then, not for every row."""
        if len(self._raw) >= FLUSH_ROWS * len(RAW_COLUMNS):
            self._flush()

    def close(self) -> Records:
        """Spread out what is left and return the records, in order of arrival."""
        self._flush()
        self._reach(self._count)  # a request recorded twice leaves an empty row, which the laws refuse
        self._records.plans = tuple(facts.label for facts in self._plans)
        self._records.table = self._records.table[: self._count]
        return self._records

    def _flush(self) -> None:
        if not self._raw:
            return
        raw = np.array(self._raw, dtype=np.float64).reshape(-1, len(RAW_COLUMNS))
        self._raw.clear()
        rows = self._spread(len(raw), dict(zip(RAW_COLUMNS, raw.T, strict=True)))
        if self._sink is not None:
            self._sink.write(rows)
        numbers = raw[:, 0].astype(np.int64)
        self._count += len(rows)
        self._reach(int(numbers.max()) + 1)
        self._records.table[numbers] = rows

    def _reach(self, needed: int) -> None:
        """Have at least `needed` rows. Memory is reserved once for those expected, and only touched when it is used."""
        table, used = self._records.table, self._used
        if needed > len(table):
            grown = np.empty((max(needed, self._expected, len(table) * 3 // 2), WIDTH))
            grown[:used] = table[:used]
            self._records.table = grown
        if needed > used:
            self._records.table[used:needed] = np.nan
            self._records.table[used:needed, INDEX["batch_size"]] = 1.0
            self._used = needed

    def _spread(self, count: int, columns: Mapping[str, np.ndarray | float]) -> np.ndarray:
        rows = np.empty((count, WIDTH), order="F")  # column by column, as it is filled
        for name in RAW_COLUMNS:
            column(rows, name)[:] = columns[name]
        late = column(rows, "status") == IN_FLIGHT
        for name in TIME_COLUMNS:
            times = column(rows, name)
            times[late & (times > self._horizon_s)] = np.nan
        column(rows, "model_load_s")[np.isnan(column(rows, "cloud_start_s"))] = 0.0  # drawn, but nothing was loaded yet
        for name, alone in GroupHistory()._asdict().items():
            column(rows, name)[:] = alone
        if self._histories:
            positions, histories = zip(*self._histories, strict=True)
            rows[np.ix_(positions, [INDEX[name] for name in GroupHistory._fields])] = histories
            self._histories.clear()
        self._add_plan_columns(rows)
        return rows

    def _add_plan_columns(self, rows: np.ndarray) -> None:
        which = column(rows, "plan_index").astype(np.int64)
        facts = [*self._plans, PlanFacts("", 0, -1, -1, 0.0, 0.0, 0.0, 0, math.nan)]  # index -1: rejected
        for name in ("degree", "pool_index", "fleet_index", "edge_energy_j", "bytes_down", "quality"):
            rows[:, INDEX[name]] = np.array([getattr(plan, name) for plan in facts], dtype=np.float64)[which]
        stop = np.where(np.isnan(column(rows, "cloud_stop_s")), self._horizon_s, column(rows, "cloud_stop_s"))
        gpus = column(rows, "degree") / column(rows, "batch_size")
        rows[:, INDEX["gpu_seconds"]] = np.nan_to_num(stop - column(rows, "cloud_start_s")) * gpus
        load = np.nan_to_num(column(rows, "model_load_s")) * gpus
        rate = np.array([plan.usd_per_gpu_s for plan in facts])[which]
        rows[:, INDEX["usd"]] = np.array([plan.usd for plan in facts])[which] + load * rate
        shared = column(rows, "batch_size") > 1
        if shared.any():
            # The plan's dollars are of a request alone; in a batch it bears its part of what the worker group held.
            widest = max(len(plan.batch_gpu_s) for plan in facts)
            each = np.array([[*plan.batch_gpu_s, *[0.0] * (widest - len(plan.batch_gpu_s))] for plan in facts])
            saved_gpu_s = each[which, 0] - each[which, column(rows, "batch_size").astype(np.int64) - 1]
            rows[shared, INDEX["usd"]] -= (saved_gpu_s * rate)[shared]


def check_laws(records: Records, pool_gpus: Mapping[str, int], fleet_replicas: Mapping[str, int]) -> None:
    """Raise `RunError` if a run broke a law: conservation, causality, capacity, whole batches, seconds that add up.

    `pool_gpus` are the GPUs of each pool; `fleet_replicas` the devices of each edge fleet.
    """
    rows = records.rows()
    # Sums block by block: a copy of all served rows would double the memory of a run.
    blocks = (rows[first : first + FLUSH_ROWS] for first in range(0, len(rows), FLUSH_ROWS))
    sums = dict.fromkeys(found for block in blocks for found in _sums(block))
    broken = [*_conservation(rows), *_causality(rows), *sums, *_batches(rows)]
    for index, name in enumerate(records.pools):
        broken += _capacity(rows, "pool_index", index, "cloud", pool_gpus[name], f"pool {name}")
    for index, name in enumerate(records.fleets):
        broken += _capacity(rows, "fleet_index", index, "edge", fleet_replicas[name], f"edge fleet {name}")
        broken += _exclusive_devices(rows, index, name)
    if broken:
        raise RunError("the run broke its own laws: " + "; ".join(broken))


def _conservation(rows: np.ndarray) -> list[str]:
    """Every request ends exactly once: served, unserved with a reason, or in flight."""
    requests = column(rows, "request")
    if not np.array_equal(requests, np.arange(len(rows))):
        return [f"{len(rows)} records do not stand for requests 0 to {len(rows) - 1} once each"]
    status = column(rows, "status")
    if not np.isin(status, (SERVED, UNSERVED, IN_FLIGHT)).all():
        return ["some requests are neither served, unserved nor in flight"]
    unexplained = (status == UNSERVED) & (column(rows, "reason") < 0)
    return [f"{int(unexplained.sum())} unserved requests have no reason"] if unexplained.any() else []


def _causality(rows: np.ndarray) -> list[str]:
    """Nothing starts before its inputs exist."""
    cloud, edge = (tuple(f"{side}_{point}_s" for point in ("ready", "start", "stop")) for side in ("cloud", "edge"))
    reached = np.full(len(rows), -np.inf)
    for name in ("arrival_s", *cloud, *edge, "finish_s"):
        times = column(rows, name)
        early = times < reached - TOLERANCE_S
        if early.any():
            return [f"request {int(np.flatnonzero(early)[0])} has its {name} before its inputs exist"]
        np.fmax(reached, times, out=reached)
    return []


def _sums(rows: np.ndarray) -> Iterator[str]:
    """Seconds sum to the latency, and GPU-seconds are charged as they were held."""
    served = rows[column(rows, "status") == SERVED]
    cloud = np.nan_to_num(column(served, "cloud_stop_s") - column(served, "cloud_ready_s"))
    edge = np.nan_to_num(column(served, "edge_stop_s") - column(served, "edge_ready_s"))
    latency = column(served, "finish_s") - column(served, "arrival_s")
    gap = np.abs(latency - cloud - edge - column(served, "transfer_s"))
    gpus = column(served, "degree") / column(served, "batch_size")
    held = np.nan_to_num((column(served, "cloud_stop_s") - column(served, "cloud_start_s")) * gpus)
    charged = np.abs(held - column(served, "gpu_seconds"))
    if not (gap <= TOLERANCE_S * np.maximum(1.0, latency)).all():  # NaN is no sum
        yield "cloud, edge and transfer seconds do not sum to the latency"
    if not (charged <= TOLERANCE_S * np.maximum(1.0, held)).all():
        yield "GPU-seconds charged are not the GPU-seconds held"


def _batches(rows: np.ndarray) -> list[str]:
    """Every worker group that is shared is shared by as many as it says, of one plan, on one node, at one time."""
    shared = rows[column(rows, "batch_size") != 1]
    if not len(shared):
        return []
    names = ("batch_size", "plan_index", "pool_index", "node", "cloud_start_s", "cloud_stop_s")
    groups, members = np.unique(np.nan_to_num(shared[:, [INDEX[name] for name in names]]), axis=0, return_counts=True)
    torn = (groups[:, 0] < 1) | (members % np.maximum(groups[:, 0], 1.0) != 0)
    return [f"{int(torn.sum())} batches have other members than they say"] if torn.any() else []


def _capacity(rows: np.ndarray, key: str, index: int, side: str, capacity: int, name: str) -> list[str]:
    """At no time do more devices run than there are."""
    mine = (column(rows, key) == index) & ~np.isnan(column(rows, f"{side}_start_s"))
    if not mine.any():
        return []
    # Each request of a batch holds its part of the group, so that the batch holds the group once.
    weight = column(rows, "degree")[mine] / column(rows, "batch_size")[mine] if side == "cloud" else np.ones(mine.sum())
    stopped_s, given_back = _cumulated(column(rows, f"{side}_stop_s")[mine], weight)
    started_s, taken = _cumulated(column(rows, f"{side}_start_s")[mine], weight)
    # A device that changes hands at one instant is free before it is taken. Who has not stopped gives nothing back.
    gone = np.searchsorted(stopped_s, started_s, side="right")
    peak = (taken - np.concatenate([[0.0], given_back])[gone]).max()
    return [f"{name} ran {peak:g} devices of {capacity}"] if peak > capacity + TOLERANCE_DEVICES else []


def _cumulated(times_s: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times to the nanosecond in rising order, NaN last, and the sum of the weights up to each."""
    times_s = np.round(times_s, 9)
    order = np.argsort(times_s, kind="stable")  # quick where times rise already, nearly
    return times_s[order], np.cumsum(weight[order])


def _exclusive_devices(rows: np.ndarray, index: int, name: str) -> list[str]:
    """No edge device runs two requests at a time."""
    mine = (column(rows, "fleet_index") == index) & ~np.isnan(column(rows, "edge_start_s"))
    device, start = column(rows, "device")[mine], column(rows, "edge_start_s")[mine]
    stop = column(rows, "edge_stop_s")[mine]
    order = np.lexsort((start, device))
    device, start, stop = device[order], start[order], np.where(np.isnan(stop), np.inf, stop)[order]
    overlap = (device[1:] == device[:-1]) & (start[1:] < stop[:-1] - TOLERANCE_S)
    return [f"a device of {name} runs two requests at once"] if overlap.any() else []
