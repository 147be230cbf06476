"""`hybridsd-sim validate`: observes live runs, replays them, compares the two, writes a report."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.files import write_atomically
from hybridsd_sim.profiles import load_profiles
from hybridsd_sim.reporting import write_agreement
from hybridsd_sim.simulation import Records, column
from hybridsd_sim.version import __version__
from hybridsd_sim.workload import import_trace

from ..profiling import LocalDevice, commit, library_versions, processor
from . import recording
from .compare import Comparison, Pair, compare
from .observe import ObservationProtocol, observe
from .recording import ObservedPart, replay
from .testbed import KINDS, build_testbed, kind_of, plan_of, share_requests, write_catalogue

LOADS = (0.3, 0.6, 0.8)

RUNS, REPLAYS, REPORT, TESTBED = "runs", "replays", "report", "testbed"


def validate(
    out: Path,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    loads: Sequence[float] = LOADS,
    requests: int = 2040,
    trace: Path | None = None,
    runs: Path | None = None,
    tries: int = 5,
) -> list[dict[str, Any]]:
    """Validate the simulator on this machine; returns a row for each run, and writes all of it into `out`.

    Every kind gets as many of the `requests`, shared out over the `loads` so that its runs take equally long. Arrivals
    are LoadGen's Poisson, or those of a `trace` at the rate of each load. Runs are made in parts, and void parts again
    as long as there are attempts; what all kinds lack after that is made in the next of `tries` rounds. Sound parts
    that `out` holds are not made again; `runs` is a folder of runs to compare without observing any.
    """
    folder = out / RUNS if runs is None else runs
    with _progress() as say:
        if runs is None:
            protocol = ObservationProtocol(trace=None if trace is None else import_trace(trace))
            wanted = [kind_of(name) for name in kinds]
            each = share_requests(math.ceil(requests / len(wanted)), loads)
            testbed = build_testbed(out / TESTBED)
            for kind in tries * wanted:
                asyncio.run(observe(kind, each, testbed, folder, protocol, say))
        found = recording.find(folder)
        if not found:
            rule = "holds no run that `validate` observed"
            raise InputError(Problem("--from", str(folder), rule, "Name the `runs` of another validation."))
        return _report(found, out, say)


def _report(found: Sequence[ObservedPart], out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Replay the sound parts of every run, compare, and write records, figures and pages."""
    catalogue = load_profiles(write_catalogue(out / TESTBED / "profiles"))
    runs, rows, lost = [], [], []
    for (kind, load), group in groupby(found, key=lambda part: (part.kind, part.load)):
        parts = list(group)
        say(f"{recording.name_of(kind, load)}: replaying")
        pairs: list[Pair] = []
        for part in parts:
            if not part.void:
                simulated = replay(part, catalogue, out / "arrivals")
                recording.write_times(out / REPLAYS / f"{part.name}.parquet", recording.of_records(simulated))
                pairs.append((part.records(), simulated))
        if not pairs:
            lost.append(recording.name_of(kind, load))
            rows.append(_row(parts, None))
            continue
        comparison = compare(pairs, load)
        runs.append(_run(parts, pairs, comparison))
        rows.append(_row(parts, comparison))
    text = json.dumps([{k: v for k, v in run.items() if k not in ("live", "simulated")} for run in runs], indent=1)
    write_atomically(out / "comparison.json", f"{text}\n".encode())
    folder = out / REPORT
    shutil.rmtree(folder, ignore_errors=True)
    libraries = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    made_by = f"hybridsd_sim {__version__} ({commit() or 'no checkout'}) with {libraries}"
    where = processor(LocalDevice("", "cpu", 1))
    write_agreement({"runs": runs, "lost": lost, "made_by": [("Made by", made_by), ("On", where)]}, folder)
    return rows


def _run(parts: Sequence[ObservedPart], pairs: Sequence[Pair], comparison: Comparison) -> dict[str, Any]:
    """A run and its replay as the report wants them: figures of its sound parts, and what each part was like."""
    first = next(part for part in parts if not part.void)
    figures = [asdict(figure) | {"holds": figure.holds} for figure in comparison.figures]
    return {
        "name": recording.name_of(first.kind, first.load), "kind": first.kind, "load": first.load,
        "driver": first.driver, "requests": comparison.requests, "block": comparison.block, "holds": comparison.holds,
        "drift_limit": first.drift_limit, "plan": plan_of(first.deployment).label,
        "slo_s": next(iter(first.scenario.requests.values())).slo_s,
        "figures": [  # None for what is not a number
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figure.items()}
            for figure in figures
        ],
        "parts": [
            {
                "part": part.part, "requests": len(part.late_s), "drift": part.drift, "void": part.void,
                "steps": {
                    device: [seconds, part.step_during_s[device], part.step_after_s[device]]
                    for device, seconds in part.step_before_s.items()
                },
                "stack_s": part.stack_s, "late_s": float(part.late_s.max()),
            }
            for part in parts
        ],
        "rows": [row.model_dump() for row in first.rows],
        "live": _latencies([live for live, _ in pairs]), "simulated": _latencies([replayed for _, replayed in pairs]),
    }  # fmt: skip


def _latencies(parts: Sequence[Records]) -> list[float]:
    rows = np.concatenate([records.rows() for records in parts])
    found: list[float] = np.sort(column(rows, "finish_s") - column(rows, "arrival_s")).tolist()
    return found


def _row(parts: Sequence[ObservedPart], comparison: Comparison | None) -> dict[str, Any]:
    """What the command prints of a run; without a sound part, nothing is compared."""
    names = ("latency_p50_s", "latency_mean_s", "latency_p95_s", "served_per_s")
    return {
        "run": recording.name_of(parts[0].kind, parts[0].load), "requests": comparison.requests if comparison else 0,
        "parts": sum(not part.void for part in parts), "void_parts": sum(part.void for part in parts),
        **{f"{name}_off": comparison[name].off if comparison else None for name in names},
        "holds": comparison.holds if comparison else None,
    }  # fmt: skip


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error: a spinner for people, lines for logs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    with console.status("starting") as status:

        def say(text: str) -> None:
            console.log(text)
            status.update(text)

        yield say
