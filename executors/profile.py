"""Measures a grid of components, methods, sizes and degrees on the device that is here, and writes cost rows.

A measurement whose rows are already in the folder is not made again, and every file is whole after each row, so that a
profile can be cut off and taken up at any moment. Rows are only written for devices that really ran: ranks that share a
device in turn get a row each for their own compute, and none for the step as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from executors.bench import Bench, torchrun_size
from executors.devices import Here
from executors.devices import ceilings as measure_ceilings
from executors.progress import Progress
from executors.sweep import Sweep, Target, find_targets
from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.profiles import CostRow, Profiles


@dataclass(slots=True)
class Outcome:
    """What a profile measured: new rows, targets whose rows were there, targets left for want of time, and refusals.

    `failed` are targets that were begun and could not be finished; why is among the refusals. `summary` has an entry
    for each component of each target whose rows are there.
    """

    here: Here
    rows: list[CostRow] = field(default_factory=list)
    kept: list[Target] = field(default_factory=list)
    left: list[Target] = field(default_factory=list)
    failed: list[Target] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    ceilings: Mapping[str, float] = field(default_factory=dict)
    summary: list[dict[str, object]] = field(default_factory=list)


def profile(
    sweep: Sweep,
    profiles: Profiles,
    here: Here,
    out: Path,
    *,
    weights: Path | None = None,
    time_budget_s: float | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Measure what is legal of a grid and not yet in `out`, a profiles folder, and write it there.

    A target that would go beyond the time budget, judged by those before it, is left; one that fails is passed over.
    Raises `InputError` for a grid that cannot be measured here, or whose rows cannot be written, before anything is.
    """
    _check_budget(time_budget_s)
    targets, refused = find_targets(sweep, profiles)
    bench = Bench(sweep, profiles, here, out, weights)
    bench.check(targets)
    outcome = Outcome(here, refused=refused)
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


def _check_budget(time_budget_s: float | None) -> None:
    if time_budget_s is None:
        return
    if not time_budget_s > 0:  # NaN, too
        raise InputError(Problem("--time-budget-s", str(time_budget_s), "must be more than 0"))
    if torchrun_size():
        rule = "under torchrun each rank would judge by its own clock, and they would part"
        raise InputError(Problem("--time-budget-s", str(time_budget_s), rule, "Leave it out, or give a smaller grid."))


def _measure_all(
    todo: Sequence[Target], bench: Bench, outcome: Outcome, progress: Progress, time_budget_s: float | None
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
        progress.doing(target)
        if _is_measured(target, bench, outcome):
            done += target.weight
            measured_s += time.perf_counter() - begun_s
        progress.done(target)


def _is_measured(target: Target, bench: Bench, outcome: Outcome) -> bool:
    """Measure a target; where that fails, note why and make room for the next one."""
    try:
        outcome.rows += bench.measure(target)
    except (RuntimeError, HybridSDError) as error:  # CUDA, the CPU allocator and the compiler all raise the former
        if torchrun_size():
            raise  # the other ranks are still in this target
        outcome.failed.append(target)
        reason = str(error).strip().splitlines() or [""]
        outcome.refused.append(Problem(str(target), type(error).__name__, reason[0]))
    else:
        return True
    bench.forget()  # only now: the error held what the target had in memory
    return False


def _summary(bench: Bench, target: Target) -> Iterator[dict[str, object]]:
    """An entry for each component of a target whose rows are there: the whole step's, else its slowest rank's."""
    table = bench.table(target)
    for component in target.components:
        rows = [table.rows[key] for key in bench.keys(target, component) if key in table]
        if rows:
            row = rows[0] if rows[0].rank is None else max(rows, key=lambda row: row.seconds_median)
            yield _entry(target, component, row, bench.ceilings)


def _entry(target: Target, component: str, row: CostRow, ceilings: Mapping[str, float]) -> dict[str, object]:
    flop = target.flop[component]
    rate = flop / row.seconds_median if flop else None
    own = f"_{row.precision}_flop_per_s"
    ceiling = max((value for name, value in ceilings.items() if name.endswith(own)), default=None)
    named = ("model", "component", "rank", "height_px", "width_px", "batch_size", "guidance", "method", "degree")
    figures = ("options", "seconds_median", "seconds_p05", "seconds_p95", "num_samples", "comm_bytes")
    return {name: getattr(row, name) for name in (*named, *figures)} | {
        "peak_memory_bytes": row.peak_memory_bytes,
        "energy_j": row.energy_j,
        "flop_per_s": rate,
        "share_of_ceiling": rate / ceiling if rate and ceiling else None,
    }
