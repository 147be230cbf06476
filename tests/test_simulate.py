"""Laws of the simulation: conservation, no contention, determinism, theory, common random numbers."""

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
from hybridsd_sim.candidates import find_candidates
from hybridsd_sim.draws import Draws
from hybridsd_sim.errors import RunError
from hybridsd_sim.plan import Deployment
from hybridsd_sim.policies import POLICIES
from hybridsd_sim.profiles import Quantiles
from hybridsd_sim.records import IN_FLIGHT, SERVED, UNSERVED, column
from hybridsd_sim.scenario import load_scenario


def run(scenario: Scenario, profiles: Profiles, policy: str = "cost_aware", **changes: Any) -> SimResult:
    """A short run of a scenario with dotted changes (`__` for the dots)."""
    short: dict[str, Any] = {"horizon_s": 300.0, "warmup_s": 30.0, "replications": 1}
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
    """A run that books fewer requests than arrived breaks off, also if those it books are numbered without a gap."""
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
    result = run(
        quickstart,
        profiles,
        drawn["policy"],
        horizon_s=120.0,
        warmup_s=10.0,
        requests__picture__arrivals={"process": drawn["process"], "rate_per_s": drawn["rate"], "cv": 2.5},
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
