"""What a policy may choose from in a running service: candidates for any request, as fast as the fleet really is.

The plan's classes are priced when the plan is loaded. A request of another size, step count or picture count is priced
when it first comes, which takes milliseconds once; the sizes met last are kept. Candidates follow the corrections that
`observe` has learnt, and those that no worker could run are left out.

A plan as the scheduler uses it: read, held against its scenario, priced, and with the policy that decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

from hybridsd_sim.errors import HybridSDError, InputError, Problem
from hybridsd_sim.plan import Deployment, Request
from hybridsd_sim.pricing import (
    Candidate,
    CandidateSet,
    Pricing,
    deployment_problems,
    load_deployment,
    load_plan_scenario,
    price_deployment,
    request_of,
    resolve_candidates,
    slowed,
)
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling.feedback import StepKind, kind_of
from hybridsd_sim.scheduling.ledger import check_number
from hybridsd_sim.scheduling.policies import Planned, policy_for
from hybridsd_sim.scheduling.policy import Policy, best_static

MOST_SIZES = 512
"""Kinds of requests whose candidates are kept; of more, those asked for least recently are priced anew."""

MOST_PRICED = 128
"""Kinds of requests priced until the profiles forget what they worked out: some 0.4 MiB for each size of its own."""

Options = tuple[Candidate, ...]

Size = tuple[str, str, int, int, int, bool, int, str, float | None, int]


@dataclass(frozen=True, slots=True)
class Listed:
    """The candidates of requests of one size, and what made them so.

    `kinds` are all of them as the profiles have them, with the kinds of their steps. `now` are those that the widest
    workers can run, at the `paces` observed, the cheapest first; `origin` leads from these back to the former.
    """

    kinds: Mapping[Candidate, frozenset[StepKind]]
    version: int = -1
    widest: Sequence[int] = ()
    paces: Mapping[StepKind, float] = field(default_factory=dict)
    now: Options = ()
    origin: Mapping[Candidate, Candidate] = field(default_factory=dict)

    def under(self, factors: Mapping[StepKind, float], widest: Sequence[int], version: int) -> Listed:
        """The same at other factors and on other workers; those stay the very same that nothing has changed for."""
        mine = frozenset[StepKind]().union(*self.kinds.values())
        paces = {kind: factors[kind] for kind in mine if kind in factors}
        changed = {kind for kind in mine if paces.get(kind) != self.paces.get(kind)}
        if not changed and widest == self.widest:
            return replace(self, version=version)
        same = {priced: now for now, priced in self.origin.items() if not changed & self.kinds[priced]}
        able = [option for option in self.kinds if option.pool_index < 0 or option.degree <= widest[option.pool_index]]
        origin = {same.get(option) or _corrected(option, paces): option for option in able}
        now = tuple(sorted(origin, key=_cheapest) if paces else origin)
        return Listed(self.kinds, version, widest, paces, now, origin)


def _cheapest(option: Candidate) -> tuple[float, float]:
    return option.usd_or_inf, option.latency_s


class Menu:
    """The candidates of every request of a scenario, by class and size, at the `factors` last told."""

    def __init__(self, pricing: Pricing, found: CandidateSet) -> None:
        self._pricing = pricing
        self.own = {name: request_of(name, spec) for name, spec in pricing.scenario.requests.items()}
        self.factors: Mapping[StepKind, float] = {}
        self._version = 0
        self._found = found.by_class
        self._listed: OrderedDict[Size, Listed] = OrderedDict()
        self._priced_since = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def profiles(self) -> Profiles:
        return self._pricing.profiles

    def options(self, request: Request, widest: Sequence[int]) -> Listed:
        """The candidates of a request on pools whose largest worker has so many GPUs.

        None of them for a request that no plan of its class can serve: of another model, or of an illegal size.
        """
        size = _size(request, self.own[request.request_class])
        version, factors = self._version, self.factors
        with self._lock:
            listed = self._listed.get(size)
            if listed is not None:
                self._listed.move_to_end(size)
        if listed is None:
            listed = Listed({option: _kinds(option) for option in self._priced(size)})
        if listed.version != version or listed.widest != widest:
            listed = listed.under(factors, widest, version)
            self._keep(size, listed)
        return listed

    def serves(self, request_class: str) -> bool:
        """Whether the class has candidates at all: it has none where the plan turns everybody away."""
        return bool(self._found[request_class])

    def at_hand(self, request: Request, widest: Sequence[int]) -> bool:
        """Whether `options` has the answer without pricing anything."""
        listed = self._listed.get(_size(request, self.own[request.request_class]))
        return listed is not None and listed.version == self._version and listed.widest == widest

    def follow(self, factors: Mapping[StepKind, float]) -> None:
        """From now on steps of these kinds take so many times the seconds that were predicted."""
        self.factors = factors
        self._version += 1  # last: who reads the version first never takes old factors for these

    def _keep(self, size: Size, listed: Listed) -> None:
        with self._lock:
            self._listed[size] = listed
            if len(self._listed) > MOST_SIZES:
                self._listed.popitem(last=False)

    def _priced(self, size: Size) -> Options:
        """The class's own candidates, or what becomes of their plans for a request of another size."""
        own, found = self.own[size[0]], self._found[size[0]]
        if size[:-1] == _size(own, own)[:-1]:
            return tuple(_of_priority(option, size[-1]) for option in found)
        _, model, height_px, width_px, steps, guided, images, sampler, floor, priority = size
        if model != own.model or not images >= 1:
            return ()
        request = replace(
            own, height_px=height_px, width_px=width_px, num_inference_steps=steps, num_images=images, sampler=sampler,
            guidance_scale=own.guidance_scale if guided == own.guided else 7.5 if guided else 1.0, quality_floor=floor,
            priority=priority,
        )  # fmt: skip
        self._make_room()
        priced = [candidate for option in found if (candidate := self._variant(request, option)) is not None]
        return tuple(sorted(priced, key=_cheapest))

    def _make_room(self) -> None:
        self._priced_since += 1
        if self._priced_since >= MOST_PRICED:
            self._priced_since = 0
            self.profiles.memory.forget()

    def _variant(self, request: Request, option: Candidate) -> Candidate | None:
        try:
            return self._pricing.priced(request, option.plan.rescaled(request.num_inference_steps))
        except (HybridSDError, ArithmeticError, TypeError, ValueError):  # what has no price cannot be served
            return None


def _size(request: Request, own: Request) -> Size:
    """What candidates depend on, and the priority, which policies read off them. Promises change neither."""
    floor = own.quality_floor if request.quality_floor is None else request.quality_floor
    return (
        request.request_class, request.model, request.height_px, request.width_px, request.num_inference_steps,
        request.guidance_scale > 1.0, request.num_images, request.sampler, floor,
        request.priority,
    )  # fmt: skip


def _of_priority(candidate: Candidate, priority: int) -> Candidate:
    """The candidate for a request of another priority, which changes no figure; itself where it has that one."""
    request = candidate.cost.request
    if request.priority == priority:
        return candidate
    return replace(candidate, cost=replace(candidate.cost, request=replace(request, priority=priority)))


def _kinds(candidate: Candidate) -> frozenset[StepKind]:
    return frozenset(kind_of(candidate, stage) for stage in candidate.plan.stages)


def _corrected(candidate: Candidate, factors: Mapping[StepKind, float]) -> Candidate:
    """The candidate at the pace that was observed: a site's factor is that of the steps done there."""
    if not factors:
        return candidate
    paces = {stage.site.name: factors.get(kind_of(candidate, stage), 1.0) for stage in candidate.plan.stages}
    return slowed(candidate, paces)


class PlanWithScenario(Protocol):
    """An answer that brings its deployment and the scenario that it was found for, such as a `CapacityPlan`."""

    @property
    def deployment(self) -> Deployment: ...

    @property
    def scenario(self) -> Scenario: ...


AnyPlan = str | Path | Deployment | PlanWithScenario


@dataclass(frozen=True, slots=True)
class PlanInUse:
    """Replaced as a whole, so that a decision sees one plan and one only.

    `anew` makes the policy again as it was at first, `widest` are the GPUs of a node of each pool that the plan rents,
    0 of the others, and `fallbacks` are the candidates that a class has without looking at anything.
    """

    scenario: Scenario
    deployment: Deployment
    policy: Policy
    anew: Callable[[], Policy]
    menu: Menu
    widest: tuple[int, ...]
    fallbacks: Mapping[str, Candidate | None]
    version: int = 1


def resolved(plan: AnyPlan, scenario: Scenario | None) -> tuple[Deployment, Scenario]:
    """The plan, and the scenario that it was made for. Raises `InputError` where either cannot be had."""
    if isinstance(plan, Deployment):
        if scenario is None:
            rule = "says nothing of request classes, pools and fleets"
            raise InputError(Problem("scenario", "not given", f"a Deployment {rule}", "Pass scenario=."))
        return plan, scenario
    if not isinstance(plan, str | Path):
        return plan.deployment, scenario or plan.scenario
    path = Path(plan)
    file = path / "plan.yaml" if path.is_dir() else path
    return load_deployment(file), scenario or load_plan_scenario(file)


def prepared(
    deployment: Deployment, scenario: Scenario, profiles: Profiles | None, policy: str | Policy | None
) -> PlanInUse:
    """A plan ready to decide by: checked, its candidates priced. Raises `InputError` for one that does not fit."""
    if isinstance(policy, Planned):
        rule = "would follow the shares that it was made with, whatever the plan"
        raise InputError(Problem("policy", "a Planned object", rule, f'Pass its name, "{Planned.name}", or none.'))
    known = profiles or load_profiles(scenario.search.profiles)
    if problems := deployment_problems(deployment, scenario, known, complete=False):
        raise InputError(problems)
    check_number(sum(deployment.replicas.values()))
    anew = _maker(policy, scenario, deployment)
    decider = policy if isinstance(policy, Policy) else anew()
    pricing = Pricing(scenario, known)
    own = price_deployment(pricing, deployment)
    found = own if decider.name == Planned.name else resolve_candidates(pricing, None)
    fallbacks = {name: next(iter(own.by_class[name]), best_static(found.by_class[name])) for name in scenario.requests}
    nodes = deployment.replicas
    widest = tuple(pool.gpus_per_node if nodes.get(name, 0) else 0 for name, pool in scenario.pools.items())
    return PlanInUse(scenario, deployment, decider, anew, Menu(pricing, found), widest, fallbacks)


def _maker(policy: str | Policy | None, scenario: Scenario, deployment: Deployment) -> Callable[[], Policy]:
    """Makes the policy anew; one that was given as an object is copied as it is then."""
    if isinstance(policy, Policy):
        return lambda: deepcopy(policy)
    return lambda: policy_for(policy or Planned.name, scenario, deployment)
