"""What there is to choose from: each size at its own price, remembered for as many sizes as there is room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Request, Scenario, load_scenario
from hybridsd_sim.pricing import Candidate, CandidateSet, Pricing, RentedCandidates, find_candidates
from hybridsd_sim.scheduling import active_plan as room
from hybridsd_sim.scheduling.active_plan import Menu
from hybridsd_sim.scheduling.feedback import StepKind, kind_of

WIDE = (8, 8)


@pytest.fixture(scope="module")
def studio() -> Scenario:
    """Two classes on two pools, by every parallel method."""
    return load_scenario("studio-2k")


@pytest.fixture(scope="module")
def found(studio: Scenario, profiles: Profiles) -> CandidateSet:
    """Its candidates."""
    return find_candidates(studio, profiles)


@pytest.fixture
def menu(studio: Scenario, profiles: Profiles, found: CandidateSet) -> Menu:
    """Its menu, before anything was learnt."""
    return Menu(Pricing(studio, profiles), found)


def figures(options: tuple[Candidate, ...]) -> set[tuple[object, ...]]:
    """What is compared of candidates."""
    return {(option.plan, option.latency_s, option.usd_or_inf, option.cloud_s) for option in options}


def test_a_classes_own_size_is_what_was_found(menu: Menu, found: CandidateSet) -> None:
    """The very candidates, in their order."""
    for name, own in menu.own.items():
        assert menu.options(own, WIDE).now == found.by_class[name]


@pytest.mark.parametrize(("steps", "images"), [(20, 1), (50, 2), (75, 1)])
def test_other_step_and_picture_counts_cost_what_they_cost_in_simulation(
    menu: Menu, studio: Scenario, profiles: Profiles, found: CandidateSet, steps: int, images: int
) -> None:
    """The candidates are those that a simulation prices for such a request of a trace, the cheapest first."""
    offers = RentedCandidates(Pricing(studio, profiles), found, dict.fromkeys(studio.pools, 1))
    asked = replace(menu.own["draft"], num_inference_steps=steps, num_images=images)
    options = menu.options(asked, WIDE).now

    assert figures(options) == figures(offers.resized(1, (steps, images)))
    assert [option.usd_or_inf for option in options] == sorted(option.usd_or_inf for option in options)


def test_another_size_is_priced_as_a_class_of_that_size_would_be(
    menu: Menu, studio: Scenario, profiles: Profiles
) -> None:
    """Drafts of 768 px have the candidates that a scenario with such drafts has, but for what is illegal in either."""
    smaller = studio.with_overrides({"requests.draft.height_px": 768, "requests.draft.width_px": 768})
    anew = find_candidates(smaller, profiles).by_class["draft"]
    options = menu.options(replace(menu.own["draft"], height_px=768, width_px=768), WIDE).now

    assert options
    assert figures(options) <= figures(anew)


@pytest.mark.parametrize("changed", [{"model": "sd14"}, {"height_px": 1023}, {"num_images": 0}, {"num_images": 10**6}])
def test_what_no_plan_can_make_has_no_candidate(menu: Menu, changed: dict[str, object]) -> None:
    """Another model, sizes that the network cannot take, no picture, more than memory holds."""
    assert menu.options(replace(menu.own["draft"], **changed), WIDE).now == ()  # type: ignore[arg-type]


@given(st.floats(0.1, 100), st.floats(1.5, 15.0))
def test_promises_are_no_sizes(
    studio: Scenario, profiles: Profiles, found: CandidateSet, slo_s: float, guidance: float
) -> None:
    """Everybody may name their own deadline and guidance: one entry serves them all."""
    menu = Menu(Pricing(studio, profiles), found)
    own = menu.own["draft"]
    options = menu.options(own, WIDE).now

    assert menu.options(replace(own, slo_s=slo_s, guidance_scale=guidance), WIDE).now is options
    assert len(menu) == 1


def test_candidates_carry_the_priority_that_was_asked_for(menu: Menu) -> None:
    """Policies read it off them; it changes no figure."""
    own = menu.own["draft"]
    urgent = menu.options(replace(own, priority=7), WIDE).now

    assert {option.cost.request.priority for option in urgent} == {7}
    assert {o.cost.request.priority for o in menu.options(replace(own, num_images=2, priority=7), WIDE).now} == {7}
    assert figures(urgent) == figures(menu.options(own, WIDE).now)
    assert {option.cost.request.priority for option in menu.options(own, WIDE).now} == {own.priority}


def test_sizes_that_clients_think_of_do_not_fill_the_memory(
    menu: Menu, studio: Scenario, profiles: Profiles, found: CandidateSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many, the profiles forget what they worked out for them, and price the next ones the same."""
    monkeypatch.setattr(room, "MOST_PRICED", 3)
    asked = [replace(menu.own["draft"], num_inference_steps=steps) for steps in (10, 11, 12, 13)]
    remembers = []
    for request in asked:
        profiles.memory.recall("a test", request, lambda: "before")
        menu.options(request, WIDE)
        remembers.append(profiles.memory.recall("a test", request, lambda: "after") == "before")

    assert remembers == [True, True, False, True]
    fresh = Menu(Pricing(studio, profiles), found)
    for request in asked:
        assert figures(menu.options(request, WIDE).now) == figures(fresh.options(request, WIDE).now)


def test_gangs_that_no_worker_could_hold_are_left_out(menu: Menu) -> None:
    """Of workers of two GPUs in one pool and none in the other."""
    options = menu.options(menu.own["draft"], (2, 0)).now

    assert {(option.pool_index, option.degree) for option in options} == {(-1, 0), (0, 1), (0, 2)}
    assert menu.at_hand(menu.own["draft"], (2, 0))
    assert not menu.at_hand(menu.own["draft"], WIDE)


def slowest_first(menu: Menu, own: Request) -> dict[StepKind, float]:
    """A factor of 2 on the kind of the cheapest candidate's steps."""
    cheapest = next(option for option in menu.options(own, WIDE).now if option.cloud_steps)
    return {kind_of(cheapest, stage): 2.0 for stage in cheapest.plan.stages}


def test_corrected_candidates_come_cheapest_first(menu: Menu) -> None:
    """Twice the seconds, twice the dollars: what was cheapest gives way, and all lead back to what was priced."""
    own = menu.own["draft"]
    before = menu.options(own, WIDE)
    menu.follow(slowest_first(menu, own))
    after = menu.options(own, WIDE)

    assert [o.usd_or_inf for o in after.now] == sorted(o.usd_or_inf for o in after.now)
    first, now_first = (next(o for o in listed.now if o.usd_or_inf > 0.0) for listed in (before, after))
    assert now_first.plan != first.plan
    assert now_first.usd_or_inf > first.usd_or_inf
    assert {after.origin[option] for option in after.now} == set(before.now)
    assert all(after.origin[option].plan == option.plan for option in after.now)


def test_what_a_correction_does_not_touch_stays_the_very_same(menu: Menu) -> None:
    """Other candidates of the same size, and the whole list of another size, so that policies know them again."""
    draft, final = menu.own["draft"], menu.own["final"]
    lists = [menu.options(own, WIDE).now for own in (draft, final)]
    factors = slowest_first(menu, draft)
    menu.follow(factors)
    others = {o for o in lists[0] if not factors.keys() & {kind_of(o, stage) for stage in o.plan.stages}}

    assert others
    assert others <= set(menu.options(draft, WIDE).now)
    assert not (set(lists[0]) - others) & set(menu.options(draft, WIDE).now)
    assert menu.options(final, WIDE).now is lists[1]


def test_the_sizes_met_last_are_kept(menu: Menu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than there is room for, the one not asked for longest goes."""
    monkeypatch.setattr(room, "MOST_SIZES", 2)
    one, two, three = (replace(menu.own["draft"], num_inference_steps=steps) for steps in (10, 20, 30))
    first = menu.options(one, WIDE).now
    menu.options(two, WIDE)

    assert menu.options(one, WIDE).now is first
    menu.options(three, WIDE)
    assert menu.options(one, WIDE).now is first
    assert not menu.at_hand(two, WIDE)
    assert len(menu) == 2
