"""The works of a service by the names that clients gave them: a repeated order finds its work instead of a second one.

Finished works are kept for a while, so that a client whose connection was cut can ask again; how many of them, and the
bytes of their payloads, are bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import replace
from functools import partial

from executors.live import endings
from executors.live.messages import Ended, Order
from executors.live.meters import Meters
from executors.live.roster import Roster
from executors.live.work import Settings, Work
from hybridsd_sim.candidates import request_of
from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.plan import Request

MOST_KEPT = 10_000
"""Finished works remembered at a time."""
ROOM_S = 0.25
"""There may be room again after so long: sooner than any image is made, later than a tight loop would ask."""
_STOPPING_S = 5.0


class BusyError(HybridSDError):
    """An order that is not taken now; after `retry_after_s` it may be."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Bucket:
    """Lets `rate` events a second pass, and up to twice as many at once after a pause."""

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


class Desk:
    """Takes orders, finds works again, and forgets them in time."""

    def __init__(self, roster: Roster, settings: Settings, meters: Meters) -> None:
        self._roster, self._settings, self._meters = roster, settings, meters
        self._bucket = Bucket(settings.orders_per_s)
        self._works: dict[str, Work] = {}
        self._kept: OrderedDict[Work, None] = OrderedDict()
        self._kept_bytes = 0
        meters.watch("hybridsd_live_open_requests", "Requests in the cloud's hands", lambda: self.num_open)
        meters.watch("hybridsd_live_kept_bytes", "Payloads kept for who asks again", lambda: self._kept_bytes)

    @property
    def num_open(self) -> int:
        """Requests that the cloud has not done its part of."""
        return len(self._works) - len(self._kept)

    def find(self, name: str) -> Work | None:
        return self._works.get(name)

    def take(self, order: Order) -> Work:
        """The work of an order: a new one, or that of the same order before.

        Raises `BusyError` where there are too many, and `InputError` for another order of the same name.
        """
        if wait_s := self._bucket.take():
            raise BusyError("more orders a second than the service takes", wait_s)
        known = self._works.get(order.id)
        if known is not None and not known.order.same_image(order):
            rule, remedy = "is the name of another request", "Give every request an id of its own."
            raise InputError(Problem("id", order.id, rule, remedy))
        if known is not None and not known.dropped:
            return known
        if self.num_open >= self._settings.max_open:
            raise BusyError("as many requests as the service takes are under way", ROOM_S)
        if known is not None:
            self._forget(known)
        work = self._works[order.id] = Work(order, self._request(order), self._roster, self._settings, self._meters)
        work.task.add_done_callback(partial(self._keep, work))
        return work

    def _request(self, order: Order) -> Request:
        """What the order's class asks for; the scheduler refuses a class that it does not know."""
        spec = self._roster.scheduler.scenario.requests.get(order.request_class)
        if spec is None:
            return Request(model="", request_class=order.request_class)
        request = request_of(order.request_class, spec)
        return request if order.slo_s is None else replace(request, slo_s=order.slo_s)

    def _keep(self, work: Work, task: asyncio.Task[None]) -> None:
        self._kept[work] = None
        self._kept_bytes += len(work.payload)
        task.get_loop().call_later(self._settings.keep_s, self._forget, work)
        for other in list(self._kept)[:-1]:  # the newest is being answered, whatever its size
            if self._kept_bytes <= self._settings.keep_bytes:
                break
            self._kept_bytes -= other.drop_payload()
        if len(self._kept) > MOST_KEPT:
            self._forget(next(iter(self._kept)))

    def _forget(self, work: Work) -> None:
        """Nobody asks for it any more; if the edge has said nothing until now, it is lost."""
        if work in self._kept:
            del self._kept[work], self._works[work.order.id]
            self._kept_bytes -= work.drop_payload()  # its timer may hold the work for longer
            work.close(Ended(outcome="failed"))

    async def close(self) -> None:
        """End everything that is under way."""
        works = list(self._works.values())
        for work in works:
            if not work.task.done():
                work.end(endings.STOPPED)
        if works:
            await asyncio.wait({work.task for work in works}, timeout=_STOPPING_S)
