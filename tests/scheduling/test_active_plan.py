"""The cache of candidates: each size at its own price, and the sizes met last remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Request, Scenario, load_scenario
from hybridsd_sim.pricing import Candidate, CandidateSet, Pricing, RentedCandidates, find_candidates
from hybridsd_sim.profiles import derived
from hybridsd_sim.scheduling import active_plan
from hybridsd_sim.scheduling.active_plan import CandidateCache
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
def cache(studio: Scenario, profiles: Profiles, found: CandidateSet) -> CandidateCache:
    """Its cache, before anything was learnt."""
    return CandidateCache(Pricing(studio, profiles), found)


def figures(options: tuple[Candidate, ...]) -> set[tuple[object, ...]]:
    """What is compared of candidates."""
    return {(option.plan, option.latency_s, option.usd_or_inf, option.cloud_s) for option in options}


def test_a_classes_own_size_is_what_was_found(cache: CandidateCache, found: CandidateSet) -> None:
    """The very candidates, in their order."""
    for name, own in cache.class_requests.items():
        assert cache.candidates(own, WIDE).current == found.by_class[name]


@pytest.mark.parametrize(("steps", "images"), [(20, 1), (50, 2), (75, 1)])
def test_other_step_and_picture_counts_cost_what_they_cost_in_simulation(
    cache: CandidateCache, studio: Scenario, profiles: Profiles, found: CandidateSet, steps: int, images: int
) -> None:
    """The candidates are those that a simulation prices for such a request of a trace, the cheapest first."""
    offers = RentedCandidates(Pricing(studio, profiles), found, dict.fromkeys(studio.pools, 1))
    asked = replace(cache.class_requests["draft"], num_inference_steps=steps, num_images=images)
    options = cache.candidates(asked, WIDE).current

    assert figures(options) == figures(offers.resized(1, (steps, images)))
    assert [option.usd_or_inf for option in options] == sorted(option.usd_or_inf for option in options)


def test_another_size_is_priced_as_a_class_of_that_size_would_be(
    cache: CandidateCache, studio: Scenario, profiles: Profiles
) -> None:
    """Drafts of 768 px have the candidates that a scenario with such drafts has, but for what is illegal in either."""
    smaller = studio.with_overrides({"requests.draft.height_px": 768, "requests.draft.width_px": 768})
    anew = find_candidates(smaller, profiles).by_class["draft"]
    options = cache.candidates(replace(cache.class_requests["draft"], height_px=768, width_px=768), WIDE).current

    assert options
    assert figures(options) <= figures(anew)


@pytest.mark.parametrize("changed", [{"model": "sd14"}, {"height_px": 1023}, {"num_images": 0}, {"num_images": 10**6}])
def test_what_no_plan_can_make_has_no_candidate(cache: CandidateCache, changed: dict[str, object]) -> None:
    """Another model, sizes that the network cannot take, no picture, more than memory holds."""
    assert cache.candidates(replace(cache.class_requests["draft"], **changed), WIDE).current == ()  # type: ignore[arg-type]


@given(st.floats(0.1, 100), st.floats(1.5, 15.0))
def test_promises_are_no_sizes(
    studio: Scenario, profiles: Profiles, found: CandidateSet, slo_s: float, guidance: float
) -> None:
    """Everybody may name their own deadline and guidance: one entry serves them all."""
    cache = CandidateCache(Pricing(studio, profiles), found)
    own = cache.class_requests["draft"]
    options = cache.candidates(own, WIDE).current

    assert cache.candidates(replace(own, slo_s=slo_s, guidance_scale=guidance), WIDE).current is options
    assert len(cache) == 1


def test_candidates_carry_the_priority_that_was_asked_for(cache: CandidateCache) -> None:
    """Policies read it off them; it changes no figure."""
    own = cache.class_requests["draft"]
    urgent = cache.candidates(replace(own, priority=7), WIDE).current

    assert {option.cost.request.priority for option in urgent} == {7}
    assert {
        o.cost.request.priority for o in cache.candidates(replace(own, num_images=2, priority=7), WIDE).current
    } == {7}
    assert figures(urgent) == figures(cache.candidates(own, WIDE).current)
    assert {option.cost.request.priority for option in cache.candidates(own, WIDE).current} == {own.priority}


def test_sizes_that_clients_think_of_do_not_fill_the_memory(
    cache: CandidateCache, studio: Scenario, profiles: Profiles, found: CandidateSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many, the profiles forget what they worked out for them, and price the next ones the same."""
    monkeypatch.setattr(active_plan, "MAX_PRICED", 3)
    asked = [replace(cache.class_requests["draft"], num_inference_steps=steps) for steps in (10, 11, 12, 13)]
    remembers = []

    @derived()
    def worked_out(profiles: Profiles, request: Request) -> object:
        return object()

    for request in asked:
        before = worked_out(profiles, request)
        cache.candidates(request, WIDE)
        remembers.append(worked_out(profiles, request) is before)

    assert remembers == [True, True, False, True]
    fresh = CandidateCache(Pricing(studio, profiles), found)
    for request in asked:
        assert figures(cache.candidates(request, WIDE).current) == figures(fresh.candidates(request, WIDE).current)


def test_gangs_that_no_worker_could_hold_are_left_out(cache: CandidateCache) -> None:
    """Of workers of two GPUs in one pool and none in the other."""
    options = cache.candidates(cache.class_requests["draft"], (2, 0)).current

    assert {(option.pool_index, option.degree) for option in options} == {(-1, 0), (0, 1), (0, 2)}
    assert cache.is_current(cache.class_requests["draft"], (2, 0))
    assert not cache.is_current(cache.class_requests["draft"], WIDE)


def slowest_first(cache: CandidateCache, own: Request) -> dict[StepKind, float]:
    """A factor of 2 on the kind of the cheapest candidate's steps."""
    cheapest = next(option for option in cache.candidates(own, WIDE).current if option.cloud_steps)
    return {kind_of(cheapest, stage): 2.0 for stage in cheapest.plan.stages}


def test_corrected_candidates_come_cheapest_first(cache: CandidateCache) -> None:
    """Twice the seconds, twice the dollars: what was cheapest gives way, and all lead back to what was priced."""
    own = cache.class_requests["draft"]
    before = cache.candidates(own, WIDE)
    cache.correct(slowest_first(cache, own))
    after = cache.candidates(own, WIDE)

    assert [o.usd_or_inf for o in after.current] == sorted(o.usd_or_inf for o in after.current)
    first, now_first = (next(o for o in cached.current if o.usd_or_inf > 0.0) for cached in (before, after))
    assert now_first.plan != first.plan
    assert now_first.usd_or_inf > first.usd_or_inf
    assert {after.uncorrected[option] for option in after.current} == set(before.current)
    assert all(after.uncorrected[option].plan == option.plan for option in after.current)


def test_what_a_correction_does_not_touch_stays_the_very_same(cache: CandidateCache) -> None:
    """Other candidates of the same size, and the whole list of another size, so that policies know them again."""
    draft, final = cache.class_requests["draft"], cache.class_requests["final"]
    lists = [cache.candidates(own, WIDE).current for own in (draft, final)]
    factors = slowest_first(cache, draft)
    cache.correct(factors)
    others = {o for o in lists[0] if not factors.keys() & {kind_of(o, stage) for stage in o.plan.stages}}

    assert others
    assert others <= set(cache.candidates(draft, WIDE).current)
    assert not (set(lists[0]) - others) & set(cache.candidates(draft, WIDE).current)
    assert cache.candidates(final, WIDE).current is lists[1]


def test_the_sizes_met_last_are_kept(cache: CandidateCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than are kept, the one not asked for longest goes."""
    monkeypatch.setattr(active_plan, "MAX_SIZES", 2)
    one, two, three = (replace(cache.class_requests["draft"], num_inference_steps=steps) for steps in (10, 20, 30))
    first = cache.candidates(one, WIDE).current
    cache.candidates(two, WIDE)

    assert cache.candidates(one, WIDE).current is first
    cache.candidates(three, WIDE)
    assert cache.candidates(one, WIDE).current is first
    assert not cache.is_current(two, WIDE)
    assert len(cache) == 2
