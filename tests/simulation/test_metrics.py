"""Figures, their intervals and the verdict, from records made by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from math import inf, isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulation import IN_FLIGHT, SERVED, UNITS, UNSERVED, Records, area, pool_table, utilisation_series
from hybridsd_sim.simulation.metrics import COUNTS, quantile, ratio, share, summarise
from hybridsd_sim.simulation.records import INDEX, WIDTH
from hybridsd_sim.simulation.result import verdict_of

PLAIN = {
    "class_index": 0, "plan_index": 0, "status": SERVED, "reason": -1, "deadline_s": inf, "model_load_s": 0.0,
    "transfer_s": 0.0, "degree": 1, "pool_index": 0, "node": 0, "fleet_index": -1, "device": -1, "gpu_seconds": 1.0,
    "usd": 0.01, "edge_energy_j": 0.0, "bytes_down": 1000.0, "quality": 0.3, "batch_size": 1, "restarts": 0,
    "lost_gpu_s": 0.0,
}  # fmt: skip
RUNS = 250


def recorded(arrival_s, replication=0, classes=("photo",), **columns):
    """Records with the given columns, arrays or numbers; what is not said is as in `PLAIN`, or does not apply."""
    table = np.full((len(arrival_s), WIDTH), nan)
    for name, values in (PLAIN | {"request": np.arange(len(arrival_s)), "arrival_s": arrival_s} | columns).items():
        table[:, INDEX[name]] = values
    return Records(tuple(classes), ("a100",), ("phones",), ("plan",), ("no_candidate",), replication, table)


def served(arrival_s, latency_s, **columns):
    """Records of requests that all end, without any stage."""
    return recorded(arrival_s, finish_s=np.asarray(arrival_s) + latency_s, **columns)


def world(requests=None, budget=None, **values):
    """A scenario with one pool of two nodes of two GPUs, and request classes with the given promises."""
    picture = {
        "origin": "phones", "model": "sd14", "height_px": 512, "width_px": 512, "num_inference_steps": 25,
        "arrivals": {"process": "poisson", "rate_per_s": 1.0},
    }  # fmt: skip
    data = {
        "name": "by-hand",
        "horizon_s": 100.0,
        "requests": {name: picture | spec for name, spec in (requests or {"photo": {}}).items()},
        "edge": {"phones": {"device": "snapdragon-8-gen-3", "replicas": 10, "network": "lte"}},
        "pools": {"a100": {"gpu": "a100-sxm-80gb", "gpus_per_node": 2, "replicas_max": 2}},
        "budget": budget or {},
    }
    return Scenario.model_validate_json(json.dumps(data | values))


def summary_of(scenario, *replications, usd_per_hour=None):
    """The summary without its policy level."""
    return summarise(scenario, "fixed", replications, usd_per_hour).droplevel("policy")


def interval(summary, name, request_class="all"):
    """A figure with its interval."""
    return tuple(summary.loc[request_class, f"{name}{end}"] for end in ("", "_low", "_high"))


def ten_rows():
    """Measured: four served in time, one late, two unserved, one in flight past its deadline, one in flight not yet."""
    arrival_s = np.array([5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 99.0])
    cloud_wait_s = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 4.0, nan, nan, 0.0, 0.0])
    edge_after_s = np.array([3.0, nan, 1.0, nan, nan, 6.0, nan, nan, nan, nan])
    edge_wait_s = np.array([0.0, nan, 0.0, nan, nan, 0.5, nan, nan, nan, nan])
    latency_s = np.array([4.0, 1.0, 2.0, 3.0, 5.0, 9.0, nan, nan, nan, nan])
    return recorded(
        arrival_s,
        finish_s=arrival_s + latency_s,
        deadline_s=arrival_s + 5.0,
        status=[SERVED] * 6 + [UNSERVED] * 2 + [IN_FLIGHT] * 2,
        cloud_ready_s=arrival_s,
        cloud_start_s=arrival_s + cloud_wait_s,
        edge_ready_s=arrival_s + edge_after_s,
        edge_start_s=arrival_s + edge_after_s + edge_wait_s,
        gpu_seconds=[9.0, 1.0, 1.0, 2.0, 2.0, 4.0, 0.0, 0.0, 20.0, 1.0],
        usd=[9.0, 0.1, 0.1, 0.2, 0.2, 0.4, 0.0, 0.0, 0.2, 0.2],
        quality=[0.9, 0.2, 0.3, 0.3, 0.3, 0.4, nan, nan, 0.1, 0.1],
    )


def test_ten_rows_by_hand():
    """Warm-up is left out; attainment, rates, means and figures per image are what a person computes from ten rows."""
    scenario = world({"photo": {"slo_s": 5.0, "num_images": 2}}, warmup_s=10.0)
    row = summary_of(scenario, ten_rows(), usd_per_hour=3.6).loc["all"]

    assert [row[name] for name in COUNTS] == [9, 5, 2, 2]
    assert row["slo_attainment"] == pytest.approx(4 / (5 + 2 + 1))
    assert row["offered_per_s"] == pytest.approx(9 / 90)
    assert row["served_per_s"] == pytest.approx(5 / 90)
    assert row["goodput_per_s"] == pytest.approx(4 / 90)
    assert row["unserved_share"] == pytest.approx(2 / 9)
    assert row["latency_mean_s"] == pytest.approx(20 / 5)
    assert row["latency_p50_s"] == pytest.approx(3.0)
    assert row["latency_p95_s"] == pytest.approx(np.quantile([1, 2, 3, 5, 9], 0.95))
    assert row["wait_mean_s"] == pytest.approx((0.5 + 4.5) / 5)
    assert row["quality_mean"] == pytest.approx(1.5 / 5)
    assert row["gpu_seconds_per_image"] == pytest.approx(10 / (5 * 2))
    assert row["metered_usd_per_image"] == pytest.approx(1.0 / (5 * 2))
    assert row["bytes_down_per_image"] == pytest.approx(5 * 1000 / (5 * 2))
    assert row["rent_usd_per_hour"] == 3.6
    assert row["rent_usd_per_image"] == pytest.approx(3.6 / 3600 / (10 / 90))


def test_the_summary_is_by_policy_and_class():
    """A row per class in the scenario's order, then one for all, whose counts are the sums of the classes'."""
    scenario = world({"b": {"slo_s": 2.0}, "a": {}})
    records = served(np.arange(100.0), 1.0, classes=("b", "a"), class_index=np.arange(100) % 4 == 0)
    frame = summarise(scenario, "fixed", [records], None)

    assert frame.index.tolist() == [("fixed", "b"), ("fixed", "a"), ("fixed", "all")]
    assert frame.index.names == ["policy", "request_class"]
    assert frame["served"].tolist() == [75, 25, 100]


def test_every_number_has_a_unit():
    """Each numeric column of both tables has its unit beside it, and each figure its interval."""
    scenario = world()
    for frame in (
        summarise(scenario, "fixed", [ten_rows()], 1.0),
        pool_table(scenario, "fixed", [ten_rows()], {"a100": 2}),
    ):
        numeric = list(frame.select_dtypes("number").columns)

        assert set(frame.attrs["units"]) == set(numeric) == set(frame.columns)
        assert all(frame.attrs["units"].values())
        for name in numeric:
            if name not in {*COUNTS, "gpus", "jobs"} and not name.endswith(("_low", "_high")):
                assert {f"{name}_low", f"{name}_high"} <= set(numeric)


def covered(figures, truth):
    """Share of intervals that hold the truth; an unknown end holds nothing."""
    return np.mean([low <= truth <= high for _, low, high in figures])


@pytest.mark.parametrize("replications", [1, 2, 8])
def test_intervals_hold_the_truth_at_their_level(replications):
    """On independent data about 95% of the intervals hold the true mean, quantile, rate and share, batches or runs."""
    rng = np.random.default_rng(20240229)
    scenario = world({"photo": {"slo_s": 2.0}}, replications=replications)
    found = {"latency_mean_s": [], "latency_p50_s": [], "latency_p95_s": [], "offered_per_s": [], "slo_attainment": []}
    for _ in range(RUNS):
        runs = []
        for number in range(replications):
            arrival_s = np.sort(rng.random(rng.poisson(800 // replications)) * 100.0)
            latency_s = rng.exponential(1.0, len(arrival_s))
            runs.append(served(arrival_s, latency_s, deadline_s=arrival_s + 2.0, replication=number))
        summary = summary_of(scenario, *runs)
        for name, values in found.items():
            values.append(interval(summary, name))
    truth = {
        "latency_mean_s": 1.0,
        "latency_p50_s": np.log(2.0),
        "latency_p95_s": np.log(20.0),
        "offered_per_s": 800 // replications / 100.0,
        "slo_attainment": 1 - np.exp(-2.0),
    }

    for name, values in found.items():
        assert 0.91 <= covered(values, truth[name]) <= 0.985, name


def test_intervals_know_that_neighbours_resemble_each_other():
    """Where latencies drift slowly, batches still hold the mean nine times in ten; independent requests would not."""
    rng = np.random.default_rng(7)
    scenario = world()
    arrival_s = np.linspace(0.0, 99.9, 4000)
    batches, naive = [], []
    for _ in range(RUNS // 4):
        drift = np.zeros(4000)
        for at, noise in enumerate(rng.normal(size=3999)):
            drift[at + 1] = 0.95 * drift[at] + noise
        latency_s = 20.0 + drift
        batches.append(interval(summary_of(scenario, served(arrival_s, latency_s)), "latency_mean_s"))
        half = 1.96 * latency_s.std() / sqrt(4000)
        naive.append((0.0, latency_s.mean() - half, latency_s.mean() + half))

    assert covered(batches, 20.0) >= 0.88
    assert covered(naive, 20.0) <= 0.6


def test_unequal_batches_keep_their_level():
    """On a day with a quiet and a busy half the intervals of the mean hold the truth as often as on an even day."""
    rng = np.random.default_rng(11)
    scenario = world()
    found = []
    for _ in range(RUNS):
        arrival_s = np.sort(np.concatenate([rng.random(40) * 50.0, 50.0 + rng.random(600) * 50.0]))
        found.append(interval(summary_of(scenario, served(arrival_s, rng.exponential(1.0, 640))), "latency_mean_s"))

    assert 0.91 <= covered(found, 1.0) <= 0.985


def test_five_replications_are_five_observations():
    """With five replications of equal size the interval is Student's t over their means."""
    rng = np.random.default_rng(5)
    scenario = world(replications=5)
    latencies = rng.exponential(1.0, (5, 200))
    runs = [served(np.linspace(0.0, 99.0, 200), latency_s, replication=n) for n, latency_s in enumerate(latencies)]
    means = latencies.mean(axis=1)
    low, high = stats.t.interval(0.95, 4, means.mean(), means.std(ddof=1) / sqrt(5))

    assert interval(summary_of(scenario, *runs), "latency_mean_s") == pytest.approx((means.mean(), low, high))


@pytest.mark.parametrize(("replications", "batches"), [(1, 20), (2, 20), (4, 40)])
def test_fewer_replications_are_cut_into_batches(replications, batches):
    """One replication gives twenty observations, two to four ten each; with equal batches the interval is Student's."""
    rng = np.random.default_rng(6)
    latencies = rng.exponential(1.0, (replications, 400))
    arrival_s = (np.arange(400) + 0.5) / 4
    runs = [served(arrival_s, latency_s, replication=n) for n, latency_s in enumerate(latencies)]
    means = latencies.reshape(batches, -1).mean(axis=1)
    low, high = stats.t.interval(0.95, batches - 1, means.mean(), means.std(ddof=1) / sqrt(batches))

    found = interval(summary_of(world(replications=replications), *runs), "latency_mean_s")
    assert found == pytest.approx((means.mean(), low, high))


def test_a_share_of_none_or_all_is_not_certain():
    """When all of n are in time the interval still ends where n would all be in time in one case of forty."""
    scenario = world({"photo": {"slo_s": 5.0}})
    arrival_s = np.linspace(0.0, 99.0, 50)
    summary = summary_of(scenario, served(arrival_s, 1.0, deadline_s=arrival_s + 5.0))
    exact = stats.binomtest(50, 50).proportion_ci(0.95, method="exact")

    assert interval(summary, "slo_attainment") == pytest.approx((1.0, exact.low, 1.0))
    assert interval(summary, "unserved_share") == pytest.approx((0.0, 0.0, 1.0 - exact.low))


def test_what_never_varies_has_a_narrow_interval():
    """Requests that all take the same seconds leave nothing to doubt about the mean and the quantiles."""
    summary = summary_of(world(), served(np.linspace(0.0, 99.0, 50), 1.5))

    for name in ("latency_mean_s", "latency_p50_s", "latency_p95_s", "latency_p99_s"):
        assert interval(summary, name) == pytest.approx((1.5, 1.5, 1.5))


def test_a_tail_beyond_the_data_is_unknown():
    """The p99 of thirty requests has no upper end, because nobody saw what lies above it."""
    rng = np.random.default_rng(3)
    summary = summary_of(world(), served(np.linspace(0.0, 99.0, 30), rng.exponential(1.0, 30)))
    value, low, high = interval(summary, "latency_p99_s")

    assert low < value
    assert isnan(high)


def test_nothing_is_known_of_nobody():
    """A class that nobody asked for has counts of 0, rates of 0, and no other figure; the rest goes on without it."""
    scenario = world({"photo": {"slo_s": 5.0}, "rare": {"quality_floor": 0.2}})
    records = served(np.linspace(0.0, 99.0, 50), 1.0, classes=("photo", "rare"))
    summary = summary_of(scenario, records, usd_per_hour=1.0)
    rare = summary.loc["rare"]

    assert [rare[name] for name in COUNTS] == [0, 0, 0, 0]
    for name in UNITS:
        if name in {"offered_per_s", "served_per_s", "goodput_per_s"}:
            assert rare[name] == 0.0
        else:
            assert isnan(rare[name]), name
        if name not in {"unserved_share", "slo_attainment"}:
            assert isnan(rare[f"{name}_low"]), name
    assert summary.loc["all", "quality_mean"] == pytest.approx(0.3)


def test_a_run_without_requests_has_a_table():
    """No records give a table of unknown figures rather than an error."""
    summary = summary_of(world(), served(np.empty(0), 1.0))

    assert summary.loc["all", "requests"] == 0
    assert isnan(summary.loc["all", "latency_p95_s"])


def test_one_request_has_no_interval():
    """A single observation has a value and nothing to judge its noise by."""
    for name in ("latency_mean_s", "latency_p95_s", "quality_mean", "gpu_seconds_per_image"):
        value, low, high = interval(summary_of(world(), served(np.array([50.0]), 2.0)), name)

        assert not isnan(value)
        assert isnan(low)
        assert isnan(high)


def test_when_everything_is_refused_there_is_no_latency():
    """A run that serves nobody attains 0, and its latency, quality and price of an image are unknown, not 0."""
    scenario = world({"photo": {"slo_s": 5.0}})
    refused = recorded(np.linspace(0.0, 99.0, 40), status=UNSERVED, deadline_s=inf, reason=0, usd=0.0, quality=nan)
    row = summary_of(scenario, refused, usd_per_hour=2.0).loc["all"]

    assert row["slo_attainment"] == 0.0
    assert row["unserved_share"] == 1.0
    assert row["rent_usd_per_hour"] == 2.0
    for name in ("latency_mean_s", "latency_p50_s", "quality_mean", "metered_usd_per_image", "rent_usd_per_image"):
        assert isnan(row[name]), name


@pytest.mark.parametrize(
    ("column_name", "figure"),
    [("quality", "quality_mean"), ("usd", "metered_usd_per_image"), ("edge_energy_j", "edge_energy_j_per_image")],
)
def test_what_nobody_knows_of_one_is_unknown_of_all(column_name, figure):
    """One served request without a known figure leaves its class and everyone without it, and other classes with it."""
    values, kinds = np.full(40, 0.3), np.arange(40) % 2
    values[6] = nan
    scenario = world({"even": {}, "odd": {}})
    columns = {"class_index": kinds, column_name: values}
    summary = summary_of(scenario, served(np.linspace(0.0, 99.0, 40), 1.0, classes=("even", "odd"), **columns))

    assert isnan(summary.loc["even", figure])
    assert isnan(summary.loc["all", figure])
    assert summary.loc["odd", figure] == pytest.approx(0.3)


def test_a_refused_request_has_no_say_in_the_quality():
    """Requests that were not served do not make the quality of those served unknown."""
    status = np.where(np.arange(40) % 2, SERVED, UNSERVED)
    quality = np.where(status == SERVED, 0.3, nan)
    records = served(np.linspace(0.0, 99.0, 40), 1.0, status=status, quality=quality)

    assert summary_of(world(), records).loc["all", "quality_mean"] == pytest.approx(0.3)


def test_rent_is_everybody_s():
    """The rent stands in the row over all classes alone, and is unknown where a price is."""
    records = served(np.linspace(0.0, 99.0, 40), 1.0)

    assert isnan(summary_of(world(), records, usd_per_hour=2.0).loc["photo", "rent_usd_per_hour"])
    assert interval(summary_of(world(), records, usd_per_hour=2.0), "rent_usd_per_hour") == (2.0, 2.0, 2.0)
    assert isnan(summary_of(world(), records).loc["all", "rent_usd_per_hour"])


@st.composite
def random_runs(draw):
    """A scenario of two classes, and records of up to three replications with every kind of ending."""
    count, replications = draw(st.integers(0, 120)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    runs = []
    for number in range(replications):
        arrival_s = np.sort(rng.random(count) * 100.0)
        status = rng.integers(0, 3, count)
        finish_s = np.where(status == SERVED, arrival_s + rng.exponential(2.0, count), nan)
        runs.append(
            recorded(
                arrival_s, number, ("a", "b"), class_index=rng.integers(0, 2, count), status=status, finish_s=finish_s,
                deadline_s=arrival_s + 2.0, quality=rng.random(count), gpu_seconds=rng.random(count),
            )
        )  # fmt: skip
    return world({"a": {"slo_s": 2.0}, "b": {"slo_s": 2.0}}, warmup_s=draw(st.sampled_from([0.0, 20.0]))), runs


@given(random_runs())
def test_figures_agree_with_each_other(case):
    """Goodput is at most what is served, that at most what is offered; quantiles rise; intervals hold their figures."""
    scenario, runs = case
    summary = summary_of(scenario, *runs, usd_per_hour=1.0)
    for name, row in summary.iterrows():
        assert row["goodput_per_s"] <= row["served_per_s"] <= row["offered_per_s"]
        assert row["requests"] == row["served"] + row["unserved"] + row["in_flight"]
        assert not row["latency_p50_s"] > row["latency_p95_s"]
        assert not row["latency_p95_s"] > row["latency_p99_s"]
        for figure in UNITS:
            value, low, high = interval(summary, figure, name)
            slack = 1e-12 * abs(value)
            assert not low > value + slack, figure
            assert not high < value - slack, figure
            assert not low < 0, figure
        for figure in ("unserved_share", "slo_attainment", "quality_mean"):
            assert not row[figure] > 1


@given(random_runs(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_runs_does_not_matter(case, rng):
    """The same requests in another order, and replications in another order, give the same summary."""
    scenario, runs = case
    shuffled = []
    for records in runs:
        order = list(range(len(records)))
        rng.shuffle(order)
        shuffled.append(recorded(np.empty(0), records.replication, records.classes))
        shuffled[-1].table = records.table[order]
    rng.shuffle(shuffled)
    one, other = summary_of(scenario, *runs, usd_per_hour=1.0), summary_of(scenario, *shuffled, usd_per_hour=1.0)

    np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=1e-9, atol=1e-12)


@given(random_runs())
def test_summarising_changes_nothing(case):
    """Records are the same before and after."""
    scenario, runs = case
    before = [records.table.copy() for records in runs]
    summary_of(scenario, *runs)

    for was, records in zip(before, runs, strict=True):
        np.testing.assert_array_equal(was, records.table)


def test_a_class_without_slo_is_in_time_when_it_is_served():
    """Without a deadline, attainment is the share served of those that ended."""
    status = [SERVED] * 30 + [UNSERVED] * 10 + [IN_FLIGHT] * 10
    summary = summary_of(world(), served(np.linspace(0.0, 99.0, 50), 50.0, status=status))

    assert summary.loc["photo", "slo_attainment"] == pytest.approx(30 / 40)


def test_a_deadline_met_to_the_rounding_is_met():
    """A latency equal to the SLO is in time though its sum of seconds is off by a rounding."""
    arrival_s = np.linspace(0.0, 90.0, 50)
    records = served(arrival_s, 5.0 + 1e-9, deadline_s=arrival_s + 5.0)

    assert summary_of(world({"photo": {"slo_s": 5.0}}), records).loc["all", "slo_attainment"] == 1.0


def test_estimates_by_hand():
    """A ratio weighs its cells by what is below the line; a quantile may lie between two values."""
    found = ratio(np.array([1.0, 6.0]), np.array([1.0, 3.0]))
    half = stats.t.ppf(0.975, 1) * sqrt(2 * (0.75**2 + 0.75**2)) / 4

    assert (found.value, *found.interval) == pytest.approx((1.75, 0.0, 1.75 + half))
    assert share(np.array([1.0, 0.0]), np.array([2.0, 2.0])).value == 0.25
    assert quantile(np.array([1.0, 2.0, 4.0]), np.array([0, 1, 2]), 0.75).value == pytest.approx(3.0)


def gangs():
    """On four GPUs: two from 0 to 30 s, one from 20 to 60 s after waiting 5 s, one from 90 s; a gang waits."""
    return recorded(
        np.array([0.0, 15.0, 90.0, 95.0]),
        status=[SERVED, SERVED, IN_FLIGHT, IN_FLIGHT],
        cloud_ready_s=[0.0, 15.0, 90.0, 95.0],
        cloud_start_s=[0.0, 20.0, 90.0, nan],
        cloud_stop_s=[30.0, 60.0, nan, nan],
        finish_s=[30.0, 60.0, nan, nan],
        degree=[2, 1, 1, 4],
    )


def test_pools_by_hand():
    """GPU time counts inside the measured time alone, whoever began it; jobs and waits are of measured arrivals."""
    frame = pool_table(world(warmup_s=10.0), "fixed", [gangs()], {"a100": 2}).droplevel("policy")
    row = frame.loc["a100"]

    assert (row["gpus"], row["jobs"]) == (4, 2)
    assert row["utilisation"] == pytest.approx((2 * 20 + 40 + 10) / (4 * 90))
    assert 0.0 <= row["utilisation_low"] < row["utilisation"] < row["utilisation_high"] <= 1.0
    assert row["queue_wait_mean_s"] == pytest.approx((5.0 + 0.0) / 2)


def test_a_batch_keeps_its_gang_busy_once():
    """Two requests on one gang of two are as busy as one; what was lost with a node counts on top."""
    one, two = recorded(np.array([10.0]), degree=2), recorded(np.array([10.0, 10.0]), degree=2, batch_size=2)
    lost = recorded(np.array([10.0]), degree=2, restarts=1, lost_gpu_s=20.0)
    for records in (one, two, lost):
        records.table[:, INDEX["cloud_ready_s"]] = records.table[:, INDEX["cloud_start_s"]] = 20.0
        records.table[:, INDEX["cloud_stop_s"]] = 50.0
    busy = [pool_table(world(), "fixed", [each], {"a100": 1})["utilisation"].iloc[0] for each in (one, two, lost)]

    assert busy == pytest.approx([2 * 30 / 200, 2 * 30 / 200, (2 * 30 + 20) / 200])
    assert utilisation_series(two, 0, 2, 100.0, 1)[1] == pytest.approx([0.3])


def test_a_pool_without_nodes_has_no_utilisation():
    """Nothing rented is neither idle nor busy, and a scenario without pools has an empty table."""
    frame = pool_table(world(), "fixed", [recorded(np.empty(0))], {"a100": 0})
    nothing = pool_table(world(pools={}), "fixed", [recorded(np.empty(0))], {})

    assert frame["gpus"].tolist() == frame["jobs"].tolist() == [0]
    assert isnan(frame["utilisation"].iloc[0])
    assert isnan(frame["queue_wait_p95_s"].iloc[0])
    assert len(nothing) == 0
    assert nothing.columns.tolist() == frame.columns.tolist()


def test_utilisation_over_time_by_hand():
    """Each bin has the share of its GPU time that was held, and the requests that waited on average."""
    time_s, busy, waiting = utilisation_series(gangs(), 0, 4, 100.0, 10)

    assert time_s.tolist() == pytest.approx([5, 15, 25, 35, 45, 55, 65, 75, 85, 95])
    assert (4 * busy).tolist() == pytest.approx([2, 2, 3, 1, 1, 1, 0, 0, 0, 1], abs=1e-9)
    assert waiting.tolist() == pytest.approx([0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.5], abs=1e-9)
    assert np.isnan(utilisation_series(gangs(), 0, 0, 100.0, 10)[1]).all()
    assert not utilisation_series(gangs(), 1, 4, 100.0, 10)[1].any()


@given(
    st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 50.0), st.integers(1, 4)), max_size=30), st.integers(1, 9)
)
def test_areas_are_sums_of_overlaps(spans, cells):
    """However the time is cut, the area in each cell is what the spans overlap with it, and the cells add up."""
    begin_s, length_s, weight = (np.array([span[part] for span in spans], dtype=float) for part in range(3))
    edges_s = np.linspace(0.0, 100.0, cells + 1)
    end_s = begin_s + length_s
    expected = [
        (weight * np.clip(np.minimum(end_s, stop) - np.maximum(begin_s, start), 0.0, None)).sum()
        for start, stop in pairwise(edges_s)
    ]

    np.testing.assert_allclose(area(begin_s, end_s, weight, edges_s), expected, atol=1e-6)


def verdict(scenario, *replications, usd_per_hour=None, outside=None):
    """The verdict on records."""
    summary = summarise(scenario, "fixed", replications, usd_per_hour)
    return verdict_of(scenario, summary, replications, outside or {})


def steady(count=1000, **columns):
    """Evenly spread requests of 1 to 1.2 s with 2 s of time."""
    arrival_s = (np.arange(count) + 0.5) * (100.0 / count) * 0.98
    latency_s = np.random.default_rng(4).uniform(1.0, 1.2, count)
    plain = {"deadline_s": arrival_s + 2.0, "edge_energy_j": 5.0}
    return served(arrival_s, latency_s, **(plain | columns))


PROMISES = {"slo_s": 2.0, "slo_percentile": 90.0, "quality_floor": 0.29, "edge_energy_j": 6.0, "usd_per_image": 0.02}


def test_a_run_that_keeps_every_promise_is_feasible():
    """A run inside its SLO, floor, joules, dollars and rent is feasible, and the reason names the closest promise."""
    scenario = world({"photo": PROMISES}, {"usd_per_hour": 4.0, "usd_per_image": 0.01})
    found = verdict(scenario, steady(), usd_per_hour=3.0).feasible

    assert found.ok
    assert "closest: photo: quality 0.3000 CLIP, at least 0.2900 CLIP asked" in found.reason


@pytest.mark.parametrize(
    ("promise", "columns", "words"),
    [
        (
            {"slo_percentile": 95.0},
            {"status": np.where(np.arange(1000) % 5, SERVED, UNSERVED)},
            "served within 2 s 80.0%",
        ),
        ({"quality_floor": 0.31}, {}, "quality 0.3000 CLIP, at least 0.3100 CLIP asked"),
        ({}, {"quality": nan}, "quality unknown, at least 0.2900 CLIP asked"),
        ({"edge_energy_j": 4.0}, {}, "edge energy 5.00 J/image, at most 4 J/image asked"),
        ({}, {"edge_energy_j": nan}, "edge energy unknown"),
        ({"usd_per_image": 0.005}, {}, "metered price 0.0100 USD/image, at most 0.005 USD/image asked"),
        ({}, {"usd": nan}, "metered price unknown"),
    ],
)
def test_a_broken_promise_is_named_with_its_numbers(promise, columns, words):
    """A promise of a class that does not hold, or of which nobody knows whether it does, makes the run infeasible."""
    found = verdict(world({"photo": PROMISES | promise}), steady(**columns)).feasible

    assert not found.ok
    assert found.reason.startswith("photo: ")
    assert words in found.reason


@pytest.mark.parametrize(
    ("budget", "usd_per_hour", "words"),
    [
        ({"usd_per_hour": 4.0}, 5.0, "rent 5.00 USD/h, at most 4 USD/h asked"),
        ({"usd_per_hour": 4.0}, None, "rent unknown, at most 4 USD/h asked"),
        ({"usd_per_image": 0.0001}, 36.0, "rent 0.00100 USD/image, at most 0.0001 USD/image asked"),
        ({"edge_energy_j_per_image": 4.0}, 1.0, "photo: edge energy 5.00 J/image, at most 4 J/image asked"),
    ],
)
def test_a_budget_that_is_exceeded_is_named(budget, usd_per_hour, words):
    """Rent and joules over the budget, or an unknown rent under one, make the run infeasible."""
    found = verdict(world({"photo": {"slo_s": 2.0}}, budget), steady(), usd_per_hour=usd_per_hour).feasible

    assert not found.ok
    assert words in found.reason


def test_further_broken_promises_are_counted():
    """The first broken promise is told, and how many there are besides."""
    found = verdict(world({"photo": PROMISES | {"quality_floor": 0.9, "edge_energy_j": 0.1}}), steady()).feasible

    assert "quality" in found.reason
    assert "(1 more broken)" in found.reason


def test_an_interval_across_the_bound_is_undecided():
    """The figure itself decides, and the reason says that the interval reaches to the other side."""
    lucky = verdict(world({"photo": PROMISES | {"slo_percentile": 99.0}}), steady(count=50)).feasible
    noisy = steady(status=np.where(np.random.default_rng(2).random(1000) < 0.9, SERVED, UNSERVED))
    unlucky = verdict(world({"photo": PROMISES | {"slo_percentile": 91.0}}), noisy).feasible

    assert lucky.ok
    assert not unlucky.ok
    assert "undecided (95% interval" in lucky.reason
    assert "undecided (95% interval" in unlucky.reason


def test_a_percentile_met_exactly_is_met():
    """999 of 1000 in time meet a percentile of 99.9, whatever 99.9 / 100 rounds to."""
    status = np.where(np.arange(1000) == 500, UNSERVED, SERVED)
    scenario = world({"photo": {"slo_s": 2.0, "slo_percentile": 99.9}})

    assert verdict(scenario, steady(status=status)).feasible.ok


def test_what_is_broken_by_less_than_is_shown_does_not_read_as_kept():
    """9497 of 10000 in time are written 95.0%, which is just under the 95.0% asked."""
    status = np.where(np.arange(10_000) < 9497, SERVED, UNSERVED)
    found = verdict(world({"photo": {"slo_s": 2.0, "slo_percentile": 95.0}}), steady(count=10_000, status=status))

    assert "served within 2 s just under 95.0%, at least 95.0% asked" in found.feasible.reason


def test_a_class_that_nobody_measured_is_not_called_feasible():
    """A class without measured requests has an unknown attainment, which keeps no promise."""
    scenario = world({"photo": {"slo_s": 2.0}, "rare": {"slo_s": 2.0}})
    found = verdict(scenario, steady(classes=("photo", "rare"))).feasible

    assert not found.ok
    assert found.reason == "rare: served within 2 s unknown, at least 95.0% asked"


def queue(arrival_s, hold_s, horizon_s):
    """Records of one GPU that serves in order of arrival."""
    start_s, free_s = np.empty(len(arrival_s)), 0.0
    for at, now in enumerate(arrival_s):
        start_s[at] = max(now, free_s)
        free_s = start_s[at] + hold_s
    start_s[start_s > horizon_s] = nan
    stop_s = np.where(start_s + hold_s <= horizon_s, start_s + hold_s, nan)
    status = np.where(np.isnan(stop_s), IN_FLIGHT, SERVED)
    return recorded(
        arrival_s, cloud_ready_s=arrival_s, cloud_start_s=start_s, cloud_stop_s=stop_s, finish_s=stop_s, status=status
    )


@pytest.mark.parametrize(("load", "ok"), [(0.3, True), (0.8, True), (1.1, False), (1.5, False), (20.0, False)])
def test_a_queue_that_grows_is_unstable(load, ok):
    """Below its capacity a queue is steady; above, even where hardly anybody is ever served, it is found to grow."""
    rng = np.random.default_rng(12)
    arrival_s = np.sort(rng.random(4000) * 4000.0)
    found = verdict(world(horizon_s=4000.0, warmup_s=100.0), queue(arrival_s, load, 4000.0)).stable

    assert found.ok is ok
    assert found.reason.startswith("no queue grows" if ok else "the queue grows")


def test_steady_queues_are_seldom_called_growing():
    """At 90% load fewer than one in ten runs looks unstable."""
    rng = np.random.default_rng(13)
    scenario = world(horizon_s=2000.0, warmup_s=200.0)
    runs = [queue(np.sort(rng.random(2000) * 2000.0), 0.9, 2000.0) for _ in range(60)]

    assert np.mean([verdict(scenario, run).stable.ok for run in runs]) >= 0.9


def test_a_peak_that_is_over_is_no_growth():
    """A rush in the last third whose queue is gone by the horizon leaves nothing unfinished and is no growth."""
    rush = np.sort(np.concatenate([np.linspace(0.0, 880.0, 300), np.linspace(700.0, 800.0, 150)]))
    found = verdict(world(horizon_s=1000.0), queue(rush, 1.0, 1000.0)).stable

    assert found.ok


def test_waiting_at_the_edge_counts_too():
    """A queue before shared edge devices that grows is unstable like one before GPUs."""
    records = queue(np.linspace(0.0, 999.0, 1000), 2.0, 1000.0)
    for end in ("ready", "start", "stop"):
        records.table[:, INDEX[f"edge_{end}_s"]] = records.table[:, INDEX[f"cloud_{end}_s"]]
        records.table[:, INDEX[f"cloud_{end}_s"]] = nan

    assert not verdict(world(horizon_s=1000.0), records).stable.ok


def test_convergence_is_about_the_p95():
    """Many requests pin the p95 latency down; few do not, and very few say nothing of it."""
    rng = np.random.default_rng(8)
    many, some = (served(np.linspace(0.0, 99.0, n), rng.exponential(1.0, n)) for n in (20_000, 200))
    few = served(np.linspace(0.0, 99.0, 10), rng.exponential(1.0, 10))

    assert verdict(world(), many).converged.ok
    assert not verdict(world(), some).converged.ok
    assert "at most ±10.0% asked" in verdict(world(), some).converged.reason
    assert "too few requests" in verdict(world(), few).converged.reason


def test_what_was_not_measured_is_named():
    """The first prediction outside what was measured is told with its plan, and how many there are."""
    outside = {"hybrid k=10": ("1024 px beyond 768 px", "batch 8 beyond 4"), "cloud": ("1024 px beyond 768 px",)}
    found = verdict(world(), steady(), outside=outside).in_domain

    assert not found.ok
    assert found.reason.startswith(
        "3 predictions lie outside what was measured, first hybrid k=10: 1024 px beyond 768 px"
    )
    assert verdict(world(), steady()).in_domain.ok


def test_a_verdict_is_four_findings_in_order():
    """Feasible, stable, converged, in domain; each plain JSON with a yes or no and a reason."""
    found = verdict(world(), steady())
    said = json.loads(json.dumps(found.to_dict()))

    assert [finding.name for finding in found.findings] == ["feasible", "stable", "converged", "in_domain"]
    assert list(said) == [finding.name for finding in found.findings]
    assert all(set(one) == {"ok", "reason"} and isinstance(one["ok"], bool) and one["reason"] for one in said.values())
