"""Ray Serve: a request router that places by predicted cost, with the plan and the policy of the embedded scheduler.

Every replica of the deployment is a worker of the plan. A call is decided once, when it arrives, and waits in the
router until its replica has room (`max_ongoing_requests`): what waits is decided anew if the replica goes. Ray sends
the call there; only a replica that has room and does not take the call within `PATIENCE_S` (another handle's calls fill
it, or it does not answer) gives it away, to the replica of its pool that is predicted to be free first.

    @serve.deployment(
        max_ongoing_requests=1,
        request_router_config=RequestRouterConfig(
            request_router_class="hybridsd_sim.serving.ray_serve.PredictedCostRouter",
            request_router_kwargs={"plan": "/plans/today/plan.yaml", "policy": "planned"},
        ),
    )

With 1 at a time, a replica that dies takes one call with it; with more, the next call is there when one ends.
Each handle, and each HTTP proxy, has a router of its own, which knows only of its own calls. A router sees the
arguments of a call, but not the body of an HTTP request: put it on the deployment behind the ingress.

Written against Ray 2.60, whose routers are an alpha interface.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from hybridsd_sim.errors import InputError
from hybridsd_sim.plan import Request
from hybridsd_sim.scheduling import (
    NO_CANDIDATE,
    UNKNOWN_CLASS,
    Decision,
    Outcome,
    RequestDone,
    Scheduler,
    WorkerDown,
    WorkerUp,
)
from hybridsd_sim.serving.requests import RequestOf, complete_request, request_fields

PATIENCE_S = 1.0
"""How long a replica with room may leave a call untaken before others are offered it."""

LOOK_S = 2.0
"""Seconds between two looks at the plan's file, while calls come."""

LOST_S = 300.0
"""A call that was sent and has not ended so long after its predicted seconds is forgotten: Ray does not tell of all."""

MOST_CALLS = 65_536
"""Calls remembered at a time; of more, the oldest are taken for lost."""

MOST_WAITING = 1024
"""Calls that wait for their replicas at a time; those beyond wait for their decision, in order of arrival."""

IMPOSSIBLE = (UNKNOWN_CLASS, NO_CANDIDATE)
"""Reasons that trying again does not mend."""

logger = logging.getLogger("ray.serve")


class TurnedAwayError(BackPressureError):
    """The policy rejected the call; `reason` is the decision's code. Over HTTP: 503, or 422 for what no plan serves."""

    def __init__(self, reason: str) -> None:
        super().__init__(0, 0, 422 if reason in IMPOSSIBLE else 503)
        self.args = (reason,)  # what pickle makes it from
        self.reason = reason

    def __str__(self) -> str:
        return self.message

    @property
    def message(self) -> str:
        return f"Turned away: {self.reason}."


@dataclass(eq=False, slots=True)
class _Call:
    """A call that was decided and has not ended. Its `turn` has come once its replica has room for it."""

    pending: PendingRequest
    decision: Decision | None
    watched: asyncio.Future[Any] | None = None
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    turn_s: float = 0.0
    offered: bool = False
    task: asyncio.Task[Any] | None = None

    @property
    def worker(self) -> str | None:
        """The replica that it was decided for; None leaves the choice to Ray."""
        return None if self.decision is None else self.decision.worker

    @property
    def sent_to(self) -> ReplicaID | None:
        """The replica that Ray has sent it to last, unless it waits for one."""
        future = self.pending.future
        gone = not future.done() or future.cancelled() or future.exception() is not None
        return None if gone else future.result().replica_id

    def admit(self, now: float) -> None:
        if not self.turn.is_set():
            self.turn_s = now
            self.turn.set()


@dataclass(slots=True)
class _ReplicaQueue:
    """A replica and the calls decided for it that have not ended, in order of decision."""

    replica: RunningReplica
    calls: dict[_Call, None] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """How many of the calls Ray has sent there."""
        first = islice(self.calls, self.replica.max_ongoing_requests)
        return sum(call.sent_to == self.replica.replica_id for call in first)

    def admit(self, now: float) -> None:
        """It is the turn of as many calls as the replica takes at a time."""
        for call in islice(self.calls, self.replica.max_ongoing_requests):
            call.admit(now)


class PredictedCostRouter(RequestRouter):
    """Routes each call to the replica and by the plan that the scheduler decides; `initialize_state` lists settings."""

    def initialize_state(self, **settings: Any) -> None:
        """Take the `request_router_kwargs`, which Ray wants to be JSON.

        - `plan`: path of a plan.yaml or of a run's folder, on every machine with a handle. A changed file is loaded.
        - `policy`: a registered name; by default the plan is followed.
        - `pool`: the pool that the replicas belong to; by default `record_replica_metadata()["pool"]` of the
          deployment's class, or else the scenario's only pool.
        - `request_of`: `"module:function"` that reads a call, `RequestOf`; by default `request_fields`.
        - `decision_argument`: the keyword by which the replica's method is given `Decision.to_dict()`; by default it is
          not. HTTP and gRPC calls have no keywords and are given nothing.
        - `refuse`: whether a rejected call raises `TurnedAwayError` at the caller, which is the default; else it goes
          where Ray sends it.

        Settings that cannot be used are logged as an error, and all calls go where Ray sends them.
        """
        self._scheduler: Scheduler | None = None
        self._plan: Path | None = None
        self._calls: dict[str, list[_Call]] = {}
        self._replica_queues: dict[str, _ReplicaQueue] = {}
        with _harmless():
            self._begin(**settings)

    def _begin(
        self,
        *,
        plan: str,
        policy: str | None = None,
        pool: str | None = None,
        request_of: str | None = None,
        decision_argument: str | None = None,
        refuse: bool = True,
    ) -> None:
        self._policy, self._pool, self._decision_argument, self._refuse = policy, pool, decision_argument, refuse
        self._request_of: RequestOf = request_fields if request_of is None else resolve_name(request_of)
        self._plan = Path(plan)
        self._look: asyncio.Task[None] | None = None
        self._look_s, self._stamp = time.monotonic() + LOOK_S, _stamp(self._plan)
        self._load(self._plan)

    @property
    def max_num_routing_tasks(self) -> int:
        """Ray allows two a replica, because its own ask the replicas all the time; ours wait until they are woken."""
        return MOST_WAITING

    # ---- What Ray asks ----------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the call was decided for, once it has room; all of them where nothing could be decided."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # otherwise Ray asks again at once, for ever
        with _harmless():
            now = time.monotonic()
            if self._plan is not None and now >= self._look_s and (self._look is None or self._look.done()):
                self._look_s = now + LOOK_S
                self._look = asyncio.create_task(self._follow(self._plan))
            while not (call := await self._call_of(pending_request)).turn.is_set():
                await call.turn.wait()
            call.task = asyncio.current_task()
            return self._ranks_of(call)
        return [candidate_replicas]

    def _ranks_of(self, call: _Call) -> list[list[RunningReplica]]:
        """The replicas to offer a call whose turn has come, in order; each list is offered at once."""
        replicas = list(self.curr_replicas.values())
        queue = self._replica_queues.get(call.worker or "")
        if self._scheduler is None or call.decision is None or queue is None:
            return [replicas]
        if not call.offered:  # the replica has room, which Ray may not have heard yet, and would ask for
            call.offered = True
            self.on_new_queue_len_info(queue.replica.replica_id, queue.sent)
        now = time.monotonic()
        if now - call.turn_s < PATIENCE_S:
            return [[queue.replica]]
        mine = [state for state in self._scheduler.workers(now) if state.pool == call.decision.pool]
        others = [state.name for state in sorted(mine, key=lambda state: state.left_s) if state.name != call.worker]
        return [
            [queue.replica],
            *([self._replica_queues[name].replica] for name in others if name in self._replica_queues),
        ]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """An attempt at a replica is over: the call has ended, unless the replica had no room and Ray tries again."""
        with _harmless():
            ended = (call for call in self._calls.get(internal_request_id, ()) if call.sent_to == replica_id)
            for call in islice(ended, 1):
                self._end(call, "served")

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        with _harmless():
            self._keep_up()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        with _harmless():
            self._keep_up()

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Send the call that this task is routing, and no other.

        Ray finds it by its id. Calls that a replica makes while it serves one request share that request's id; Ray's
        index keeps the first of them alone, and the others would wait for ever (seen with Ray 2.60).
        """
        shared = self._calls.get(request_metadata.internal_request_id, ()) if request_metadata else ()
        task = asyncio.current_task()
        for call in islice((c for c in shared if c.task is task and not c.pending.future.done()), 1):
            self._pending_requests_by_id[request_metadata.internal_request_id] = call.pending
            call.task = None
        super()._fulfill_next_pending_request(replica, request_metadata)

    # ---- Calls ------------------------------------------------------------------------------------------------------

    async def _call_of(self, pending: PendingRequest) -> _Call:
        """The call as it was decided; decided now if it was not, or if its replica is gone."""
        key = pending.metadata.internal_request_id
        known = next((call for call in self._calls.get(key, ()) if call.pending is pending), None)
        if known is not None and (known.worker is None or known.worker in self._replica_queues):
            self._watch(known)
            return known
        if known is not None:
            self._end(known, "cancelled")
        call = _Call(pending, await self._decide(pending))
        decision = call.decision
        if decision is not None and decision.action == "reject" and self._refuse:
            from hybridsd_sim.serving.ray_serve import TurnedAwayError as Raised  # Ray has this very class by value

            # The caller waits for the call's future; Ray stops routing what is done.
            pending.future.set_exception(Raised(decision.reason))
            self._remove_pending_request_from_indices(pending)
            call.admit(time.monotonic())
            return call
        self._forget_lost()
        self._calls.setdefault(key, []).append(call)
        self._watch(call)
        has_keywords = not (pending.metadata.is_http_request or pending.metadata.is_grpc_request)
        if decision is not None and self._decision_argument is not None and has_keywords:
            pending.kwargs[self._decision_argument] = decision.to_dict()
        queue = self._replica_queues.get(call.worker or "")
        if queue is None:
            call.admit(time.monotonic())
        else:
            queue.calls[call] = None
            queue.admit(time.monotonic())
        return call

    async def _decide(self, pending: PendingRequest) -> Decision | None:
        """What the scheduler decides; None without a scheduler, or if the call does not say what it asks for."""
        scheduler = self._scheduler
        if scheduler is None:
            return None
        try:
            request: Request = complete_request(self._request_of(pending.args, pending.kwargs), scheduler.requests)
        except Exception as error:  # noqa: BLE001 -- `request_of` is anybody's
            logger.warning("A call goes where Ray sends it: no request could be read (%s).", type(error).__name__)
            return None
        if not scheduler.is_priced(request):
            await asyncio.to_thread(scheduler.preview, request, None, time.monotonic())
        return scheduler.decide(request, None, time.monotonic())

    def _watch(self, call: _Call) -> None:
        """Notice if the caller cancels; every attempt has a future of its own."""
        future = call.pending.future
        if call.watched is not future:
            call.watched = future
            future.add_done_callback(lambda done: self._end(call, "cancelled") if done.cancelled() else None)

    def _end(self, call: _Call, outcome: Outcome) -> None:
        """The call is over, or will be decided anew: its worker is free of it and the next may have its turn."""
        key, now = call.pending.metadata.internal_request_id, time.monotonic()
        left = [other for other in self._calls.pop(key, ()) if other is not call]
        if left:
            self._calls[key] = left
        if self._scheduler is not None and call.decision is not None:
            self._scheduler.observe(RequestDone(call.decision.number, now, outcome))
        queue = self._replica_queues.get(call.worker or "")
        if queue is not None:
            queue.calls.pop(call, None)
            queue.admit(now)
        call.admit(now)

    def _forget_lost(self) -> None:
        """End the oldest call if there are too many, or if it was sent so long ago that nobody will tell of its end."""
        for call in next(iter(self._calls.values()), [])[:1]:
            candidate = None if call.decision is None else call.decision.candidate
            usual_s = 0.0 if candidate is None else candidate.latency_s
            overdue = call.turn.is_set() and time.monotonic() > call.turn_s + usual_s + LOST_S
            if overdue or len(self._calls) >= MOST_CALLS:
                self._end(call, "failed")

    # ---- Workers and plans ------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Have Ray's replicas, and no others, as the scheduler's workers; let them have what they have room for."""
        if self._scheduler is None:
            return
        now = time.monotonic()
        up = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        known = {state.name for state in self._scheduler.workers(now)}
        pools = list(self._scheduler.scenario.pools)
        only_pool = pools[0] if len(pools) == 1 else "not given"
        for name in known - up.keys():
            self._scheduler.observe(WorkerDown(name, now))
        for name in self._replica_queues.keys() - up.keys():
            for call in self._replica_queues.pop(name).calls:
                call.admit(now)  # it finds its replica gone, and is decided anew
        for name, replica in up.items():
            if name not in known:
                pool = replica.replica_metadata.get("pool") or self._pool or only_pool
                try:
                    self._scheduler.observe(WorkerUp(name, pool, now))
                except InputError:
                    logger.exception("A replica takes no part in the plan: say which pool it belongs to.")
            queue = self._replica_queues.setdefault(name, _ReplicaQueue(replica))
            queue.replica = replica
            queue.admit(now)

    async def _follow(self, plan: Path) -> None:
        """Load the plan's file if it has changed; decisions go on meanwhile, and after a bad plan by the old one."""
        stamp = await asyncio.to_thread(_stamp, plan)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        with _harmless():
            version = await asyncio.to_thread(self._load, plan)
            logger.info("Routing by plan %d of %s.", version, plan)
            self._keep_up()

    def _load(self, plan: Path) -> int:
        if self._scheduler is not None:
            return self._scheduler.replace_plan(plan)
        self._scheduler = Scheduler.from_plan(plan, policy=self._policy, workers=())
        return self._scheduler.version


def _stamp(plan: Path) -> tuple[int, int] | None:
    """What changes with the file of a plan; None while there is none."""
    try:
        found = (plan / "plan.yaml" if plan.is_dir() else plan).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@contextmanager
def _harmless() -> Iterator[None]:
    """Log whatever goes wrong inside: a router that raises leaves calls without an answer."""
    try:
        yield
    except Exception:
        logger.exception("Routing by predicted cost failed; routing goes on.")
