"""What the tests of the validation share: the testbed's catalogue, without rows and with a made-up profile."""

from __future__ import annotations

import pytest

from executors.validation.testbed import write_catalogue
from hybridsd_sim import load_profiles
from hybridsd_sim.profiles import Profiles
from validation_runs import rows


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Profiles:
    """The testbed's catalogue, without any rows."""
    return load_profiles(write_catalogue(tmp_path_factory.mktemp("catalogue")))


@pytest.fixture(scope="module")
def known(catalogue: Profiles) -> Profiles:
    """The testbed's catalogue with a made-up profile."""
    return catalogue.with_costs(rows())
