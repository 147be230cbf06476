"""Plans and requests that several tests start from."""

from __future__ import annotations

from collections.abc import Sequence

from hybridsd_sim import Plan, Request, Scheduler, Site, Stage
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import Candidate

CLOUD = Site(name="cloud", tier="cloud", device="a100-sxm-80gb", runtime="cudagraph", gpus_per_node=8)
PHONE = Site(name="phone", tier="edge", device="snapdragon-8-elite", runtime="qnn", precision="w8a16")
REQUEST = Request(model="sd14", num_inference_steps=25, guidance_scale=7.0)
PICTURE = Request(
    request_class="picture", model="sd14", num_inference_steps=25, guidance_scale=7.0, sampler="dpmsolver++"
)
"""A request of the quickstart's class."""


def hybrid(
    k: int, *, steps: int = 25, small: str = "hybrid-sd-224m", network: str | None = "wifi5", **cloud: object
) -> Plan:
    """Cloud for k steps, phone for the rest; the ends are cloud-only and edge-only."""
    stages = []
    if k:
        stages.append(Stage(start=0, stop=k, model="sd14", site=CLOUD, **cloud))  # type: ignore[arg-type]
    if k < steps:
        stages.append(Stage(start=k, stop=steps, model=small, site=PHONE))
    last = stages[-1].site.name
    return Plan(stages=tuple(stages), text_encode_site=last, vae_site=last, network=network)


def at_switch_step(options: Sequence[Candidate], k: int, nodes: int = 3) -> Deployment:
    """The plan that hands every picture of the quickstart over after step k."""
    plan = next(option.plan for option in options if option.plan.switch_step == k)
    return Deployment.pure({"a100": nodes}, {"picture": plan})


def left_s(scheduler: Scheduler, now: float) -> list[tuple[str, int, float]]:
    """Of every worker of a scheduler: its name, the requests that it was given and has not done, seconds until then."""
    return [(state.name, state.queued, round(state.left_s, 6)) for state in scheduler.workers(now)]
