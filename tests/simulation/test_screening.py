"""Laws of the compiled recursion: it is the simulation, request by request, wherever it says that it applies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridsd_sim import InputError, Profiles, Scenario, simulate
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.pricing import Candidate, find_candidates
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.scheduling import FleetView
from hybridsd_sim.scheduling.policies import Planned
from hybridsd_sim.simulation import Inputs, Records, check_laws, recursion_obstacle, screen
from hybridsd_sim.simulation.fleet import EdgeDevices, GpuPool, PoolJob
from hybridsd_sim.simulation.metrics import quantile_of, value_at
from hybridsd_sim.simulation.records import INDEX
from hybridsd_sim.simulation.screening import ScreenError
from hybridsd_sim.workload import Draws
from hybridsd_sim.workload.requests import clock_times

POOLS = ("a100", "l40s", "node")


@cache
def base() -> Scenario:
    """Two request classes from owned and shared devices, pools of single GPUs and of nodes of four."""
    quick = load_scenario("quickstart")
    picture, pool = quick.to_dict()["requests"]["picture"], quick.to_dict()["pools"]["a100"]
    changes: dict[str, Any] = {
        "requests": {"draft": {**picture, "origin": "laptops", "slo_s": 4.0, "edge_energy_j": None}},
        "edge": {"laptops": {"device": "snapdragon-8-gen-3", "replicas": 4, "network": "lte", "ownership": "shared"}},
        "pools": {"l40s": {**pool, "gpu": "l40s", "runtime": "tensorrt"}, "node": {**pool, "gpus_per_node": 4}},
        "search": {"switch_steps": [10, 20], "methods": ["single", "cfg_parallel", "pcpp"], "degrees": [2, 4]},
        "horizon_s": 90.0, "warmup_s": 10.0, "replications": 2,
    }  # fmt: skip
    return quick.with_overrides(changes)


@cache
def found(profiles: Profiles) -> Mapping[str, tuple[Candidate, ...]]:
    """Every legal plan of every class, priced."""
    return find_candidates(base(), profiles).by_class


def plans_of(profiles: Profiles, name: str) -> tuple[Plan, ...]:
    """Every legal plan of a class."""
    return tuple(option.plan for option in found(profiles)[name])


@cache
def kept_profiles() -> Profiles:
    """The shipped profiles, for what hypothesis draws before fixtures are there."""
    from hybridsd_sim import load_profiles

    return load_profiles()


def same_rows(ours: Records, theirs: Records) -> None:
    """Fail unless two runs recorded the same requests, to a nanosecond; plans may be numbered differently."""
    mine, other = ours.rows().copy(), theirs.rows().copy()
    for rows, records in ((mine, ours), (other, theirs)):
        names = np.array([*records.plans, ""], dtype=object)[rows[:, INDEX["plan_index"]].astype(int)]
        rows[:, INDEX["plan_index"]] = [hash(name) for name in names]
    assert mine.shape == other.shape
    for name, position in INDEX.items():
        np.testing.assert_allclose(mine[:, position], other[:, position], rtol=0, atol=1e-9, err_msg=name)


@st.composite
def mixes(draw: st.DrawFn, name: str, sites: Sequence[str], most: float = 1.0) -> tuple[Share, ...]:
    """One to three plans of a class on some pools with shares that make up at most all."""
    options = [p for p in plans_of(kept_profiles(), name) if all(s.site.name in sites for s in p.cloud_stages)]
    chosen = draw(st.lists(st.sampled_from(options), min_size=1, max_size=3))
    weights = [draw(st.floats(0.05, 1.0)) for _ in chosen]
    total = sum(weights) / draw(st.sampled_from([most, 0.7]))
    return tuple(Share(weight / total, plan) for weight, plan in zip(weights, chosen, strict=True))


@st.composite
def deployments(draw: st.DrawFn, sites: Sequence[str] = POOLS[:2]) -> Deployment:
    """Replicas and mixes; a pool may be empty and a class left out."""
    replicas = {name: draw(st.integers(0, 6)) for name in sites}
    classes = draw(st.sampled_from([("picture", "draft"), ("draft",), ("picture",)]))
    return Deployment(replicas, {name: draw(mixes(name, sites)) for name in classes})


variations = st.fixed_dictionaries({
    "seed": st.integers(0, 2**40),
    "requests.picture.arrivals.rate_per_s": st.floats(0.2, 8.0),
    "requests.draft.arrivals": st.sampled_from([
        {"process": "gamma", "rate_per_s": 2.0, "cv": 3.0}, {"process": "constant", "rate_per_s": 1.5},
        {"process": "daily", "rate_per_s": 3.0},
    ]),
    "edge.phones.replicas": st.sampled_from([1, 7, 300, 20_000]),
    "edge.phones.ownership": st.sampled_from(["user", "shared"]),
    "edge.laptops.replicas": st.integers(1, 12),
    "pools.l40s.cold_start_s": st.sampled_from([0.0, 20.0, 200.0]),
    "pools.l40s.discipline": st.sampled_from(["fifo", "gang_fifo", "backfill"]),
})  # fmt: skip
slowdowns = st.dictionaries(st.sampled_from(["a100", "l40s", "phones", "laptops"]), st.floats(0.5, 3.0), max_size=2)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variations, deployments(), slowdowns)
def test_every_request_is_that_of_the_simulation(
    profiles: Profiles, changes: dict[str, Any], deployment: Deployment, slower: dict[str, float]
) -> None:
    """Random mixes, fleets, queues, cold starts and slowdowns on single GPUs: the same rows to a nanosecond."""
    scenario = base().with_overrides(changes)
    tried = screen(scenario, profiles, deployment, slowdowns=slower)
    result = simulate(scenario, profiles, policy="planned", plan=deployment, slowdowns=slower)

    for ours, theirs in zip(tried.records, result.replications, strict=True):
        same_rows(ours, theirs)
    assert tried.used.keys() == result.used.keys()
    assert tried.result.usd_per_hour == result.usd_per_hour


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40), deployments(("node",)), st.sampled_from(["fifo", "gang_fifo", "backfill"]))
def test_gangs_are_those_of_the_simulation(
    profiles: Profiles, seed: int, deployment: Deployment, discipline: str
) -> None:
    """Gangs of one, two and four GPUs on nodes of four, in every discipline that the recursion knows."""
    changes = {"seed": seed, "pools.node.discipline": discipline, "pools.node.cold_start_s": 5.0, "replications": 1}
    scenario = base().with_overrides({**changes, "requests.picture.arrivals.rate_per_s": 4.0})
    tried = screen(scenario, profiles, deployment)
    result = simulate(scenario, profiles, policy="planned", plan=deployment)

    same_rows(tried.records[0], result.replications[0])


@settings(max_examples=150)
@given(
    st.integers(0, 2**40), st.integers(1, 4), st.sampled_from(["fifo", "gang_fifo", "backfill"]),
    st.sampled_from([0.0, 6.0]), st.floats(0.2, 3.0),
)  # fmt: skip
def test_gangs_start_when_and_where_the_pool_starts_them(
    seed: int, nodes: int, discipline: str, cold_start_s: float, load: float
) -> None:
    """Random gangs on idle and crowded nodes: the same starts to the bit, on the same nodes."""
    from hybridsd_sim.simulation.recursion import JobArrays, pool_queue

    rng, size = np.random.default_rng(seed), 120
    degree, hold_s = rng.integers(1, 5, size), rng.exponential(2.0, size) + 0.1
    ready_s = np.cumsum(rng.exponential(5.25 / (4 * nodes * load), size))
    env, jobs = (
        simpy.Environment(),
        [PoolJob(i, *job) for i, job in enumerate(zip(degree.tolist(), hold_s.tolist(), strict=True))],
    )
    pool: GpuPool[PoolJob] = GpuPool(
        env, nodes=nodes, gpus_per_node=4, discipline=discipline, done=lambda _: None, cold_start_s=cold_start_s
    )
    for ready, job in zip(ready_s.tolist(), jobs, strict=True):
        env.timeout(ready, job).callbacks.append(lambda event: pool.submit(event.value))
    env.run()
    each = np.arange(size)
    line = JobArrays(each, ready_s, each, hold_s, degree, np.full(size, np.inf), np.full(size, -1))
    pool_queue(line, nodes=nodes, gpus_per_node=4, discipline=discipline, cold_start_s=cold_start_s)

    assert line.start_s.tolist() == [job.cloud_start_s for job in jobs]
    assert line.server.tolist() == [job.node for job in jobs]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 3), st.floats(0, 0.999)), max_size=150), st.booleans())
def test_devices_serve_as_the_fleet_has_it(drawn: list[tuple[float, float, float]], shared: bool) -> None:
    """Owned and shared edge devices: the same start on the same device, whatever the order of arrival."""
    from hybridsd_sim.simulation.recursion import JobArrays, Owners, owned_devices, shared_devices
    from hybridsd_sim.workload.requests import owners_of

    fleet, replicas, each = EdgeDevices(3, shared=shared), 3, np.arange(len(drawn))
    ready_s, hold_s, draw = (np.array([row[at] for row in drawn]) for at in range(3))
    turn = np.argsort(ready_s, kind="stable")
    expected = {int(i): fleet.serve(ready_s[i], hold_s[i], draw[i]) for i in turn}
    device = (draw * replicas).astype(np.int64)
    if shared:
        start_s = np.full(len(drawn), np.inf)
        shared_devices(JobArrays(turn, ready_s, each, hold_s, each, start_s, device), replicas)
    else:
        start_s = owned_devices(ready_s, each, hold_s, Owners(**owners_of(np.zeros_like(device), device, each)))

    assert list(zip(device.tolist(), start_s.tolist(), strict=True)) == [expected[i] for i in range(len(drawn))]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), st.sampled_from([1.0, 0.6]), st.integers(0, 400))
def test_a_mix_takes_turns_as_planned_does(weights: list[float], total: float, count: int) -> None:
    """The part of the mix that each request takes is the policy's, one request after the other."""
    from hybridsd_sim.simulation.recursion import take_turns

    shares = [total * weight / sum(weights) for weight in weights]
    options = found(kept_profiles())["picture"][: len(shares)]
    policy = Planned({"picture": [Share(share, o.plan) for share, o in zip(shares, options, strict=True)]})
    decisions = [policy.decide(options, np.inf, FleetView([]), 0.0).candidate for _ in range(count)]
    written = shares + [1.0 - sum(shares)] * (total < 1.0)

    turns = take_turns(np.zeros(count, np.int64), np.array([0, len(written)]), np.array(written))
    assert [(*options, None)[turn] for turn in turns] == decisions


def planned(profiles: Profiles, pool: str = "a100", **more: Any) -> Deployment:
    """Both classes on one pool, with an edge stage."""
    hybrids = {name: [p for p in plans_of(profiles, name) if len(p.stages) == 2] for name in ("picture", "draft")}
    chosen = {name: next(p for p in plans if p.stages[0].site.name == pool) for name, plans in hybrids.items()}
    return Deployment.pure({pool: 3, **more}, chosen)


def test_quick_figures_are_those_of_the_summary(profiles: Profiles) -> None:
    """Attainment, quantiles and shares agree with the summary of the records, by class and for all."""
    rates = {f"requests.{name}.arrivals.rate_per_s": rate for name, rate in (("picture", 3.0), ("draft", 1.5))}
    tried = screen(base().with_overrides(rates), profiles, planned(profiles))
    summary = tried.result.summary.xs("planned")

    assert 0.0 < tried.attainment["draft"] < 1.0
    for name, row in summary.iterrows():
        assert tried.attainment[name] == row["slo_attainment"]
        assert tried.latency_p95_s[name] == row["latency_p95_s"]
        assert tried.latency_s(0.5)[name] == row["latency_p50_s"]
        assert tried.unserved_share[name] == row["unserved_share"]
        assert tried.unfinished_share[name] == row["in_flight"] / row["requests"]


def test_figures_of_nobody_are_unknown(profiles: Profiles) -> None:
    """A class that is turned away has no latency, and nothing of it is in time."""
    deployment = planned(profiles)
    tried = screen(base(), profiles, Deployment(deployment.replicas, {"draft": deployment.plans["draft"]}))

    assert np.isnan(tried.latency_p95_s["picture"])
    assert tried.attainment["picture"] == 0.0
    assert tried.unserved_share["picture"] == 1.0


def test_screened_records_keep_the_laws(profiles: Profiles) -> None:
    """What the recursion records stands up to the laws of every run."""
    for records in screen(base(), profiles, planned(profiles, node=1)).records:
        check_laws(records, {"a100": 3, "l40s": 0, "node": 4}, {"phones": 20_000, "laptops": 4})


def test_inputs_serve_every_deployment_of_their_scenario(profiles: Profiles) -> None:
    """Drawn once, they give what drawing anew gives; under another scenario they are refused."""
    inputs = Inputs.of(base(), profiles)
    for deployment in (planned(profiles), planned(profiles, "l40s")):
        again = screen(base(), profiles, deployment, inputs=inputs)
        for ours, theirs in zip(again.records, screen(base(), profiles, deployment).records, strict=True):
            same_rows(ours, theirs)

    with pytest.raises(ScreenError, match="another scenario"):
        screen(base().with_overrides({"seed": 5}), profiles, planned(profiles), inputs=inputs)


def test_inputs_are_what_the_simulation_draws(profiles: Profiles) -> None:
    """Column by column and to the bit: arrival, class, device, round trip and rates of every request."""
    processes = {"picture": {"process": "gamma", "rate_per_s": 9.0, "cv": 3.0}, "draft": {"process": "gentd26"}}
    scenario = base().with_overrides({f"requests.{name}.arrivals": one for name, one in processes.items()})
    for requests in Inputs.of(scenario, profiles).replications:
        arrival_s, kind, draw, *links = zip(*list(Draws(scenario, profiles, requests.replication)), strict=True)
        fleets = [scenario.edge[spec.origin] for spec in scenario.requests.values()]
        assert requests.arrival_s.tolist() == list(arrival_s)
        assert requests.class_index.tolist() == list(kind)
        assert requests.device.tolist() == [int(u * fleets[c].replicas) for u, c in zip(draw, kind, strict=True)]
        columns = (requests.half_rtt_s, requests.up_bytes_per_s, requests.down_bytes_per_s)
        assert [column.tolist() for column in columns] == [list(link) for link in links[:3]]


@given(st.lists(st.sampled_from([0.0, 1e-17, 1e-9]) | st.floats(0, 1e4), max_size=60))
def test_arrivals_are_on_the_clock_of_the_event_loop(gaps: list[float]) -> None:
    """The clock goes from one arrival to the next by their difference, rounding and all."""
    arrival_s = list(accumulate(gaps))
    clock = list(accumulate(arrival_s, lambda now, at: now + max(at - now, 0.0)))

    assert clock_times(np.array(arrival_s)).tolist() == clock


def test_chosen_replications_are_the_same_ones(profiles: Profiles) -> None:
    """Replication 1 alone is replication 1 of two."""
    inputs = Inputs.of(base(), profiles, replications=[1])
    (alone,) = screen(base(), profiles, planned(profiles), inputs=inputs).records

    assert alone.replication == 1
    same_rows(alone, screen(base(), profiles, planned(profiles)).records[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pools.a100.discipline": "edf"}, "pool a100 serves by deadline"),
        ({"pools.a100.resident_models": 1}, "pool a100 loads models"),
        ({"pools.a100.purchase": "spot"}, "nodes of pool a100 may be taken away"),
        ({"pools.a100.preemptions_per_node_hour": 0.5}, "nodes of pool a100 may be taken away"),
        ({"requests.draft.arrivals": {"process": "gentd26", "rate_per_s": 5.0}}, "differ from their class"),
    ],
)
def test_what_the_recursion_cannot_do_is_named(profiles: Profiles, change: dict[str, Any], reason: str) -> None:
    """Another discipline, model loads, preemption, traces of many sizes: the reason in words, and no figures."""
    scenario = base().with_overrides(change)
    deployment = planned(profiles)
    if "pools.a100.purchase" in change:
        deployment = of_scenario(scenario, profiles)

    assert reason in recursion_obstacle(scenario, deployment)
    with pytest.raises(ScreenError, match=reason):
        screen(scenario, profiles, deployment)


def of_scenario(scenario: Scenario, profiles: Profiles) -> Deployment:
    """A class of a changed scenario on its a100 pool."""
    options = find_candidates(scenario, profiles).by_class["picture"]
    plan = next(o.plan for o in options if o.plan.cloud_stages and o.plan.cloud_stages[0].site.name == "a100")
    return Deployment.pure({"a100": 3}, {"picture": plan})


def test_batches_are_left_to_the_simulation(profiles: Profiles) -> None:
    """A plan that denoises several requests together is refused, once its pool has nodes."""
    scenario = base().with_overrides({"search.batch_caps": [1, 4]})
    options = find_candidates(scenario, profiles).by_class["picture"]
    plan = next(o.plan for o in options if o.plan.batch_cap == 4 and o.plan.cloud_stages[0].site.name == "a100")

    rented, empty = (Deployment.pure({"a100": nodes}, {"picture": plan}) for nodes in (1, 0))
    assert "denoises several requests together" in recursion_obstacle(scenario, rented)
    assert recursion_obstacle(scenario, empty) == ""


def test_pools_that_are_not_used_do_not_matter(profiles: Profiles) -> None:
    """What a pool without nodes, or without plans, would do is no obstacle."""
    scenario = base().with_overrides({"pools.l40s.discipline": "edf", "pools.node.resident_models": 1})

    assert recursion_obstacle(scenario, planned(profiles, l40s=2)) == ""


def test_a_deployment_of_elsewhere_is_bad_input(profiles: Profiles) -> None:
    """A class, pool or plan that the scenario does not have is named, as the simulation names it."""
    plan = planned(profiles).plans["picture"][0].plan
    with pytest.raises(InputError, match="sketch"):
        screen(base(), profiles, Deployment.pure({"a100": 1}, {"sketch": plan}))
    with pytest.raises(InputError, match="h100"):
        screen(base(), profiles, Deployment.pure({"h100": 1}, {"picture": plan}))


def test_nobody_asking_is_no_error(profiles: Profiles) -> None:
    """A horizon that is over before anybody asks has no figures."""
    scenario = base().with_overrides({"horizon_s": 1e-6, "warmup_s": 0.0})
    tried = screen(scenario, profiles, planned(profiles))

    assert all(row["requests"] == 0 for row in tried.counts.values())
    assert np.isnan(tried.attainment["all"])
    assert [len(records) for records in tried.records] == [0, 0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_needs_no_sorting(values: list[float], p: float) -> None:
    """The quick quantile is the one of the sorted values, rounded to nanoseconds."""
    assert quantile_of(np.array(values), p) == value_at(np.sort(np.round(values, 9)), p)


def compiled_twice() -> str:
    """Compiled functions that met several kinds of arguments when all kinds of queues were screened in this process."""
    from hybridsd_sim.simulation import recursion, replay

    profiles = kept_profiles()
    wide = next(o for o in found(profiles)["draft"] if o.degree == 4 and o.edge_steps)
    gangs = Deployment({"node": 2}, planned(profiles, "node").plans | {"draft": (Share(1.0, wide.plan),)})
    for deployment, discipline in ((planned(profiles), "fifo"), (gangs, "fifo"), (gangs, "backfill")):
        scenario = base().with_overrides({"pools.node.discipline": discipline, "edge.phones.replicas": 2})
        assert screen(scenario, profiles, deployment).attainment
    compiled = [each for module in (recursion, replay) for each in vars(module).values() if hasattr(each, "signatures")]
    never = [each.__name__ for each in compiled if not each.signatures]
    assert not never, never
    return ", ".join(each.__name__ for each in compiled if len(each.signatures) > 1)


def test_nothing_is_compiled_twice(tmp_path: Path) -> None:
    """On a machine where nothing was compiled before, every function is compiled for one kind of arguments."""
    code = "import sys, test_screening; sys.exit(test_screening.compiled_twice() or 0)"
    nothing_kept = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=nothing_kept)

    assert list(tmp_path.rglob("*.nbc"))


def test_numba_loads_only_when_something_is_screened() -> None:
    """Importing the door costs nothing; the compiler comes with the first deployment tried."""
    code = "import sys; from hybridsd_sim.simulation import screen, simulate; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
