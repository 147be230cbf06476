"""Plans that the tests of the Ray Serve adapter route by, and a router that writes down what it does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hybridsd_sim.plan import Deployment, Plan, Request, Share, Stage
from hybridsd_sim.pricing import pool_site
from hybridsd_sim.scenario import Scenario, dump_yaml
from hybridsd_sim.scheduling import Decision, Event, Scheduler
from hybridsd_sim.serving.ray_serve import PredictedCostRouter

MODEL = "bk-sdm-tiny"
JOURNALS: list[list[tuple[Any, ...]]] = []
"""What each router of this process asked and told its scheduler, in order; the youngest router's is the last."""


def studio(*pools: str) -> Scenario:
    """One class of pictures on pools of single H200s; predictions are 0.1 s (512 px, 10 steps) to some seconds."""
    picture = {
        "origin": "phones", "model": MODEL, "height_px": 512, "width_px": 512, "num_inference_steps": 30, "slo_s": 60.0,
        "arrivals": {"process": "poisson", "rate_per_s": 4.0},
    }  # fmt: skip
    pool = {"gpu": "h200-sxm", "runtime": "compiled", "replicas_max": 8}
    phones = {"device": "snapdragon-8-gen-3", "replicas": 1000, "network": "wifi5"}
    said = {
        "name": "studio", "horizon_s": 600, "requests": {"picture": picture}, "edge": {"phones": phones},
        "pools": dict.fromkeys(pools or ("gpus",), pool),
    }  # fmt: skip
    return Scenario.model_validate_json(json.dumps(said))


def cloud_plan(scenario: Scenario, pool: str = "gpus") -> Plan:
    """The whole picture on one GPU of a pool."""
    site = pool_site(pool, scenario.pools[pool])
    stage = Stage(start=0, stop=30, model=MODEL, site=site)
    return Plan(stages=(stage,), text_encode_site=pool, vae_site=pool, network="wifi5")


def save_plan(folder: Path, scenario: Scenario, pool: str = "gpus", *, share: float = 1.0, nodes: int = 3) -> Path:
    """A folder with a plan that serves a share of the pictures on a pool, as `plan` writes it."""
    mix = (Share(share, cloud_plan(scenario, pool)),)
    deployment = Deployment({pool: nodes}, {"picture": mix})
    folder.mkdir(exist_ok=True)
    (folder / "provenance.json").write_text(json.dumps({"scenario": scenario.model_dump(mode="json")}))
    (folder / "new.yaml").write_text(dump_yaml(deployment.to_dict()))
    return (folder / "new.yaml").replace(folder / "plan.yaml")


class Journalled:
    """A scheduler of which everything asked and told is written down."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._journal: list[tuple[Any, ...]] = []
        JOURNALS.append(self._journal)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def decide(self, request: Request, view: None, now: float) -> Decision:
        decision = self._scheduler.decide(request, view, now)
        self._journal.append(("decide", request, now, decision))
        return decision

    def observe(self, event: Event) -> None:
        self._journal.append(("observe", event))
        self._scheduler.observe(event)


class JournallingRouter(PredictedCostRouter):
    """The router, with a scheduler that is written down."""

    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings)
        from serve_plans import Journalled as Known  # Ray has this module by value: its journals would be others

        if self._scheduler is not None:
            self._scheduler = Known(self._scheduler)


@contextmanager
def local_serve() -> Iterator[None]:
    """A Ray of this machine with Serve on it and no HTTP; its processes find the work of these tests by its path."""
    import ray
    from ray import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        try:
            serve.start(proxy_location="Disabled")
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def predicted_s(scheduler: Scheduler, px: int, steps: int, images: int) -> float:
    """Seconds that a picture is predicted to keep its GPU busy."""
    request = Request(
        model=MODEL, height_px=px, width_px=px, num_inference_steps=steps, num_images=images, request_class="picture"
    )
    candidate = scheduler.decide(request, None, 0.0).candidate
    assert candidate is not None
    return candidate.cloud_s
