"""Policies that answer to queues, deadlines and money: `edf_reject`, `switch_by_queue`, `budgeted`.

A request is predicted to be in time if its pool's wait and the plan's own latency end by the deadline. A pool whose
queue goes by deadline counts only what is due before as its wait. What runs at the edge waits for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.policy import (
    CERTAIN_LATE,
    INFINITY,
    OVER_BUDGET,
    REJECT,
    AnyPool,
    Decision,
    FleetView,
    PerOptions,
    Policy,
    above_floor,
)

__all__ = ["Budgeted", "EdfReject", "SwitchByQueue"]

LATE = "late"
"""Reason code of a request that is served although it is predicted to be late."""
TOO_LATE = Decision("reject", None, 0.0, CERTAIN_LATE)
OVERSPENT = Decision("reject", None, 0.0, OVER_BUDGET)


class _Waits:
    """What the pools predict for one request, each asked once: its wait, and whom it would make late."""

    __slots__ = ("_deadline_s", "_known", "_now", "_pools")

    def __init__(self, pools: Sequence[AnyPool], deadline_s: float, now: float) -> None:
        self._pools, self._deadline_s, self._now = pools, deadline_s, now
        self._known: dict[tuple[int, int], float] = {}

    def of(self, option: Candidate) -> float:
        """Seconds until the option's gang starts; none at the edge."""
        key = option.pool_index, option.degree
        wait_s = self._known.get(key)
        if wait_s is None:
            wait_s = self._known[key] = self._asked(option) if option.pool_index >= 0 else 0.0
        return wait_s

    def _asked(self, option: Candidate) -> float:
        priority = option.cost.request.priority
        return self._pools[option.pool_index].wait_before_s(option.degree, self._now, self._deadline_s, priority)

    def total_s(self, option: Candidate) -> float:
        """Seconds until the image is there."""
        return self.of(option) + option.latency_s

    def queued(self, option: Candidate) -> bool:
        """Whether anybody waits for the option's pool."""
        return option.pool_index >= 0 and self._pools[option.pool_index].queued > 0

    def harmless(self, option: Candidate) -> bool:
        """Whether the option makes nobody late who waits for its pool and is due later."""
        if option.pool_index < 0:
            return True
        pool, priority = self._pools[option.pool_index], option.cost.request.priority
        return option.degree * option.cloud_s <= pool.spare_gpu_s(self._now, self._deadline_s, priority)


class EdfReject(Policy):
    """The cheapest plan above the floor that is predicted to be in time, by earliest deadline; else rejection.

    Each pool, and the edge, offers the cheapest plan that it would do in time if it were idle. The cheapest offer is
    taken that is in time as things are and makes nobody of its priority late who waits already and is due after it. If
    the queues leave none, the request is rejected at once (as Clockwork does, OSDI 2020), so that it delays nobody. A
    queue never moves a request to a faster plan that holds the same pool longer: in overload such plans are the last
    that seem in time, and with them the pool serves a fraction of what it could.

    Queues go by priority and deadline whatever the scenario says. One that was accepted may still be late: predictions
    err, and a higher priority takes precedence over the promises made to lower ones.
    """

    name = "edf_reject"
    summary = "cheapest plan in time, by earliest deadline; rejects what would be late"
    discipline = "edf"

    def __init__(self) -> None:
        self._keeping: PerOptions[list[Candidate]] = PerOptions(above_floor)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        keeping = self._keeping.of(options)
        left_s, waits = deadline_s - now, _Waits(view.pools, deadline_s, now)
        asked: set[int] = set()
        for option in keeping:
            if option.latency_s > left_s or option.pool_index in asked:
                continue
            if waits.total_s(option) <= left_s and waits.harmless(option):
                return Decision("run", option, waits.of(option), self.name)
            asked.add(option.pool_index)
        return TOO_LATE if keeping else REJECT


def _best_pictures_first(options: Sequence[Candidate]) -> list[Candidate]:
    """Options above the floor, all if there are none: most cloud steps, then best quality, then cheapest, first."""
    return sorted(above_floor(options) or options, key=lambda option: (-option.cloud_steps, -(option.quality or 0.0)))


class SwitchByQueue(Policy):
    """The switch step follows the queue: the longer the wait, the fewer steps stay in the cloud.

    Of the plans in time it takes the one with the most cloud steps k among those with

        k <= K * (1 - gain * w / S),

    where K are the most steps that would be in time on an idle fleet, S the seconds left until the deadline, and w the
    predicted wait of the plan's pool, 0 while nobody queues there and at the edge. With the default gain of 3 the steps
    in the cloud go to nothing while the wait grows to a third of what was promised. If there is none, the plan with the
    fewest steps is taken, in time or not, so that the queue drains; if no plan would be in time on an idle fleet, the
    soonest. Without a deadline nothing is given up. Plans below the floor are taken only by a class that has no others.
    The action is `degrade` where k < K.

    The queue steers itself: a cloud that has more to do than it can lets w grow, which lowers k until the work of a
    request, which grows with k, fits; a wait that falls raises k again. Where even the fewest steps are nearly too
    many, a burst meets a fuller queue than if those had always been taken: that is what the better pictures cost.
    """

    name = "switch_by_queue"
    summary = "fewer steps in the cloud the longer its queue is"
    settings = ("gain",)

    def __init__(self, gain: float = 3.0) -> None:
        self.gain = gain
        self._ranked: PerOptions[list[Candidate]] = PerOptions(_best_pictures_first)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        ranked = self._ranked.of(options)
        left_s, waits = deadline_s - now, _Waits(view.pools, deadline_s, now)
        possible = [option for option in ranked if option.latency_s <= left_s]
        if not possible:
            soonest = min(ranked, key=waits.total_s, default=None)
            return REJECT if soonest is None else Decision("run", soonest, waits.of(soonest), LATE)
        most, fewest = possible[0].cloud_steps, possible[-1].cloud_steps
        for option in possible:
            allowed = most * (1.0 - self.gain * waits.of(option) / left_s) if waits.queued(option) else most
            if option.cloud_steps <= allowed and waits.total_s(option) <= left_s:
                break
        else:
            option = min((o for o in possible if o.cloud_steps == fewest), key=waits.total_s)
        reason = self.name if waits.total_s(option) <= left_s else LATE
        return Decision("degrade" if option.cloud_steps < most else "run", option, waits.of(option), reason)


class Budgeted(Policy):
    """The best pictures that a running budget of dollars allows, by a virtual queue (Neely: drift plus penalty).

    The virtual queue Z holds the dollars by which spending is ahead of the budget. It drains at the budget's rate and
    grows with every request that is accepted, by its price:

        Z <- max(0, Z - budget * dt),  then  Z <- Z + usd.

    Of the plans above the floor in time it takes the one that minimises V * penalty + Z * usd, where the penalty is the
    CLIP score (0 to 1) lost against the best of them, unknown scores counting as 0, and V = usd_per_clip * cap_usd: a
    whole point of score is worth usd_per_clip dollars when Z is at its cap, twice as many when it is at half of it.
    A plan that would lift Z above its cap is never taken, nor one whose price nobody knows: a cheaper one is (the edge
    is free), and without one the request is rejected. If none that it can pay for is in time, it takes the cheapest.
    `degrade` says that a better picture would have been in time. It answers to money and not to queues: the pools have
    to bear what the budget buys.

    Bound: prices accepted in any window of t seconds sum to at most budget * t + cap_usd. Z before the window is at
    least 0 and after it at most the cap, and it drains by at most budget * t; there is nothing more, because a price is
    checked before it is accepted. Prices are those of the request's own GPU-seconds and bytes, not the rent of idle
    nodes nor work lost with a node. A clock that goes backwards stands still. One that
    follows another takes over its Z: a window that sees both is bound by the larger of their figures.

    `cap_usd` defaults to `CAP_S` seconds of the budget; a plan dearer than that is out of reach.
    """

    name = "budgeted"
    summary = "best pictures within a running budget of dollars"
    settings = ("budget_usd_per_hour", "cap_usd", "usd_per_clip")

    CAP_S = 60.0
    """Seconds of the budget that may be spent ahead of time."""

    def __init__(
        self, budget_usd_per_hour: float | None = None, cap_usd: float | None = None, usd_per_clip: float = 0.005
    ) -> None:
        if budget_usd_per_hour is None:
            rule = "is what the policy budgeted spends, and there is none"
            raise InputError(Problem("budget.usd_per_hour", "null", rule, "Give dollars an hour, or another policy."))
        self.budget_usd_per_s = budget_usd_per_hour / 3600.0
        self.cap_usd = self.CAP_S * self.budget_usd_per_s if cap_usd is None else cap_usd
        self.ahead_usd = 0.0
        """The virtual queue Z."""
        self._v = usd_per_clip * self.cap_usd
        self.as_of_s = -INFINITY
        self._keeping: PerOptions[list[Candidate]] = PerOptions(above_floor)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        self._drain(now)
        keeping = self._keeping.of(options)
        left_s, waits = deadline_s - now, _Waits(view.pools, deadline_s, now)
        in_time = [option for option in keeping if waits.total_s(option) <= left_s]
        found = min(filter(self._affords, in_time), key=self._objective, default=None)
        reason = self.name
        if found is None:
            found = min(filter(self._affords, keeping), key=lambda o: (o.usd_or_inf, waits.total_s(o)), default=None)
            reason = LATE
        if found is None:
            return OVERSPENT if keeping else REJECT
        self.ahead_usd += found.usd_or_inf
        degraded = any((option.quality or 0.0) > (found.quality or 0.0) for option in in_time)
        return Decision("degrade" if degraded else "run", found, waits.of(found), reason)

    def follow(self, other: Policy) -> None:
        if isinstance(other, Budgeted):
            self.ahead_usd, self.as_of_s = other.ahead_usd, other.as_of_s

    def _drain(self, now: float) -> None:
        if self.as_of_s < now < INFINITY:
            self.ahead_usd = max(0.0, self.ahead_usd - self.budget_usd_per_s * (now - self.as_of_s))
            self.as_of_s = now

    def _affords(self, option: Candidate) -> bool:
        return self.ahead_usd + option.usd_or_inf <= self.cap_usd

    def _objective(self, option: Candidate) -> float:
        """Drift plus penalty, but for what is the same for every option."""
        return self.ahead_usd * option.usd_or_inf - self._v * (option.quality or 0.0)
