"""Random scenarios that are small enough to try every plan on every fleet: `random_scenario(seed)`.

SD 1.x for phones, boards and desktops on one or two pools. A scenario has between some dozens and a few thousand pairs
of one plan a class and a fleet; one simulation of it carries 1,000 to 2,000 requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridsd_sim import Scenario

GPUS: dict[str, tuple[dict[str, Any], float]] = {
    "a100": ({"gpu": "a100-sxm-80gb", "runtime": "compiled"}, 0.64),
    "h100": ({"gpu": "h100-sxm", "runtime": "compiled"}, 0.40),
    "l40s": ({"gpu": "l40s", "runtime": "tensorrt", "interconnect": "pcie4"}, 0.45),
    "rtx-4090": ({"gpu": "rtx-4090", "runtime": "compiled", "interconnect": "pcie4"}, 0.60),
    "a10g": ({"gpu": "a10g", "runtime": "compiled", "interconnect": "pcie4"}, 1.53),
    "l4": ({"gpu": "l4", "runtime": "cudagraph", "interconnect": "pcie4"}, 1.23),
}
"""Pools, and about how many seconds a GPU takes for a 512 px picture in 25 steps: to choose rates that fit."""
EDGES: dict[str, tuple[str, tuple[str, ...], float, float]] = {
    "elite": ("snapdragon-8-elite", ("5g", "wifi6"), 4.2, 31.0),
    "gen3": ("snapdragon-8-gen-3", ("lte", "5g", "wifi5"), 5.6, 42.0),
    "mid-range": ("snapdragon-7-gen-4", ("lte", "wifi5"), 12.3, 92.0),
    "iphone": ("iphone-14-pro-max", ("5g", "wifi6"), 9.0, 70.0),
    "board": ("jetson-agx-orin", ("ethernet", "wifi6"), 1.9, 111.0),
    "desktop": ("rtx-3060", ("ethernet", "wifi6"), 3.0, 504.0),
}
"""Devices, their networks, and about how many seconds and joules they take for that picture alone: likewise."""
SMALL_MODELS = ("hybrid-sd-224m", "bk-sdm-tiny", "bk-sdm-small")
FLOORS = (None, 0.265, 0.27, 0.275, 0.28, 0.285, 0.29, 0.298)
LAYOUTS = ("gangs", "two pools", "two classes", "two of both", "day")
"""Two classes on gangs of one or two GPUs; one on two such pools; two classes on one pool or two; a heavy day."""
REQUESTS = 1400
"""Requests of one simulation, about."""
HEAVY = 46.0
"""Work of four pictures of 1024 px in 50 steps, against one of 512 px in 25."""
DAY_S = 86_400.0


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed; layouts take turns, so that five seeds in a row have them all."""
    rng = np.random.default_rng([20_26, seed])
    layout = LAYOUTS[seed % len(LAYOUTS)]
    pools = _pools(rng, layout)
    edge = _edge(rng, layout)
    fastest_s = min(GPUS[name][1] for name in pools)
    requests = _requests(rng, layout, list(edge), fastest_s=fastest_s, capacity_per_s=_capacity_per_s(pools))
    total_per_s = sum(spec["arrivals"]["rate_per_s"] for spec in requests.values())
    replications = 1 if layout == "day" else 2
    longest_s = max(spec["slo_s"] or 0.0 for spec in requests.values())
    horizon_s = max(REQUESTS / replications / total_per_s, 10.0 * longest_s)
    horizon_s = DAY_S if layout == "day" else round(horizon_s, 1)
    gangs = layout in {"gangs", "two pools"}
    return Scenario(
        name=f"random-{seed}",
        seed=seed,
        horizon_s=horizon_s,
        warmup_s=round(0.1 * horizon_s, 1),
        replications=replications,
        requests=requests,  # type: ignore[arg-type]
        edge=edge,  # type: ignore[arg-type]
        pools=pools,  # type: ignore[arg-type]
        budget=_budget(rng, pools),  # type: ignore[arg-type]
        search={  # type: ignore[arg-type]
            "switch_steps": tuple(2 * k if layout == "day" else k for k in (0, 5, 10, 15, 20, 25)),
            "methods": ("single", str(rng.choice(["distrifusion", "cfg_parallel"]))) if gangs else ("single",),
            "degrees": (1, 2) if gangs else (1,),
        },
    )


def _pools(rng: np.random.Generator, layout: str) -> dict[str, dict[str, Any]]:
    count = 2 if layout in {"two pools", "two of both"} else 1
    heavy = layout == "day"
    names = rng.choice(["a10g", "l4"] if heavy else list(GPUS), size=count, replace=False)
    pools = {}
    for name in map(str, names):
        pool = {**GPUS[name][0], "replicas_max": int(rng.integers(3, 5) if count == 2 else rng.integers(4, 7))}
        if layout in {"gangs", "two pools"} or rng.random() < 0.2:
            pool["gpus_per_node"] = 2
        pool["discipline"] = str(rng.choice(["fifo", "gang_fifo"]))
        if rng.random() < 0.4:
            pool["usd_per_gpu_hour"] = round(float(rng.uniform(0.5, 5.0)), 2)
        if heavy and rng.random() < 0.5:
            pool["purchase"] = "spot"
        pools[name] = pool
    return pools


def _edge(rng: np.random.Generator, layout: str) -> dict[str, dict[str, Any]]:
    count = 1 if layout in {"two pools", "day"} else 2
    names = ["desktop"] if layout == "day" else map(str, rng.choice(list(EDGES), size=count, replace=False))
    edge = {}
    for name in names:
        device, networks, _, _ = EDGES[name]
        few = rng.random() < 0.25
        edge[name] = {
            "device": device,
            "network": str(rng.choice(networks)),
            "replicas": int(rng.integers(20, 60)) if few else 20_000,
            "ownership": "shared" if few and rng.random() < 0.5 else "user",
        }
    return edge


def _capacity_per_s(pools: dict[str, dict[str, Any]]) -> float:
    """Light requests a second that all nodes of all pools can serve without the edge, about."""
    return sum(pool["replicas_max"] * pool.get("gpus_per_node", 1) / GPUS[name][1] for name, pool in pools.items())


def _requests(
    rng: np.random.Generator, layout: str, origins: list[str], *, fastest_s: float, capacity_per_s: float
) -> dict[str, dict[str, Any]]:
    heavy = layout == "day"
    work = HEAVY if heavy else 1.0
    demand = capacity_per_s / work * float(rng.uniform(0.2, 1.1)) / len(origins)
    requests = {}
    for index, origin in enumerate(origins):
        size_px, steps, images = (1024, 50, 4) if heavy else (512, 25, 1)
        _, _, edge_s, edge_j = EDGES[origin]
        models = 2 if layout in {"two classes", "day"} else 1
        slo_s = work * max(1.4 * fastest_s + 0.1, edge_s * float(np.exp(rng.uniform(np.log(0.2), np.log(1.5)))))
        requests[f"class-{index}"] = {
            "origin": origin,
            "model": "sd14",
            "small_models": tuple(map(str, rng.choice(SMALL_MODELS, size=models, replace=False))),
            "height_px": size_px,
            "width_px": size_px,
            "num_inference_steps": steps,
            "num_images": images,
            "guidance_scale": 7.0,
            "sampler": str(rng.choice(["ddim", "dpmsolver++"])),
            "arrivals": _arrivals(rng, layout, demand),
            "slo_s": None if rng.random() < 0.05 else round(slo_s, 2),
            "slo_percentile": float(rng.choice([90.0, 95.0, 99.0], p=[0.25, 0.6, 0.15])),
            "quality_floor": FLOORS[rng.integers(len(FLOORS))],
            "edge_energy_j": round(edge_j * work / images * float(rng.uniform(0.1, 0.9)), 1)
            if rng.random() < 0.6
            else None,
        }
    return requests


def _arrivals(rng: np.random.Generator, layout: str, rate_per_s: float) -> dict[str, Any]:
    rate = {"rate_per_s": round(rate_per_s, 4)}
    if layout == "day":
        return {**rate, "process": "daily", "peak_to_mean": round(float(rng.uniform(1.3, 2.0)), 2)}
    turn = rng.random()
    if turn < 0.25:
        return {**rate, "process": "gamma", "cv": 2.0}
    return {**rate, "process": "constant" if turn < 0.35 else "poisson"}


def _budget(rng: np.random.Generator, pools: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sometimes a limit on dollars, which may be too low for any plan."""
    if rng.random() < 0.6:
        return {}
    if rng.random() < 0.5:
        return {"usd_per_hour": round(float(rng.uniform(1.0, 12.0)) * len(pools), 2)}
    return {"usd_per_image": float(f"{np.exp(rng.uniform(np.log(1e-4), np.log(2e-3))):.3g}")}
