"""Sidecars to ask: a plan in a folder, an application asked in this process, a command of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
from fastapi import FastAPI

from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import find_candidates
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario, dump_yaml
from hybridsd_sim.scheduling import Scheduler

MINE = '{"request_class": "picture"}'
"""A request of the quickstart's class."""

TOKEN = "f00d" * 8

LONG_S = 60.0
"""More than anything here takes on a busy machine: what takes longer hangs."""


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def handed_over(scenario: Scenario, profiles: Profiles, nodes: int = 2) -> Deployment:
    """Every class of the quickstart handed over after ten steps, on so many nodes."""
    options = find_candidates(scenario, profiles).by_class["picture"]
    plan = next(option.plan for option in options if option.plan.switch_step == 10)
    return Deployment.pure({"a100": nodes}, {"picture": plan})


def problems(answer: httpx.Response) -> list[dict[str, str]]:
    """What was wrong, by the only shape that errors have."""
    found = answer.json()
    assert list(found) == ["error"]
    assert found["error"]
    assert all(list(problem) == ["place", "value", "rule", "remedy"] for problem in found["error"])
    return found["error"]


def write_plan(folder: Path, deployment: Deployment, scenario: Scenario) -> Path:
    """The folder of a run, as far as a sidecar reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.yaml").write_text(dump_yaml(deployment.to_dict()))
    (folder / "provenance.json").write_text(json.dumps({"scenario": scenario.to_dict()}))
    return folder


class Asker:
    """Asks an application in this process, one request after another on one event loop, and keeps its lifespan."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1:8470") -> None:
        self.app = app
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=f"http://{host}", timeout=LONG_S
        )
        self._life = app.router.lifespan_context(app)

    def __enter__(self) -> Self:
        self._runner.run(self._life.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._life.__aexit__(None, None, None))
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __call__(self, method: str, path: str, **what: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, path, **what))

    def post(self, path: str, content: Any, **headers: str) -> httpx.Response:
        """A body as it stands, said to be JSON unless a header says otherwise."""
        return self("POST", path, content=content, headers={"Content-Type": "application/json"} | headers)


@contextmanager
def served(plan: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command `serve` on a free port, once it listens, and its address; ended if the test has not done so."""
    command = [sys.executable, "-W", "error", "-m", "hybridsd_sim", "serve", str(plan), "--port", "0", *options]
    process = subprocess.Popen(command, env={**os.environ, **environment}, text=True, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stderr.read()
        yield process, address[0]
    finally:
        process.kill()
        process.communicate()


def embedded(deployment: Deployment, scenario: Scenario, **more: Any) -> Scheduler:
    """The scheduler of a deployment, in this process."""
    return Scheduler.from_plan(deployment, scenario=scenario, **more)
