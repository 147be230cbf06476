"""What a simulation gives back: `SimResult`, its records with the summary and verdict made of them when asked for.

A `Verdict` says what to think of a run before reading its numbers: feasible, stable, converged, in domain, each yes or
no with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hybridsd_sim.estimate import Estimate, Show, exact, money, number, percent, score
from hybridsd_sim.pricing import Candidate, pool_usd_per_gpu_hour
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.simulation.metrics import area, student, summarise
from hybridsd_sim.simulation.records import UNSERVED, PlanFacts, Records, column, to_frame

if TYPE_CHECKING:
    import pandas as pd


NARROW = 0.1
"""A run has converged when the p95 latency is known to this share of itself, either way."""

GROWTH_SHARE = 0.01
"""A queue that gains less than this share of the arrivals is not called growing."""

BROKEN_BY_LITTLE: Mapping[bool, str] = {True: "just under ", False: "just over "}
"""What stands before a figure that is written like the bound which it breaks; by whether it has to reach the bound."""

CELLS_PER_THIRD = 5
"""Observations of the queue in each third of each replication."""


@dataclass(frozen=True, eq=False)
class SimResult:
    """One policy on one scenario, over all replications: records, summary and verdict, and what made them.

    `used` are the candidates that at least one request was sent to, served or not, by request class and plan label.
    `usd_per_hour` is the rent of the nodes, None when a price is unknown. `timeouts` counts the events of requests,
    lost nodes apart.
    """

    scenario: Scenario
    policy: str
    seed: int
    replicas: Mapping[str, int]
    replications: tuple[Records, ...]
    used: Mapping[tuple[str, str], Candidate]
    usd_per_hour: float | None
    timeouts: int

    @cached_property
    def requests(self) -> pd.DataFrame:
        """A row per request of every replication, made when asked for."""
        import pandas as pd

        return pd.concat([to_frame(records, self.policy) for records in self.replications], ignore_index=True)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per request class and one for all, every figure with its 95% interval."""
        return summarise(self.scenario, self.policy, self.replications, self.usd_per_hour)

    @cached_property
    def verdict(self) -> Verdict:
        """Feasible, stable, converged, in domain: each yes or no with its reason."""
        outside = {": ".join(key): option.cost.outside for key, option in self.used.items() if option.cost.outside}
        return verdict_of(self.scenario, self.summary, self.replications, outside)


def plan_facts(scenario: Scenario, profiles: Profiles, candidate: Candidate) -> PlanFacts:
    """What a plan says of every request that it serves, as a run records it; NaN for what nobody knows."""
    cost, rate = candidate.cost, None
    if candidate.pool_index >= 0:
        rate = pool_usd_per_gpu_hour(scenario, profiles, list(scenario.pools)[candidate.pool_index])
    return PlanFacts(
        label=candidate.plan.label,
        degree=candidate.degree,
        pool_index=candidate.pool_index,
        fleet_index=candidate.fleet_index,
        usd=math.nan if cost.usd is None else cost.usd,
        usd_per_gpu_s=0.0 if rate is None else rate / 3600,
        edge_energy_j=math.nan if cost.edge_energy_j is None else cost.edge_energy_j,
        bytes_down=cost.bytes_down,
        quality=math.nan if candidate.quality is None else candidate.quality,
        batch_gpu_s=tuple(candidate.degree * s / size for size, s in enumerate(candidate.batch_s, 1)),
    )


def joined(first: SimResult, second: SimResult) -> SimResult:
    """One result of two runs of the same scenario whose replications adjoin, those of `first` before those of `second`.

    It is what one run of all of them would have given. Raises `ValueError` for runs of different scenarios, policies,
    seeds or replicas, and for replications that leave a gap or come twice.
    """
    same = ("scenario", "policy", "seed", "replicas", "usd_per_hour")
    if differ := [name for name in same if getattr(first, name) != getattr(second, name)]:
        raise ValueError(f"runs that differ in {', '.join(differ)} cannot be joined")
    done = (*first.replications, *second.replications)
    numbers = [records.replication for records in done]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"replications {numbers} do not follow one another")
    used = {**first.used, **second.used}
    return replace(first, replications=done, used=used, timeouts=first.timeouts + second.timeouts)


@dataclass(frozen=True, slots=True)
class Finding:
    """One question about a run, answered yes or no with its reason: a sentence with the numbers that decided."""

    name: str
    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The four findings on a run."""

    feasible: Finding
    stable: Finding
    converged: Finding
    in_domain: Finding

    @property
    def findings(self) -> tuple[Finding, Finding, Finding, Finding]:
        return self.feasible, self.stable, self.converged, self.in_domain

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As JSON has it: `{"feasible": {"ok": ..., "reason": ...}, ...}`."""
        return {finding.name: {"ok": finding.ok, "reason": finding.reason} for finding in self.findings}


def verdict_of(
    scenario: Scenario,
    summary: pd.DataFrame,
    replications: Sequence[Records],
    outside: Mapping[str, tuple[str, ...]],
) -> Verdict:
    """Whether promises and budgets hold, queues are steady, the p95 latency is known well, and no cost is extrapolated.

    `summary` is `metrics.summarise` of the same replications. `outside` are, by plan label, the predictions that lie
    outside what was measured. Feasible goes by the figures themselves; where an interval reaches across its bound, the
    reason says that it is undecided. An unknown figure keeps no promise.
    """
    figures = figures_of(summary)
    return Verdict(
        feasibility(scenario, figures),
        stability(scenario, replications),
        convergence(figures[ALL]["latency_p95_s"]),
        domain(outside),
    )


def figures_of(summary: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """By request class, and for "all" of them: every figure of a summary with its 95% interval."""
    at = {str(name): index for index, name in enumerate(summary.columns)}
    ends = {name: [at[name], at[f"{name}_low"], at[f"{name}_high"]] for name in at if f"{name}_low" in at}
    rows = zip(summary.index, summary.to_numpy(dtype=np.float64).tolist(), strict=True)
    return {str(key[-1]): {name: Estimate(*(row[i] for i in ends[name])) for name in ends} for key, row in rows}


class Promise(NamedTuple):
    """A figure, and the bound that it has to keep: at least the bound, or at most, in `unit` (which may be empty)."""

    subject: str
    got: Estimate
    bound: float
    at_least: bool
    unit: str
    show_got: Show
    show_bound: Show

    def keeps(self, value: float) -> bool:
        """Whether a value is on the right side; a bound that was computed from percent is met by the same share."""
        slack = 1e-9 * self.bound
        return value >= self.bound - slack if self.at_least else value <= self.bound + slack

    @property
    def kept(self) -> bool:
        return self.keeps(self.got.value)

    @property
    def undecided(self) -> bool:
        """Whether the interval is unknown or reaches across the bound."""
        end = self.got.low if self.kept == self.at_least else self.got.high
        return math.isnan(end) or self.keeps(end) != self.kept

    @property
    def margin(self) -> float:
        return abs(self.got.value - self.bound) / max(self.bound, 1e-12)

    def __str__(self) -> str:
        bound = f"{self.show_bound(self.bound)}{self.unit}"
        asked = f"{'at least' if self.at_least else 'at most'} {bound} asked"
        if math.isnan(self.got.value):
            return f"{self.subject} unknown, {asked}"
        got, *ends = (
            "unknown" if math.isnan(figure) else f"{self.show_got(figure)}{self.unit}"
            for figure in (self.got.value, *self.got.interval)
        )
        # what is broken by less than the digits shown must not read as if it held
        near = "" if self.kept or got != f"{self.show_got(self.bound)}{self.unit}" else BROKEN_BY_LITTLE[self.at_least]
        doubt = f", undecided (95% interval {' to '.join(ends)})" if self.undecided else ""
        return f"{self.subject} {near}{got}, {asked}{doubt}"


def promises(scenario: Scenario, figures: Mapping[str, Mapping[str, Estimate]]) -> list[Promise]:
    """What every class and the budget ask, with what they got: figures as `figures_of` gives them.

    Where as few as possible are to be turned away (`search.minimise`), an SLO is a promise to those who are admitted.
    """
    found = []
    for name, promised in scenario.promises.items():
        got = figures[name]
        if scenario.search.minimise == "turned_away_per_s" and (admitted := 1.0 - got["unserved_share"].value) > 0.0:
            attained = got["slo_attainment"]
            value, low, high = (min(1.0, end / admitted) for end in (attained.value, attained.low, attained.high))
            got = {**got, "slo_attainment": Estimate(value, low, high)}
        what = "served" if promised.slo_s is None else f"served within {exact(promised.slo_s)} s"
        asked: list[tuple[str, str, float | None, bool, str, Show, Show]] = [
            (what, "slo_attainment", promised.slo_share, True, "", percent, percent),
            ("quality", "quality_mean", promised.quality_floor, True, " CLIP", score, score),
            ("edge energy", "edge_energy_j_per_image", promised.edge_energy_j, False, " J/image", number, exact),
            ("metered price", "metered_usd_per_image", promised.usd, False, " USD/image", money, exact),
        ]
        found += [
            Promise(f"{name}: {subject}", got[figure], bound, at_least, unit, show_got, show_bound)
            for subject, figure, bound, at_least, unit, show_got, show_bound in asked
            if bound is not None
        ]
    rent = (
        ("rent_usd_per_hour", scenario.budget.usd_per_hour, " USD/h"),
        ("rent_usd_per_image", scenario.budget.usd_per_image, " USD/image"),
    )
    found += [
        Promise("rent", figures[ALL][figure], bound, False, unit, money, exact)  # noqa: FBT003 -- at most
        for figure, bound, unit in rent
        if bound is not None
    ]
    return found


def feasibility(scenario: Scenario, figures: Mapping[str, Mapping[str, Estimate]]) -> Finding:
    """Whether every promise and budget holds by these figures.

    The reason names the first broken promise, or of those kept the first undecided one, or the closest.
    """
    asked = promises(scenario, figures)
    broken = [promise for promise in asked if not promise.kept]
    if broken:
        more = f" ({len(broken) - 1} more broken)" if len(broken) > 1 else ""
        return Finding("feasible", ok=False, reason=f"{broken[0]}{more}")
    shown = next((promise for promise in asked if promise.undecided), None)
    closest = shown or min(asked, key=lambda promise: promise.margin)
    return Finding("feasible", ok=True, reason=f"every promise holds; the closest: {closest}")


def stability(scenario: Scenario, replications: Sequence[Records]) -> Finding:
    """Whether more wait in the last third of the measured time than in the middle one, beyond noise and `GROWTH_SHARE`.

    Counts who waits at each moment rather than how long those waited who were served: under overload the latter leaves
    out the very requests that wait longest. A peak that is over by the horizon leaves less unfinished and is no growth.
    """
    edges_s = np.linspace(scenario.warmup_s, scenario.horizon_s, 3 * CELLS_PER_THIRD + 1)
    begin_s, end_s = edges_s[2 * CELLS_PER_THIRD], edges_s[-1]  # of the last third
    counts, arrived, left = [], [], []
    for rows in (records.rows() for records in replications):
        arrival_s = column(rows, "arrival_s")
        done_s = np.where(column(rows, "status") == UNSERVED, arrival_s, column(rows, "finish_s"))
        arrived.append([np.count_nonzero(arrival_s <= t) for t in (begin_s, end_s)])
        left.append([np.count_nonzero(done_s <= t) for t in (begin_s, end_s)])
        # Who waits for a GPU or an edge device, on average between each two edges.
        ends_s = [(column(rows, f"{side}_ready_s"), column(rows, f"{side}_start_s")) for side in ("cloud", "edge")]
        request_s = [area(ready_s, start_s, np.ones(len(rows)), edges_s) for ready_s, start_s in ends_s]
        counts.append(sum(request_s, np.zeros(len(edges_s) - 1)) / np.diff(edges_s))
    waiting = np.array(counts)
    middle, last = waiting[:, CELLS_PER_THIRD : 2 * CELLS_PER_THIRD], waiting[:, 2 * CELLS_PER_THIRD :]
    error = math.sqrt((middle.var(ddof=1) + last.var(ddof=1)) / last.size)
    noise = student(2 * last.size - 2) * error
    before, after = np.mean(np.subtract(arrived, left), axis=0).tolist()
    arrivals = float(np.mean(np.diff(arrived)))
    growth = float(last.mean() - middle.mean())
    grows = growth > max(noise, GROWTH_SHARE * arrivals) and after > before
    reason = (
        f"{'the queue grows' if grows else 'no queue grows'}: {number(float(last.mean()))} waiting on average in the "
        f"last third, {number(float(middle.mean()))} in the middle third; {number(after)} unfinished at the end, "
        f"{number(before)} a third earlier"
    )
    return Finding("stable", ok=not grows, reason=reason)


def convergence(p95_s: Estimate) -> Finding:
    """Whether the 95% interval of the p95 latency is within `NARROW` of it, either way."""
    half_s = (p95_s.high - p95_s.low) / 2
    if not (half_s >= 0 and p95_s.value > 0):  # NaN fails both
        reason = "too few requests for a 95% interval of the p95 latency"
        return Finding("converged", ok=False, reason=reason)
    half = f"95% interval ±{percent(half_s / p95_s.value)}, at most ±{percent(NARROW)} asked"
    reason = f"p95 latency {number(p95_s.value)} s, {half}"
    return Finding("converged", ok=half_s <= NARROW * p95_s.value, reason=reason)


def domain(outside: Mapping[str, tuple[str, ...]]) -> Finding:
    """Whether every step time lies within what was measured; `outside` are, by plan, the predictions that do not."""
    found = [(label, text) for label, texts in outside.items() for text in texts]
    if not found:
        return Finding(
            "in_domain", ok=True, reason="every step time follows from steps timed on its device, runtime and precision"
        )
    label, text = found[0]
    count = f"{len(found)} predictions lie" if len(found) > 1 else "1 prediction lies"
    return Finding("in_domain", ok=False, reason=f"{count} outside what was measured, first {label}: {text}")
