"""A capacity plan as plain data: what was chosen, what it saves, what a change would buy, how it fares elsewhere.

Sentences stand beside the figures that they tell, under `said`, so that every page and the terminal say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hybridsd_sim.capacity import labels
from hybridsd_sim.sentences import (
    KNOWN_BY,
    bound_in_words,
    bound_of,
    confidence_in_words,
    conflict_in_words,
    evidence_in_words,
    margin_in_words,
    probability_interval,
    relaxation_in_words,
    savings_in_words,
    turned_away,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hybridsd_sim.candidates import Candidate
    from hybridsd_sim.capacity import CapacityPlan, Confidence, Evaluated, Variation
    from hybridsd_sim.plan import Plan

Data = dict[str, Any]


def planned(plan: CapacityPlan) -> Data:
    """Everything that a capacity plan knows beyond its simulations."""
    savings, said = plan.savings, savings_in_words(plan)
    return {
        "feasible": plan.feasible,
        "explanation": list(plan.explanation),
        "savings": [asdict(saving) | {"said": text} for saving, text in zip(savings, said, strict=True)],
        "bound": _bound(plan),
        "chosen": [_choice(plan, name) for name in plan.scenario.requests],
        "frontier": [_evaluated(point) for point in plan.frontier],
        "baselines": [_evaluated(point) for point in plan.baselines],
        "alternatives": [_evaluated(point) for point in plan.alternatives],
        "margins": [asdict(margin) | {"said": margin_in_words(margin)} for margin in plan.margins],
        "conflict": [asdict(each) | {"said": relaxation_in_words(each)} for each in plan.conflict],
        "conflict_said": conflict_in_words(plan.conflict) if plan.conflict else "",
        "sensitivity": _variations(plan.sensitivity),
        "confidence": _confidence(plan.confidence) if plan.confidence else None,
        "robust": _variations(plan.robust),
        "evidence": [_evaluated(point) for point in plan.evidence],
        "evidence_said": evidence_in_words(plan.evidence),
        "switch_curve": {
            name: [_point(option, plan.mixes.get(name, ())) for option in curve]
            for name, curve in plan.switch_curve.items()
        },
        "refusals": [[name, reason, count] for (name, reason), count in _most_first(plan.refusals)],
    }


def _bound(plan: CapacityPlan) -> Data | None:
    found = bound_of(plan)
    if found is None:
        return None
    bound, cost, gap = found
    return {"usd_per_hour": bound, "plan_usd_per_hour": cost, "gap": gap, "said": bound_in_words(plan)}


def _confidence(found: Confidence) -> Data:
    low, high = probability_interval(found.probability, found.draws)
    return asdict(found) | {"low": low, "high": high, "said": confidence_in_words(found)}


def _variations(found: Sequence[Variation]) -> list[Data]:
    return [{**_evaluated(each.result), "name": each.name} for each in found]


def _most_first(counts: Mapping[tuple[str, str], int]) -> list[tuple[tuple[str, str], int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _choice(plan: CapacityPlan, name: str) -> Data:
    """One class's plans, the largest share first: where each stage runs and what is promised of it."""
    mix = plan.mixes.get(name, ())
    found = {"request_class": name, "label": labels({name: mix})[name] or None, "turned_away": turned_away(mix)}
    parts = [{"share": share, **_part(option, plan)} for share, option in mix]
    return {**found, "parts": parts, "note": "" if mix else "no legal plan"}


def _part(option: Candidate, plan: CapacityPlan) -> Data:
    served = option.plan
    return {
        "label": served.label,
        "kind": option.cost.steps_kind,
        "stages": _stages(served, plan.deployment.replicas),
        "batch_cap": served.batch_cap,
        "vae": served.vae,
        "vae_site": served.vae_site,
        "switch_step": served.switch_step,
        "num_inference_steps": served.num_inference_steps,
    }


def _stages(served: Plan, replicas: Mapping[str, int]) -> list[Data]:
    return [
        {
            "start": stage.start, "stop": stage.stop, "model": stage.model, "site": stage.site.name,
            "device": stage.site.device, "tier": stage.site.tier, "method": stage.method, "degree": stage.degree,
            "options": dict(stage.options), "nodes": replicas.get(stage.site.name),
        }
        for stage in served.stages
    ]  # fmt: skip


def _evaluated(point: Evaluated) -> Data:
    keys = ("name", "policy", "usd_per_hour", "latency_p95_s", "slo_attainment", "quality", "feasible", "reason")
    figures = {key: getattr(point, key) for key in (*keys, "gpu_seconds_per_image", "edge_energy_j_per_image")}
    replicas = dict(point.deployment.replicas) if point.deployment else {}
    known_by = KNOWN_BY.get(point.policy, point.policy)
    return {**figures, "replicas": replicas, "labels": dict(point.labels), "known_by": known_by}


def _point(option: Candidate, mix: Sequence[tuple[float, Candidate]]) -> Data:
    """One switch step of the latency curve: idle latency with the bounds of its parts, and dollars an image."""
    low_s, high_s = option.cost.latency_interval_s
    return {
        "switch_step": option.plan.switch_step, "latency_s": option.latency_s, "low_s": low_s, "high_s": high_s,
        "usd_per_image": None if option.cost.usd is None else option.cost.usd / option.cost.request.num_images,
        "quality": option.quality, "kind": option.cost.kind, "label": option.plan.label,
        "chosen": any(option.plan == part.plan for _, part in mix),
    }  # fmt: skip
