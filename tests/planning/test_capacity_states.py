"""Laws of the capacity surface: in a state that serves a plan, the plan is in time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, load_scenario
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.capacity_states import CAPS, STABLE, ServiceDemand, States, pool_states, service_demand
from hybridsd_sim.pricing import Candidate, find_candidates


def studio(profiles: Profiles, **overrides: object) -> tuple[Sizer, list[Candidate]]:
    """Gangs of one to eight GPUs on nodes of eight, as the studio's NVLink pool has them."""
    scenario = load_scenario("studio-2k", overrides={"pools.pcie": None, **overrides})
    found = find_candidates(scenario, profiles)
    return Sizer(scenario, profiles), [o for o in found.by_class["draft"] if o.pool_index == 0 and o.edge_steps == 0]


@pytest.fixture(scope="module")
def drafts(profiles: Profiles) -> tuple[Sizer, list[Candidate]]:
    """The draft class of the studio."""
    return studio(profiles)


def states_of(sizer: Sizer, options: list[Candidate]) -> States:
    """The states of the pool for these options alone."""
    spec = next(iter(sizer.scenario.pools.values()))
    works = [service_demand(option, spec, sizer, None, 1.0 - sizer.wanted(option.request_class)) for option in options]
    return pool_states(spec, works, load_most=2.0)


@pytest.fixture(scope="module")
def works(profiles: Profiles) -> list[ServiceDemand]:
    """Every cloud plan of the quickstart, as its pool sees it."""
    scenario = load_scenario("quickstart")
    sizer, spec = Sizer(scenario, profiles), scenario.pools["a100"]
    options = [o for o in find_candidates(scenario, profiles).by_class["picture"] if o.pool_index == 0]
    return [service_demand(option, spec, sizer, None, 0.05) for option in options]


def test_a_served_plan_at_its_cap_is_in_time(drafts: tuple[Sizer, list[Candidate]]) -> None:
    """The exact formula, asked for each plan at the full load of each state that serves it, keeps the percentile."""
    sizer, options = drafts
    spec = next(iter(sizer.scenario.pools.values()))
    for option in options:
        sizer.correction_factors.clear()
        states = states_of(sizer, [option])
        flow = sizer.flow(option)
        each = flow.rate_per_s * flow.hold_s / (spec.gpus_per_node // option.degree)
        for index in np.flatnonzero(states.serves[0]):
            sizer.correction_factors["nvlink"] = states.load[index] / each
            got = sizer.assess({"draft": ((1.0, option),)}, {"nvlink": int(states.nodes[index])}).attainment["draft"]
            assert got >= sizer.wanted("draft") - 1e-6
    sizer.correction_factors.clear()


def test_plans_too_slow_for_their_slo_are_served_nowhere(profiles: Profiles) -> None:
    """No number of nodes helps a plan that is late on an idle fleet."""
    sizer, options = studio(profiles, **{"requests.draft.slo_s": 1.0})

    assert not states_of(sizer, options).serves.any()


def test_more_nodes_take_more_work(drafts: tuple[Sizer, list[Candidate]]) -> None:
    """For each plan and kind of jobs the largest load served rises with the nodes, and faster than they do."""
    sizer, options = drafts
    states = states_of(sizer, options)
    for plan, option in enumerate(options):
        mine = states.serves[plan] & (states.degree == states.degree.max())
        mine &= states.residual_s == states.residual_s.max()
        most = {n: states.load[mine & (states.nodes == n)].max() for n in np.unique(states.nodes[mine]).tolist()}
        counts = sorted(most)
        assert all(most[a] / a <= most[b] / b + 1e-9 for a, b in pairwise(counts)), option.plan


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.floats(0.3, 30.0))
def test_caps_are_few_and_stable(works: list[ServiceDemand], nodes: int, demand: float) -> None:
    """No state is loaded beyond what can be stable, and one kind of jobs has at most so many caps for its nodes."""
    spec = load_scenario("quickstart", overrides={"pools.a100.replicas_max": nodes}).pools["a100"]

    states = pool_states(spec, works, demand)
    assert (states.load <= STABLE * states.nodes + 1e-9).all()
    assert states.nodes.max(initial=0) <= nodes
    kinds = np.stack([states.nodes, states.residual_s, states.degree])
    assert np.unique(kinds, axis=1, return_counts=True)[1].max(initial=0) <= CAPS


def test_a_pool_without_plans_has_no_states(works: list[ServiceDemand]) -> None:
    """Nothing to serve, nothing to choose from."""
    spec = load_scenario("quickstart").pools["a100"]

    assert len(pool_states(spec, [], 1.0)) == 0
    assert len(pool_states(None, works, 1.0)) == 0
