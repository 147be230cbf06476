"""What every policy is, sees and returns: the `Policy` interface, views of the fleet, the `Decision`.

The same object decides in the simulation and inside a serving system. It knows no event loop and no clock but the one
passed in, and it sees only what a real dispatcher could know: predicted backlogs, as old as the view's telemetry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

from hybridsd_sim.plan import Plan
from hybridsd_sim.pricing import Candidate

Action = Literal["run", "queue", "degrade", "reject"]
"""What to do with a request, see `Decision`."""

ValueT = TypeVar("ValueT")

NO_CANDIDATE = "no_candidate"
"""Reason code of a request that no plan of the policy's kind can serve."""

TURNED_AWAY = "turned_away"
"""Reason code of a request that the capacity plan turns away, because its shares sum to less than the class."""

CERTAIN_LATE = "certain_late"
"""Reason code of a request that no plan could serve by its deadline without making a waiting one late."""

OVER_BUDGET = "over_budget"
"""Reason code of a request that would overspend the running budget."""

REASONS = (NO_CANDIDATE, TURNED_AWAY, CERTAIN_LATE, OVER_BUDGET)
"""Reason codes of rejected requests; those of served ones are the name of the policy, or `late`."""

INFINITY = float("inf")


class Decision(NamedTuple):
    """What to do with one request: the candidate to run or the reason why not, and what is predicted of it.

    `action`: `run` starts at once, `queue` waits for its worker first, `degrade` runs with a plan that the policy would
    not take on idle pools, `reject` is not served. A policy fills the first four fields. The embedded scheduler
    adds the rest: `number` for later events (0 if rejected), the `worker` that does the pool's part, when it decided
    and until when the image is due, both on the caller's clock, and the version of the plan.
    """

    action: Action
    candidate: Candidate | None
    predicted_wait_s: float
    reason: str
    number: int = 0
    worker: str | None = None
    now_s: float = 0.0
    deadline_s: float = INFINITY
    plan_version: int = 0

    @property
    def plan(self) -> Plan | None:
        """The plan to carry out; None if the request is rejected."""
        return None if self.candidate is None else self.candidate.plan

    @property
    def pool(self) -> str | None:
        """The pool that begins; None if nothing runs in the cloud."""
        return self._site("cloud")

    @property
    def device(self) -> str | None:
        """The edge fleet that takes part; None if nothing runs at the edge."""
        return self._site("edge")

    def _site(self, tier: str) -> str | None:
        sites = {} if self.plan is None else self.plan.sites
        return next((name for name, site in sites.items() if site.tier == tier), None)

    @property
    def predicted_start_s(self) -> float | None:
        """When its worker, or the edge, begins with it, transfers apart."""
        return None if self.candidate is None else self.now_s + self.predicted_wait_s

    @property
    def predicted_finish_s(self) -> float | None:
        """When the image is there."""
        return None if self.candidate is None else self.now_s + self.predicted_wait_s + self.candidate.latency_s

    @property
    def usd(self) -> float | None:
        """Dollars of this request alone; None if it is rejected or nobody knows."""
        return None if self.candidate is None else self.candidate.cost.usd

    @property
    def quality(self) -> float | None:
        """CLIP score in 0..1; None if it is rejected or nobody knows."""
        return None if self.candidate is None else self.candidate.quality

    def to_dict(self, *, with_plan: bool = True) -> dict[str, Any]:
        """The decision for JSON, with 90% intervals of finish and quality; an absent deadline is None.

        Without `with_plan` the plan is left out, which is most of the text.
        """
        start, finish = self.predicted_start_s, self.predicted_finish_s
        quality = None if self.candidate is None else self.candidate.cost.quality
        fields: dict[str, Any] = {
            "action": self.action,
            "reason": self.reason,
            "number": self.number,
            "plan_version": self.plan_version,
            "now_s": self.now_s,
            "pool": self.pool,
            "worker": self.worker,
            "device": self.device,
            "switch_step": None if self.plan is None else self.plan.switch_step,
            "predicted_start_s": start,
            "predicted_finish_s": finish,
            "predicted_finish_interval_s": None
            if self.candidate is None
            else [self.now_s + self.predicted_wait_s + bound_s for bound_s in self.candidate.cost.latency_interval_s],
            "deadline_s": None if self.deadline_s == INFINITY else self.deadline_s,
            "usd": self.usd,
            "quality": self.quality,
            "quality_interval": None if quality is None else quality.clip.interval_or_none,
        }
        if with_plan:
            fields["plan"] = None if self.plan is None else self.plan.to_dict()
        return fields


REJECT = Decision("reject", None, 0.0, NO_CANDIDATE)
TURN_AWAY = Decision("reject", None, 0.0, TURNED_AWAY)


class AnyPool(Protocol):
    """What a policy may ask of a pool, however the GPUs share their queues."""

    __slots__ = ()
    queued: int
    declared_work: float

    def wait_s(self, degree: int, now: float) -> float:
        """Predicted seconds until a worker group of `degree` GPUs starts."""

    def wait_before_s(self, degree: int, now: float, deadline_s: float, priority: int) -> float:
        """Predicted seconds until it starts if due by `deadline_s`: `wait_s`, unless the queue goes by deadline."""
        return self.wait_s(degree, now)

    def spare_gpu_s(self, now: float, deadline_s: float, priority: int) -> float:
        """GPU-seconds due by `deadline_s` that make nobody behind late: any, unless the queue goes by deadline."""
        return INFINITY


class PoolView(AnyPool):
    """What a dispatcher knows of one pool: GPUs, what runs, what waits; kept live by the pool, or a snapshot of it.

    `backlog_gpu_s` are the GPU-seconds that wait, `busy_until_gpu_s` the sum over busy GPUs of when each will be free,
    so that `busy_until_gpu_s - now * busy_gpus` is what is left of what runs; `declared_work` is steps x pixels x
    images of both; `largest_free` are the most free GPUs on one node.
    """

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
        """Predicted seconds until a worker group of `degree` GPUs starts: outstanding GPU-seconds per GPU there is."""
        if self.queued == 0 and self.largest_free >= degree:
            return 0.0
        left = self.backlog_gpu_s + self.busy_until_gpu_s - now * self.busy_gpus
        return left / self.gpus if left > 0.0 else 0.0

    def copy(self) -> Self:
        """A snapshot that later events do not change."""
        other = type(self)(self.gpus, self.largest_free)
        for name in PoolView.__slots__:
            setattr(other, name, getattr(self, name))
        return other


Rank = tuple[int, float, float]
"""Place in a queue that goes by deadline, the lowest first: minus the priority, deadline, order of arrival."""


class Due(NamedTuple):
    """Work that waits in a queue that goes by deadline: its place, GPU-seconds, and latest start to be in time."""

    rank: Rank
    gpu_s: float
    latest_s: float


class DeadlinePoolView(PoolView):
    """The view of a pool whose queue goes by priority and deadline: it also knows what is due, in that order."""

    __slots__ = ("due",)

    def __init__(self, gpus: int, largest_free: int) -> None:
        super().__init__(gpus, largest_free)
        self.due: list[Due] = []

    def enter(self, due: Due) -> None:
        """Count work that waits from now on."""
        insort(self.due, due)

    def leave(self, rank: Rank) -> None:
        """Count the work at this place no longer."""
        del self.due[self._before(rank)]

    def _before(self, rank: Rank) -> int:
        """How many are due before that place."""
        return bisect_left(self.due, Due(rank, -INFINITY, 0.0))

    def _gpu_s_before(self, index: int, now: float) -> float:
        """GPU-seconds of what runs and of those due before the one at `index`."""
        waiting = sum(due.gpu_s for due in self.due[:index])
        return max(0.0, waiting + self.busy_until_gpu_s - now * self.busy_gpus)

    def wait_before_s(self, degree: int, now: float, deadline_s: float, priority: int) -> float:
        """What runs and what is due before it, spread over the pool."""
        ahead = self._before((-priority, deadline_s, INFINITY))
        if ahead == 0 and self.largest_free >= degree:
            return 0.0
        return self._gpu_s_before(ahead, now) / self.gpus

    def spare_gpu_s(self, now: float, deadline_s: float, priority: int) -> float:
        """The least that anybody of the same priority can bear who is due later and not late already."""
        index = self._before((-priority, deadline_s, INFINITY))
        if index == len(self.due):
            return INFINITY
        before, spare = self._gpu_s_before(index, now), INFINITY
        for rank, gpu_s, latest_s in self.due[index:]:
            if rank[0] != -priority:
                break
            slack = (latest_s - now) * self.gpus - before
            spare = slack if 0.0 <= slack < spare else spare
            before += gpu_s
        return spare

    def copy(self) -> Self:
        other = super().copy()
        other.due = self.due.copy()
        return other


@dataclass(slots=True)
class FleetView:
    """The pools a policy may send work to, by index; `as_of_s` says how old the knowledge is."""

    pools: Sequence[AnyPool]
    as_of_s: float = 0.0


class Policy(ABC):
    """Decides for one request at a time. `options` are the class's candidates, cheapest first."""

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    """The arguments that a scenario or its plan sets (`policy_for`); others are for who makes a policy in Python."""
    discipline: ClassVar[str | None] = None
    """How every pool orders its queue under this policy, whatever the scenario says; None leaves it to the scenario."""

    @abstractmethod
    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        """What to do with a request whose absolute deadline is `deadline_s`, at time `now`."""

    def follow(self, other: Policy) -> None:  # noqa: B027 -- most policies keep no accounts
        """Take over the accounts of the policy that decided so far, which is not asked again."""


MAX_KNOWN = 1024
"""Sequences of options remembered by a policy at a time: a service that runs for months meets ever new ones."""


class PerCandidates(Generic[ValueT]):
    """A value computed once for each sequence of options that a policy meets, recognised by identity."""

    __slots__ = ("_known", "_make")

    def __init__(self, make: Callable[[Sequence[Candidate]], ValueT]) -> None:
        self._make = make
        self._known: dict[int, tuple[Sequence[Candidate], ValueT]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Empty: what was worked out can be worked out again."""
        return type(self)(deepcopy(self._make, memo))

    def __len__(self) -> int:
        return len(self._known)

    def of(self, options: Sequence[Candidate]) -> ValueT:
        known = self._known.get(id(options))
        if known is None or known[0] is not options:  # another sequence may have got the address of a dead one
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[id(options)] = (options, self._make(options))
        return known[1]


def within_limits(options: Sequence[Candidate]) -> list[Candidate]:
    """The options that keep their quality floor and their limits on energy and price."""
    return [option for option in options if option.keeps_limits]


class StaticPolicy(Policy):
    """A policy that always takes the same candidate for the same options."""

    def __init__(self) -> None:
        self._decisions = PerCandidates(self._decision)

    def decide(self, options: Sequence[Candidate], deadline_s: float, view: FleetView, now: float) -> Decision:
        return self._decisions.of(options)

    def _decision(self, options: Sequence[Candidate]) -> Decision:
        candidate = self.choose(options)
        return REJECT if candidate is None else Decision("run", candidate, 0.0, self.name)

    @abstractmethod
    def choose(self, options: Sequence[Candidate]) -> Candidate | None: ...


def best_static(options: Sequence[Candidate]) -> Candidate | None:
    """The cheapest option that meets its own SLO and quality floor on an idle fleet; else the fastest one."""
    acceptable = [option for option in options if option.meets_slo and option.keeps_limits]
    if acceptable:
        return min(acceptable, key=lambda option: (option.usd_or_inf, option.latency_s))
    return min(options, key=lambda option: option.latency_s, default=None)
