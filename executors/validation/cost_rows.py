"""The profile behind a validation: cost rows of the parts of a request, from tasks that its workers were seen to do.

What a worker does around the parts that it times itself (it takes the task, makes a PNG of the image, answers, turns to
the next one) is counted to the last part. So is what is left of the mean beyond the medians of the parts before: all
parts together are the mean time for which a request holds the worker, because that is what a queue is made of; unless
so few and uneven tasks were seen that nothing would be left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

from hybridsd_sim.plan import Plan, Stage
from hybridsd_sim.profiles import CostRow, Meta
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.version import __version__

from ..live import TaskResult
from ..profiling import LocalDevice, MeasuredFile, Timing, commit, library_versions, processor
from .testbed import CLOUD, EDGE, REQUEST_CLASS, TEXT_ENCODER


@dataclass(frozen=True, slots=True)
class TimedTask:
    """A task that was done, and the seconds for which it held its worker."""

    done: TaskResult
    held_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProfile:
    """Cost rows of the parts of a request, and the pace of the workers then: the median step of each device.

    `stack_s` are the seconds for which a request is in nobody's hands beyond what the model of its link says: what
    clients, servers and sockets add, of requests that are served at the edge alone the asking whether they may be.
    """

    rows: tuple[CostRow, ...]
    stack_s: float = 0.0
    pace: Mapping[str, float] = field(default_factory=dict)

    def at(self, pace: Mapping[str, float]) -> WorkerProfile:
        """The same workers at another pace: all that a device does takes longer, or less, in that proportion."""
        rows = []
        for row in self.rows:
            factor = pace[row.device] / self.pace[row.device]
            known = {name: getattr(row, name) for name in ("seconds_median", "seconds_p05", "seconds_p95")}
            seconds = {name: factor * second for name, second in known.items() if second is not None}
            notes = f"{row.notes}; times {factor:.4f}, the pace before the part"
            rows.append(row.model_copy(update={**seconds, "notes": notes}))
        return replace(self, rows=tuple(rows), pace=pace)


def drift(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest relative change of a device's median step, whichever way.

    0.01 is one per cent. Both have the same devices.
    """
    return max(abs(after[device] / seconds - 1.0) for device, seconds in before.items())


def profile_of(scenario: Scenario, plan: Plan, tasks: Sequence[Sequence[TimedTask]], notes: str) -> WorkerProfile:
    """The profile that the tasks of each stage of a plan make; `notes` say how they came about."""
    rows: list[CostRow] = []
    handed_over = 0
    for stage, held in zip(plan.stages, tasks, strict=True):
        site = _Site(scenario, plan, stage, notes)
        rows += site.rows(held, handed_over)
        handed_over = len(held[0].done.payload)
    return WorkerProfile(rows=tuple(rows))


def device_of(stage: Stage) -> str:
    """The testbed's device that does a stage."""
    return CLOUD if stage.site.tier == "cloud" else EDGE


class _Site:
    """Makes rows of what the worker of one stage did."""

    def __init__(self, scenario: Scenario, plan: Plan, stage: Stage, notes: str) -> None:
        self.device = device_of(stage)
        self._spec = scenario.requests[REQUEST_CLASS]
        self._plan, self._stage, self._notes = plan, stage, notes

    def rows(self, tasks: Sequence[TimedTask], handed_over: int) -> Iterator[CostRow]:
        """A row for what comes before the steps, one for a step, one for what comes after.

        Before are the prompt or the hand-over's reading, after the decoder or the hand-over's writing. The last row
        takes what is left of the mean time that a task holds its worker, and never less than the shortest task's share.
        """
        stage = self._stage
        before_s = [one.done.text_encode_s + one.done.parse_s for one in tasks]
        steps_s = [sum(one.done.step_s) for one in tasks]
        rest_s = mean(one.held_s for one in tasks) - median(before_s) - median(steps_s)
        after_s = [one.held_s - before - steps for one, before, steps in zip(tasks, before_s, steps_s, strict=True)]
        factor = max(rest_s, min(after_s)) / median(after_s)
        after_s = [factor * second for second in after_s]
        group = {"method": stage.method, "degree": stage.degree, "options": "ranks=gloo" if stage.degree > 1 else ""}
        a_step_s = [seconds / stage.num_steps for seconds in steps_s]
        size = {"height_px": self._spec.height_px, "width_px": self._spec.width_px}
        guided = self._spec.guidance_scale > 1.0
        image = {**size, "guidance": guided}
        if stage.start:
            yield self._row(stage.model, "handover_parse", before_s, "", **image, comm_bytes=handed_over)
        else:
            a_prompt_s = [seconds / (2 if guided else 1) for seconds in before_s]
            yield self._row(TEXT_ENCODER, "text_encode", a_prompt_s, "one prompt of a request")
        yield self._row(stage.model, "step", a_step_s, "mean of a task", **image, **group)
        left = "what is left of the mean time for which a request holds the worker"
        if stage.stop == self._plan.num_inference_steps:
            yield self._row(self._plan.vae, "vae_decode", after_s, f"{left}, the PNG among it", **size)
        else:
            more = {**image, "comm_bytes": len(tasks[0].done.payload)}
            yield self._row(stage.model, "handover_serialise", after_s, left, **more)

    def _row(self, model: str, component: str, samples_s: Sequence[float], note: str, **more: object) -> CostRow:
        timing = Timing(tuple(samples_s))
        versions = library_versions()
        libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers"))
        return CostRow.model_validate(
            {
                "device": self.device, "runtime": "eager", "precision": "fp32", "model": model, "component": component,
                "seconds_median": timing.median_s, "seconds_p05": timing.p05_s, "seconds_p95": timing.p95_s,
                "num_samples": len(timing.samples_s), "kind": "measured",
                "source": f"hybridsd_sim executors {__version__} ({libraries})",
                "source_date": datetime.now(tz=UTC).date().isoformat(),
                "notes": "; ".join(filter(None, (self._notes, note))), **more,
            },
            strict=False,
        )  # fmt: skip


def write_profile(rows: Sequence[CostRow], folder: Path, *, warmup_runs: int) -> None:
    """The rows as measured files of a profiles folder, in the place of those that timed the same."""
    for device, model in dict.fromkeys((row.device, row.model) for row in rows):
        mine = [row for row in rows if (row.device, row.model) == (device, model)]
        protocol = {"warmup_runs": warmup_runs, "runs": mine[0].num_samples, "trimming": "none"}
        meta = {
            "device": device, "processor": processor(LocalDevice(device, "cpu", 1)), "libraries": library_versions(),
            "date": mine[0].source_date, "protocol": protocol, "commit": commit(),
        }  # fmt: skip
        MeasuredFile(folder, device, model).put(mine, Meta.model_validate(meta))
