"""Laws of the formula for whole deployments: mixes, batches, nodes that may be taken away, corrections."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Scenario, load_scenario
from hybridsd_sim.planning.analytic import Flow, Sizer, pool_wait
from hybridsd_sim.pricing import Candidate, find_candidates


def started(profiles: Profiles, **overrides: object) -> tuple[Sizer, dict[int, Candidate]]:
    """The quickstart's formula, and its plans by switch step (the cheapest of each)."""
    scenario = load_scenario("quickstart", overrides=overrides)
    options: dict[int, Candidate] = {}
    for option in find_candidates(scenario, profiles).by_class["picture"]:
        options.setdefault(option.cloud_steps, option)
    return Sizer(scenario, profiles), options


def test_one_plan_waits_as_the_queue_says(profiles: Profiles) -> None:
    """A class on one plan is one flow of its pool."""
    sizer, options = started(profiles)
    sizing = sizer.assess({"picture": ((1.0, options[10]),)}, {"a100": 3})

    assert sizing.waits["a100"] == pool_wait(3, 1, [Flow(8.0, options[10].cloud_s)])
    assert sizing.rent_usd_per_hour == pytest.approx(3 * sizer.unit_rent["a100"])


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.05, 0.95), nodes=st.integers(2, 12))
def test_a_mix_lies_between_its_parts(profiles: Profiles, share: float, nodes: int) -> None:
    """Quality and egress of a mix are the mean of its parts; its load lies between theirs."""
    sizer, options = started(profiles)
    early, late = options[5], options[20]
    mixed = sizer.assess({"picture": ((share, early), (1 - share, late))}, {"a100": nodes})
    ends = [sizer.assess({"picture": ((1.0, option),)}, {"a100": nodes}) for option in (early, late)]

    assert mixed.egress_usd_per_hour == pytest.approx(
        share * ends[0].egress_usd_per_hour + (1 - share) * ends[1].egress_usd_per_hour
    )
    assert mixed.quality == pytest.approx(share * early.quality + (1 - share) * late.quality)
    loads = sorted(one.waits["a100"].utilisation for one in ends)
    assert loads[0] - 1e-9 <= mixed.waits["a100"].utilisation <= loads[1] + 1e-9


def test_a_part_that_is_turned_away_is_not_in_time(profiles: Profiles) -> None:
    """Shares below 1 leave the rest unserved, and that counts as missed."""
    sizer, options = started(profiles)
    sizing = sizer.assess({"picture": ((0.5, options[10]),)}, {"a100": 8})

    assert sizing.attainment["picture"] == pytest.approx(0.5, abs=1e-6)
    assert sizing.missed == pytest.approx(0.45, abs=1e-6)


def test_a_full_batch_is_slower_and_holds_its_gang_less(profiles: Profiles) -> None:
    """With a batch cap a request takes as long as the batch, and brings its part of it to the queue."""
    sizer, options = started(profiles)
    alone = options[10]
    both = replace(alone, plan=replace(alone.plan, batch_cap=2), batch_s=(alone.cloud_s, 1.5 * alone.cloud_s))

    assert (sizer.latencies(both) - sizer.latencies(alone)).min() == pytest.approx(0.5 * alone.cloud_s)
    one, two = sizer.flow(alone), sizer.flow(both)
    assert two.rate_per_s * two.hold_s == pytest.approx(0.75 * one.rate_per_s * one.hold_s)


def test_nodes_that_are_taken_away_serve_less_and_lose_work(profiles: Profiles) -> None:
    """Preemption lowers the attainment, the more the oftener; without any, spot is as good as on demand."""
    often = {"pools.a100.replacement_s": 600.0, "requests.picture.slo_s": 4.0}
    got = []
    for rate in (0.0, 1.0, 10.0):
        sizer, options = started(profiles, **{**often, "pools.a100.preemptions_per_node_hour": rate})
        got.append(sizer.assess({"picture": ((1.0, options[10]),)}, {"a100": 4}).attainment["picture"])
    plain, options = started(profiles, **often)

    assert got[0] == plain.assess({"picture": ((1.0, options[10]),)}, {"a100": 4}).attainment["picture"]
    assert got[0] > got[1] > got[2]


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1.0, 1.5), nodes=st.integers(2, 8))
def test_a_correction_factor_is_more_traffic(profiles: Profiles, factor: float, nodes: int) -> None:
    """A pool with a correction factor waits as it would at a rate that is higher by it."""
    sizer, options = started(profiles)
    mixes = {"picture": ((1.0, options[10]),)}
    sizer.correction_factors["a100"] = factor
    busier, _ = started(profiles, **{"requests.picture.arrivals.rate_per_s": 8.0 * factor})

    assert sizer.assess(mixes, {"a100": nodes}).attainment == pytest.approx(
        busier.assess(mixes, {"a100": nodes}).attainment, abs=1e-9
    )


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.5, 0.999))
def test_the_quantile_is_the_inverse_of_the_attainment(profiles: Profiles, share: float) -> None:
    """Of all requests, `share` finish within the quantile of `share`."""
    sizer, options = started(profiles)
    sizing = sizer.assess({"picture": ((0.6, options[10]), (0.4, options[25]))}, {"a100": 5})
    quantile_s = sizer.quantile(sizing, share)
    within = sum(
        part * sizer.share_in_time(option, sizing.waits["a100"], quantile_s) for part, option in sizing.mixes["picture"]
    )

    assert within >= share - 1e-6
    assert np.isfinite(quantile_s)


def test_edge_devices_that_cannot_keep_up_are_missed(profiles: Profiles) -> None:
    """Eight pictures a second are too much for a handful of phones."""
    sizer, options = started(profiles, **{"edge.phones.replicas": 5})

    assert sizer.assess({"picture": ((1.0, options[10]),)}, {"a100": 8}).missed > 0.0


def test_the_scenario_may_have_no_pool(profiles: Profiles) -> None:
    """Where everything runs at the edge nothing is rented and nobody waits."""
    scenario: Scenario = load_scenario("quickstart", overrides={"pools.a100": None})
    option = find_candidates(scenario, profiles).by_class["picture"][0]
    sizing = Sizer(scenario, profiles).assess({"picture": ((1.0, option),)}, {})

    assert sizing.usd_per_hour == 0.0
    assert sizing.waits == {}
