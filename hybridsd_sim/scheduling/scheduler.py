"""The embedded scheduler: `decide`, `observe` and `replace_plan` for a serving system, with the simulator's policies.

It does no I/O, starts nothing and looks at no clock: the caller passes the time. A decision takes microseconds and
never raises; where something unforeseen happens, it falls back on a plan that needs to know nobody's state. What is
remembered is bounded, however long it runs. Any number of threads may ask and tell; a plan is swapped between two
decisions.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from sys import float_info
from threading import RLock
from typing import Any

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.plan import Deployment, Request, deadline_of
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling.active_plan import ActivePlan, AnyPlan, prepare_plan, resolve_plan
from hybridsd_sim.scheduling.feedback import (
    CloudDone,
    Corrections,
    Event,
    RequestDone,
    StepDone,
    StepKind,
    WorkerDown,
    WorkerUp,
    kind_of,
    steps_s,
)
from hybridsd_sim.scheduling.ledger import (
    Ledger,
    Worker,
    WorkerJob,
    WorkerState,
    check_number,
    rented_workers,
    worker_number,
)
from hybridsd_sim.scheduling.policy import NO_CANDIDATE, Action, Decision, FleetView, Policy

FALLBACK = "fallback"
"""Reason code of a decision made without policy and queues, because deciding failed."""

UNKNOWN_CLASS = "unknown_class"
"""Reason code of a request whose class the plan does not know."""

MAX_OPEN = 65_536
"""Open requests remembered until their `RequestDone`; of more, the oldest `LOST_AT_ONCE` are taken for lost."""

LOST_AT_ONCE = MAX_OPEN // 16

INFINITY = float("inf")


@dataclass(slots=True)
class _OpenRequest:
    """A decision whose request has not ended: its candidate as the profiles have it, and where it runs.

    `steps_ahead` has, for each stage of which a step was observed, the kind of its steps and the seconds predicted
    for those not observed yet.
    """

    candidate: Candidate
    worker: str | None
    steps_ahead: dict[int, tuple[StepKind, Iterator[float]]] | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """What a policy would decide for a request, its candidates, and the seconds that each of them would wait."""

    decision: Decision
    options: tuple[Candidate, ...]
    waits_s: tuple[float, ...]


class Scheduler:
    """Decides in a serving system as the simulator's policy would: which plan, on which worker, and why.

    Make one with `from_plan`. Times are seconds on any clock of the caller's that does not go backwards.

    The own ledger's queues go in order of arrival: `edf_reject` and priorities order only queues that the caller keeps,
    by the `deadline_s` of each decision.
    """

    def __init__(
        self, active: ActivePlan, workers: Sequence[Worker] | None, remake: Callable[[AnyPlan, Scenario], ActivePlan]
    ) -> None:
        self._active = active
        self._remake = remake
        self._rented = _nodes_of(active) if workers is None else None
        up = sorted(_nodes_of(active), key=worker_number) if workers is None else workers
        _check_workers(up, active.scenario)
        self._ledger = Ledger(list(active.scenario.pools), up)
        self._corrections = Corrections()
        self._open: OrderedDict[int, _OpenRequest] = OrderedDict()
        self._number = 0
        self._lock = RLock()

    @classmethod
    def from_plan(
        cls,
        plan: AnyPlan,
        *,
        policy: str | Policy | None = None,
        scenario: Scenario | None = None,
        profiles: Profiles | None = None,
        workers: Sequence[Worker] | None = None,
    ) -> Scheduler:
        """The scheduler of a capacity plan.

        `plan` is a plan.yaml or the folder of the run that wrote it (its scenario is read from provenance.json beside
        it, unless `scenario` is given), a `CapacityPlan`, or a `Deployment` with its `scenario`. `policy` is a
        registered name or an object; by default the plan is followed. `workers` are those that are up; by default one
        for each node that the plan rents, called `<pool>/<number>`. Raises `InputError` for a plan that cannot be read
        or does not fit its scenario, and for a `Planned` object, which could follow no other plan.
        """

        def remake(other: AnyPlan, in_use: Scenario) -> ActivePlan:
            known = scenario or (in_use if isinstance(other, Deployment) else None)
            return prepare_plan(*resolve_plan(other, known), profiles, policy)

        return cls(prepare_plan(*resolve_plan(plan, scenario), profiles, policy), workers, remake)

    def __repr__(self) -> str:
        return f"Scheduler({self.scenario.name}, {self.policy_name}, plan {self.version}, {len(self._open)} open)"

    @property
    def version(self) -> int:
        """Number of the plan in use: 1, and one more with every `replace_plan`."""
        return self._active.version

    @property
    def scenario(self) -> Scenario:
        return self._active.scenario

    @property
    def active_plan(self) -> tuple[int, Deployment]:
        """Number and content of the plan in use, taken together."""
        active = self._active
        return active.version, active.deployment

    @property
    def requests(self) -> Mapping[str, Request]:
        """What a request of each class asks for unless it says otherwise."""
        return self._active.cache.class_requests

    @property
    def policy_name(self) -> str:
        return self._active.policy.name

    @property
    def open_decisions(self) -> int:
        """Decisions to run something whose request has not ended."""
        return len(self._open)

    def workers(self, now: float) -> tuple[WorkerState, ...]:
        """Every worker with what it was given and has not done."""
        with self._lock:
            return self._ledger.states(now)

    def view(self, now: float) -> FleetView:
        """The own ledger as policies see it; decisions change it."""
        with self._lock:
            return self._ledger.view(now)

    def factors(self) -> Mapping[StepKind, float]:
        """How many times the predicted seconds steps take, for the kinds of steps that differ."""
        return self._active.cache.factors

    # ---- Deciding ---------------------------------------------------------------------------------------------------

    def decide(self, request: Request, view: FleetView | None, now: float) -> Decision:
        """What to do with a request that arrives at `now`; never raises.

        `view` is what the caller knows of the pools, in the scenario's order; None takes the scheduler's own ledger,
        kept by its decisions and by `observe`, and names a worker. A request of a size that was not seen lately is
        priced first, which takes milliseconds. What nothing can serve is rejected with a reason.
        """
        try:
            return self._decide(request, view, now)
        except Exception:  # noqa: BLE001 -- whatever it is, a request waits for an answer
            active = self._active
            # A plan that is right on an idle fleet, and no worker: the caller sends it where it can.
            asked: Any = request  # whatever was given instead
            name: Any = asked.request_class if isinstance(asked, Request) else None
            candidate = active.fallbacks.get(name) if isinstance(name, str) else None
            action: Action = "reject" if candidate is None else "run"
            return Decision(action, candidate, 0.0, FALLBACK, now_s=_shown_s(now), plan_version=active.version)

    def is_priced(self, request: Request) -> bool:
        """Whether `decide` on the own ledger takes microseconds, because such a request was priced lately."""
        cache = self._active.cache
        return request.request_class not in cache.class_requests or cache.is_current(request, self._ledger.widest)

    def preview(self, request: Request, view: FleetView | None, now: float) -> Preview:
        """What `decide` would answer, and from what it would choose; changes nothing.

        A policy that takes turns or keeps accounts is asked as it was when the plan was loaded, or, if it was given as
        an object, as it is.
        """
        active = self._active
        own = active.cache.class_requests.get(request.request_class)
        if own is None:
            return Preview(_unknown_class(active, now), (), ())
        options = active.cache.candidates(request, self._ledger.widest if view is None else active.widest).current
        deadline_s = _deadline_s(request, own, now)
        with self._lock:
            fleet = self._ledger.view(now) if view is None else view
            chosen = active.renew_policy().decide(options, deadline_s, fleet, now)
            waits_s = tuple(_wait_s(option, fleet, now, deadline_s) for option in options)
            wait_s = 0.0 if chosen.candidate is None else _wait_s(chosen.candidate, fleet, now, deadline_s)
        action, context = _action(chosen, wait_s), (0, None, now, deadline_s, active.version)
        return Preview(Decision(action, chosen.candidate, wait_s, chosen.reason, *context), options, waits_s)

    def _decide(self, request: Request, view: FleetView | None, now: float) -> Decision:
        active = self._active
        own = active.cache.class_requests.get(request.request_class)
        if own is None:
            return _unknown_class(active, now)
        widest = self._ledger.widest if view is None else active.widest
        cached = active.cache.candidates(request, widest)
        deadline_s = _deadline_s(request, own, now)
        if not cached.current and active.cache.serves(request.request_class):
            return Decision("reject", None, 0.0, NO_CANDIDATE, 0, None, now, deadline_s, active.version)
        with self._lock:
            if active is not self._active or (view is None and widest is not self._ledger.widest):
                return self._decide(request, view, now)  # something came between; while the lock is held nothing can
            fleet = self._ledger.view(now) if view is None else view
            chosen = active.policy.decide(cached.current, deadline_s, fleet, now)
            return self._carry_out(chosen, cached.uncorrected, deadline_s, view, now)

    def _carry_out(
        self,
        chosen: Decision,
        uncorrected: Mapping[Candidate, Candidate],
        deadline_s: float,
        view: FleetView | None,
        now: float,
    ) -> Decision:
        """The policy's choice with its worker, entered in the ledger and among the open requests."""
        candidate, version = chosen.candidate, self.version
        if candidate is None:
            return chosen._replace(now_s=now, deadline_s=deadline_s, plan_version=version)
        number = self._number + 1
        worker: str | None = None
        if candidate.pool_index < 0:
            wait_s = 0.0
        elif view is not None:  # the caller keeps the queues
            wait_s = _wait_s(candidate, view, now, deadline_s)
        else:
            request = candidate.cost.request
            work = request.num_inference_steps * request.height_px * request.width_px * request.num_images
            job = WorkerJob(number, candidate.degree, candidate.cloud_s, work, now)
            worker, wait_s = self._ledger.place(candidate.pool_index, job, now)
        if not wait_s < INFINITY:  # the caller's view says that the pool never begins, or does not say when
            return Decision("reject", None, 0.0, NO_CANDIDATE, 0, None, now, deadline_s, version)
        self._number = number
        self._open[number] = _OpenRequest(uncorrected.get(candidate, candidate), worker)
        if len(self._open) > MAX_OPEN:
            for _ in range(LOST_AT_ONCE):  # many at once, because each makes a long queue move up
                self._release(*self._open.popitem(last=False), now)
        return Decision(
            _action(chosen, wait_s), candidate, wait_s, chosen.reason, number, worker, now, deadline_s, version
        )

    # ---- Learning ---------------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take in what happened. What is late, comes twice, is not known any more or has no time changes nothing.

        Raises `InputError` for a worker without a GPU, of a pool that the plan's scenario does not have, or too many.
        """
        with self._lock:
            match event:
                case StepDone():
                    self._learn(event)
                case _ if not _is_time(event.at_s):
                    pass
                case CloudDone() | RequestDone():
                    if (known := self._open.get(event.number)) is not None:
                        self._release(event.number, known, event.at_s)
                        self._ledger.settle()
                        if isinstance(event, RequestDone):
                            del self._open[event.number]
                case WorkerUp():
                    pool = self.scenario.pools.get(event.pool)
                    gpus = pool.gpus_per_node if pool and event.gpus is None else event.gpus or 0
                    worker = Worker(event.worker, event.pool, gpus)
                    _check_workers([worker], self.scenario)
                    check_number(len(self._ledger) + (event.worker not in self._ledger))
                    self._ledger.join(worker, event.at_s)
                case WorkerDown():
                    self._ledger.leave(event.worker, event.at_s)

    def _learn(self, event: StepDone) -> None:
        known = self._open.get(event.number)
        if known is None or not 0 <= event.stage < len(known.candidate.plan.stages):
            return
        known.steps_ahead = {} if known.steps_ahead is None else known.steps_ahead
        if event.stage not in known.steps_ahead:
            candidate, stage = known.candidate, known.candidate.plan.stages[event.stage]
            # Steps that several requests may share teach nothing, as nobody says how many did share them.
            shared = stage.site.tier == "cloud" and candidate.plan.batch_cap > 1
            predicted = [] if shared else steps_s(candidate, stage, self._active.cache.profiles)
            known.steps_ahead[event.stage] = kind_of(candidate, stage), iter(predicted)
        kind, ahead = known.steps_ahead[event.stage]
        predicted_s = next(ahead, None)
        if predicted_s is None:
            return
        self._corrections.learn(kind, event.seconds, predicted_s)
        if self._corrections.factors is not self._active.cache.factors:
            self._active.cache.correct(self._corrections.factors)

    def _release(self, number: int, known: _OpenRequest, now: float) -> None:
        if known.worker is not None:
            self._ledger.release(known.worker, number, now)

    # ---- Plans ------------------------------------------------------------------------------------------------------

    def replace_plan(self, plan: AnyPlan) -> int:
        """Follow another plan from the next decision on; returns its version.

        What is open goes on as it was decided; workers, corrections and what the policy has spent stay. Workers of
        pools that the new scenario lacks are forgotten, and where the workers are the plan's own nodes, there are now
        as many as it rents. Reads and prices the plan first, while decisions go on. A `Deployment` is for the scenario
        in use. Raises `InputError` as `from_plan` does, and then nothing has changed.
        """
        active = self._remake(plan, self.scenario)
        nodes = _nodes_of(active)
        with self._lock:
            active.cache.correct(self._corrections.factors)
            active.policy.follow(self._active.policy)
            self._active = replace(active, version=self._active.version + 1)
            self._ledger.keep(list(active.scenario.pools))
            if self._rented is not None:
                gone, new = self._rented - nodes, sorted(nodes - self._rented, key=worker_number)
                self._ledger.exchange([worker.name for worker in gone], new, -INFINITY)
                self._rented = nodes
            return self._active.version


def _is_time(value: object) -> bool:
    """Whether it is a number of seconds that others can be added to."""
    return isinstance(value, int | float) and abs(value) <= float_info.max


def _shown_s(now: Any) -> float:
    """The time; 0 from a clock that shows none."""
    return float(now) if _is_time(now) else 0.0


def _unknown_class(active: ActivePlan, now: float) -> Decision:
    return Decision("reject", None, 0.0, UNKNOWN_CLASS, now_s=_shown_s(now), plan_version=active.version)


def _deadline_s(request: Request, own: Request, now: float) -> float:
    """When the image is due. Raises `ValueError` where that, or the time, is no time."""
    deadline_s = float(deadline_of(now, own.slo_s if request.slo_s is None else request.slo_s))
    if not (_is_time(now) and deadline_s > -INFINITY):
        msg = f"at {now}, due {deadline_s}"
        raise ValueError(msg)
    return deadline_s


def _wait_s(candidate: Candidate, view: FleetView, now: float, deadline_s: float) -> float:
    """Seconds until the candidate's pool could begin with it, as its queue goes."""
    if candidate.pool_index < 0:
        return 0.0
    pool, priority = view.pools[candidate.pool_index], candidate.cost.request.priority
    return pool.wait_before_s(candidate.degree, now, deadline_s, priority)


def _action(chosen: Decision, wait_s: float) -> Action:
    return "queue" if chosen.action == "run" and wait_s > 0.0 else chosen.action


def _nodes_of(active: ActivePlan) -> frozenset[Worker]:
    gpus = {name: pool.gpus_per_node for name, pool in active.scenario.pools.items()}
    return rented_workers(active.deployment.replicas, gpus)


def _check_workers(workers: Sequence[Worker], scenario: Scenario) -> None:
    pools, names = list(scenario.pools), Counter(worker.name for worker in workers)
    problems = [unknown_name("worker.pool", w.pool, pools) for w in workers if w.pool not in pools]
    problems += [Problem(f"worker {w.name}", f"{w.gpus} GPUs", "has at least one") for w in workers if w.gpus < 1]
    problems += [Problem("workers", repr(n), "each has a name of its own") for n, count in names.items() if count > 1]
    if problems:
        raise InputError(problems)
