"""The edge side: asks the cloud for an image, finishes what it began on a device of its own, says what became of it.

A cut connection, a damaged response or a lost worker are no ends: the request is sent again under its id, which finds
what is under way or done, and the device begins again from its last checkpoint. What cannot be mended ends the request
with a reason.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import stamina
from pydantic import ValidationError

from hybridsd_sim.errors import HybridSDError, InputError, Problem, validation_problem

from .messages import (
    DIGEST,
    DamagedResponseError,
    EdgeReport,
    EdgeStage,
    ImageRequest,
    ImageResponse,
    Reason,
    UnservedError,
    decode_response,
)
from .shaping import Link
from .tasks import Task, TaskResult, WorkerLost
from .worker_pool import ProcessPool

CONNECT_S = 10.0
"""A host that does not take a call within this is not there."""

_SPARE_S = 30.0
"""Longest silence of a service beyond what it was asked to wait."""

_CHECKPOINT_EVERY = 5

_NOTICE_S = 2.0

_PAUSES: Mapping[str, float] = {"wait_initial": 0.1, "wait_max": 5.0, "wait_jitter": 0.0}
"""Between attempts: a tenth of a second, and twice as long from one to the next."""

_POLL_S = 0.05

NAN = math.nan

StartPool = Callable[[EdgeStage], Awaitable[ProcessPool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """An image that a user wants. `arrival_s` is when it was asked for (NaN: when the client is); `link` shapes."""

    id: str
    request_class: str
    prompt: str = ""
    seed: int = 0
    slo_s: float | None = None
    link: Link | None = None
    arrival_s: float = NAN


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """What became of one request, as the client saw it.

    Times are `time.monotonic()` seconds here, NaN for what did not happen; those of a service on another machine are
    shifted to this clock. `status` is `served` or `unserved`, then with a `reason`, and `words` for people. So many
    `restarts` the worker died with it, in the cloud or here; `retries` times the answer was lost or damaged.
    """

    id: str
    request_class: str
    status: str = "unserved"
    reason: str = ""
    words: str = ""
    plan_label: str = ""
    plan_version: int = 0
    arrival_s: float
    sent_s: float = NAN
    cloud_ready_s: float = NAN
    cloud_start_s: float = NAN
    cloud_stop_s: float = NAN
    edge_ready_s: float = NAN
    edge_start_s: float = NAN
    edge_stop_s: float = NAN
    finish_s: float = NAN
    bytes_down: int = 0
    restarts: int = 0
    retries: int = 0
    worker: str | None = None
    edge_device: int = -1
    cloud_step_s: tuple[float, ...] = ()
    edge_step_s: tuple[float, ...] = ()
    image: bytes | None = field(default=None, repr=False)

    @property
    def latency_s(self) -> float:
        return self.finish_s - self.arrival_s

    @property
    def cloud_s(self) -> float:
        """Seconds from the worker's queue to its end; 0 without a cloud part."""
        return _zero_if_none(self.cloud_stop_s - self.cloud_ready_s)

    @property
    def edge_s(self) -> float:
        """Seconds from the device's queue to its end; 0 without an edge part."""
        return _zero_if_none(self.edge_stop_s - self.edge_ready_s)

    @property
    def transfer_s(self) -> float:
        """Seconds on the network, and in nobody's hands: the latency less cloud and edge."""
        return self.latency_s - self.cloud_s - self.edge_s


def _zero_if_none(seconds: float) -> float:
    return 0.0 if math.isnan(seconds) else seconds


class Client:
    """Asks one service, and finishes on `pool`, one worker a device; None serves images that the cloud finishes.

    Use it as an asynchronous context manager. The pool must be up, and stays its owner's; a function is called for one
    when a first image is handed over. `retries` more times an answer is asked for that does not arrive whole; after
    `timeout_s` a request ends whatever happens.
    """

    def __init__(
        self,
        url: str,
        pool: ProcessPool | StartPool | None = None,
        *,
        token: str | None = None,
        retries: int = 3,
        timeout_s: float = 600.0,
        wait_s: float = 20.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            remedy = "For example http://127.0.0.1:8471."
            raise InputError(Problem("--ask", repr(url), "must be the address of a service", remedy))
        self._pool, self._retries, self._timeout_s, self._wait_s = pool, retries, timeout_s, wait_s
        self._busy: Counter[str] = Counter()
        self._devices: list[str] = []
        self._notices: set[asyncio.Task[None]] = set()
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {}),
            timeout=httpx.Timeout(wait_s + _SPARE_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._notices:
            _, unsent = await asyncio.wait(self._notices, timeout=_NOTICE_S)
            for notice in unsent:
                notice.cancel()
            await asyncio.gather(*unsent, return_exceptions=True)
        await self._http.aclose()

    async def ask(self, request: ClientRequest) -> RequestOutcome:
        """The image, or the reason why there is none. Raises `InputError` for what no service would read.

        Cancelling the caller cancels the request, here and in the cloud.
        """
        progress = _RequestProgress(request, self._wait_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._fetch_image(progress)
        except UnservedError as ending:
            progress.fail(ending.reason, ending.words)
        except TimeoutError:
            progress.fail(Reason.TIMEOUT)
            self._notify("DELETE", f"/v1/images/{request.id}")
        except asyncio.CancelledError:
            self._notify("DELETE", f"/v1/images/{request.id}")
            raise
        return progress.outcome

    async def _fetch_image(self, progress: _RequestProgress) -> None:
        answer, payload = await self._fetch_response(progress)
        if answer.status == "unserved":
            raise UnservedError(answer.reason, "" if answer.error is None else answer.error.value)
        if answer.status == "served":
            progress.note(status="served", image=payload, finish_s=time.monotonic())
            return
        done_path = f"/v1/images/{progress.request.id}/done"
        try:
            done = await self._finish_at_edge(progress, answer.edge, payload)
        except UnservedError:
            self._notify("POST", done_path, EdgeReport(outcome="failed").model_dump_json())
            raise
        self._notify("POST", done_path, EdgeReport(step_s=done.step_s).model_dump_json())

    # ---- The cloud --------------------------------------------------------------------------------------------------

    async def _fetch_response(self, progress: _RequestProgress) -> tuple[ImageResponse, bytes]:
        """The response that says how the cloud's part ended, asked for until it is there and whole."""
        retries = stamina.retry_context(
            on=(httpx.HTTPError, DamagedResponseError), attempts=self._retries + 1, timeout=None, **_PAUSES
        )
        try:
            async for attempt in retries:
                with attempt:
                    progress.note(retries=attempt.num - 1)
                    return await self._poll(progress)
        except httpx.HTTPError as error:
            raise UnservedError(Reason.UNREACHABLE) from error
        except DamagedResponseError as error:
            raise UnservedError(Reason.DAMAGED) from error
        raise AssertionError("an attempt returns or raises")

    async def _poll(self, progress: _RequestProgress) -> tuple[ImageResponse, bytes]:
        """Ask as long as the service says that the request is under way, or that it is to be sent again later."""
        while True:
            message, sent_s = progress.message()
            # A connection of its own: what a damaged length leaves on it must not be read as the next response.
            own = {"connection": "close"}
            async with self._http.stream("POST", "/v1/images", content=message, headers=own) as response:
                received_s = time.monotonic()
                body = await response.aread()
            answer, payload = decode_response(body, response.headers.get(DIGEST))
            if isinstance(answer, ImageResponse):
                if answer.has_payload and not payload:
                    raise DamagedResponseError("the answer came without its payload")
                progress.update(answer, payload, sent_s, received_s)
                if answer.status != "open":
                    return answer, payload
            elif answer.retry_after_s is None:
                raise UnservedError(Reason.REFUSED, f"{answer.error.place}: {answer.error.rule}")
            else:
                await asyncio.sleep(answer.retry_after_s)

    # ---- The edge ---------------------------------------------------------------------------------------------------

    async def _finish_at_edge(self, progress: _RequestProgress, edge: EdgeStage | None, begun: bytes) -> TaskResult:
        """Do what is left on a device, begun again from its last checkpoint if it dies."""
        progress.note(edge_ready_s=time.monotonic())
        if self._pool is None or edge is None:
            raise UnservedError(Reason.NO_EDGE)
        pool = self._pool
        if callable(pool):  # the first image that needs a device
            try:
                pool = self._pool = await pool(edge)
            except HybridSDError as error:
                raise UnservedError(Reason.FAILED, str(error)) from error
        job = edge.job.model_dump()
        task = Task(
            key="", model=edge.model, prompt=progress.request.prompt, seed=progress.request.seed, **job,
            begun=begun or None, stop=edge.job.num_inference_steps, decode=True, checkpoint_every=_CHECKPOINT_EVERY,
        )  # fmt: skip
        for life in range(self._retries + 1):
            while not (up := pool.up()):  # noqa: ASYNC110 -- a pool has one listener, its owner
                await asyncio.sleep(_POLL_S)
            self._devices += [name for name in up if name not in self._devices]
            device = min(up, key=lambda name: self._busy[name])  # the one with the least to do
            self._busy[device] += 1
            try:
                done = await pool.run(device, replace(task, key=f"{progress.request.id}/edge{life}"))
            except WorkerLost as lost:
                progress.note(restarts=progress.outcome.restarts + 1)
                task = replace(task, begun=lost.checkpoint or task.begun)
            except HybridSDError as error:
                raise UnservedError(Reason.FAILED, str(error)) from error
            else:
                progress.finish(done, self._devices.index(device))
                return done
            finally:
                self._busy[device] -= 1
        raise UnservedError(Reason.EDGE_LOST)

    # ---- Notices ----------------------------------------------------------------------------------------------------

    def _notify(self, method: str, path: str, body: str | None = None) -> None:
        """Send the service something that nobody waits for.

        Three times at most, until it has arrived: the service forgets the request by itself in time.
        """

        async def send() -> None:
            with suppress(httpx.HTTPError):
                async for attempt in stamina.retry_context(on=httpx.HTTPError, attempts=3, timeout=None, **_PAUSES):
                    with attempt:
                        response = await self._http.request(method, path, content=body)
                        if response.is_server_error:
                            response.raise_for_status()

        notice = asyncio.create_task(send())
        self._notices.add(notice)
        notice.add_done_callback(self._notices.discard)


class _RequestProgress:
    """One request under way: the outcome so far, and how to ask for the rest."""

    def __init__(self, request: ClientRequest, wait_s: float) -> None:
        self.request, self._wait_s = request, wait_s
        now = time.monotonic()
        arrival_s = now if math.isnan(request.arrival_s) else request.arrival_s
        self.outcome = RequestOutcome(id=request.id, request_class=request.request_class, arrival_s=arrival_s)
        self.message()  # what cannot be written is refused at once

    def message(self) -> tuple[str, float]:
        """The message as JSON, and the time at which it was written."""
        request, now = self.request, time.monotonic()
        try:
            message = ImageRequest(
                id=request.id, request_class=request.request_class, prompt=request.prompt, seed=request.seed,
                slo_s=request.slo_s, link=request.link, age_s=max(0.0, now - self.outcome.arrival_s),
                wait_s=self._wait_s,
            )  # fmt: skip
        except ValidationError as error:
            problems = (validation_problem(item) for item in error.errors(include_url=False))
            raise InputError(replace(found, place=f"request.{found.place}") for found in problems) from None
        return message.model_dump_json(), now

    def note(self, **changes: Any) -> None:
        self.outcome = replace(self.outcome, **changes)

    def fail(self, reason: str, words: str = "") -> None:
        self.note(status="unserved", reason=reason, words=words)

    def update(self, answer: ImageResponse, payload: bytes, sent_s: float, received_s: float) -> None:
        """Take in what the cloud says it has done, on this machine's clock."""
        first_sent_s = sent_s if math.isnan(self.outcome.sent_s) else self.outcome.sent_s
        self.note(
            sent_s=first_sent_s,
            plan_label=answer.plan,
            plan_version=answer.plan_version,
            restarts=answer.restarts,
            bytes_down=len(payload),
        )
        if (held := answer.cloud) is not None:
            shift_s = clock_shift_s(answer, sent_s, received_s)
            self.note(
                worker=held.worker or None,
                cloud_ready_s=held.ready_s + shift_s,
                cloud_start_s=held.start_s + shift_s,
                cloud_stop_s=held.stop_s + shift_s,
                cloud_step_s=held.step_s,
            )

    def finish(self, done: TaskResult, device: int) -> None:
        """Take in what the device has done."""
        self.note(
            status="served",
            edge_start_s=done.start_s,
            edge_stop_s=done.stop_s,
            finish_s=time.monotonic(),
            edge_device=device,
            edge_step_s=done.step_s,
            image=done.payload,
        )


def clock_shift_s(answer: ImageResponse, sent_s: float, received_s: float) -> float:
    """What to add to the service's times: nothing if its clock is ours, else what puts the exchange in the middle.

    On one machine a request is received after it was sent, and answered before the client has the answer. Times of a
    clock that differs are moved to where both ways took equally long.
    """
    if sent_s <= answer.received_s and answer.answered_s <= received_s:
        return 0.0
    return (sent_s - answer.received_s + received_s - answer.answered_s) / 2
