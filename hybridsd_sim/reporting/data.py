"""What a report says, as plain data taken from a capacity plan or from simulations, before any page or figure.

Everything here can be written as JSON and drawn again later. A figure nobody knows is null beside a `note` that says
why; shares, seconds and dollars keep full precision, since rounding is the pages' business. Sentences stand beside the
figures that they tell, under `said`, so that every page and the terminal say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsd_sim.planning import (
    KNOWN_BY,
    describe_bound,
    describe_confidence,
    describe_evidence,
    describe_infeasible_set,
    describe_margin,
    describe_relaxation,
    describe_savings,
    labels,
    optimality_gap,
    probability_interval,
    turned_away_share,
)
from hybridsd_sim.pricing import pool_site, price, request_of
from hybridsd_sim.reporting.breakdown import breakdowns, rates_of
from hybridsd_sim.reporting.calibration import constants_of, fits_of
from hybridsd_sim.reporting.labels import Data
from hybridsd_sim.reporting.run_data import tally

if TYPE_CHECKING:
    from hybridsd_sim.planning import CapacityPlan, EvaluatedPlan, Variation
    from hybridsd_sim.pricing import Candidate, PlanCost
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario
    from hybridsd_sim.simulation import SimResult


CHOSEN = "chosen"
"""Name of the run that follows the chosen plan."""

POLICY_OF = {"simulate": "planned", "screen": "screened", "formula": "analytic"}
"""What `capacity.json` has under `policy` for each `EvaluatedPlan.level`."""


def planned(plan: CapacityPlan) -> Data:
    """Everything that a capacity plan knows beyond its simulations."""
    savings, said = plan.savings, describe_savings(plan)
    gap, sure, chances = optimality_gap(plan), plan.confidence, {}
    if sure:
        low, high = probability_interval(sure.probability, sure.draws)
        chances = asdict(sure) | {"low": low, "high": high, "said": describe_confidence(sure)}
    return {
        "feasible": plan.feasible,
        "explanation": list(plan.explanation),
        "savings": [asdict(saving) | {"said": text} for saving, text in zip(savings, said, strict=True)],
        "bound": None
        if gap is None
        else dict(zip(("usd_per_hour", "plan_usd_per_hour", "gap"), gap, strict=True)) | {"said": describe_bound(plan)},
        "chosen": [_choice(plan, name) for name in plan.scenario.requests],
        "frontier": [_evaluated(point) for point in plan.frontier],
        "baselines": [_evaluated(point) for point in plan.baselines],
        "alternatives": [_evaluated(point) for point in plan.alternatives],
        "margins": [asdict(margin) | {"said": describe_margin(margin)} for margin in plan.margins],
        "conflict": [asdict(each) | {"said": describe_relaxation(each)} for each in plan.conflict],
        "conflict_said": describe_infeasible_set(plan.conflict) if plan.conflict else "",
        "sensitivity": _variations(plan.sensitivity),
        "confidence": chances or None,
        "robust": _variations(plan.robust),
        "evidence": [_evaluated(point) for point in plan.evidence],
        "evidence_said": describe_evidence(plan.evidence),
        "switch_curve": {
            name: [_point(option, plan.mixes.get(name, ())) for option in curve]
            for name, curve in plan.switch_curve.items()
        },
        "refusals": [
            [name, reason, count]
            for (name, reason), count in sorted(plan.refusals.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _variations(found: Sequence[Variation]) -> list[Data]:
    return [{**_evaluated(each.result), "name": each.name} for each in found]


def _choice(plan: CapacityPlan, name: str) -> Data:
    """One class's plans, the largest share first: where each stage runs and what is promised of it."""
    mix = plan.mixes.get(name, ())
    parts = []
    for share, option in mix:
        served = option.plan
        stages = [
            {
                "start": stage.start, "stop": stage.stop, "model": stage.model, "site": stage.site.name,
                "device": stage.site.device, "tier": stage.site.tier, "method": stage.method, "degree": stage.degree,
                "options": dict(stage.options), "nodes": plan.deployment.replicas.get(stage.site.name),
            }
            for stage in served.stages
        ]  # fmt: skip
        parts.append({
            "share": share, "label": served.label, "kind": option.cost.steps_kind, "stages": stages,
            "batch_cap": served.batch_cap, "vae": served.vae, "vae_site": served.vae_site,
            "switch_step": served.switch_step, "num_inference_steps": served.num_inference_steps,
        })  # fmt: skip
    return {
        "request_class": name,
        "label": labels({name: mix})[name] or None,
        "turned_away": turned_away_share(mix),
        "parts": parts,
        "note": "" if mix else "no legal plan",
    }


def _evaluated(point: EvaluatedPlan) -> Data:
    keys = ("usd_per_hour", "latency_p95_s", "slo_attainment", "quality", "feasible", "reason")
    figures = {key: getattr(point, key) for key in (*keys, "gpu_seconds_per_image", "edge_energy_j_per_image")}
    replicas = dict(point.deployment.replicas) if point.deployment else {}
    named = {"name": point.name, "policy": POLICY_OF[point.level]}
    return {**named, **figures, "replicas": replicas, "labels": dict(point.labels), "known_by": KNOWN_BY[point.level]}


def _point(option: Candidate, mix: Sequence[tuple[float, Candidate]]) -> Data:
    """One switch step of the latency curve: idle latency with the bounds of its parts, and dollars an image."""
    low_s, high_s = option.cost.latency_interval_s
    return {
        "switch_step": option.plan.switch_step, "latency_s": option.latency_s, "low_s": low_s, "high_s": high_s,
        "usd_per_image": None if option.cost.usd is None else option.cost.usd / option.cost.request.num_images,
        "quality": option.quality, "kind": option.cost.kind, "label": option.plan.label,
        "chosen": any(option.plan == part.plan for _, part in mix),
    }  # fmt: skip


def contents(result: CapacityPlan | Sequence[SimResult], profiles: Profiles) -> Data:
    """Everything that the pages, figures and tables of a report need, as plain data.

    `kind` is `plan` or `simulation`. Both have `scenario` (what pages tell of it), `runs` (see `tally`; the chosen plan
    or the first policy comes first), `plans` (see `breakdowns`), `rates`, `calibration` and `constants`; a plan has the
    keys of `planned` besides. Seconds, US$, joules and shares of 1; None where nobody knows a figure, beside its
    `note`.
    """
    if isinstance(result, Sequence):
        runs = named(result)
        served = [(name, *one) for name, run in runs.items() for one in _used(run)]
        return _clean({"kind": "simulation", **_shared(result[0].scenario, runs, served, profiles)})
    runs = {CHOSEN: result.chosen_result, **result.baseline_results}
    chosen = [option for mix in result.mixes.values() for _, option in mix]
    served = [(CHOSEN, option.request_class, option.cost) for option in chosen]
    served += [(name, *one) for name, run in result.baseline_results.items() for one in _used(run)]
    # Alternatives were not simulated: their plans are priced again.
    prefer = result.scenario.search.prefer_sources
    for point in result.alternatives:
        for name, mix in (point.deployment.plans if point.deployment else {}).items():
            request = request_of(name, result.scenario.requests[name])
            served += [(point.name, name, price(part.plan, request, profiles, prefer=prefer)) for part in mix]
    shared = _shared(result.scenario, runs, served, profiles, chosen)
    return _clean({"kind": "plan", **shared, **planned(result)})


def _used(run: SimResult) -> Iterator[tuple[str, PlanCost]]:
    """The plans by which a run served each class, in the order of the classes."""
    order = list(run.scenario.requests)
    for option in sorted(run.used.values(), key=lambda option: (order.index(option.request_class), option.plan.label)):
        yield option.request_class, option.cost


def _clean(data: Data) -> Data:
    return {key: plain(value) for key, value in data.items()}


def named(results: Sequence[SimResult]) -> dict[str, SimResult]:
    """Simulations by policy; numbered where one policy ran twice."""
    runs: dict[str, SimResult] = {}
    for result in results:
        again = sum(name.split(" #")[0] == result.policy for name in runs)
        runs[f"{result.policy} #{again + 1}" if again else result.policy] = result
    return runs


def _shared(
    scenario: Scenario,
    runs: Mapping[str, SimResult],
    served: Sequence[tuple[str, str, PlanCost]],
    profiles: Profiles,
    chosen: Sequence[Candidate] = (),
) -> Data:
    """What plans and simulations have alike; `chosen` are the candidates that the first run follows."""
    sites = [pool_site(name, pool) for name, pool in scenario.pools.items()]
    sites += [site for *_, cost in served for site in cost.plan.sites.values()]
    rates = rates_of({site.name: site for site in sites}, profiles)
    classes = {
        name: {key: getattr(spec, key) for key in ("slo_s", "slo_percentile", "quality_floor", "num_inference_steps")}
        | {"fleet": spec.origin, "device": scenario.edge[spec.origin].device, "num_images": spec.num_images}
        | {"model": spec.model, "height_px": spec.height_px, "width_px": spec.width_px}
        for name, spec in scenario.requests.items()
    }
    pools = {name: {"gpu": pool.gpu, "gpus_per_node": pool.gpus_per_node} for name, pool in scenario.pools.items()}
    keys = ("name", "seed", "horizon_s", "warmup_s", "replications")
    return {
        "scenario": {**{key: getattr(scenario, key) for key in keys}, "classes": classes, "pools": pools},
        "runs": [
            tally(name, result, chosen if index == 0 else (), rates)
            for index, (name, result) in enumerate(runs.items())
        ],
        "plans": breakdowns(served, rates),
        "rates": [rate.to_dict() for rate in rates.values()],
        "calibration": fits_of(sites, profiles),
        "constants": constants_of(profiles),
    }


def plain(value: Any) -> Any:
    """JSON's own types: no NaN or infinity, no tuples, no arrays."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
