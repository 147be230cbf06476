"""What `live` was asked for in words: a service until it is interrupted, or one image from a service."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from hybridsd_sim.errors import InputError, Problem, RunError
from hybridsd_sim.files import write_atomically
from hybridsd_sim.pricing import load_deployment
from hybridsd_sim.profiles import load_profiles
from hybridsd_sim.scheduling import Scheduler, Worker
from hybridsd_sim.serving import is_loopback, names_of

from ..hybrid import open_listener
from .client import Client, ClientRequest, RequestOutcome
from .dispatch import ProcessSettings, cloud_workers, device_worker
from .messages import EdgeStage
from .request import ServiceSettings
from .service import build_service, run_service
from .shaping import Link
from .tasks import WorkerSpec
from .worker_pool import ProcessPool

Say = Callable[[str], None]


# ---- The service ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """A service in the words of the command line; see `hybridsd-sim live --help`."""

    plan: Path
    host: str = "127.0.0.1"
    port: int = 8471
    token: str | None = None
    process: ProcessSettings = field(default_factory=ProcessSettings)
    settings: ServiceSettings = field(default_factory=ServiceSettings)


def serve(options: ServeOptions, say: Say) -> None:
    """Serve a plan until SIGINT or SIGTERM; `say` is told what is loaded and where. Raises `InputError` at once.

    That is for a plan that cannot be served live, an address that is taken, and one that other machines reach where no
    token is set; then nothing has been loaded yet.
    """
    if not options.token and not is_loopback(options.host):
        rule = "can be reached from other machines, so that a token is needed"
        raise InputError(Problem("--host", options.host, rule, "Add --token, or serve on 127.0.0.1."))
    file = options.plan / "plan.yaml" if options.plan.is_dir() else options.plan
    specs = cloud_workers(load_deployment(file), options.process)
    workers = [Worker(spec.name, spec.pool, spec.degree) for spec in specs]
    folder = options.process.profiles
    scheduler = Scheduler.from_plan(file, workers=workers, profiles=None if folder is None else load_profiles(folder))
    with open_listener((options.host, options.port)) as listener:
        asyncio.run(_serve(options, scheduler, specs, listener, say))


async def _serve(
    options: ServeOptions, scheduler: Scheduler, specs: Sequence[WorkerSpec], listener: socket.socket, say: Say
) -> None:
    async def serve_until_cancelled() -> None:
        for spec in specs:
            say(f"loading {spec.name}: {', '.join(spec.models)}, {spec.method} x{spec.degree}, {spec.threads} threads")
        async with ProcessPool(specs) as pool:
            app = build_service(
                scheduler,
                pool,
                specs=specs,
                token=options.token or None,
                hosts=names_of(options.host),
                settings=options.settings,
            )
            async with run_service(app, listener) as running:
                host, port = listener.getsockname()[:2]
                say(f"serving {scheduler.scenario.name} on http://{host}:{port} with {len(pool.up())} workers")
                await asyncio.shield(running)

    service = asyncio.create_task(serve_until_cancelled())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, service.cancel)
    with suppress(asyncio.CancelledError):
        await service


# ---- One image ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """One image of a service in the words of the command line."""

    url: str
    request_class: str
    out: Path
    prompt: str = ""
    seed: int = 0
    slo_s: float | None = None
    network: str | None = None
    token: str | None = None
    process: ProcessSettings = field(default_factory=ProcessSettings)


def fetch(options: FetchOptions) -> dict[str, Any]:
    """Ask for one image, finish here what is left to the edge, and write it; what it took.

    Raises `InputError` for what cannot be asked, and `RunError` with the reason where there is no image.
    """
    if options.out.suffix.lower() != ".png" or not options.out.absolute().parent.is_dir():
        raise InputError(Problem("--out", str(options.out), "must be a .png file in a folder that exists"))
    network = None if options.network is None else load_profiles(options.process.profiles).network(options.network)
    link = None if network is None else Link.drawn(network)
    request = ClientRequest(
        id=uuid4().hex, request_class=options.request_class, prompt=options.prompt, seed=options.seed,
        slo_s=options.slo_s,
        link=link,
    )  # fmt: skip
    outcome = asyncio.run(_fetch(options, request))
    if outcome.status != "served" or outcome.image is None:
        raise RunError(f"no image: {outcome.reason}{f' ({outcome.words})' if outcome.words else ''}")
    try:
        write_atomically(options.out, outcome.image)
    except OSError as error:
        raise RunError(f"{options.out} cannot be written: {error.strerror}") from error
    return {  # no times of day, and nothing that is not a number
        "image": str(options.out),
        "request_class": outcome.request_class,
        "plan": outcome.plan_label,
        "worker": outcome.worker,
        "seconds": {
            "latency": outcome.latency_s,
            "cloud": outcome.cloud_s,
            "edge": outcome.edge_s,
            "transfer": outcome.transfer_s,
        },
        "bytes_down": outcome.bytes_down,
        "steps": {"cloud": len(outcome.cloud_step_s), "edge": len(outcome.edge_step_s)},
        "restarts": outcome.restarts,
        "retries": outcome.retries,
    }


async def _fetch(options: FetchOptions, request: ClientRequest) -> RequestOutcome:
    """The device's process is started when the latent transfer says which model and decoder it takes."""
    async with AsyncExitStack() as stack:

        async def device(edge: EdgeStage) -> ProcessPool:
            return await stack.enter_async_context(
                ProcessPool([device_worker([edge.model], edge.vae, options.process)])
            )

        client = await stack.enter_async_context(Client(options.url, device, token=options.token))
        return await client.ask(request)
