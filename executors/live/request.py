"""Requests in the cloud's hands: each decided, denoised, begun again elsewhere if need be, and ended exactly once.

The scheduler decides when a request comes in. A worker that dies leaves its last checkpoint: what is left is decided
anew, and another worker, or the edge, goes on from there. However it ends, the request has a status and a reason, and
the scheduler's ledger is closed.

`OpenRequests` knows them by the names that clients gave them, so that one that is sent again is not carried out twice.
Those that have ended are kept for a while, for clients whose connection was cut; how many of them, and the bytes of
their payloads, are bounded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.plan import Plan, Request, Stage, deadline_of
from hybridsd_sim.pricing import request_of
from hybridsd_sim.scheduling import CERTAIN_LATE, NO_CANDIDATE, CloudDone, Decision, Outcome, RequestDone, StepDone

from .dispatch import Dispatcher, plan_problems
from .messages import (
    EdgeReport,
    EdgeStage,
    ErrorDetail,
    ImageRequest,
    ImageResponse,
    ImageSettings,
    Reason,
    Status,
    UnservedError,
    WorkerTimes,
    problem_of,
)
from .shaping import sleep_until
from .tasks import Task, TaskResult, WorkerLost

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)

MAX_KEPT = 10_000
"""Ended requests remembered at a time."""

RETRY_AFTER_S = 0.25
"""There may be room again after so long: sooner than any image is made, later than a tight loop would ask."""

_STOPPING_S = 5.0

_MAY_PASS = {NO_CANDIDATE, Reason.NO_WORKER}
"""Reasons that a worker that comes back may do away with; the others hold whoever is up."""

_NO_TIME_S = 1e-3
"""What is left of a promise that cannot be kept: the scheduler takes no promise of nothing."""


class RequestMetrics:
    """The counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.ended = Counter("hybridsd_live_requests", "Requests ended", ["status", "reason"], registry=registry)
        self.restarts = Counter("hybridsd_live_restarts", "Requests whose worker died with them", registry=registry)
        self.sent_bytes = Counter("hybridsd_live_payload_sent_bytes", "Images and hand-overs sent", registry=registry)
        self.wait = Histogram("hybridsd_live_wait_seconds", "Waiting for a worker", buckets=_SECONDS, registry=registry)
        self.held = Histogram(
            "hybridsd_live_cloud_seconds", "A worker held by one request", buckets=_SECONDS, registry=registry
        )

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """How a service treats its requests, and how much it takes on.

    `payload` is the precision of latent transfers and checkpoints, fp16 as the planner prices them; a worker sends its
    state every `checkpoint_every` steps, 0 never. After `restarts` lost workers a request ends; it waits for lost
    workers to come back for `patience_s` and is over after `timeout_s` in the cloud. Its answer is kept for `keep_s`,
    and up to `keep_bytes` of all answers; an edge that says nothing for so long is lost. No more than `max_open`
    requests are under way at a time, and no more than `requests_per_s` come in.
    """

    payload: str = "fp16"
    checkpoint_every: int = 5
    restarts: int = 3
    patience_s: float = 60.0
    timeout_s: float = 3600.0
    keep_s: float = 900.0
    keep_bytes: int = 256 * 2**20
    max_open: int = 1024
    max_body_bytes: int = 65536
    requests_per_s: float = 100.0


class OpenRequest:
    """A request from its arrival to its end. `payload` is the image or the latent transfer once the task is done.

    `message` is what the client sent, `request` what its class asks for; `task` lives as long as the cloud's part does.
    """

    def __init__(
        self,
        message: ImageRequest,
        request: Request,
        dispatcher: Dispatcher,
        settings: ServiceSettings,
        counters: RequestMetrics,
    ) -> None:
        self.message, self.request = message, request
        self._dispatcher, self._settings, self._counters = dispatcher, settings, counters
        self.arrival_s = time.monotonic() - message.age_s
        self.deadline_s = deadline_of(self.arrival_s, request.slo_s)
        self.status: Status = "open"
        self.reason, self.words, self.payload = "", "", b""
        self.cloud: WorkerTimes | None = None
        self.edge: EdgeStage | None = None
        self.restarts = self.steps_done = 0
        self._plan: Plan | None = None
        self._decision: Decision | None = None
        self._worker: str | None = None
        self._stop, self._ready_s, self._why = 0, math.nan, ""
        self._settled = self.dropped = False
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._on_done)

    # ---- What others see and may do ---------------------------------------------------------------------------------

    def answer(self, received_s: float) -> ImageResponse:
        """What can be said of it now, to a client whose message came at `received_s`."""
        return ImageResponse(
            status=self.status,
            reason=self.reason,
            plan=self._plan.label if self._plan else "",
            plan_version=self._decision.plan_version if self._decision else 0,
            cloud=self.cloud,
            edge=self.edge if self.status == "handed_over" else None,
            restarts=self.restarts,
            steps_done=self.steps_done,
            received_s=received_s,
            answered_s=time.monotonic(),
            error=ErrorDetail.of(problem_of(self.reason, self.words)) if self.status == "unserved" else None,
        )

    def end(self, reason: str) -> None:
        """Give the request up where it is: in the queue, at the next step, or at the edge.

        `reason` is one of `Reason`; the first one that is given counts. A request that has ended stays as it is.
        """
        if self.task.done():
            self.close(EdgeReport(outcome="cancelled"))
        elif not self._why:
            self._why = reason
            self.task.cancel()

    def close(self, ended: EdgeReport) -> None:
        """How the edge's part ended; only the first report counts."""
        if self._settled or self.status != "handed_over" or self._decision is None or self._plan is None:
            return
        for seconds in ended.step_s[: self._plan.num_inference_steps]:
            self._observe(StepDone(self._decision.number, seconds, len(self._plan.stages) - 1))
        reason = {"served": "", "failed": Reason.FAILED, "cancelled": Reason.CANCELLED}[ended.outcome]
        self._settle(ended.outcome, "served" if ended.outcome == "served" else "unserved", reason)

    def drop_payload(self) -> int:
        """Keep the payload no longer: who asks again has it made again. Returns the bytes set free."""
        freed, self.payload = len(self.payload), b""
        self.dropped = self.dropped or freed > 0
        return freed

    # ---- Its life ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        left_s = max(0.0, self.deadline_s - time.monotonic())
        watch = None if left_s == math.inf else asyncio.get_running_loop().call_later(left_s, self._on_deadline)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._serve()
        except UnservedError as ending:
            self._fail(ending.reason, ending.words)
        except asyncio.CancelledError:
            self._fail(self._why or Reason.STOPPED)
        except TimeoutError:
            self._fail(Reason.TIMEOUT)
        except HybridSDError as error:
            self._fail(Reason.FAILED, str(error))
        except Exception as error:  # noqa: BLE001 -- the client gets an answer whatever happens
            log.error("a request failed with %s", type(error).__name__)  # noqa: TRY400 -- a traceback may quote the prompt
            self._fail(Reason.FAILED)
        finally:
            if watch is not None:
                watch.cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if self.status == "open":  # cancelled before it began
            self._fail(self._why or Reason.STOPPED)

    async def _serve(self) -> None:
        stage = await self._decide(0)
        begun, step = None, 0
        if stage is not None:
            link, decision = self.message.link, self._decision
            if link is not None and decision is not None and decision.candidate is not None:
                # The prompt crosses the network first, and stands in the worker's queue from then on.
                await sleep_until(self.arrival_s + link.up_s(decision.candidate.cost.bytes_up))
            self._ready_s = time.monotonic()
        while stage is not None and (step < self._stop or self.edge is None):
            try:
                self._finish(await self._attempt(stage, begun))
            except WorkerLost as lost:
                if lost.checkpoint is not None:
                    begun, step = lost.checkpoint, lost.step
                self.restarts += 1
                self._counters.restarts.inc()
                if self._decision is not None:
                    self._observe(RequestDone(self._decision.number, time.monotonic(), "failed"))
                if self.restarts > self._settings.restarts:
                    raise UnservedError(Reason.WORKER_LOST) from lost
                stage = await self._decide(step)
            else:
                return
        self._hand_over(begun, step)

    async def _attempt(self, stage: Stage, begun: bytes | None) -> TaskResult:
        """Let the worker do its stage from `begun` on; every step goes to the scheduler."""

        def on_step(step: int, seconds: float) -> None:
            self.steps_done = step + 1
            if self._decision is not None:
                self._observe(StepDone(self._decision.number, seconds))

        request, worker = self.request, self._worker or ""
        task = Task(
            key=f"{self.message.id}/{self.restarts}",
            model=stage.model,
            prompt=self.message.prompt,
            seed=self.message.seed,
            height_px=request.height_px,
            width_px=request.width_px,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
            stop=self._stop,
            begun=begun,
            decode=self.edge is None,
            payload=self._settings.payload,
            checkpoint_every=self._settings.checkpoint_every,
        )
        return await self._dispatcher.pool.run(worker, task, on_step=on_step)

    # ---- Deciding ---------------------------------------------------------------------------------------------------

    async def _decide(self, step: int) -> Stage | None:
        """Who does the steps from `step` on; None if it is the edge alone.

        Waits where only workers that are down may be missing. Raises `UnservedError` with the scheduler's reason.
        """
        until_s = time.monotonic() + self._settings.patience_s
        while True:
            now = time.monotonic()
            decision = self._dispatcher.decide(self._rest(step, now), now)
            reason = decision.reason
            if decision.plan is not None:
                self._decision = decision
                stage = self._follow(decision.plan, step)
                self._worker = None if stage is None else self._dispatcher.worker_for(stage, decision.worker)
                if stage is None or self._worker is not None:
                    return stage
                self._observe(RequestDone(decision.number, now, "failed"))
                reason = Reason.NO_WORKER
            if reason not in _MAY_PASS or self._dispatcher.complete or not await self._dispatcher.change(until_s):
                raise UnservedError(reason)

    def _rest(self, step: int, now: float) -> Request:
        """What is left to do from `step` on, and of the time in which it was promised."""
        slo_s = None if self.deadline_s == math.inf else max(self.deadline_s - now, _NO_TIME_S)
        return replace(self.request, num_inference_steps=self.request.num_inference_steps - step, slo_s=slo_s)

    def _follow(self, plan: Plan, step: int) -> Stage | None:
        """Take a plan for the steps from `step` on; one of the make begun with keeps its switch step.

        Returns the cloud's stage, None without.
        """
        if problems := plan_problems(plan):
            raise UnservedError(Reason.FAILED, str(problems[0]))
        if self._plan is None or step == 0 or plan.without_step_count != self._plan.without_step_count:
            self._plan, self._stop = plan, step + plan.switch_step
        stages = plan.edge_stages or (plan.stages if plan.sites[plan.vae_site].tier == "edge" else ())
        self.edge = None
        if stages:
            request = self.request
            job = ImageSettings(
                height_px=request.height_px,
                width_px=request.width_px,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                sampler=request.sampler,
            )
            self.edge = EdgeStage(model=stages[0].model, vae=plan.vae, start=self._stop, job=job)
        return next(iter(plan.cloud_stages), None)

    def _on_deadline(self) -> None:
        """End a request that the policy says will be late for certain."""
        now = time.monotonic()
        if self._dispatcher.preview(self._rest(0, now), now).reason == CERTAIN_LATE:
            self.end(Reason.DEADLINE)

    # ---- Ending -----------------------------------------------------------------------------------------------------

    def _finish(self, done: TaskResult) -> None:
        """The cloud has done its part: the image is there, or the edge goes on."""
        self.cloud = WorkerTimes(
            worker=self._worker or "",
            ready_s=self._ready_s,
            start_s=done.start_s,
            stop_s=done.stop_s,
            step_s=done.step_s,
        )
        self._counters.wait.observe(done.start_s - self._ready_s)
        self._counters.held.observe(done.stop_s - done.start_s)
        if done.is_image:
            self.payload = done.payload
            self._settle("served", "served")
        else:
            self._hand_over(done.payload, self._stop)

    def _hand_over(self, begun: bytes | None, step: int) -> None:
        """The edge does what is left from `step` on; it is waited for, and not for ever."""
        now = time.monotonic()
        if self.edge is None or self._decision is None:
            raise UnservedError(Reason.FAILED, "nothing is left for the edge")
        self.payload, self.edge = begun or b"", self.edge.model_copy(update={"start": step})
        if self.cloud is None and self.restarts:  # the last worker that held it is gone
            self.cloud = WorkerTimes(worker="", ready_s=self._ready_s, start_s=now, stop_s=now)
        self._observe(CloudDone(self._decision.number, now if self.cloud is None else self.cloud.stop_s))
        self.status = "handed_over"

    def _fail(self, reason: str, words: str = "") -> None:
        self.words = words
        self._settle("cancelled" if reason == Reason.CANCELLED else "failed", "unserved", reason)

    def _settle(self, outcome: Outcome, status: Status, reason: str = "") -> None:
        """Write down the end, once, and close the ledger."""
        self.reason, self._settled = reason, True
        if not (status == "served" and self.status == "handed_over"):  # who asks again still gets the latent transfer
            self.status = status
        if self._decision is not None:
            self._observe(RequestDone(self._decision.number, time.monotonic(), outcome))
        self._counters.ended.labels(status, reason).inc()

    def _observe(self, event: CloudDone | RequestDone | StepDone) -> None:
        self._dispatcher.scheduler.observe(event)


class BusyError(HybridSDError):
    """A request that is not taken now; after `retry_after_s` it may be."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class TokenBucket:
    """Lets `rate_per_s` events a second pass, and up to twice as many at once after a pause.

    Tokens come in at the rate and an event takes one; the bucket holds two seconds of them, and at least one.
    """

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s, self._most = rate_per_s, max(1.0, 2.0 * rate_per_s)
        self._left, self._at_s = self._most, time.monotonic()

    def take(self) -> float:
        """0 if an event may pass, else the seconds until one may."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at_s) * self._rate_per_s)
        self._at_s = now
        if self._left < 1.0:
            return (1.0 - self._left) / self._rate_per_s
        self._left -= 1.0
        return 0.0


class OpenRequests:
    """Takes requests, finds them again, and forgets them in time."""

    def __init__(self, dispatcher: Dispatcher, settings: ServiceSettings, counters: RequestMetrics) -> None:
        self._dispatcher, self._settings, self._counters = dispatcher, settings, counters
        self._bucket = TokenBucket(settings.requests_per_s)
        self._by_id: dict[str, OpenRequest] = {}
        self._kept: OrderedDict[OpenRequest, None] = OrderedDict()
        self._kept_bytes = 0
        counters.watch("hybridsd_live_open_requests", "Requests in the cloud's hands", lambda: self.num_open)
        counters.watch("hybridsd_live_kept_bytes", "Payloads kept for who asks again", lambda: self._kept_bytes)

    @property
    def num_open(self) -> int:
        """Requests that the cloud has not done its part of."""
        return len(self._by_id) - len(self._kept)

    def find(self, name: str) -> OpenRequest | None:
        return self._by_id.get(name)

    def take(self, message: ImageRequest) -> OpenRequest:
        """The request of a message: a new one, or the one that it was sent for before.

        Raises `BusyError` where there are too many, and `InputError` for another request of the same name.
        """
        if wait_s := self._bucket.take():
            raise BusyError("more requests a second than the service takes", wait_s)
        known = self._by_id.get(message.id)
        if known is not None and not known.message.same_image(message):
            rule, remedy = "is the name of another request", "Give every request an id of its own."
            raise InputError(Problem("id", message.id, rule, remedy))
        if known is not None and not known.dropped:
            return known
        if self.num_open >= self._settings.max_open:
            raise BusyError("as many requests as the service takes are under way", RETRY_AFTER_S)
        if known is not None:
            self._forget(known)
        spec = self._dispatcher.scheduler.scenario.requests.get(message.request_class)
        if spec is None:  # the scheduler refuses a class that it does not know
            request = Request(model="", request_class=message.request_class)
        else:
            request = request_of(message.request_class, spec)
            request = request if message.slo_s is None else replace(request, slo_s=message.slo_s)
        settings, counters = self._settings, self._counters
        open_request = OpenRequest(message, request, self._dispatcher, settings, counters)
        self._by_id[message.id] = open_request
        open_request.task.add_done_callback(partial(self._keep, open_request))
        return open_request

    def _keep(self, open_request: OpenRequest, task: asyncio.Task[None]) -> None:
        self._kept[open_request] = None
        self._kept_bytes += len(open_request.payload)
        task.get_loop().call_later(self._settings.keep_s, self._forget, open_request)
        for other in list(self._kept)[:-1]:  # the newest is being answered, whatever its size
            if self._kept_bytes <= self._settings.keep_bytes:
                break
            self._kept_bytes -= other.drop_payload()
        if len(self._kept) > MAX_KEPT:
            self._forget(next(iter(self._kept)))

    def _forget(self, open_request: OpenRequest) -> None:
        """Nobody asks for it any more; if the edge has said nothing until now, it is lost."""
        if open_request in self._kept:
            del self._kept[open_request], self._by_id[open_request.message.id]
            self._kept_bytes -= open_request.drop_payload()  # its timer may hold the request for longer
            open_request.close(EdgeReport(outcome="failed"))

    async def close(self) -> None:
        """End everything that is under way, and wait for a few seconds until it has."""
        entries = list(self._by_id.values())
        for open_request in entries:
            if not open_request.task.done():
                open_request.end(Reason.STOPPED)
        if entries:
            await asyncio.wait({open_request.task for open_request in entries}, timeout=_STOPPING_S)
