"""The policies, by the name that a scenario or a command gives them.

To add one, write a class with `decide`, `name` and `summary`, and decorate it with `@register`: it is then offered
wherever policies are named. Static ones (`cloud_only`, `edge_only`, `static_switch`) always take the same plan, simple
ones (`least_work`, `cost_aware`) look at the pools, `planned` follows a capacity plan, and adaptive ones (`edf_reject`,
`switch_by_queue`, `budgeted`) answer to queues, deadlines and money.

A request is predicted to be in time if its pool's wait and the plan's own latency end by the deadline. A pool whose
queue goes by deadline counts only what is due before as its wait. What runs at the edge waits for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling.policy import (
    CERTAIN_LATE,
    INFINITY,
    OVER_BUDGET,
    REJECT,
    TURN_AWAY,
    AnyPool,
    Decision,
    FleetView,
    PerCandidates,
    Policy,
    StaticPolicy,
    best_static,
    within_limits,
)

LATE = "late"
"""Reason code of a request that is served although it is predicted to be late."""

ALL_SHARES = 1.0 - 1e-9
"""A sum of shares above this is the whole class."""

TOO_LATE = Decision("reject", None, 0.0, CERTAIN_LATE)
OVERSPENT = Decision("reject", None, 0.0, OVER_BUDGET)

POLICIES: dict[str, type[Policy]] = {}
"""Every registered policy by its name, the static ones first; commands list them in this order."""


def register(policy: type[Policy]) -> type[Policy]:
    """Enter a policy under its name; a class decorator."""
    POLICIES[policy.name] = policy
    return policy


def make_policy(name: str, **settings: object) -> Policy:
    """The registered policy of that name; `settings` it does not take are left out. Raises `InputError` if unknown."""
    if name not in POLICIES:
        raise InputError(unknown_name("policy", name, list(POLICIES)))
    policy = POLICIES[name]
    return policy(**{key: settings[key] for key in policy.settings if key in settings})


def policy_for(name: str, scenario: Scenario, plan: Deployment | None) -> Policy:
    """The policy of that name with the settings of a scenario, and the plan that `planned` follows."""
    return make_policy(
        name,
        static_switch=scenario.search.static_switch,
        chosen=plan.plans if plan else {},
        budget_usd_per_hour=scenario.budget.usd_per_hour,
    )


@register
class CloudOnly(StaticPolicy):
    """Every step in the cloud, on the cheapest plan that meets the SLO on an idle pool."""

    name = "cloud_only"
    summary = "every step in the cloud"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.edge_steps == 0])


@register
class EdgeOnly(StaticPolicy):
    """Every step on the user's device."""

    name = "edge_only"
    summary = "every step at the edge"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.cloud_steps == 0])


@register
class StaticSwitch(StaticPolicy):
    """Hand over at one fixed share of the steps: 0.4 is Hybrid SD's published 10 of 25 (arXiv 2408.06646)."""

    name = "static_switch"
    summary = "hand over at a fixed step"
    settings = ("static_switch",)

    def __init__(self, static_switch: float = 0.4) -> None:
        super().__init__()
        self.share = static_switch

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        hybrids = [option for option in options if option.cloud_steps and option.edge_steps]
        if not hybrids:
            return best_static([option for option in options if option.edge_steps == 0])
        nearest = min(abs(option.switch_share - self.share) for option in hybrids)
        return best_static([option for option in hybrids if abs(option.switch_share - self.share) <= nearest + 1e-9])


@register
class LeastWork(Policy):
    """The pool with the least declared work outstanding (steps x pixels x images), each pool on its best cloud plan."""

    name = "least_work"
    summary = "cloud pool with least steps x pixels x images outstanding"

    def __init__(self) -> None:
        self._per_pool = PerCandidates(_best_per_pool)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        pools = view.pools
        best = min(self._per_pool.of(options), key=lambda option: pools[option.pool_index].declared_work, default=None)
        if best is None:
            return REJECT
        return Decision("run", best, pools[best.pool_index].wait_s(best.degree, now), self.name)


def _best_per_pool(options: Sequence[Candidate]) -> list[Candidate]:
    """The best cloud plan of each pool by itself."""
    pools = sorted({option.pool_index for option in options if option.edge_steps == 0})
    chosen = [best_static([o for o in options if o.pool_index == pool and o.edge_steps == 0]) for pool in pools]
    return [option for option in chosen if option is not None]


@register
class CostAware(Policy):
    """The cheapest plan whose predicted latency meets the deadline and whose quality meets the floor.

    Falls back to the plan predicted to finish first when nothing meets the deadline.
    """

    name = "cost_aware"
    summary = "cheapest plan predicted to meet deadline and floor"

    def __init__(self) -> None:
        self._within_limits: PerCandidates[list[Candidate]] = PerCandidates(within_limits)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        # The hot path of most simulations: one loop, and no object for the waits.
        left_s, pools = deadline_s - now, view.pools
        best: Candidate | None = None
        best_wait_s, soonest_s = 0.0, INFINITY
        for option in self._within_limits.of(options):
            wait_s = pools[option.pool_index].wait_s(option.degree, now) if option.pool_index >= 0 else 0.0
            total_s = wait_s + option.latency_s
            if total_s <= left_s:
                return Decision("run", option, wait_s, self.name)
            if total_s < soonest_s:
                soonest_s, best, best_wait_s = total_s, option, wait_s
        return REJECT if best is None else Decision("run", best, best_wait_s, LATE)


class _Turns:
    """Takes the parts of a mix in turns: always the one that is furthest behind its share, the first among equals.

    What the shares leave over is a last part of its own. After n turns the count of a part differs from share times n
    by less than the number of parts.
    """

    __slots__ = ("_behind", "_shares")

    def __init__(self, shares: Sequence[float]) -> None:
        left = 1.0 - sum(shares)
        self._shares = [*shares, left] if sum(shares) <= ALL_SHARES else list(shares)
        self._behind = [0.0] * len(self._shares)

    def next_index(self) -> int:
        """The position in the mix of the part whose turn it is."""
        behind = self._behind
        for index, share in enumerate(self._shares):
            behind[index] += share
        first = max(range(len(behind)), key=behind.__getitem__)
        behind[first] -= 1.0
        return first


@register
class Planned(Policy):
    """Follows a capacity plan: each request class is shared out over its mix of plans, as evenly as shares allow.

    Each request takes the plan that is furthest behind its share, so that every pool gets its part without bursts; what
    the shares leave over is turned away.
    """

    name = "planned"
    summary = "follows the capacity plan"
    settings = ("chosen",)

    def __init__(self, chosen: Mapping[str, Sequence[Share]] | None = None) -> None:
        self.chosen = dict(chosen or {})
        self._turns = {name: _Turns([part.share for part in mix]) for name, mix in self.chosen.items()}
        self._decisions: PerCandidates[list[Decision]] = PerCandidates(self._decide_shares)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        decisions = self._decisions.of(options)
        if len(decisions) <= 1:  # the whole class on one plan, or nowhere
            return decisions[0] if decisions else REJECT
        return decisions[self._turns[options[0].request_class].next_index()]

    def _decide_shares(self, options: Sequence[Candidate]) -> list[Decision]:
        """A decision for each part of the class's mix, and one for what is turned away; one alone if that is all.

        For a request of another number of steps a part is what becomes of its plan.
        """
        mix = self.chosen.get(options[0].request_class, ()) if options else ()
        decisions = []
        for part in mix:
            found = next((o for o in options if o.plan == part.plan.rescaled(o.plan.num_inference_steps)), None)
            decisions.append(REJECT if found is None else Decision("run", found, 0.0, self.name))
        return decisions if sum(part.share for part in mix) > ALL_SHARES else [*decisions, TURN_AWAY]


class _Waits:
    """What the pools predict for one request, each asked once: its wait, and whom it would make late."""

    __slots__ = ("_deadline_s", "_known", "_now", "_pools")

    def __init__(self, pools: Sequence[AnyPool], deadline_s: float, now: float) -> None:
        self._pools, self._deadline_s, self._now = pools, deadline_s, now
        self._known: dict[tuple[int, int], float] = {}

    def of(self, option: Candidate) -> float:
        """Seconds until the option's worker group starts; none at the edge."""
        key = option.pool_index, option.degree
        wait_s = self._known.get(key)
        if wait_s is None:
            wait_s = 0.0
            if option.pool_index >= 0:
                pool, priority = self._pools[option.pool_index], option.cost.request.priority
                wait_s = pool.wait_before_s(option.degree, self._now, self._deadline_s, priority)
            self._known[key] = wait_s
        return wait_s

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


@register
class EdfReject(Policy):
    """The cheapest plan above the floor that is predicted to be in time, by earliest deadline; else rejection.

    The candidate of each pool, and of the edge, is the cheapest plan that it would do in time if it were idle. Of these
    the cheapest is taken that is in time as things are and makes no waiting request of its priority late that is due
    after it. If the queues leave none, the request is rejected at once (as Clockwork does, OSDI 2020), so that it
    delays nobody. A queue never moves a request to a faster plan that holds the same pool longer: in overload such
    plans are the last that seem in time, and with them the pool serves a fraction of what it could.

    Queues go by priority and deadline whatever the scenario says. One that was accepted may still be late: predictions
    err, and a higher priority takes precedence over the promises made to lower ones.
    """

    name = "edf_reject"
    summary = "cheapest plan in time, by earliest deadline; rejects what would be late"
    discipline = "edf"

    def __init__(self) -> None:
        self._within_limits: PerCandidates[list[Candidate]] = PerCandidates(within_limits)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        accepted = self._within_limits.of(options)
        left_s, waits = deadline_s - now, _Waits(view.pools, deadline_s, now)
        seen: set[int] = set()
        for option in accepted:
            if option.latency_s > left_s or option.pool_index in seen:
                continue
            if waits.total_s(option) <= left_s and waits.harmless(option):
                return Decision("run", option, waits.of(option), self.name)
            seen.add(option.pool_index)
        return TOO_LATE if accepted else REJECT


@register
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

    def __init__(self, gain: float = 3.0) -> None:
        self.gain = gain
        # Most cloud steps first, then the best quality, then the cheapest.
        self._ranked: PerCandidates[list[Candidate]] = PerCandidates(
            lambda options: sorted(
                within_limits(options) or options, key=lambda option: (-option.cloud_steps, -(option.quality or 0.0))
            )
        )

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


@register
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
    settings = ("budget_usd_per_hour",)

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
        self._within_limits: PerCandidates[list[Candidate]] = PerCandidates(within_limits)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        if self.as_of_s < now < INFINITY:
            self.ahead_usd = max(0.0, self.ahead_usd - self.budget_usd_per_s * (now - self.as_of_s))
            self.as_of_s = now
        accepted = self._within_limits.of(options)
        left_s, waits = deadline_s - now, _Waits(view.pools, deadline_s, now)
        in_time = [option for option in accepted if waits.total_s(option) <= left_s]
        # Drift plus penalty, but for what is the same for every option.
        ahead_usd, v = self.ahead_usd, self._v
        found = min(
            filter(self._affords, in_time),
            key=lambda option: ahead_usd * option.usd_or_inf - v * (option.quality or 0.0),
            default=None,
        )
        reason = self.name
        if found is None:
            found = min(filter(self._affords, accepted), key=lambda o: (o.usd_or_inf, waits.total_s(o)), default=None)
            reason = LATE
        if found is None:
            return OVERSPENT if accepted else REJECT
        self.ahead_usd += found.usd_or_inf
        degraded = any((option.quality or 0.0) > (found.quality or 0.0) for option in in_time)
        return Decision("degrade" if degraded else "run", found, waits.of(found), reason)

    def follow(self, other: Policy) -> None:
        if isinstance(other, Budgeted):
            self.ahead_usd, self.as_of_s = other.ahead_usd, other.as_of_s

    def _affords(self, option: Candidate) -> bool:
        return self.ahead_usd + option.usd_or_inf <= self.cap_usd
