"""How sure a plan is, given the intervals of the step costs, and the cheapest plan that is sure enough.

The factors of `uncertainty` are drawn many times; a plan is as sure as the share of draws in which it keeps every
promise. Draws are tried by the compiled recursion; where that does not apply, by the formula, brought into line with
one simulation.

For a plan that holds with a probability that is asked, plans are searched for at prices of a higher quantile of every
factor, on a ladder of quantiles: the lowest rung whose plan turns out sure enough. That the plan of a higher rung is
surer is a heuristic, which is why the probability of each is found by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hybridsd_sim.candidates import Candidate, CandidateSet, slowed
from hybridsd_sim.capacity import Confidence, Evaluated
from hybridsd_sim.evaluations import Evaluation, Job
from hybridsd_sim.planner import Planner, quickest
from hybridsd_sim.screen import Inputs, why_not
from hybridsd_sim.search import BETTER, Found, Search, deployment_of
from hybridsd_sim.sizing import Mixes
from hybridsd_sim.uncertainty import (
    KNOWN,
    NORMAL,
    SLACK,
    Attained,
    Spread,
    by_formula,
    by_recursion,
    copied,
    factors,
    limits_kept,
    slowed_mixes,
    spreads,
)
from hybridsd_sim.workload import mean_rate_per_s

DRAWS = 200
"""Draws of the factors."""
REQUESTS_MOST = 40_000_000
"""Requests that all draws together may carry: a few seconds' work."""
RUNGS = tuple(NORMAL.cdf(0.2 * step) for step in range(16))
"""Quantiles of the factors at which plans are searched for: from 0.5 to 0.9987, evenly in standard deviations."""
SEARCHES = 8
"""Searches at most."""


@dataclass(frozen=True, slots=True)
class Confident:
    """The plan of a search at a confidence: as it fares at the medians, how sure it is, and every plan tried.

    None for both where no plan holds at the medians. `confidence.probability` is below `confidence.asked` where no plan
    is sure enough: then this is the surest one found.
    """

    found: Found | None
    confidence: Confidence | None
    tried: tuple[Evaluated, ...] = ()

    @property
    def sure(self) -> bool:
        return self.confidence is not None and self.confidence.probability >= (self.confidence.asked or 0.0)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A rung's plan at its true prices, how sure it is, and the figure that is minimised."""

    mixes: Mixes
    found: Found
    confidence: Confidence
    objective: float


def confidence(
    planner: Planner,
    mixes: Mixes,
    replicas: Mapping[str, int],
    asked: float | None,
    *,
    draws: int = DRAWS,
    known: Evaluation | None = None,
) -> Confidence:
    """The probability that mixes on so many nodes keep every promise, and by class that they keep its own.

    `known` is the simulated evaluation of the same plan, where there is one; it saves a simulation where the recursion
    does not apply.
    """
    tester = _Tester.of(planner, draws)
    return tester.confidence(mixes, replicas, asked, known=None if known is None else (known, {}))


def confident_search(planner: Planner, asked: float, *, draws: int = DRAWS) -> Confident:
    """The best plan that holds with probability `asked`, or more: searched at slower prices, confirmed at the medians.

    Slower prices are those of one quantile of every site's factor, with the spread over all plans worth trying. Where
    no rung has a plan that is sure enough, the surest plan comes back, and its confidence says how sure.
    """
    tester, tried = _Tester.of(planner, draws), list[Evaluated]()
    options = planner.condition().plans
    spread = spreads({name: tuple((1.0, o) for o in kept if o) for name, kept in options.items()}, planner.sizer)
    attempts: dict[int, _Attempt | None] = {}
    low, high = -1, len(RUNGS)  # rungs whose plan is not sure enough; that are sure, or too slow for any plan
    rung = next(index for index in range(len(RUNGS)) if RUNGS[index] >= min(asked, RUNGS[-1]))
    while high - low > 1 and len(attempts) < SEARCHES and not _alike(attempts.get(low), attempts.get(high)):
        attempts[rung] = one = _attempt(planner, tester, spread, RUNGS[rung], asked, tried)
        low, high = (rung, high) if one is not None and one.confidence.probability < asked else (low, rung)
        rung = 0 if low < 0 and 0 not in attempts else (low + high) // 2
    return _chosen(planner, attempts, asked, tried)


def _alike(one: _Attempt | None, other: _Attempt | None) -> bool:
    """Whether nothing worth having lies between two plans."""
    if one is None or other is None:
        return False
    return abs(one.objective - other.objective) <= BETTER * abs(other.objective)


def _attempt(
    planner: Planner,
    tester: _Tester,
    spread: Mapping[str, Spread],
    quantile: float,
    asked: float,
    tried: list[Evaluated],
) -> _Attempt | None:
    """The plan at the prices of one quantile of every factor; None where none holds."""
    slowdowns = {site: one.at(quantile) for site, one in spread.items()}
    slow, original = _slowed(planner, slowdowns)
    condition = replace(slow.condition(), slowdowns=slowdowns)
    if condition.forgiven:
        return None
    name = f"plan at the {quantile:.1%} quantile of the costs"
    search = Search([condition], planner.evaluate, quickest, name, planner.progress)
    found = search.run()
    tried += search.tried
    if found is None or not found.feasible:
        return None
    mixes = {cls: tuple((share, original[id(option)]) for share, option in mix) for cls, mix in found.mixes.items()}
    sure = tester.confidence(mixes, found.replicas, asked, known=(found.evaluations[0], slowdowns))
    late = planner.scenario.search.minimise == "latency_p95_s"
    objective = slow.sizer.quantile(found.sizing, 0.95) if late else search.objective(found.sizing)
    return _Attempt(mixes, found, sure, objective)


def _slowed(planner: Planner, slowdowns: Mapping[str, float]) -> tuple[Planner, dict[int, Candidate]]:
    """The same means at slower prices, with a formula of their own; and by `id` of the slow plans the true ones."""
    found = planner.found
    dearer = {name: tuple(slowed(o, slowdowns) for o in options) for name, options in found.by_class.items()}
    original = {
        id(dear): option
        for name, options in found.by_class.items()
        for dear, option in zip(dearer[name], options, strict=True)
    }
    return replace(planner, found=CandidateSet(dearer, found.refusals), sizer=copied(planner.sizer)), original


def _chosen(
    planner: Planner, attempts: Mapping[int, _Attempt | None], asked: float, tried: Sequence[Evaluated]
) -> Confident:
    """The best plan that is sure enough and holds at the medians; without one, the surest."""
    made = [one for _, one in sorted(attempts.items()) if one is not None]
    sure = sorted((one for one in made if one.confidence.probability >= asked), key=lambda one: one.objective)
    others = sorted((one for one in made if one.confidence.probability < asked), key=_unsure)
    plain = attempts.get(0)
    answer = Confident(None, None, tuple(tried))
    for one in (*sure, *others):
        found = replace(_at_medians(planner, one), bound=plain.found.bound if plain else None)
        if found.feasible:
            return Confident(found, one.confidence, tuple(tried))
    return answer


def _unsure(one: _Attempt) -> float:
    return -one.confidence.probability


def _at_medians(planner: Planner, one: _Attempt) -> Found:
    """The plan as it fares when every second lasts what its price says."""
    replicas = {name: one.found.replicas.get(name, 0) for name in planner.scenario.pools}
    job = Job(planner.scenario, planner.profiles, deployment_of(one.mixes, replicas))
    sizing = planner.sizer.assess(one.mixes, replicas)
    return Found(one.mixes, replicas, sizing, tuple(planner.evaluate([job])), None)


@dataclass(frozen=True, slots=True)
class _Tester:
    """Tries plans under draws of the factors. `inputs` are the requests that they meet; None if they are too many."""

    planner: Planner
    draws: int
    inputs: Inputs | None

    @classmethod
    def of(cls, planner: Planner, draws: int) -> _Tester:
        """Draw as many replications as all draws together may carry; none at all where one is too many."""
        scenario = planner.scenario
        rate = sum(mean_rate_per_s(spec.arrivals) for spec in scenario.requests.values())
        count = min(scenario.replications, int(REQUESTS_MOST / (draws * rate * scenario.horizon_s)))
        inputs = Inputs.of(scenario, planner.profiles, replications=range(count)) if count else None
        return cls(planner, draws, inputs)

    def confidence(
        self,
        mixes: Mixes,
        replicas: Mapping[str, int],
        asked: float | None,
        *,
        known: tuple[Evaluation, Mapping[str, float]] | None = None,
    ) -> Confidence:
        """How sure a plan is; `known` is how it fared under factors by site, where that is known."""
        sizer = self.planner.sizer
        spread = spreads(mixes, sizer)
        attained, level = self._means(mixes, replicas, known)
        certain = all(one == KNOWN for one in spread.values())
        drawn = factors(self.planner.scenario, spread, 1 if certain else self.draws)
        held = [self._held(slowed_mixes(mixes, one), attained(one)) for one in drawn]
        rent = sum(count * sizer.unit_rent[name] for name, count in replicas.items() if count)
        limit = sizer.rent_limit_usd_per_hour
        affordable = limit is None or rent <= limit * (1.0 + SLACK)
        return Confidence(
            probability=sum(affordable and all(one.values()) for one in held) / len(held),
            asked=asked,
            draws=self.draws,
            by_class={name: sum(one[name] for one in held) / len(held) for name in mixes},
            level=level,
        )

    def _held(self, mixes: Mixes, attained: Mapping[str, float]) -> dict[str, bool]:
        """Which classes' promises hold in a draw, at its prices."""
        scenario, wanted = self.planner.scenario, self.planner.sizer.wanted
        return {
            name: attained[name] >= wanted(name) * self._let_in(mix) * (1.0 - SLACK)
            and limits_kept(scenario, name, mix)
            for name, mix in mixes.items()
        }

    def _let_in(self, mix: Sequence[tuple[float, Candidate]]) -> float:
        """The share of a class to which its SLO is promised: those let in, where as few as possible are turned away."""
        as_few = self.planner.scenario.search.minimise == "turned_away_per_s"
        return sum(share for share, _ in mix) if as_few else 1.0

    def _means(
        self, mixes: Mixes, replicas: Mapping[str, int], known: tuple[Evaluation, Mapping[str, float]] | None
    ) -> tuple[Attained, str]:
        """How draws are tried, and what that is called."""
        planner, inputs = self.planner, self.inputs
        deployment = deployment_of(mixes, replicas)
        if inputs is None or why_not(planner.scenario, deployment, inputs):
            if known is None:
                known = planner.evaluate([Job(planner.scenario, planner.profiles, deployment)])[0], {}
            return by_formula(planner.sizer, mixes, replicas, *known), "formula, in line with one simulation"
        count, most = len(inputs.replications), planner.scenario.replications
        level = "screened" if count == most else f"compiled recursion on {count} of {most} replications"
        return by_recursion(inputs, deployment), level
