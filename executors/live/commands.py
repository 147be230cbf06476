"""What `live` was asked for in words: a service until it is interrupted, or one image from a service."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from hybridsd_sim.errors import InputError, Problem, RunError
from hybridsd_sim.pricing import load_deployment
from hybridsd_sim.profiles import load_profiles
from hybridsd_sim.scheduling import Scheduler, Worker
from hybridsd_sim.serving import is_loopback, names_of

from ..hybrid import open_listener
from .client import Ask, Client, Outcome
from .messages import EdgePart, Link
from .request import Settings
from .service import build_service, served
from .tasks import Gang
from .worker_pool import Crew, Here, cloud_gangs, device_gang

Say = Callable[[str], None]


# ---- The service ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A service in the words of the command line; see `hybridsd-sim live --help`."""

    plan: Path
    host: str = "127.0.0.1"
    port: int = 8471
    token: str | None = None
    here: Here = field(default_factory=Here)
    settings: Settings = field(default_factory=Settings)


def serve(serving: Serving, say: Say) -> None:
    """Serve a plan until SIGINT or SIGTERM; `say` is told what is loaded and where. Raises `InputError` at once."""
    _check_exposure(serving)
    file = serving.plan / "plan.yaml" if serving.plan.is_dir() else serving.plan
    gangs = cloud_gangs(load_deployment(file), serving.here)
    workers = [Worker(gang.name, gang.pool, gang.degree) for gang in gangs]
    folder = serving.here.profiles
    scheduler = Scheduler.from_plan(file, workers=workers, profiles=None if folder is None else load_profiles(folder))
    with open_listener((serving.host, serving.port)) as listener:
        asyncio.run(_serve(serving, scheduler, gangs, listener, say))


async def _serve(
    serving: Serving, scheduler: Scheduler, gangs: Sequence[Gang], listener: socket.socket, say: Say
) -> None:
    life = asyncio.create_task(_until_stopped(serving, scheduler, gangs, listener, say))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, life.cancel)
    with suppress(asyncio.CancelledError):
        await life


async def _until_stopped(
    serving: Serving, scheduler: Scheduler, gangs: Sequence[Gang], listener: socket.socket, say: Say
) -> None:
    for gang in gangs:
        say(f"loading {gang.name}: {', '.join(gang.models)}, {gang.method} x{gang.degree}, {gang.threads} threads")
    async with Crew(gangs) as crew:
        app = build_service(
            scheduler,
            crew,
            gangs=gangs,
            token=serving.token or None,
            hosts=names_of(serving.host),
            settings=serving.settings,
        )
        async with served(app, listener) as running:
            host, port = listener.getsockname()[:2]
            say(f"serving {scheduler.scenario.name} on http://{host}:{port} with {len(crew.up())} workers")
            await asyncio.shield(running)


def _check_exposure(serving: Serving) -> None:
    """A service that others can reach asks for a token."""
    if not serving.token and not is_loopback(serving.host):
        rule = "can be reached from other machines, so that a token is needed"
        raise InputError(Problem("--host", serving.host, rule, "Add --token, or serve on 127.0.0.1."))


# ---- One image ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One image of a service in the words of the command line."""

    url: str
    request_class: str
    out: Path
    prompt: str = ""
    seed: int = 0
    slo_s: float | None = None
    network: str | None = None
    token: str | None = None
    here: Here = field(default_factory=Here)


def fetch(wish: Wish) -> dict[str, Any]:
    """Ask for one image, finish here what is left to the edge, and write it; what it took.

    Raises `InputError` for what cannot be asked, and `RunError` with the reason where there is no image.
    """
    if wish.out.suffix.lower() != ".png" or not wish.out.absolute().parent.is_dir():
        raise InputError(Problem("--out", str(wish.out), "must be a .png file in a folder that exists"))
    network = None if wish.network is None else load_profiles(wish.here.profiles).network(wish.network)
    link = None if network is None else Link.drawn(network)
    ask = Ask(
        id=uuid4().hex, request_class=wish.request_class, prompt=wish.prompt, seed=wish.seed, slo_s=wish.slo_s,
        link=link,
    )  # fmt: skip
    outcome = asyncio.run(_fetch(wish, ask))
    if outcome.status != "served" or outcome.image is None:
        raise RunError(f"no image: {outcome.reason}{f' ({outcome.words})' if outcome.words else ''}")
    try:
        wish.out.write_bytes(outcome.image)
    except OSError as error:
        raise RunError(f"{wish.out} cannot be written: {error.strerror}") from error
    return _told(outcome, wish.out)


async def _fetch(wish: Wish, ask: Ask) -> Outcome:
    """The device's process is started when the hand-over says which model and decoder it takes."""
    async with AsyncExitStack() as stack:

        async def device(edge: EdgePart) -> Crew:
            return await stack.enter_async_context(Crew([device_gang([edge.model], edge.vae, wish.here)]))

        client = await stack.enter_async_context(Client(wish.url, device, token=wish.token))
        return await client.ask(ask)


def _told(outcome: Outcome, out: Path) -> dict[str, Any]:
    """The outcome for people and programs: no times of day, and nothing that is not a number."""
    return {
        "image": str(out),
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


def weights_of(pairs: Sequence[str] | None) -> Mapping[str, Path]:
    """Folders by model, of MODEL=FOLDER each."""
    found = {}
    for pair in pairs or ():
        model, equals, folder = (part.strip() for part in pair.partition("="))
        if not model or not equals or not Path(folder).is_dir():
            rule = "needs MODEL=FOLDER, a folder that exists"
            raise InputError(Problem("--weights", repr(pair), rule, "For example --weights sd15=models/sd15."))
        found[model] = Path(folder)
    return found
