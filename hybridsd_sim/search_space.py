"""Every plan that a scenario's search space spans for a request class, legal or not.

Cloud-only, edge-only and hybrid plans over pools, parallel methods, degrees, their options, switch steps, small models,
VAEs and batch caps, as the scenario's `search` allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from hybridsd_sim.plan import Options, Plan, Request, Site, Stage
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import EdgeFleet, Pool, RequestClass, Scenario

DEFAULT_SWITCH_STRIDE = 5
"""Without `search.switch_steps` every fifth step is a candidate, as in Hybrid SD's published tables."""


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
    switches = tuple(product(_switch_steps(scenario, steps), spec.small_models))
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
            for k, small in switches:
                second = Stage(start=k, stop=steps, model=small, site=edge)
                stages = (_until(cloud, k), second)
                yield Plan(stages=stages, text_encode_site=encode_at or site, vae_site=edge.name, **shared)


def _until(stage: Stage, stop: int) -> Stage:
    return Stage(
        start=0,
        stop=stop,
        model=stage.model,
        site=stage.site,
        method=stage.method,
        degree=stage.degree,
        options=stage.options,
    )


def _switch_steps(scenario: Scenario, steps: int) -> list[int]:
    """Switch steps strictly inside the request: the ends are edge-only and cloud-only."""
    wanted: Iterable[int] = range(0, steps, DEFAULT_SWITCH_STRIDE)
    if scenario.search.switch_steps is not None:
        wanted = scenario.search.switch_steps
    return sorted({k for k in wanted if 0 < k < steps})


def _cloud_stages(scenario: Scenario, model: str, steps: int) -> Iterator[Stage]:
    for name, pool in scenario.pools.items():
        site = pool_site(name, pool)
        yield Stage(start=0, stop=steps, model=model, site=site)
        for method, degree in product(scenario.search.methods, scenario.search.degrees):
            if method == "single" or degree == 1:
                continue
            for options in _option_grid(scenario, method):
                yield Stage(start=0, stop=steps, model=model, site=site, method=method, degree=degree, options=options)


def _option_grid(scenario: Scenario, method: str) -> list[Options]:
    """Every combination of the option values that the search allows for a method; its defaults alone without any."""
    allowed = scenario.search.options.get(method, {})
    keys = sorted(allowed)
    return [tuple(zip(keys, values, strict=True)) for values in product(*(allowed[key] for key in keys))]
