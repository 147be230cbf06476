"""A scenario of many request classes on six pools: what the planner must build and solve in seconds."""

from __future__ import annotations

from typing import Any

from hybridsd_sim import Scenario

POOLS: dict[str, dict[str, Any]] = {
    "a100": {"gpu": "a100-sxm-80gb", "gpus_per_node": 8, "runtime": "cudagraph"},
    "a100-spot": {"gpu": "a100-sxm-80gb", "gpus_per_node": 8, "runtime": "cudagraph", "purchase": "spot"},
    "a100-pcie": {"gpu": "a100-pcie-80gb", "gpus_per_node": 4, "runtime": "cudagraph"},
    "h100": {"gpu": "h100-sxm", "gpus_per_node": 8, "runtime": "compiled"},
    "l40s": {"gpu": "l40s", "gpus_per_node": 4, "runtime": "compiled"},
    "a10g": {"gpu": "a10g", "gpus_per_node": 1, "runtime": "compiled"},
}
EDGE: dict[str, dict[str, Any]] = {
    "phones": {"device": "snapdragon-8-elite", "replicas": 20_000, "network": "5g"},
    "old-phones": {"device": "snapdragon-8-gen-3", "replicas": 20_000, "network": "wifi5"},
    "desks": {"device": "rtx-4080", "replicas": 500, "network": "ethernet"},
    "gaming": {"device": "rtx-4090", "replicas": 500, "network": "wifi6"},
}
SMALL_MODELS = ("hybrid-sd-224m", "bk-sdm-tiny", "bk-sdm-small")
"""Followers of SD 1.4 with published quality."""
STEPS = (50, 40, 30, 28, 26)
"""Every switch step up to 25 lies inside each of them."""
HEIGHTS_PX = {"sd14": (512, 1024), "sdxl": (1024, 2048)}
"""Heights whose rows divide over eight stripes."""
SECONDS_PER_MEGAPIXEL_STEP = {"sd14": 0.12, "sdxl": 0.12}
"""What is promised, so that the edge may do some of the steps and not all."""


def big_scenario(classes: int) -> Scenario:
    """Classes of SD 1.x and SDXL in turn, no two alike, with switch steps 0 to 25, five methods and four degrees.

    About 1,300 of 2,200 plans a class are legal. Rates fall with the work of a picture, so that all classes need
    capacity of one order.
    """
    return Scenario(
        name="big",
        seed=1,
        horizon_s=3600.0,
        warmup_s=360.0,
        requests={f"class-{index:02}": _request_class(index) for index in range(classes)},  # type: ignore[arg-type]
        edge=EDGE,  # type: ignore[arg-type]
        pools={name: {**pool, "replicas_max": 200} for name, pool in POOLS.items()},  # type: ignore[arg-type]
        search={
            "switch_steps": tuple(range(26)),
            "methods": ("single", "cfg_parallel", "distrifusion", "pcpp", "asyncdiff"),
            "degrees": (1, 2, 4, 8),
        },  # type: ignore[arg-type]
    )


def _request_class(index: int) -> dict[str, Any]:
    """SD 1.4 for even numbers and SDXL for odd ones; size, steps, edge and promise change with the number."""
    model, turn = ("sd14", "sdxl")[index % 2], index // 2
    height_px = HEIGHTS_PX[model][turn % 5 == 0]
    width_px = height_px + 64 * (turn % 8)
    steps = STEPS[turn % len(STEPS)]
    work = height_px * width_px / 2**20 * steps
    small = SMALL_MODELS[turn % len(SMALL_MODELS)] if model == "sd14" else "koala-700m"
    return {
        "origin": list(EDGE)[2 * (index % 2) + turn % 2],
        "model": model,
        "small_models": (small,),
        "height_px": height_px,
        "width_px": width_px,
        "num_inference_steps": steps,
        "guidance_scale": 7.0,
        "sampler": "dpmsolver++" if turn % 2 else "ddim",
        "arrivals": {"process": "poisson", "rate_per_s": round((20.0 if model == "sd14" else 5.0) / work, 3)},
        "slo_s": round(2.0 + SECONDS_PER_MEGAPIXEL_STEP[model] * work, 1),
        "quality_floor": {"sd14": 0.285, "sdxl": 0.335}[model] if turn % 3 else None,
    }
