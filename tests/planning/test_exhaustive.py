"""Every plan on every fleet, simulated, against the optimiser: `pytest -m slow tests/test_exhaustive.py -s`, minutes.

A combination is one plan for each class, out of all legal ones within its quality floor and limits, on one fleet. If a
combination under 99% of the dollars of the optimiser's plan holds every promise, the optimiser missed it; where the
optimiser says that nothing holds, any combination refutes it. The same rule judges both sides: the scenario's own
requests, replications added while a promise is undecided.

Nothing is left out by what a formula thinks. Left out is what dollars settle, and what is settled by another
combination: nodes of a pool that no plan uses serve nobody and only raise the rent; a plan whose pool has no nodes
serves nobody. Nor does a combination count whose requests hold GPUs, or edge devices, for longer than there are: its
queue grows without end, though a run may be over before anybody is late. The compiled recursion, which gives what SimPy
gives, goes through all numbers of replications at which the rule may stop; a combination that is late at each of them
does not hold. What is left is simulated by SimPy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import pytest

from hybridsd_sim import Profiles, Scenario
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.evaluation import MOST_REPLICATIONS, Evaluation, EvaluationJob, evaluate
from hybridsd_sim.planning.planner import Planner
from hybridsd_sim.planning.search import Found
from hybridsd_sim.pricing import Candidate, CandidateSet, find_candidates
from hybridsd_sim.simulation import Inputs, recursion_obstacle, screen
from hybridsd_sim.workload import mean_rate_per_s
from random_scenarios import LAYOUTS, random_scenario

pytestmark = pytest.mark.slow

SEEDS = range(60)
CHEAPER = 0.99
"""Dollars, as a share of the optimiser's, at which a combination refutes it."""
FEWER = 50
"""Combinations for each evaluation of the optimiser, at least, over all scenarios."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One plan a class on one fleet, and its dollars an hour."""

    plans: Mapping[str, Candidate]
    replicas: Mapping[str, int]
    usd_per_hour: float

    @property
    def deployment(self) -> Deployment:
        return Deployment.pure(dict(self.replicas), {name: option.plan for name, option in self.plans.items()})

    @property
    def text(self) -> str:
        plans = "; ".join(option.plan.label for option in self.plans.values())
        return f"{self.usd_per_hour:.4f} USD/h on {dict(self.replicas)}: {plans}"


@dataclass(frozen=True, slots=True)
class Trial:
    """The optimiser and the exhaustive search on one scenario."""

    seed: int
    found: Found | None
    evaluations: int
    combinations: int
    simulated: int
    refuting: list[Combination] = field(default_factory=list)

    @property
    def usd_per_hour(self) -> float:
        return self.found.sizing.usd_per_hour if self.found and self.found.feasible else math.inf

    @property
    def row(self) -> str:
        refuting = min(self.refuting, key=lambda one: one.usd_per_hour).text if self.refuting else ""
        numbers = f"{self.combinations:>12} {self.simulated:>10} {self.evaluations:>11}"
        return (
            f"{self.seed:>4}  {LAYOUTS[self.seed % len(LAYOUTS)]:<12} {self.usd_per_hour:>9.3f} {numbers}  {refuting}"
        )


@dataclass(slots=True)
class Counted:
    """Evaluates jobs and counts them, whatever their level."""

    count: int = 0

    def __call__(self, jobs: Sequence[EvaluationJob]) -> list[Evaluation]:
        self.count += len(jobs)
        return [evaluate(job) for job in jobs]


@dataclass(slots=True)
class Judge:
    """Whether combinations hold. `longer` are the requests of as many replications at which the rule may stop."""

    scenario: Scenario
    profiles: Profiles
    longer: list[Inputs]

    @classmethod
    def of(cls, scenario: Scenario, profiles: Profiles) -> Judge:
        stops = [1, *(2**k for k in range(1, MOST_REPLICATIONS) if 2**k <= MOST_REPLICATIONS)]
        longer = [scenario.with_overrides({"replications": stop * scenario.replications}) for stop in stops]
        return cls(scenario, profiles, [Inputs.of(each, profiles) for each in longer])

    def holds(self, deployment: Deployment) -> bool:
        """The rule that the optimiser goes by; the recursion says when it cannot come out well."""
        applies = not recursion_obstacle(self.scenario, deployment, self.longer[0])
        if applies and not any(self._in_time(deployment, inputs) for inputs in self.longer):
            return False
        return evaluate(EvaluationJob(self.scenario, self.profiles, deployment)).feasible

    def _in_time(self, deployment: Deployment, inputs: Inputs) -> bool:
        """Whether every class keeps its SLO."""
        attained = screen(inputs.scenario, self.profiles, deployment, inputs=inputs).attainment
        promised = {name: spec for name, spec in self.scenario.requests.items() if spec.slo_s is not None}
        return all(attained[name] >= spec.slo_percentile / 100.0 * (1.0 - 1e-9) for name, spec in promised.items())


def combinations(
    scenario: Scenario, found: CandidateSet, sizer: Sizer, *, below_usd_per_hour: float
) -> Iterator[Combination]:
    """Those under so many dollars an hour in which every rented node is used, and every plan served."""
    options = [[option for option in found.by_class[name] if option.keeps_limits] for name in scenario.requests]
    names = list(scenario.pools)
    for plans in product(*options):
        used = {option.pool_index for option in plans if option.pool_index >= 0}
        egress = sum(sizer.egress_usd_per_hour(option) for option in plans)
        counts = [
            range(max(1, pool.replicas_min), pool.replicas_max + 1) if index in used else [pool.replicas_min]
            for index, pool in enumerate(scenario.pools.values())
        ]
        for nodes in product(*counts):
            replicas = dict(zip(names, nodes, strict=True))
            usd = egress + sum(count * sizer.unit_rent[name] for name, count in replicas.items())
            if usd < below_usd_per_hour and steady(scenario, plans, replicas):
                yield Combination(dict(zip(scenario.requests, plans, strict=True)), replicas, usd)


def steady(scenario: Scenario, plans: Sequence[Candidate], replicas: Mapping[str, int]) -> bool:
    """Whether pools and edge fleets have the time that the requests ask for, at the mean rates."""
    free = [count * scenario.pools[name].availability for name, count in replicas.items()]
    idle = [float(fleet.replicas) for fleet in scenario.edge.values()]
    for option in plans:
        rate = mean_rate_per_s(scenario.requests[option.request_class].arrivals)
        if option.pool_index >= 0:
            gangs = list(scenario.pools.values())[option.pool_index].gpus_per_node // option.degree
            free[option.pool_index] -= rate * option.cloud_s / gangs
        if option.fleet_index >= 0:
            idle[option.fleet_index] -= rate * option.edge_s
    return min([*free, *idle]) >= 0.0


def size(scenario: Scenario, found: CandidateSet) -> int:
    """How many combinations there are, used or not, whatever they cost."""
    plans = math.prod(sum(option.keeps_limits for option in options) for options in found.by_class.values())
    return plans * math.prod(pool.replicas_max - pool.replicas_min + 1 for pool in scenario.pools.values())


def optimised(scenario: Scenario, profiles: Profiles, found: CandidateSet) -> tuple[Found | None, int]:
    """What the optimiser finds, and how many evaluations it took; None where no class has a plan in time."""
    counted = Counted()
    search = Planner(scenario, profiles, found, Sizer(scenario, profiles), counted).search("plan")
    condition = search.conditions[0]
    if condition.relaxed or any(not options for options in condition.plans.values()):
        return None, 0
    return search.run(), counted.count


def trial(seed: int, profiles: Profiles) -> Trial:
    """Both searches on the scenario of a seed."""
    scenario = random_scenario(seed)
    options = find_candidates(scenario, profiles)
    found, evaluations = optimised(scenario, profiles, options)
    done = Trial(seed, found, evaluations, size(scenario, options), 0)
    judge, sizer = Judge.of(scenario, profiles), Sizer(scenario, profiles)
    below = CHEAPER * done.usd_per_hour
    asked = list(combinations(scenario, options, sizer, below_usd_per_hour=below))
    refuting = [one for one in asked if judge.holds(one.deployment)]
    return Trial(seed, found, evaluations, done.combinations, len(asked), refuting)


@pytest.fixture(scope="module")
def trials(profiles: Profiles) -> list[Trial]:
    """All scenarios, with a table on the way (shown by `-s`)."""
    print("\nseed  layout           USD/h combinations  simulated evaluations  cheaper, and holds")  # noqa: T201
    done = []
    for seed in SEEDS:
        start = time.perf_counter()
        done.append(trial(seed, profiles))
        print(f"{done[-1].row}  ({time.perf_counter() - start:.1f} s)", flush=True)  # noqa: T201
    return done


def test_nothing_that_holds_is_cheaper_than_the_optimisers_plan(trials: list[Trial]) -> None:
    """Of all combinations under 99% of its dollars none holds; where it says that nothing holds, none does."""
    assert [one.row for one in trials if one.refuting] == []


def test_the_optimiser_tries_far_fewer_plans(trials: list[Trial]) -> None:
    """All evaluations of its searches, of every level, against all combinations: at most one in fifty."""
    assert sum(one.combinations for one in trials) >= FEWER * sum(one.evaluations for one in trials)


def test_the_scenarios_ask_for_something(trials: list[Trial]) -> None:
    """At least twenty have a plan that holds and rents nodes, and some have none."""
    held = [one.found for one in trials if one.found is not None and one.found.feasible]
    assert sum(any(found.replicas.values()) for found in held) >= 20
    assert len(held) < len(trials)
