"""Connections that say nothing, plans that change while they are read, libraries that are not there."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from itertools import count

import pytest
import uvicorn

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.serving.app import build_app
from hybridsd_sim.serving.listen import opened, settings
from hybridsd_sim.serving.reload import PlanFile, follow
from sidecars import LONG_S

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def app(scheduler):
    """A sidecar."""
    return build_app(scheduler)


# ---- Connections ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(app):
    """The server of the command on a free port of this process, and the port."""
    server, listener = uvicorn.Server(settings(app)), opened("127.0.0.1", 0)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 -- uvicorn tells it by this alone
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def to_the_end(reader) -> bytes:
    """What comes until the server hangs up."""
    said = b""
    try:
        async with asyncio.timeout(LONG_S):
            while piece := await reader.read(1000):
                said += piece
    except ConnectionError:
        pass
    return said


@pytest.mark.parametrize(
    "pieces", [[], [b"GET /heal"], [b"\r\n"], [HEALTH, b"G"], [HEALTH, b"\r\n"], [HEALTH, HEALTH[:30]]]
)
def test_who_sends_no_whole_head_is_dropped(app, monkeypatch, pieces):
    """Nothing, half a head or an empty line, at first or after an answer: the server hangs up after a time."""
    monkeypatch.setattr("hybridsd_sim.serving.listen.HEAD_S", 0.1)

    async def run() -> bytes:
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for piece in pieces:
                writer.write(piece)
                if piece == HEALTH:
                    assert b"alive" in await reader.readuntil(b"}")
            said = await to_the_end(reader)
            writer.close()
            return said

    assert asyncio.run(run()) == b""


def test_silent_connections_shut_nobody_out_for_good(app, monkeypatch):
    """More of them than the server keeps: it is too busy while they last, which is not long."""
    monkeypatch.setattr("hybridsd_sim.serving.listen.HEAD_S", 2.0)
    monkeypatch.setattr("hybridsd_sim.serving.listen.MOST_CONNECTIONS", 20)

    async def health(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEALTH.replace(b"Host", b"Connection: close\r\nHost"))
        said = await to_the_end(reader)
        writer.close()
        return int(said.split()[1])

    async def run() -> list[int]:
        async with listening(app) as port, asyncio.timeout(LONG_S):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            codes = [await health(port)]
            while codes[-1] != 200:
                await asyncio.sleep(0.05)
                codes.append(await health(port))
            for _, writer in silent:
                writer.close()
            return codes

    codes = asyncio.run(run())
    assert codes[0] == 503
    assert codes[-1] == 200


# ---- The plan's file ------------------------------------------------------------------------------------------------


async def followed(file: PlanFile, replace, done) -> None:
    """Follow a file until it is done."""
    task = asyncio.create_task(follow(file, replace, 0.001))
    async with asyncio.timeout(LONG_S):
        while not done():  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_change_while_the_plan_is_read_is_not_missed(folder, scheduler):
    """What is written between the first look and the first plan is followed."""
    file = PlanFile(folder)
    (folder / "plan.yaml").write_text((folder / "plan.yaml").read_text().replace("a100: 2", "a100: 3"))

    async def replace(path) -> int:
        return scheduler.replace_plan(path)

    asyncio.run(followed(file, replace, lambda: scheduler.version == 2))
    assert scheduler.active_plan[1].replicas == {"a100": 3}


def test_a_plan_that_will_not_do_is_tried_again_and_told_once(tmp_path, caplog):
    """What it needs may come later; the log has each thing that was wrong once, however often it was tried."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "plan.yaml"
    path.write_text("first")
    file, tries = PlanFile(path), count(1)
    path.write_text("second")

    async def replace(_) -> int:
        wrong = {**dict.fromkeys(range(1, 5), "provenance.json"), **dict.fromkeys(range(5, 9), "replicas")}
        if place := wrong.get(number := next(tries)):
            raise InputError(Problem(place, "missing", "must be there"))
        return number

    asyncio.run(followed(file, replace, lambda: "is in use" in caplog.text))
    assert next(tries) == 10
    told = re.findall(r"the plan in use stays: (\S+):", caplog.text)
    assert told == ["provenance.json", "replicas"]
    assert file.changed() is None


# ---- The extra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "error"), [("fastapi", "error: serve:"), ("hybridsd_sim.serving.guard", "error: ModuleNotFoundError")]
)
def test_only_a_library_of_the_extra_is_told_to_be_installed(missing, error):
    """Without one of them the remedy is pip; a mistake of our own is told as what it is."""
    code = f"import sys; sys.modules[{missing!r}] = None; from hybridsd_sim.cli import main; main()"
    said = subprocess.run([sys.executable, "-c", code, "serve", "plan"], capture_output=True, text=True, check=False)
    assert said.stderr.startswith(error)
    assert ("hybridsd-sim[serve]" in said.stderr) is (said.returncode == 2) is (missing == "fastapi")
