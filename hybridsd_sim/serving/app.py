"""The application: what each path answers.

The paths that a serving system asks for every request read their body once and answer at once, on the event loop; a
request of a size that must be priced first, a new plan and a what-if go to threads, one at a time each, so that
decisions go on meanwhile. A plan that comes by its changed file takes the same way as one that was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.plan import Request as Wanted
from hybridsd_sim.pricing import read_deployment
from hybridsd_sim.scheduling import AnyPlan, Decision, Scheduler, WorkerDown, WorkerUp, check_number
from hybridsd_sim.serving.answers import (
    ChoicesAnswer,
    DecisionAnswer,
    HealthAnswer,
    Json,
    ObservedAnswer,
    PlanAnswer,
    PlannedDecisionAnswer,
    RefusedError,
    VersionAnswer,
    WhatIfAnswer,
    input_answer,
    problems_answer,
    refusal,
)
from hybridsd_sim.serving.guard import LOOPBACK, Guard, RateLimiter, body_of
from hybridsd_sim.serving.prometheus import SchedulerMetrics
from hybridsd_sim.serving.reload import EVERY_S, PlanFile, follow
from hybridsd_sim.serving.requests import QUESTION, REQUEST, asks_for_plan, read, read_events, read_plain
from hybridsd_sim.serving.routes import (
    DirectRoute,
    Responses,
    add_body_route,
    add_get_route,
    describe_routes,
    responses_of,
)
from hybridsd_sim.serving.whatif import choices, page, what_if
from hybridsd_sim.version import __version__

MOST_BODY_BYTES = 65_536

LARGER_PLAN = 16
"""How many times larger than other bodies a plan may be."""

REQUESTS_PER_S = 5_000.0
"""About as many as one core answers: beyond, requests would only wait for each other."""


def build_app(
    scheduler: Scheduler,
    *,
    plan_file: PlanFile | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    max_body_bytes: int = MOST_BODY_BYTES,
    requests_per_s: float = REQUESTS_PER_S,
    reload_every_s: float = EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The application that answers for a scheduler.

    `plan_file`, made before the scheduler read it, is looked at every `reload_every_s` seconds, and followed when it
    changes. With a `token` all but the page and the health checks asks for it. `hosts` are the names by which the
    server may be asked; None is any, for a server that others than this machine reach. `clock` gives the seconds that
    decisions and events are timed by.
    """
    sidecar = Sidecar(scheduler, max_body_bytes, clock)

    @asynccontextmanager
    async def alive(_: FastAPI) -> AsyncIterator[None]:
        watch = follow(plan_file, sidecar.replaced, reload_every_s) if plan_file else asyncio.sleep(0)
        task = asyncio.create_task(watch)
        sidecar.ready = True
        yield
        sidecar.ready = False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    app = FastAPI(
        title="hybridsd-sim sidecar", version=__version__, summary="Where and how to run each request of a plan.",
        lifespan=alive, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.add_middleware(Guard, token=token, hosts=hosts, limiter=RateLimiter(requests_per_s, time.monotonic))
    for error, answer in ERRORS.items():
        app.add_exception_handler(error, answer)
    _add_routes(app, sidecar)
    describe_routes(app, with_token=token is not None)
    return app


class Sidecar:
    """A scheduler behind HTTP: one method for each path."""

    def __init__(self, scheduler: Scheduler, max_body_bytes: int, clock: Callable[[], float]) -> None:
        self.scheduler, self.ready = scheduler, False
        self._metrics = SchedulerMetrics(policy=scheduler.policy_name)
        self._metrics.follow(scheduler.version)
        self._most, self._clock = max_body_bytes, clock
        self._pricing, self._swapping = CapacityLimiter(1), CapacityLimiter(1)

    async def decide(self, request: Request) -> Response:
        """Decide for one request. With `plan=true` the answer holds the plan to carry out."""
        with_plan = asks_for_plan(request.scope["query_string"])
        wanted = read(REQUEST, await body_of(request, self._most)).of(self.scheduler.requests)
        if self.scheduler.is_priced(wanted):
            decision = self._decided(wanted)
        else:
            decision = await to_thread.run_sync(self._decided, wanted, limiter=self._pricing)
        return Json(decision.to_dict(with_plan=with_plan))

    def _decided(self, wanted: Wanted) -> Decision:
        began = time.perf_counter()
        decision = self.scheduler.decide(wanted, None, self._clock())
        self._metrics.decided(decision, time.perf_counter() - began, wanted.request_class)
        return decision

    async def observe(self, request: Request) -> Response:
        """Take in one event or a list of them, all or, where one is wrong, none."""
        now = self._clock()
        events = [sent.of(now) for sent in read_events(await body_of(request, self._most))]
        # What the scheduler would raise, before it has taken in the first: strange pools, too many workers.
        if any(isinstance(event, WorkerUp) for event in events):
            pools = self.scheduler.scenario.pools
            if strange := [e.pool for e in events if isinstance(e, WorkerUp) and e.pool not in pools]:
                raise InputError(unknown_name("pool", name, list(pools)) for name in strange)
            up = {worker.name for worker in self.scheduler.workers(now)}
            for event in events:
                if isinstance(event, WorkerUp):
                    up.add(event.worker)
                    check_number(len(up))
                elif isinstance(event, WorkerDown):
                    up.discard(event.worker)
        for event in events:
            self.scheduler.observe(event)
            self._metrics.observed(event)
        return Json({"observed": len(events)})

    async def get_plan(self, _: Request) -> Response:
        """The plan in use."""
        version, deployment = self.scheduler.active_plan
        about = {"version": version, "policy": self.scheduler.policy_name, "scenario": self.scheduler.scenario.name}
        return Json(about | {"deployment": deployment.to_dict()})

    async def put_plan(self, request: Request) -> Response:
        """Follow another plan for the same scenario from the next decision on; if it does not fit, nothing changes."""
        body = await body_of(request, LARGER_PLAN * self._most)

        def replace_plan() -> int:
            return self.scheduler.replace_plan(read_deployment(read_plain(body, "plan"), "plan"))

        return Json({"version": await self._in_turn(replace_plan)})

    async def replaced(self, plan: AnyPlan) -> int:
        """Follow another plan; its number."""
        return await self._in_turn(partial(self.scheduler.replace_plan, plan))

    async def _in_turn(self, swap: Callable[[], int]) -> int:
        version = await to_thread.run_sync(swap, limiter=self._swapping)
        self._metrics.follow(self.scheduler.version)
        return version

    async def what_if(self, request: Request) -> Response:
        """Every way to serve a request, and the one that the policy would take. Nothing is decided by it."""
        question = read(QUESTION, await body_of(request, self._most))
        ask = partial(what_if, self.scheduler, question, self._clock())
        return Json(await to_thread.run_sync(ask, limiter=self._pricing))

    async def choices(self, _: Request) -> Response:
        """What one can ask about: request classes with their own values, and pools."""
        return Json(choices(self.scheduler))

    async def page(self, _: Request) -> Response:
        """The what-if page."""
        html, headers = page()
        return HTMLResponse(html, headers=headers)

    async def metrics(self, _: Request) -> Response:
        """Metrics for Prometheus."""

        def measure() -> bytes:
            self._metrics.fleet(self.scheduler.workers(self._clock()), self.scheduler.scenario.pools)
            return generate_latest(self._metrics.registry)

        return Response(await to_thread.run_sync(measure), media_type=CONTENT_TYPE_LATEST)

    async def healthy(self, _: Request) -> Response:
        """Whether the process answers."""
        return Json({"status": "alive"})

    async def is_ready(self, _: Request) -> Response:
        """Whether decisions may be asked for."""
        return Json({"status": "ready"}) if self.ready else Json({"status": "starting"}, 503)


WITH_PLAN = {
    "name": "plan", "in": "query", "required": False, "schema": {"type": "boolean"},
    "description": "Whether the answer holds the plan to carry out.",
}  # fmt: skip


def _add_routes(app: FastAPI, sidecar: Sidecar) -> None:
    """Every path with what it takes and answers."""
    app.router.route_class = DirectRoute
    decisions = DecisionAnswer | PlannedDecisionAnswer
    add_body_route(app, "POST", "/v1/decide", sidecar.decide, "RequestSent", decisions, parameters=[WITH_PLAN])
    add_body_route(app, "POST", "/v1/observe", sidecar.observe, "EventsSent", ObservedAnswer)
    add_body_route(app, "PUT", "/v1/plan", sidecar.put_plan, "Deployment", VersionAnswer)
    add_body_route(app, "POST", "/v1/whatif", sidecar.what_if, "QuestionSent", WhatIfAnswer)
    add_get_route(app, "/v1/plan", sidecar.get_plan, responses_of(PlanAnswer, 401, 421, 429))
    add_get_route(app, "/v1/whatif", sidecar.choices, responses_of(ChoicesAnswer, 401, 421, 429))
    add_get_route(app, "/healthz", sidecar.healthy, responses_of(HealthAnswer, 421), security=[])
    late: Responses = {503: {"model": HealthAnswer, "description": "It has not started, or is ending."}}
    add_get_route(app, "/readyz", sidecar.is_ready, responses_of(HealthAnswer, 421) | late, security=[])
    text: Responses = {200: {"content": {"text/plain": {}}, "description": "Prometheus text."}}
    add_get_route(app, "/metrics", sidecar.metrics, responses_of(None, 401, 421) | text)
    app.add_api_route("/", sidecar.page, include_in_schema=False)


async def _unknown_path(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    if getattr(error, "status_code", 404) != 405:
        problem = Problem("path", "unknown", "is none that is answered", "See /openapi.json.")
        return problems_answer([problem], 404)
    path = request.url.path
    methods = {name for route in request.app.routes if getattr(route, "path", "") == path for name in route.methods}
    known = ", ".join(sorted(methods))
    return problems_answer([Problem("method", request.method, f"must be {known} here")], 405, {"Allow": known})


async def _refuse(_: Request, error: Exception) -> Response:
    """Input that is wrong, and a request that is turned away."""
    if isinstance(error, InputError):
        return input_answer(error)
    return refusal(error) if isinstance(error, RefusedError) else problems_answer([], 500)


ERRORS = {
    HTTPException: _unknown_path,
    InputError: _refuse,
    RefusedError: _refuse,
}
