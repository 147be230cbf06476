"""One request, one plan, nobody else there: from plain names and numbers to a price with its sources.

What `hybridsd-sim predict` asks. With `--measured-step-s` the user's own one-GPU step joins the profiles as a measured row,
and everything else is predicted from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hybridsd_sim.cost import PlanCost, price
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Options, Plan, Request, Site, Stage
from hybridsd_sim.profiles import CostRow, Profiles

CLOUD, EDGE = "cloud", "edge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The question: a model on a GPU, perhaps handed over to a small model on an edge device."""

    model: str
    gpu: str
    interconnect: str | None = None
    method: str = "single"
    degree: int = 1
    options: Options = ()
    small_model: str | None = None
    switch_step: int | None = None
    edge_device: str | None = None
    network: str | None = None
    height_px: int | None = None
    width_px: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    measured_step_s: float | None = None
    runtime: str = "eager"


def predict_cost(ask: Ask, profiles: Profiles) -> PlanCost:
    """The price of the asked plan. Raises `InputError` with everything that is wrong with the question."""
    _check(ask, profiles)
    native = profiles.model(ask.model).native_px
    request = Request(
        model=ask.model,
        height_px=ask.height_px or native,
        width_px=ask.width_px or ask.height_px or native,
        num_inference_steps=ask.num_inference_steps,
        guidance_scale=ask.guidance_scale,
    )
    if ask.measured_step_s is not None:
        profiles = profiles.with_costs((_own_row(ask, request, ask.measured_step_s),))
    return price(asked_plan(ask, profiles), request, profiles)


def asked_plan(ask: Ask, profiles: Profiles) -> Plan:
    """The plan in question: cloud-only, hybrid, or edge-only at switch step 0."""
    steps = ask.num_inference_steps
    switch = steps if ask.switch_step is None else ask.switch_step
    cloud = _cloud_site(ask)
    stages = []
    if switch > 0:
        stages.append(
            Stage(start=0, stop=switch, model=ask.model, site=cloud, method=ask.method, degree=ask.degree, options=ask.options)
        )
    if switch < steps:
        stages.append(Stage(start=switch, stop=steps, model=ask.small_model or ask.model, site=_edge_site(ask, profiles)))
    last, first = stages[-1].site.name, stages[0].site.name
    encode = last if first != last else first
    return Plan(stages=tuple(stages), text_encode_site=encode, vae_site=last, network=ask.network)


def _cloud_site(ask: Ask) -> Site:
    return Site(
        name=CLOUD,
        tier="cloud",
        device=ask.gpu,
        runtime=ask.runtime,
        gpus_per_node=max(1, ask.degree),
        interconnect=ask.interconnect,
    )


def _edge_site(ask: Ask, profiles: Profiles) -> Site:
    """The edge device under its own runtime; without one, the small model runs on the cloud's GPU, as the papers do it."""
    if ask.edge_device is None:
        return replace(_cloud_site(ask), name="cloud")
    device = profiles.edge_device(ask.edge_device)
    return Site(
        name=EDGE, tier="edge", device=device.name, runtime=device.default_runtime, precision=device.default_precision
    )


def _own_row(ask: Ask, request: Request, seconds: float) -> CostRow:
    return CostRow(
        device=ask.gpu,
        runtime=ask.runtime,
        precision="fp16",
        model=ask.model,
        component="step",
        height_px=request.height_px,
        width_px=request.width_px,
        batch_size=1,
        guidance=request.guided,
        method="single",
        degree=1,
        seconds_median=seconds,
        kind="measured",
        source="--measured-step-s",
        source_date="now",
    )


def _check(ask: Ask, profiles: Profiles) -> None:
    """Raise one `InputError` with every unknown name and every number out of range."""
    problems: list[Problem] = []
    looked_up = [
        ("--model", profiles.model, ask.model),
        ("--gpu", profiles.gpu, ask.gpu),
        ("--interconnect", profiles.interconnect, ask.interconnect),
        ("--small-model", profiles.model, ask.small_model),
        ("--edge-device", profiles.edge_device, ask.edge_device),
        ("--network", profiles.network, ask.network),
    ]
    for flag, look_up, name in looked_up:
        if name is not None:
            try:
                look_up(name)
            except InputError as error:
                problems += [replace(problem, place=flag) for problem in error.problems]
    problems += _number_problems(ask)
    if problems:
        raise InputError(problems)


def _number_problems(ask: Ask) -> list[Problem]:
    steps, switch = ask.num_inference_steps, ask.switch_step
    rules = [
        ("--degree", ask.degree, ask.degree >= 1, "counts GPUs, so it is at least 1"),
        ("--num-inference-steps", steps, steps >= 1, "needs at least 1 step"),
        ("--guidance-scale", ask.guidance_scale, ask.guidance_scale >= 0, "is at least 0"),
        ("--switch-step", switch, switch is None or 0 <= switch <= steps, f"lies between 0 and {steps}"),
        ("--measured-step-s", ask.measured_step_s, (ask.measured_step_s or 1.0) > 0, "is more than 0 seconds"),
        ("--small-model", ask.small_model, ask.small_model is None or switch is not None, "needs a --switch-step"),
        ("--switch-step", switch, switch in (None, steps) or ask.small_model is not None, "needs a --small-model"),
    ]
    return [Problem(flag, repr(value), rule) for flag, value, holds, rule in rules if not holds]


def to_json(cost: PlanCost) -> dict[str, Any]:
    """The contract's figures; what nobody knows is None, with the reason under `unknown`."""
    rounds = sum(stage.num_steps for stage in cost.plan.stages)
    return {
        "latency_s": cost.latency_s,
        "denoise_s": cost.denoise_s,
        "step_s": cost.denoise_s / rounds,
        "compute_s": cost.compute_s,
        "comm_exposed_s": cost.comm_exposed_s,
        "comm_bytes": cost.comm_bytes,
        "flops": cost.flops,
        "flops_without_attention_products": cost.flops_without_attention_products,
        "gpu_seconds": cost.gpu_seconds,
        "usd": cost.usd,
        "edge_energy_j": cost.edge_energy_j,
        "quality": cost.quality.clip,
        "interval_s": list(cost.interval_s),
        "kind": cost.kind,
        "sources": list(cost.sources),
        "unknown": list(cost.unknowns),
        "outside": list(cost.outside),
        "plan": cost.plan.label,
        "parts": [
            {"name": p.name, "where": p.where, "seconds": p.seconds, "usd": p.usd, "kind": p.kind, "critical": p.critical}
            for p in cost.parts
        ],
    }
