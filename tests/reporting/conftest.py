"""What the tests of reports share: the plan made by hand, its report, and reports without figures."""

from __future__ import annotations

import pytest

from hand_made import hand_made_plan, hand_made_scenario
from hybridsd_sim.reporting import write_report


@pytest.fixture(scope="session")
def scenario(tmp_path_factory):
    """The scenario of the plan made by hand."""
    return hand_made_scenario(tmp_path_factory.mktemp("scenario"))


@pytest.fixture(scope="session")
def plan(scenario, profiles):
    """The capacity plan made by hand, with everything that a plan can say of itself."""
    return hand_made_plan(scenario, profiles.digest)


@pytest.fixture(scope="session")
def report(plan, tmp_path_factory):
    """The folder of the plan's report."""
    return write_report(plan, tmp_path_factory.mktemp("reports") / "run").parent


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures, where only data and words matter."""
    monkeypatch.setattr("hybridsd_sim.reporting.figures.draw", lambda *_: {})
