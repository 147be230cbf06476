"""What the tests of the live service share: workers that are up for a whole file, and a service on them."""

from __future__ import annotations

import pytest

from live_plans import Town
from worker_site import opened


@pytest.fixture(scope="module")
def town(request, tmp_path_factory):
    """Cloud workers, as many as the file's `NODES` says (else one), and one edge device for all tests of a file."""
    town = Town(tmp_path_factory.mktemp("profiles") / "own", nodes=getattr(request.module, "NODES", 1))
    with town.pools() as (town.cloud, town.edge):
        yield town


@pytest.fixture(scope="module")
def url(town):
    """A service for whoever needs none of their own."""
    with town.service(town.scheduler(), town.cloud) as url:
        yield url


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Workers without a service, up for all tests of a file."""
    with opened(tmp_path_factory.mktemp("site")) as site:
        yield site
