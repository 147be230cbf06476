"""Every plan that a scenario's search space spans for a request class, and the rules that a legal one keeps.

The space: cloud-only, edge-only and hybrid plans over pools, parallel methods, degrees, their options, switch steps,
small models, VAEs and batch caps, as the scenario's `search` allows. The rules: node size, the method's own, a shared
latent space, memory on every device. Each is stated once; a `Problem` is what breaks it, with its remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import inf
from typing import Any

from hybridsd_sim.errors import Problem
from hybridsd_sim.perf import ELEMENT_BYTES, find_method, job_of, option_types, unet_layers
from hybridsd_sim.plan import Plan, Request, Site, Stage
from hybridsd_sim.profiles import Profiles, derived
from hybridsd_sim.scenario import EdgeFleet, Pool, RequestClass, Scenario

DEFAULT_SWITCH_STRIDE = 5
"""Without `search.switch_steps` every fifth step is a candidate, as in Hybrid SD's published tables."""

GATHERING_METHODS = frozenset({"distrifusion", "pcpp"})
"""Parallel methods whose ranks keep the keys and values of the whole image, which takes memory."""

LIVE_ACTIVATIONS = 4
"""Activations of the widest layer alive at once in a UNet call. Modelled: input, output, skip, workspace."""


def _problems_key(plan: Plan, request: Request, _: Profiles) -> tuple[object, ...]:
    options = tuple(option_types(stage.options) for stage in plan.stages)
    what = (request.height_px, request.width_px, request.num_images, request.guided)
    return plan.without_step_count, plan.extra_sites, options, what


@derived(key=_problems_key)
def plan_problems(plan: Plan, request: Request, profiles: Profiles) -> tuple[Problem, ...]:
    """Every rule that a plan breaks: node size, method, shared latent space, memory on each device.

    Memory is looked at where all other rules hold. None of them depends on the switch steps.
    """
    problems: list[Problem] = []
    for stage in plan.stages:
        if stage.degree > (most := stage.site.gpus_per_node):
            rule = f"a gang stays inside one node; {stage.site.name} has {most} GPUs a node"
            remedy = "Lower the degree or raise gpus_per_node."
            problems.append(Problem("degree", str(stage.degree), rule, remedy))
        problems += _method_problems(stage, request, profiles)
    problems += _latent_problems(plan, profiles)
    if problems:
        return tuple(problems)
    for site in plan.sites.values():
        device = profiles.device(site.device) if site.tier == "cloud" else profiles.edge_device(site.device)
        need_gib = needed_bytes(plan, site, request, profiles) / 2**30
        usable_gib = inf if device.memory_gib is None else device.memory_gib * device.usable_memory_fraction
        if need_gib > usable_gib:
            rule = f"needs {need_gib:.1f} GiB there, of which {usable_gib:.1f} GiB are usable"
            remedy = "Use a smaller model or device memory."
            problems.append(Problem(f"memory of {site.name}", site.device, rule, remedy))
    return tuple(problems)


@derived(
    key=lambda stage, request, _: (
        *(stage.model, stage.method, stage.degree, stage.options, option_types(stage.options), stage.site.runtime),
        *(request.height_px, request.width_px, request.unet_batch, request.guided),
    )
)
def _method_problems(stage: Stage, request: Request, profiles: Profiles) -> list[Problem]:
    """The rules of the stage's method, which know no site."""
    method, job = find_method(stage.method), job_of(stage, request, profiles)
    return method.problems(job, stage.degree, dict(stage.options))


def _latent_problems(plan: Plan, profiles: Profiles) -> list[Problem]:
    first = profiles.model(plan.stages[0].model)
    problems = []
    for stage in plan.stages[1:]:
        model = profiles.model(stage.model)
        for rule, mine, theirs in (
            ("latent spaces must agree at a switch step", model.latent_space, first.latent_space),
            ("predictions must agree at a switch step", model.prediction, first.prediction),
            ("text embeddings must be as wide", model.cross_attention_dim, first.cross_attention_dim),
        ):
            if mine != theirs:
                problems.append(Problem(stage.model, str(mine), f"{rule}; {first.name} has {theirs}"))
    return problems


def needed_bytes(plan: Plan, site: Site, request: Request, profiles: Profiles) -> float:
    """Bytes that one device of a site must hold.

    UNet and text-encoder weights, the VAE, activations, and the keys and values that a method gathers, in the cloud for
    as many requests as the plan denoises together. Modelled: weights at the site's precision, `LIVE_ACTIVATIONS` copies
    of the widest activation, fp16 VAE activations.
    """
    weight = ELEMENT_BYTES.get(site.precision, 2.0)
    stages = [stage for stage in plan.stages if stage.site.name == site.name]
    models = [profiles.model(stage.model) for stage in stages]
    total = sum(model.params for model in {model.name: model for model in models}.values()) * weight
    if plan.text_encode_site == site.name or (site.tier == "cloud" and stages):
        encoders = profiles.model(plan.stages[0].model).text_encoders
        total += sum(profiles.component(name).params for name in encoders) * weight
    if plan.vae_site == site.name:
        total += profiles.component(plan.vae).params * 2.0
    latents = request.unet_batch * plan.batch_cap if site.tier == "cloud" else request.num_images
    most_alive = 0.0
    for stage in stages:
        widest, keys_and_values = _elements(profiles, stage.model, request.height_px, request.width_px)
        gathered = keys_and_values * latents * 2.0 if stage.method in GATHERING_METHODS else 0.0
        most_alive = max(most_alive, widest * latents * 2.0 * LIVE_ACTIVATIONS + gathered)
    return total + most_alive


@derived()
def _elements(profiles: Profiles, model: str, height_px: int, width_px: int) -> tuple[int, int]:
    """Elements of a model's widest activation, and of all keys and values of its self-attention, for one latent."""
    layers = unet_layers(profiles.model(model).config, height_px, width_px)
    return max(layer.out_elements for layer in layers), sum(layer.kv_elements for layer in layers)


def request_of(name: str, spec: RequestClass) -> Request:
    """The request that a class of the scenario stands for."""
    return Request(
        model=spec.model,
        height_px=spec.height_px,
        width_px=spec.width_px,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        num_images=spec.num_images,
        sampler=spec.sampler,
        request_class=name,
        slo_s=spec.slo_s,
        quality_floor=spec.quality_floor,
        priority=spec.priority,
    )


def pool_site(name: str, pool: Pool) -> Site:
    """A node of the pool as a site of plans."""
    return Site(
        name=name,
        tier="cloud",
        device=pool.gpu,
        runtime=pool.runtime,
        precision=pool.precision,
        gpus_per_node=pool.gpus_per_node,
        interconnect=pool.interconnect,
        purchase=pool.purchase,
        provider=pool.provider,
        usd_per_device_hour=pool.usd_per_gpu_hour,
    )


def fleet_site(name: str, fleet: EdgeFleet, profiles: Profiles) -> Site:
    """A device of the edge fleet as a site of plans, with its own default runtime unless the scenario names one."""
    device = profiles.edge_device(fleet.device)
    return Site(
        name=name,
        tier="edge",
        device=fleet.device,
        runtime=fleet.runtime or device.default_runtime,
        precision=fleet.precision or device.default_precision,
        power_w=fleet.power_w,
    )


def enumerate_plans(scenario: Scenario, profiles: Profiles, class_name: str) -> Iterator[Plan]:
    """Every plan that the scenario's search space spans for a class, legal or not."""
    spec = scenario.requests[class_name]
    steps = spec.num_inference_steps
    fleet = scenario.edge[spec.origin]
    edge = fleet_site(spec.origin, fleet, profiles)
    encode_at = {True: edge.name, False: ""}[fleet.encodes_prompt]
    clouds = tuple(_cloud_stages(scenario, spec.model, steps))
    wanted: Iterable[int] = range(0, steps, DEFAULT_SWITCH_STRIDE)
    if scenario.search.switch_steps is not None:
        wanted = scenario.search.switch_steps
    # Strictly inside the request: at the ends lie the edge-only and cloud-only plans.
    switches = tuple(product(sorted({k for k in wanted if 0 < k < steps}), spec.small_models))
    caps = sorted(set(scenario.search.batch_caps))
    for vae in scenario.search.vaes:
        for model in dict.fromkeys((spec.model, *spec.small_models)):
            stage = Stage(start=0, stop=steps, model=model, site=edge)
            yield Plan(stages=(stage,), text_encode_site=edge.name, vae_site=edge.name, vae=vae, network=fleet.network)
        for cloud, cap in product(clouds, caps):
            site = cloud.site.name
            shared: dict[str, Any] = {"vae": vae, "network": fleet.network, "batch_cap": cap}
            yield Plan(stages=(cloud,), text_encode_site=site, vae_site=site, **shared)
            yield Plan(stages=(cloud,), text_encode_site=site, vae_site=edge.name, extra_sites=(edge,), **shared)
            how: dict[str, Any] = {"method": cloud.method, "degree": cloud.degree, "options": cloud.options}
            for k, small in switches:
                large = Stage(start=0, stop=k, model=cloud.model, site=cloud.site, **how)
                stages = (large, Stage(start=k, stop=steps, model=small, site=edge))
                yield Plan(stages=stages, text_encode_site=encode_at or site, vae_site=edge.name, **shared)


def _cloud_stages(scenario: Scenario, model: str, steps: int) -> Iterator[Stage]:
    for name, pool in scenario.pools.items():
        site = pool_site(name, pool)
        yield Stage(start=0, stop=steps, model=model, site=site)
        for method, degree in product(scenario.search.methods, scenario.search.degrees):
            if method == "single" or degree == 1:
                continue
            # every combination of the option values that the search allows; the defaults alone without any
            allowed = sorted(scenario.search.options.get(method, {}).items())
            for values in product(*(each for _, each in allowed)):
                options = tuple((key, value) for (key, _), value in zip(allowed, values, strict=True))
                yield Stage(start=0, stop=steps, model=model, site=site, method=method, degree=degree, options=options)
