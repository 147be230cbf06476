"""The plan that a scheduler follows, and the candidates that its policy decides among.

An `ActivePlan` is a deployment read, held against its scenario, priced, and joined with its policy. Its
`CandidateCache` has the candidates of any request: those of the plan's classes are priced when the plan is loaded, a
request of another size, step count or image count when it first comes (milliseconds, once), and the sizes met last are
kept. Candidates follow the corrections that `Scheduler.observe` has learnt; those that no worker could run are left
out.
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

MAX_SIZES = 512
"""Sizes of requests whose candidates are kept; of more, those asked for least recently are priced anew."""

MAX_PRICED = 128
"""Sizes of requests priced until the profiles forget what they worked out: some 0.4 MiB for each."""

Size = tuple[str, str, int, int, int, bool, int, str, float | None, int]
"""What the candidates of a request depend on, see `_size`: the key of the cache."""


class PlanWithScenario(Protocol):
    """An answer that brings its deployment and the scenario that it was found for, such as a `CapacityPlan`."""

    @property
    def deployment(self) -> Deployment: ...

    @property
    def scenario(self) -> Scenario: ...


AnyPlan = str | Path | Deployment | PlanWithScenario
"""What a plan can be loaded from: a plan.yaml or the folder of the run that wrote it, or an object."""


@dataclass(frozen=True, slots=True)
class CachedCandidates:
    """The candidates of requests of one size.

    `step_kinds` has all of them as the profiles predict them, with the kinds of their steps. `current` are those that
    the `widest` workers can run, corrected by `factors`, the cheapest first; `uncorrected` leads from these back to
    the former. `version` is that of the cache's corrections that these follow.
    """

    step_kinds: Mapping[Candidate, frozenset[StepKind]]
    version: int = -1
    widest: Sequence[int] = ()
    factors: Mapping[StepKind, float] = field(default_factory=dict)
    current: tuple[Candidate, ...] = ()
    uncorrected: Mapping[Candidate, Candidate] = field(default_factory=dict)

    def updated(self, factors: Mapping[StepKind, float], widest: Sequence[int], version: int) -> CachedCandidates:
        """The same under other corrections and on other workers.

        A candidate that nothing has changed for stays the very same object, and so does the tuple of all, so that
        policies recognise what they have worked out for it.
        """
        present = frozenset[StepKind]().union(*self.step_kinds.values())
        own = {kind: factors[kind] for kind in present if kind in factors}
        changed = {kind for kind in present if own.get(kind) != self.factors.get(kind)}
        if not changed and widest == self.widest:
            return replace(self, version=version)
        kept = {priced: now for now, priced in self.uncorrected.items() if not changed & self.step_kinds[priced]}
        runnable = [o for o in self.step_kinds if o.pool_index < 0 or o.degree <= widest[o.pool_index]]
        uncorrected = {}
        for option in runnable:
            current = kept.get(option)
            if current is None:
                # At the observed pace: every second at a site takes the factor of the steps done there.
                by_site = {stage.site.name: own.get(kind_of(option, stage), 1.0) for stage in option.plan.stages}
                current = slowed(option, by_site) if own else option
            uncorrected[current] = option
        cheapest_first = tuple(sorted(uncorrected, key=_cheapest) if own else uncorrected)
        return CachedCandidates(self.step_kinds, version, widest, own, cheapest_first, uncorrected)


def _cheapest(option: Candidate) -> tuple[float, float]:
    return option.usd_or_inf, option.latency_s


class CandidateCache:
    """The candidates of every request of a scenario, by class and size, under the corrections last given.

    Any number of threads may ask; only the table of sizes is locked, so that two may price the same size at once.
    """

    def __init__(self, pricing: Pricing, found: CandidateSet) -> None:
        self._pricing = pricing
        self.class_requests = {name: request_of(name, spec) for name, spec in pricing.scenario.requests.items()}
        """What a request of each class asks for unless it says otherwise."""
        self.factors: Mapping[StepKind, float] = {}
        self._version = 0
        self._found = found.by_class
        self._cached: OrderedDict[Size, CachedCandidates] = OrderedDict()
        self._priced_since = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._cached)

    @property
    def profiles(self) -> Profiles:
        return self._pricing.profiles

    def candidates(self, request: Request, widest: Sequence[int]) -> CachedCandidates:
        """The candidates of a request on pools whose largest worker has so many GPUs.

        None for a request that no plan of its class can serve: of another model, or of an illegal size.
        """
        size = _size(request, self.class_requests[request.request_class])
        version, factors = self._version, self.factors
        with self._lock:
            cached = self._cached.get(size)
            if cached is not None:
                self._cached.move_to_end(size)
        if cached is None:
            priced = self._price(size)
            kinds = {option: frozenset(kind_of(option, stage) for stage in option.plan.stages) for option in priced}
            cached = CachedCandidates(kinds)
        if cached.version != version or cached.widest != widest:
            cached = cached.updated(factors, widest, version)
            with self._lock:
                self._cached[size] = cached
                if len(self._cached) > MAX_SIZES:
                    self._cached.popitem(last=False)
        return cached

    def serves(self, request_class: str) -> bool:
        """Whether the class has candidates at all: it has none where the plan turns everybody away."""
        return bool(self._found[request_class])

    def is_current(self, request: Request, widest: Sequence[int]) -> bool:
        """Whether `candidates` has the answer without pricing anything."""
        cached = self._cached.get(_size(request, self.class_requests[request.request_class]))
        return cached is not None and cached.version == self._version and cached.widest == widest

    def correct(self, factors: Mapping[StepKind, float]) -> None:
        """From now on steps of these kinds take so many times the seconds that were predicted."""
        self.factors = factors
        self._version += 1  # last: who reads the version first never takes old factors for these

    def _price(self, size: Size) -> tuple[Candidate, ...]:
        """The class's own candidates, or what becomes of their plans for a request of another size."""
        own, found = self.class_requests[size[0]], self._found[size[0]]
        if size[:-1] == _size(own, own)[:-1]:
            priority = size[-1]  # another one changes no figure, but policies read it off the candidate
            return tuple(
                option
                if option.cost.request.priority == priority
                else replace(option, cost=replace(option.cost, request=replace(option.cost.request, priority=priority)))
                for option in found
            )
        _, model, height_px, width_px, steps, guided, images, sampler, floor, priority = size
        if model != own.model or not images >= 1:
            return ()
        request = replace(
            own, height_px=height_px, width_px=width_px, num_inference_steps=steps, num_images=images, sampler=sampler,
            guidance_scale=own.guidance_scale if guided == own.guided else 7.5 if guided else 1.0, quality_floor=floor,
            priority=priority,
        )  # fmt: skip
        self._priced_since += 1
        if self._priced_since >= MAX_PRICED:  # sizes that clients make up must not fill the memory
            self._priced_since = 0
            self.profiles.forget()
        priced = []
        for option in found:
            try:
                priced.append(self._pricing.priced(request, option.plan.rescaled(steps)))
            except (HybridSDError, ArithmeticError, TypeError, ValueError):  # what has no price cannot be served
                continue
        return tuple(sorted(priced, key=_cheapest))


def _size(request: Request, own: Request) -> Size:
    """What candidates depend on, and the priority, which policies read off them. Promises change neither."""
    floor = own.quality_floor if request.quality_floor is None else request.quality_floor
    return (
        request.request_class, request.model, request.height_px, request.width_px, request.num_inference_steps,
        request.guidance_scale > 1.0, request.num_images, request.sampler, floor,
        request.priority,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ActivePlan:
    """A plan and everything that deciding by it takes; replaced as a whole, so that a decision sees one plan only.

    `renew_policy` makes the policy again as it was at first. `widest` are the GPUs of a node of each pool that the
    plan rents, 0 of the others. `fallbacks` are the candidates that a class has without looking at anything.
    """

    scenario: Scenario
    deployment: Deployment
    policy: Policy
    renew_policy: Callable[[], Policy]
    cache: CandidateCache
    widest: tuple[int, ...]
    fallbacks: Mapping[str, Candidate | None]
    version: int = 1


def resolve_plan(plan: AnyPlan, scenario: Scenario | None) -> tuple[Deployment, Scenario]:
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


def prepare_plan(
    deployment: Deployment, scenario: Scenario, profiles: Profiles | None, policy: str | Policy | None
) -> ActivePlan:
    """Check a plan against its scenario and price its candidates.

    A policy given as an object is renewed by copying it as it then is. Raises `InputError` for a plan that does not
    fit, and for a `Planned` object.
    """
    if isinstance(policy, Planned):
        rule = "would follow the shares that it was made with, whatever the plan"
        raise InputError(Problem("policy", "a Planned object", rule, f'Pass its name, "{Planned.name}", or none.'))
    profiles = profiles or load_profiles(scenario.search.profiles)
    if problems := deployment_problems(deployment, scenario, profiles, complete=False):
        raise InputError(problems)
    check_number(sum(deployment.replicas.values()))

    def renew_policy() -> Policy:
        if isinstance(policy, Policy):
            return deepcopy(policy)
        return policy_for(policy or Planned.name, scenario, deployment)

    decider = policy if isinstance(policy, Policy) else renew_policy()
    pricing = Pricing(scenario, profiles)
    planned = price_deployment(pricing, deployment)
    found = planned if decider.name == Planned.name else resolve_candidates(pricing, None)
    fallbacks = {
        name: next(iter(planned.by_class[name]), best_static(found.by_class[name])) for name in scenario.requests
    }
    nodes = deployment.replicas
    widest = tuple(pool.gpus_per_node if nodes.get(name, 0) else 0 for name, pool in scenario.pools.items())
    return ActivePlan(scenario, deployment, decider, renew_policy, CandidateCache(pricing, found), widest, fallbacks)
