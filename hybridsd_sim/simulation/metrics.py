"""Figures of a run from its records, with 95% intervals: tables by request class and by pool, series over time.

Figures are over the requests that arrived in `[warmup_s, horizon_s)`. Requests that follow each other share a queue, so
intervals come from cells of time and not from requests: whole replications from five on; below, ten equal batches of
each replication, or twenty of a single one. The half-width is Student's t times the standard error of a ratio of sums
over the cells (Cochran, Sampling Techniques, 3rd ed., section 6.3). For cells of equal size that is the classical
method of batch means, or of independent replications (Law, Simulation Modeling and Analysis, 5th ed., section 9.5);
where cells are unequal, as on a day with peaks, it stays right. What cannot be estimated is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from hybridsd_sim.estimate import Estimate
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.simulation.records import IN_FLIGHT, SERVED, UNSERVED, Records, column, in_time, judged

NAN = math.nan

CONFIDENCE = 0.95
"""Level of every interval."""

UNKNOWN = Estimate.unknown("nothing was recorded to estimate it from")

ENOUGH_REPLICATIONS = 5
"""From so many replications on, each is one observation; below, batches are."""

BLOCK_ROWS = 8192
"""Rows read at a time: a block stays in the processor's cache while its columns are gathered."""

ENDS = ("", "_low", "_high")

UNITS: dict[str, str] = {
    "offered_per_s": "requests/s",
    "served_per_s": "requests/s",
    "goodput_per_s": "requests/s",
    "unserved_share": "share of requests",
    "latency_mean_s": "s",
    "latency_p50_s": "s",
    "latency_p95_s": "s",
    "latency_p99_s": "s",
    "wait_mean_s": "s",
    "slo_attainment": "share of requests",
    "quality_mean": "CLIP score, 0 to 1",
    "gpu_seconds_per_image": "GPU s/image",
    "metered_usd_per_image": "USD/image",
    "edge_energy_j_per_image": "J/image",
    "bytes_down_per_image": "bytes/image",
    "rent_usd_per_hour": "USD/h",
    "rent_usd_per_image": "USD/image",
}
"""Figures of `summarise` in the order of their columns, with units."""

COUNTS = ("requests", "served", "unserved", "in_flight")

POOL_UNITS: dict[str, str] = {"utilisation": "share of GPU time", "queue_wait_mean_s": "s", "queue_wait_p95_s": "s"}
"""Figures of `pool_table`, with units."""

# What each figure is made of: a rate is a sum over seconds, a share and a mean are one sum over another.
_RATES = {"offered_per_s": "requests", "served_per_s": "served", "goodput_per_s": "in_time"}
_SHARES = {"unserved_share": ("unserved", "requests"), "slo_attainment": ("in_time", "judged")}
_MEANS = {
    "latency_mean_s": ("latency_s", "served"),
    "wait_mean_s": ("wait_s", "served"),
    "quality_mean": ("quality", "served"),
    "gpu_seconds_per_image": ("gpu_seconds", "images"),
    "metered_usd_per_image": ("usd", "images"),
    "edge_energy_j_per_image": ("edge_energy_j", "images"),
    "bytes_down_per_image": ("bytes_down", "images"),
}
_QUANTILES = {"latency_p50_s": 0.50, "latency_p95_s": 0.95, "latency_p99_s": 0.99}
_SPENT = ("quality", "gpu_seconds", "usd", "edge_energy_j", "bytes_down")
_SUMS = (*COUNTS, "in_time", "judged", "latency_s", "wait_s", *_SPENT)


def student(freedom: int) -> float:
    """The quantile of Student's t for a two-sided interval at `CONFIDENCE`, by degrees of freedom."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def half_width(residual: np.ndarray, cells: int, total: float) -> float:
    """Half of the interval of a ratio of sums, from each cell's deviation and the sum below; NaN below two cells."""
    if cells < 2:
        return NAN
    return student(cells - 1) * math.sqrt(cells / (cells - 1) * float(residual @ residual)) / total


def ratio(top: np.ndarray, bottom: np.ndarray, ceiling: float = math.inf) -> Estimate:
    """The ratio of two sums, both given by cell, its interval within 0 and a ceiling.

    Cells whose `bottom` is 0 are no observations; unknown where all are.
    """
    total = float(bottom.sum())
    if not total > 0:
        return UNKNOWN
    value = float(top.sum()) / total
    half = half_width(top - value * bottom, int(np.count_nonzero(bottom)), total)
    low, high = np.clip([value - half, value + half], 0.0, ceiling)  # unlike max and min, clip keeps NaN
    return Estimate(value, float(low), float(high))


def rate(count: np.ndarray, seconds: np.ndarray) -> Estimate:
    """Events per second, from counts and lengths of the cells; what never happened has a rate of 0 and no interval."""
    found = ratio(count, seconds)
    return found if count.any() else Estimate(found.value, NAN, NAN)


def share(count: np.ndarray, total: np.ndarray) -> Estimate:
    """A share of requests. None or all of n do not vary between cells; there the interval is the exact binomial one.

    Clopper and Pearson, Biometrika 26 (1934): with 0 or n of n the far end leaves a tail of (1 - confidence) / 2.
    """
    found = ratio(count, total, 1.0)
    # The closed form of scipy.stats.binomtest(...).proportion_ci at both ends; scipy.stats takes a second to import.
    reach = ((1 - CONFIDENCE) / 2) ** (1 / max(float(total.sum()), 1.0))
    if found.value == 0.0:
        return Estimate(0.0, 0.0, 1.0 - reach)
    return Estimate(1.0, reach, 1.0) if found.value == 1.0 else found


def quantile(ordered: np.ndarray, cell: np.ndarray, p: float) -> Estimate:
    """A quantile of sorted values, each from a cell. An end of the interval that lies beyond the data is NaN.

    Woodruff, J. Am. Stat. Assoc. 47 (1952): the interval of the share of values below the quantile, turned back into
    values. The share is taken with and without the values equal to the quantile, and the wider interval counts.
    """
    if not len(ordered):
        return UNKNOWN
    value = value_at(ordered, p)
    sizes = np.bincount(cell)
    halves = []
    for below in (int(np.searchsorted(ordered, value, side)) for side in ("left", "right")):
        residual = np.bincount(cell[:below], minlength=len(sizes)) - below / len(ordered) * sizes
        halves.append(half_width(residual, int(np.count_nonzero(sizes)), len(ordered)))
    half = max(halves)
    return Estimate(value, value_at(ordered, p - half), value_at(ordered, p + half))


def value_at(ordered: np.ndarray, p: float) -> float:
    """The quantile p of sorted values, at least one, by linear interpolation; NaN for p outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        return NAN
    position = p * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def quantile_of(values: np.ndarray, p: float) -> float:
    """The quantile p of values in any order, rounded to nanoseconds, without sorting them all; NaN of none.

    The values change places.
    """
    if not len(values):
        return NAN
    below = int(p * (len(values) - 1))
    places = [below, min(below + 1, len(values) - 1)]
    values.partition(places)
    values[places] = np.round(values[places], 9)
    return value_at(values, p)


def area(begin_s: np.ndarray, end_s: np.ndarray, weight: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Weight times seconds that the spans `[begin, end)` have between each two edges, of shape (edges - 1,).

    A begin that is NaN never came; an end that is NaN has not come yet.
    """
    begun = ~np.isnan(begin_s)
    ended = begun & ~np.isnan(end_s)
    return np.diff(_ramp(begin_s[begun], weight[begun], edges_s) - _ramp(end_s[ended], weight[ended], edges_s))


def _ramp(times_s: np.ndarray, weight: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Sum of weight times the seconds that each time lies before an edge, for every edge; one pass and no sorting."""
    size = len(edges_s)
    first = np.searchsorted(edges_s, times_s)
    weights = np.bincount(first, weight, size + 1)[:size].cumsum()
    moments = np.bincount(first, weight * times_s, size + 1)[:size].cumsum()
    return np.asarray(edges_s * weights - moments)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Equal cuts of the measured time of every replication, `each` of one, numbered through: the observations."""

    begin_s: float
    end_s: float
    replications: int
    each: int

    @classmethod
    def of(cls, scenario: Scenario, replications: int) -> _Cells:
        each = 1 if replications >= ENOUGH_REPLICATIONS else 20 if replications == 1 else 10
        return cls(scenario.warmup_s, scenario.horizon_s, replications, each)

    @property
    def edges_s(self) -> np.ndarray:
        return np.linspace(self.begin_s, self.end_s, self.each + 1)

    @property
    def seconds(self) -> np.ndarray:
        """How long each cell lasts."""
        return np.full(self.replications * self.each, (self.end_s - self.begin_s) / self.each)

    def measured(self, arrival_s: np.ndarray) -> np.ndarray:
        return (arrival_s >= self.begin_s) & (arrival_s < self.end_s)

    def cell(self, arrival_s: np.ndarray) -> np.ndarray:
        """The cell of each arrival within its replication."""
        passed = (arrival_s - self.begin_s) / (self.end_s - self.begin_s)
        return np.minimum((passed * self.each).astype(np.int64), self.each - 1)


def summarise(
    scenario: Scenario,
    policy: str,
    replications: Sequence[Records],
    usd_per_hour: float | None,
) -> pd.DataFrame:
    """A row per request class and one for "all", indexed by (policy, request_class).

    Columns: each figure of `UNITS` as `x`, `x_low`, `x_high`, then the `COUNTS`; `frame.attrs["units"]` has the unit of
    each. Latency, wait and quality are over served requests; figures per image over the images that these hold.
    `slo_attainment` counts what was served in time among the served, the unserved, and those in flight past their
    deadline; a class without an SLO is in time whenever it is served. `rent_*` is the rent of all nodes, used or not,
    and stands in "all" alone. One served request whose quality, dollars or joules nobody knows makes that figure
    unknown. `pool_table` is by pool.
    """
    cells = _Cells.of(scenario, len(replications))
    tally = _Tally.of(scenario, replications, cells)
    names = [*scenario.requests, ALL]
    rows = [tally.figures(index, cells) for index in range(len(names))]
    if usd_per_hour is not None:  # the rent itself is known; what an image bears of it varies with the images
        images = rate(tally.sums["images"].sum(axis=0), cells.seconds)
        value, low, high = (
            usd_per_hour / 3600 / per_s if per_s > 0 else NAN for per_s in (images.value, images.high, images.low)
        )
        rows[-1]["rent_usd_per_hour"] = Estimate.exact(usd_per_hour)
        rows[-1]["rent_usd_per_image"] = Estimate(value, low, high)
    index = pd.MultiIndex.from_product([[policy], names], names=["policy", "request_class"])
    frame = _frame(rows, UNITS, index)
    for name in COUNTS:
        counts = tally.sums[name].sum(axis=1)
        frame[name] = np.append(counts, counts.sum()).astype(np.int64)
    frame.attrs["units"] |= dict.fromkeys(COUNTS, "requests")
    return frame


def _frame(rows: Sequence[Mapping[str, Estimate]], units: Mapping[str, str], index: pd.MultiIndex) -> pd.DataFrame:
    columns = [f"{name}{end}" for name in units for end in ENDS]
    figures = [[row.get(name, UNKNOWN) for name in units] for row in rows]
    values = [[number for each in row for number in (each.value, each.low, each.high)] for row in figures]
    frame = pd.DataFrame(values, index=index, columns=columns, dtype=np.float64)
    frame.attrs["units"] = {f"{name}{end}": unit for name, unit in units.items() for end in ENDS}
    return frame


@dataclass(frozen=True, slots=True)
class _Tally:
    """Sums by request class and cell; latency, class and cell of everything served, the fastest first."""

    sums: Mapping[str, np.ndarray]
    latency_s: np.ndarray
    class_index: np.ndarray
    cell: np.ndarray

    @classmethod
    def of(cls, scenario: Scenario, replications: Sequence[Records], cells: _Cells) -> _Tally:
        images = np.array([spec.num_images for spec in scenario.requests.values()], dtype=np.float64)
        shape = (len(images), len(replications), cells.each)
        sums = {name: np.zeros(shape) for name in _SUMS}
        parts = [(np.empty(0), np.empty(0, np.int32), np.empty(0, np.int32))]
        for number, records in enumerate(replications):
            table = records.rows()
            for first in range(0, len(table), BLOCK_ROWS):
                rows = table[first : first + BLOCK_ROWS]
                measured = cells.measured(column(rows, "arrival_s"))
                rows = rows if measured.all() else rows[measured]
                weights = _weights(rows, cells.end_s)
                cell, class_index = cells.cell(column(rows, "arrival_s")), column(rows, "class_index").astype(np.int64)
                for name, weight in weights.items():
                    counted = np.bincount(class_index * cells.each + cell, weight, len(images) * cells.each)
                    sums[name][:, number] += counted.reshape(len(images), cells.each)
                served = weights["served"]
                small = (class_index[served].astype(np.int32), (cell[served] + number * cells.each).astype(np.int32))
                parts.append((weights["latency_s"][served], *small))
        flat = {name: each.reshape(len(images), -1) for name, each in sums.items()}
        latency_s, class_index, cell = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(latency_s)
        per_image = {"images": flat["served"] * images[:, np.newaxis]}
        return cls(flat | per_image, latency_s[order], class_index[order], cell[order])

    def figures(self, index: int, cells: _Cells) -> dict[str, Estimate]:
        """Every figure of one class, or of all where `index` is the number of classes; the rent apart."""
        everyone = index == len(self.sums["requests"])
        sums = {name: each.sum(axis=0) if everyone else each[index] for name, each in self.sums.items()}
        mine = slice(None) if everyone else self.class_index == index
        ordered, where = self.latency_s[mine], self.cell[mine]
        found = {name: rate(sums[top], cells.seconds) for name, top in _RATES.items()}
        found |= {name: share(sums[top], sums[bottom]) for name, (top, bottom) in _SHARES.items()}
        found |= {name: ratio(sums[top], sums[bottom]) for name, (top, bottom) in _MEANS.items()}
        found |= {name: quantile(ordered, where, p) for name, p in _QUANTILES.items()}
        return found


def _weights(rows: np.ndarray, horizon_s: float) -> dict[str, np.ndarray]:
    """What each row adds to each sum."""
    status, finish, deadline = column(rows, "status"), column(rows, "finish_s"), column(rows, "deadline_s")
    served, unserved, in_flight = status == SERVED, status == UNSERVED, status == IN_FLIGHT
    found = {
        "requests": np.ones(len(rows)),
        "served": served,
        "unserved": unserved,
        "in_flight": in_flight,
        "in_time": served & in_time(finish, deadline),
        "judged": judged(status, deadline, horizon_s),
        # Rounded to nanoseconds, so that latencies that differ by rounding alone are one value with no interval.
        "latency_s": np.where(served, np.round(finish - column(rows, "arrival_s"), 9), 0.0),
        "wait_s": np.where(served, _wait(rows, "cloud") + _wait(rows, "edge"), 0.0),
    }
    return found | {name: np.where(served, column(rows, name), 0.0) for name in _SPENT}


def _wait(rows: np.ndarray, side: str) -> np.ndarray:
    """Seconds between being ready and being started; 0 for a stage that a request does not have."""
    wait_s: np.ndarray = np.nan_to_num(column(rows, f"{side}_start_s") - column(rows, f"{side}_ready_s"))
    return wait_s


def pool_table(
    scenario: Scenario, policy: str, replications: Sequence[Records], replicas: Mapping[str, int]
) -> pd.DataFrame:
    """A row per pool, indexed by (policy, pool): `gpus`, `jobs`, and the figures of `POOL_UNITS` with their intervals.

    `jobs` are the requests that arrived in the measured time and got their GPUs; queue waits are theirs. Utilisation is
    over the measured time, whoever held the GPUs, also in runs that were lost with their node; NaN for a pool without
    any.
    """
    cells = _Cells.of(scenario, len(replications))
    gpus = [replicas.get(name, 0) * pool.gpus_per_node for name, pool in scenario.pools.items()]
    rows, jobs = [], []
    for index, count in enumerate(gpus):
        waits, busy = [], []
        for number, records in enumerate(replications):
            table = records.rows()
            arrival_s, start_s = column(table, "arrival_s"), column(table, "cloud_start_s")
            mine = (column(table, "pool_index") == index) & cells.measured(arrival_s) & ~np.isnan(start_s)
            waited_s = start_s[mine] - column(table, "cloud_ready_s")[mine]
            waits.append((waited_s, cells.cell(arrival_s[mine]) + number * cells.each))
            # What was lost with a node counts where its request was started again, or at the end.
            lost = table[(column(table, "pool_index") == index) & (column(table, "restarts") > 0)]
            again_s = column(lost, "cloud_start_s")
            again_s = np.where(np.isnan(again_s), cells.end_s, again_s)
            lost_gpu_s = np.histogram(again_s, cells.edges_s, weights=column(lost, "lost_gpu_s"))[0]
            busy.append(_busy_gpu_s(table, index, cells.edges_s) + lost_gpu_s)
        wait_s, cell = (np.concatenate(each) for each in zip(*waits, strict=True))
        order = np.argsort(wait_s)
        found = {"utilisation": ratio(np.concatenate(busy), count * cells.seconds, 1.0)}
        found["queue_wait_mean_s"] = ratio(np.bincount(cell, wait_s), np.bincount(cell))
        found["queue_wait_p95_s"] = quantile(wait_s[order], cell[order], 0.95)
        rows.append(found)
        jobs.append(len(wait_s))
    index_of = pd.MultiIndex.from_product([[policy], list(scenario.pools)], names=["policy", "pool"])
    frame = _frame(rows, POOL_UNITS, index_of)
    frame.insert(0, "gpus", gpus)
    frame.insert(1, "jobs", jobs)
    frame.attrs["units"] |= {"gpus": "GPUs", "jobs": "requests"}
    return frame


def _busy_gpu_s(rows: np.ndarray, index: int, edges_s: np.ndarray) -> np.ndarray:
    """GPU-seconds that a pool was busy between each two edges, with what was not lost."""
    mine = column(rows, "pool_index") == index
    start_s, stop_s = column(rows, "cloud_start_s")[mine], column(rows, "cloud_stop_s")[mine]
    return area(start_s, stop_s, (column(rows, "degree") / column(rows, "batch_size"))[mine], edges_s)


def utilisation_series(
    records: Records, pool_index: int, gpus: int, horizon_s: float, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle of each time bin in seconds, share of the pool's GPUs busy in it, and requests waiting on average.

    The share leaves out what was lost with a node, and is NaN for a pool without GPUs.
    """
    edges_s = np.linspace(0.0, horizon_s, bins + 1)
    width_s = horizon_s / bins
    rows = records.rows()
    busy = _busy_gpu_s(rows, pool_index, edges_s) / (gpus * width_s) if gpus else np.full(bins, NAN)
    mine = column(rows, "pool_index") == pool_index
    ready_s, start_s = column(rows, "cloud_ready_s")[mine], column(rows, "cloud_start_s")[mine]
    waiting = area(ready_s, start_s, np.ones(len(ready_s)), edges_s) / width_s
    return (edges_s[:-1] + edges_s[1:]) / 2, busy, waiting
