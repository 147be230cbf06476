"""What a policy may choose from: the candidates of each class on rented pools, priced anew for other request sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hybridsd_sim.candidates import Candidate, CandidateSet, find_candidates, make_candidate, request_of, slowed
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, Plan, Request
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Pricing:
    """Prices plans for requests of a scenario. `slowdowns` multiply every second spent at the sites they name."""

    scenario: Scenario
    profiles: Profiles
    slowdowns: Mapping[str, float] = field(default_factory=dict)

    def priced(self, request: Request, plan: Plan) -> Candidate:
        """The candidate that a plan makes for a request."""
        return self.slowed(make_candidate(self.scenario, self.profiles, request, plan))

    def slowed(self, candidate: Candidate) -> Candidate:
        """The candidate at the sites' own pace: itself where nothing is slower."""
        return slowed(candidate, self.slowdowns) if self.slowdowns else candidate


def found_options(pricing: Pricing, known: CandidateSet | None) -> CandidateSet:
    """The candidates of every class, found anew unless they are `known`."""
    found = known or find_candidates(pricing.scenario, pricing.profiles)
    if not pricing.slowdowns:
        return found
    by_class = {name: tuple(pricing.slowed(option) for option in options) for name, options in found.by_class.items()}
    return CandidateSet(by_class, found.refusals)


def planned_options(pricing: Pricing, plan: Deployment | None) -> CandidateSet:
    """The plan's own candidates, one for each part of each class's mix. Raises `InputError` without a plan."""
    if plan is None:
        raise InputError(Problem("policy", "planned", "follows a plan, and none was given", "Pass a plan.yaml."))
    by_class = {
        name: tuple(pricing.priced(request_of(name, spec), part.plan) for part in plan.plans.get(name, ()))
        for name, spec in pricing.scenario.requests.items()
    }
    return CandidateSet(by_class, ())


class Offers:
    """The candidates a policy may choose from: each class's `own` on rented pools, priced anew for other sizes."""

    def __init__(self, pricing: Pricing, options: CandidateSet, replicas: Mapping[str, int]) -> None:
        self._pricing = pricing
        self._specs = list(pricing.scenario.requests.items())
        rented = {index for index, nodes in enumerate(replicas.values()) if nodes} | {-1}
        self.own = [tuple(o for o in options.by_class[name] if o.pool_index in rented) for name, _ in self._specs]
        self._variants: dict[tuple[int, tuple[int, int]], tuple[Candidate, ...]] = {}

    def variant(self, class_index: int, shape: tuple[int, int]) -> tuple[Candidate, ...]:
        """A class's candidates for requests of another `shape`: (steps, images)."""
        key = (class_index, shape)
        if key not in self._variants:
            self._variants[key] = self._priced(class_index, *shape)
        return self._variants[key]

    def _priced(self, class_index: int, steps: int, images: int) -> tuple[Candidate, ...]:
        name, spec = self._specs[class_index]
        request = replace(request_of(name, spec), num_inference_steps=steps, num_images=images)
        return tuple(self._pricing.priced(request, option.plan.rescaled(steps)) for option in self.own[class_index])
