"""What a planning run works with: candidates worth trying, the formula, and the means to try a plan.

`Planner` hands out conditions for the formulation and searches over some kind of plans; the rooms that answer one
question each (frontier, margins, conflicts, robustness, confidence, sensitivity) start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hybridsd_sim.candidates import Candidate, CandidateSet, prune, thinned
from hybridsd_sim.evaluations import Level
from hybridsd_sim.milp import Condition
from hybridsd_sim.offers import Pricing, planned_options
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.search import Evaluate, Search
from hybridsd_sim.sizing import Mixes, Sizer

Keep = Callable[[Candidate], bool]
"""Whether a plan is of the kind that is looked for."""
MANY, FEW = 1000, 4
"""Plans in all beyond which each class keeps so many on each pool, and the best picture: the rest hardly differ."""
LEAST_BAD = 3
"""Plans kept of a class for which none is in time."""


def everything(_: Candidate) -> bool:
    """Every plan."""
    return True


@dataclass(slots=True)
class Planner:
    """Candidates, formula and trials of one scenario. `sizer` carries what simulations taught the formula."""

    scenario: Scenario
    profiles: Profiles
    found: CandidateSet
    sizer: Sizer
    evaluate: Evaluate
    progress: Callable[[str], None] = lambda _: None

    def condition(self, keep: Keep = everything, *, within_s: float | None = None) -> Condition:
        """The scenario's side of the formulation: per class the plans worth trying, the cheapest first.

        Those within the class's promises on an idle fleet that no other beats; for a class that has none, the least bad
        ones, and the class is forgiven.
        """
        plans: dict[str, list[Candidate]] = {}
        forgiven = set()
        for name, options in self.found.by_class.items():
            kept = [option for option in options if keep(option)]
            within = self.within_promises(kept)
            plans[name] = prune(within) if within else least_bad(kept)
            if not within:
                forgiven.add(name)
        if sum(map(len, plans.values())) > MANY:
            plans = {name: thinned(options, FEW) for name, options in plans.items()}
        return Condition(self.sizer, plans, within_s, frozenset(forgiven))

    def within_promises(self, options: Sequence[Candidate]) -> list[Candidate]:
        """The options that keep floors and limits and, with nobody else there, their SLO."""
        wanted = {name: self.sizer.wanted(name) for name in self.scenario.requests}
        return [
            option
            for option in options
            if option.meets_floor and self.sizer.idle_attainment(option) >= wanted[option.request_class]
        ]

    def priced(self, deployment: Deployment, scenario: Scenario | None = None) -> Mixes:
        """A deployment's mixes with the price of every plan, under the planner's scenario or another."""
        options = planned_options(Pricing(scenario or self.scenario, self.profiles), deployment).by_class
        return {
            name: tuple((part.share, option) for part, option in zip(mix, options[name], strict=True))
            for name, mix in deployment.plans.items()
        }

    def search(self, name: str, keep: Keep = everything) -> Search:
        """A search over one kind of plans."""
        return Search([self.condition(keep)], self.evaluate, quickest, name, self.progress)

    def under(self, scenario: Scenario, found: CandidateSet | None = None) -> Planner:
        """The same means for another scenario, with what was learnt so far."""
        learnt = self.sizer
        sizer = Sizer(scenario, self.profiles, load_factors=dict(learnt.load_factors), strain=dict(learnt.strain))
        return replace(self, scenario=scenario, found=found or self.found, sizer=sizer)


def quickest(scenario: Scenario, deployment: Deployment) -> Level:
    """The quickest level of fidelity that tells how a deployment fares."""
    from hybridsd_sim.screen import why_not

    return "simulate" if why_not(scenario, deployment) else "screen"


def least_bad(options: Sequence[Candidate]) -> list[Candidate]:
    """Where nothing holds: the fastest of those that keep floors and limits, else the best pictures, in time first."""
    floor = sorted((option for option in options if option.meets_floor), key=lambda o: o.latency_s)
    return floor[:LEAST_BAD] or sorted(options, key=lambda o: (-(o.quality or 0.0), not o.meets_slo))[:1]


def is_hybrid(option: Candidate) -> bool:
    """Whether both sides denoise."""
    return bool(option.cloud_steps and option.edge_steps)
