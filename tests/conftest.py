"""What every test may ask for: the shipped profiles and the shipped quickstart scenario."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from hybridsd_sim import Profiles, Scenario

ROOT = Path(__file__).parents[1]

# A machine that is busy with other work is no failure, hence no deadline. Checks repeat the same examples every time;
# at a desk new ones are drawn.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("desk", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(scope="session")
def profiles() -> Profiles:
    """The shipped profiles."""
    from hybridsd_sim import load_profiles

    return load_profiles()


@pytest.fixture(scope="session")
def quickstart() -> Scenario:
    """The shipped quickstart scenario, without overrides."""
    from hybridsd_sim import load_scenario

    return load_scenario(ROOT / "scenarios" / "quickstart.yaml")
