"""Laws of the fits: a device's law is found again from its rows, and is as sure as its rows make it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import exp, inf, log
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, load_profiles
from hybridsd_sim.errors import MissingDataError
from hybridsd_sim.perf import Fit, Floats, fit_of, fitted_component_time, fitted_step_time, own_fits
from hybridsd_sim.perf.device_fit import (
    ROW_SPREAD,
    SHIFT,
    SOURCE_SPREAD,
    call_kernels,
    calls,
    population,
    starting_prior,
)
from hybridsd_sim.perf.roofline import PARAMETERS, Batch, Kernels
from hybridsd_sim.profiles import CostRow, Gpu

Call = tuple[str, int, int]
"""Model, side in px and images of a guided step."""
RUNTIME = "eager"
PEAK, BANDWIDTH = 3e14, 2e12
TIMED: tuple[Call, ...] = (
    ("sd15", 512, 1), ("sd15", 512, 4), ("sd15", 512, 16), ("sdxl", 1024, 1), ("sdxl", 1024, 4), ("sd21", 768, 1)
)  # fmt: skip
UNTIMED: tuple[Call, ...] = (
    ("sd15", 512, 8), ("sdxl", 768, 1), ("sd21", 512, 2), ("koala-700m", 1024, 1), ("bk-sdm-tiny", 512, 1)
)  # fmt: skip
deviations = st.lists(st.floats(-1.0, 1.0), min_size=len(PARAMETERS), max_size=len(PARAMETERS)).map(np.array)
factors = st.floats(0.5, 2.0)


@cache
def bare() -> Profiles:
    """Nothing but two GPUs with a datasheet and a phone without: no row, no population, no constant."""
    profiles = load_profiles()
    said = {"kind": "modelled", "source": "made up", "source_date": "2026", "usable_memory_fraction": 0.9}
    own = Gpu(
        name="own", label="Own", memory_gib=80, memory_bandwidth_bytes_per_s=BANDWIDTH, fp16_flop_per_s=PEAK,
        default_interconnect="nvlink3-switch", **said,
    )  # fmt: skip
    faster = own.model_copy(update={"name": "faster", "fp16_flop_per_s": 2 * PEAK})
    phone = next(iter(profiles.edge_devices.values())).model_copy(update={"name": "phone", "fp16_flop_per_s": None})
    devices = {"gpus": {"own": own, "faster": faster}, "edge_devices": {"phone": phone}}
    return replace(profiles, **devices, populations=(), constants={}).without(lambda _: True)


def row(call: Call, seconds: float = 1.0, **columns: object) -> CostRow:
    """A published guided step."""
    model, side_px, images = call
    said = {
        "device": "own", "runtime": RUNTIME, "precision": "fp16", "model": model, "component": "step",
        "height_px": side_px, "width_px": side_px, "batch_size": images, "guidance": True, "seconds_median": seconds,
        "kind": "quoted", "source": "one table", "source_date": "2026",
    }  # fmt: skip
    return CostRow.model_validate(said | columns)


def kernels_of(call: Call) -> Kernels:
    """What a guided step executes."""
    return call_kernels(bare(), row(call))


def true_law(deviation: Floats) -> Floats:
    """A device that lies this many standard deviations from what is believed of devices."""
    prior = starting_prior(bare(), RUNTIME, "fp16")
    return prior.mean + prior.spread * deviation + np.array([log(PEAK), 0, 0, log(BANDWIDTH), 0, 0])


def true_s(call: Call, law: Floats) -> float:
    """What the device takes."""
    return float(Batch([kernels_of(call)]).seconds(law)[0])


def rows_of(law: Floats, timed: Sequence[Call] = TIMED, *, factor: float = 1.0, **columns: object) -> list[CostRow]:
    """The rows that a source publishes about it."""
    return [row(call, factor * true_s(call, law), **columns) for call in timed]


def fitted_to(rows: Sequence[CostRow], device: str = "own", precision: str = "fp16") -> Fit:
    """The law of the device after these rows."""
    return fit_of(bare().with_costs(rows), device, RUNTIME, precision)


def widths(fit: Fit, timed: Sequence[Call] = UNTIMED) -> list[float]:
    """How unsure the law is about each of some steps."""
    return [fit.log_spread(kernels_of(call)) for call in timed]


# ---- What rows tell -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(deviations)
def test_a_device_is_found_again_from_its_rows(deviation: Floats) -> None:
    """From two sources' six steps, other models, sizes and batches are predicted: 4% on average, a tenth at worst."""
    law = true_law(deviation)
    fit = fitted_to([*rows_of(law), *rows_of(law, source="another table")])
    errors = [abs(fit.seconds(kernels_of(call)) / true_s(call, law) - 1) for call in UNTIMED]

    assert fmean(errors) < 0.04
    assert max(errors) < 0.10


@settings(max_examples=25)
@given(deviations)
def test_what_the_rows_say_counts_more_than_what_was_believed(deviation: Floats) -> None:
    """The fitted law predicts its own rows at least as well as the prior that it started from, and within 6%."""
    law = true_law(deviation)
    fit, unseen = fitted_to(rows_of(law)), fit_of(bare(), "own", RUNTIME, "fp16")
    errors, before = (
        fmean(abs(log(known.seconds(kernels_of(call)) / true_s(call, law))) for call in TIMED)
        for known in (fit, unseen)
    )

    assert errors <= before + 1e-6
    assert max(map(abs, fit.residuals)) < 0.06


def test_what_no_row_tells_stays_with_the_population() -> None:
    """Large batches never wait for the host, so that the launch stays as believed, as unsurely; the rate does not."""
    law = true_law(np.array([1.0, 0, 0, 0, 0, 1.0]))
    fit = fitted_to(rows_of(law, [("sdxl", 1024, 16), ("sdxl", 1024, 32), ("sd15", 512, 64)]))
    prior = starting_prior(bare(), RUNTIME, "fp16")
    rate, launch = PARAMETERS.index("linear_flop_per_s"), PARAMETERS.index("launch_s_per_op")

    assert fit.log_parameters[launch] == pytest.approx(prior.mean[launch], abs=1e-3)
    assert np.sqrt(fit.covariance[launch, launch]) == pytest.approx(prior.spread[launch], rel=1e-3)
    assert fit.log_parameters[rate] > prior.mean[rate] + log(PEAK) + 0.5 * prior.spread[rate]
    assert np.sqrt(fit.covariance[rate, rate]) < 0.7 * prior.spread[rate]


def test_the_population_counts_less_the_more_rows_there_are() -> None:
    """The first row draws the prediction from the population's towards the truth, and further rows closer to it."""
    law = true_law(np.full(len(PARAMETERS), 1.0))
    rows = rows_of(law, UNTIMED)
    target = kernels_of(("sdxl", 1024, 2))
    truth = float(Batch([target]).seconds(law)[0])
    misses = [abs(log(fitted_to(rows[:count]).seconds(target) / truth)) for count in (0, 1, 3, 5)]

    assert misses[0] > misses[1] > misses[3]
    assert misses[3] < 0.03


@settings(max_examples=20)
@given(deviations)
def test_every_row_makes_its_own_step_surer(deviation: Floats) -> None:
    """From no row to six of one source, each makes the step that it timed surer than it was before."""
    rows = rows_of(true_law(deviation))
    fits = [fitted_to(rows[:count]) for count in range(len(rows) + 1)]

    for call, (before, after) in zip(TIMED, pairwise(fits), strict=True):
        assert after.log_spread(kernels_of(call)) < before.log_spread(kernels_of(call)), call


@settings(max_examples=20)
@given(deviations)
def test_more_rows_that_agree_narrow_the_interval(deviation: Floats) -> None:
    """Of steps that nobody timed, six rows leave less doubt than two, and a second source that agrees still less."""
    law = true_law(deviation)
    rows = rows_of(law)
    narrowing = [
        fmean(widths(fitted_to(some))) for some in (rows[:2], rows, rows + rows_of(law, source="another table"))
    ]

    assert narrowing[0] > narrowing[1] > narrowing[2]


@settings(max_examples=20)
@given(deviations, st.floats(1.3, 3.0))
def test_rows_of_one_source_that_contradict_each_other_widen_the_interval(deviation: Floats, factor: float) -> None:
    """What one law cannot explain within a table makes every prediction less sure."""
    law = true_law(deviation)
    rows, others = rows_of(law), rows_of(law, factor=factor)
    clean, torn = (fitted_to([*rows, *more]) for more in (rows, others))

    assert torn.sigma > clean.sigma
    assert all(wide > narrow for narrow, wide in zip(widths(clean), widths(torn), strict=True))


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_sources_that_contradict_each_other_widen_the_interval(factor: float) -> None:
    """Two tables that are this far apart on every step leave the device less known than two that agree."""
    law = true_law(np.zeros(len(PARAMETERS)))
    rows = rows_of(law, factor=factor**-0.5)
    agreeing, apart = (
        fitted_to([*rows, *rows_of(law, factor=ratio, source="another table")]) for ratio in (factor**-0.5, factor**0.5)
    )

    assert all(wide > 1.1 * narrow for narrow, wide in zip(widths(agreeing), widths(apart), strict=True))


@settings(max_examples=10)
@given(deviations, factors)
def test_sources_that_disagree_are_met_in_the_middle(deviation: Floats, factor: float) -> None:
    """Of two tables that differ by a factor none is believed alone: the law lies between them."""
    law = true_law(deviation)
    rows, others = rows_of(law), rows_of(law, factor=factor, source="another table")
    low, both, high = (fitted_to(some).seconds(kernels_of(TIMED[0])) for some in (rows, [*rows, *others], others))

    assert min(low, high) * 0.99 <= both <= max(low, high) * 1.01


@settings(max_examples=10)
@given(deviations, st.permutations(range(2 * len(TIMED))))
def test_the_order_of_rows_does_not_matter(deviation: Floats, order: list[int]) -> None:
    """However the tables are sorted, the law is the same."""
    law = true_law(deviation)
    rows = [*rows_of(law), *rows_of(law, factor=1.1, source="another table")]

    shuffled = fitted_to([rows[index] for index in order])
    assert shuffled.log_parameters == pytest.approx(fitted_to(rows).log_parameters, abs=1e-3)


@settings(max_examples=20)
@given(deviations, st.sampled_from([2, 4, 8]), st.floats(1e-3, 1e3))
def test_a_row_of_several_gpus_never_enters_a_law(deviation: Floats, degree: int, seconds: float) -> None:
    """Whatever a gang took, even wildly: the law of one GPU knows only rows of one."""
    rows = rows_of(true_law(deviation), TIMED[:2])
    gang = row(TIMED[0], seconds, method="distrifusion", degree=degree, options="warmup_steps=5")
    alone, beside = fitted_to(rows), fitted_to([*rows, gang])

    assert beside.rows == alone.rows
    assert beside.log_parameters.tolist() == alone.log_parameters.tolist()


def test_residuals_are_the_laws_error_in_its_rows() -> None:
    """Positive where the law says longer; the note says the rows and their typical error."""
    rows = rows_of(true_law(np.full(len(PARAMETERS), 0.5)))
    known = bare().with_costs(rows)
    fit = fit_of(known, "own", RUNTIME, "fp16")

    assert fit.rows == tuple(rows)
    assert fit.sources == ("one table",)
    for timed, error in zip(fit.rows, fit.residuals, strict=True):
        assert log(fitted_step_time(timed, known).value / timed.seconds_median) == pytest.approx(error)
    assert f"{len(rows)} one-GPU rows" in fit.note
    assert f"{fmean(abs(exp(error) - 1) for error in fit.residuals):.1%}" in fit.note


def test_parameters_have_their_interval_and_unit() -> None:
    """Each parameter stands between its ends, and a law of the prior has the datasheet's share."""
    fit = fit_of(bare(), "own", RUNTIME, "fp16")
    prior = starting_prior(bare(), RUNTIME, "fp16")

    assert tuple(fit.parameters) == PARAMETERS
    assert all(0 < found.low < found.value < found.high for found in fit.parameters.values())
    assert fit.parameters["linear_flop_per_s"].value == pytest.approx(PEAK * exp(prior.mean[0]))
    assert fit.parameters["memory_bytes_per_s"].value == pytest.approx(BANDWIDTH * exp(prior.mean[3]))


# ---- Intervals ------------------------------------------------------------------------------------------------------


def test_intervals_cover_nine_of_ten_rows_of_another_source() -> None:
    """Over 120 devices of the population, each timed in two tables, nine of ten rows of a third lie inside.

    Each table is off by its own factor and repeats its own rows a little differently, as stated for sources and rows.
    """
    random, inside = np.random.default_rng(7), []
    spread = ROW_SPREAD["quoted"]
    for _ in range(120):
        law = true_law(np.clip(random.normal(size=len(PARAMETERS)), -2.4, 2.4))
        tables = [
            [replaced(one, random.normal(0, spread)) for one in rows_of(law, half, factor=offset, source=name)]
            for name, half, offset in zip(
                ("one", "two"), (TIMED[:3], TIMED[3:]), np.exp(random.normal(0, SOURCE_SPREAD, 2)).tolist(), strict=True
            )
        ]
        fit = fitted_to([*tables[0], *tables[1]])
        for call in UNTIMED:
            gap = log(fit.seconds(kernels_of(call)) / true_s(call, law))
            published = random.normal(0, SOURCE_SPREAD) + random.normal(0, spread)
            inside.append(abs(gap - published) < 1.645 * fit.log_spread(kernels_of(call)))

    assert 0.83 < fmean(inside) < 0.96


def replaced(timed: CostRow, deviation: float) -> CostRow:
    """The row as another repetition would give it."""
    return timed.model_copy(update={"seconds_median": timed.seconds_median * exp(deviation)})


@settings(max_examples=20)
@given(deviations)
def test_a_device_without_rows_is_less_sure_than_one_with(deviation: Floats) -> None:
    """Two rows make every other step surer than datasheet and population do."""
    unseen, timed = fit_of(bare(), "own", RUNTIME, "fp16"), fitted_to(rows_of(true_law(deviation), TIMED[2:4]))

    assert unseen.rows == ()
    assert "never timed" in unseen.note
    assert fmean(widths(timed)) < 0.8 * fmean(widths(unseen))


def test_an_interval_surrounds_its_middle_evenly_in_logarithms() -> None:
    """Ends are as far from the middle in one direction as in the other, as factors."""
    known = bare().with_costs(rows_of(true_law(np.zeros(len(PARAMETERS)))))
    time = fitted_step_time(row(UNTIMED[0]), known)

    assert time.low < time.value < time.high
    assert time.value / time.low == pytest.approx(time.high / time.value)


def test_a_round_lies_inside_what_was_timed_up_to_a_factor_of_two() -> None:
    """Twice beyond the smallest and largest timed FLOPs still counts as seen; without rows nothing does."""
    fit = fitted_to(rows_of(true_law(np.zeros(len(PARAMETERS)))))
    least, most = min(fit.flops), max(fit.flops)

    assert fit.holds(least / 1.99)
    assert fit.holds(most * 1.99)
    assert not fit.holds(least / 2.01)
    assert not fit.holds(most * 2.01)
    assert not fit_of(bare(), "own", RUNTIME, "fp16").holds(most)


# ---- Devices and runtimes without rows ------------------------------------------------------------------------------


def test_a_device_that_nobody_knows_is_refused() -> None:
    """A name that no catalogue has is answered with the nearest; a device without peak and rows with those timed."""
    with pytest.raises(MissingDataError, match="own"):
        fit_of(bare(), "owm", RUNTIME, "fp16")
    known = bare().with_costs(rows_of(true_law(np.zeros(len(PARAMETERS)))))
    with pytest.raises(MissingDataError, match="Timed devices: own"):
        fit_of(known, "phone", RUNTIME, "fp16")


def test_a_faster_datasheet_is_a_faster_device() -> None:
    """Of two devices that nobody timed, the one with twice the arithmetic takes no longer, less where that binds."""
    own, faster = (fit_of(bare(), name, RUNTIME, "fp16") for name in ("own", "faster"))
    times = [(own.seconds(kernels), faster.seconds(kernels)) for kernels in (kernels_of(call) for call in TIMED)]

    assert all(quick <= slow for slow, quick in times)
    assert times[4][1] < 0.75 * times[4][0]


def test_half_of_a_devices_difference_holds_under_another_runtime() -> None:
    """A device that is faster than its datasheet lets expect in one runtime is expected half as much so in another."""
    rows = rows_of(true_law(np.array([1.0, 0, 0, 0, 0, 0])))
    known = bare().with_costs(rows)
    expected = population(known, RUNTIME, "fp16").mean[0] + log(PEAK)
    seen, other = (
        fit_of(known, "own", RUNTIME, "fp16").log_parameters[0],
        fit_of(known, "own", "compiled", "fp16").log_parameters[0],
    )

    assert seen > expected + 0.2
    assert other - (population(known, "compiled", "fp16").mean[0] + log(PEAK)) == pytest.approx(
        SHIFT * (seen - expected)
    )


def test_a_timed_runtime_makes_another_one_surer() -> None:
    """Rows under one runtime narrow what is expected under another, which still is wider than its own rows would be."""
    known = bare().with_costs(rows_of(true_law(np.zeros(len(PARAMETERS)))))
    blank, other, own = (
        fit_of(known_rows, "own", runtime, "fp16")
        for known_rows, runtime in ((bare(), "compiled"), (known, "compiled"), (known, RUNTIME))
    )
    heavy = kernels_of(("sdxl", 1024, 4))

    assert own.log_spread(heavy) < other.log_spread(heavy) < blank.log_spread(heavy)
    assert re.search(rf"\b{len(TIMED)} .*rows under {RUNTIME}", other.note)


def test_a_phone_without_datasheet_has_the_speed_of_its_rows() -> None:
    """Where nothing is known but a time, the law gives that time back."""
    rows = [row(("sd15", 512, 1), 0.2, device="phone", precision="w8a16")]
    fit = fitted_to(rows, "phone", "w8a16")

    assert fit.seconds(call_kernels(bare(), rows[0])) == pytest.approx(0.2, rel=0.02)


GPUS = ("t4", "l4", "a10g", "a100-sxm-80gb", "l40s", "h100-sxm", "rtx-4090", "rtx-a5000")


@pytest.mark.parametrize("runtime", ["eager", "compiled", "tensorrt", "cudagraph", "onnxruntime"])
@pytest.mark.parametrize("gpu", GPUS)
def test_full_precision_is_slower_on_every_gpu(profiles: Profiles, gpu: str, runtime: str) -> None:
    """With a datasheet, fp32 takes longer than fp16, timed or not."""
    for call in TIMED:
        half, full = (
            fitted_step_time(row(call, device=gpu, runtime=runtime, precision=name), profiles).value
            for name in ("fp16", "fp32")
        )
        assert full > half, call


def test_full_precision_is_slower_without_a_datasheet() -> None:
    """A phone that was timed in fp16 takes longer in fp32 as well."""
    known = bare().with_costs([row(call, 0.2, device="phone") for call in TIMED[:1]])
    half, full = (
        fitted_step_time(row(TIMED[0], device="phone", precision=name), known).value for name in ("fp16", "fp32")
    )

    assert full > 1.2 * half


def test_bf16_runs_as_fp16_does() -> None:
    """Rows of either fit one law, which is that of both."""
    law = true_law(np.full(len(PARAMETERS), 0.5))
    rows = [*rows_of(law, TIMED[:3]), *rows_of(law, TIMED[3:], precision="bf16")]
    half, brain = (fitted_to(rows, precision=name) for name in ("fp16", "bf16"))

    assert len(half.rows) == len(TIMED)
    assert brain.log_parameters.tolist() == half.log_parameters.tolist()


def highest_rate(profiles: Profiles, device: str, precision: str) -> float:
    """The dense tensor peak in fp16; twice as much in 8 bits, and on GeForce cards, which can sum in fp16."""
    known = profiles.device(device)
    peak = known.fp16_flop_per_s or inf
    return peak * (2 if "GeForce" in known.label else 1) * (2 if precision in {"fp8", "int8", "w8a16"} else 1)


def test_no_rate_goes_beyond_the_datasheet(profiles: Profiles) -> None:
    """Large linear layers stay below the peak of their device and precision, as fitted and as expected."""
    expected = [fit_of(profiles, name, runtime, "fp16") for name in GPUS for runtime in profiles.runtimes]

    for fit in [*own_fits(profiles), *expected]:
        ceiling = highest_rate(profiles, fit.device, fit.precision)
        assert exp(fit.log_parameters[0]) <= ceiling * 1.01, (fit.device, fit.runtime, fit.precision)


# ---- Calls ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16))
def test_a_fixed_batch_runtime_takes_a_call_for_each_batch(profiles: Profiles, latents: int) -> None:
    """QNN evaluates one latent a call, Core ML two; the others any number at once."""
    assert calls(profiles, "qnn", latents) == latents
    assert calls(profiles, "coreml", latents) == (latents + 1) // 2
    assert calls(profiles, "eager", latents) == 1


def test_guidance_doubles_the_step_of_a_one_latent_runtime() -> None:
    """Two latents on a phone are two calls of one, twice as long, and so are rows that timed them."""
    one = row(("sd15", 512, 1), 0.1, device="phone", runtime="qnn", guidance=False)
    both = row(("sd15", 512, 1), 0.2, device="phone", runtime="qnn")
    known, known_both = bare().with_costs([one]), bare().with_costs([both])

    assert fitted_step_time(both, known).value == pytest.approx(2 * fitted_step_time(one, known).value)
    assert fitted_step_time(one, known_both).value == pytest.approx(fitted_step_time(one, known).value)


# ---- Components -----------------------------------------------------------------------------------------------------


def test_a_component_takes_its_flops_times_the_shared_ratio(profiles: Profiles) -> None:
    """Decoders are timed by the UNet's law, longer by what all devices share, and less surely."""
    name, where = "autoencoder-kl", ("a100-sxm-80gb", "eager", "fp16")
    ratio = profiles.constants["vae_decode_ratio"].value
    time = fitted_component_time(profiles, *where, name, (512, 512))
    plain = fitted_component_time(replace(profiles, constants={}), *where, name, (512, 512))

    assert time.value == pytest.approx(ratio * plain.value)
    assert time.low < time.value < time.high
    assert plain.low / plain.value < time.low / time.value  # less sure before any component was timed
    assert "a100-sxm-80gb" in time.note


def test_a_prompt_takes_the_same_at_every_size_and_an_image_does_not(profiles: Profiles) -> None:
    """Text encoders do not see the image; decoders grow faster than its area, for their attention."""
    where = ("a100-sxm-80gb", "eager", "fp16")

    def seconds(name: str, side_px: int) -> float:
        return fitted_component_time(profiles, *where, name, (side_px, side_px)).value

    assert seconds("clip-l", 512) == seconds("clip-l", 1024)
    assert seconds("autoencoder-kl", 2048) > 4 * seconds("autoencoder-kl", 1024)
