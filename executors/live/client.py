"""The edge side: asks the cloud for an image, finishes what it began on a device of its own, says what became of it.

A cut connection, a damaged answer or a lost worker are no ends: the order is sent again under its id, which finds the
work that is under way or done, and the device begins again from its last checkpoint. What cannot be mended ends the
request with a reason.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from hybridsd_sim.errors import HybridSDError, InputError, Problem

from . import messages as endings
from .messages import DIGEST, Answer, DamagedError, EdgePart, Ended, Link, Order, Refusal, UnservedError, read_answer
from .tasks import Done, Task, WorkerLost
from .worker_pool import Crew

CONNECT_S = 10.0
"""A host that does not take a call within this is not there."""

_SPARE_S = 30.0
"""Longest silence of a service beyond what it was asked to wait."""

_CHECKPOINT_EVERY = 5

_LAST_WORDS_S = 2.0

_LAST_WORDS_PAUSES_S = (0.0, 0.1, 0.4)

_POLL_S = 0.05

NAN = math.nan

MakeCrew = Callable[[EdgePart], Awaitable[Crew]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """An image that a user wants. `arrival_s` is when it was asked for (NaN: when the client is); `link` shapes."""

    id: str
    request_class: str
    prompt: str = ""
    seed: int = 0
    slo_s: float | None = None
    link: Link | None = None
    arrival_s: float = NAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
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
    """Asks one service, and finishes on `crew`, one worker a device; None serves images that the cloud finishes.

    Use it as an asynchronous context manager. The crew must be up, and stays its owner's; a function is called for one
    when a first image is handed over. `retries` more times an answer is asked for that does not arrive whole; after
    `timeout_s` a request ends whatever happens.
    """

    def __init__(
        self,
        url: str,
        crew: Crew | MakeCrew | None = None,
        *,
        token: str | None = None,
        retries: int = 3,
        timeout_s: float = 600.0,
        wait_s: float = 20.0,
    ) -> None:
        self._crew, self._retries, self._timeout_s, self._wait_s = crew, retries, timeout_s, wait_s
        self._busy: Counter[str] = Counter()
        self._devices: list[str] = []
        self._last_words: set[asyncio.Task[None]] = set()
        self._http = httpx.AsyncClient(
            base_url=_checked_url(url),
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
        if self._last_words:
            _, unsaid = await asyncio.wait(self._last_words, timeout=_LAST_WORDS_S)
            for saying in unsaid:
                saying.cancel()
            await asyncio.gather(*unsaid, return_exceptions=True)
        await self._http.aclose()

    async def ask(self, ask: Ask) -> Outcome:
        """The image, or the reason why there is none. Raises `InputError` for what no service would read.

        Cancelling the caller cancels the request, here and in the cloud.
        """
        trip = _Trip(ask, self._wait_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._through(trip)
        except UnservedError as ending:
            trip.fail(ending.reason, ending.words)
        except TimeoutError:
            trip.fail(endings.TIMEOUT)
            self._say(self._take_back(ask.id))
        except asyncio.CancelledError:
            self._say(self._take_back(ask.id))
            raise
        return trip.outcome

    async def _through(self, trip: _Trip) -> None:
        answer, payload = await self._answer(trip)
        if answer.status == "unserved":
            raise UnservedError(answer.reason, "" if answer.error is None else answer.error.value)
        if answer.status == "served":
            trip.note(status="served", image=payload, finish_s=time.monotonic())
            return
        try:
            done = await self._at_edge(trip, answer.edge, payload)
        except UnservedError:
            self._say(self._tell(trip.ask.id, Ended(outcome="failed")))
            raise
        self._say(self._tell(trip.ask.id, Ended(step_s=done.step_s)))

    # ---- The cloud --------------------------------------------------------------------------------------------------

    async def _answer(self, trip: _Trip) -> tuple[Answer, bytes]:
        """The answer, asked for until it is there and whole."""
        while True:
            try:
                said, payload = await self._exchange(trip)
            except httpx.HTTPError:
                reason = endings.UNREACHABLE
            except DamagedError:
                reason = endings.DAMAGED
            else:
                if isinstance(said, Answer) and said.status != "open":
                    return said, payload
                if isinstance(said, Refusal):
                    await _wait_as_told(said)
                continue
            if trip.outcome.retries >= self._retries:
                raise UnservedError(reason)
            trip.note(retries=trip.outcome.retries + 1)
            await asyncio.sleep(0.05 * 2**trip.outcome.retries)

    async def _exchange(self, trip: _Trip) -> tuple[Answer | Refusal, bytes]:
        order, sent_s = trip.order()
        # A line of its own: what a damaged length leaves on it must not be read as the next answer.
        own = {"connection": "close"}
        async with self._http.stream("POST", "/v1/images", content=order, headers=own) as response:
            heard_s = time.monotonic()
            body = await response.aread()
        said, payload = read_answer(body, response.headers.get(DIGEST))
        if isinstance(said, Answer):
            if said.has_payload and not payload:
                raise DamagedError("the answer came without its payload")
            trip.hear(said, payload, sent_s, heard_s)
        return said, payload

    # ---- The edge ---------------------------------------------------------------------------------------------------

    async def _at_edge(self, trip: _Trip, edge: EdgePart | None, begun: bytes) -> Done:
        """Do what is left on a device, begun again from its last checkpoint if it dies."""
        trip.note(edge_ready_s=time.monotonic())
        if self._crew is None or edge is None:
            raise UnservedError(endings.NO_EDGE)
        crew = await self._made(self._crew, edge)
        job = edge.job.model_dump()
        task = Task(
            key="", model=edge.model, prompt=trip.ask.prompt, seed=trip.ask.seed, **job, begun=begun or None,
            stop=edge.job.num_inference_steps, decode=True, checkpoint_every=_CHECKPOINT_EVERY,
        )  # fmt: skip
        for life in range(self._retries + 1):
            device = await self._free_device(crew)
            try:
                done = await self._on(crew, device, replace(task, key=f"{trip.ask.id}/edge{life}"))
            except WorkerLost as lost:
                trip.note(restarts=trip.outcome.restarts + 1)
                task = replace(task, begun=lost.checkpoint or task.begun)
            except HybridSDError as error:
                raise UnservedError(endings.FAILED, str(error)) from error
            else:
                trip.finish(done, self._devices.index(device))
                return done
        raise UnservedError(endings.EDGE_LOST)

    async def _made(self, crew: Crew | MakeCrew, edge: EdgePart) -> Crew:
        """The crew, made now if this is the first image that needs one."""
        if not callable(crew):
            return crew
        try:
            self._crew = made = await crew(edge)
        except HybridSDError as error:
            raise UnservedError(endings.FAILED, str(error)) from error
        return made

    async def _free_device(self, crew: Crew) -> str:
        """The device with the least to do, as soon as one is up; `timeout_s` limits the wait."""
        while not (up := crew.up()):  # noqa: ASYNC110 -- a crew has one listener, its owner
            await asyncio.sleep(_POLL_S)
        self._devices += [name for name in up if name not in self._devices]
        return min(up, key=lambda name: self._busy[name])

    async def _on(self, crew: Crew, device: str, task: Task) -> Done:
        self._busy[device] += 1
        try:
            return await crew.run(device, task)
        finally:
            self._busy[device] -= 1

    # ---- Last words -------------------------------------------------------------------------------------------------

    def _say(self, words: Coroutine[Any, Any, None]) -> None:
        """Tell the service something that nobody waits for."""
        saying = asyncio.create_task(words)
        self._last_words.add(saying)
        saying.add_done_callback(self._last_words.discard)

    async def _tell(self, name: str, ended: Ended) -> None:
        await self._send("POST", f"/v1/images/{name}/done", ended.model_dump_json())

    async def _take_back(self, name: str) -> None:
        await self._send("DELETE", f"/v1/images/{name}")

    async def _send(self, method: str, path: str, body: str | None = None) -> None:
        """Say it until it is heard, three times at most: the service forgets the request by itself in time."""
        for pause_s in _LAST_WORDS_PAUSES_S:
            await asyncio.sleep(pause_s)
            with suppress(httpx.HTTPError):
                if not (await self._http.request(method, path, content=body)).is_server_error:
                    return


class _Trip:
    """One request under way: the outcome so far, and how to ask for the rest."""

    def __init__(self, ask: Ask, wait_s: float) -> None:
        self.ask, self._wait_s = ask, wait_s
        now = time.monotonic()
        arrival_s = now if math.isnan(ask.arrival_s) else ask.arrival_s
        self.outcome = Outcome(id=ask.id, request_class=ask.request_class, arrival_s=arrival_s)
        self.order()  # what cannot be written is refused at once

    def order(self) -> tuple[str, float]:
        """The order as JSON, and the time at which it was written."""
        ask, now = self.ask, time.monotonic()
        try:
            order = Order(
                id=ask.id, request_class=ask.request_class, prompt=ask.prompt, seed=ask.seed, slo_s=ask.slo_s,
                link=ask.link, age_s=max(0.0, now - self.outcome.arrival_s), wait_s=self._wait_s,
            )  # fmt: skip
        except ValidationError as error:
            raise InputError(
                Problem(f"ask.{'.'.join(map(str, found['loc']))}", repr(found["input"])[:80], found["msg"])
                for found in error.errors(include_url=False)
            ) from None
        return order.model_dump_json(), now

    def note(self, **changes: Any) -> None:
        self.outcome = replace(self.outcome, **changes)

    def fail(self, reason: str, words: str = "") -> None:
        self.note(status="unserved", reason=reason, words=words)

    def hear(self, answer: Answer, payload: bytes, sent_s: float, heard_s: float) -> None:
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
            shift_s = _shift_s(answer, sent_s, heard_s)
            self.note(
                worker=held.worker or None,
                cloud_ready_s=held.ready_s + shift_s,
                cloud_start_s=held.start_s + shift_s,
                cloud_stop_s=held.stop_s + shift_s,
                cloud_step_s=held.step_s,
            )

    def finish(self, done: Done, device: int) -> None:
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


def _shift_s(answer: Answer, sent_s: float, heard_s: float) -> float:
    """What to add to the service's times: nothing if its clock is ours, else what puts the exchange in the middle.

    On one machine an order is received after it was sent, and answered before that is heard. On a clock that differs
    they are moved to where both ways took equally long.
    """
    if sent_s <= answer.received_s and answer.answered_s <= heard_s:
        return 0.0
    return (sent_s - answer.received_s + heard_s - answer.answered_s) / 2


async def _wait_as_told(refusal: Refusal) -> None:
    """Wait before asking again, or raise `UnservedError` where that is of no use."""
    if refusal.retry_after_s is None:
        raise UnservedError(endings.REFUSED, f"{refusal.error.place}: {refusal.error.rule}")
    await asyncio.sleep(refusal.retry_after_s)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        remedy = "For example http://127.0.0.1:8471."
        raise InputError(Problem("--ask", repr(url), "must be the address of a service", remedy))
    return url
