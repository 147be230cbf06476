"""What a scheduler decides, how right it is and what it spends, as Prometheus metrics.

Names are in base units, and every label comes from a small set: actions, reasons, and the names of classes, pools and
GPUs in the plan. No label ever holds what a request carries. A decision is remembered until its `RequestDone`, as the
scheduler remembers it, so that predictions are held against what happened; dollars and GPU-seconds are those predicted
of requests that were served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import inf
from threading import Lock
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scheduling import MAX_OPEN, Decision, Event, RequestDone, WorkerState

MOST_LABELS = 1024
"""Combinations of labels that a metric keeps; what comes on top is counted together, under `OTHER`."""

OTHER = "other"

DURATIONS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1.0)

ERRORS = (-0.5, -0.3, -0.2, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)

STEPS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100)

DEGREES = (1, 2, 3, 4, 6, 8, 16, 32, 64)


class _Prediction(NamedTuple):
    """What was predicted of an open request: when, until when the image is there, and until when it is due."""

    candidate: Candidate
    site: str
    now_s: float
    predicted_s: float
    deadline_s: float


class _Children:
    """The children of a labelled counter, each looked up once, and no more of them than `MOST_LABELS`."""

    def __init__(self, counter: Counter, labels: int) -> None:
        self._counter = counter
        self._known: dict[tuple[str, ...], Counter] = {}
        self._other = (OTHER,) * labels

    def of(self, *values: str) -> Counter:
        child = self._known.get(values)
        if child is None:
            kept = values if len(self._known) < MOST_LABELS else self._other
            child = self._counter.labels(*kept)
            if kept is values:
                self._known[values] = child
        return child


class SchedulerMetrics:
    """The metrics of one scheduler, whose policy is called `policy`, in a registry of their own unless one is given.

    Tell it of every decision and event; before the registry is read, also of the workers. Any thread may.
    """

    def __init__(self, *, policy: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._policy = policy
        self._lock = Lock()
        self._open: OrderedDict[int, _Prediction] = OrderedDict()
        self._version = 0

        def counter(name: str, text: str, *labels: str) -> _Children:
            return _Children(Counter(name, text, labels, registry=self.registry), len(labels))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self._decisions = counter(
            "hybridsd_decisions_total", "Decisions, by what was decided and why.", "action", "policy", "reason"
        )
        self._attained = counter(
            "hybridsd_slo_attained_total",
            "Requests with a deadline that ended, were rejected or failed, by whether the image was there in time.",
            "slo_class", "attained",
        )  # fmt: skip
        self._usd = counter(
            "hybridsd_request_cost_dollars_total", "Dollars predicted of the requests that were served.", "pool"
        )
        self._gpu_s = counter(
            "hybridsd_gpu_seconds_total", "GPU-seconds predicted of the requests that were served.", "pool", "gpu"
        )
        self._duration = histogram("hybridsd_decision_duration_seconds", "Seconds of deciding.", DURATIONS)
        self._error = histogram(
            "hybridsd_prediction_error_ratio",
            "Seconds from decision to image over those predicted, minus 1, of the requests that were served.",
            ERRORS,
        )
        self._switch = histogram("hybridsd_switch_step", "First step done at the edge, of what is run.", STEPS)
        self._degree = histogram("hybridsd_parallel_degree", "GPUs of the worker group in a pool.", DEGREES)
        self._plan = Info("hybridsd_plan", "The plan in use.", registry=self.registry)
        self._depth = Gauge(
            "hybridsd_queue_depth", "Requests given to the workers and not done.", ("pool",), registry=self.registry
        )
        self._workers = Gauge("hybridsd_workers", "Workers that are up.", ("pool",), registry=self.registry)

    @property
    def open_predictions(self) -> int:
        """Decisions remembered until their `RequestDone`: at most `MAX_OPEN`, the oldest are forgotten."""
        return len(self._open)

    def decided(self, decision: Decision, seconds: float, request_class: str = "") -> None:
        """Count a decision that took so many seconds.

        `request_class` is the request's, for those that are rejected though they have a deadline; a class that the plan
        does not know is left out by the decision's reason.
        """
        self._decisions.of(decision.action, self._policy, decision.reason).inc()
        self._duration.observe(seconds)
        if decision.plan_version != self._version:
            self.follow(decision.plan_version)
        candidate = decision.candidate
        if candidate is None:
            if decision.deadline_s < inf:
                self._attained.of(request_class, "false").inc()
            return
        plan = candidate.plan
        self._switch.observe(plan.switch_step)
        if candidate.pool_index >= 0:
            self._degree.observe(candidate.degree)
        if not decision.number:
            return
        site = plan.stages[0].site.name
        predicted_s = decision.predicted_wait_s + candidate.latency_s
        predicted = _Prediction(candidate, site, decision.now_s, predicted_s, decision.deadline_s)
        with self._lock:
            self._open[decision.number] = predicted
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)

    def observed(self, event: Event) -> None:
        """Count how a request ended; a decision that is not known any more, and other events, change nothing."""
        if not isinstance(event, RequestDone):
            return
        with self._lock:
            known = self._open.pop(event.number, None)
        if known is None or event.outcome == "cancelled":
            return
        candidate, served = known.candidate, event.outcome == "served"
        if known.deadline_s < inf:
            in_time = served and event.at_s <= known.deadline_s
            self._attained.of(candidate.request_class, "true" if in_time else "false").inc()
        if not served:
            return
        seconds, cost = event.at_s - known.now_s, candidate.cost
        if seconds >= 0.0 and 0.0 < known.predicted_s < inf:
            self._error.observe(seconds / known.predicted_s - 1.0)
        if cost.usd is not None:
            self._usd.of(known.site).inc(cost.usd)
        if candidate.pool_index >= 0:
            pool = next(iter(candidate.plan.cloud_stages)).site
            self._gpu_s.of(pool.name, pool.device).inc(cost.gpu_seconds)

    def fleet(self, states: Iterable[WorkerState], pools: Iterable[str] = ()) -> None:
        """Take in the workers of every pool as they are now; `pools` are those that may have none."""
        workers, depths = dict.fromkeys(pools, 0), dict.fromkeys(pools, 0)
        for state in states:
            workers[state.pool] = workers.get(state.pool, 0) + 1
            depths[state.pool] = depths.get(state.pool, 0) + state.queued
        with self._lock:
            _set(self._workers, workers)
            _set(self._depth, depths)

    def follow(self, version: int) -> None:
        """From now on the plan of this number is in use."""
        self._version = version
        self._plan.info({"version": str(version)})


def _set(gauge: Gauge, values: dict[str, int]) -> None:
    """The values of a gauge by pool; pools that are gone are not shown any more."""
    shown = {sample.labels["pool"] for family in gauge.collect() for sample in family.samples}
    for pool, value in values.items():  # each in its place: who reads meanwhile sees no pool without a value
        gauge.labels(pool).set(value)
    for pool in shown - set(values):
        gauge.remove(pool)
