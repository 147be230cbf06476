"""What is unknown about the seconds of plans: factors by site, how they are drawn, and how a plan fares under a draw.

Nobody has timed every plan on every device: a cost part has seconds and the ends of a 90% interval. What is unknown is
taken to be one factor for each site (pool or edge fleet) on every second spent there, independent of the other sites'.
Its median is 1, the price itself; to either side it is log-normal, as wide as the interval of the seconds that the mix
of plans spends there, all parts of a site being long together. Transfers are drawn per request anyway and stay.

Factors are drawn by Latin hypercube, each site from a random stream of its own, so that two plans meet the same luck.
A draw is tried on the scenario's own requests by the compiled recursion, or by the formula after it was brought into
line with what is known of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from hybridsd_sim.candidates import Candidate, slowed
from hybridsd_sim.evaluations import Evaluation
from hybridsd_sim.parts import Part
from hybridsd_sim.plan import Deployment
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.screen import Inputs, screen
from hybridsd_sim.sizing import Mixes, Sizer
from hybridsd_sim.workload import stream

NORMAL = NormalDist()
Z_90 = NORMAL.inv_cdf(0.95)
"""Standard deviations from the median to either end of a 90% interval."""
LEAST_FACTOR = 0.01
"""What the lower end of an interval is taken to be at least, as a share of the seconds."""
FIT = 0.001
"""How far the formula may stay under an attainment that it is brought into line with."""
STRAINS = (0.25, 4.0)
"""Factors on a pool's traffic between which the formula is brought into line."""
SLACK = 1e-9
"""What rounding may cost a promise, as a share of its bound."""

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


KNOWN = Spread()
"""The spread of seconds that are known for sure."""


def spreads(mixes: Mixes, sizer: Sizer) -> dict[str, Spread]:
    """By site the spread of the seconds that mixes spend there, weighted by rate and share."""
    sums: dict[str, list[float]] = {}
    for name, mix in mixes.items():
        for share, option in mix:
            for part in (part for part in option.cost.parts if part.tier != "network"):
                _add(sums.setdefault(part.where, [0.0, 0.0, 0.0]), part, sizer.rates[name][0] * share)
    return {site: _spread(*ends) for site, ends in sums.items()}


def _add(sums: list[float], part: Part, weight: float) -> None:
    for index, seconds in enumerate((part.low_s, part.seconds, part.high_s)):
        sums[index] += weight * seconds


def _spread(low_s: float, seconds: float, high_s: float) -> Spread:
    if seconds <= 0.0:
        return KNOWN
    low, high = min(max(low_s / seconds, LEAST_FACTOR), 1.0), max(high_s / seconds, 1.0)
    return Spread(-math.log(low) / Z_90, math.log(high) / Z_90)


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


def by_recursion(inputs: Inputs, deployment: Deployment) -> Attained:
    """Draws tried on the scenario's own requests, where the recursion applies."""
    scenario, profiles = inputs.scenario, inputs.profiles
    return lambda drawn: screen(scenario, profiles, deployment, slowdowns=drawn, inputs=inputs).attainment


def by_formula(
    sizer: Sizer, mixes: Mixes, replicas: Mapping[str, int], known: Evaluation, slowdowns: Mapping[str, float]
) -> Attained:
    """Draws tried by a copy of the formula, brought into line with how the plan fared under `slowdowns`."""
    mine = copied(sizer)
    nodes = {name: replicas.get(name, 0) for name in sizer.scenario.pools}
    for index, pool in enumerate(sizer.scenario.pools):
        _bring_into_line(mine, slowed_mixes(mixes, slowdowns), nodes, known, (index, pool))
    return lambda drawn: _attained(mine, slowed_mixes(mixes, drawn), nodes)


def copied(sizer: Sizer) -> Sizer:
    """A formula of its own, with what was learnt so far."""
    return Sizer(
        sizer.scenario,
        sizer.profiles,
        rates=dict(sizer.rates),
        load_factors=dict(sizer.load_factors),
        strain=dict(sizer.strain),
    )


def _bring_into_line(
    sizer: Sizer, mixes: Mixes, nodes: Mapping[str, int], known: Evaluation, pool: tuple[int, str]
) -> None:
    """Set a pool's strain to the highest under which the formula gives none of its classes less than they got.

    Where the two agree within `FIT` it stays: an attainment near 1 says little about the load.
    """
    index, name = pool
    own = [cls for cls, mix in mixes.items() if any(option.pool_index == index for _, option in mix)]
    got = {cls: value for cls in own if not math.isnan(value := known.classes[cls]["slo_attainment"].value)}
    low, high = STRAINS
    middle = sizer.strain.get(name, 1.0)
    for first in (True, *(False for _ in range(20))):
        sizer.strain[name] = middle
        attained = sizer.assess(mixes, nodes).attainment
        gap = min((attained[cls] - value for cls, value in got.items()), default=0.0)
        if first and abs(gap) <= FIT:
            return
        low, high = (middle, high) if gap >= -FIT else (low, middle)
        middle = (low + high) / 2.0
    sizer.strain[name] = low


def _attained(sizer: Sizer, mixes: Mixes, nodes: Mapping[str, int]) -> Mapping[str, float]:
    """What the formula gives; nothing to anybody where edge devices are asked for more than they can do."""
    sizing = sizer.assess(mixes, nodes)
    late = sum(max(0.0, sizer.wanted(name) - got) for name, got in sizing.attainment.items())
    overloaded = sizing.missed > late + SLACK
    return dict.fromkeys(mixes, 0.0) if overloaded else sizing.attainment


def limits_kept(scenario: Scenario, name: str, mix: Sequence[tuple[float, Candidate]]) -> bool:
    """Whether a class's quality floor and its limits on an image's joules and dollars hold in the mean of a mix.

    An unknown figure keeps no limit.
    """
    floor = scenario.requests[name].quality_floor
    good = floor is None or _mean([(share, o.quality) for share, o in mix], -math.inf) >= floor * (1.0 - SLACK)
    return good and all(
        _mean(figures, math.inf) <= most * (1.0 + SLACK) for most, figures in _limits(scenario, name, mix)
    )


def _limits(
    scenario: Scenario, name: str, mix: Sequence[tuple[float, Candidate]]
) -> Iterator[tuple[float, list[tuple[float, float | None]]]]:
    """Every limit on a class's images, in joules or dollars of a request, and the figures of its plans."""
    spec = scenario.requests[name]
    for most in (spec.edge_energy_j, scenario.budget.edge_energy_j_per_image):
        if most is not None:
            yield most * spec.num_images, [(share, o.cost.edge_energy_j) for share, o in mix]
    if spec.usd_per_image is not None:
        yield spec.usd_per_image * spec.num_images, [(share, o.cost.usd) for share, o in mix]


def _mean(figures: Sequence[tuple[float, float | None]], unknown: float) -> float:
    """The mean by shares; `unknown` where a figure is."""
    total = sum(share for share, _ in figures)
    if not total or any(figure is None for _, figure in figures):
        return unknown
    return sum(share * (figure or 0.0) for share, figure in figures) / total
