"""Laws of what devices share: fits rest on the rows that they name, and predict rows that they never saw."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import fmean

import pytest

from hybridsd_sim import Profiles, load_profiles
from hybridsd_sim.files import data_folder
from hybridsd_sim.perf import (
    CONSTANTS,
    METHODS,
    fit_of,
    fitted,
    is_multi_gpu_time,
    own_fits,
    refit,
    timed_stage,
    write_fitted,
)
from hybridsd_sim.perf.device_fit import call_kernels
from hybridsd_sim.perf.population_fit import is_one_gpu_step, with_constants, with_populations
from hybridsd_sim.perf.stage_time import stage_times
from hybridsd_sim.profiles import EFFICIENCIES, CostRow

Choice = Callable[[CostRow], bool]
WRITTEN = ("populations", "constants", "laws", "residuals")
COMMAND = "hybridsd-sim verify --write-fits profiles/fitted"
SAME = 1e-3
"""Relative difference up to which two fits are one: machines differ in the last digits."""
RELATIVE = ("relative_error",)
"""Columns that are shares, which may be next to nothing, so that their difference counts."""


@pytest.fixture(scope="module")
def multi_gpu(profiles: Profiles) -> list[CostRow]:
    """The published times of several GPUs."""
    return [row for row in profiles.costs if is_multi_gpu_time(row)]


@pytest.fixture(scope="module")
def few() -> Profiles:
    """Five cards under PyTorch eager, fitted anew: enough for a population, and quickly fitted."""
    cards = {"t4", "v100-sxm2-32gb", "a100-sxm-80gb", "rtx-3090", "rtx-4090"}
    chosen = load_profiles().without(
        lambda row: (
            not (is_one_gpu_step(row) and row.device in cards and (row.runtime, row.precision) == ("eager", "fp16"))
        )
    )
    return fitted(chosen)


def changed(profiles: Profiles, chosen: Choice, factor: float) -> Profiles:
    """The same rows in the same order, but with the chosen ones' seconds times a factor."""
    no_range = {"seconds_p05": None, "seconds_p95": None}
    rows = [
        row.model_copy(update={"seconds_median": factor * row.seconds_median, **no_range}) if chosen(row) else row
        for row in profiles.costs
    ]
    return profiles.without(lambda _: True).with_costs(rows)


def error(row: CostRow, profiles: Profiles) -> float:
    """Relative error of a predicted step of several GPUs."""
    stage, request = timed_stage(row)
    predicted = sum(phase.seconds.value for phase in stage_times(stage, request, profiles)) / stage.num_steps
    return predicted / row.seconds_median - 1


def laws(profiles: Profiles) -> dict[tuple[str, str, str], list[float]]:
    """The logarithms of every timed device's law."""
    return {(fit.device, fit.runtime, fit.precision): fit.log_parameters.tolist() for fit in own_fits(profiles)}


# ---- The shipped tables ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(profiles: Profiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fitting makes of the shipped rows, as the command writes it."""
    folder = tmp_path_factory.mktemp("fits")
    write_fitted(fitted(profiles), folder)
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_the_shipped_tables_are_what_fitting_makes_of_the_shipped_rows(written: Path, name: str) -> None:
    """Whoever changes a row or the model writes them again; every number is compared to a thousandth."""
    shipped, anew = (read(folder / f"{name}.csv") for folder in (data_folder("profiles") / "fitted", written))
    remedy = f"{name}.csv is out of date; write it again with: {COMMAND}"

    assert len(shipped) == len(anew), remedy
    for line, (before, after) in enumerate(zip(shipped, anew, strict=True), 2):
        assert before.keys() == after.keys(), remedy
        for column, text in after.items():
            assert alike(column, before[column], text), f"line {line}, {column}: {before[column]}, now {text}. {remedy}"


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a table."""
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def alike(column: str, before: str, after: str) -> bool:
    """Whether two cells say the same."""
    try:
        one, other = float(before), float(after)
    except ValueError:
        return before == after
    return abs(one - other) <= (2 * SAME if column in RELATIVE else SAME * abs(other))


def test_what_is_written_is_read_again(few: Profiles, profiles: Profiles, tmp_path: Path) -> None:
    """Populations and constants come back as they were fitted, and give the same laws."""
    known = replace(few, constants=profiles.constants)
    shutil.copytree(data_folder("profiles") / "catalog", tmp_path / "catalog")
    write_fitted(known, tmp_path / "fitted")
    again = load_profiles(tmp_path)

    assert again.populations == known.populations
    assert again.constants == known.constants
    assert laws(replace(again, costs=known.costs)) == laws(known)


def test_profiles_without_several_gpus_can_be_written(few: Profiles, tmp_path: Path) -> None:
    """Where no constant was fitted, none is written, and the folder is read as one without."""
    shutil.copytree(data_folder("profiles") / "catalog", tmp_path / "catalog")
    write_fitted(replace(few, constants={}), tmp_path / "fitted")

    assert load_profiles(tmp_path).constants == {}


def test_every_constant_and_population_says_what_it_rests_on(profiles: Profiles) -> None:
    """A constant of the methods names its meaning and rows; a population has all six parameters and its devices."""
    multi_gpu = sum(is_multi_gpu_time(row) for row in profiles.costs)
    by_runtime: dict[tuple[str, str], list[str]] = {}
    for row in profiles.populations:
        by_runtime.setdefault((row.runtime, row.precision), []).append(row.parameter)

    assert all(sorted(names) == sorted(EFFICIENCIES) for names in by_runtime.values())
    assert set(by_runtime) == {key[1:] for key in laws(profiles)}
    for constant in CONSTANTS:
        row = profiles.constants[constant.name]
        assert (row.rows, row.notes, row.kind) == (multi_gpu, constant.meaning, "modelled")


# ---- Which rows tell what -------------------------------------------------------------------------------------------


def test_laws_of_devices_know_no_row_of_several_gpus(profiles: Profiles) -> None:
    """Without any multi-GPU row the populations and every device's law are the same to the last bit."""
    alone = profiles.without(lambda row: row.degree > 1)
    with_all, without = (with_populations(some, iterations=1) for some in (profiles, alone))

    assert without.populations == with_all.populations
    assert laws(without) == laws(with_all)


def test_constants_know_only_the_rows_of_several_gpus(profiles: Profiles) -> None:
    """Phones, other cards, decoders and loads may go: exchange and walks cost what they did."""
    measured_in = {row.device for row in profiles.costs if is_multi_gpu_time(row)}
    fewer = with_constants(profiles.without(lambda row: row.device not in measured_in or row.component != "step"))
    everything = with_constants(profiles)

    for constant in CONSTANTS:
        assert fewer.constants[constant.name] == everything.constants[constant.name]


def test_a_row_of_several_gpus_is_used_if_it_says_how_it_warmed_up(multi_gpu: list[CostRow]) -> None:
    """All times of DistriFusion and AsyncDiff that can be predicted are: quoted, several GPUs, warm-up stated."""
    assert {row.method for row in multi_gpu} == {"distrifusion", "asyncdiff"}
    assert len(multi_gpu) == 32
    assert all(row.kind == "quoted" and row.degree > 1 for row in multi_gpu)


def test_a_timed_stage_is_what_the_row_timed(multi_gpu: list[CostRow]) -> None:
    """Model, size, device, method, degree, steps and options of the row, and legal."""
    for row in multi_gpu:
        stage, request = timed_stage(row)
        said = dict(part.split("=") for part in row.options.split(";"))

        assert (stage.model, stage.method, stage.degree) == (row.model, row.method, row.degree)
        assert (stage.site.device, stage.site.runtime) == (row.device, row.runtime)
        assert (request.height_px, request.width_px, request.unet_batch) == (row.height_px, row.width_px, row.latents)
        assert stage.num_steps == int(said.pop("num_inference_steps"))
        assert {name: str(value) for name, value in stage.options} == said
        assert all(type(value) is type(METHODS[row.method].defaults[name]) for name, value in stage.options)


def test_constants_are_found_again_from_times_that_they_made(profiles: Profiles, multi_gpu: list[CostRow]) -> None:
    """Times predicted with other constants, put in the papers' place, are fitted by those constants."""
    others = {"message_s": 6e-5, "hidden_share": 0.4, "stripes_link_share": 0.8, "walk_share": 0.3}
    rows = {
        name: row.model_copy(update={"value": others.get(name, row.value)}) for name, row in profiles.constants.items()
    }
    made_by = replace(profiles, constants=rows)
    made = [
        row.model_copy(update={"seconds_median": row.seconds_median * (1 + error(row, made_by))}) for row in multi_gpu
    ]
    found = with_constants(profiles.without(is_multi_gpu_time).with_costs(made))

    assert fmean(abs(error(row, found)) for row in made) < 0.005
    assert found.constants["unexplained_share"].value < 0.5 * profiles.constants["unexplained_share"].value
    for name, value in others.items():
        row = found.constants[name]
        assert abs(log(row.value / value)) < max(0.1, 2 * row.spread), name


# ---- Leaving rows out -----------------------------------------------------------------------------------------------


def test_a_device_that_is_left_out_is_unseen(profiles: Profiles) -> None:
    """Its rows are gone from costs, laws and populations, and constants that rested on them from theirs."""
    held = refit(profiles, without=lambda row: row.device == "a100-sxm-80gb")
    counts = [
        next(row.devices for row in some.populations if (row.runtime, row.precision) == ("eager", "fp16"))
        for some in (profiles, held)
    ]

    assert not held.cost_rows(device="a100-sxm-80gb")
    assert all(row.device != "a100-sxm-80gb" for fit in own_fits(held) for row in fit.rows)
    assert fit_of(held, "a100-sxm-80gb", "eager", "fp16").rows == ()
    assert counts[1] == counts[0] - 1
    assert held.constants["message_s"].rows == sum(is_multi_gpu_time(row) for row in held.costs) < 32


def test_leaving_nothing_out_changes_nothing(profiles: Profiles) -> None:
    """A refit without any row to leave out keeps every fit as it is."""
    same = refit(profiles, without=lambda _: False)

    assert same.populations == profiles.populations
    assert same.constants.keys() == profiles.constants.keys()
    for name, row in same.constants.items():
        assert row.value == pytest.approx(profiles.constants[name].value, rel=SAME)


def test_leaving_out_what_no_fit_uses_keeps_the_fits(profiles: Profiles) -> None:
    """Loads and hand-overs tell nothing about laws, and multi-GPU rows nothing about devices."""
    loads = refit(profiles, without=lambda row: row.component in {"model_load", "handover_serialise"})
    gangs = refit(profiles, without=lambda row: row.degree > 1)

    assert loads.populations == gangs.populations == profiles.populations
    for constant in CONSTANTS:
        assert loads.constants[constant.name] == profiles.constants[constant.name]


def test_the_ratio_of_a_component_forgets_rows_that_are_left_out(profiles: Profiles) -> None:
    """Without the decoders of some devices, the shared ratio is that of the others."""
    decoders = profiles.cost_rows(component="vae_decode", degree=1, batch_size=1)
    devices = sorted({row.device for row in decoders})[::2]

    def left_out(row: CostRow) -> bool:
        return row.component == "vae_decode" and row.device in devices

    held, anew = refit(profiles, without=left_out), with_constants(profiles.without(left_out))
    assert held.constants["vae_decode_ratio"].rows < profiles.constants["vae_decode_ratio"].rows
    assert held.constants["vae_decode_ratio"] == anew.constants["vae_decode_ratio"]


def test_a_constant_without_rows_is_forgotten(profiles: Profiles) -> None:
    """Where no decoder was ever timed there is no ratio, and the prior holds."""
    held = refit(profiles, without=lambda row: row.component == "vae_decode")

    assert "vae_decode_ratio" not in held.constants


def test_what_is_left_out_cannot_be_known(few: Profiles) -> None:
    """Had the rows that are left out been twice as slow, the laws without them would be the same to 2%."""

    def left_out(row: CostRow) -> bool:
        return row.model == "sdxl"

    slower = fitted(changed(few, left_out, 2.0))
    held, held_slower = (refit(some, without=left_out) for some in (few, slower))
    kernels = call_kernels(few, next(row for row in few.costs if row.model == "sdxl"))

    for key in laws(held):
        one, other = (fit_of(some, *key).seconds(kernels) for some in (held, held_slower))
        assert other == pytest.approx(one, rel=0.02), key


DISTRIFUSION, ASYNCDIFF = "arXiv:2402.19481", "arXiv:2406.06911"
GROUPS: dict[str, Choice] = {
    "DistriFusion at 1024 px": lambda row: row.source.startswith(DISTRIFUSION) and row.height_px == 1024,
    "DistriFusion at 2048 px": lambda row: row.source.startswith(DISTRIFUSION) and row.height_px == 2048,
    "AsyncDiff with SD 1.5": lambda row: row.source.startswith(ASYNCDIFF) and row.model == "sd15",
    "AsyncDiff with SD 2.1": lambda row: row.source.startswith(ASYNCDIFF) and row.model == "sd21",
    "AsyncDiff with SDXL": lambda row: row.source.startswith(ASYNCDIFF) and row.model == "sdxl",
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_that_was_left_out_is_predicted(profiles: Profiles, multi_gpu: list[CostRow], name: str) -> None:
    """Constants from the other groups predict this one's several GPUs to 10% on average and 20% at worst."""
    held = refit(profiles, without=lambda row: row.degree > 1 and GROUPS[name](row))
    errors = [abs(error(row, held)) for row in multi_gpu if GROUPS[name](row)]

    assert len(errors) >= 5
    assert fmean(errors) <= 0.10
    assert max(errors) <= 0.20


@pytest.mark.parametrize("name", ["DistriFusion at 1024 px", "AsyncDiff with SD 1.5"])
def test_a_group_is_predicted_without_its_single_gpu_too(
    profiles: Profiles, multi_gpu: list[CostRow], name: str
) -> None:
    """Where no time of the step on one GPU anchors the prediction, the device's law alone comes as near."""
    held = refit(profiles, without=GROUPS[name])
    errors = [abs(error(row, held)) for row in multi_gpu if GROUPS[name](row)]

    assert fmean(errors) <= 0.10
    assert max(errors) <= 0.20


# ---- Populations ----------------------------------------------------------------------------------------------------


def test_a_population_lies_among_its_devices(few: Profiles) -> None:
    """The middle of each parameter is between the prior and the devices' own, which lie around it as it says."""
    means = {row.parameter: row for row in few.populations}
    rates = [log(exp(fit.log_parameters[0]) / (few.peak_flop_per_s(fit.device) or 1)) for fit in own_fits(few)]
    believed = log(few.runtime("eager").efficiency)
    middle = log(means["linear_efficiency"].mean)

    assert min(*rates, believed) <= middle <= max(*rates, believed) + log(2)  # GeForce: shares of fp16 sums
    assert means["linear_efficiency"].devices == len(rates) == 5


def test_fitting_from_nothing_has_settled(few: Profiles) -> None:
    """Twice as many rounds of expectation and maximisation move no prediction of a timed step by more than 2%."""
    more = with_populations(few, iterations=6)

    for row in few.costs:
        kernels = call_kernels(few, row)
        one, other = (fit_of(some, row.device, row.runtime, row.precision).seconds(kernels) for some in (few, more))
        assert other == pytest.approx(one, rel=0.02)
