"""Laws of the waiting-time formulas: the cases that theory knows exactly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.planning.analytic import Flow, erlang_c, gang_servers, pool_wait


def test_erlang_c_of_one_server_is_its_load() -> None:
    """In M/M/1 a customer waits with the probability that the server is busy."""
    assert erlang_c(1, 0.7) == pytest.approx(0.7)


def test_erlang_c_matches_a_published_value() -> None:
    """Ten erlangs on eleven servers wait with probability 0.682 (Erlang C tables)."""
    assert erlang_c(11, 10.0) == pytest.approx(0.6821, abs=2e-4)


@given(st.floats(0.05, 0.95), st.floats(0.1, 30.0))
def test_mean_wait_of_one_server_is_pollaczek_khinchine(load: float, hold_s: float) -> None:
    """M/D/1 waits rho S / 2 (1 - rho) in the mean, M/G/1 that times 1 + CV squared."""
    fixed = pool_wait(1, 1, [Flow(load / hold_s, hold_s)])
    assert fixed.mean_s == pytest.approx(load * hold_s / (2 * (1 - load)))

    mixed = [Flow(load / hold_s / 2, hold_s / 2), Flow(load / hold_s / 2, hold_s * 3 / 2)]
    assert pool_wait(1, 1, mixed).mean_s == pytest.approx(load * hold_s * 1.25 / (2 * (1 - load)))


@given(st.integers(1, 200), st.floats(0.01, 1.5))
def test_waits_fall_with_nodes_and_rise_with_load(nodes: int, load: float) -> None:
    """One more node never makes a wait more likely; an overloaded pool keeps everybody waiting for ever."""
    flow = Flow(load * nodes, 1.0)
    few, more = pool_wait(nodes, 1, [flow]), pool_wait(nodes + 1, 1, [flow])

    assert more.probability <= few.probability + 1e-12
    assert (few.probability == 1.0 and math.isinf(few.scale_s)) == (load >= 1.0 or math.isinf(few.scale_s))


@given(st.floats(0.0, 50.0))
def test_within_is_a_distribution(seconds: float) -> None:
    """The probability of waiting at most t starts at 1 - P(wait), rises, and stays under 1."""
    wait = pool_wait(3, 1, [Flow(2.5, 1.0)])

    assert 1 - wait.probability - 1e-12 <= wait.within(seconds) <= wait.within(seconds + 1.0) <= 1.0
    assert wait.within(-0.1) == 0.0


def test_gangs_leave_idle_what_they_cannot_use() -> None:
    """A gang of three fits twice on eight GPUs, so a pool of two nodes runs four of them."""
    assert gang_servers(2, 8, [Flow(1.0, 1.0, degree=3)]) == pytest.approx(4.0)


def test_an_empty_pool_serves_nobody() -> None:
    """No node, no service; no traffic, no wait."""
    assert pool_wait(0, 8, [Flow(1.0, 1.0)]).within(1e9) == 0.0
    assert pool_wait(0, 8, []).within(0.0) == 1.0
