"""Which plans are enumerated, which are refused and why, which survive pruning."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import InputError, Profiles, Scenario
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.planning.planner import prune
from hybridsd_sim.pricing import Candidate, find_candidates, make_candidate, rental_usd_per_hour, request_of, slowed
from hybridsd_sim.pricing.search_space import enumerate_plans
from hybridsd_sim.scenario import load_scenario


def changed(scenario: Scenario, **changes: Any) -> Scenario:
    """The scenario with dotted changes (`__` for the dots)."""
    return scenario.with_overrides({key.replace("__", "."): value for key, value in changes.items()})


def test_every_kind_of_plan_is_there(quickstart: Scenario, profiles: Profiles) -> None:
    """Cloud-only, edge-only and a hand-over at every fifth step are candidates, cheapest first."""
    options = find_candidates(quickstart, profiles).by_class["picture"]
    steps = {option.cloud_steps for option in options}

    assert steps == {0, 5, 10, 15, 20, 25}
    assert [option.usd_or_inf for option in options] == sorted(option.usd_or_inf for option in options)


def test_no_plan_is_enumerated_twice(profiles: Profiles) -> None:
    """Labels are unique within a class: a plan can be named by its label."""
    for name in ("quickstart", "photo-app", "studio-2k"):
        for options in find_candidates(load_scenario(name), profiles).by_class.values():
            labels = [option.plan.label for option in options]
            assert len(labels) == len(set(labels))


def test_a_gang_stays_inside_one_node(profiles: Profiles) -> None:
    """With two GPUs a node no plan holds four; the refusal says so."""
    found = find_candidates(changed(load_scenario("studio-2k"), pools__nvlink__gpus_per_node=2), profiles)
    pools = [option for options in found.by_class.values() for option in options if option.plan.sites.get("nvlink")]

    assert max(option.degree for option in pools) == 2
    assert any("inside one node" in refusal.reason for refusal in found.refusals)


def test_models_of_another_latent_space_are_refused(quickstart: Scenario, profiles: Profiles) -> None:
    """SD 1.4's latent means nothing to KOALA."""
    found = find_candidates(changed(quickstart, requests__picture__small_models=("koala-700m",)), profiles)

    assert all(not (option.cloud_steps and option.edge_steps) for option in found.by_class["picture"])
    assert any("latent spaces" in refusal.reason for refusal in found.refusals)


def test_a_model_must_fit_the_device(profiles: Profiles) -> None:
    """SDXL in fp16 at 2048 px, with keys and values gathered from eight GPUs, does not fit an RTX 2080 Ti."""
    small = changed(load_scenario("studio-2k"), pools__nvlink__gpu="rtx-2080ti")
    found = find_candidates(small, profiles)

    assert any("GiB are usable" in refusal.reason for refusal in found.refusals)


def test_a_floor_refuses_what_is_below_and_what_is_unknown(quickstart: Scenario, profiles: Profiles) -> None:
    """An option meets its class's floor only with a known score that is high enough."""
    for option in find_candidates(quickstart, profiles).by_class["picture"]:
        if option.quality is None or option.quality < 0.285:
            assert not option.keeps_limits


@pytest.mark.parametrize(("limit", "figure"), [("edge_energy_j", "edge_energy_j"), ("usd_per_image", "usd")])
def test_limits_per_image_are_kept(quickstart: Scenario, profiles: Profiles, limit: str, figure: str) -> None:
    """Options over a class's energy or dollar limit do not hold their promises."""
    free = [o for o in find_candidates(quickstart, profiles).by_class["picture"] if getattr(o.cost, figure) is not None]
    middle = sorted(getattr(option.cost, figure) for option in free)[len(free) // 2]
    tight = changed(quickstart, **{f"requests__picture__{limit}": max(middle, 1e-6)})
    for option in find_candidates(tight, profiles).by_class["picture"]:
        value = getattr(option.cost, figure)
        assert not option.keeps_limits or value <= middle + 1e-9


def test_pruning_keeps_the_best_of_everything(profiles: Profiles) -> None:
    """For each pool the cheapest, the fastest and the prettiest survive, and nothing that survives is beaten."""
    for options in find_candidates(load_scenario("photo-app"), profiles).by_class.values():
        kept = prune(options)
        for pool in {option.pool_index for option in options}:
            mine = [option for option in options if option.pool_index == pool]
            left = [option for option in kept if option.pool_index == pool]
            if pool >= 0 and left:
                assert min(o.cost.gpu_seconds for o in left) <= min(o.cost.gpu_seconds for o in mine) + 1e-12
                assert max(o.quality or 0 for o in left) >= max(o.quality or 0 for o in mine) - 1e-12


def test_unknown_names_are_reported_together(quickstart: Scenario, profiles: Profiles) -> None:
    """Every device, model and network that the profiles lack is named with its place and the nearest."""
    wrong = changed(
        quickstart, pools__a100__gpu="a100-sxm-80", edge__phones__network="wifi55", requests__picture__model="sd41"
    )
    with pytest.raises(InputError) as caught:
        find_candidates(wrong, profiles)

    places = [problem.place for problem in caught.value.problems]
    assert places == ["requests.picture.model", "edge.phones.network", "pools.a100.gpu"]
    assert "a100-sxm-80gb" in str(caught.value)


def test_rent_is_nodes_times_gpus_times_price(profiles: Profiles) -> None:
    """Two nodes of eight A100 at 3.4309 dollars; a pool without a price makes the rent unknown."""
    studio = load_scenario("studio-2k")

    assert rental_usd_per_hour(studio, profiles, {"nvlink": 2}) == pytest.approx(2 * 8 * 3.4309)
    unsold = changed(studio, pools__pcie__gpu="rtx-2080ti")
    assert rental_usd_per_hour(unsold, profiles, {"pcie": 1}) is None
    assert rental_usd_per_hour(unsold, profiles, {"pcie": 0}) == 0


def test_every_plan_is_a_candidate_or_refused(profiles: Profiles) -> None:
    """Of the search space nothing is lost: each plan is priced or listed with a reason, and none both."""
    studio = changed(load_scenario("studio-2k"), pools__pcie__gpus_per_node=2)
    found = find_candidates(studio, profiles)
    for name, options in found.by_class.items():
        spanned = sorted(plan.label for plan in enumerate_plans(studio, profiles, name))
        refused = [refusal.what for refusal in found.refusals if refusal.request_class == name]
        assert sorted([*(option.plan.label for option in options), *refused]) == spanned
    assert all(refusal.reason for refusal in found.refusals)


# ---- Batch caps -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(quickstart: Scenario, profiles: Profiles) -> list[Candidate]:
    """The quickstart's candidates under three batch caps."""
    return list(find_candidates(changed(quickstart, search__batch_caps=(1, 2, 4)), profiles).by_class["picture"])


def test_every_plan_of_the_cloud_has_a_candidate_for_each_batch_cap(
    quickstart: Scenario, profiles: Profiles, batched: list[Candidate]
) -> None:
    """Three times the plans with a cloud stage, the edge's once; alone a capped request costs what an uncapped does."""
    plain = {option.plan.label: option for option in find_candidates(quickstart, profiles).by_class["picture"]}
    cloud = [option for option in plain.values() if option.plan.cloud_stages]

    assert len(batched) == len(plain) + 2 * len(cloud)
    for option in batched:
        twin = plain[option.plan.label.replace(f", up to {option.plan.batch_cap} together", "")]
        assert (option.cloud_s, option.latency_s, option.usd_or_inf) == (twin.cloud_s, twin.latency_s, twin.usd_or_inf)
        assert option.cost.parts == twin.cost.parts
        assert len(option.batch_s) == option.plan.batch_cap
        assert option.batch_s[0] == option.cloud_s


def test_a_batch_cap_is_kept_only_where_it_lowers_the_load(batched: list[Candidate]) -> None:
    """Every capped plan that survives needs fewer GPU-seconds a request, full, than it needs alone; some survive."""
    kept = [option for option in prune(batched) if option.plan.batch_cap > 1]

    assert kept
    assert all(option.gpu_seconds < option.cost.gpu_seconds for option in kept)
    assert all(option.full_batch_latency_s > option.latency_s for option in kept)


def test_pruning_nothing_keeps_nothing() -> None:
    """A class without candidates has none after pruning."""
    assert prune([]) == []


def test_the_whole_batch_must_fit_the_memory(profiles: Profiles) -> None:
    """A GPU that holds one draft of the studio and not sixty-four of them refuses the batch, and says why."""
    studio = changed(load_scenario("studio-2k"), search__batch_caps=(1, 64), search__methods=("single",))
    found = find_candidates(studio, profiles)
    caps = {option.plan.batch_cap for option in found.by_class["final"] if option.plan.cloud_stages}

    assert caps == {1}
    assert any("up to 64 together" in r.what and "GiB are usable" in r.reason for r in found.refusals)


# ---- Slower sites ---------------------------------------------------------------------------------------------------

factors = st.floats(0.25, 4.0).filter(lambda factor: factor != 1.0)


@given(pool=factors, fleet=factors, data=st.data())
def test_a_slower_site_takes_its_factor_longer(
    batched: list[Candidate], pool: float, fleet: float, data: st.DataObject
) -> None:
    """Seconds, dollars and joules of every part go with its own site's factor; the network's do not."""
    option = data.draw(st.sampled_from(batched))
    slow = slowed(option, {"a100": pool, "phones": fleet})
    by_tier = {"cloud": pool, "edge": fleet, "network": 1.0}

    for mine, theirs in zip(slow.cost.parts, option.cost.parts, strict=True):
        factor = by_tier[theirs.tier]
        assert (mine.seconds.value, *mine.seconds.interval) == pytest.approx(
            (factor * theirs.seconds.value, factor * theirs.seconds.low, factor * theirs.seconds.high)
        )
        assert (mine.usd, mine.energy_j) == pytest.approx((factor * (theirs.usd or 0), factor * (theirs.energy_j or 0)))
    assert slow.cloud_s == pytest.approx(pool * option.cloud_s)
    assert slow.batch_s == pytest.approx([pool * seconds for seconds in option.batch_s])
    assert slow.edge_s == pytest.approx(fleet * option.edge_s)
    assert slow.latency_s == slow.cost.latency_s
    assert slow.usd_or_inf == slow.cost.usd
    assert slow.quality == option.quality


def test_a_site_that_is_not_slower_changes_nothing(batched: list[Candidate]) -> None:
    """Factor 1, a site of another plan and the network's name give the very same candidate back."""
    for option in batched:
        assert slowed(option, {"a100": 1.0, "elsewhere": 3.0, "wifi5": 2.0}) is option


@given(factor=st.floats(1.0, 8.0), data=st.data())
def test_slower_sites_are_judged_anew(
    quickstart: Scenario, profiles: Profiles, factor: float, data: st.DataObject
) -> None:
    """Promise, energy and dollar limit hold of a slowed candidate just where its own figures keep them."""
    tight = changed(quickstart, requests__picture__usd_per_image=0.002)
    request = request_of("picture", tight.requests["picture"])
    plan = data.draw(st.sampled_from(list(enumerate_plans(tight, profiles, "picture"))))
    slow = slowed(make_candidate(tight, profiles, request, plan), {"a100": factor, "phones": factor})
    joules, dollars, clip = slow.cost.edge_energy_j, slow.cost.usd, slow.quality
    held = clip is not None and joules is not None and dollars is not None

    assert slow.meets_slo == (slow.latency_s <= 8.0)
    assert slow.keeps_limits == (held and clip >= 0.285 and joules <= 15.0 and dollars <= 0.002)


def test_a_refusal_is_the_same_however_often_it_is_asked_for(quickstart: Scenario, profiles: Profiles) -> None:
    """Remembered refusals name the same rule."""
    wide = changed(quickstart, search__methods=("distrifusion",), search__degrees=(4,))
    request = request_of("picture", wide.requests["picture"])
    plan = next(
        plan
        for plan in enumerate_plans(wide, profiles, "picture")
        if plan.cloud_stages[:1] and plan.cloud_stages[0].degree == 4
    )
    said = []
    for _ in range(2):
        with pytest.raises(IllegalPlanError) as caught:
            make_candidate(wide, profiles, request, plan)
        said.append(str(caught.value))

    assert said[0] == said[1]
    assert "inside one node" in said[0]
