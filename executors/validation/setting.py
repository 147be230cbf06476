"""What is run in a calibration: the scenario and the plan of each kind of serving, and the rate of each load.

Nothing here is measured: how long a request holds its worker comes from the cost rows of the profiles that are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.plan import Deployment, Plan, Stage
from hybridsd_sim.pricing import Candidate, fleet_site, make_candidate, pool_site, request_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario

from .testbed import CLOUD, EDGE, LARGE, SIZE_PX, SMALL, VAE

REQUEST_CLASS, POOL, FLEET = "picture", "cloud", "edge"

NETWORK = "wifi6"

SLO_LATENCIES = 3.0
"""The promise, in latencies of a request that has everything to itself: at high load some requests miss it."""

LONGEST_S = 3600.0
"""Nobody waits longer than this behind the last arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way of serving: how many steps a picture has, where they are done, and by how many ranks."""

    name: str
    num_inference_steps: int
    in_cloud: bool = False
    at_edge: bool = False
    method: str = "single"
    degree: int = 1


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="cloud", num_inference_steps=2, in_cloud=True),
        Kind(name="edge", num_inference_steps=3, at_edge=True),
        Kind(name="hybrid", num_inference_steps=5, in_cloud=True, at_edge=True),
        Kind(name="parallel", num_inference_steps=3, in_cloud=True, method="cfg_parallel", degree=2),
    )
}
"""Each holds its busiest worker for a sixth of a second or so: the shorter, the more requests an hour."""


def kind_of(name: str) -> Kind:
    """A kind by its name. Raises `InputError` for others."""
    if name not in KINDS:
        raise InputError(unknown_name("--kinds", name, tuple(KINDS)))
    return KINDS[name]


def scenario_of(
    kind: Kind, *, arrivals: Mapping[str, Any], span_s: float, seed: int = 1, slo_s: float | None = None
) -> Scenario:
    """The scenario of a kind whose last request arrives after `span_s`; all of them end within the horizon."""
    picture = {
        "origin": FLEET, "model": LARGE, "small_models": [SMALL], "height_px": SIZE_PX, "width_px": SIZE_PX,
        "num_inference_steps": kind.num_inference_steps, "sampler": "ddim", "arrivals": dict(arrivals), "slo_s": slo_s,
    }  # fmt: skip
    edge = {
        "device": EDGE, "replicas": 1, "network": NETWORK, "ownership": "shared", "encodes_prompt": False,
    }  # fmt: skip
    cloud = {
        "gpu": CLOUD, "gpus_per_node": kind.degree, "runtime": "eager", "precision": "fp32", "usd_per_gpu_hour": 0.05,
        "replicas_max": 1,
    }  # fmt: skip
    return Scenario.model_validate(
        {
            "name": f"calibrate-{kind.name}",
            "seed": seed,
            "horizon_s": math.ceil(span_s + LONGEST_S),
            "requests": {REQUEST_CLASS: picture},
            "edge": {FLEET: edge},
            "pools": {POOL: cloud},
        },
        strict=False,
    )


def deployment_of(kind: Kind, scenario: Scenario, profiles: Profiles, *, switch_step: int) -> Deployment:
    """One worker wherever the kind has one, and the plan that all requests follow.

    `switch_step` counts for kinds that have both sides. The prompt is encoded where the steps begin, the image decoded
    where they end.
    """
    steps = kind.num_inference_steps
    cloud, edge = pool_site(POOL, scenario.pools[POOL]), fleet_site(FLEET, scenario.edge[FLEET], profiles)
    stop = (switch_step if kind.at_edge else steps) if kind.in_cloud else 0
    stages = []
    if kind.in_cloud:
        stages.append(Stage(start=0, stop=stop, model=LARGE, site=cloud, method=kind.method, degree=kind.degree))
    if kind.at_edge:
        stages.append(Stage(start=stop, stop=steps, model=SMALL, site=edge))
    first, last = stages[0].site.name, stages[-1].site.name
    plan = Plan(stages=tuple(stages), text_encode_site=first, vae_site=last, vae=VAE, network=NETWORK)
    return Deployment.pure({POOL: int(kind.in_cloud)}, {REQUEST_CLASS: plan})


def candidate_of(scenario: Scenario, deployment: Deployment, profiles: Profiles) -> Candidate:
    """The deployment's plan, priced for the class's requests."""
    request = request_of(REQUEST_CLASS, scenario.requests[REQUEST_CLASS])
    return make_candidate(scenario, profiles, request, plan_of(deployment))


def plan_of(deployment: Deployment) -> Plan:
    """The plan that all requests follow."""
    return deployment.plans[REQUEST_CLASS][0].plan


def bottleneck_s(candidate: Candidate) -> float:
    """Seconds for which a request holds the worker that it holds the longest."""
    return max(candidate.cloud_s, candidate.edge_s)


def balanced_switch_step(kind: Kind, profiles: Profiles) -> int:
    """The switch step at which cloud and edge are loaded the most evenly; in the middle for kinds of one side."""
    steps = kind.num_inference_steps
    if not (kind.in_cloud and kind.at_edge):
        return steps // 2
    scenario = scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1.0)

    def busiest_s(step: int) -> float:
        deployment = deployment_of(kind, scenario, profiles, switch_step=step)
        return bottleneck_s(candidate_of(scenario, deployment, profiles))

    return min(range(1, steps), key=busiest_s)


def shared_out(requests: int, loads: Iterable[float]) -> dict[float, int]:
    """How many of the requests each load gets: in proportion to it, so that all runs take equally long."""
    wanted = list(loads)
    if problems := [
        Problem("--loads", str(load), "must lie above 0 and below 1, or queues grow for ever")
        for load in wanted
        if not 0.0 < load < 1.0
    ]:
        raise InputError(problems)
    return {load: math.ceil(requests * load / sum(wanted)) for load in wanted}


def trace_arrivals(path: Path) -> dict[str, Any]:
    """Arrivals that are played from a file as they are."""
    return {"process": "trace", "path": str(path)}
