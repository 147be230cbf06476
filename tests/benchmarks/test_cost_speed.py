"""How fast prices are against the arithmetic that they rest on, in the same run: `pytest tests/benchmarks`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from big_scenario import big_scenario
from hybridsd_sim import Plan, Profiles, Request, Site, Stage, price
from hybridsd_sim.perf import CONSTANTS, StageTimer, fit_of, refit
from hybridsd_sim.perf.device_fit import call_kernels
from hybridsd_sim.perf.population_fit import is_one_gpu_step
from hybridsd_sim.perf.roofline import PARAMETERS, Batch
from hybridsd_sim.perf.stage_time import stage_collectives
from hybridsd_sim.planning.planner import prune
from hybridsd_sim.pricing import Candidate, find_candidates

MOST_OVERHEAD = 6.0
"""Seconds of a stage with its interval, over those of its rounds' rooflines, one for each derivative."""
MOST_FITTING = 700.0
"""Seconds of fitting a device's law, over those of timing all its rows under one law."""
LEAST_GAIN = 5.0
"""Seconds of a device's first price over those of the next."""
MOST_OF_UNCACHED = 0.1
"""Seconds of all candidates of a large scenario, over those of pricing each of them from nothing but fitted laws."""
CLASSES = 50
VECTOR = len(PARAMETERS) + len(CONSTANTS) + 1
"""What a round's interval takes derivatives of: the law, the constants and the link."""
SITE = Site(name="cloud", tier="cloud", device="a100-sxm-80gb", runtime="eager", gpus_per_node=8)
REQUEST = Request(model="sdxl", height_px=1024, width_px=1024, num_inference_steps=50)
GANGS = [("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 8), ("asyncdiff", 4)]


def stage_of(method: str, degree: int) -> Stage:
    """Fifty steps of SDXL on a gang."""
    return Stage(start=0, stop=50, model="sdxl", site=SITE, method=method, degree=degree)


def ratio_of(benchmark: BenchmarkFixture, ours: Callable[[], object], reference: Callable[[], object]) -> float:
    """The median of back-to-back ratios, so that a busy machine slows down both."""
    ratios = []

    def both() -> None:
        ratios.append(_seconds(ours) / _seconds(reference))

    benchmark.pedantic(both, rounds=30, warmup_rounds=2)
    benchmark.extra_info["ratio"] = round(median(ratios), 2)
    return median(ratios)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(("method", "degree"), GANGS)
def test_a_stage_takes_little_more_than_its_rooflines(
    benchmark: BenchmarkFixture, profiles: Profiles, method: str, degree: int
) -> None:
    """The seconds of every phase with their interval, worked out anew: at most `MOST_OVERHEAD` of their rooflines."""
    stage = stage_of(method, degree)
    anchor = StageTimer(stage, REQUEST, profiles, ()).anchor
    anchors = [] if anchor is None else [call_kernels(profiles, anchor)]
    batches = [
        Batch([*anchors, *(rank.kernels for rank in round_.ranks)])
        for _, round_ in stage_collectives(stage, REQUEST, profiles)
    ]
    law = fit_of(profiles, SITE.device, SITE.runtime, SITE.precision).log_parameters

    def rooflines() -> None:
        for batch in batches:
            for _ in range(VECTOR + 2):
                batch.seconds(law)

    assert ratio_of(benchmark, lambda: StageTimer(stage, REQUEST, profiles, ()).times(50), rooflines) < MOST_OVERHEAD


def test_a_law_is_fitted_in_few_looks_at_its_rows(benchmark: BenchmarkFixture, profiles: Profiles) -> None:
    """All rows of the device that was timed most often, fitted anew: at most so many times their rooflines."""
    rows = fit_of(profiles, SITE.device, SITE.runtime, SITE.precision).rows
    batch = Batch([call_kernels(profiles, row) for row in rows])
    law = fit_of(profiles, SITE.device, SITE.runtime, SITE.precision).log_parameters

    def fit() -> None:
        again = profiles.without(lambda _: False)  # another object, of which nothing is remembered
        fit_of(again, SITE.device, SITE.runtime, SITE.precision)

    def looks() -> None:
        for _ in range(10):
            batch.seconds(law)

    assert ratio_of(benchmark, fit, looks) * 10 < MOST_FITTING


def test_the_next_price_finds_its_law(benchmark: BenchmarkFixture, profiles: Profiles) -> None:
    """Only the first price on a device waits for its fit: the next takes at most a fifth as long."""
    stage = stage_of("distrifusion", 4)
    plan = Plan(stages=(stage,), text_encode_site="cloud", vae_site="cloud", network="wifi6")

    def first() -> None:
        price(plan, REQUEST, profiles.without(lambda _: False))

    def again() -> None:
        price(plan, REQUEST, profiles)

    assert ratio_of(benchmark, first, again) > LEAST_GAIN


def test_leaving_a_device_out_costs_a_few_fits(benchmark: BenchmarkFixture, profiles: Profiles) -> None:
    """Without a device what rests on it is fitted again from nothing, in at most twelve times all laws' own fits."""
    keys = {(row.device, row.runtime, row.precision) for row in profiles.costs if is_one_gpu_step(row)}

    def all_laws() -> None:
        again = profiles.without(lambda _: False)
        for key in keys:
            fit_of(again, *key)

    def held_out() -> None:
        refit(profiles, without=lambda row: row.device == SITE.device)

    ratios = [_seconds(held_out) / _seconds(all_laws) for _ in range(3)]
    benchmark.pedantic(held_out, rounds=1)
    benchmark.extra_info["ratio"] = round(median(ratios), 2)
    assert median(ratios) < 12.0


def test_a_large_scenario_prices_what_is_common_once(
    benchmark: BenchmarkFixture, profiles: Profiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifty classes on six pools: at most `MOST_OF_UNCACHED` of as many prices that share nothing but fitted laws."""
    again = profiles.without(lambda _: False)  # another object, of which nothing is remembered
    start = time.process_time()
    found = benchmark.pedantic(lambda: find_candidates(big_scenario(CLASSES), again), rounds=1)
    seconds = time.process_time() - start
    options = [option for options in found.by_class.values() for option in options]
    uncached = median(_uncached_seconds(option, profiles) for option in options[:: len(options) // 40])
    start = time.process_time()
    kept = sum(len(prune(options)) for options in found.by_class.values())
    each_ms, uncached_ms, pruning_s = 1e3 * seconds / len(options), 1e3 * uncached, time.process_time() - start
    with capsys.disabled():
        print(  # noqa: T201 the seconds are what the reader came for
            f"\n{len(options)} candidates, {len(found.refusals)} refused: {seconds:.1f} s of one core, "
            f"{each_ms:.3f} ms each and {uncached_ms:.3f} ms each from nothing; {kept} kept in {pruning_s:.1f} s"
        )
    benchmark.extra_info["ratio"] = round(seconds / (uncached * len(options)), 4)
    assert seconds < MOST_OF_UNCACHED * uncached * len(options)


def _uncached_seconds(option: Candidate, profiles: Profiles) -> float:
    """What the price of a candidate takes where the laws of its devices are all that is known."""
    again = profiles.without(lambda _: False)
    for site in option.plan.sites.values():
        fit_of(again, site.device, site.runtime, site.precision)
    start = time.process_time()
    price(option.plan, option.cost.request, again)
    return time.process_time() - start
