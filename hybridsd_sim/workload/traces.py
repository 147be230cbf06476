"""Real request traces: reading, checking, describing and writing them.

Four layouts of CSV are recognised by their header: Alibaba GenTD26 requests, Azure LLM inference, Mooncake, and a plain
one whose only necessary column is `arrival_s`, which is also what `Trace.write_csv` writes. Traces of language models
lend their arrival times only; what their requests asked for says nothing about images.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.files import atomic_path

Floats = npt.NDArray[np.float64]

Ints = npt.NDArray[np.int64]

Texts = npt.NDArray[np.str_]


MAX_PROBLEMS = 20
"""Bad rows that one message lists; it counts the others."""

LONG_GAP_S = 3600.0
"""Gaps over an hour are pauses of the service rather than its rhythm; CVs are given with and without them."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = float(text)
        if not low <= number <= high or not number.is_integer():
            raise ValueError(text)
        return int(number)

    return parse


def _seconds(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or number < 0:
        raise ValueError(text)
    return number


def _date(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


@dataclass(frozen=True, slots=True)
class _Column:
    """How a column of ours is read, what an empty cell becomes, and what a cell must be."""

    parse: Callable[[str], Any]
    empty: Any
    rule: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """A layout of CSV: the columns that give it away, its clock, and its names for our columns."""

    label: str
    necessary: tuple[str, ...]
    time: str
    clock: _Column
    columns: Mapping[str, str]


_TEXT = _Column(str, "")

_DATE = _Column(_date, None, "must be a date and time")

_SECONDS = _Column(_seconds, math.nan, "must be a finite number of seconds, not negative")

_MILLISECONDS = _Column(
    lambda text: _seconds(text) / 1000.0, math.nan, "must be a finite number of milliseconds, not negative"
)

# The upper limits are those of a request class in a scenario.
_COLUMNS = {
    "num_inference_steps": _Column(_whole(1, 1000), 0, "must be a whole number from 1 to 1000"),
    "num_images": _Column(_whole(1, 64), 0, "must be a whole number from 1 to 64"),
    "num_lora": _Column(_whole(0, 1000), -1, "must be a whole number from 0 to 1000"),
    "base_model": _TEXT,
    "status": _TEXT,
    "request_type": _TEXT,
    "user": _TEXT,
    "execution_s": _SECONDS,
}

_GENTD26 = {
    "num_inference_steps": "num_inference_steps",
    "num_images": "num_images_per_prompt",
    "num_lora": "num_lora",
    "base_model": "checkpoint_model_version_id",
    "status": "predict_status",
    "request_type": "predict_type",
    "user": "groupId",
    "execution_s": "exec_time_seconds",
}

_LAYOUTS = (
    _Layout(
        "Alibaba GenTD26 requests",
        ("gmt_create", "predict_status", "num_images_per_prompt", "num_inference_steps", "checkpoint_model_version_id"),
        "gmt_create",
        _DATE,
        _GENTD26,
    ),
    _Layout("Azure LLM inference", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), "TIMESTAMP", _DATE, {}),
    _Layout("Mooncake", ("timestamp_ms", "input_length", "output_length"), "timestamp_ms", _MILLISECONDS, {}),
    _Layout("plain", ("arrival_s",), "arrival_s", _SECONDS, {name: name for name in _COLUMNS}),
)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival: an array of one length per column.

    `arrival_s` counts from the first request; `start` is that request's date, None when the trace tells none. Where a
    request does not say: 0 for `num_inference_steps` and `num_images`, -1 for `num_lora`, NaN for `execution_s`, empty
    text elsewhere. `status` is the trace's own word (`SUCCEED`, `FAILED`, ...): failed requests were asked for too.
    """

    layout: str
    start: datetime | None
    arrival_s: Floats
    num_inference_steps: Ints
    num_images: Ints
    num_lora: Ints
    base_model: Texts
    status: Texts
    request_type: Texts
    user: Texts
    execution_s: Floats

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrival_s[-1])

    def write_csv(self, out: str | Path) -> None:
        """Write the plain layout, which `import_trace` reads back the same; columns that no request fills are left out.

        The file appears whole or not at all. Raises `InputError` when it cannot be written.
        """
        times = self.arrival_s.tolist()
        columns = {"arrival_s": [repr(value) for value in times]}
        if self.start is not None:
            columns["timestamp"] = [str(self.start + timedelta(seconds=value)) for value in times]
        for name, column in _COLUMNS.items():
            values = getattr(self, name).tolist()
            unsaid = (value == column.empty or (isinstance(value, float) and math.isnan(value)) for value in values)
            cells = ["" if blank else str(value) for value, blank in zip(values, unsaid, strict=True)]
            if any(cells):
                columns[name] = cells
        target = Path(out)
        try:
            with atomic_path(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
        except OSError as error:
            problem = Problem(str(target), error.strerror or str(error), "the trace cannot be written there")
            raise InputError(problem) from error

    def summary(self) -> TraceSummary:
        """What the trace says, as statistics."""
        gaps = np.diff(self.arrival_s)
        short = gaps[gaps <= LONG_GAP_S]
        past_hour_s = 0.0 if self.start is None else self.start.minute * 60 + self.start.second
        busy = np.unique((self.arrival_s + past_hour_s) // 3600, return_counts=True)[1]
        models = self.base_model[self.base_model != ""]
        popular = list(_shares(models).values())
        lora = self.num_lora[self.num_lora >= 0]
        ran_s = self.execution_s[~np.isnan(self.execution_s)]
        percentiles = {f"p{p}": float(np.percentile(ran_s, p)) for p in (50, 90, 95, 99) if len(ran_s)}
        return TraceSummary(
            layout=self.layout,
            start=None if self.start is None else str(self.start),
            requests=len(self),
            span_s=self.span_s,
            rate_per_s=len(gaps) / self.span_s if self.span_s else None,
            gap_mean_s=_mean(gaps),
            gap_median_s=float(np.median(gaps)) if len(gaps) else None,
            gap_cv=_cv(gaps),
            gap_mean_short_s=_mean(short),
            gap_cv_short=_cv(short),
            long_gaps=int(len(gaps) - len(short)),
            busy_hours=len(busy),
            peak_hour_requests=int(busy.max()),
            peak_to_mean_busy_hour=float(busy.max() / busy.mean()),
            num_inference_steps=_shares(self.num_inference_steps[self.num_inference_steps > 0]),
            num_images=_shares(self.num_images[self.num_images > 0]),
            lora_share=_mean(lora > 0),
            base_models=len(popular),
            base_model_top_share={str(n): sum(popular[:n]) for n in (1, 5, 10) if popular},
            base_model_switch_share=_mean(models[1:] != models[:-1]),
            users=len(np.unique(self.user[self.user != ""])),
            status=_shares(self.status[self.status != ""]),
            request_type=_shares(self.request_type[self.request_type != ""]),
            execution_s={"mean": float(ran_s.mean()), **percentiles, "max": float(ran_s.max())} if len(ran_s) else {},
        )


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Statistics of a trace; None (or an empty mapping) where the trace does not say.

    Shares are of the requests that say. CVs are population standard deviation over mean; the `_short` figures leave out
    gaps over an hour. `peak_to_mean_busy_hour` divides the busiest hour by the mean over hours with a request; hours
    are those of the clock when the trace tells dates, else they count from the first request.
    `base_model_top_share` has the shares of the 1, 5 and 10 commonest base models together, `base_model_switch_share`
    that of consecutive requests that change the base model.
    """

    layout: str
    start: str | None
    requests: int
    span_s: float
    rate_per_s: float | None
    gap_mean_s: float | None
    gap_median_s: float | None
    gap_cv: float | None
    gap_mean_short_s: float | None
    gap_cv_short: float | None
    long_gaps: int
    busy_hours: int
    peak_hour_requests: int
    peak_to_mean_busy_hour: float
    num_inference_steps: Mapping[str, float]
    num_images: Mapping[str, float]
    lora_share: float | None
    base_models: int
    base_model_top_share: Mapping[str, float]
    base_model_switch_share: float | None
    users: int
    status: Mapping[str, float]
    request_type: Mapping[str, float]
    execution_s: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def import_trace(path: str | Path) -> Trace:
    """Read a request trace from CSV, whichever of the known layouts it has; rows may stand in any order.

    Raises `InputError` for a file that cannot be read or has none of the layouts, and for bad rows: all of them
    together, the first 20 with `file:line`.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            return _read(str(path), file)
    except (OSError, UnicodeDecodeError) as error:
        said = (error.strerror if isinstance(error, OSError) else "not UTF-8 text") or str(error)
        raise InputError(Problem(str(path), said, "a trace must be a readable CSV file", "Check the path.")) from error


def describe_trace(path: str | Path) -> TraceSummary:
    """Statistics of the trace in a file. Raises `InputError` as `import_trace` does."""
    return import_trace(path).summary()


def _read(place: str, file: IO[str]) -> Trace:
    """The trace in an open file, by the layout whose necessary columns its header has."""
    lines = csv.reader(file)
    try:
        header = [name.strip() for name in next(lines, [])]
        layout = next((layout for layout in _LAYOUTS if set(layout.necessary) <= set(header)), None)
        if layout is None:
            shown = ", ".join(header)[:200] or "an empty file"
            known = "; ".join(f"{layout.label}: {', '.join(layout.necessary)}" for layout in _LAYOUTS)
            raise InputError(Problem(f"{place}:1", shown, "no known trace has these columns", f"Expected {known}."))
        used = {layout.time, *layout.columns.values()}
        if repeated := sorted(name for name in used if header.count(name) > 1):
            rule = "a column may stand once only"
            raise InputError(Problem(f"{place}:1", ", ".join(repeated), rule, "Remove one."))
        reading = _Reading(place, header, layout)
        for row in lines:
            if row:
                reading.add(f"{place}:{lines.line_num}", row)
    except csv.Error as error:
        raise InputError(Problem(f"{place}:{lines.line_num}", str(error), "is not CSV")) from error
    return reading.trace()


@dataclass(slots=True)
class _Reading:
    """A file being read: what its rows said so far, and what was wrong with them."""

    place: str
    header: list[str]
    layout: _Layout
    at: dict[str, int] = field(init=False)
    stamp: int | None = field(init=False)
    times: list[Any] = field(default_factory=list)
    cells: dict[str, list[Any]] = field(init=False)
    stamps: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unlisted: int = 0

    def __post_init__(self) -> None:
        self.at = {name: self.header.index(own) for name, own in self.layout.columns.items() if own in self.header}
        self.cells = {name: [] for name in self.at}
        stamp = self.layout.time if self.layout.clock is _DATE else "timestamp"
        self.stamp = self.header.index(stamp) if stamp in self.header else None

    def add(self, where: str, row: list[str]) -> None:
        """Read a row, or note what is wrong with it."""
        if len(row) != len(self.header):
            self._flag(where, f"{len(row)} cells", f"a row must have the header's {len(self.header)}")
            return
        at = self.header.index(self.layout.time)
        self._read(f"{where}: {self.layout.time}", row[at], self.layout.clock, self.times)
        if self.stamp is not None:
            self.stamps.append(row[self.stamp])
        for name, index in self.at.items():
            if row[index]:
                self._read(f"{where}: {self.header[index]}", row[index], _COLUMNS[name], self.cells[name])
            else:
                self.cells[name].append(_COLUMNS[name].empty)

    def _read(self, where: str, text: str, column: _Column, into: list[Any]) -> None:
        try:
            into.append(column.parse(text))
        except (ValueError, OverflowError):
            self._flag(where, repr(text[:60]), column.rule)

    def _flag(self, where: str, value: str, rule: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(where, value, rule))
        else:
            self.unlisted += 1

    def trace(self) -> Trace:
        """The rows in order of arrival. Raises `InputError` when any was bad, or none was there."""
        if self.unlisted:
            self.problems.append(Problem(self.place, f"{self.unlisted} more problems", "are not listed"))
        if not self.problems and not self.times:
            self.problems.append(Problem(self.place, "no rows", "a trace needs at least one request"))
        if self.problems:
            raise InputError(self.problems)
        first = min(range(len(self.times)), key=self.times.__getitem__)
        since = [time - self.times[first] for time in self.times]
        arrival_s = np.array([gap.total_seconds() if isinstance(gap, timedelta) else gap for gap in since])
        order = np.argsort(arrival_s, kind="stable")
        columns: dict[str, Any] = {}
        for name, column in _COLUMNS.items():
            values: Iterable[Any] = self.cells.get(name) or [column.empty] * len(self.times)
            kind: type[np.generic] = {int: np.int64, float: np.float64, str: np.str_}[type(column.empty)]
            columns[name] = np.array(values, kind)[order]
        start = None
        if self.stamps:
            with suppress(ValueError):  # the date of a plain trace is no more than a comment
                start = _date(self.stamps[first])
        return Trace(layout=self.layout.label, start=start, arrival_s=arrival_s[order], **columns)


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _cv(gaps: Floats) -> float | None:
    return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else None


def _shares(values: npt.NDArray[Any]) -> dict[str, float]:
    """Share of each value, the commonest first, then in order of the values."""
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[index]): float(counts[index] / len(values)) for index in order}
