"""Measures a grid of components, methods, sizes and degrees on the device that is here, and writes cost rows.

Models stand on the device one after the other. A measurement whose rows are already in the folder is not made again,
and every file is whole after each row, so that a profile can be cut off and taken up at any moment. Rows are only
written for devices that really ran: ranks that share a device in turn get a row each for their own compute, and none
for the step as a whole.
"""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.profiles import CostRow, Meta, Profiles
from hybridsd_sim.version import __version__

from ..models import Pipeline, load_pipeline
from ..parallel import Carrier, run_ranks
from .devices import PRECISIONS, LocalDevice, driver, library_versions, processor
from .devices import ceilings as measure_ceilings
from .grid import STEP_COMPONENTS, ProfileTarget, Sweep, find_targets
from .measure import METERED, Measured, RunProtocol, slowest, time_part, time_steps
from .progress import Progress
from .rows_file import KEYS, Key, MeasuredFile

RANK_TIMEOUT_S = 1800.0
"""A rank may wait that long for another: the first one times every unit of a large UNet before AsyncDiff begins."""

SUMMARY_COLUMNS = (
    *("model", "component", "rank", "height_px", "width_px", "batch_size", "guidance", "method", "degree"),
    *("options", "seconds_median", "seconds_p05", "seconds_p95", "num_samples", "comm_bytes"),
)
"""What of a row stands in a profile's summary, before its memory, energy and rate."""

MIN_GRAPH_WARMUP_RUNS = 3
"""A step compiled into CUDA graphs is first run, then recorded; only then it is replayed."""


class Bench:
    """Measures targets on one device and writes their rows into a profiles folder."""

    def __init__(self, sweep: Sweep, profiles: Profiles, here: LocalDevice, out: Path, weights: Path | None) -> None:
        self.sweep, self.profiles, self.here, self.out, self.weights = sweep, profiles, here, out, weights
        self.ceilings: Mapping[str, float] = {}
        self._tables: dict[str, MeasuredFile] = {}
        self._model: Pipeline | None = None
        self._now = datetime.now(tz=UTC).date().isoformat()
        self._versions = library_versions()

    # -- what can be measured here

    def carrier(self, degree: int) -> Carrier:
        """How ranks talk: in processes of their own, each on a device of its own, unless loopback was asked for."""
        if degree == 1 or self.sweep.ranks == "loopback":
            return "loopback"
        return "nccl" if self.here.device == "cuda" else "gloo"

    def check(self, targets: Sequence[ProfileTarget]) -> None:
        """Raises `InputError` where this machine, the weights or the protocol cannot give these targets their rows."""
        problems = []
        degrees = {target.degree for target in targets}
        if (size := torchrun_size()) and degrees != {size}:
            rule = f"torchrun started {size} processes, and each of them is a rank"
            asked = ", ".join(map(str, sorted(degrees)))
            problems.append(Problem("--degrees", asked, rule, f"Use --degrees {size}."))
        most = max(degrees, default=1)
        at_once = 1
        if self.carrier(most) != "loopback":  # torchrun may have started other ranks on other hosts
            at_once = int(os.environ.get("LOCAL_WORLD_SIZE", most)) if torchrun_size() else most
        if at_once > self._devices():
            what = "GPUs" if self.here.device == "cuda" else f"times {self.here.threads} usable CPU cores"
            rule = f"{self._devices()} {what} are here, and rows are written for devices that ran"
            remedy = "Use --ranks loopback for each rank's compute alone, or fewer ranks or threads."
            problems.append(Problem("--degrees", str(most), rule, remedy))
        few = self.sweep.warmup_runs < MIN_GRAPH_WARMUP_RUNS
        if few and self.sweep.runtime == "compiled" and self.here.device == "cuda":
            rule = f"a compiled step is a replayed CUDA graph only after {MIN_GRAPH_WARMUP_RUNS} runs"
            remedy = f"Use {MIN_GRAPH_WARMUP_RUNS} or more."
            problems.append(Problem("--warmup-runs", str(self.sweep.warmup_runs), rule, remedy))
        if problems:
            raise InputError(problems)
        for name in dict.fromkeys(target.model for target in targets):
            self._load(name)  # reads no more than the folder's config

    def _devices(self) -> int:
        """Ranks that can run at the same time here."""
        return torch.cuda.device_count() if self.here.device == "cuda" else usable_cores() // self.here.threads

    def check_files(self, targets: Iterable[ProfileTarget]) -> None:
        """Raises `InputError` where the rows of these targets cannot be added to what the folder has."""
        tables = {target.table: self.table(target) for target in targets}
        meta = self._meta() if tables else None
        if meta and (problems := [problem for table in tables.values() for problem in table.problems(meta)]):
            raise InputError(dict.fromkeys(problems))  # a folder that cannot be written is said once

    # -- files

    def table(self, target: ProfileTarget) -> MeasuredFile:
        """The file of a target's rows."""
        if target.table not in self._tables:
            self._tables[target.table] = MeasuredFile(self.out, self.here.name, target.table)
        return self._tables[target.table]

    def has(self, target: ProfileTarget) -> bool:
        """Whether all rows of a target are written."""
        table = self.table(target)
        return all(key in table for component in target.components for key in self.keys(target, component))

    def keys(self, target: ProfileTarget, component: str) -> list[Key]:
        """What the rows of one component measure; that of the whole step first, where there is one."""
        whats = (self._what(target, component, rank) for rank in self._ranks(target))
        return [tuple(what[name] for name in KEYS) for what in whats]

    def _ranks(self, target: ProfileTarget) -> list[int | None]:
        """The ranks that get a row; None is the step as a whole, which only devices that ran together have."""
        if target.degree == 1:
            return [None]
        whole = [] if self.carrier(target.degree) == "loopback" else [None]
        return [*whole, *range(target.degree)]

    def _what(self, target: ProfileTarget, component: str, rank: int | None) -> dict[str, Any]:
        """What a row measures: its columns of these names."""
        return {
            "device": self.here.name,
            "runtime": self.sweep.runtime,
            "precision": self.sweep.precision,
            "model": target.table,
            "component": component,
            "rank": rank,
            "height_px": target.height_px,
            "width_px": target.width_px,
            "batch_size": target.batch_size,
            "guidance": target.guidance,
            "method": target.method,
            "degree": target.degree,
            "options": target.options(self.carrier(target.degree)),
        }

    def _row(self, target: ProfileTarget, component: str, rank: int | None, measured: Measured) -> CostRow:
        timing = measured.timing
        notes: list[str] = []
        if component == "step" and target.settings.get("stride") == 2:
            notes.append("half of a round of two steps")
        if rank is not None:
            in_turn = self.carrier(target.degree) == "loopback"
            whose = "the rank's compute alone, ranks in turn" if in_turn else "the rank's own clock, waits included"
            notes.append(whose)
        if component == "model_load":
            notes.append("from the system's file cache")
        if component == "exchange":
            notes.append("one payload over TCP inside the host, one byte back")
        libraries = ", ".join(f"{name} {self._versions[name]}" for name in ("torch", "diffusers"))
        return CostRow(
            **self._what(target, component, rank),
            seconds_median=timing.median_s,
            seconds_p05=timing.p05_s,
            seconds_p95=timing.p95_s,
            num_samples=len(timing.samples_s),
            peak_memory_bytes=timing.peak_memory_bytes,
            comm_bytes=measured.comm_bytes,
            energy_j=timing.energy_j,
            kind="measured",
            source=f"hybridsd_sim executors {__version__} ({libraries})",
            source_date=self._now,
            notes="; ".join(filter(None, (*notes, measured.note))),
        )

    def _meta(self) -> Meta:
        protocol = {"warmup_runs": self.sweep.warmup_runs, "runs": self.sweep.runs, "trimming": "none"}
        return Meta.model_validate(
            {
                "device": self.here.name,
                "processor": processor(self.here),
                "driver": driver(self.here),
                "libraries": self._versions,
                "date": self._now,
                "protocol": protocol,
                "commit": commit(),
                "ceilings": {name: float(f"{value:.4g}") for name, value in self.ceilings.items()},
            }
        )

    # -- measuring

    def measure(self, target: ProfileTarget) -> list[CostRow]:
        """Measure a target and write its rows."""
        component = target.components[0]
        if component in STEP_COMPONENTS:
            by_component = self._time_steps(target)
        else:
            by_component = {component: {None: time_part(self._loaded(target), target, self._protocol, self.here)}}
        rows = [
            self._row(target, component, rank, measured)
            for component, ranks in by_component.items()
            for rank, measured in ranks.items()
        ]
        self.table(target).put(rows, self._meta())
        return rows

    def _time_steps(self, target: ProfileTarget) -> dict[str, dict[int | None, Measured]]:
        carrier = self.carrier(target.degree)
        model = self._loaded(target)
        ranks = run_ranks(
            time_steps,
            target.degree,
            kind=carrier,
            args=(model if carrier == "loopback" else replace(model), target, self._protocol, self.here.threads),
            device=self.here.device,
            threads=self.here.threads,
            timeout_s=RANK_TIMEOUT_S,
        )
        found: dict[str, dict[int | None, Measured]] = {}
        for component in target.components:
            each = [rank[component] for rank in ranks]
            rows: dict[int | None, Measured] = dict(enumerate(each))
            rows[None] = each[0] if target.degree == 1 else slowest(each)
            found[component] = {rank: rows[rank] for rank in self._ranks(target)}
        return found

    @property
    def _protocol(self) -> RunProtocol:
        return RunProtocol(warmup_runs=self.sweep.warmup_runs, runs=self.sweep.runs, runtime=self.sweep.runtime)

    def _loaded(self, target: ProfileTarget) -> Pipeline:
        """The model, kept for the next target; what needs no UNet is measured with none in memory."""
        if self._model is None or self._model.name != target.model or target.components[0] in METERED:
            self._model = None
            self._model = self._load(target.model)
        return self._model

    def _load(self, name: str) -> Pipeline:
        return load_pipeline(
            name,
            weights=self.weights,
            device=self.here.device,
            dtype=PRECISIONS[self.sweep.precision],
            profiles=self.profiles,
        )

    def forget(self) -> None:
        """Give back the memory that a target which failed may have left behind."""
        self._model = None
        gc.collect()
        if self.here.device == "cuda":
            torch.cuda.empty_cache()


def torchrun_size() -> int:
    """Processes that torchrun started, this one among them; 0 where it did not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit of the checkout that runs, short, with a plus where files were changed; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(  # noqa: S603 a fixed command
            ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"],  # noqa: S607
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


@dataclass(slots=True)
class ProfileResult:
    """What a profile measured: new rows, targets whose rows were there, targets left for want of time, and refusals.

    `failed` are targets that were begun and could not be finished; why is among the refusals. `summary` has an entry
    for each component of each target whose rows are there.
    """

    here: LocalDevice
    rows: list[CostRow] = field(default_factory=list)
    kept: list[ProfileTarget] = field(default_factory=list)
    left: list[ProfileTarget] = field(default_factory=list)
    failed: list[ProfileTarget] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ceilings: Mapping[str, float] = field(default_factory=dict)
    summary: list[dict[str, object]] = field(default_factory=list)


def profile(
    sweep: Sweep,
    profiles: Profiles,
    here: LocalDevice,
    out: Path,
    *,
    weights: Path | None = None,
    time_budget_s: float | None = None,
    progress: Progress | None = None,
) -> ProfileResult:
    """Measure what is legal of a grid and not yet in `out`, a profiles folder, and write it there.

    A target that would go beyond the time budget, judged by those before it, is left; one that fails is passed over.
    Raises `InputError` for a grid that cannot be measured here, or whose rows cannot be written, before anything is.
    """
    if time_budget_s is not None and not time_budget_s > 0:  # NaN, too
        raise InputError(Problem("--time-budget-s", str(time_budget_s), "must be more than 0"))
    if time_budget_s is not None and torchrun_size():
        rule = "under torchrun each rank would judge by its own clock, and they would part"
        raise InputError(Problem("--time-budget-s", str(time_budget_s), rule, "Leave it out, or give a smaller grid."))
    targets, refused = find_targets(sweep, profiles)
    bench = Bench(sweep, profiles, here, out, weights)
    bench.check(targets)
    outcome = ProfileResult(here, refused=refused)
    todo = [target for target in targets if not bench.has(target)]
    outcome.kept = [target for target in targets if target not in todo]
    bench.check_files(todo)
    threads = torch.get_num_threads()
    torch.set_num_threads(here.threads)
    try:
        _measure_all(todo, bench, outcome, progress or Progress(), time_budget_s)
    finally:
        torch.set_num_threads(threads)
    outcome.files = sorted({bench.table(target).path for target in targets if bench.has(target)})
    outcome.summary = [entry for target in targets for entry in _summary(bench, target)]
    return outcome


def _measure_all(
    todo: Sequence[ProfileTarget], bench: Bench, outcome: ProfileResult, progress: Progress, time_budget_s: float | None
) -> None:
    if not todo:
        return
    started_s, done, measured_s = time.perf_counter(), 0.0, 0.0
    progress.begin(sum(target.weight for target in todo))
    bench.ceilings = outcome.ceilings = measure_ceilings(bench.here, bench.sweep.precision)
    for number, target in enumerate(todo):
        begun_s = time.perf_counter()
        expected_s = target.weight * measured_s / done if done else 0.0
        if number and time_budget_s is not None and begun_s - started_s + expected_s > time_budget_s:
            outcome.left.append(target)
            continue
        progress.start(target)
        failed = False
        try:
            outcome.rows += bench.measure(target)
        except (RuntimeError, HybridSDError) as error:  # CUDA, the CPU allocator and the compiler all raise the former
            if torchrun_size():
                raise  # the other ranks are still in this target
            failed = True
            outcome.failed.append(target)
            reason = str(error).strip().splitlines() or [""]
            outcome.refused.append(Problem(str(target), type(error).__name__, reason[0]))
        if failed:
            bench.forget()  # only now: the error held what the target had in memory
        else:
            done += target.weight
            measured_s += time.perf_counter() - begun_s
        progress.finish(target)


def _summary(bench: Bench, target: ProfileTarget) -> Iterator[dict[str, object]]:
    """An entry for each component of a target whose rows are there: the whole step's, else its slowest rank's."""
    table = bench.table(target)
    for component in target.components:
        rows = [table.rows[key] for key in bench.keys(target, component) if key in table]
        if not rows:
            continue
        row = rows[0] if rows[0].rank is None else max(rows, key=lambda row: row.seconds_median)
        flop = target.flop[component]
        rate = flop / row.seconds_median if flop else None
        own = f"_{row.precision}_flop_per_s"
        ceiling = max((value for name, value in bench.ceilings.items() if name.endswith(own)), default=None)
        yield {name: getattr(row, name) for name in SUMMARY_COLUMNS} | {
            "peak_memory_bytes": row.peak_memory_bytes,
            "energy_j": row.energy_j,
            "flop_per_s": rate,
            "share_of_ceiling": rate / ceiling if rate and ceiling else None,
        }
