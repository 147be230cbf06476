"""What a trial teaches the formula: strain on the pools and edge fleets whose requests were late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hybridsd_sim.evaluations import Evaluation
from hybridsd_sim.sizing import Mixes, Sizer

STRAIN_STEP, STRAIN_MOST = 1.02, 4.0
"""Least growth of the strain of a pool that was late, and its limit."""
EDGE_STEP = 1.2
"""Growth of the strain of an edge fleet whose devices had queues when its requests were late."""


def as_it_was(sizer: Sizer) -> Sizer:
    """The formula without the strain that was learnt."""
    return replace(sizer, rates=dict(sizer.rates), load_factors=dict(sizer.load_factors), strain={})


def correct(sizer: Sizer, mixes: Mixes, evaluation: Evaluation) -> bool:
    """Raise the strain of pools and edge fleets whose classes were late, so that the formula is too; whether any was.

    GPU-seconds held beyond those predicted (model loads, larger requests) go into the load factors first.
    """
    deployment, grew = evaluation.deployment, False
    for index, pool in enumerate(sizer.scenario.pools):
        late = [
            name
            for name in late_classes(sizer, mixes, evaluation)
            if any(o.pool_index == index for _, o in mixes[name])
        ]
        if not late:
            continue
        ratio = evaluation.load_ratio.get(pool, 1.0)
        if ratio > 1.05:
            sizer.load_factors[pool] = max(sizer.load_factors.get(pool, 1.0), ratio)
        got = {name: evaluation.classes[name]["slo_attainment"].value for name in late}
        known = sizer.strain.get(pool, 1.0)
        sizer.strain[pool] = _strain(sizer, pool, mixes, deployment.replicas, got, known)
        grew = grew or sizer.strain[pool] > known
    for index, site in enumerate(sizer.scenario.edge):
        late = [
            name
            for name in late_classes(sizer, mixes, evaluation)
            if any(o.fleet_index == index for _, o in mixes[name])
        ]
        if late and sizer.edge_wait(site, mixes).probability:
            sizer.strain[site] = EDGE_STEP * sizer.strain.get(site, 1.0)
            grew = True
    return grew


def late_classes(sizer: Sizer, mixes: Mixes, evaluation: Evaluation) -> list[str]:
    """Classes that missed their SLO among those let in: the only promise that more nodes can mend."""
    got = {name: evaluation.classes[name]["slo_attainment"].value for name in mixes}
    asked = {name: sizer.wanted(name) * sum(share for share, _ in mix) for name, mix in mixes.items()}
    return [name for name, value in got.items() if not value >= asked[name] * (1.0 - 1e-9)]


def _strain(
    sizer: Sizer, pool: str, mixes: Mixes, replicas: Mapping[str, int], got: Mapping[str, float], known: float
) -> float:
    """The factor on a pool's traffic under which the formula gives the attainment that was met, or less."""
    low, high = known * STRAIN_STEP, STRAIN_MOST
    if low >= high:
        return high
    for _ in range(20):
        middle = (low + high) / 2.0
        sizer.strain[pool] = middle
        attained = sizer.assess(mixes, {name: replicas.get(name, 0) for name in sizer.scenario.pools}).attainment
        enough = any(attained[name] <= max(value, 0.0) + 1e-6 for name, value in got.items())
        low, high = (low, middle) if enough else (middle, high)
    return high
