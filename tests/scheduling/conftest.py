"""What these tests start from: the quickstart's candidates, a plan for it, and a scheduler that follows it."""

from __future__ import annotations

import pytest

from builders import at_switch_step
from hybridsd_sim import Profiles, Scenario, Scheduler
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import Candidate, find_candidates


@pytest.fixture(scope="session")
def options(quickstart: Scenario, profiles: Profiles) -> tuple[Candidate, ...]:
    """The candidates of quickstart's one class, cheapest first."""
    return find_candidates(quickstart, profiles).by_class["picture"]


@pytest.fixture(scope="session")
def plan(options: tuple[Candidate, ...]) -> Deployment:
    """Three nodes, and a latent transfer after ten steps."""
    return at_switch_step(options, 10)


@pytest.fixture
def scheduler(plan: Deployment, quickstart: Scenario, profiles: Profiles) -> Scheduler:
    """Follows that plan."""
    return Scheduler.from_plan(plan, scenario=quickstart, profiles=profiles)
