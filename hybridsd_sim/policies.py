"""Who decides: the policies, by the name that a scenario or a command gives them.

To add a policy, write one class with `decide` and decorate it with `@register`. Those that answer to queues, deadlines
and budgets have a room of their own, `adaptive`, and are entered below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridsd_sim.adaptive import Budgeted, EdfReject, SwitchByQueue
from hybridsd_sim.candidates import Candidate
from hybridsd_sim.errors import InputError, unknown_name
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.policy import (
    CERTAIN_LATE,
    NO_CANDIDATE,
    OVER_BUDGET,
    POLICIES,
    REASONS,
    REJECT,
    TURN_AWAY,
    TURNED_AWAY,
    Decision,
    Fixed,
    FleetView,
    PerOptions,
    Policy,
    PoolView,
    above_floor,
    best_static,
    register,
)
from hybridsd_sim.scenario import Scenario

__all__ = [
    "ALL_SHARES", "CERTAIN_LATE", "NO_CANDIDATE", "OVER_BUDGET", "POLICIES", "REASONS", "TURNED_AWAY", "Budgeted",
    "CloudOnly", "CostAware", "Decision", "EdfReject", "EdgeOnly", "FleetView", "LeastWork", "Planned", "Policy",
    "PoolView", "StaticSwitch", "SwitchByQueue", "make_policy", "policy_for", "register",
]  # fmt: skip

ALL_SHARES = 1.0 - 1e-9
"""A sum of shares above this is the whole class."""


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
class CloudOnly(Fixed):
    """Every step in the cloud, on the cheapest plan that meets the SLO on an idle pool."""

    name = "cloud_only"
    summary = "every step in the cloud"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.edge_steps == 0])


@register
class EdgeOnly(Fixed):
    """Every step on the user's device."""

    name = "edge_only"
    summary = "every step at the edge"

    def choose(self, options: Sequence[Candidate]) -> Candidate | None:
        return best_static([option for option in options if option.cloud_steps == 0])


@register
class StaticSwitch(Fixed):
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
        self._per_pool = PerOptions(self._best_of_each_pool)

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
        self._keeping: PerOptions[list[Candidate]] = PerOptions(above_floor)

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
        self._matched: PerOptions[list[Decision]] = PerOptions(self._match)

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


for adaptive in (EdfReject, SwitchByQueue, Budgeted):  # after the simple ones, so that lists of names begin with these
    register(adaptive)
