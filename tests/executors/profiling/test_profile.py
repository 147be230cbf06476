from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executors.models import pipeline as models
from executors.parallel import Alone
from executors.profiling import LocalDevice, Progress, Sweep, Timing, commit, is_first_process, profile
from executors.profiling import measure as measurements
from executors.profiling.grid import RUNTIMES, find_targets
from executors.profiling.measure import Measured, Recorder, Span, slowest
from executors.profiling.runner import usable_cores
from executors.profiling.timing import Meter
from hybridsd_sim import load_profiles
from hybridsd_sim.errors import InputError, RunError
from own_catalogue import own_catalogue

SIZE = (192, 64)
HERE = LocalDevice("cpu-1core", "cpu", 1)
SWEEP = Sweep(models=["small"], sizes=[SIZE], warmup_runs=1)
LOOPBACK = replace(SWEEP, methods=["distrifusion"], degrees=[2], ranks="loopback")
TWO_CORES = pytest.mark.skipif(usable_cores() < 2, reason="two processes of one thread need two cores")
SHIPPED = load_profiles()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A profiles folder with small models."""
    return own_catalogue(tmp_path / "profiles")


@pytest.fixture
def measure(folder):
    """Profiles a sweep into the folder and returns the outcome."""
    return lambda sweep, **more: profile(sweep, load_profiles(folder), HERE, folder, **more)


def rows_of(folder, **wanted):
    """The measured rows of the folder that hold these values."""
    return load_profiles(folder).cost_rows(device=HERE.name, component=wanted.pop("component", None), **wanted)


# ---- Rows and files -------------------------------------------------------------------------------------------------


def test_measured_rows_are_read_back_as_they_were_written(folder, measure) -> None:
    """What a profile returns is what the planner reads from the folder, to six digits; its meta has the ceilings."""
    outcome = measure(replace(SWEEP, guidance=[True, False]))
    read = load_profiles(folder)
    rows = rows_of(folder, component="step")
    assert [(row.latents, row.num_samples, row.kind) for row in rows] == [(1, 10, "measured"), (2, 10, "measured")]
    assert sorted(row.seconds_median for row in rows) == pytest.approx(
        sorted(row.seconds_median for row in outcome.rows), rel=1e-5
    )
    meta = read.metas[f"{HERE.name}/small"]
    assert meta.ceilings == pytest.approx(outcome.ceilings, rel=1e-3)
    assert (meta.protocol.warmup_runs, meta.protocol.runs) == (1, 10)
    assert read.step_row(HERE.name, "eager", "small", SIZE, latents=2) in rows


def test_a_share_is_that_of_the_arithmetic_in_the_rows_precision(measure, monkeypatch) -> None:
    """A bf16 step is compared with bf16 products, whatever fp32 reaches."""
    measured_for = []

    def ceilings(here, precision):
        measured_for.append((here, precision))
        return {"matmul_bf16_flop_per_s": 1e15, "matmul_fp32_flop_per_s": 9e99}

    monkeypatch.setattr("executors.profiling.runner.measure_ceilings", ceilings)
    (entry,) = measure(replace(SWEEP, precision="bf16")).summary
    assert measured_for == [(HERE, "bf16")]
    assert entry["share_of_ceiling"] == pytest.approx(entry["flop_per_s"] / 1e15)


def test_every_component_has_rows_in_the_file_of_what_it_measured(folder, measure) -> None:
    """Text encoders and autoencoders have files of their own; everything else stands in the model's."""
    parts = ["vae_decode", "text_encode", "model_load", "handover_serialise", "handover_parse", "exchange"]
    measure(replace(SWEEP, sizes=[(64, 64)], components=parts))
    files = {path.stem for path in folder.glob(f"measured/{HERE.name}/*.csv")}
    rows = {row.component: row for row in rows_of(folder)}
    assert files == {"taesd", "clip-l", "small"}
    assert set(rows) == set(parts)
    assert {rows["vae_decode"].model, rows["text_encode"].model} == {"taesd", "clip-l"}
    payload = rows["exchange"].comm_bytes
    assert payload == rows["handover_serialise"].comm_bytes == rows["handover_parse"].comm_bytes
    assert payload > 4 * (8 * 8 * 4 + 2 * 77 * 768)


def test_a_second_run_measures_nothing(folder, measure) -> None:
    """Where all rows are there, no file changes and everything is reported as kept."""
    measure(LOOPBACK)
    before = {path: path.read_bytes() for path in folder.rglob("measured/*/*")}
    again = measure(LOOPBACK)
    assert (again.rows, len(again.kept), again.ceilings) == ([], 1, {})
    assert {path: path.read_bytes() for path in folder.rglob("measured/*/*")} == before
    assert [entry["component"] for entry in again.summary] == ["step", "step_warmup"]


class Interruption(Progress):
    """Ctrl-C when the first target is done."""

    def finish(self, target) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_profile_keeps_its_rows_and_goes_on(folder, measure) -> None:
    """What was measured before the interruption is whole and readable; the next run measures the rest alone."""
    two = replace(SWEEP, models=["small", "smaller"])
    with pytest.raises(KeyboardInterrupt):
        measure(two, progress=Interruption())
    kept = rows_of(folder, component="step")
    outcome = measure(two)
    assert [row.model for row in kept] == ["small"]
    assert [row.model for row in outcome.rows] == ["smaller"]
    assert set(kept) < set(rows_of(folder, component="step"))
    assert not list(folder.rglob("*.tmp"))


def test_a_time_budget_leaves_what_does_not_fit(folder, measure) -> None:
    """The first target always runs; those that would go beyond the budget are named and have no rows."""
    outcome = measure(replace(SWEEP, models=["small", "smaller"]), time_budget_s=1e-6)
    assert [target.model for target in outcome.left] == ["smaller"]
    assert [row.model for row in rows_of(folder, component="step")] == ["small"]


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.nan])
def test_a_time_budget_that_is_none_is_refused(measure, budget_s) -> None:
    """A budget is a positive number of seconds."""
    with pytest.raises(InputError, match="--time-budget-s"):
        measure(SWEEP, time_budget_s=budget_s)


class OutOfMemory(Progress):
    """The models of these names do not fit: their UNets take more than there is."""

    def __init__(self, monkeypatch, *names, error=torch.OutOfMemoryError) -> None:
        build = models.build_unet

        def refuse(config, **more):
            if self.target.model in names:
                raise error("Tried to allocate 80.00 GiB")
            return build(config, **more)

        monkeypatch.setattr(models, "build_unet", refuse)

    def start(self, target) -> None:
        self.target = target


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RunError])
def test_a_target_that_fails_does_not_stop_the_others(folder, measure, monkeypatch, error) -> None:
    """What does not fit is listed with its reason and has no rows; what comes after it is measured, now and later."""
    two = replace(SWEEP, models=["small", "smaller"])
    with monkeypatch.context() as patched:
        outcome = measure(two, progress=OutOfMemory(patched, "small", error=error))
    assert [target.model for target in outcome.failed] == ["small"]
    assert [row.model for row in outcome.rows] == ["smaller"]
    assert [str(problem) for problem in outcome.refused] == [
        f"small step {SIZE[0]}x{SIZE[1]} guided: {error.__name__}; Tried to allocate 80.00 GiB"
    ]
    again = measure(two)
    assert [row.model for row in again.rows] == ["small"]
    assert again.failed == []


def test_a_failing_target_does_not_outlast_the_time_budget(measure, monkeypatch) -> None:
    """Where targets fail one after the other, those beyond the budget are left all the same."""
    two = replace(SWEEP, models=["small", "smaller"])
    outcome = measure(two, progress=OutOfMemory(monkeypatch, "small", "smaller"), time_budget_s=1e-6)
    assert [target.model for target in outcome.failed] == ["small"]
    assert [target.model for target in outcome.left] == ["smaller"]


def test_weights_that_are_not_there_are_refused_before_anything_is_measured(folder, measure, tmp_path) -> None:
    """A folder without a model is wrong input, not a target that failed."""
    with pytest.raises(InputError, match=r"config\.json"):
        measure(SWEEP, weights=tmp_path / "nowhere")


def test_a_file_that_is_none_of_ours_is_not_overwritten(folder, tmp_path) -> None:
    """A file with other columns is refused by its path, and stays as it was."""
    path = tmp_path / "out" / "measured" / HERE.name / "small.csv"
    path.parent.mkdir(parents=True)
    path.write_text("seconds\n3\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"small\.csv"):
        profile(SWEEP, load_profiles(folder), HERE, tmp_path / "out")
    assert path.read_text(encoding="utf-8") == "seconds\n3\n"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(folder, tmp_path) -> None:
    """A file where the folder should be is told by its path, and no target is begun."""
    (tmp_path / "out").write_text("not a folder", encoding="utf-8")
    with pytest.raises(InputError, match=r"--out: .*out/measured/cpu-1core; cannot be written"):
        profile(SWEEP, load_profiles(folder), HERE, tmp_path / "out", progress=Untouched())


class Untouched(Progress):
    """Nothing may be measured."""

    def begin(self, total) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("line", "other", "named"),
    [
        ("protocol", '{"warmup_runs": 2, "runs": 10, "trimming": "none"}', r"warmup_runs: 1; .* measured with 2"),
        ("processor", '"MOS 6510"', "processor: .* measured with MOS 6510"),
        ("libraries", '{"torch": "0.1"}', "torch: .* measured with 0.1"),
    ],
)
def test_rows_of_other_circumstances_are_not_mixed(folder, measure, line, other, named) -> None:
    """A file says one protocol, processor and set of libraries for all its rows, so others go to another folder."""
    measure(SWEEP)
    files = [folder / "measured" / HERE.name / name for name in ("small.csv", "small.meta.yaml")]
    said = files[1].read_text(encoding="utf-8")
    files[1].write_text(re.sub(rf"^{line}: .*$", f"{line}: {other}", said, flags=re.MULTILINE), encoding="utf-8")
    before = [path.read_bytes() for path in files]
    with pytest.raises(InputError, match=named) as error:
        measure(replace(SWEEP, guidance=[False]), progress=Untouched())
    assert "Name another --out folder, or remove the file" in str(error.value)
    assert [path.read_bytes() for path in files] == before
    assert measure(SWEEP, progress=Untouched()).kept  # nothing is added, so nothing is mixed


def test_a_file_of_several_runs_names_their_commits_and_the_largest_ceilings(folder, measure) -> None:
    """A later run adds its commit, raises a ceiling where it saw a higher one, and lowers none."""
    measure(SWEEP)
    path = folder / "measured" / HERE.name / "small.meta.yaml"
    said = re.sub(r"^commit: .*\n|^ceilings: .*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ceilings = '{"matmul_fp32_flop_per_s": 9e99, "conv_fp32_flop_per_s": 1.0, "matmul_fp8_flop_per_s": 7.0}'
    path.write_text(f'{said}commit: "0000000"\nceilings: {ceilings}\n', encoding="utf-8")
    outcome = measure(replace(SWEEP, guidance=[False]))
    meta = load_profiles(folder).metas[f"{HERE.name}/small"]
    assert meta.commit.split(", ") == ["0000000", *filter(None, [commit()])]
    assert meta.ceilings["matmul_fp32_flop_per_s"] == 9e99
    assert meta.ceilings["matmul_fp8_flop_per_s"] == 7.0
    assert meta.ceilings["conv_fp32_flop_per_s"] == pytest.approx(outcome.ceilings["conv_fp32_flop_per_s"], rel=1e-3)


def test_rows_whose_meta_is_gone_are_not_added_to(folder, measure) -> None:
    """Nobody knows how they were measured."""
    known = load_profiles(folder)
    measure(SWEEP)
    (folder / "measured" / HERE.name / "small.meta.yaml").unlink()
    with pytest.raises(InputError, match=r"small\.meta\.yaml; holds no meta"):
        profile(replace(SWEEP, guidance=[False]), known, HERE, folder)


# ---- Ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_in_turn_get_a_row_each_and_the_step_none(folder, measure) -> None:
    """In loopback nobody ran two devices: each rank's compute is written, and no time of the step as a whole."""
    measure(LOOPBACK)
    rows = rows_of(folder)
    assert {(row.component, row.rank) for row in rows} == {(c, r) for c in ("step", "step_warmup") for r in (0, 1)}
    assert all("ranks=loopback" in row.options and row.comm_bytes for row in rows)
    assert all(row.peak_memory_bytes is None and row.energy_j is None for row in rows)


@TWO_CORES
def test_two_processes_give_the_step_its_time(folder, measure) -> None:
    """Real ranks give a row each and one for the step, which is no faster than any rank; bytes are as in loopback."""
    measure(replace(LOOPBACK, ranks="process"))
    measure(LOOPBACK)
    for component in ("step", "step_warmup"):
        rows = rows_of(folder, component=component)
        real = {row.rank: row for row in rows if "ranks=gloo" in row.options}
        in_turn = {row.rank: row for row in rows if "ranks=loopback" in row.options}
        assert set(real) == {None, 0, 1}
        assert set(in_turn) == {0, 1}
        assert real[None].seconds_median >= max(real[rank].seconds_median for rank in (0, 1))
        assert real[None].comm_bytes == max(row.comm_bytes for row in in_turn.values())


def test_a_step_is_as_slow_as_its_slowest_rank() -> None:
    """Each sample of the whole is the largest of the ranks'; energy adds up, memory is the largest."""
    ranks = [
        Measured(Timing((1.0, 5.0, 2.0), 100, 3.0), 7),
        Measured(Timing((4.0, 1.0, 2.5), 300, 4.0), 9),
    ]
    assert slowest(ranks) == Measured(Timing((4.0, 5.0, 2.5), 300, 7.0), 9)


def test_what_one_rank_does_not_know_the_step_does_not_know() -> None:
    """Memory and energy of the whole are unknown where any rank's are."""
    ranks = [Measured(Timing((1.0,), 100, 3.0), 7), Measured(Timing((1.0,)), 7)]
    assert slowest(ranks) == Measured(Timing((1.0,)), 7)


def test_a_round_of_two_steps_counts_half_for_each(folder, measure) -> None:
    """AsyncDiff's stride 2 gives ten samples of half a round, and the row says so."""
    sweep = replace(LOOPBACK, methods=["asyncdiff"], degrees=[3], options={"stride": 2}, components=["step"])
    measure(sweep)
    rows = rows_of(folder)
    assert {(row.rank, row.num_samples) for row in rows} == {(0, 10), (1, 10), (2, 10)}
    assert all("stride=2" in row.options and "half of a round" in row.notes for row in rows)
    cuts = {re.search(r"cut at units 0, (\d+), (\d+)$", row.notes).groups() for row in rows}
    assert len(cuts) == 1
    assert all(0 < int(first) < int(last) for first, last in cuts)


class Timed(Alone):
    """A rank whose steps take the seconds that they are told, and receive a byte a second."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.now_s = 2, 0.0

    def clock(self) -> float:
        return self.now_s

    def step(self, seconds) -> None:
        self.now_s += seconds
        self.traffic.count(0, seconds)


def test_the_steps_of_a_span_are_timed_and_no_others() -> None:
    """Of steps of 100 s, then four rounds of 3 s and 1 s, the span of the last three rounds has samples of 2 s."""
    group, span = Timed(), Span("step", start=4, laps=3, steps_a_lap=2)
    recorder = Recorder(group, [span])
    for step, seconds in enumerate([100, 100, 3, 1, 3, 1, 3, 1, 3, 1, 100]):
        group.step(seconds)
        recorder(step, None)
    assert recorder.measured == {"step": Measured(Timing((2.0, 2.0, 2.0)), 2)}


@pytest.mark.parametrize("replays", [False, True])
def test_graphs_that_are_replayed_have_the_peak_of_their_warm_up(monkeypatch, replays) -> None:
    """Replays allocate nothing, so their meter is made before the first untimed step, others after the last one."""
    made_after = []

    class Noted(Meter):
        def __init__(self, device, *, peak_from_now) -> None:
            made_after.append((steps_done, peak_from_now))

    monkeypatch.setattr(measurements, "DeviceMeter", Noted)
    steps_done, group = 0, Timed()
    group.size = 1
    recorder = Recorder(group, [Span("step", start=3, laps=2)], replays=replays)
    for step in range(6):
        steps_done = step + 1
        recorder(step, None)
    assert made_after[-1] == ((0, True) if replays else (3, False))
    assert set(recorder.measured) == {"step"}


def test_a_compiled_step_on_a_gpu_is_warmed_up_until_it_is_replayed(folder) -> None:
    """With two runs before the clock counts, the first timed one might record the graph: refused before anything."""
    sweep = replace(SWEEP, runtime="compiled", warmup_runs=2)
    with pytest.raises(InputError, match=r"--warmup-runs: 2; .*Use 3 or more"):
        profile(sweep, load_profiles(folder), LocalDevice("h200-sxm", "cuda", 1), folder)


@pytest.mark.parametrize("ranks", ["process", None])
def test_more_processes_than_cores_are_refused(measure, ranks) -> None:
    """Rows are not written for devices that are not there, nor other rows instead; the message offers loopback."""
    sweep = replace(LOOPBACK, models=["small"], sizes=[(2048, 64)], degrees=[64], ranks=ranks)
    with pytest.raises(InputError, match="loopback"):
        measure(sweep)


def test_under_torchrun_every_process_is_a_rank(measure, monkeypatch) -> None:
    """Processes that torchrun started cannot be one rank each of another degree."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="--degrees: 1, 2; torchrun started 4 processes"):
        measure(replace(SWEEP, methods=["single", "distrifusion"], degrees=[1, 2]))


def test_under_torchrun_no_clock_decides_what_is_left(measure, monkeypatch) -> None:
    """Each rank has a clock of its own, and ranks that leave different targets would wait for each other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match=r"--time-budget-s: 60\.0; under torchrun"):
        measure(SWEEP, time_budget_s=60.0)


def test_only_torchrun_makes_a_process_one_of_several(monkeypatch) -> None:
    """A RANK that something else left in the environment silences nobody; torchrun's second process keeps silent."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert is_first_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not is_first_process()
    monkeypatch.setenv("RANK", "0")
    assert is_first_process()


# ---- Grids ----------------------------------------------------------------------------------------------------------


def test_the_work_of_a_step_is_the_published_one() -> None:
    """SD 1.5 at 512 px: 803.3 GMAC for a guided step with attention products; two branches on two ranks halve it."""
    sweep = Sweep(models=["sd15"], methods=["single", "cfg_parallel"], degrees=[1, 2])
    targets, refused = find_targets(sweep, SHIPPED)
    assert [target.flop["step"] for target in targets] == pytest.approx([2 * 803.3e9, 803.3e9], rel=1e-3)
    assert refused == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": ["sd16"]}, "--models: 'sd16'.*Did you mean"),
        ({"methods": ["distrifuse"]}, "--methods: 'distrifuse'.*distrifusion"),
        ({"components": ["steps"]}, "--components: 'steps'"),
        ({"precision": "fp8"}, "--precision: 'fp8'"),
        ({"runtime": "tensorrt"}, "--runtime: 'tensorrt'"),
        ({"runs": 5}, "at least 10"),
        ({"sizes": [(500, 500)]}, "500"),
        ({"batch_sizes": [0]}, "--batch-sizes: 0"),
        ({"degrees": [2]}, "single runs at degree 1"),
        ({"methods": ["distrifusion"]}, "distrifusion runs from degree 2"),
        ({"methods": ["distrifusion"], "degrees": [3]}, "do not divide by 3"),
        ({"methods": ["cfg_parallel"], "degrees": [2], "guidance": [False]}, "guidance"),
        ({"runtime": "compiled", "methods": ["distrifusion"], "degrees": [2]}, "exchanges"),
        ({"options": {"partial": 0.5}}, "no method of the grid"),
        ({"methods": ["pcpp"], "degrees": [2], "options": {"warmup_steps": 9}}, "Leave it out"),
        ({"components": ["step_warmup"]}, "single has no such steps"),
    ],
)
def test_a_grid_that_cannot_be_measured_is_refused(wrong, message) -> None:
    """Unknown names, illegal degrees and options without a method stop a profile before it begins."""
    with pytest.raises(InputError, match=message):
        find_targets(replace(Sweep(models=["sd15"]), **wrong), SHIPPED)


def test_the_illegal_part_of_a_grid_is_named_and_the_rest_measured() -> None:
    """AsyncDiff has at most four components: of degrees 2 and 8 one is measured, and the other's rule is told."""
    targets, refused = find_targets(Sweep(models=["sd15"], methods=["asyncdiff"], degrees=[2, 8]), SHIPPED)
    assert [target.degree for target in targets] == [2]
    assert len(refused) == 1
    assert "asyncdiff x8" in refused[0].place


def test_an_option_goes_to_the_methods_that_have_it() -> None:
    """`partial` is PCPP's: its rows carry it and DistriFusion's do not; the number of synchronous steps in neither."""
    sweep = Sweep(models=["sd15"], methods=["distrifusion", "pcpp"], degrees=[2], options={"partial": 0.5})
    options = {target.method: target.options("gloo") for target in find_targets(sweep, SHIPPED)[0]}
    assert "partial=0.5" in options["pcpp"].split(";")
    assert "partial" not in options["distrifusion"]
    assert all("warmup_steps" not in said and said == ";".join(sorted(said.split(";"))) for said in options.values())


def test_models_with_one_autoencoder_measure_it_once() -> None:
    """SD 1.5 and BK-SDM-Tiny share text encoder and autoencoders, each of which is one target."""
    parts = ["text_encode", "vae_decode"]
    targets, _ = find_targets(Sweep(models=["sd15", "bk-sdm-tiny"], components=parts), SHIPPED)
    assert sorted(target.table for target in targets) == ["autoencoder-kl", "clip-l", "taesd"]


@pytest.mark.gpu
def test_a_gpu_profile_has_memory_and_a_share_of_its_ceiling(folder) -> None:
    """On CUDA a compiled bf16 step holds about what an eager one does, and is no faster than the fastest arithmetic."""
    from executors.profiling import find_device

    profiles = load_profiles(folder)
    sweep, here = replace(SWEEP, runtime="compiled", precision="bf16", warmup_runs=3), find_device(profiles)
    compiled, eager = (profile(replace(sweep, runtime=runtime), profiles, here, folder) for runtime in RUNTIMES[::-1])
    assert compiled.rows[0].peak_memory_bytes > 0.8 * eager.rows[0].peak_memory_bytes
    assert 0 < compiled.summary[0]["share_of_ceiling"] < 1


@pytest.mark.gpu
def test_a_gpu_profile_in_another_precision_has_its_own_ceilings(folder) -> None:
    """An fp16 step is compared with fp16 arithmetic; bf16 is measured beside it."""
    from executors.profiling import find_device

    profiles = load_profiles(folder)
    outcome = profile(replace(SWEEP, precision="fp16"), profiles, find_device(profiles), folder)
    assert {f"matmul_{name}_flop_per_s" for name in ("fp16", "bf16")} < set(outcome.ceilings)
    assert 0 < outcome.summary[0]["share_of_ceiling"] < 1
