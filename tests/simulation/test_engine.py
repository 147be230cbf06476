"""Laws of the simulation: conservation, no contention, determinism, theory, common random numbers, batches, spot."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridsd_sim import InputError, Profiles, Scenario, SimResult, simulate
from hybridsd_sim.errors import RunError
from hybridsd_sim.plan import Deployment, Plan, Share
from hybridsd_sim.pricing import Candidate, find_candidates, pool_usd_per_gpu_hour
from hybridsd_sim.profiles import Quantiles
from hybridsd_sim.scenario import load_scenario
from hybridsd_sim.scheduling import POLICIES
from hybridsd_sim.simulation import COLUMNS, IN_FLIGHT, SERVED, UNSERVED, column, joined, pool_table
from hybridsd_sim.simulation.engine import preemption_of
from hybridsd_sim.simulation.records import INDEX
from hybridsd_sim.workload import Draws


def run(scenario: Scenario, profiles: Profiles, policy: str = "cost_aware", **changes: Any) -> SimResult:
    """A short run of a scenario with dotted changes (`__` for the dots)."""
    short: dict[str, Any] = {"horizon_s": 300.0, "warmup_s": 30.0, "replications": 1, "budget.usd_per_hour": 1000.0}
    resolved = scenario.with_overrides({**short, **{key.replace("__", "."): value for key, value in changes.items()}})
    return simulate(resolved, profiles, policy=policy)


def only(result: SimResult) -> np.ndarray:
    """The rows of a run of one replication."""
    (records,) = result.replications
    return records.rows()


def constant_network(profiles: Profiles, name: str) -> Profiles:
    """The profiles with one network class that never varies."""
    network = profiles.network(name)

    def flat(q: Quantiles) -> Quantiles:
        return Quantiles(p5=q.p50, p25=q.p50, p50=q.p50, p75=q.p50, p95=q.p50)

    fixed = network.model_copy(
        update={key: flat(getattr(network, key)) for key in ("down_bytes_per_s", "up_bytes_per_s", "rtt_s")}
    )
    return replace(profiles, networks=MappingProxyType({**profiles.networks, name: fixed}))


@pytest.mark.parametrize("number", [1, 7])
def test_a_lost_request_is_an_error(
    quickstart: Scenario, profiles: Profiles, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A run that records fewer requests than arrived breaks off, also if those recorded are numbered without a gap."""
    every = Draws.__iter__
    monkeypatch.setattr(Draws, "__iter__", lambda draws: islice(every(draws), number))
    with pytest.raises(RunError, match=f"lost requests: [0-9]+ arrived, {number} were recorded"):
        run(quickstart, profiles)


POLICY_NAMES = [name for name in POLICIES if name != "planned"]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_request_ends_exactly_once(quickstart: Scenario, profiles: Profiles, policy: str) -> None:
    """Served, unserved with a reason, or in flight at the horizon; numbered without a gap."""
    rows = only(run(quickstart, profiles, policy))

    assert np.array_equal(column(rows, "request"), np.arange(len(rows)))
    assert set(np.unique(column(rows, "status"))) <= {SERVED, UNSERVED, IN_FLIGHT}
    assert (column(rows, "arrival_s") < 300.0).all()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_without_contention_a_request_takes_its_price(quickstart: Scenario, profiles: Profiles, policy: str) -> None:
    """On a network that never varies, with more GPUs than requests, every latency is its plan's price."""
    still = constant_network(profiles, "wifi5")
    result = run(
        quickstart, still, policy, pools__a100__replicas_max=500, edge__phones__replicas=10**8,
        requests__picture__arrivals__rate_per_s=0.5,
    )  # fmt: skip
    frame = result.requests[result.requests["status"] == "served"]
    prices = {label: candidate.cost.latency_s for (_, label), candidate in result.used.items()}

    assert len(frame) > 50
    assert (frame["finish_s"] - frame["arrival_s"]).to_numpy() == pytest.approx(
        frame["plan"].map(prices).to_numpy(float)
    )


def test_metered_dollars_and_joules_are_those_of_the_price(quickstart: Scenario, profiles: Profiles) -> None:
    """A served request is charged what its plan costs."""
    result = run(quickstart, profiles)
    frame = result.requests[result.requests["status"] == "served"]
    for (_, label), candidate in result.used.items():
        mine = frame[frame["plan"] == label]
        assert mine["usd"].to_numpy() == pytest.approx(candidate.cost.usd)
        assert mine["edge_energy_j"].to_numpy() == pytest.approx(candidate.cost.edge_energy_j)
        assert mine["gpu_seconds"].to_numpy() == pytest.approx(candidate.cost.gpu_seconds)


def test_same_seed_same_records(quickstart: Scenario, profiles: Profiles) -> None:
    """Two runs agree to the bit; another seed differs."""
    first, second, other = (only(run(quickstart, profiles, seed=seed)) for seed in (1, 1, 2))

    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_policies_meet_the_same_requests(quickstart: Scenario, profiles: Profiles) -> None:
    """Arrivals, classes and devices do not depend on who decides."""
    tables = [only(run(quickstart, profiles, policy)) for policy in ("cloud_only", "static_switch")]

    assert np.array_equal(column(tables[0], "arrival_s"), column(tables[1], "arrival_s"))


def test_another_class_shifts_nobodys_draws(quickstart: Scenario, profiles: Profiles) -> None:
    """Adding a request class leaves the first one's arrivals and links as they were."""
    spec = quickstart.to_dict()["requests"]["picture"]
    alone = run(quickstart, profiles)
    more = run(quickstart, profiles, requests__second=spec)
    mine = column(only(more), "class_index") == 0

    assert np.array_equal(column(only(alone), "arrival_s"), column(only(more)[mine], "arrival_s"))
    assert column(only(alone), "transfer_s") == pytest.approx(column(only(more)[mine], "transfer_s"), nan_ok=True)


def test_fixed_service_in_one_gpu_is_m_d_1(quickstart: Scenario, profiles: Profiles) -> None:
    """Poisson requests of one plan on one GPU wait rho S / 2 (1 - rho) in the mean: the whole engine against theory."""
    still = constant_network(profiles, "wifi5")
    changes: dict[str, Any] = {
        "horizon_s": 60_000.0, "warmup_s": 1_000.0, "pools.a100.replicas_max": 1, "search.switch_steps": (10,),
    }  # fmt: skip
    scenario = quickstart.with_overrides(changes)
    options = find_candidates(scenario, still).by_class["picture"]
    plan = next(option for option in options if option.cloud_steps == 10)
    load, hold = 0.6, plan.cloud_s
    scenario = scenario.with_overrides({"requests.picture.arrivals.rate_per_s": load / hold, "replications": 1})
    deployment = Deployment.pure({"a100": 1}, {"picture": plan.plan})
    rows = only(simulate(scenario, still, policy="planned", plan=deployment))
    waits = (column(rows, "cloud_start_s") - column(rows, "cloud_ready_s"))[1000:]

    assert np.nanmean(waits) == pytest.approx(load * hold / (2 * (1 - load)), rel=0.05)


def test_an_overloaded_pool_leaves_requests_in_flight(quickstart: Scenario, profiles: Profiles) -> None:
    """More work than one GPU can do: the verdict says that the queue grows."""
    result = run(
        quickstart, profiles, "cloud_only", pools__a100__replicas_max=1, requests__picture__arrivals__rate_per_s=5.0
    )

    assert (column(only(result), "status") == IN_FLIGHT).sum() > 100
    assert not result.verdict.stable.ok
    assert not result.verdict.feasible.ok


def test_without_pools_everything_is_done_at_the_edge_or_rejected(quickstart: Scenario, profiles: Profiles) -> None:
    """With no node to rent, cloud-only rejects with a reason and edge-only serves."""
    nothing = {"pools__a100__replicas_max": 0}
    rejected, served = (run(quickstart, profiles, policy, **nothing) for policy in ("cloud_only", "edge_only"))

    assert (column(only(rejected), "status") == UNSERVED).all()
    assert set(rejected.requests["reason"]) == {"no_candidate"}
    assert (column(only(served), "status") != UNSERVED).all()
    assert served.usd_per_hour == 0


def test_a_sink_hears_every_request_once(quickstart: Scenario, profiles: Profiles) -> None:
    """Streamed blocks hold the same rows as the records."""

    class Blocks:
        def __init__(self) -> None:
            self.rows: list[np.ndarray] = []

        def write(self, rows: np.ndarray) -> None:
            self.rows.append(rows.copy())

    sink = Blocks()
    scenario = quickstart.with_overrides({"horizon_s": 200.0, "warmup_s": 20.0, "replications": 2})
    result = simulate(scenario, profiles, policy="cost_aware", sink=sink)

    assert sum(map(len, sink.rows)) == sum(len(records) for records in result.replications)


def test_stale_telemetry_is_seen_late(profiles: Profiles) -> None:
    """A policy that sees an old view makes other choices than one that sees the truth, on the same requests."""
    photo = load_scenario("photo-app")
    small = {"pools__a100__replicas_max": 1, "pools__l40s__replicas_max": 1}
    fresh, stale = (
        run(photo, profiles, "cost_aware", **small, pools__a100__telemetry_period_s=period) for period in (0.0, 60.0)
    )

    assert np.array_equal(column(only(fresh), "arrival_s"), column(only(stale), "arrival_s"))
    assert not np.array_equal(column(only(fresh), "plan_index"), column(only(stale), "plan_index"))


def test_planned_needs_a_plan(quickstart: Scenario, profiles: Profiles) -> None:
    """Following a plan without one is an input error."""
    with pytest.raises(InputError, match=r"plan\.yaml"):
        simulate(quickstart, profiles, policy="planned")


def changed(scenario: Scenario, **changes: Any) -> Scenario:
    """A short scenario with dotted changes (`__` for the dots)."""
    short: dict[str, Any] = {"horizon_s": 200.0, "warmup_s": 20.0}
    return scenario.with_overrides({**short, **{key.replace("__", "."): value for key, value in changes.items()}})


def hybrid_at(scenario: Scenario, profiles: Profiles, step: int) -> Plan:
    """The quickstart's plan that hands over after this step."""
    options = find_candidates(scenario, profiles).by_class["picture"]
    return next(option.plan for option in options if option.cloud_steps == step and option.edge_steps)


def cloud_option(scenario: Scenario, profiles: Profiles) -> Candidate:
    """The quickstart's cheapest plan that does everything in the cloud."""
    options = find_candidates(scenario, profiles).by_class["picture"]
    return next(option for option in options if option.fleet_index < 0)


@given(cut=st.integers(0, 5), first=st.integers(0, 3))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replications_that_adjoin_are_joined_to_the_whole(
    quickstart: Scenario, profiles: Profiles, cut: int, first: int
) -> None:
    """Whichever replications run together, each is the same, and joined they give the figures of one run."""
    scenario = changed(quickstart, replications=5, horizon_s=60.0, warmup_s=5.0)
    options = find_candidates(scenario, profiles)
    last = first + 5

    def part(start: int, stop: int) -> SimResult:
        return simulate(scenario, profiles, policy="cost_aware", options=options, replications=range(start, stop))

    whole = part(first, last)
    both = whole if cut in {0, 5} else joined(part(first, first + cut), part(first + cut, last))

    assert [records.replication for records in both.replications] == list(range(first, last))
    for mine, other in zip(both.replications, whole.replications, strict=True):
        assert mine.rows().tobytes() == other.rows().tobytes()
    assert both.summary.equals(whole.summary)
    assert both.verdict == whole.verdict
    assert (both.timeouts, both.used.keys()) == (whole.timeouts, whole.used.keys())


def test_the_scenarios_own_replications_are_the_default(quickstart: Scenario, profiles: Profiles) -> None:
    """Naming none runs those that the scenario asks for."""
    scenario = changed(quickstart, replications=2, horizon_s=60.0, warmup_s=5.0)
    plain, named = (simulate(scenario, profiles, policy="edge_only", replications=which) for which in (None, range(2)))

    assert [r.rows().tobytes() for r in plain.replications] == [r.rows().tobytes() for r in named.replications]


def test_runs_that_do_not_belong_together_are_not_joined(quickstart: Scenario, profiles: Profiles) -> None:
    """Another policy or seed, a gap, or a replication that comes twice is refused."""
    scenario = changed(quickstart, horizon_s=40.0, warmup_s=5.0)

    def part(policy: str, start: int, stop: int, seed: int = 1) -> SimResult:
        return simulate(scenario, profiles, policy=policy, seed=seed, replications=range(start, stop))

    first = part("edge_only", 0, 2)
    with pytest.raises(ValueError, match="differ in policy"):
        joined(first, part("cloud_only", 2, 3))
    with pytest.raises(ValueError, match="differ in scenario, seed"):
        joined(first, part("edge_only", 2, 3, seed=2))
    for start, stop in ((3, 4), (1, 3), (0, 1)):
        with pytest.raises(ValueError, match="do not follow"):
            joined(first, part("edge_only", start, stop))


@pytest.mark.parametrize("policy", ["planned", "static_switch"])
def test_a_slower_site_takes_longer_there_and_nowhere_else(
    quickstart: Scenario, profiles: Profiles, policy: str
) -> None:
    """Every second on the pool takes its factor; the edge, the links and the requests stay as they were."""
    scenario = changed(quickstart, replications=1)
    plan = Deployment.pure({"a100": 16}, {"picture": hybrid_at(scenario, profiles, 10)})
    plain, slow = (
        only(simulate(scenario, profiles, policy=policy, plan=plan, slowdowns=factors))
        for factors in (None, {"a100": 1.5})
    )
    done = (column(plain, "status") == SERVED) & (column(slow, "status") == SERVED)

    def span(rows: np.ndarray, side: str) -> np.ndarray:
        return (column(rows, f"{side}_stop_s") - column(rows, f"{side}_start_s"))[done]

    assert done.sum() > 500
    assert span(slow, "cloud") == pytest.approx(1.5 * span(plain, "cloud"))
    assert column(slow, "gpu_seconds")[done] == pytest.approx(1.5 * column(plain, "gpu_seconds")[done])
    assert span(slow, "edge") == pytest.approx(span(plain, "edge"))
    assert np.array_equal(column(slow, "transfer_s"), column(plain, "transfer_s"))


def test_what_a_plan_has_no_room_for_is_turned_away(quickstart: Scenario, profiles: Profiles) -> None:
    """A mix of two plans and a rest: each plan gets its share, the rest ends unserved for that reason."""
    scenario = changed(quickstart, replications=1)
    plans = [hybrid_at(scenario, profiles, step) for step in (5, 10)]
    mix = (Share(0.5, plans[0]), Share(0.3, plans[1]))
    result = simulate(scenario, profiles, policy="planned", plan=Deployment({"a100": 16}, {"picture": mix}))
    frame = result.requests
    counts = frame["plan"].value_counts()

    assert [abs(counts[part.plan.label] - part.share * len(frame)) < 3 for part in mix] == [True, True]
    assert abs((frame["reason"] == "turned_away").sum() - 0.2 * len(frame)) < 3
    assert (frame.loc[frame["status"] == "unserved", "reason"] == "turned_away").all()


def test_a_mix_serves_requests_of_every_step_count(profiles: Profiles) -> None:
    """Requests of a trace that ask for other steps follow the same shares, each on the plan scaled to its steps."""
    scenario = load_scenario("gentd26").with_overrides({"horizon_s": 600.0, "warmup_s": 60.0, "replications": 1})
    own = [o for o in find_candidates(scenario, profiles).by_class["api"] if o.pool_index >= 0 and not o.edge_steps]
    mix = (Share(0.6, own[0].plan), Share(0.2, own[-1].plan))
    plan = Deployment(dict.fromkeys(scenario.pools, 30), {"api": mix})
    result = simulate(scenario, profiles, policy="planned", plan=plan)
    reasons = set(result.requests["reason"].dropna())

    assert own[0].plan != own[-1].plan
    assert reasons == {"turned_away"}
    assert abs((result.requests["status"] == "unserved").sum() - 0.2 * len(result.requests)) < 3


def batched(scenario: Scenario, profiles: Profiles, cap: int, nodes: int = 1) -> SimResult:
    """The quickstart in the cloud alone on few nodes, up to `cap` requests together."""
    plan = replace(cloud_option(scenario, profiles).plan, batch_cap=cap)
    return simulate(scenario, profiles, policy="planned", plan=Deployment.pure({"a100": nodes}, {"picture": plan}))


@pytest.mark.parametrize("discipline", ["fifo", "gang_fifo", "backfill", "edf"])
def test_batches_form_where_requests_wait(quickstart: Scenario, profiles: Profiles, discipline: str) -> None:
    """An overloaded pool serves whole batches in less GPU time each; the run keeps its laws."""
    scenario = changed(quickstart, replications=1, pools__a100__discipline=discipline)
    alone, together = (batched(scenario, profiles, cap) for cap in (1, 4))
    served = [column(only(result), "status") == SERVED for result in (alone, together)]
    sizes = column(only(together), "batch_size")[served[1]]

    assert (column(only(alone), "batch_size") == 1).all()
    assert np.bincount(sizes.astype(int), minlength=5)[4] > 0.8 * len(sizes)
    assert served[1].sum() > served[0].sum()


def test_a_request_pays_for_its_part_of_the_batch(quickstart: Scenario, profiles: Profiles) -> None:
    """Dollars are those of the GPU-seconds held and of the egress, whoever shared the gang; alone it is its price."""
    scenario = changed(quickstart, replications=1)
    result = batched(scenario, profiles, 3)
    (option,) = result.used.values()
    rows = only(result)[column(only(result), "status") == SERVED]
    rate = (pool_usd_per_gpu_hour(scenario, profiles, "a100") or 0.0) / 3600
    egress_usd = sum(part.usd or 0.0 for part in option.cost.parts if part.tier == "network")
    held = (column(rows, "cloud_stop_s") - column(rows, "cloud_start_s")) * option.degree

    assert set(column(rows, "batch_size")) >= {1.0, 3.0}
    assert column(rows, "gpu_seconds") == pytest.approx(held / column(rows, "batch_size"))
    assert column(rows, "usd") == pytest.approx(egress_usd + rate * column(rows, "gpu_seconds"))
    assert column(rows, "usd")[column(rows, "batch_size") == 1] == pytest.approx(option.cost.usd)


def spot(scenario: Scenario, rate: float, *, away_s: float = 20.0, **changes: Any) -> Scenario:
    """The scenario on nodes that are taken away so often an hour."""
    return changed(
        scenario,
        pools__a100__preemptions_per_node_hour=rate,
        pools__a100__replacement_s=away_s,
        replications=1,
        **changes,
    )


def test_a_pool_that_is_never_taken_away_gives_the_bytes_of_before(quickstart: Scenario, profiles: Profiles) -> None:
    """No preemption on demand, or none on spot, is the run without any; only the price of spot differs."""
    plain = only(simulate(changed(quickstart, replications=1), profiles, policy="cloud_only"))
    never = only(simulate(spot(quickstart, 0.0), profiles, policy="cloud_only"))
    cheap = only(simulate(spot(quickstart, 0.0, pools__a100__purchase="spot"), profiles, policy="cloud_only"))
    without_price = [INDEX[name] for name, _ in COLUMNS if name != "usd"]

    assert plain.tobytes() == never.tobytes()
    assert plain[:, without_price].tobytes() == cheap[:, without_price].tobytes()


def test_losing_nodes_changes_no_arrival_and_no_link(quickstart: Scenario, profiles: Profiles) -> None:
    """Preemption draws from streams of its own: requests and their links are those of the run without it."""
    plain, often = (only(simulate(spot(quickstart, rate), profiles, policy="cloud_only")) for rate in (0.0, 60.0))

    assert column(often, "restarts").sum() > 5
    for name in ("arrival_s", "transfer_s", "class_index"):
        assert np.array_equal(column(plain, name), column(often, name))


def test_one_more_node_leaves_the_lives_of_the_others(quickstart: Scenario, profiles: Profiles) -> None:
    """Each node has its own stream, so that fleets of two sizes are compared on the same losses."""
    lives = [[], []]
    for found, nodes in zip(lives, (2, 3), strict=True):
        scenario = spot(quickstart, 60.0, pools__a100__replicas_max=nodes)
        preemption = preemption_of(scenario, "a100", 0)
        assert preemption is not None
        found += [preemption.up_s(node) for _ in range(5) for node in range(nodes)]

    assert lives[0] == [life for index, life in enumerate(lives[1]) if index % 3 < 2]


def test_lost_work_counts_as_busy_and_not_as_the_requests_own(quickstart: Scenario, profiles: Profiles) -> None:
    """A restarted request has the GPU-seconds and dollars of its last run; the pool was busy with the lost ones too."""
    scenario = spot(quickstart, 1500.0, away_s=0.0)
    result = simulate(scenario, profiles, policy="cloud_only")
    rows = only(result)
    restarted = (column(rows, "restarts") > 0) & (column(rows, "status") == SERVED)
    never = (column(rows, "restarts") == 0) & (column(rows, "status") == SERVED)
    calm = simulate(
        scenario.with_overrides({"pools.a100.preemptions_per_node_hour": 0.0}), profiles, policy="cloud_only"
    )
    busy, before = (
        pool_table(scenario, "cloud_only", each.replications, each.replicas)["utilisation"].iloc[0]
        for each in (result, calm)
    )
    lost_share = column(rows, "lost_gpu_s").sum() / (180.0 * 16)

    assert restarted.sum() > 50
    assert set(np.round(column(rows, "usd")[restarted], 12)) == set(np.round(column(rows, "usd")[never], 12))
    assert busy == pytest.approx(before + lost_share, abs=0.01)
    assert lost_share > 0.03
    assert result.usd_per_hour == calm.usd_per_hour


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cap=st.integers(1, 4),
    rate=st.floats(0.5, 12.0),
    nodes=st.integers(1, 4),
    losses=st.sampled_from([0.0, 30.0, 600.0]),
    replacement=st.sampled_from([0.0, 7.0]),
    discipline=st.sampled_from(["fifo", "gang_fifo", "backfill", "edf"]),
    resident=st.sampled_from([None, 1]),
    cold=st.sampled_from([0.0, 15.0]),
    served=st.floats(0.2, 1.0),
    step=st.sampled_from([5, 15]),
)
def test_random_deployments_keep_the_laws(quickstart: Scenario, profiles: Profiles, **drawn: Any) -> None:
    """Mixes, batches, cold starts and nodes that come and go in one run: every request ends once, and the laws hold."""
    scenario = changed(
        quickstart,
        horizon_s=60.0,
        warmup_s=5.0,
        replications=1,
        requests__picture__arrivals__rate_per_s=drawn["rate"],
        pools__a100__discipline=drawn["discipline"],
        pools__a100__resident_models=drawn["resident"],
        pools__a100__cold_start_s=drawn["cold"],
        pools__a100__preemptions_per_node_hour=drawn["losses"],
        pools__a100__replacement_s=drawn["replacement"],
    )
    hybrid = replace(hybrid_at(scenario, profiles, drawn["step"]), batch_cap=drawn["cap"])
    cloud = replace(cloud_option(scenario, profiles).plan, batch_cap=drawn["cap"])
    mix = (Share(drawn["served"] / 2, hybrid), Share(drawn["served"] / 2, cloud))
    plan = Deployment({"a100": drawn["nodes"]}, {"picture": mix})
    result = simulate(scenario, profiles, policy="planned", plan=plan)
    rows = only(result)

    assert np.array_equal(column(rows, "request"), np.arange(len(rows)))
    assert column(rows, "batch_size").max(initial=1) <= drawn["cap"]
    assert (column(rows, "restarts") == 0).all() or drawn["losses"]
    assert column(rows, "lost_gpu_s")[column(rows, "restarts") == 0].sum() == 0
    assert len(result.summary) == 2


@given(st.integers(1, 24), st.integers(2, 60))
def test_a_plan_keeps_its_shape_for_other_step_counts(
    quickstart: Scenario, profiles: Profiles, k: int, steps: int
) -> None:
    """Rescaled stages are non-empty, follow one another and cover the new steps; the switch keeps its share."""
    scenario = quickstart.with_overrides({"search.switch_steps": (k,)})
    options = find_candidates(scenario, profiles).by_class["picture"]
    plan = next(option.plan for option in options if option.cloud_steps == k)
    other = plan.rescaled(steps)

    assert other.num_inference_steps == steps
    assert 1 <= other.switch_step <= steps - 1
    assert abs(other.switch_step - k * steps / 25) <= 1


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(0.05, 6.0),
    nodes=st.integers(0, 4),
    gpus=st.sampled_from([1, 2, 4]),
    discipline=st.sampled_from(["fifo", "gang_fifo", "backfill", "edf"]),
    policy=st.sampled_from(POLICY_NAMES),
    ownership=st.sampled_from(["user", "shared"]),
    devices=st.integers(1, 40),
    network=st.sampled_from(["lte", "5g", "wifi6"]),
    methods=st.sampled_from([("single",), ("single", "distrifusion"), ("single", "cfg_parallel", "asyncdiff")]),
    cold=st.sampled_from([0.0, 45.0]),
    resident=st.sampled_from([None, 1]),
    process=st.sampled_from(["poisson", "constant", "gamma", "daily"]),
)
def test_random_scenarios_keep_the_laws(quickstart: Scenario, profiles: Profiles, **drawn: Any) -> None:
    """Whatever the fleet, the queue and the policy: the run checks its own laws and does not break them."""
    bursts = {"cv": 2.5} if drawn["process"] == "gamma" else {}
    result = run(
        quickstart,
        profiles,
        drawn["policy"],
        horizon_s=120.0,
        warmup_s=10.0,
        requests__picture__arrivals={"process": drawn["process"], "rate_per_s": drawn["rate"], **bursts},
        pools__a100__replicas_max=drawn["nodes"],
        pools__a100__gpus_per_node=drawn["gpus"],
        pools__a100__discipline=drawn["discipline"],
        pools__a100__cold_start_s=drawn["cold"],
        pools__a100__resident_models=drawn["resident"],
        edge__phones__ownership=drawn["ownership"],
        edge__phones__replicas=drawn["devices"],
        edge__phones__network=drawn["network"],
        search__methods=drawn["methods"],
        search__degrees=(1, 2, 4),
    )

    assert {finding.name for finding in result.verdict.findings} == {"feasible", "stable", "converged", "in_domain"}
    assert len(result.summary) == 2
