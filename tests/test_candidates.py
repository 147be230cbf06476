"""Which plans are enumerated, which are refused and why, which survive pruning."""

from __future__ import annotations

from typing import Any

import pytest

from hybridsd_sim import InputError, Profiles, Scenario
from hybridsd_sim.candidates import find_candidates, prune, rental_usd_per_hour
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
            assert not option.meets_floor


@pytest.mark.parametrize(("limit", "figure"), [("edge_energy_j", "edge_energy_j"), ("usd_per_image", "usd")])
def test_limits_per_image_are_kept(quickstart: Scenario, profiles: Profiles, limit: str, figure: str) -> None:
    """Options over a class's energy or dollar limit do not hold their promises."""
    free = [o for o in find_candidates(quickstart, profiles).by_class["picture"] if getattr(o.cost, figure) is not None]
    middle = sorted(getattr(option.cost, figure) for option in free)[len(free) // 2]
    tight = changed(quickstart, **{f"requests__picture__{limit}": max(middle, 1e-6)})
    for option in find_candidates(tight, profiles).by_class["picture"]:
        value = getattr(option.cost, figure)
        assert not option.meets_floor or value <= middle + 1e-9


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
