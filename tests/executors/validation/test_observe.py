"""Live runs are observed in parts: by rows at the pace just before each, tried again where the pace drifted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.live import TaskResult
from executors.validation import KINDS, validate
from executors.validation import recording as kept
from executors.validation.cost_rows import TimedTask, WorkerProfile, drift, profile_of
from executors.validation.observe import ObservationProtocol, RunObserver, missing_requests, observe
from executors.validation.testbed import CLOUD, EDGE, ServingKind, build_testbed, plan_of
from hybridsd_sim import load_profiles
from hybridsd_sim.errors import InputError
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.workload import import_trace
from validation_runs import observed_of, rows, run_of, set_up


@given(cloud=st.floats(0.5, 2.0), edge=st.floats(0.5, 2.0))
def test_a_profile_follows_the_pace_of_each_device(cloud, edge):
    """Whatever a device does takes longer in proportion to its pace; back at the old pace nothing has changed."""
    profile = WorkerProfile(rows=tuple(rows()), stack_s=0.003, pace={CLOUD: 0.05, EDGE: 0.04})
    other = profile.at({CLOUD: 0.05 * cloud, EDGE: 0.04 * edge})
    again = other.at(profile.pace)
    assert {row.device for row in profile.rows} == {CLOUD, EDGE}
    assert other.stack_s == profile.stack_s
    for row, moved, back in zip(profile.rows, other.rows, again.rows, strict=True):
        assert moved.seconds_median == pytest.approx(row.seconds_median * (cloud if row.device == CLOUD else edge))
        assert back.seconds_median == pytest.approx(row.seconds_median)


def done_in(before: float, steps: float, after: float, num_steps: int) -> TaskResult:
    """A task of so many seconds before, in and after its steps."""
    return TaskResult(
        payload=b"", is_image=True, start_s=0.0, stop_s=before + steps + after, text_encode_s=before,
        vae_decode_s=after, step_s=(steps / num_steps,) * num_steps, parse_s=0.0, serialise_s=0.0,
    )  # fmt: skip


SECONDS = st.tuples(*[st.floats(0.001, 1.0)] * 3)


@given(tasks=st.lists(SECONDS, min_size=1, max_size=30))
def test_the_parts_of_a_task_are_together_as_long_as_tasks_are_on_average(known, tasks):
    """However uneven the tasks are, every part takes some time; where medians leave none, the whole takes longer."""
    scenario, deployment = set_up(KINDS["cloud"], known)
    plan = plan_of(deployment)
    seen = [
        TimedTask(done_in(before, step, after, plan.num_inference_steps), before + step + after)
        for before, step, after in tasks
    ]
    before, step, after = (row.seconds_median for row in profile_of(scenario, plan, [seen], "").rows)
    whole = 2.0 * before + plan.num_inference_steps * step + after
    mean_s = fmean(map(sum, tasks))
    assert after > 0.0
    assert whole == pytest.approx(mean_s) or (whole > mean_s and after == pytest.approx(min(task[2] for task in tasks)))


def test_void_parts_are_made_again_and_sound_ones_are_not(known, tmp_path):
    """What a run misses is what it was to have less what its sound parts have."""
    run = run_of(KINDS["cloud"], known, tmp_path)
    sound, void = (observed_of(run, known, KINDS["cloud"], drift=drift) for drift in (0.01, 0.011))
    assert missing_requests(250, []) == 250
    assert missing_requests(250, [sound, void]) == 150
    assert missing_requests(250, [sound, void, sound, sound]) == 0


class Rehearsed(RunObserver):
    """An observer whose workers have the paces of a script, and whose parts are always the same hundred requests."""

    def __init__(self, known: Profiles, tmp_path: Path, protocol: ObservationProtocol, paces: list[float]) -> None:
        self.said: list[str] = []
        super().__init__(KINDS["cloud"], None, known, protocol, tmp_path, self.said.append)
        _, self.deployment = set_up(self.kind, known)
        self.known, self.paces, self.profiles = known, iter(paces), []
        self.run = run_of(self.kind, known, tmp_path)

    async def take_pace(self):
        return {CLOUD: next(self.paces)}

    async def rehearse_load(self, rate_per_s, seed):
        mine = [row for row in rows() if row.device == CLOUD]
        return WorkerProfile(rows=tuple(row.model_copy(update={"num_samples": 24}) for row in mine))

    async def observe_part(self, load, done, count, profile):
        self.profiles.append(profile)
        after = await self.take_pace()
        part = observed_of(self.run, self.known, self.kind, part=len(done) + 1, drift=drift(profile.pace, after))
        return replace(part, rows=profile.rows, step_after_s=after)


def test_parts_are_served_by_rows_at_the_pace_just_before_them(known, tmp_path):
    """A rehearsal that the pace drifts around is made anew, and after a void part it is waited for a steady pace."""
    paces = [1.0, 1.1, 1.1, 1.2]  # steady at 1.1; it drifted in the rehearsal
    paces += [1.2, 1.2, 1.2]  # once more: sound
    paces += [1.5, 1.6, 1.6]  # the first part is void; steady at 1.6
    paces += [1.6, 1.61]  # two sound parts
    observer = Rehearsed(known, tmp_path, ObservationProtocol(), paces)
    asyncio.run(observer.serve(0.7, 200, []))
    assert not list(observer.paces)
    assert [profile.pace[CLOUD] for profile in observer.profiles] == [1.2, 1.6, 1.6]
    assert [part.void for part in kept.find(tmp_path)] == [True, False, False]
    before = [row.seconds_median for row in rows() if row.device == CLOUD]
    for profile in observer.profiles:
        after = [row.seconds_median for row in profile.rows]
        assert after == pytest.approx([second * profile.pace[CLOUD] / 1.2 for second in before])


def test_of_rehearsals_that_all_drifted_the_best_counts_and_attempts_end(known, tmp_path):
    """What is always void is given up for now, and what is missing is said."""
    paces = [1.0, 1.0, 1.05, 1.05, 1.05, 1.2]  # two rehearsals, the first drifted less
    paces += [2.0, 2.0, 2.0, 3.0]  # two attempts, the pace steady between them
    observer = Rehearsed(known, tmp_path, ObservationProtocol(rehearsals=2, attempts=2), paces)
    asyncio.run(observer.serve(0.7, 30, []))
    assert observer.profiles[0].rows[0].notes.endswith(f"times {1.2 / 1.025:.4f}, the pace before the part")
    assert all(part.void for part in kept.find(tmp_path))
    assert observer.said[-1] == "cloud-0.7: given up for now, 30 requests are missing"


# ---- The whole ------------------------------------------------------------------------------------------------------


def test_a_handful_of_requests_is_served_live_and_replayed(tmp_path):
    """Workers, service, client and driver for real: all requests are served, booked, kept, replayed and reported.

    A run that was cut off goes on with what it lacks, but not with another driver. What is always void ends.
    """
    kind = ServingKind(name="hybrid", num_inference_steps=2, in_cloud=True, at_edge=True)
    testbed = build_testbed(tmp_path / "testbed")
    protocol = ObservationProtocol(rehearsal_s=0.1, part_s=0.3, pace_s=0.1, drift_limit=100.0, fewest_rehearsed=4)
    for requests in (6, 9, 9):  # the second goes on where the first stopped, and the third has nothing left to do
        asyncio.run(observe(kind, {0.5: requests}, testbed, tmp_path / "runs", protocol, lambda _: None))
    parts = kept.find(tmp_path / "runs")
    assert [part.part for part in parts] == list(range(1, len(parts) + 1))
    assert 9 <= sum(len(part.records()) for part in parts) <= 9 + len(parts)
    assert parts[0].step_after_s == parts[1].step_before_s
    assert len({part.scenario.seed for part in parts}) == len(parts)
    for part in parts:
        assert plan_of(part.deployment).switch_step == 1
        assert {row.component for row in part.rows} == {
            "text_encode", "step", "handover_serialise", "handover_parse", "vae_decode",
        }  # fmt: skip
    measured = load_profiles([testbed.profiles, tmp_path / "runs" / "profiles" / "hybrid-0.5"])
    assert len(measured.costs) == len(parts[-1].rows)
    assert len(validate(tmp_path / "out", runs=tmp_path / "runs")) == 1

    (tmp_path / "trace.csv").write_text("arrival_s\n0.0\n1.0\n4.0\n", encoding="utf-8")
    other = replace(protocol, trace=import_trace(tmp_path / "trace.csv"))
    with pytest.raises(InputError, match="mlcommons-loadgen"):
        asyncio.run(observe(kind, {0.5: 20}, testbed, tmp_path / "runs", other, lambda _: None))
    never = replace(other, part_s=3.0, drift_limit=-1.0, rehearsals=2, attempts=2, patience=1)
    asyncio.run(observe(kind, {0.5: 3}, testbed, tmp_path / "void", never, lambda _: None))
    tries = kept.find(tmp_path / "void")
    assert [(part.part, part.void, part.driver) for part in tries] == [(1, True, "trace"), (2, True, "trace")]
    for part in tries:
        gaps = np.diff(np.sort(part.times_s["arrival_s"]))
        assert gaps[1] / gaps[0] == pytest.approx(3.0, rel=0.2)
