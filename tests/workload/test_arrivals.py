from __future__ import annotations

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import ArrivalChunk, arrival_chunks, arrival_source, import_trace, mean_rate_per_s, stream
from hybridsd_sim.workload import arrivals as arrival_processes
from hybridsd_sim.workload import arrivals as workload
from hybridsd_sim.workload.arrivals import all_arrivals, arrivals

COLUMNS = ArrivalChunk.__slots__
PROCESSES = (
    {"process": "poisson", "rate_per_s": 0.5},
    {"process": "gamma", "rate_per_s": 0.7, "cv": 3.0},
    {"process": "constant", "rate_per_s": 0.25},
    {"process": "daily", "rate_per_s": 0.4, "peak_to_mean": 3.0},
    {"process": "gentd26", "time_scale": 0.02},
)
GENTD26 = """\
gmt_create,predict_status,num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora
2031-03-04 09:50:00,SUCCEED,1.0,30.0,M1,0
2031-03-04 10:01:30,FAILED,8.0,40.0,M7,2
2031-03-04 10:00:00,SUCCEED,1.0,40.0,M7,0
2031-03-04 10:01:30,PENDING,,,,0
"""


def scenario_of(horizon_s=600.0, seed=7, **classes):
    """A scenario of classes that differ in their arrivals only."""
    requests = {
        name: {
            "origin": "phones",
            "model": "sd15",
            "height_px": 512,
            "width_px": 512,
            "num_inference_steps": 25,
            "num_images": 2,
            "arrivals": arrivals,
        }
        for name, arrivals in classes.items()
    }
    edge = {"phones": {"device": "snapdragon-8-gen-3", "replicas": 10, "network": "wifi6"}}
    data = {"name": "test", "seed": seed, "horizon_s": horizon_s, "requests": requests, "edge": edge}
    return Scenario.model_validate_json(json.dumps(data))


def drawn(scenario, replication=0):
    """Everything drawn for a replication, as one array per column."""
    chunks = list(arrival_chunks(scenario, replication))
    return {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in COLUMNS}


def of_class(columns, index):
    """The draws of one class."""
    mine = columns["class_index"] == index
    return {name: values[mine] for name, values in columns.items() if name != "class_index"}


def same(one, other):
    """Whether two sets of draws are equal."""
    return all(np.array_equal(one[name], other[name]) for name in one)


def written(folder, text, name="trace.csv"):
    """A file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(call):
    """The problems of the `InputError` that a call raises, as text."""
    with pytest.raises(InputError) as caught:
        call()
    return [str(problem) for problem in caught.value.problems]


# --- streams


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.text(max_size=20))
def test_a_stream_is_told_by_seed_replication_and_name(seed, replication, name):
    """The same three give the same numbers; changing any of them gives others."""
    draw = stream(seed, replication, name).random(4)
    assert np.array_equal(draw, stream(seed, replication, name).random(4))
    for other in (
        stream(seed + 1, replication, name),
        stream(seed, replication + 1, name),
        stream(seed, 0, name + "x"),
    ):
        assert not np.array_equal(draw, other.random(4))


def test_streams_are_the_same_on_every_machine():
    """The first number of a stream never changes between versions, or saved runs could not be repeated."""
    assert stream(1, 0, "arrivals/api").random() == 0.5374491456862975


def test_a_class_draws_the_same_whichever_others_exist():
    """Adding, removing or changing a class shifts no draw of another."""
    kinds = dict(zip("abcde", PROCESSES, strict=True))
    everyone = drawn(scenario_of(**kinds))
    for index, (name, process) in enumerate(kinds.items()):
        assert same(of_class(everyone, index), of_class(drawn(scenario_of(**{name: process})), 0))
    changed = drawn(scenario_of(**{**kinds, "a": {"process": "poisson", "rate_per_s": 5.0}}))
    assert same(of_class(everyone, 1), of_class(changed, 1))


def test_replications_and_seeds_differ():
    """Replications are independent of each other, and so are seeds."""
    kind = {"process": "poisson", "rate_per_s": 1.0}
    times = [drawn(scenario_of(a=kind, seed=seed), number)["arrival_s"][:5] for seed in (1, 2) for number in (0, 1)]
    assert len({tuple(five) for five in times}) == 4


def test_the_attributes_of_a_request_are_independent_and_uniform():
    """Device, link rate and round trip are uniform in [0, 1) and do not follow one another."""
    columns = drawn(scenario_of(horizon_s=20_000, a={"process": "poisson", "rate_per_s": 1.0}))
    uniforms = np.array([columns[name] for name in ("device_u", "network_u", "rtt_u")])
    assert uniforms.min() >= 0.0
    assert uniforms.max() < 1.0
    assert np.allclose(uniforms.mean(axis=1), 0.5, atol=0.01)
    assert np.allclose(np.corrcoef(uniforms), np.eye(3), atol=0.03)


# --- merging


def chunk_of(times, index):
    """A chunk of one class; `rtt_u` numbers its arrivals."""
    columns = {name: np.zeros(len(times)) for name in COLUMNS}
    marks = {
        "arrival_s": np.array(times, float),
        "class_index": np.full(len(times), index),
        "rtt_u": np.arange(len(times)),
    }
    return ArrivalChunk(**{**columns, **marks})


@given(st.lists(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), max_size=5), max_size=5))
def test_merging_is_sorting(classes):
    """However the classes' arrivals are cut into blocks, the merged ones are all of them, sorted by time then class."""
    blocks = []
    for cuts in classes:
        times = iter(sorted(itertools.chain(*cuts)))
        blocks.append([list(itertools.islice(times, len(cut))) for cut in cuts])
    sources = [iter([chunk_of(block, index) for block in mine]) for index, mine in enumerate(blocks)]
    chunks = list(workload.merge(sources))
    assert all(len(chunk) for chunk in chunks)
    merged = [pair for chunk in chunks for pair in zip(chunk.arrival_s, chunk.class_index, strict=True)]
    assert merged == sorted((time, index) for index, mine in enumerate(blocks) for block in mine for time in block)


def test_simultaneous_arrivals_of_a_class_keep_their_order():
    """Equal times across a block's border stay in the order in which they were drawn."""
    sources = [iter([chunk_of([1, 1], 0), chunk_of([1, 1, 2], 0)]), iter([chunk_of([1, 1, 1], 1)])]
    chunks = list(workload.merge(sources))
    order = [(c, r) for chunk in chunks for c, r in zip(chunk.class_index, chunk.rtt_u, strict=True)]
    assert order == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 2)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PROCESSES), min_size=1, max_size=4), st.sampled_from((64, 8192)), st.integers(0, 99))
def test_merged_arrivals_are_the_sorted_arrivals_of_the_classes(monkeypatch, kinds, size, seed):
    """Real processes, merged: each class's own arrivals, all in time order and before the horizon, in full."""
    names = [f"c{index}" for index in range(len(kinds))]
    monkeypatch.setattr(workload, "CHUNK", size)
    merged = drawn(scenario_of(horizon_s=3000, seed=seed, **dict(zip(names, kinds, strict=True))))
    assert (np.diff(merged["arrival_s"]) >= 0).all()
    assert merged["arrival_s"][0] >= 0
    assert merged["arrival_s"][-1] < 3000
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        assert same(of_class(merged, index), of_class(drawn(scenario_of(horizon_s=3000, seed=seed, **{name: kind})), 0))


@given(st.sampled_from(PROCESSES), st.integers(1, 40), st.integers(1, 400), st.integers(0, 99))
def test_how_many_are_drawn_at_a_time_does_not_matter(kind, small, large, seed):
    """A process gives the same times in blocks of any size."""
    spec = scenario_of(a=kind).requests["a"].arrivals
    found = []
    for size in (small, large):
        blocks = arrival_processes.arrival_blocks(spec, partial(stream, seed, 0), size)
        times: list[float] = []
        while len(times) < 100:
            times.extend(next(blocks)[0])
        found.append(times[:100])
    assert found[0] == found[1]


def test_arrivals_are_lazy_and_chunks_bounded():
    """The first chunks of a horizon of thirty thousand years come at once, and none is much larger than CHUNK."""
    kinds = {name: {"process": "poisson", "rate_per_s": rate} for name, rate in (("a", 100.0), ("b", 1.0), ("c", 1e-9))}
    chunks = list(itertools.islice(arrival_chunks(scenario_of(horizon_s=1e12, **kinds), 0), 20))
    assert max(map(len, chunks)) <= 2 * workload.CHUNK
    assert sum(map(len, chunks)) > 10 * workload.CHUNK / 3


def test_arrivals_are_the_chunks_one_by_one():
    """`arrivals` yields (arrival_s, class_index) of the same arrivals, as plain numbers."""
    scenario = scenario_of(a=PROCESSES[0], b=PROCESSES[1])
    columns = drawn(scenario)
    pairs = list(arrivals(scenario, 0))
    assert pairs == list(zip(columns["arrival_s"], columns["class_index"], strict=True))
    assert [type(value) for value in pairs[0]] == [float, int]


def test_nobody_arriving_gives_no_chunk():
    """A horizon before the first arrival gives no chunk at all."""
    assert not list(arrival_chunks(scenario_of(horizon_s=1e-9, a=PROCESSES[0], b=PROCESSES[2]), 0))


# --- processes


@pytest.mark.parametrize(("cv", "process"), [(1.0, "poisson"), (0.0, "constant"), (0.5, "gamma"), (3.0, "gamma")])
def test_rate_and_variation_are_those_asked_for(cv, process):
    """Gaps have the mean 1/rate and the CV of their process: 1 for Poisson, 0 for constant, the given one for gamma."""
    kind = {"process": process, "rate_per_s": 2.0, "cv": cv or 1.0}
    gaps = np.diff(drawn(scenario_of(horizon_s=50_000, a=kind))["arrival_s"])
    assert gaps.mean() == pytest.approx(0.5, rel=4 * max(cv, 0.01) / math.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_bursty_arrivals_do_not_crowd_the_start():
    """Time 0 is no renewal: short horizons too have rate times horizon arrivals on average."""
    scenario = scenario_of(horizon_s=20.0, a={"process": "gamma", "rate_per_s": 1.0, "cv": 3.0})
    counts = [len(list(arrivals(scenario, replication))) for replication in range(1500)]
    assert np.mean(counts) == pytest.approx(20.0, abs=4 * np.std(counts) / math.sqrt(len(counts)))


@pytest.mark.parametrize("peak_to_mean", [1.0, 1.5, 2.0, 3.0, 24.0])
def test_a_day_has_its_mean_and_peak(peak_to_mean):
    """The day-night cycle has mean 1 and the peak asked for, never turns negative, and starts rising past its mean."""
    profile = arrival_processes.daily_profile(peak_to_mean)
    assert profile.mean() == pytest.approx(1.0)
    assert profile.max() == pytest.approx(peak_to_mean, rel=0.001)
    assert profile.min() >= 0.0
    if peak_to_mean > 1.0:
        assert profile[-1] < 1.0 <= profile[0] < profile[1]


def test_daily_arrivals_follow_the_day():
    """Hours of many simulated days have the requests of the cycle's rate, within Poisson error."""
    times = drawn(scenario_of(horizon_s=20 * 86_400, a={"process": "daily", "rate_per_s": 0.1, "peak_to_mean": 4.0}))
    hours = np.bincount((times["arrival_s"] % 86_400 // 3600).astype(int), minlength=24)
    expected = arrival_processes.daily_profile(4.0).reshape(24, 60).mean(axis=1) * 0.1 * 3600 * 20
    assert (np.abs(hours - expected) < 5 * np.sqrt(expected) + 5).all()


def test_a_flat_day_is_poisson():
    """With peak_to_mean 1 the daily process draws the Poisson process itself."""
    daily, poisson = (
        drawn(scenario_of(a={**flat, "rate_per_s": 1.0}))["arrival_s"]
        for flat in ({"process": "daily", "peak_to_mean": 1.0}, {"process": "poisson"})
    )
    assert np.allclose(daily, poisson)


def test_a_class_without_a_mix_asks_for_its_own():
    """Processes with a rate leave steps, images and model to the class."""
    columns = drawn(scenario_of(a=PROCESSES[0]))
    assert set(columns["num_inference_steps"]) == {25}
    assert set(columns["num_images"]) == {2}
    assert set(columns["base_model"]) == {0}


# --- traces that are played


def test_a_trace_plays_as_it_was(tmp_path):
    """Times count from the first request; steps, images and base model (by rank) are the trace's, else the class's."""
    path = written(tmp_path, GENTD26)
    columns = drawn(scenario_of(horizon_s=1e5, a={"process": "gentd26", "path": str(path)}))
    assert columns["arrival_s"].tolist() == [0.0, 600.0, 690.0, 690.0]
    assert columns["num_inference_steps"].tolist() == [30, 40, 40, 25]
    assert columns["num_images"].tolist() == [1, 1, 8, 2]
    assert columns["base_model"].tolist() == [1, 0, 0, 0]


def test_time_scale_and_rate_set_the_pace(tmp_path):
    """`time_scale` multiplies every gap; `rate_per_s` chooses it so that the trace has that mean rate."""
    path = str(written(tmp_path, "arrival_s\n" + "\n".join(map(str, range(0, 110, 10)))))
    half = drawn(scenario_of(a={"process": "trace", "path": path, "time_scale": 0.5}))["arrival_s"]
    fast = drawn(scenario_of(a={"process": "trace", "path": path, "rate_per_s": 2.0}))["arrival_s"]
    assert half.tolist() == [5.0 * index for index in range(11)]
    assert fast.tolist() == [0.5 * index for index in range(11)]


def test_an_imported_trace_plays_like_the_raw_one(tmp_path):
    """What `write_csv` wrote plays the same as the file it was read from."""
    raw = written(tmp_path, GENTD26)
    import_trace(raw).write_csv(tmp_path / "imported.csv")
    plays = [
        drawn(scenario_of(horizon_s=1e5, a={"process": "gentd26", "path": str(path)}))
        for path in (raw, tmp_path / "imported.csv")
    ]
    assert same(*plays)


def test_a_changed_file_is_read_again(tmp_path):
    """A trace is remembered only as long as its file stays the same."""
    path = written(tmp_path, "arrival_s\n0\n")
    scenario = scenario_of(a={"process": "trace", "path": str(path)})
    assert len(list(arrivals(scenario, 0))) == 1
    written(tmp_path, "arrival_s\n0\n1\n2\n")
    assert len(list(arrivals(scenario, 0))) == 3


def test_the_source_of_arrivals_is_said(tmp_path):
    """A report can say whether a real trace or its stand-in was played, and at which mean rate."""
    path = str(written(tmp_path, "timestamp_ms,input_length,output_length\n0,6758,500\n3000,7322,490"))
    specs = scenario_of(a={"process": "gentd26"}, b={"process": "trace", "path": path}, c=PROCESSES[0]).requests
    generator, trace, poisson = (arrival_source(spec.arrivals) for spec in specs.values())
    assert "generator" in generator
    assert trace.startswith("the Mooncake trace trace.csv, 2 requests")
    assert poisson == "poisson, 0.5 requests a second"
    assert [round(mean_rate_per_s(spec.arrivals), 4) for spec in specs.values()] == [0.0135, 0.3333, 0.5]


def test_the_generator_keeps_its_shape_at_any_pace():
    """`rate_per_s` sets the long-run mean rate by scaling every gap, days included."""
    native, scaled = (
        drawn(scenario_of(horizon_s=horizon_s, a=kind))["arrival_s"]
        for kind, horizon_s in (
            ({"process": "gentd26"}, 40 * 86_400.0),
            ({"process": "gentd26", "rate_per_s": 2.0}, 40 * 86_400.0 / (2.0 * 74.17)),
        )
    )
    assert np.allclose(native / (2.0 * 74.17), scaled)
    assert len(scaled) / (40 * 86_400.0 / (2.0 * 74.17)) == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("horizon_s", [3000.0, 1e-9])
def test_all_arrivals_are_the_chunks_in_one_piece(horizon_s):
    """Column by column, of the same kinds of numbers; nobody is no error."""
    scenario = scenario_of(horizon_s=horizon_s, **{f"c{i}": arrivals for i, arrivals in enumerate(PROCESSES)})
    chunks, whole = list(arrival_chunks(scenario, 1)), all_arrivals(scenario, 1)

    assert len(whole) == sum(len(chunk) for chunk in chunks)
    for name in COLUMNS if chunks else ():
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(chunk, name) for chunk in chunks]))
    assert [getattr(whole, name).dtype for name in COLUMNS] == [
        np.float64, np.int16, np.float64, np.float64, np.float64, np.int16, np.int16, np.int16
    ]  # fmt: skip


# --- arrivals that cannot be drawn


def test_all_problems_of_all_classes_are_told_at_once(tmp_path):
    """`arrival_chunks` refuses at the call, naming every class's key, and not only when the first chunk is drawn."""
    plain = str(written(tmp_path, "arrival_s\n3\n3\n"))
    good = {"rate_per_s": 1.0, "cv": 1.0, "peak_to_mean": 2.0, "path": None, "time_scale": 1.0}
    bad = [
        {"process": "poisson", "rate_per_s": None},
        {"process": "constant", "rate_per_s": 0.0},
        {"process": "gamma", "cv": 1e6},
        {"process": "daily", "peak_to_mean": 0.5},
        {"process": "trace", "rate_per_s": None},
        {"process": "gentd26", "time_scale": 0.1},
        {"process": "trace", "path": plain},
        {"process": "gentd26", "path": plain, "rate_per_s": None},
        {"process": "trace", "path": "nowhere.csv", "rate_per_s": None},
    ]
    requests = {f"c{i}": SimpleNamespace(arrivals=SimpleNamespace(**{**good, **spec})) for i, spec in enumerate(bad)}
    found = problems_of(lambda: arrival_chunks(SimpleNamespace(requests=requests, horizon_s=1.0, seed=1), 0))
    keys = ["rate_per_s", "rate_per_s", "cv", "peak_to_mean", "path", "time_scale", "rate_per_s", "path"]
    assert [text.split(":")[0] for text in found] == [
        *(f"requests.c{index}.arrivals.{key}" for index, key in enumerate(keys)),
        "nowhere.csv",
    ]
