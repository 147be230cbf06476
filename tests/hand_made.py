"""A capacity plan made by hand, without optimiser or event loop, that reports and their tests start from.

A phone class is handed over, a laptop class runs at the edge on a device whose power nobody knows, and a studio class
runs on two GPUs with a quality that nobody published. Records are made by a small queue of their own and keep the laws.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np

from hybridsd_sim import Plan, Request, Scenario, Site, Stage, load_scenario
from hybridsd_sim.estimate import Estimate
from hybridsd_sim.plan import Deployment
from hybridsd_sim.planning import CapacityPlan, Confidence, EvaluatedPlan, Variation
from hybridsd_sim.planning.capacity_plan import Margin, Relaxation, Saving
from hybridsd_sim.pricing import Candidate, Part, PlanCost
from hybridsd_sim.pricing.quality import Quality, with_interval
from hybridsd_sim.simulation import IN_FLIGHT, SERVED, UNSERVED, PlanFacts, Records, RunRecorder, SimResult, check_laws

SCENARIO = """
name: by-hand
seed: 3
horizon_s: 600
warmup_s: 60
replications: 2
requests:
  phone: &picture
    origin: phones
    model: sd14
    small_models: [hybrid-sd-224m]
    height_px: 512
    width_px: 512
    num_inference_steps: 25
    arrivals: {process: poisson, rate_per_s: 0.5}
    slo_s: 8.0
    quality_floor: 0.285
  laptop: {<<: *picture, origin: laptops, slo_s: 12.0, quality_floor: 0.25}
  studio: {<<: *picture, origin: laptops, model: sdxl, slo_s: null, quality_floor: null}
edge:
  phones: {device: snapdragon-8-gen-3, replicas: 5000, network: wifi5}
  laptops: {device: snapdragon-x-elite, replicas: 5000, network: wifi6}
pools:
  a100: {gpu: a100-sxm-80gb, gpus_per_node: 4, replicas_max: 4}
  l40s: {gpu: l40s, replicas_max: 4}
"""


def hand_made_scenario(folder: Path) -> Scenario:
    """The scenario of the plan made by hand, written to a folder and read again."""
    path = folder / "by-hand.yaml"
    path.write_text(SCENARIO)
    return load_scenario(path)


PHONE, LAPTOP = (
    Site(name=name, tier="edge", device=device, runtime="qnn")
    for name, device in (("phones", "snapdragon-8-gen-3"), ("laptops", "snapdragon-x-elite"))
)
A100 = Site(name="a100", tier="cloud", device="a100-sxm-80gb", gpus_per_node=4, interconnect="nvlink3-switch")
TABLE = "Qualcomm AI Hub, Stable Diffusion 1.5, https://aihub.qualcomm.com/models/stable_diffusion_v1_5"
PAPER = "DistriFusion (arXiv 2402.19481, table 2)"
RENT = 4 * 1.5
SAVINGS = (
    Saving("cloud only", True, "", 6.0, 0.5, -0.0229),
    Saving("edge only", False, "phone: 61.0% inside 8 s, promised 95%", -6.0, None, None),
)
BOUND = 5.7
MARGINS = (
    Margin("one more second of SLO", "usd_per_hour", 6.02, 5.09),
    Margin("0.005 more CLIP", "usd_per_hour", 6.02, 8.02),
    Margin("one more dollar an hour", "latency_p95_s", 2.5, 1.7),
    Margin("one more joule at the edge", "usd_per_hour", 6.02, 6.02),
    Margin("twice the traffic", "usd_per_hour", 6.02, None),
)
CONFLICT = (
    Relaxation("SLO of phone", 8.0, 9.25, "s"),
    Relaxation("quality floor of phone", 0.285, 0.28501, "CLIP"),
    Relaxation("budget", 4.0, None, "USD/h"),
)
CONFIDENCE = Confidence(0.87, 0.9, 200, {"phone": 0.88, "laptop": 0.99, "studio": 1.0}, "screened")


def part(name, site, seconds, kind="quoted", **more):
    """A part that holds a GPU gang at 1.5 dollars a GPU-hour, or a device at 4 watts."""
    cloud = site.tier == "cloud"
    devices = more.pop("devices", 1)
    usd = 1.5 * devices * seconds / 3600 if cloud else 0.0
    energy = 0.0 if cloud else 4.0 * seconds
    known = {"low": 0.9 * seconds, "high": 1.1 * seconds, "kind": kind, "sources": (TABLE,)}
    known |= {key: more.pop(key) for key in ("low", "high", "sources", "note", "within") if key in more}
    charged = {"usd": usd, "energy_j": energy} | more
    return Part(
        name=name, where=site.name, tier=site.tier, seconds=Estimate(seconds, **known), devices=devices, **charged
    )


def handed_over(k):
    """The phone's plan at switch step k of 25, at 0.06 s a step in the cloud and 0.1 s at the edge."""
    first, second = (
        Stage(start=0, stop=k, model="sd14", site=A100),
        Stage(start=k, stop=25, model="hybrid-sd-224m", site=PHONE),
    )
    stages = tuple(stage for stage in (first, second) if stage.num_steps > 0)
    site = stages[0].site.name
    plan = Plan(stages=stages, text_encode_site=site, vae_site=stages[-1].site.name, network="wifi5")
    cloud = [part("text_encode", A100, 0.02, "modelled"), part("denoise", A100, 0.06 * k, "measured")] if k else []
    link = Part(name="handover", where="wifi5", tier="network", seconds=Estimate(0.05, 0.02, 0.2), bytes_down=32768)
    edge = [
        part("denoise", PHONE, 0.1 * (25 - k)),
        part("vae_decode", PHONE, 0.4, "modelled", sources=(), note="a rule"),
    ]
    return candidate("phone", plan, [*cloud, link, *(edge if k < 25 else [])], 0.2611 + 0.0382 * k / 25)


def at_the_edge():
    """The laptop's plan: everything on a device whose power nobody knows."""
    plan = Plan(
        stages=(Stage(start=0, stop=25, model="sd14", site=LAPTOP),), text_encode_site="laptops", vae_site="laptops"
    )
    unknown = {"energy_j": None, "note": "scaled by FLOPs", "unknown": "no power figure for snapdragon-x-elite"}
    parts = [part("denoise", LAPTOP, 5.0, **unknown), part("vae_decode", LAPTOP, 0.5, **unknown, within=False)]
    return candidate("laptop", plan, parts, 0.2993)


def in_the_cloud():
    """The studio's plan: two GPUs, with a warm-up phase, and a quality that nobody published."""
    stage = Stage(
        start=0, stop=25, model="sdxl", site=A100, method="distrifusion", degree=2, options=(("warmup_steps", 5),)
    )
    plan = Plan(stages=(stage,), text_encode_site="a100", vae_site="a100", network="wifi6")
    parts = [
        part("denoise_warmup", A100, 1.0, "modelled", devices=2, sources=(PAPER,)),
        part("denoise", A100, 3.0, "modelled", devices=2, sources=(PAPER,)),
        part("vae_decode", A100, 0.2, devices=2),
        Part(
            name="image_transfer",
            where="wifi6",
            tier="network",
            seconds=Estimate(0.3, 0.1, 0.9, "quoted"),
            usd=1e-5,
        ),
    ]
    return candidate("studio", plan, parts, None)


def candidate(request_class, plan, parts, clip):
    """A candidate from its parts."""
    note = "no published CLIP score for sdxl"
    score = Estimate(clip, kind="quoted", sources=("Hybrid SD (arXiv 2408.06646)",)) if clip else Estimate.unknown(note)
    quality = Quality(with_interval(score, "clip"))
    cost = PlanCost(
        plan=plan, request=Request(model=plan.stages[0].model, num_inference_steps=25, request_class=request_class),
        parts=tuple(parts), quality=quality, flops=1e13, flops_without_attention_products=9e12,
    )  # fmt: skip
    cloud, edge = plan.cloud_stages, plan.edge_stages
    return Candidate(
        request_class=request_class,
        plan=plan,
        cost=cost,
        pool_index=0 if cloud else -1,
        fleet_index=(1 if request_class == "laptop" else 0) if edge else -1,
        degree=max((stage.degree for stage in cloud), default=0),
        cloud_s=sum(p.seconds.value for p in parts if p.tier == "cloud"),
        edge_s=sum(p.seconds.value for p in parts if p.tier == "edge"),
        latency_s=cost.latency_s,
        usd_or_inf=cost.usd or 0.0,
        quality=clip,
        cloud_steps=sum(stage.num_steps for stage in cloud),
        edge_steps=sum(stage.num_steps for stage in edge),
        meets_slo=True,
        keeps_limits=True,
        batch_s=(sum(p.seconds.value for p in parts if p.tier == "cloud"),),
    )


def records(scenario, options, replication, nodes, *, refuse=0.0):
    """One replication of the plans on `nodes` nodes of four GPUs, first come first served, checked against the laws."""
    random = np.random.default_rng(replication)
    names = tuple(scenario.requests)
    recorder = RunRecorder(
        Records(names, ("a100", "l40s"), ("phones", "laptops"), (), ("no_candidate",), replication), 600.0
    )
    plans = {name: recorder.add_plan(facts(option)) for name, option in options.items()}
    free = np.zeros((nodes, 4))
    for number, arrival in enumerate(np.sort(random.uniform(0.0, 600.0, 400))):
        name = names[int(random.integers(len(names)))]
        deadline = arrival + (scenario.requests[name].slo_s or inf)
        if name not in options or random.random() < refuse:
            times = (nan,) * 7
            recorder.write((number, names.index(name), -1, UNSERVED, 0, arrival, *times, deadline, 0.0, 0.0, -1, -1))
        else:
            index = names.index(name)
            recorder.write((number, index, plans[name], *served(options[name], arrival, deadline, free, number)))
    done = recorder.close()
    check_laws(done, {"a100": 4 * nodes, "l40s": 0}, {"phones": 5000, "laptops": 5000})
    return done


def served(option, arrival, deadline, free, number):
    """The rest of a request's row: its times, link seconds, node and device."""
    times, link, node = dict.fromkeys(("ready", "start", "stop"), nan), 0.0, -1
    now = arrival
    if option.pool_index >= 0:
        node = int(np.argmin(np.sort(free, axis=1)[:, option.degree - 1]))
        slots = np.argsort(free[node], kind="stable")[: option.degree]
        start = max(now, free[node][slots].max())
        times = {"ready": now, "start": start, "stop": start + option.cloud_s}
        free[node][slots] = times["stop"]
        link = sum(p.seconds.value for p in option.cost.parts if p.tier == "network")
        now = times["stop"] + link
    edge = (now, now, now + option.edge_s) if option.fleet_index >= 0 else (nan,) * 3
    finish = now if option.fleet_index < 0 else edge[2]
    status = SERVED if finish <= 600.0 else IN_FLIGHT
    device = number if option.fleet_index >= 0 else -1
    return status, -1, arrival, *times.values(), *edge, finish, deadline, 0.0, link, node, device


def facts(option):
    """What the book needs to know of a plan."""
    cost = option.cost
    return PlanFacts(
        option.plan.label, option.degree, option.pool_index, option.fleet_index, nan if cost.usd is None else cost.usd,
        1.5 / 3600, nan if cost.edge_energy_j is None else cost.edge_energy_j, cost.bytes_down,
        nan if option.quality is None else option.quality,
    )  # fmt: skip


def run(scenario, options, nodes, *, policy="planned", refuse=0.0):
    """A simulation result over all replications."""
    done = tuple(records(scenario, options, r, nodes, refuse=refuse) for r in range(scenario.replications))
    used = {(option.request_class, option.plan.label): option for option in options.values()}
    return SimResult(scenario, policy, scenario.seed, {"a100": nodes, "l40s": 0}, done, used, RENT * nodes, 0)


def evaluated(name, result, *, feasible=True):
    """A simulated plan's figures."""
    everyone = result.summary.xs("all", level="request_class").iloc[0]
    latency, share = (
        tuple(float(everyone[f"{key}{end}"]) for end in ("", "_low", "_high"))
        for key in ("latency_p95_s", "slo_attainment")
    )
    deployment = Deployment(dict(result.replicas), {})
    labels = dict(result.used.keys())
    reason = "every promise is kept" if feasible else "phone: 61.0% inside 8 s, promised 95%"
    return EvaluatedPlan(
        name, deployment, "simulate", result.usd_per_hour, latency, share, 0.2993, 1.1, None, feasible, reason, labels
    )


def hand_made_plan(scenario, profiles_digest="0" * 64):
    """The capacity plan made by hand, as if with the profiles of this digest."""
    chosen = {"phone": handed_over(10), "laptop": at_the_edge(), "studio": in_the_cloud()}
    cloud = {**chosen, "phone": handed_over(25)}
    edge = {"phone": handed_over(0), "laptop": at_the_edge()}
    results = {"cloud only": run(scenario, cloud, 2), "edge only": run(scenario, edge, 0, refuse=0.1)}
    best = run(scenario, chosen, 1)
    point = EvaluatedPlan(
        "frontier", None, "formula", 5.0, (6.0, nan, nan), (0.97, nan, nan), 0.29, 1.0, 2.0, True, "by formula", {}
    )
    frontier = tuple(
        replace(point, usd_per_hour=6.0 + 2 * n, latency_p95_s=(7.0 - n, nan, nan), quality=0.28 + n / 200)
        for n in range(4)
    )
    baselines = [evaluated(name, result, feasible=name != "edge only") for name, result in results.items()]
    nearly = replace(frontier[1], name="only pool l40s", labels={"phone": "sd14 on l40s"})
    screened = replace(
        evaluated("", best, feasible=False), level="screen", usd_per_hour=6.5, latency_p95_s=(8.8, 8.1, 9.7),
        slo_attainment=(0.913, 0.89, 0.93),
    )  # fmt: skip
    overloaded = replace(screened, latency_p95_s=(inf, nan, nan), slo_attainment=(0.25, nan, nan), level="formula")
    refused = "degree: 8; a gang stays inside one node | a100 has 4 GPUs a node"
    return CapacityPlan(
        scenario=scenario,
        feasible=True,
        explanation=("Rent one node.", "It costs 50% less than cloud only."),
        deployment=Deployment.pure({"a100": 1, "l40s": 0}, {name: option.plan for name, option in chosen.items()}),
        mixes={name: ((1.0, option),) for name, option in chosen.items()},
        chosen_result=best,
        frontier=frontier,
        baselines=tuple(baselines),
        baseline_results=results,
        alternatives=(nearly,),
        evidence=(evaluated("0 of a100: too few", results["edge only"], feasible=False), evaluated("chosen", best)),
        switch_curve={"phone": tuple(handed_over(k) for k in (0, 5, 10, 15, 20, 25))},
        refusals={("studio", refused): 3},
        profiles_digest=profiles_digest,
        bound_usd_per_hour=BOUND,
        cost_usd_per_hour=RENT + 0.01,
        margins=MARGINS,
        sensitivity=(
            Variation("traffic -10%", evaluated("", results["cloud only"])), Variation("traffic +10%", screened),
            Variation("traffic +100%", overloaded),
        ),
        confidence=CONFIDENCE,
        robust=(Variation("busy", evaluated("", best)), Variation("lossy", screened)),
        savings=SAVINGS,
    )  # fmt: skip
