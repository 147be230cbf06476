"""A validation: what is run, how it is driven and timed, and how what came of it is booked and kept."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.live import TaskResult
from executors.models import load_pipeline
from executors.validation import KINDS
from executors.validation import recording as kept
from executors.validation.compare import compare
from executors.validation.cost_rows import drift
from executors.validation.load import SentRequest, drive_loadgen, replay_trace, trace_piece
from executors.validation.recording import TICK_S, build_records, draw_links, facts_of, replay, times_of
from executors.validation.rehearse import ObservedTask, hold_times
from executors.validation.testbed import (
    CONFIGS,
    SIZE_PX,
    balanced_switch_step,
    bottleneck_s,
    build_testbed,
    candidate_of,
    deployment_of,
    kind_of,
    plan_of,
    scenario_of,
    share_requests,
)
from hybridsd_sim import load_profiles
from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.simulation import check_laws, column
from hybridsd_sim.workload import import_trace
from validation_runs import observed_of, outcomes_of, rows, run_of, set_up

# ---- Settings -------------------------------------------------------------------------------------------------------


@given(large_s=st.floats(0.02, 0.2), small_s=st.floats(0.02, 0.2))
def test_the_switch_step_loads_cloud_and_edge_most_evenly(catalogue, large_s, small_s):
    """No other switch step keeps the busier side busy for less."""
    kind, profiles = KINDS["hybrid"], catalogue.with_costs(rows(large_s, small_s))
    scenario = scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1.0)

    def busiest_s(step: int) -> float:
        return bottleneck_s(candidate_of(scenario, deployment_of(kind, scenario, profiles, switch_step=step), profiles))

    chosen = balanced_switch_step(kind, profiles)
    assert busiest_s(chosen) == min(busiest_s(step) for step in range(1, kind.num_inference_steps))


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_runs_where_it_says(kind, known):
    """Cloud and edge do their steps, one of each kind of worker is rented, and the whole is priced from rows alone."""
    scenario, deployment = set_up(kind, known)
    plan, candidate = plan_of(deployment), candidate_of(scenario, deployment, known)
    assert bool(plan.cloud_stages) is kind.in_cloud
    assert bool(plan.edge_stages) is kind.at_edge
    assert plan.num_inference_steps == kind.num_inference_steps
    assert candidate.degree == (kind.degree if kind.in_cloud else 0)
    assert {part.seconds.kind for part in candidate.cost.parts if part.tier != "network"} == {"measured"}


@given(st.integers(1, 5000), st.lists(st.floats(0.05, 0.95), min_size=1, max_size=5, unique=True))
def test_requests_are_shared_out_in_proportion_to_load(requests, loads):
    """So that all runs take equally long; none is lost by rounding."""
    shares = share_requests(requests, loads)
    assert sum(shares.values()) >= requests
    spans = [count / load for load, count in shares.items()]
    assert max(spans) - min(spans) <= 1.0 / min(loads)


def test_loads_and_kinds_that_cannot_be_run_are_refused():
    """A load of 1 has no end, and there are four kinds."""
    for load in (0.0, 1.0, 1.5):
        with pytest.raises(InputError, match="--loads"):
            share_requests(100, [0.5, load])
    with pytest.raises(InputError, match="hybird"):
        kind_of("hybird")


def test_drift_is_that_of_the_worst_device_whichever_way():
    """A device that became faster drifted, too."""
    assert drift({"a": 1.0, "b": 2.0}, {"a": 1.005, "b": 1.9}) == pytest.approx(0.05)
    assert drift({"a": 1.0}, {"a": 1.0}) == 0.0


def done_at(start_s: float, stop_s: float) -> TaskResult:
    """A task of two steps."""
    return TaskResult(
        payload=b"", is_image=True, start_s=start_s, stop_s=stop_s, text_encode_s=0.0, vae_decode_s=0.0,
        step_s=(0.1, 0.1), parse_s=0.0, serialise_s=0.0,
    )  # fmt: skip


def test_a_task_holds_its_worker_until_the_next_one_that_waits_begins():
    """Behind a task for which nobody waits, the usual pause is counted in place of the idle time."""
    spans = [(0.0, 1.0), (1.2, 2.0), (2.3, 3.0), (9.0, 9.9)]
    given = [0.0, 0.5, 0.6, 8.9]  # the last one came when the worker had long been idle
    seen = [ObservedTask(given_s, done_at(*span)) for given_s, span in zip(given, spans, strict=True)]
    found = [one.held_s for one in hold_times(reversed(seen))]
    assert found == pytest.approx([1.2, 1.1, 0.7 + 0.25, 0.9 + 0.25])


def test_the_pipelines_on_disk_are_those_of_the_catalogue(tmp_path):
    """Each loads as a whole under its name: UNet, autoencoder, text encoder, and a tokenizer of single bytes."""
    testbed = build_testbed(tmp_path)
    profiles = load_profiles(testbed.profiles)
    for name in CONFIGS:
        model = load_pipeline(name, weights=testbed.weights[name], profiles=profiles)
        assert sum(part.numel() for part in model.unet.parameters()) == profiles.model(name).params
        embeds = model.encode(["a fox", "é"], height_px=SIZE_PX, width_px=SIZE_PX).embeds
        assert embeds.shape == (4, 77, profiles.model(name).cross_attention_dim)
        assert not embeds[2].equal(embeds[3])
    assert build_testbed(tmp_path) == testbed


# ---- Drivers --------------------------------------------------------------------------------------------------------


class Responder:
    """Answers nobody before all have asked: only a driver that waits for no answer ever gets one."""

    def __init__(self, requests: int) -> None:
        self.requests, self.asked, self.all_there = requests, [], asyncio.Event()

    async def __call__(self, number: int, arrival_s: float) -> int:
        assert arrival_s <= time.monotonic()
        self.asked.append(number)
        if len(self.asked) == self.requests:
            self.all_there.set()
        await self.all_there.wait()
        return number * number


def check_sent(sent: list[SentRequest[int]], responder: Responder) -> None:
    """All were sent once, in order of arrival, none before it was due, and every answer is that of its request."""
    assert [one.answer for one in sent] == [number * number for number in range(responder.requests)]
    assert responder.asked == list(range(responder.requests))
    assert all(one.late_s >= 0.0 for one in sent)
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(sent))


def test_a_trace_is_sent_on_time_without_waiting_for_answers():
    """Requests are due as far apart as in the trace, those of one moment together."""
    times_s = [5.0, 5.02, 5.02, 5.06]

    async def drive() -> tuple[list[SentRequest[int]], Responder]:
        responder = Responder(len(times_s))
        return await replay_trace(times_s, responder), responder

    sent, responder = asyncio.run(drive())
    check_sent(sent, responder)
    assert [one.arrival_s - sent[0].arrival_s for one in sent] == pytest.approx([0.0, 0.02, 0.02, 0.06])


def test_loadgen_sends_as_many_as_asked_without_waiting_for_answers(tmp_path):
    """Poisson arrivals of the rate, in LoadGen's own log as well; another seed gives other arrivals."""
    rate, requests = 400.0, 60

    async def drive(seed: int) -> tuple[list[SentRequest[int]], Responder]:
        responder = Responder(requests)
        return await drive_loadgen(rate, requests, responder, logs=tmp_path / f"{seed}", seed=seed), responder

    spans = []
    for seed in (1, 2):
        sent, responder = asyncio.run(drive(seed))
        check_sent(sent, responder)
        spans.append(sent[-1].arrival_s - sent[0].arrival_s)
        assert "target_qps : 400" in (tmp_path / f"{seed}" / "mlperf_log_summary.txt").read_text()
    # A sum of 59 exponential gaps lies within a factor of two of its mean far more often than a machine sleeps.
    assert all(span > 0.5 * (requests - 1) / rate for span in spans)


def test_parts_play_one_piece_of_a_trace_after_the_other(tmp_path):
    """At the rate asked for over the whole trace, beginning anew where it ends."""
    (tmp_path / "trace.csv").write_text("arrival_s\n0.0\n1.0\n3.0\n6.0\n", encoding="utf-8")
    trace = import_trace(tmp_path / "trace.csv")
    pieces = [np.diff(trace_piece(trace, first, 3, 0.5)).tolist() for first in (0, 1, 3)]
    assert pieces == [[1.0, 2.0], [2.0, 3.0], [1.0, 2.0]]
    assert np.diff(trace_piece(trace, 2, 2, 1.0)).tolist() == [1.5]
    assert trace_piece(trace, 0, 1, 1.0) == [0.0]

    (tmp_path / "burst.csv").write_text("arrival_s\n0.0\n0.0\n", encoding="utf-8")
    with pytest.raises(InputError, match="--trace"):
        trace_piece(import_trace(tmp_path / "burst.csv"), 0, 3, 1.0)


# ---- Records and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_what_a_client_saw_becomes_records_that_obey_the_laws(kind, known, tmp_path):
    """Booked from a client's times, a run has the records that it had, from its first arrival on."""
    run = run_of(kind, known, tmp_path)
    scenario, deployment = set_up(kind, known)
    sent = outcomes_of(run)
    facts = facts_of(sent, scenario, deployment, known)
    found = build_records(times_of(sent), scenario, facts)
    check_laws(found, {"cloud": kind.degree}, {"edge": 1})
    assert facts.bytes_down == 81_000
    for name in ("cloud_start_s", "edge_stop_s", "finish_s", "transfer_s", "gpu_seconds", "node", "device", "degree"):
        mine, theirs = (column(records.rows(), name) for records in (found, run))
        np.testing.assert_allclose(mine, theirs, atol=4 * TICK_S, rtol=1e-6)


def test_a_live_run_that_lost_something_is_no_evidence(known, tmp_path):
    """A request that was not served, a worker that died, an answer that was asked for twice: the run is refused."""
    sent = outcomes_of(run_of(KINDS["cloud"], known, tmp_path))
    for change in ({"status": "unserved", "reason": "timeout"}, {"restarts": 1}, {"retries": 1}):
        broken = [replace(sent[0], answer=replace(sent[0].answer, **change)), *sent[1:]]
        with pytest.raises(RunError):
            times_of(broken)


def test_links_are_those_that_the_simulation_draws(known, tmp_path):
    """Each request's half round trips and bytes over its link's rates are the seconds that it travels in simulation."""
    kind = KINDS["hybrid"]
    run = run_of(kind, known, tmp_path)
    scenario, deployment = set_up(kind, known)
    cost = candidate_of(scenario, deployment, known).cost
    links = draw_links(scenario, known, len(run))
    travelled = [link.up_s(cost.bytes_up) + link.down_s(cost.bytes_down) for link in links]
    np.testing.assert_allclose(column(run.rows(), "transfer_s"), travelled)


def test_what_the_machine_adds_to_the_network_lengthens_every_transfer(catalogue, known, tmp_path):
    """Half of it on either way: a replay's requests are on their way for as much longer, on the same links."""
    kind = KINDS["parallel"]
    before = observed_of(run_of(kind, known, tmp_path), known, kind)
    slower = replace(before, stack_s=0.004)
    plain, longer = (column(replay(run, catalogue, tmp_path).rows(), "transfer_s") for run in (before, slower))
    wire = known.network("wifi6").rtt_s
    assert slower.profiles(catalogue).network("wifi6").rtt_s.median == pytest.approx(wire.median + 0.004)
    # Between the quantiles a round trip goes by its logarithm, hence not to the last digit.
    np.testing.assert_allclose(longer - plain, 0.004, rtol=0.1)


def test_requests_that_cross_no_network_begin_when_they_were_allowed_to(catalogue, known, tmp_path):
    """What asking takes comes before everything else that happens to a request at the edge, and moves nothing else."""
    kind = KINDS["edge"]
    before = observed_of(run_of(kind, known, tmp_path), known, kind)
    plain, later = (replay(run, catalogue, tmp_path).rows() for run in (before, replace(before, stack_s=0.004)))
    np.testing.assert_array_equal(column(plain, "arrival_s"), column(later, "arrival_s"))
    for name in ("edge_ready_s", "edge_start_s", "edge_stop_s", "finish_s", "transfer_s"):
        np.testing.assert_allclose(column(later, name) - column(plain, name), 0.004, atol=1e-9)


def test_a_run_comes_back_from_its_files_and_replays_to_itself(catalogue, known, tmp_path):
    """What was saved is read the same; simulated from its own profile, a simulated run comes out again."""
    kind = KINDS["hybrid"]
    run = run_of(kind, known, tmp_path)
    before = observed_of(run, known, kind, part=3, drift=0.02)
    kept.save(before, tmp_path / "runs")
    (after,) = kept.find(tmp_path / "runs")
    assert after.void
    for name in ("scenario", "deployment", "rows", "step_before_s", "load", "part", "drift", "name"):
        assert getattr(after, name) == getattr(before, name)
    np.testing.assert_array_equal(after.records().rows(), before.records().rows())
    found = compare([(after.records(), replay(after, catalogue, tmp_path))], after.load, resamples=10)
    assert all(abs(figure.off) < 1e-6 for figure in found.figures)
