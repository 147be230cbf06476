"""Cloud and edge of a calibration in one place: their workers, and the live service between them on a port of its own.

Service, client and driver share one process and its event loop; every worker has processes of its own. The orders still
cross a TCP connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

from executors.calibrate.awake import a_cpu_each, kept_awake
from executors.calibrate.rehearse import Crews, WatchedCrew
from executors.calibrate.setting import plan_of
from executors.calibrate.testbed import Testbed
from executors.hybrid import listen_at
from executors.live.client import Client
from executors.live.gangs import Here, cloud_gangs, edge_gang
from executors.live.listening import served
from executors.live.service import build_service
from executors.live.tasks import Gang
from executors.live.work import Settings
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduler import Scheduler
from hybridsd_sim.workers import Worker

POLICY = "planned"


@asynccontextmanager
async def working(deployment: Deployment, testbed: Testbed) -> AsyncIterator[Crews]:
    """The workers that a deployment asks for, all up: a CPU thread each process, on processors that are kept awake."""
    here = Here(threads=1, weights=testbed.weights, profiles=testbed.profiles)
    device = edge_gang([plan_of(deployment)], here)
    gangs, devices = _on_cpus(cloud_gangs(deployment, here), (device,) if device else ())
    with kept_awake():
        async with WatchedCrew(gangs) as cloud, WatchedCrew(devices) as edge:
            yield Crews(cloud=cloud, edge=edge, gangs=gangs)


def _on_cpus(*sides: tuple[Gang, ...]) -> Iterator[tuple[Gang, ...]]:
    """The gangs of each side with a CPU for every process, where there are enough."""
    cpus = iter(a_cpu_each([gang.degree for side in sides for gang in side]))
    for side in sides:
        yield tuple(replace(gang, cpus=next(cpus)) for gang in side)


@asynccontextmanager
async def serving(
    crews: Crews, scenario: Scenario, deployment: Deployment, profiles: Profiles, settings: Settings
) -> AsyncIterator[Client]:
    """A client of the live service that follows the deployment."""
    workers = [Worker(gang.name, gang.pool, gang.degree) for gang in crews.gangs]
    scheduler = Scheduler.from_plan(deployment, policy=POLICY, scenario=scenario, profiles=profiles, workers=workers)
    service = build_service(scheduler, crews.cloud, gangs=crews.gangs, settings=settings)
    with listen_at(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        async with served(service, listener), Client(f"http://{host}:{port}", crews.edge) as client:
            yield client
