"""How sure a plan is, given the intervals of the step costs, and the cheapest plan that is sure enough.

Nobody has timed every plan on every device: a cost part has seconds and the ends of a 90% interval. What is unknown is
taken to be one factor for each site (pool or edge fleet) on every second spent there, independent of the other sites':
median 1, log-normal to either side, as wide as the interval of the seconds that the mix of plans spends there, all
parts of a site being long together. Transfers are drawn per request anyway and stay. Factors are drawn by Latin
hypercube (McKay, Beckman and Conover, Technometrics 21, 1979), each site from a random stream of its own, so that two
plans meet the same luck. A plan is as sure as the share of draws in which it keeps every promise, by the compiled
recursion; where that does not apply, by the formula, calibrated by one simulation.

For a plan that must hold with some probability, plans are searched for at prices of a higher quantile of every factor,
on a grid of quantiles: the lowest one whose plan turns out sure enough. That a higher one's plan is surer is a
heuristic, which is why the probability of each is found by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning.analytic import Mixes, Sizer
from hybridsd_sim.planning.capacity_plan import Confidence
from hybridsd_sim.planning.evaluation import EvaluatedPlan, Evaluation, EvaluationJob
from hybridsd_sim.planning.planner import Planner, quickest_level
from hybridsd_sim.planning.search import BETTER, Found, PlanSearch, to_deployment
from hybridsd_sim.pricing import Candidate, slowed
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulation import Inputs, recursion_obstacle, screen
from hybridsd_sim.workload import mean_rate_per_s, stream

NORMAL = NormalDist()

Z_90 = NORMAL.inv_cdf(0.95)
"""Standard deviations from the median to either end of a 90% interval."""

LEAST_FACTOR = 0.01
"""What the lower end of an interval is taken to be at least, as a share of the seconds."""

FIT = 0.001
"""How far the formula may stay under an attainment that it is calibrated by."""

CORRECTIONS = (0.25, 4.0)
"""Factors on a pool's traffic between which the formula is calibrated."""

SLACK = 1e-9
"""What rounding may cost a promise, as a share of its bound."""

DRAWS = 200
"""Draws of the factors."""

REQUESTS_MOST = 40_000_000
"""Requests that all draws together may carry: a few seconds' work."""

QUANTILES = tuple(NORMAL.cdf(0.2 * step) for step in range(16))
"""Quantiles of the factors at which plans are searched for: from 0.5 to 0.9987, evenly in standard deviations."""

SEARCHES = 8
"""Searches at most."""

Attained = Callable[[Mapping[str, float]], Mapping[str, float]]
"""The share of each class's requests in time, under factors on the seconds by site."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The unknown factor on the seconds of a site: median 1, log-normal below and above it with these deviations."""

    below: float = 0.0
    above: float = 0.0

    def at(self, probability: float) -> float:
        """A quantile of the factor."""
        z = NORMAL.inv_cdf(probability)
        return math.exp(z * (self.above if z > 0.0 else self.below))

    @classmethod
    def of_interval(cls, low_s: float, seconds: float, high_s: float) -> Spread:
        """The spread of seconds with the ends of their 90% interval; none where there are no seconds."""
        if seconds <= 0.0:
            return KNOWN
        low, high = min(max(low_s / seconds, LEAST_FACTOR), 1.0), max(high_s / seconds, 1.0)
        return cls(-math.log(low) / Z_90, math.log(high) / Z_90)


KNOWN = Spread()
"""The spread of seconds that are known for sure."""


def spreads(mixes: Mixes, sizer: Sizer) -> dict[str, Spread]:
    """By site the spread of the seconds that mixes spend there, weighted by rate and share."""
    sums: dict[str, list[float]] = {}
    for name, mix in mixes.items():
        for share, option in mix:
            for part in (part for part in option.cost.parts if part.tier != "network"):
                ends = sums.setdefault(part.where, [0.0, 0.0, 0.0])
                for index, seconds in enumerate((part.seconds.low, part.seconds.value, part.seconds.high)):
                    ends[index] += sizer.rates[name][0] * share * seconds
    return {site: Spread.of_interval(*ends) for site, ends in sums.items()}


def factors(scenario: Scenario, spread: Mapping[str, Spread], draws: int) -> list[dict[str, float]]:
    """Draws of every site's factor: each site meets each of `draws` equal shares of its distribution once."""
    columns = {}
    for site, one in spread.items():
        rng = stream(scenario.seed, 0, f"confidence/{site}")
        shares = (rng.permutation(draws) + rng.uniform(SLACK, 1.0 - SLACK, draws)) / draws
        columns[site] = [one.at(share) for share in shares.tolist()]
    return [{site: column[index] for site, column in columns.items()} for index in range(draws)]


def slowed_mixes(mixes: Mixes, slowdowns: Mapping[str, float]) -> Mixes:
    """The same mixes with every second at a site times its factor."""
    return {name: tuple((share, slowed(o, slowdowns)) for share, o in mix) for name, mix in mixes.items()}


def attainment_by_recursion(inputs: Inputs, deployment: Deployment) -> Attained:
    """The attainment in draws on the scenario's own requests, where the recursion applies."""
    scenario, profiles = inputs.scenario, inputs.profiles
    return lambda drawn: screen(scenario, profiles, deployment, slowdowns=drawn, inputs=inputs).attainment


def attainment_by_formula(
    sizer: Sizer, mixes: Mixes, replicas: Mapping[str, int], known: Evaluation, slowdowns: Mapping[str, float]
) -> Attained:
    """The attainment in draws by a copy of the formula, calibrated by how the plan fared under `slowdowns`.

    Nobody is in time where edge devices have more work than they can do.
    """
    mine = sizer.replace()
    nodes = {name: replicas.get(name, 0) for name in sizer.scenario.pools}
    slow = slowed_mixes(mixes, slowdowns)
    for index, pool in enumerate(sizer.scenario.pools):
        # The highest correction under which the formula gives none of the pool's classes less than they got; where the
        # two agree within `FIT` it stays: an attainment near 1 says little about the load.
        own = [cls for cls, mix in mixes.items() if any(option.pool_index == index for _, option in mix)]
        got = {cls: value for cls in own if not math.isnan(value := known.classes[cls]["slo_attainment"].value)}
        low, high = CORRECTIONS
        factor = mine.correction_factors.get(pool, 1.0)
        for halving in range(21):
            mine.correction_factors[pool] = factor
            attainment = mine.assess(slow, nodes).attainment
            gap = min((attainment[cls] - value for cls, value in got.items()), default=0.0)
            if halving == 0 and abs(gap) <= FIT:
                break
            low, high = (factor, high) if gap >= -FIT else (low, factor)
            factor = (low + high) / 2.0
        else:
            mine.correction_factors[pool] = low

    def attained(drawn: Mapping[str, float]) -> Mapping[str, float]:
        sizing = mine.assess(slowed_mixes(mixes, drawn), nodes)
        late = sum(max(0.0, mine.wanted(name) - got) for name, got in sizing.attainment.items())
        overloaded = sizing.missed > late + SLACK
        return dict.fromkeys(mixes, 0.0) if overloaded else sizing.attainment

    return attained


def keeps_limits(scenario: Scenario, name: str, mix: Sequence[tuple[float, Candidate]]) -> bool:
    """Whether a class's quality floor and its limits on an image's joules and dollars hold in the mean of a mix.

    An unknown figure keeps no limit.
    """
    promises, images = scenario.promises[name], scenario.requests[name].num_images
    floor = promises.quality_floor
    good = floor is None or _mean([(share, o.quality) for share, o in mix], -math.inf) >= floor * (1.0 - SLACK)
    limits = (
        (promises.edge_energy_j, [(share, o.cost.edge_energy_j) for share, o in mix]),
        (promises.usd, [(share, o.cost.usd) for share, o in mix]),
    )
    return good and all(
        most is None or _mean(figures, math.inf) <= most * images * (1.0 + SLACK) for most, figures in limits
    )


def _mean(figures: Sequence[tuple[float, float | None]], unknown: float) -> float:
    """The mean by shares; `unknown` where a figure is."""
    total = sum(share for share, _ in figures)
    if not total or any(figure is None for _, figure in figures):
        return unknown
    return sum(share * (figure or 0.0) for share, figure in figures) / total


@dataclass(frozen=True, slots=True)
class Confident:
    """The plan of a search at a confidence: as it fares at the medians, how sure it is, and every plan evaluated.

    None for both where no plan holds at the medians. `confidence.probability` is below `confidence.asked` where no plan
    is sure enough: then this is the surest one found.
    """

    found: Found | None
    confidence: Confidence | None
    evaluated: tuple[EvaluatedPlan, ...] = ()

    @property
    def sure(self) -> bool:
        """Whether the plan is as sure as was wanted."""
        return self.confidence is not None and self.confidence.probability >= (self.confidence.asked or 0.0)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A quantile's plan at its true prices, how sure it is, and the figure that is minimised."""

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
    no quantile has a plan that is sure enough, the surest plan comes back, and its confidence says how sure.
    """
    tester, evaluated = _Tester.of(planner, draws), list[EvaluatedPlan]()
    options = planner.condition().plans
    spread = spreads({name: tuple((1.0, o) for o in kept if o) for name, kept in options.items()}, planner.sizer)
    attempts: dict[int, _Attempt | None] = {}
    low, high = -1, len(QUANTILES)  # those whose plan is not sure enough; that are sure, or too slow for any plan
    at = next(index for index in range(len(QUANTILES)) if QUANTILES[index] >= min(asked, QUANTILES[-1]))
    while high - low > 1 and len(attempts) < SEARCHES:
        attempts[at] = one = _attempt(planner, tester, spread, QUANTILES[at], asked, evaluated)
        low, high = (at, high) if one is not None and one.confidence.probability < asked else (low, at)
        at = 0 if low < 0 and 0 not in attempts else (low + high) // 2
        below, above = attempts.get(low), attempts.get(high)
        if below and above and abs(below.objective - above.objective) <= BETTER * abs(above.objective):
            break  # nothing worth having lies between
    made = [one for _, one in sorted(attempts.items()) if one is not None]
    sure = sorted((one for one in made if one.confidence.probability >= asked), key=lambda one: one.objective)
    others = sorted(
        (one for one in made if one.confidence.probability < asked), key=lambda one: -one.confidence.probability
    )
    plain = attempts.get(0)
    for one in (*sure, *others):  # the best that also holds at the medians
        replicas = {name: one.found.replicas.get(name, 0) for name in planner.scenario.pools}
        job = EvaluationJob(planner.scenario, planner.profiles, to_deployment(one.mixes, replicas))
        sizing, evaluations = planner.sizer.assess(one.mixes, replicas), tuple(planner.evaluate([job]))
        found = Found(one.mixes, replicas, sizing, evaluations, plain.found.bound if plain else None)
        if found.feasible:
            return Confident(found, one.confidence, tuple(evaluated))
    return Confident(None, None, tuple(evaluated))


def _attempt(
    planner: Planner,
    tester: _Tester,
    spread: Mapping[str, Spread],
    quantile: float,
    asked: float,
    evaluated: list[EvaluatedPlan],
) -> _Attempt | None:
    """The plan at the prices of one quantile of every factor; None where none holds."""
    slowdowns = {site: one.at(quantile) for site, one in spread.items()}
    true = planner.found.by_class
    dear = {name: tuple(slowed(option, slowdowns) for option in options) for name, options in true.items()}
    original = {id(d): o for name, options in true.items() for d, o in zip(dear[name], options, strict=True)}
    slow = replace(planner, found=replace(planner.found, by_class=dear), sizer=planner.sizer.replace())
    condition = replace(slow.condition(), slowdowns=slowdowns)
    if condition.relaxed:
        return None
    name = f"plan at the {quantile:.1%} quantile of the costs"
    search = PlanSearch([condition], planner.evaluate, quickest_level, name, planner.progress)
    found = search.run()
    evaluated += search.evaluated
    if found is None or not found.feasible:
        return None
    mixes = {cls: tuple((share, original[id(option)]) for share, option in mix) for cls, mix in found.mixes.items()}
    sure = tester.confidence(mixes, found.replicas, asked, known=(found.evaluations[0], slowdowns))
    late = planner.scenario.search.minimise == "latency_p95_s"
    objective = slow.sizer.quantile(found.sizing, 0.95) if late else search.objective(found.sizing)
    return _Attempt(mixes, found, sure, objective)


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
        scenario, sizer = self.planner.scenario, self.planner.sizer
        spread = spreads(mixes, sizer)
        deployment = to_deployment(mixes, replicas)
        if self.inputs is None or recursion_obstacle(scenario, deployment, self.inputs):
            if known is None:
                known = self.planner.evaluate([EvaluationJob(scenario, self.planner.profiles, deployment)])[0], {}
            attained, level = (
                attainment_by_formula(sizer, mixes, replicas, *known),
                "formula, in line with one simulation",
            )
        else:
            count, most = len(self.inputs.replications), scenario.replications
            level = "screened" if count == most else f"compiled recursion on {count} of {most} replications"
            attained = attainment_by_recursion(self.inputs, deployment)
        certain = all(one == KNOWN for one in spread.values())
        # An SLO is promised to the whole class; to those let in, where as few as possible are turned away.
        as_few = scenario.search.minimise == "turned_away_per_s"
        promised = {name: sum(share for share, _ in mix) if as_few else 1.0 for name, mix in mixes.items()}
        least = {name: sizer.wanted(name) * share * (1.0 - SLACK) for name, share in promised.items()}
        held = []
        for drawn in factors(scenario, spread, 1 if certain else self.draws):
            got, slow = attained(drawn), slowed_mixes(mixes, drawn)
            held.append({n: got[n] >= least[n] and keeps_limits(scenario, n, mix) for n, mix in slow.items()})
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
