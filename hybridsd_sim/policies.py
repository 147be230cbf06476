"""Who decides: a policy sees a view of the fleet and the candidate plans, and returns a `Decision`.

The same object decides in the simulation and inside a serving system. It knows no event loop and no clock but the one
passed in, and it sees only what a real dispatcher could know: predicted backlogs, as old as the view's telemetry. To
add a policy, write one class here and decorate it with `@register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.errors import InputError, unknown_name
from hybridsd_sim.plan import Plan, Share

Action = Literal["run", "reject"]
ValueT = TypeVar("ValueT")
NO_CANDIDATE = "no_candidate"
"""Reason code of a request that no plan of the policy's kind can serve."""
TURNED_AWAY = "turned_away"
"""Reason code of a request for which the capacity plan has no room."""
REASONS = (NO_CANDIDATE, TURNED_AWAY)


class Decision(NamedTuple):
    """What to do with one request: run a candidate, or reject it with a reason; what the policy predicts of it."""

    action: Action
    candidate: Candidate | None
    predicted_wait_s: float
    reason: str


REJECT = Decision("reject", None, 0.0, NO_CANDIDATE)
TURN_AWAY = Decision("reject", None, 0.0, TURNED_AWAY)


class PoolView:
    """What a dispatcher knows of one pool: GPUs, what runs, what waits; kept live by the pool, or a snapshot of it."""

    __slots__ = ("backlog_gpu_s", "busy_gpus", "busy_until_gpu_s", "declared_work", "gpus", "largest_free", "queued")

    def __init__(self, gpus: int, largest_free: int) -> None:
        self.gpus = gpus
        self.largest_free = largest_free
        self.queued = 0
        self.backlog_gpu_s = 0.0
        self.busy_gpus = 0
        self.busy_until_gpu_s = 0.0
        self.declared_work = 0.0

    def wait_s(self, degree: int, now: float) -> float:
        """Predicted seconds until a gang of `degree` GPUs starts: the outstanding GPU-seconds spread over the pool."""
        if self.queued == 0 and self.largest_free >= degree:
            return 0.0
        left = self.backlog_gpu_s + self.busy_until_gpu_s - now * self.busy_gpus
        return left / self.gpus if left > 0.0 else 0.0

    def copy(self) -> PoolView:
        """A snapshot that later events do not change."""
        other = PoolView(self.gpus, self.largest_free)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other


@dataclass(slots=True)
class FleetView:
    """The pools a policy may send work to, by index; `as_of_s` says how old the knowledge is."""

    pools: Sequence[PoolView]
    as_of_s: float = 0.0


class Policy(ABC):
    """Decides for one request at a time. `options` are the class's candidates, cheapest first."""

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    """What `make_policy` may pass to the policy, by the name of the argument."""

    @abstractmethod
    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        """What to do with a request whose absolute deadline is `deadline_s`, at time `now`."""


class _PerOptions(Generic[ValueT]):
    """Something worked out once for each sequence of options that a policy meets."""

    __slots__ = ("_known", "_make")

    def __init__(self, make: Callable[[Sequence[Candidate]], ValueT]) -> None:
        self._make = make
        self._known: dict[int, tuple[Sequence[Candidate], ValueT]] = {}

    def of(self, options: Sequence[Candidate]) -> ValueT:
        known = self._known.get(id(options))
        if known is None or known[0] is not options:  # another sequence may have got the address of a dead one
            known = self._known[id(options)] = (options, self._make(options))
        return known[1]


def _above_floor(options: Sequence[Candidate]) -> list[Candidate]:
    return [option for option in options if option.meets_floor]


class _Fixed(Policy):
    """A policy that always takes the same candidate for the same options."""

    def __init__(self) -> None:
        self._decisions = _PerOptions(self._decision)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        return self._decisions.of(options)

    def _decision(self, options: Sequence[Candidate]) -> Decision:
        candidate = self.choose(options)
        return REJECT if candidate is None else Decision("run", candidate, 0.0, self.name)

    @abstractmethod
    def choose(self, options: Sequence[Candidate]) -> Candidate | None: ...


def best_static(options: Sequence[Candidate]) -> Candidate | None:
    """The cheapest option that meets its own SLO and quality floor on an idle fleet; else the fastest one."""
    acceptable = [option for option in options if option.meets_slo and option.meets_floor]
    if acceptable:
        return min(acceptable, key=lambda option: (option.usd_or_inf, option.latency_s))
    return min(options, key=lambda option: option.latency_s, default=None)


ALL_SHARES = 1.0 - 1e-9
"""A sum of shares above this is the whole class."""
POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Enter a policy under its name."""
    POLICIES[policy.name] = policy
    return policy


def make_policy(name: str, **settings: object) -> Policy:
    """The registered policy of that name; `settings` it does not take are left out. Raises `InputError` if unknown."""
    if name not in POLICIES:
        raise InputError(unknown_name("policy", name, list(POLICIES)))
    policy = POLICIES[name]
    return policy(**{key: settings[key] for key in policy.settings if key in settings})


@register
class CloudOnly(_Fixed):
    """Every step in the cloud, on the cheapest plan that meets the SLO on an idle pool."""

    name = "cloud_only"
    summary = "every step in the cloud"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.edge_steps == 0])


@register
class EdgeOnly(_Fixed):
    """Every step on the user's device."""

    name = "edge_only"
    summary = "every step at the edge"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.cloud_steps == 0])


@register
class StaticSwitch(_Fixed):
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
        self._per_pool = _PerOptions(self._best_of_each_pool)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        pools = view.pools
        best = min(self._per_pool.of(options), key=lambda option: pools[option.pool_index].declared_work, default=None)
        if best is None:
            return REJECT
        return Decision("run", best, pools[best.pool_index].wait_s(best.degree, now), self.name)

    @staticmethod
    def _best_of_each_pool(options: Sequence[Candidate]) -> list[Candidate]:
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
        self._keeping: _PerOptions[list[Candidate]] = _PerOptions(_above_floor)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        budget = deadline_s - now
        pools = view.pools
        best: Candidate | None = None
        best_wait = 0.0
        soonest = float("inf")
        for option in self._keeping.of(options):
            wait = pools[option.pool_index].wait_s(option.degree, now) if option.pool_index >= 0 else 0.0
            total = wait + option.latency_s
            if total <= budget:
                return Decision("run", option, wait, self.name)
            if total < soonest:
                soonest, best, best_wait = total, option, wait
        return REJECT if best is None else Decision("run", best, best_wait, "late")


class _Rota:
    """Takes the parts of a mix in turns: always the one that is furthest behind its share, the first among equals.

    What the shares leave over is a last part of its own. After n turns the count of a part differs from share times n
    by less than the number of parts.
    """

    __slots__ = ("_behind", "_shares")

    def __init__(self, shares: Sequence[float]) -> None:
        left = 1.0 - sum(shares)
        self._shares = [*shares, left] if sum(shares) <= ALL_SHARES else list(shares)
        self._behind = [0.0] * len(self._shares)

    def turn(self) -> int:
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
        self._rotas = {name: _Rota([part.share for part in mix]) for name, mix in self.chosen.items()}
        self._matched: _PerOptions[list[Decision]] = _PerOptions(self._match)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        decisions = self._matched.of(options)
        if len(decisions) <= 1:  # the whole class on one plan, or nowhere
            return decisions[0] if decisions else REJECT
        return decisions[self._rotas[options[0].request_class].turn()]

    def _match(self, options: Sequence[Candidate]) -> list[Decision]:
        """A decision for each part of the class's mix, and one for what is turned away; one alone if that is all."""
        mix = self.chosen.get(options[0].request_class, ()) if options else ()
        decisions = [self._follow(part.plan, options) for part in mix]
        return decisions if sum(part.share for part in mix) > ALL_SHARES else [*decisions, TURN_AWAY]

    def _follow(self, wanted: Plan, options: Sequence[Candidate]) -> Decision:
        """The option that is the plan, or what becomes of the plan for a request of another number of steps."""
        found = next((o for o in options if o.plan == wanted.rescaled(o.plan.num_inference_steps)), None)
        return REJECT if found is None else Decision("run", found, 0.0, self.name)
