"""Which rules a plan must keep: node size, its method's rules, a shared latent space, memory on every device.

Every rule is stated once; each refusal carries place, value, rule and remedy.
"""

from __future__ import annotations

from hybridsd_sim.errors import Problem
from hybridsd_sim.methods import find_method
from hybridsd_sim.plan import Plan, Request, Site, Stage
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.roofline import ELEMENT_BYTES
from hybridsd_sim.steps import denoising

LIVE_ACTIVATIONS = 4
"""Activations of the widest layer alive at once in a UNet call. Modelled: input, output, skip, workspace."""


def plan_problems(plan: Plan, request: Request, profiles: Profiles) -> list[Problem]:
    """Every rule that a plan breaks: node size, method, shared latent space, memory on each device."""
    problems: list[Problem] = []
    for stage in plan.stages:
        problems += _node_problems(stage)
        job = denoising(stage, request, profiles)
        problems += find_method(stage.method).problems(job, stage.degree, dict(stage.options))
    problems += _latent_problems(plan, profiles)
    return problems or _memory_problems(plan, request, profiles)


def _node_problems(stage: Stage) -> list[Problem]:
    if stage.degree <= stage.site.gpus_per_node:
        return []
    rule = f"a gang stays inside one node; {stage.site.name} has {stage.site.gpus_per_node} GPUs a node"
    return [Problem("degree", str(stage.degree), rule, "Lower the degree or raise gpus_per_node.")]


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


def _memory_problems(plan: Plan, request: Request, profiles: Profiles) -> list[Problem]:
    problems = []
    for site in plan.sites.values():
        have = _usable_bytes(site, profiles)
        need = needed_bytes(plan, site, request, profiles)
        if have is not None and need > have:
            rule = f"needs {need / 2**30:.1f} GiB there, of which {have / 2**30:.1f} GiB are usable"
            problems.append(
                Problem(f"memory of {site.name}", site.device, rule, "Use a smaller model or device memory.")
            )
    return problems


def _usable_bytes(site: Site, profiles: Profiles) -> float | None:
    device = profiles.device(site.device) if site.tier == "cloud" else profiles.edge_device(site.device)
    return None if device.memory_gib is None else device.memory_gib * device.usable_memory_fraction * 2**30


def needed_bytes(plan: Plan, site: Site, request: Request, profiles: Profiles) -> float:
    """Bytes that one device of a site must hold.

    UNet and text-encoder weights, the VAE, activations, and the keys and values that a method gathers. Modelled:
    weights at the site's precision, `LIVE_ACTIVATIONS` copies of the widest activation, fp16 VAE activations.
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
    return total + max((_activation_bytes(stage, request, profiles) for stage in stages), default=0.0)


def _activation_bytes(stage: Stage, request: Request, profiles: Profiles) -> float:
    layers = profiles.model(stage.model).layers(request.height_px, request.width_px)
    latents = request.unet_batch if stage.site.tier == "cloud" else request.num_images
    widest = max(layer.out_elements for layer in layers) * latents * 2.0 * LIVE_ACTIVATIONS
    gathered = sum(layer.kv_elements for layer in layers) * latents * 2.0
    return widest + (gathered if stage.method in {"distrifusion", "pcpp"} else 0.0)
