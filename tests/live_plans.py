"""A small world to serve live: real small UNets, a plan for each way to share an image, and where it all runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI

from executors.live import (
    Client,
    ClientRequest,
    ProcessPool,
    ProcessSettings,
    RequestOutcome,
    ServiceSettings,
    Task,
    TaskResult,
    WorkerSpec,
    build_service,
    cloud_workers,
    edge_worker,
    run_service,
)
from hybridsd_sim.files import data_folder
from hybridsd_sim.plan import Deployment, Plan, Stage
from hybridsd_sim.pricing import fleet_site, pool_site
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling import CERTAIN_LATE, Decision, Scheduler, Worker
from hybridsd_sim.scheduling.policies import CloudOnly
from own_catalogue import own_catalogue

T = TypeVar("T")
LONG_S = 300.0
"""More than anything here takes on a busy machine: a test that waits longer hangs, and fails."""
STEPS = {"hybrid": (6, 3), "cloud": (6, 6), "edge": (6, 0), "decoded": (4, 4), "long": (120, 80), "all_day": (900, 900)}
"""Request classes: steps of one image, and how many of them are the cloud's."""
ARRIVALS = {"process": "poisson", "rate_per_s": 1.0}


def small_profiles(folder: Path) -> Path:
    """A profiles folder with the small models, and the measured times of generic computers to price them by."""
    own_catalogue(folder)
    for device in ("cpu-1core", "cpu-2core"):
        shutil.copytree(data_folder("profiles") / "measured" / device, folder / "measured" / device)
    return folder


def small_scenario(folder: Path, *, slo_s: float | None = None) -> Scenario:
    """Every class of `STEPS`, one pool, and one fleet of devices that the users share."""
    classes = {
        name: {
            "origin": "desks", "model": "small", "small_models": ["smaller"], "height_px": 64, "width_px": 64,
            "num_inference_steps": steps, "guidance_scale": 1.0, "sampler": "dpmsolver++", "arrivals": ARRIVALS,
            "slo_s": slo_s,
        }
        for name, (steps, _) in STEPS.items()
    }  # fmt: skip
    rented = {"gpu": "cpu-2core", "runtime": "eager", "precision": "fp32", "usd_per_gpu_hour": 0.1, "replicas_max": 4}
    desks = {"device": "cpu-2core", "replicas": 1, "network": "ethernet", "ownership": "shared"}
    said = {
        "name": "small",
        "horizon_s": 600,
        "requests": classes,
        "edge": {"desks": {**desks, "encodes_prompt": False}},
        "pools": {"rented": rented},
        "search": {"profiles": [str(folder)], "vaes": ["taesd"]},
    }
    return Scenario.model_validate_json(json.dumps(said))


def small_plan(scenario: Scenario, profiles: Profiles, name: str, *, switch: int | None = None) -> Plan:
    """The plan of a class: the cloud's steps up to the switch step, the edge's from there on."""
    steps, cloud_steps = STEPS[name]
    k = cloud_steps if switch is None else switch
    pool = pool_site("rented", scenario.pools["rented"])
    open_requests = fleet_site("desks", scenario.edge["desks"], profiles)
    stages = [Stage(start=0, stop=k, model="small", site=pool)] if k else []
    if k < steps:
        stages.append(Stage(start=k, stop=steps, model="smaller", site=open_requests))
    last = open_requests if name == "decoded" else stages[-1].site
    extra = (open_requests,) if name == "decoded" else ()
    return Plan(
        stages=tuple(stages), text_encode_site=stages[0].site.name, vae_site=last.name, vae="taesd",
        network="ethernet", extra_sites=extra,
    )  # fmt: skip


def small_deployment(scenario: Scenario, profiles: Profiles, *, nodes: int = 2, **switches: int) -> Deployment:
    """A plan for every class, on rented nodes; `switches` move the switch step of a class."""
    plans = {name: small_plan(scenario, profiles, name, switch=switches.get(name)) for name in STEPS}
    return Deployment.pure({"rented": nodes}, plans)


class Punctual(CloudOnly):
    """Everything in the cloud, and nobody served late."""

    def decide(self, options: Any, deadline_s: float, view: Any, now: float) -> Decision:
        late = Decision("reject", None, 0.0, CERTAIN_LATE)
        return late if now + 0.5 > deadline_s else super().decide(options, deadline_s, view, now)


# ---- Where it runs --------------------------------------------------------------------------------------------------


class Background:
    """An event loop in a thread of its own. What a test asks of it ends within `LONG_S`, or fails."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, timeout_s: float = LONG_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LONG_S)
        self.loop.close()


class Counting:
    """A pool that writes down what it was given and for whom; everything else is the pool's."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool
        self.tasks: list[Task] = []
        self.workers: list[str] = []

    def up(self) -> tuple[str, ...]:
        return self.pool.up()

    async def run(self, worker: str, task: Task, *, on_step: Any = None) -> TaskResult:
        self.tasks.append(task)
        self.workers.append(worker)
        return await self.pool.run(worker, task, on_step=on_step)


class Town:
    """A cloud, an edge and the plan between them, started once; services and clients come and go on them."""

    def __init__(self, folder: Path, *, nodes: int = 2) -> None:
        self.settings = ProcessSettings(profiles=small_profiles(folder))
        self.profiles = load_profiles(self.settings.profiles)
        self.scenario = small_scenario(folder)
        self.plan = small_deployment(self.scenario, self.profiles, nodes=nodes)
        self.specs = tuple(
            replace(spec, models=("small", "smaller")) for spec in cloud_workers(self.plan, self.settings)
        )
        every_plan = [part.plan for mix in self.plan.plans.values() for part in mix]
        self.edge_specs: Sequence[WorkerSpec] = [spec for spec in [edge_worker(every_plan, self.settings)] if spec]
        self.background = Background()

    def scheduler(self, **settings: Any) -> Scheduler:
        """A scheduler that follows the plan with all workers idle."""
        workers = [Worker(spec.name, spec.pool, spec.degree) for spec in self.specs]
        said = {"scenario": self.scenario, "profiles": self.profiles, "workers": workers} | settings
        return Scheduler.from_plan(self.plan, **said)

    @contextmanager
    def pools(self) -> Iterator[tuple[ProcessPool, ProcessPool]]:
        """The cloud's workers and the edge's device, up."""
        stack = AsyncExitStack()

        async def start() -> list[ProcessPool]:
            pools = [ProcessPool(specs, start_method="forkserver") for specs in (self.specs, self.edge_specs)]
            await asyncio.gather(*(stack.enter_async_context(pool) for pool in pools))
            return pools

        try:
            cloud, edge = self.background.run(start())
            yield cloud, edge
        finally:
            self.background.run(stack.aclose())
            self.background.close()

    @contextmanager
    def service(self, scheduler: Scheduler, pool: Any, **settings: Any) -> Iterator[str]:
        """The address of a service on a port of its own."""
        token = settings.pop("token", None)
        chosen = ServiceSettings(**{"payload": "fp32", "checkpoint_every": 1} | settings)
        app = build_service(scheduler, pool, specs=self.specs, token=token, settings=chosen)
        with served(self.background, app) as url:
            yield url

    def ask(self, url: str, pool: Any, *asks: ClientRequest, **settings: Any) -> list[RequestOutcome]:
        """What becomes of these asks, put at the same time by one client."""

        async def put() -> list[RequestOutcome]:
            async with Client(url, pool, **{"timeout_s": LONG_S} | settings) as client:
                return await asyncio.gather(*(client.ask(ask) for ask in asks))

        return self.background.run(put())


@contextmanager
def served(background: Background, app: FastAPI) -> Iterator[str]:
    """An application on a real port of this machine."""
    stack = AsyncExitStack()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        background.run(stack.enter_async_context(run_service(app, listener)))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            background.run(stack.aclose())


# ---- Waiting and disturbing -----------------------------------------------------------------------------------------


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait for something that must happen, and fail if it does not."""
    until_s = time.monotonic() + LONG_S
    while not happens():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.005)


@contextmanager
def frozen(pool: ProcessPool, worker: str) -> Iterator[None]:
    """A worker's processes stopped in their tracks, as on a machine that swaps."""
    for pid in pool.pids(worker):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        thaw(pool, worker)


def thaw(pool: ProcessPool, worker: str) -> None:
    """Let them go on."""
    for pid in pool.pids(worker):
        os.kill(pid, signal.SIGCONT)
