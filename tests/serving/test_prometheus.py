"""The metrics: names and units by convention, counts that follow decisions and events, bounded labels and memory."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hybridsd_sim.plan import Request
from hybridsd_sim.scheduling import CloudDone, Decision, RequestDone, StepDone, WorkerDown, WorkerState
from hybridsd_sim.serving import prometheus
from hybridsd_sim.serving.prometheus import SchedulerMetrics

NAMES = {
    "hybridsd_decisions": {"action", "policy", "reason"}, "hybridsd_decision_duration_seconds": set(),
    "hybridsd_prediction_error_ratio": set(), "hybridsd_request_cost_dollars": {"pool"},
    "hybridsd_gpu_seconds": {"pool", "gpu"}, "hybridsd_slo_attained": {"slo_class", "attained"},
    "hybridsd_switch_step": set(), "hybridsd_parallel_degree": set(), "hybridsd_plan_info": {"version"},
    "hybridsd_queue_depth": {"pool"}, "hybridsd_workers": {"pool"},
}  # fmt: skip


@pytest.fixture
def metrics():
    """Fresh metrics."""
    return SchedulerMetrics(policy="planned")


def figures(metrics):
    """Every sample by name and labels, as Prometheus reads them."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def told(metrics, scheduler, now, **fields):
    """A decision for the class's own request, counted."""
    decision = scheduler.decide(Request(**{"model": "sd14", "request_class": "picture", **fields}), None, now)
    metrics.decided(decision, 2e-5, "picture")
    return decision


def test_names_and_labels_are_those_of_the_conventions(metrics, scheduler):
    """One prefix, base units, counters that end in _total, and no label beyond those that are written down."""
    decision = told(metrics, scheduler, 0.0)
    metrics.observed(RequestDone(decision.number, 1.0))
    metrics.fleet(scheduler.workers(0.0))
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    assert {name for name in families if not name.endswith("_created")} == set(NAMES)
    for name, labels in NAMES.items():
        family = families[name]
        assert family.documentation.endswith(".")
        found = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        assert found == labels, name
        if family.type == "counter":
            assert all(sample.name == f"{name}_total" for sample in family.samples)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["served", "failed", "cancelled", None]), max_size=12), st.floats(0.1, 20.0))
def test_what_is_counted_is_what_was_told(scheduler, ends, seconds):
    """Decisions, dollars, GPU-seconds and attainment add up, whatever ends how, once or twice."""
    metrics, now = SchedulerMetrics(policy="planned"), 1000.0
    served, in_time, ended, usd, gpu_s = 0, 0, 0, 0.0, 0.0
    for outcome in ends:
        decision = told(metrics, scheduler, now)
        scheduler.observe(RequestDone(decision.number, now))
        if outcome is None:
            continue
        for _ in range(2):  # what is told twice counts once
            metrics.observed(RequestDone(decision.number, now + seconds, outcome))
        ended += outcome != "cancelled"
        if outcome == "served":
            served += 1
            in_time += now + seconds <= decision.deadline_s
            usd, gpu_s = usd + decision.usd, gpu_s + decision.candidate.cost.gpu_seconds
    found = figures(metrics)
    pool, gpu = ("pool", "a100"), ("gpu", "a100-sxm-80gb")
    assert found["hybridsd_decision_duration_seconds_count",] == len(ends)
    assert found["hybridsd_switch_step_sum",] == pytest.approx(20 * len(ends))
    assert found["hybridsd_prediction_error_ratio_bucket", ("le", "+Inf")] == served
    assert found.get(("hybridsd_request_cost_dollars_total", pool), 0.0) == pytest.approx(usd)
    assert found.get(("hybridsd_gpu_seconds_total", gpu, pool), 0.0) == pytest.approx(gpu_s)
    attained = [found.get(("hybridsd_slo_attained_total", ("attained", said), ("slo_class", "picture")), 0)
                for said in ("true", "false")]  # fmt: skip
    assert attained == [in_time, ended - in_time]


@pytest.mark.parametrize(("off", "bucket"), [(1.0, "0.0"), (1.25, "0.3"), (0.6, "-0.3"), (30.0, "+Inf")])
def test_the_prediction_error_is_observed_over_predicted(metrics, scheduler, off, bucket):
    """Twice the predicted seconds are an error of 1, and as long as predicted of 0."""
    decision = told(metrics, scheduler, 0.0)
    scheduler.observe(RequestDone(decision.number, 0.0))
    predicted_s = decision.predicted_finish_s - decision.now_s
    metrics.observed(RequestDone(decision.number, decision.now_s + off * predicted_s * (1.0 - 1e-12)))
    found = [(key[1][1], value) for key, value in figures(metrics).items() if key[0].endswith("error_ratio_bucket")]
    assert next(le for le, value in found if value == 1.0) == bucket


def test_rejected_requests_with_a_deadline_are_not_attained(metrics, scheduler):
    """A reject of a known class misses its promise; a class that nobody knows becomes no label."""
    missed = Decision("reject", None, 0.0, "no_candidate", deadline_s=8.0, plan_version=3)
    metrics.decided(missed, 1e-5, "picture")
    unknown = scheduler.decide(Request(model="x", request_class="evil"), None, 0.0)
    metrics.decided(unknown, 1e-5, "evil")
    found = figures(metrics)
    assert found["hybridsd_slo_attained_total", ("attained", "false"), ("slo_class", "picture")] == 1
    assert not [key for key in found if "evil" in str(key)]
    assert ("hybridsd_switch_step_sum",) in found
    assert found["hybridsd_switch_step_count",] == 0


def test_pools_that_are_gone_are_not_shown(metrics):
    """Workers and their queues by pool, 0 for a pool without workers, nothing for one that there is not any more."""
    states = [WorkerState(f"w{n}", "a", 1, n, 0.0) for n in range(3)]
    metrics.fleet(states, ["a", "b"])
    found = figures(metrics)
    assert found["hybridsd_queue_depth", ("pool", "a")] == 3
    assert found["hybridsd_workers", ("pool", "a")] == 3
    assert found["hybridsd_workers", ("pool", "b")] == 0
    metrics.fleet([], ["b"])
    assert ("hybridsd_workers", ("pool", "a")) not in figures(metrics)


def test_whoever_reads_while_the_fleet_is_taken_in_sees_it_whole(metrics, monkeypatch):
    """A scrape amid another finds every pool with a figure, the one before or the one after."""
    metrics.fleet([WorkerState("w", "a", 1, 7, 0.0)], ["a", "b"])
    seen, labels = [], prometheus.Gauge.labels

    def watched(gauge, *values):
        seen.append(figures(metrics))
        return labels(gauge, *values)

    monkeypatch.setattr(prometheus.Gauge, "labels", watched)
    metrics.fleet([WorkerState("w", "a", 1, 9, 0.0)], ["a", "b"])
    assert len(seen) == 4
    assert {found["hybridsd_queue_depth", ("pool", "a")] for found in seen} == {7, 9}
    assert {found["hybridsd_workers", ("pool", "b")] for found in seen} == {0}


def test_the_plan_in_use_is_the_only_one_shown(metrics):
    """A decision of another plan moves the info on; there is never more than one version."""
    for version in (1, 2, 2, 5):
        metrics.decided(Decision("reject", None, 0.0, "no_candidate", plan_version=version), 1e-5)
        shown = [key for key in figures(metrics) if key[0] == "hybridsd_plan_info"]
        assert shown == [("hybridsd_plan_info", ("version", str(version)))]


def test_memory_and_labels_are_bounded(metrics, scheduler, monkeypatch):
    """Decisions that never end are forgotten from the oldest, and reasons without number are counted together."""
    monkeypatch.setattr(prometheus, "MAX_OPEN", 10)
    monkeypatch.setattr(prometheus, "MOST_LABELS", 3)
    numbers = [told(metrics, scheduler, 0.0).number for _ in range(25)]
    assert metrics.open_predictions == 10
    metrics.observed(RequestDone(numbers[0], 1.0))
    assert figures(metrics)["hybridsd_prediction_error_ratio_bucket", ("le", "+Inf")] == 0
    for n in range(50):
        metrics.decided(Decision("reject", None, 0.0, f"because {n}"), 1e-5)
    found = {key: value for key, value in figures(metrics).items() if key[0] == "hybridsd_decisions_total"}
    assert len(found) == 4
    assert sum(found.values()) == 75
    for number in numbers:
        scheduler.observe(RequestDone(number, 0.0))


def test_other_events_and_strange_ones_count_nothing(metrics, scheduler):
    """Steps, parts, workers and unknown numbers leave every figure as it is."""
    decision = told(metrics, scheduler, 50.0)
    before = figures(metrics)
    for event in (
        StepDone(decision.number, 0.1), CloudDone(decision.number, 51.0), WorkerDown("a100/0", 1.0),
        RequestDone(10**9, 51.0),
    ):  # fmt: skip
        metrics.observed(event)
    assert figures(metrics) == before


def test_threads_lose_no_count(scheduler):
    """Four threads that decide and tell ends: everything is counted, in the registry that was given."""
    registry = CollectorRegistry()
    metrics = SchedulerMetrics(policy="planned", registry=registry)

    def work() -> None:
        for n in range(200):
            decision = told(metrics, scheduler, float(n))
            metrics.observed(RequestDone(decision.number, n + 2.0))
            scheduler.observe(RequestDone(decision.number, n + 2.0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.registry is registry
    found = figures(metrics)
    assert found["hybridsd_decision_duration_seconds_count",] == 800
    assert found["hybridsd_prediction_error_ratio_bucket", ("le", "+Inf")] == 800
    assert not metrics.open_predictions
