"""The embedded scheduler: `decide`, `observe` and `replace_plan` for a serving system, with the simulator's policies.

It does no I/O, starts nothing and looks at no clock: the caller passes the time. A decision takes microseconds and
never raises; where something unforeseen happens, it falls back on a plan that needs to know nobody's state. What is
remembered is bounded, however long it runs. Any number of threads may ask and tell; a plan is swapped between two
decisions.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.capacity import CapacityPlan
from hybridsd_sim.corrections import Corrections, StepKind, kind_of, step_s
from hybridsd_sim.deployment import load_deployment, misfits
from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.events import CloudDone, Event, RequestDone, StepDone, WorkerDown, WorkerUp
from hybridsd_sim.menu import Menu
from hybridsd_sim.offers import Pricing, found_options, planned_options
from hybridsd_sim.plan import Deployment, Request
from hybridsd_sim.policies import Planned, policy_for
from hybridsd_sim.policy import Action, Decision, FleetView, Policy, best_static
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workers import Job, Worker, Workers, WorkerState

__all__ = ["FALLBACK", "MOST_OPEN", "UNKNOWN_CLASS", "AnyPlan", "Scheduler"]

FALLBACK = "fallback"
"""Reason code of a decision made without policy and queues, because deciding failed."""
UNKNOWN_CLASS = "unknown_class"
"""Reason code of a request whose class the plan does not know."""
MOST_OPEN = 65_536
"""Decisions remembered until their `RequestDone`; of more, the oldest are taken for lost."""
WORTH_CORRECTING = 0.02
"""By how much a factor must differ from the one in use before candidates follow it."""
INFINITY = float("inf")
AnyPlan = str | Path | CapacityPlan | Deployment


@dataclass(frozen=True, slots=True)
class _Serving:
    """A plan in use: replaced as a whole, so that a decision sees one plan and one only."""

    scenario: Scenario
    deployment: Deployment
    policy: Policy
    menu: Menu
    widest: tuple[int, ...]
    fallbacks: Mapping[str, Candidate | None]
    version: int


@dataclass(frozen=True, slots=True)
class _Open:
    """A decision whose request has not ended: where it runs, and what was predicted with which corrections."""

    candidate: Candidate
    worker: str | None
    factors: Mapping[StepKind, float]


class Scheduler:
    """Decides in a serving system as the simulator's policy would: which plan, on which worker, and why.

    Make one with `from_plan`. Times are seconds on any clock of the caller's that does not go backwards.
    """

    def __init__(
        self, serving: _Serving, workers: Sequence[Worker] | None, remake: Callable[[AnyPlan], _Serving]
    ) -> None:
        self._serving = serving
        self._remake = remake
        self._assumed = frozenset[Worker]() if workers is not None else _rented(serving)
        up = sorted(self._assumed, key=_by_number) if workers is None else workers
        _check_pools(up, serving.scenario)
        self._workers = Workers(list(serving.scenario.pools), up)
        self._corrections = Corrections()
        self._open: OrderedDict[int, _Open] = OrderedDict()
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
        or does not fit its scenario.
        """

        def remake(other: AnyPlan) -> _Serving:
            return _prepared(*_resolved(other, scenario), profiles, policy)

        return cls(remake(plan), workers, remake)

    def __repr__(self) -> str:
        return f"Scheduler({self.scenario.name}, {self.policy_name}, plan {self.version}, {len(self._open)} open)"

    @property
    def version(self) -> int:
        """Number of the plan in use: 1, and one more with every `replace_plan`."""
        return self._serving.version

    @property
    def scenario(self) -> Scenario:
        return self._serving.scenario

    @property
    def policy_name(self) -> str:
        return self._serving.policy.name

    @property
    def open_decisions(self) -> int:
        """Decisions to run something whose request has not ended."""
        return len(self._open)

    def workers(self, now: float) -> tuple[WorkerState, ...]:
        """Every worker with what it was given and has not done."""
        with self._lock:
            return self._workers.states(now)

    def factors(self) -> Mapping[StepKind, float]:
        """How many times the predicted seconds steps take, for the kinds of steps that differ."""
        return self._serving.menu.factors

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
            return self._fall_back(request, now)

    def _decide(self, request: Request, view: FleetView | None, now: float) -> Decision:
        serving = self._serving
        own = serving.menu.own.get(request.request_class)
        if own is None:
            return Decision("reject", None, 0.0, UNKNOWN_CLASS, now_s=now, plan_version=serving.version)
        widest = self._workers.widest if view is None else serving.widest
        options = serving.menu.options(request, widest)
        slo_s = own.slo_s if request.slo_s is None else request.slo_s
        deadline_s = INFINITY if slo_s is None else now + slo_s
        with self._lock:
            fleet = self._workers.view if view is None else view
            chosen = serving.policy.decide(options, deadline_s, fleet, now)
            return self._carried_out(chosen, serving, deadline_s, view, now)

    def _carried_out(
        self, chosen: Decision, serving: _Serving, deadline_s: float, view: FleetView | None, now: float
    ) -> Decision:
        """The policy's choice with its worker, entered in the ledger."""
        candidate = chosen.candidate
        if candidate is None:
            return chosen._replace(now_s=now, deadline_s=deadline_s, plan_version=serving.version)
        self._number = number = self._number + 1
        worker, wait_s = self._placed(candidate, number, view, now)
        self._open[number] = _Open(candidate, worker, serving.menu.factors)
        if len(self._open) > MOST_OPEN:
            oldest, lost = self._open.popitem(last=False)
            self._release(oldest, lost, now)
        action: Action = "queue" if chosen.action == "run" and wait_s > 0.0 else chosen.action
        return Decision(action, candidate, wait_s, chosen.reason, number, worker, now, deadline_s, serving.version)

    def _placed(
        self, candidate: Candidate, number: int, view: FleetView | None, now: float
    ) -> tuple[str | None, float]:
        """The worker of the ledger that takes it and how long it waits; no worker where the caller keeps the queues."""
        if candidate.pool_index < 0:
            return None, 0.0
        if view is not None:
            return None, view.pools[candidate.pool_index].wait_s(candidate.degree, now)
        request = candidate.cost.request
        work = float(request.num_inference_steps * request.height_px * request.width_px * request.num_images)
        job = Job(number, candidate.degree, candidate.cloud_s, work, now)
        return self._workers.place(candidate.pool_index, job, now)

    def _fall_back(self, request: Request, now: float) -> Decision:
        """A plan that is right on an idle fleet, and no worker: the caller sends it where it can."""
        serving = self._serving
        candidate = serving.fallbacks.get(getattr(request, "request_class", ""))
        action: Action = "reject" if candidate is None else "run"
        return Decision(action, candidate, 0.0, FALLBACK, now_s=now, plan_version=serving.version)

    # ---- Learning ---------------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take in what happened. What is late, comes twice or is not known any more changes nothing.

        Raises `InputError` for a worker of a pool that the plan's scenario does not have.
        """
        with self._lock:
            match event:
                case StepDone():
                    self._learn(event)
                case CloudDone() | RequestDone():
                    self._done(event)
                case WorkerUp():
                    self._join(event)
                case WorkerDown():
                    self._workers.leave(event.worker, event.at_s)

    def _learn(self, event: StepDone) -> None:
        known = self._open.get(event.number)
        if known is None or not 0 <= event.stage < len(known.candidate.plan.stages):
            return
        stage = known.candidate.plan.stages[event.stage]
        kind = kind_of(known.candidate, stage)
        predicted_s = step_s(known.candidate, stage) / known.factors.get(kind, 1.0)
        self._corrections.learn(kind, event.seconds, predicted_s)
        factor, menu = self._corrections.factor(kind), self._serving.menu
        if abs(factor / menu.factors.get(kind, 1.0) - 1.0) > WORTH_CORRECTING:
            menu.correct(kind, factor)

    def _done(self, event: CloudDone | RequestDone) -> None:
        known = self._open.get(event.number)
        if known is not None:
            self._release(event.number, known, event.at_s)
            if isinstance(event, RequestDone):
                del self._open[event.number]

    def _release(self, number: int, known: _Open, now: float) -> None:
        if known.worker is not None:
            self._workers.release(known.worker, number, now)

    def _join(self, event: WorkerUp) -> None:
        _check_pools((Worker(event.worker, event.pool),), self.scenario)
        gpus = self.scenario.pools[event.pool].gpus_per_node if event.gpus is None else event.gpus
        self._workers.join(Worker(event.worker, event.pool, gpus), event.at_s)

    # ---- Plans ------------------------------------------------------------------------------------------------------

    def replace_plan(self, plan: AnyPlan) -> int:
        """Follow another plan from the next decision on; returns its version.

        What is open goes on as it was decided; workers and corrections stay. Workers of pools that the new scenario
        lacks are forgotten, and where the workers are the plan's own nodes, there are now as many as it rents. Reads
        and prices the plan first, while decisions go on. Raises `InputError` as `from_plan` does, and then nothing has
        changed.
        """
        serving = self._remake(plan)
        with self._lock:
            serving.menu.factors = self._serving.menu.factors
            self._serving = replace(serving, version=self._serving.version + 1)
            self._workers.keep(list(serving.scenario.pools))
            if self._assumed:
                self._rent(_rented(serving))
            return self._serving.version

    def _rent(self, nodes: frozenset[Worker]) -> None:
        for worker in self._assumed - nodes:
            self._workers.leave(worker.name, 0.0)
        for worker in sorted(nodes - self._assumed, key=_by_number):
            self._workers.join(worker, 0.0)
        self._assumed = nodes


# ---- Reading a plan -------------------------------------------------------------------------------------------------


def _prepared(
    deployment: Deployment, scenario: Scenario, profiles: Profiles | None, policy: str | Policy | None
) -> _Serving:
    """A plan ready to decide by: checked, its candidates priced. Raises `InputError` for one that does not fit."""
    known = profiles or load_profiles(scenario.search.profiles)
    if problems := misfits(deployment, scenario, known, complete=False):
        raise InputError(problems)
    decider = policy if isinstance(policy, Policy) else policy_for(policy or Planned.name, scenario, deployment)
    pricing = Pricing(scenario, known)
    own = planned_options(pricing, deployment)
    found = own if decider.name == Planned.name else found_options(pricing, None)
    fallbacks = {name: next(iter(own.by_class[name]), best_static(found.by_class[name])) for name in scenario.requests}
    widest = tuple(pool.gpus_per_node for pool in scenario.pools.values())
    return _Serving(scenario, deployment, decider, Menu(pricing, found), widest, fallbacks, version=1)


def _resolved(plan: AnyPlan, scenario: Scenario | None) -> tuple[Deployment, Scenario]:
    """The plan, and the scenario that it was made for."""
    if isinstance(plan, CapacityPlan):
        return plan.deployment, scenario or plan.scenario
    if isinstance(plan, Deployment):
        if scenario is None:
            rule = "says nothing of request classes, pools and fleets"
            raise InputError(Problem("scenario", "not given", f"a Deployment {rule}", "Pass scenario=."))
        return plan, scenario
    path = Path(plan)
    file = path / "plan.yaml" if path.is_dir() else path
    return load_deployment(file), scenario or _scenario_beside(file)


def _scenario_beside(file: Path) -> Scenario:
    """The scenario of the run that wrote a plan.yaml."""
    beside = file.with_name("provenance.json")
    remedy = "Name the plan.yaml in the folder of the run that wrote it, or pass its scenario."
    try:
        written = json.loads(beside.read_text(encoding="utf-8"))["scenario"]
        return Scenario.model_validate_json(json.dumps(written))
    except OSError as error:
        rule = "the scenario of a plan is read from beside it"
        raise InputError(Problem(str(beside), error.strerror or "unreadable", rule, remedy)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(Problem(str(beside), type(error).__name__, "must be what `plan` wrote", remedy)) from error


def _rented(serving: _Serving) -> frozenset[Worker]:
    """A worker for each node that the plan rents."""
    return frozenset(
        Worker(f"{name}/{index}", name, pool.gpus_per_node)
        for name, pool in serving.scenario.pools.items()
        for index in range(serving.deployment.replicas.get(name, 0))
    )


def _by_number(worker: Worker) -> tuple[str, int]:
    return worker.pool, int(worker.name.rpartition("/")[2])


def _check_pools(workers: Iterable[Worker], scenario: Scenario) -> None:
    pools = list(scenario.pools)
    if problems := [unknown_name("worker.pool", w.pool, pools) for w in workers if w.pool not in pools]:
        raise InputError(problems)
