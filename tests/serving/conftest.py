"""What the sidecar's tests start from: a plan, the scheduler that follows it, and an application to ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridsd_sim import Profiles, Scenario, Scheduler
from hybridsd_sim.plan import Deployment
from hybridsd_sim.serving.app import build_app
from sidecars import Asker, Clock, embedded, handed_over, write_plan


@pytest.fixture(scope="session")
def deployment(quickstart: Scenario, profiles: Profiles) -> Deployment:
    """A latent transfer after ten steps, on two nodes."""
    return handed_over(quickstart, profiles)


@pytest.fixture
def folder(tmp_path: Path, deployment: Deployment, quickstart: Scenario) -> Path:
    """That plan in a folder."""
    return write_plan(tmp_path / "run", deployment, quickstart)


@pytest.fixture
def scheduler(deployment: Deployment, quickstart: Scenario, profiles: Profiles) -> Scheduler:
    """A scheduler that follows that plan."""
    return embedded(deployment, quickstart, profiles=profiles)


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still unless it is moved."""
    return Clock()


@pytest.fixture
def ask(scheduler: Scheduler, clock: Clock) -> Iterator[Asker]:
    """The sidecar of that scheduler."""
    with Asker(build_app(scheduler, clock=clock)) as asker:
        yield asker
