"""What a simulation gives back: its records, and the summary and verdict that are made of them when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from hybridsd_sim.candidates import Candidate, pool_usd_per_gpu_hour
from hybridsd_sim.metrics import Verdict, summarise, verdict_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.records import PlanFacts, Records, to_frame
from hybridsd_sim.scenario import Scenario

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class SimResult:
    """One policy on one scenario, over all replications: records, summary and verdict, and what made them.

    `used` are the candidates that served at least one request, by request class and plan label. `usd_per_hour` is the
    rent of the nodes, None when a price is unknown. `timeouts` counts the events of requests, lost nodes apart.
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
        return summarise(self.scenario, self.policy, self.replications, self.replicas, self.usd_per_hour)

    @cached_property
    def verdict(self) -> Verdict:
        """Feasible, stable, converged, in domain: each yes or no with its reason."""
        outside = {": ".join(key): option.cost.outside for key, option in self.used.items() if option.cost.outside}
        return verdict_of(self.scenario, self.summary, self.replications, outside)


def plan_facts(scenario: Scenario, profiles: Profiles, candidate: Candidate) -> PlanFacts:
    """What a plan says of every request that it serves, as the book of a run wants it; NaN for what nobody knows."""
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
