"""What is asked of the formulation, under which conditions, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.sizing import Mixes, Sizer

Minimise = Literal["usd_per_hour", "quality_loss", "turned_away_per_s", "load", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked of the formulation. Dollars are an hour; None asks nothing.

    `minimise` "load" is the rent of the nodes while they are busy: the calmest of the plans that meet the rest;
    "nothing" asks only whether there is one. `usd_per_hour` bounds the rent, `total_usd_per_hour` rent and egress
    together. `quality` is the least mean CLIP score. `turned_away_per_s` bounds what is turned away. `headroom`
    multiplies the traffic: below 1 the formula is taken to be too careful by so much. `replicas` fixes nodes. `refuted`
    fleets, and smaller ones, are not to be used, nor plans `without` which it has to do.
    """

    minimise: Minimise = "usd_per_hour"
    usd_per_hour: float | None = None
    total_usd_per_hour: float | None = None
    quality: float | None = None
    turned_away_per_s: float | None = 0.0
    headroom: float = 1.0
    replicas: Mapping[str, int] | None = None
    refuted: tuple[Mapping[str, int], ...] = ()
    without: frozenset[Candidate] = frozenset()
    time_limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A solution: mixes, nodes, what they cost by the formulation, and a bound below which nothing is left."""

    mixes: Mixes
    replicas: Mapping[str, int]
    objective: float
    bound: float


@dataclass(frozen=True, slots=True)
class Condition:
    """One scenario's side of the formulation: its formula, and its price of every plan, aligned over conditions.

    `plans[class][j]` is plan j of the class as this scenario prices it; None where it cannot run there. `within_s`
    replaces every class's SLO at its percentile where it is tighter: 95% of the requests of every plan inside it.
    `forgiven` classes may be late: they only have to be served. `slowdowns` are the factors on seconds, by site, that
    the prices hold already. `name` is the scenario's, where there are several.
    """

    sizer: Sizer
    plans: Mapping[str, Sequence[Candidate | None]]
    within_s: float | None = None
    forgiven: frozenset[str] = frozenset()
    slowdowns: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
