"""What observed steps teach: a lasting change soon, outliers nothing, other kinds of steps nothing either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Scenario, Scheduler, load_scenario
from hybridsd_sim.plan import Deployment, Stage
from hybridsd_sim.pricing import Candidate, find_candidates, make_candidate, request_of, slowed
from hybridsd_sim.scheduling import Decision, RequestDone, StepDone, feedback
from hybridsd_sim.scheduling.feedback import MAX_FACTOR, MIN_FACTOR, WINDOW, WORTH_CORRECTING, Corrections, steps_s

QUICKSTART = Path(__file__).parents[2] / "reports" / "examples" / "quickstart"
KIND = feedback.StepKind("a100-sxm-80gb", "eager", "sdxl", 1024, 1024, 2, "single", 1)
SLOWER = 1.3


def noise(random: np.random.Generator) -> Iterator[float]:
    """Steps as they are: 3% of scatter, and one in twenty takes up to 100 times as long."""
    while True:
        outlier = random.uniform(1.0, 100.0) if random.random() < 0.05 else 1.0
        yield outlier * float(np.exp(0.03 * random.standard_normal()))


@pytest.fixture(scope="module")
def office() -> Scenario:
    """Posters on rented machines of two cores, whose steps and those of the desks were measured."""
    return load_scenario("cpu-2core")


@pytest.fixture(scope="module")
def studio() -> Scenario:
    """Pictures on gangs of one to eight GPUs, by every parallel method."""
    return load_scenario("studio-2k")


def following(scenario: Scenario, option: Candidate, profiles: Profiles) -> Scheduler:
    """A scheduler that serves one class with one plan, on three workers that queue nothing here."""
    plan = Deployment.pure(dict.fromkeys(scenario.pools, 3), {option.request_class: option.plan})
    return Scheduler.from_plan(plan, scenario=scenario, profiles=profiles)


class Fleet:
    """A scheduler and what happens in truth to the requests that it decides, one after the other."""

    def __init__(self, scheduler: Scheduler, option: Candidate, profiles: Profiles) -> None:
        self.scheduler, self.option = scheduler, option
        self.steps_s = [steps_s(option, stage, profiles) for stage in option.plan.stages]
        self.now = 0.0

    def decide(self) -> Decision:
        self.now += 10_000.0
        return self.scheduler.decide(self.option.cost.request, None, self.now)

    def observe(self, steps: int, factor: float, scatter: Iterator[float], stage: int = 0) -> None:
        """So many steps of a stage in request after request, at `factor` times the profiles' seconds."""
        while steps > 0:
            decision = self.decide()
            for seconds in self.steps_s[stage][:steps]:
                self.scheduler.observe(StepDone(decision.number, factor * seconds * next(scatter), stage))
            self.scheduler.observe(RequestDone(decision.number, self.now + 100.0))
            steps -= len(self.steps_s[stage])

    @property
    def predicted_s(self) -> float:
        """Seconds from decision to image that the next decision predicts."""
        decision = self.decide()
        self.scheduler.observe(RequestDone(decision.number, self.now))
        assert decision.predicted_finish_s is not None
        return decision.predicted_finish_s - self.now


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stage", [0, 1])
def test_predictions_recover_within_fifty_steps_of_a_slow_down(
    office: Scenario, profiles: Profiles, seed: int, stage: int
) -> None:
    """A device that was measured slows by 30% amid scatter and outliers: 50 steps later finishes are right to 3%."""
    found = find_candidates(office, profiles).by_class["poster"]
    option = next(option for option in found if option.cloud_steps == 10)
    site = option.plan.stages[stage].site.name
    fleet = Fleet(following(office, option, profiles), option, profiles)
    scatter = noise(np.random.default_rng(seed))
    fleet.observe(100, 1.0, scatter, stage)
    before_s = fleet.predicted_s
    fleet.observe(50, SLOWER, scatter, stage)

    assert before_s == pytest.approx(option.latency_s, rel=0.03)
    assert fleet.predicted_s == pytest.approx(slowed(option, {site: SLOWER}).latency_s, rel=0.03)


def test_a_factor_recovers_with_almost_any_noise() -> None:
    """Of 300 courses with scatter and outliers, all are within 3% of a 30% slow-down after 50 steps."""
    wrong = []
    for seed in range(300):
        scatter, learnt = noise(np.random.default_rng(seed)), Corrections()
        for observed in range(150):
            learnt.learn(KIND, next(scatter) * (SLOWER if observed >= 100 else 1.0), 1.0)
        wrong.append(abs(learnt.factors[KIND] / SLOWER - 1.0))

    assert max(wrong) < 0.03


@pytest.mark.parametrize("method", ["distrifusion", "pcpp", "asyncdiff"])
@pytest.mark.parametrize("factor", [1.0, SLOWER])
def test_warm_up_steps_are_held_against_warm_up_steps(
    studio: Scenario, profiles: Profiles, method: str, factor: float
) -> None:
    """Where the first steps take longer, a gang as quick as predicted is left alone, and a slower one is found out."""
    found = find_candidates(studio, profiles).by_class["draft"]
    option = max(
        (option for option in found if option.plan.stages[0].method == method),
        key=lambda option: max(steps_s(option, option.plan.stages[0], profiles)) / option.cost.denoise_s,
    )
    fleet = Fleet(following(studio, option, profiles), option, profiles)
    fleet.observe(60, factor, iter(lambda: 1.0, None))
    seconds = fleet.steps_s[0]

    assert seconds[0] > 1.02 * seconds[-1]
    assert fleet.predicted_s == pytest.approx(slowed(option, {option.plan.stages[0].site.name: factor}).latency_s)


def test_predicted_steps_sum_to_the_stages(studio: Scenario, office: Scenario, profiles: Profiles) -> None:
    """For every candidate: as many steps as the stage has, and all of them are its denoising, to the second."""
    for scenario in (studio, office):
        for found in find_candidates(scenario, profiles).by_class.values():
            for option in found:
                seconds = [steps_s(option, stage, profiles) for stage in option.plan.stages]

                assert [len(steps) for steps in seconds] == [stage.num_steps for stage in option.plan.stages]
                assert sum(map(sum, seconds)) == pytest.approx(option.cost.denoise_s)


def test_two_stages_at_one_site_keep_their_own_steps(quickstart: Scenario, profiles: Profiles) -> None:
    """A large and then a small model on the same GPU: the steps of each are its own."""
    option = next(o for o in find_candidates(quickstart, profiles).by_class["picture"] if o.edge_steps == 0)
    site, request = option.plan.stages[0].site, request_of("picture", quickstart.requests["picture"])
    models = ("sd14", "hybrid-sd-224m")
    stages = tuple(
        Stage(start=k, stop=stop, model=model, site=site)
        for model, (k, stop) in zip(models, ((0, 10), (10, 25)), strict=True)
    )
    both = make_candidate(quickstart, profiles, request, replace(option.plan, stages=stages))
    large, small = (steps_s(both, stage, profiles) for stage in both.plan.stages)

    assert large == pytest.approx(steps_s(option, option.plan.stages[0], profiles)[:10])
    assert sum(large) + sum(small) == pytest.approx(both.cost.denoise_s)
    assert small[0] < large[0]


def test_other_kinds_of_steps_do_not_move(quickstart: Scenario, profiles: Profiles) -> None:
    """The cloud slows: what runs at the edge alone stays the very same candidate, and its steps keep their factor."""
    scheduler = Scheduler.from_plan(QUICKSTART, profiles=profiles, policy="cost_aware")
    request = request_of("picture", quickstart.requests["picture"])
    before = scheduler.preview(request, None, 0.0).options
    option = next(option for option in before if option.cloud_steps == 10)
    decision = scheduler.decide(request, None, 0.0)
    assert decision.plan is not None
    for seconds in steps_s(option, option.plan.stages[0], profiles):
        scheduler.observe(StepDone(decision.number, SLOWER * seconds))
    after = scheduler.preview(request, None, 0.0).options

    assert list(scheduler.factors().values()) == [pytest.approx(SLOWER)]
    assert {option for option in before if option.cloud_steps == 0} <= set(after)
    assert not {option for option in before if option.cloud_steps} & set(after)


def test_a_step_told_too_often_teaches_nothing(quickstart: Scenario, profiles: Profiles) -> None:
    """A stage has so many steps; more are repeated, and those of stages that the plan does not have are unknown."""
    scheduler = Scheduler.from_plan(QUICKSTART, profiles=profiles)
    decision = scheduler.decide(request_of("picture", quickstart.requests["picture"]), None, 0.0)
    assert decision.candidate is not None
    exact = steps_s(decision.candidate, decision.candidate.plan.stages[0], profiles)
    for seconds in exact:
        scheduler.observe(StepDone(decision.number, seconds))
    for _ in range(100):
        scheduler.observe(StepDone(decision.number, 9.0))
        scheduler.observe(StepDone(decision.number, 9.0, stage=2))
        scheduler.observe(StepDone(decision.number, 9.0, stage=-1))
        scheduler.observe(StepDone(decision.number + 1, 9.0))

    assert scheduler.factors() == {}


def test_steps_that_several_requests_may_share_teach_nothing(quickstart: Scenario, profiles: Profiles) -> None:
    """With a batch cap nobody says how many others a step was for: it is no sign of a slow GPU."""
    found = find_candidates(quickstart.with_overrides({"search.batch_caps": [4]}), profiles).by_class["picture"]
    option = next(option for option in found if option.plan.batch_cap == 4 and option.edge_steps)
    fleet = Fleet(following(quickstart, option, profiles), option, profiles)
    fleet.observe(50, 3.0, iter(lambda: 1.0, None), stage=0)
    fleet.observe(50, SLOWER, iter(lambda: 1.0, None), stage=1)

    assert {kind.device: factor for kind, factor in fleet.scheduler.factors().items()} == {
        "snapdragon-8-gen-3": pytest.approx(SLOWER)
    }


# ---- The estimate ---------------------------------------------------------------------------------------------------

ratios = st.floats(0.5, 2.0)
wild = st.sampled_from([1e-9, 1e-3, 30.0, 1e9])


@given(st.lists(ratios, min_size=3, max_size=80), st.data())
def test_outliers_short_of_half_never_lead_beyond_the_ordinary(ordinary: list[float], data: st.DataObject) -> None:
    """However wild, and wherever they stand: while fewer than half of those that count, the factor stays ordinary."""
    counted = ordinary[-WINDOW:]
    outliers = data.draw(st.lists(wild, max_size=min(len(counted) - 1, WINDOW // 2)))
    course = data.draw(st.permutations([*counted, *outliers])) if len(counted) + len(outliers) <= WINDOW else counted
    learnt = Corrections()
    for ratio in course:
        learnt.learn(KIND, ratio, 1.0)

    if len(course) >= feedback.MIN_RATIOS:
        assert min(counted) <= learnt.factor(KIND) <= max(counted)


def test_as_many_outliers_as_ordinary_ones_break_it() -> None:
    """The breakdown point is what it is said to be: half of the window and one step more lead it away."""
    learnt = Corrections()
    for ratio in [1.0] * WINDOW + [5.0] * (WINDOW // 2):
        learnt.learn(KIND, ratio, 1.0)
    before = learnt.factor(KIND)
    learnt.learn(KIND, 5.0, 1.0)

    assert (before, learnt.factor(KIND)) == (1.0, 5.0)


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=60))
def test_a_factor_is_always_within_its_bounds(observed: list[tuple[float, float]]) -> None:
    """Whatever is told, numbers or not: a factor is a number from a tenth to ten."""
    learnt = Corrections()
    for observed_s, predicted_s in observed:
        learnt.learn(KIND, observed_s, predicted_s)

        assert MIN_FACTOR <= learnt.factor(KIND) <= MAX_FACTOR
        assert all(MIN_FACTOR <= factor <= MAX_FACTOR for factor in learnt.factors.values())


@pytest.mark.parametrize("garbage", [0.0, -1.0, nan, inf, -inf])
def test_garbage_teaches_nothing(garbage: float) -> None:
    """No positive number of seconds, no step."""
    learnt = Corrections()
    for _ in range(100):
        learnt.learn(KIND, garbage, 1.0)
        learnt.learn(KIND, 1.0, garbage)

    assert (len(learnt), learnt.factors) == (0, {})


@given(st.lists(ratios, max_size=100))
def test_the_factor_in_use_is_never_far_from_the_estimate(observed: list[float]) -> None:
    """It is the latest estimate, or one that differs by too little to price everything anew."""
    learnt = Corrections()
    for ratio in observed:
        learnt.learn(KIND, ratio, 1.0)

        assert abs(learnt.factor(KIND) / learnt.factors.get(KIND, 1.0) - 1.0) <= WORTH_CORRECTING


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds told of least recently are forgotten with their factors."""
    monkeypatch.setattr(feedback, "MAX_KINDS", 10)
    learnt = Corrections()
    for side in range(100):
        for _ in range(WINDOW):
            learnt.learn(KIND._replace(height_px=side), 2.0, 1.0)

    assert len(learnt) == 10
    assert {kind.height_px for kind in learnt.factors} == set(range(90, 100))
