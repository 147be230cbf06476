"""An evaluation follows from its job alone, and what was computed once is found again exactly as long as it holds."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster_work import SHORT, jobs_of
from hybridsd_sim import simulate
from hybridsd_sim.errors import InputError
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.planning import Store, default_folder, open_store
from hybridsd_sim.planning import evaluation as evaluations
from hybridsd_sim.planning.evaluation import Evaluator, evaluate, evaluate_with_records, find_evaluation, undecided
from hybridsd_sim.planning.evaluation_cache import LIMITS_OF_CLASS, SEEN, SIZES_OF_POOL
from hybridsd_sim.scenario import Pool, RequestClass, Scenario
from hybridsd_sim.simulation import pool_table

P95 = ["latency_p95_s", "latency_p95_s_low", "latency_p95_s_high"]
SHAPES_NOTHING = {
    "name": "another",
    "replications": 3,
    "search.replications_max": 9,
    "search.switch_steps": [0, 25],
    "search.minimise": "latency_p95_s",
    "search.policies": ["cloud_only"],
    "budget.usd_per_hour": 5.0,
    "budget.usd_per_image": 0.001,
    "budget.edge_energy_j_per_image": 9.0,
    "budget.confidence": 0.9,
    "requests.picture.quality_floor": 0.2,
    "requests.picture.edge_energy_j": 3.0,
    "requests.picture.usd_per_image": 0.01,
    "pools.l40s.gpu": "l4",
    "pools.l40s.usd_per_gpu_hour": 0.1,
    "pools.l40s.replicas_max": 2,
    "pools.a100.replicas_max": 30,
    "pools.a100.replicas_min": 1,
}
"""Changes of a scenario that leaves the l40s unrented, none of which a simulation can see."""
SHAPES_FIGURES = {
    "seed": 2,
    "horizon_s": 160.0,
    "warmup_s": 30.0,
    "search.prefer_sources": ["somebody's table"],
    "requests.picture.arrivals.rate_per_s": 9.0,
    "requests.picture.slo_s": 3.0,
    "requests.picture.priority": 1,
    "requests.picture.guidance_scale": 1.0,
    "requests.picture.sampler": "ddim",
    "edge.phones.network": "lte",
    "edge.phones.replicas": 19_000,
    "pools.a100.gpu": "a100-pcie-80gb",
    "pools.a100.usd_per_gpu_hour": 1.0,
    "pools.a100.discipline": "edf",
    "pools.a100.cold_start_s": 1.0,
    "pools.a100.preemptions_per_node_hour": 0.1,
}
"""Changes that a simulation does see."""


@pytest.fixture(scope="module")
def scenario(quickstart):
    """The quickstart, shortened, with a second pool that nobody rents."""
    return quickstart.with_overrides({**SHORT, "pools.l40s": {"gpu": "l40s", "replicas_max": 4}})


@pytest.fixture(scope="module")
def jobs(scenario, profiles):
    """Hand-overs at two steps, and a mix of both, on two nodes, on three, and on plenty."""
    return jobs_of(scenario, profiles, nodes=(2, 3, 9))


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def runs(monkeypatch):
    """The replications of every simulation that is run for an evaluation."""
    ran, run = [], evaluations.simulate

    def counted(*args, **more):
        ran.append(more["replications"])
        return run(*args, **more)

    monkeypatch.setattr(evaluations, "simulate", counted)
    return ran


def shown(evaluation):
    """Every field of an evaluation, so that an unknown figure equals itself."""
    return {field.name: repr(getattr(evaluation, field.name)) for field in fields(evaluation)}


def with_ends(figure):
    """A figure and the ends of its interval, as tables show them."""
    return [figure.value, figure.low, figure.high]


def changed(job, overrides):
    """The job on a changed scenario."""
    return replace(job, scenario=job.scenario.with_overrides(overrides))


def hard(job):
    """The job with a limit on dollars an image just above what it costs: a promise that its intervals leave open."""
    usd = evaluate(job).classes["all"]["rent_usd_per_image"].value
    return changed(job, {"budget.usd_per_image": 1.0001 * usd})


# ---- Figures --------------------------------------------------------------------------------------------------------


def test_an_evaluation_has_the_figures_of_the_simulation(jobs):
    """Classes, rent, replications and verdict are those of a run under the policy `planned`."""
    job = replace(jobs[6], scenario=jobs[6].scenario.with_overrides({"search.replications_max": 2}))
    result = simulate(job.scenario, job.profiles, policy="planned", plan=job.deployment)
    evaluation = evaluate(job)

    picture = result.summary.xs("picture", level="request_class").iloc[0]
    got = evaluation.classes["picture"]["latency_p95_s"]
    assert repr(with_ends(got)) == repr(picture[P95].tolist())
    assert set(evaluation.classes) == {"picture", "all"}
    assert evaluation.verdict == result.verdict
    assert evaluation.feasible is result.verdict.feasible.ok
    assert (evaluation.rent_usd_per_hour, evaluation.replications) == (result.usd_per_hour, 2)
    assert set(evaluation.utilisation) == set(evaluation.load_ratio) == {"a100", "l40s"}
    assert math.isnan(evaluation.utilisation["l40s"])


@pytest.mark.parametrize("more", [{}, {"preemptions_per_node_hour": 60.0}])
def test_the_utilisation_is_that_of_the_table_of_pools(jobs, more):
    """Also where nodes are taken away, and with them what they had done."""
    job = changed(jobs[3], {f"pools.a100.{key}": value for key, value in more.items()})
    result, evaluation = evaluate_with_records(job)
    pools = pool_table(job.scenario, "planned", result.replications, result.replicas).xs("a100", level="pool")
    assert evaluation.utilisation["a100"] == pytest.approx(pools["utilisation"].item())


def test_the_screen_gives_the_figures_of_the_simulation(jobs):
    """Where the recursion applies, an evaluation by it agrees to rounding and says its level."""
    job = replace(jobs[6], scenario=jobs[6].scenario.with_overrides({"search.replications_max": 2}))
    quick, slow = evaluate(replace(job, level="screen")), evaluate(job)

    assert (quick.level, slow.level) == ("screen", "simulate")
    assert quick.verdict.feasible == slow.verdict.feasible
    for figure, estimate in slow.classes["picture"].items():
        got = with_ends(quick.classes["picture"][figure])
        assert got == pytest.approx(with_ends(estimate), rel=1e-6, nan_ok=True), figure


def test_the_screen_refuses_what_it_cannot_do(jobs):
    """The error of the screen comes through as it is."""
    from hybridsd_sim.simulation import ScreenError

    with pytest.raises(ScreenError, match="edf"):
        evaluate(replace(changed(jobs[0], {"pools.a100.discipline": "edf"}), level="screen"))


def test_dollars_are_rent_and_egress_at_the_mean_rate(jobs):
    """Egress is rate times bytes times price, weighted by the shares of the mix; an own price moves the rent alone."""
    for job in jobs[:3]:
        used = evaluate_with_records(job)[0].used
        usd = {label: sum(p.usd or 0.0 for p in o.cost.parts if p.tier == "network") for (_, label), o in used.items()}
        shares = {part.plan.label: part.share for part in job.deployment.plans["picture"]}
        evaluation = evaluate(job)
        expected = 8.0 * 3600 * sum(share * usd[label] for label, share in shares.items())
        assert evaluation.egress_usd_per_hour == pytest.approx(expected)
        assert evaluation.usd_per_hour == evaluation.rent_usd_per_hour + evaluation.egress_usd_per_hour
        free = evaluate(changed(job, {"pools.a100.usd_per_gpu_hour": 0.0}))
        assert (free.rent_usd_per_hour, free.egress_usd_per_hour) == (0.0, evaluation.egress_usd_per_hour)


@pytest.mark.parametrize("cap", [1, 4])
def test_the_load_is_what_the_plans_predict(jobs, cap):
    """Mixes and batches hold the GPU-seconds that their candidates say; a pool without requests has ratio 1."""
    job = jobs[2]
    mix = [Share(part.share, replace(part.plan, batch_cap=cap)) for part in job.deployment.plans["picture"]]
    batched = replace(job, deployment=Deployment({"a100": 1, "l40s": 1}, {"picture": tuple(mix)}))
    assert evaluate(batched).load_ratio == pytest.approx({"a100": 1.0, "l40s": 1.0})


@pytest.mark.parametrize("more", [{"resident_models": 1}, {"preemptions_per_node_hour": 60.0}])
def test_model_loads_and_lost_nodes_are_load_that_no_plan_predicts(jobs, more):
    """The ratio rises above 1 where GPUs are held for something else than the plan's own work."""
    job = changed(jobs[0], {f"pools.a100.{key}": value for key, value in more.items()})
    assert evaluate(job).load_ratio["a100"] > 1.0 + 1e-6


def test_slower_sites_take_longer(jobs):
    """A slowdown of a pool lengthens latencies; one of 1 changes nothing, the key included."""
    slow, same = (replace(jobs[0], slowdowns={"a100": factor}) for factor in (1.5, 1.0))
    before = evaluate(jobs[0])
    assert evaluate(slow).classes["all"]["latency_mean_s"].value > before.classes["all"]["latency_mean_s"].value
    assert shown(evaluate(same)) == shown(before)
    assert same.key == jobs[0].key != slow.key


def test_a_deployment_of_another_scenario_is_refused(jobs):
    """What a run refuses, an evaluation refuses."""
    with pytest.raises(InputError, match="not in the scenario"):
        evaluate(
            replace(
                jobs[0], deployment=Deployment.pure({"a100": 1}, {"video": jobs[0].deployment.plans["picture"][0].plan})
            )
        )


# ---- Replications ---------------------------------------------------------------------------------------------------


def test_replications_are_added_while_a_promise_is_undecided(jobs, runs):
    """They double up to the limit; those that ran are kept, and the answer is that of one run of all of them."""
    job = hard(jobs[6])
    runs.clear()
    evaluation = evaluate(job)
    whole = simulate(job.scenario, job.profiles, policy="planned", plan=job.deployment, replications=range(4))

    assert runs == [range(2), range(2, 4)]
    assert evaluation.replications == 4
    assert evaluation.verdict == whole.verdict
    assert not undecided(evaluate(jobs[6]), jobs[6].scenario)


def test_a_screened_plan_gets_more_replications_too(jobs):
    """The figures over all of them are those of one run of all of them."""
    from hybridsd_sim.simulation import screen

    job = replace(hard(jobs[6]), level="screen")
    evaluation = evaluate(job)
    whole = screen(job.scenario.with_overrides({"replications": 4}), job.profiles, job.deployment).result

    assert (evaluation.replications, job.scenario.replications) == (4, 2)
    assert evaluation.verdict == whole.verdict
    assert with_ends(evaluation.classes["all"]["latency_p95_s"]) == whole.summary.iloc[-1][P95].tolist()


def test_the_run_behind_an_evaluation_is_the_same(jobs):
    """`simulated` gives the records over as many replications, and the same evaluation."""
    for job in (jobs[6], hard(jobs[6])):
        result, evaluation = evaluate_with_records(job)
        assert shown(evaluation) == shown(evaluate(job))
        assert len(result.replications) == evaluation.replications


def test_what_is_broken_for_sure_needs_no_more_replications(jobs, runs):
    """A plan that breaks one promise is out, however open another one is."""
    job = changed(hard(jobs[6]), {"requests.picture.quality_floor": 0.9})
    runs.clear()
    assert not evaluate(job).feasible
    assert runs == [range(2)]


# ---- Keys -----------------------------------------------------------------------------------------------------------


def test_every_key_of_a_scenario_shapes_figures_or_is_known_not_to():
    """A key that is added to scenarios one day has to be put on one side."""
    assert set(Scenario.model_fields) == SEEN | {"name", "replications", "budget", "search", "overrides_applied"}
    assert set(RequestClass.model_fields) >= LIMITS_OF_CLASS
    assert set(Pool.model_fields) >= SIZES_OF_POOL


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unseen=st.sets(st.sampled_from(sorted(SHAPES_NOTHING))), seen=st.sets(st.sampled_from(sorted(SHAPES_FIGURES))))
def test_the_digest_changes_with_what_shapes_figures_and_with_nothing_else(jobs, unseen, seen):
    """Any set of changes that a simulation cannot see leaves it; any that it can see gives a new one."""
    job = jobs[0]
    kept = changed(job, {key: SHAPES_NOTHING[key] for key in unseen})
    moved = changed(kept, {key: SHAPES_FIGURES[key] for key in seen})
    assert kept.digest == job.digest
    assert (moved.digest == job.digest) is (not seen)


def test_the_digest_changes_with_deployment_level_and_profiles(jobs, profiles):
    """Nodes, shares, batch caps, the level and the profiles shape figures; nodes of 0 are none."""
    job, mix = jobs[2], jobs[2].deployment.plans["picture"]
    nodes = job.deployment.replicas

    def deployed(replicas, *parts):
        return replace(job, deployment=Deployment(replicas, {"picture": parts or mix}))

    others = [
        job,
        deployed({"a100": 9}),
        deployed(nodes, *reversed(mix)),
        deployed(nodes, Share(0.6, mix[0].plan), Share(0.4, mix[1].plan)),
        deployed(nodes, Share(1.0, replace(mix[0].plan, batch_cap=2))),
        replace(job, level="screen"),
        replace(job, slowdowns={"phones": 1.1}),
        replace(job, profiles=profiles.without(lambda row: row.model == "koala-700m")),
    ]
    assert len({other.digest for other in others}) == len(others)
    assert deployed({"l40s": 0, **nodes}).digest == job.digest


def test_a_trace_counts_by_its_content(jobs, tmp_path):
    """The same requests under another name are the same; others under the same name are not."""
    paths = [tmp_path / name for name in ("one.csv", "two.csv")]
    for path in paths:
        path.write_text("arrival_s\n1\n2\n3\n")
    trace = {"requests.picture.arrivals.process": "trace", "requests.picture.arrivals.rate_per_s": None}
    digests = [changed(jobs[0], {**trace, "requests.picture.arrivals.path": str(path)}).digest for path in paths]
    assert digests[0] == digests[1]
    paths[0].write_text("arrival_s\n1\n2\n30\n")
    assert changed(jobs[0], {**trace, "requests.picture.arrivals.path": str(paths[0])}).digest != digests[0]


@pytest.mark.parametrize("change", [{"replications": 3}, {"search.replications_max": 9}])
def test_the_key_says_over_how_many_replications_too(jobs, change):
    """Jobs with one key have one answer: the digest of the figures alone does not say how many there may be."""
    assert changed(jobs[0], change).key != jobs[0].key


# ---- The store ------------------------------------------------------------------------------------------------------


def test_a_warm_store_gives_the_answers_of_a_cold_one(jobs, store, runs):
    """Field by field, for plans that hold and plans that do not, simulated and screened; nothing runs twice."""
    tried = [*jobs, *(replace(job, level="screen") for job in jobs[:2]), hard(jobs[6])]
    fresh = [shown(evaluate(job)) for job in tried]
    cold = [shown(evaluation) for evaluation in map(Evaluator(store), tried)]
    runs.clear()
    warm = [shown(evaluation) for evaluation in map(Evaluator(store), tried)]
    assert fresh == cold == warm == [shown(find_evaluation(job, store)) for job in tried]
    assert runs == []


def test_the_figures_of_a_run_with_records_are_kept_too(jobs, store, runs):
    """`simulated` runs whatever is kept, and leaves its figures; a job that has more to run is not kept."""
    assert find_evaluation(jobs[6], store) is None
    _, evaluation = evaluate_with_records(jobs[6], store)
    assert shown(find_evaluation(jobs[6], store)) == shown(evaluation)
    dear = hard(jobs[6])
    runs.clear()
    assert find_evaluation(dear, store) is None
    assert len(evaluate_with_records(dear, store)[0].replications) == 4
    assert runs == [range(2), range(2, 4)]
    assert find_evaluation(dear, store).replications == 4


def test_a_changed_limit_finds_its_figures_again_and_is_judged_anew(jobs, store, runs):
    """Only replications that a new limit asks for are run; the answer is that of a fresh run."""
    easy, dear = jobs[6], hard(jobs[6])
    poor = changed(easy, {"budget.usd_per_hour": 1.0, "name": "poor", "pools.l40s.gpu": "l4"})
    assert evaluate(easy, store).feasible
    runs.clear()
    assert not evaluate(poor, store).feasible
    assert runs == []
    assert shown(evaluate(dear, store)) == shown(evaluate(dear))
    assert runs[:1] == [range(4)]
    runs.clear()
    assert shown(evaluate(easy, store)) == shown(evaluate(easy, None))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=JSON)
def test_what_is_put_comes_back_bit_for_bit(store, data):
    """Numbers, not a number and the infinities, text, lists and mappings."""
    store.put("ab12-1", data)
    assert repr(store.get("ab12-1")) == repr(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[:-20],
        lambda text: text.replace("0.25", "0.26"),
        lambda text: text.replace("ab12", "ab13"),
        lambda _: "[1, 2]",
        lambda _: "{}",
        lambda _: "[" * 100_000,
    ],
    ids=["empty", "cut off", "changed", "of another key", "a list", "no entry", "too deep"],
)
def test_a_damaged_or_foreign_file_counts_as_absent(store, damage):
    """Cut off, changed, of another key, or no entry at all; what is put in its place is read."""
    store.put("ab12-1", {"value": 0.25})
    (path,) = store.folder.rglob("*.json")
    path.write_text(damage(path.read_text()))
    assert store.get("ab12-1") is None
    store.put("ab12-1", {"value": 0.5})
    assert store.get("ab12-1") == {"value": 0.5}


def test_a_store_that_cannot_be_written_keeps_nothing_and_says_nothing(jobs, tmp_path):
    """The search goes on without; only opening it says that it cannot be used."""
    (tmp_path / "file").write_text("in the way")
    closed = Store(tmp_path / "file" / "store")
    assert shown(evaluate(jobs[0], closed)) == shown(evaluate(jobs[0]))
    assert (closed.get("ab12-1"), len(closed)) == (None, 0)
    with pytest.raises(OSError, match="file"):
        open_store(closed.folder)


def test_a_folder_keeps_what_was_used_last(store):
    """The oldest entries go first, reading makes an entry young again, and what a killed writer left is removed."""
    for number in range(6):
        store.put(f"{number}0-1", number)
        os.utime(store.folder / f"{number}0" / f"{number}0-1.json", (number, number))
    (store.folder / "00" / "left.tmp").write_text("half")
    os.utime(store.folder / "00" / "left.tmp", (0, 0))
    assert store.get("00-1") == 0
    assert store.tidy(most=3) == len(store) == 3
    assert [store.get(f"{number}0-1") for number in range(6)] == [0, None, None, None, 4, 5]
    assert not list(store.folder.rglob("*.tmp"))


def test_the_default_folder_is_where_caches_go(monkeypatch):
    """An own variable goes before the desktop's, and that before the home."""
    monkeypatch.delenv("HYBRIDSD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path.home() / ".cache" / "hybridsd-sim"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert default_folder() == Path("/var/caches/hybridsd-sim")
    monkeypatch.setenv("HYBRIDSD_CACHE", "/mine")
    assert default_folder() == Path("/mine")
