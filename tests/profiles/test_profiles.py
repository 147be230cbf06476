"""The data room: what is shipped, what it promises, and what it says of bad files."""

import csv
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError, MissingDataError
from hybridsd_sim.files import data_folder
from hybridsd_sim.perf import total_work, unet_layers, unet_params
from hybridsd_sim.profiles import CostRow, Quantiles, load_profiles

MODELS = "sd14 sd15 sd21 sdxl bk-sdm-base bk-sdm-small bk-sdm-tiny hybrid-sd-224m koala-700m ssd-1b segmind-vega"
CLOUD_GPUS = "t4 l4 a10g v100-sxm2-32gb a100-sxm-80gb a100-pcie-80gb l40s h100-sxm h200-sxm"
DESKTOP_GPUS = "rtx-a5000 rtx-3090 rtx-2080ti rtx-4090"
INTERCONNECTS = "nvlink3-switch nvlink4-switch nvlink-bridge pcie3 pcie4 pcie5"
EDGE_DEVICES = (
    "snapdragon-8-elite-gen-5 snapdragon-8-elite snapdragon-8-gen-3 snapdragon-8-gen-2 snapdragon-7-gen-4 "
    "snapdragon-x-elite snapdragon-x2-elite iphone-12-pro-max iphone-13-pro-max iphone-14-pro-max iphone-15-pro-max "
    "ipad-pro-m1 ipad-pro-m2 macbook-pro-m1-max jetson-agx-orin rtx-3060 rtx-4080 rtx-4090 core-i7-12700 cpu-1core "
    "cpu-2core"
)
NETWORKS = "lte 5g wifi5 wifi6 ethernet"
COST_HEADER = [name for name in CostRow.model_fields if name not in {"kind", "source", "source_date", "notes"}]
COST_HEADER += ["kind", "source", "source_date", "notes"]
GOOD = {
    "device": "rtx-4090", "runtime": "eager", "precision": "fp16", "model": "sd15", "component": "step",
    "height_px": "512", "width_px": "512", "batch_size": "1", "guidance": "true", "method": "single", "degree": "1",
    "seconds_median": "0.02", "seconds_p05": "0.019", "seconds_p95": "0.022", "num_samples": "20",
    "kind": "measured", "source": "a test", "source_date": "2026-11-21",
}  # fmt: skip
META = """\
device: rtx-4090
date: 2026-11-21
libraries: {torch: 2.9.0}
protocol: {warmup_runs: 3, runs: 20}
"""


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped folder that a test may spoil."""
    return shutil.copytree(data_folder("profiles"), tmp_path / "profiles")


def write_costs(path, *rows):
    """Write cost rows, each given by what differs from a good one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, COST_HEADER, lineterminator="\n")
        lines.writeheader()
        lines.writerows(GOOD | row for row in rows)


def write_measured(root, *rows, meta=META):
    """Write a measured file with its meta."""
    path = root / "measured" / "rtx-4090" / "sd15.csv"
    write_costs(path, *rows)
    path.with_suffix(".meta.yaml").write_text(meta, encoding="utf-8")
    return path


def spoil(path, old, new):
    """Replace the first occurrence of a text in a file, and give the line it stood on."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


def places(error):
    """Where the problems of an error stand, as file:line."""
    return [problem.place.rsplit("/", 1)[-1].split(": ")[0] for problem in error.value.problems]


def every_row(profiles):
    """All the rows of all the tables."""
    tables = (profiles.gpus, profiles.edge_devices, profiles.models, profiles.components, profiles.interconnects)
    for table in (*tables, profiles.networks, profiles.runtimes):
        yield from table.values()
    yield from (*profiles.prices, *profiles.quality, *profiles.costs)


def test_every_row_has_a_source_a_date_and_a_kind(profiles):
    """No number is without its label."""
    for row in every_row(profiles):
        assert row.source.strip()
        assert row.source_date.strip()
        assert row.kind in {"measured", "quoted", "modelled"}


def test_modelled_rows_say_their_rule(profiles):
    """A modelled row names its rule, or the fields that follow one, in its notes or its source."""
    for row in every_row(profiles):
        said = f"{row.source}; {row.notes}"
        assert row.kind != "modelled" or any(word in said for word in ("rule", "modelled", "end to end"))


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("models", MODELS),
        ("gpus", f"{CLOUD_GPUS} {DESKTOP_GPUS}"),
        ("interconnects", INTERCONNECTS),
        ("edge_devices", EDGE_DEVICES),
        ("networks", NETWORKS),
        ("components", "autoencoder-kl taesd clip-l openclip-h openclip-bigg"),
    ],
)
def test_every_promised_name_is_there(profiles, table, names):
    """The names that the command line promises exist."""
    assert set(names.split()) <= set(getattr(profiles, table))


def test_each_gpu_and_purchase_has_one_default_price(profiles):
    """Asking for a price without a provider is never ambiguous."""
    keys = {(row.item, row.purchase) for row in profiles.prices}
    for item, purchase in keys:
        assert sum(row.default for row in profiles.prices if (row.item, row.purchase) == (item, purchase)) == 1


def test_prices_lie_in_their_ranges_and_name_their_units(profiles):
    """Low <= price <= high, and the unit is that of the item."""
    units = {"gpu": "usd_per_gpu_hour", "egress": "usd_per_gib", "electricity": "usd_per_kwh"}
    for row in profiles.prices:
        assert row.unit == units[row.item.split(":")[0]]
        assert (row.low or row.usd) <= row.usd <= (row.high or row.usd)


def test_spot_is_not_dearer_than_on_demand(profiles):
    """At the default provider a spot GPU costs at most the on-demand one."""
    for name in profiles.gpus:
        spot, full = profiles.gpu_price(name, "spot"), profiles.gpu_price(name)
        assert spot is None or (full is not None and spot.usd <= full.usd)


def test_an_unsold_gpu_has_no_price(profiles):
    """A price that nobody knows is None, never 0."""
    assert profiles.gpu_price("rtx-2080ti") is None


def test_a_named_provider_is_taken(profiles):
    """`provider` beats the default; a provider who does not sell it gives None."""
    assert profiles.gpu_price("h100-sxm", provider="Lambda").usd == 3.78
    assert profiles.gpu_price("h100-sxm").provider == "AWS"
    assert profiles.gpu_price("l40s", provider="Lambda") is None


def test_egress_and_electricity(profiles):
    """AWS's 0.09 USD a GB is per 1e9 bytes; US households pay 0.1598 USD a kWh."""
    assert profiles.egress_usd_per_gib() == pytest.approx(0.09 * 2**30 / 1e9, rel=1e-5)
    assert profiles.usd("electricity") == 0.1598
    with pytest.raises(MissingDataError, match="AWS"):
        profiles.egress_usd_per_gib("AWSS")


def test_configs_give_the_published_parameters(profiles):
    """Counting the config of every model gives the parameters that the catalogue states."""
    for model in profiles.models.values():
        assert unet_params(model.config) == model.params


@pytest.mark.parametrize(
    ("name", "gmacs"), [("sd14", 677.2), ("sd21", 1521), ("sdxl", 5977), ("hybrid-sd-224m", 302.56)]
)
def test_layers_give_the_published_work(profiles, name, gmacs):
    """MACs of a guided step at native size without attention products, as AsyncDiff and Hybrid SD print them."""
    model = profiles.model(name)
    total = total_work(unet_layers(model.config, model.native_px, model.native_px))
    assert 2 * total.macs_without_attention / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_text_embeddings_have_the_size_of_their_latent_space(profiles):
    """77 tokens at the cross-attention width in fp16, plus SDXL's pooled vector."""
    for model in profiles.models.values():
        pooled = 1280 if model.latent_space == "sdxl" else 0
        assert model.text_embedding_bytes_fp16 == 2 * (77 * model.cross_attention_dim + pooled)


@pytest.mark.parametrize(("px", "gflop"), [(512, 2514.52), (768, 5754.3), (1024, 10470.39)])
def test_vae_flops_grow_as_counted(profiles, px, gflop):
    """Scaling the 512 px count gives what counting at other sizes gives (torch.utils.flop_counter)."""
    assert profiles.component("autoencoder-kl").flop(px, px) / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_text_flops_do_not_depend_on_the_image(profiles):
    """A prompt costs the same at every size."""
    encoder = profiles.component("clip-l")
    assert encoder.flop(512, 512) == encoder.flop(2048, 1024) == pytest.approx(13.3e9)


def test_links_and_powers_lie_in_their_ranges(profiles):
    """Low <= middle <= high for every interconnect and every power; an unknown power has no kind and a reason."""
    for link in profiles.interconnects.values():
        assert link.bandwidth_low <= link.bandwidth_bytes_per_s <= link.bandwidth_high
    for device in profiles.edge_devices.values():
        assert (device.power_w is None) == (device.power_kind is None)
        if device.power_w is not None:
            assert (device.power_low_w or 0) <= device.power_w <= (device.power_high_w or math.inf)


def test_a_card_in_both_catalogues_is_one_card(profiles):
    """A GPU that is also an edge device has the same memory and peak in both tables."""
    for name in set(profiles.gpus) & set(profiles.edge_devices):
        gpu, edge = profiles.gpu(name), profiles.edge_device(name)
        assert (gpu.memory_gib, gpu.fp16_flop_per_s) == (edge.memory_gib, edge.fp16_flop_per_s)
        assert profiles.device(name) is gpu


def test_quantiles_of_the_networks_rise(profiles):
    """No network is faster at a lower quantile."""
    for network in profiles.networks.values():
        for quantiles in (network.down_bytes_per_s, network.up_bytes_per_s, network.rtt_s):
            assert all(low <= high for low, high in pairwise(quantiles.points))


@given(
    points=st.lists(st.floats(1e-6, 1e9), min_size=5, max_size=5).map(sorted),
    draws=st.lists(st.floats(0, 1), min_size=2, max_size=20).map(sorted),
)
def test_a_quantile_function_rises_within_its_points(points, draws):
    """`at` is monotone, clipped to [p5, p95], exact at the points, and the same one by one and in bulk."""
    quantiles = Quantiles(**dict(zip(("p5", "p25", "p50", "p75", "p95"), points, strict=True)))
    values = [quantiles.at(draw) for draw in draws]
    slack = 1 + 1e-9
    assert all(low <= high * slack for low, high in pairwise(values))
    assert all(points[0] <= value * slack and value <= points[-1] * slack for value in values)
    assert [quantiles.at(u) for u in (0.0, 0.05, 0.5, 0.95, 1.0)] == pytest.approx(
        [points[0], points[0], points[2], points[4], points[4]]
    )
    assert quantiles.median == points[2]
    assert quantiles.at_many(np.array(draws)) == pytest.approx(values)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ({"device": "iphone-12-pro-max", "model": "sd21"}, 1 / 1.45),
        ({"device": "iphone-14-pro-max", "model": "sdxl"}, 1 / 0.83),
        ({"device": "snapdragon-8-elite", "model": "sd15", "runtime": "qnn"}, 0.060021),
        ({"device": "rtx-a5000", "model": "sd21", "degree": 1}, 5.51 / 50),
        ({"device": "rtx-a5000", "model": "sdxl", "degree": 4, "warmup_steps": "3", "stride": "2"}, 3.65 / 50),
        ({"device": "a100-sxm-80gb", "runtime": "cudagraph", "height_px": 2048, "degree": 1}, 23.7 / 50),
        ({"device": "a100-sxm-80gb", "height_px": 2048, "degree": 8, "warmup_steps": "5"}, 4.81 / 50),
        ({"device": "v100-sxm2-32gb", "model": "bk-sdm-tiny"}, 2.87 / 25),
        ({"device": "jetson-agx-orin", "model": "sdxl"}, 9.944 / 20),
        ({"device": "rtx-4090", "model": "sdxl", "runtime": "onediff"}, 0.0677),
        ({"device": "*", "component": "model_load"}, 22.718),
    ],
)
def test_published_figures_are_intact(profiles, asked, seconds):
    """Figures are as printed by Apple, Qualcomm, AsyncDiff, DistriFusion, ObCLIP, MLPerf, OneDiff and GenTD26."""
    wanted = {key: value for key, value in asked.items() if key in CostRow.model_fields}
    options = {f"{key}={value}" for key, value in asked.items() if key not in wanted}
    rows = [row for row in profiles.cost_rows(**wanted) if options <= set(row.options.split(";"))]
    assert any(row.seconds_median == pytest.approx(seconds, rel=2e-4) for row in rows)


@pytest.mark.parametrize(
    ("table", "small", "step", "clip", "fid"),
    [
        ("hybrid-sd H1", "hybrid-sd-224m", 10, 0.2887, 13.75),
        ("hybrid-sd H3", "bk-sdm-tiny", 5, 0.28, 15.92),
        ("obclip H8", "bk-sdm-small", 10, 0.2946, 15.65),
        ("obclip H8", "koala-700m", 5, 0.3337, 32.42),
    ],
)
def test_published_switch_quality_is_intact(profiles, table, small, step, clip, fid):
    """Scores by switch step as Hybrid SD and ObCLIP print them."""
    rows = [row for row in profiles.quality if (row.table, row.small_model, row.switch_step) == (table, small, step)]
    assert [(row.clip, row.fid) for row in rows] == [(clip, fid)]


def test_every_quality_table_has_its_base(profiles):
    """Each table that scores a pair or a method also scores the large model alone, by itself or in its study."""
    alone = {
        (row.table.split()[0], row.large_model)
        for row in profiles.quality
        if row.small_model is None and row.degree == 1 and row.switch_step == row.num_inference_steps
    }
    for row in profiles.quality:
        assert (row.table.split()[0], row.large_model) in alone


def test_asyncdiff_rows_obey_its_degree_rule(profiles):
    """N components at stride s take N + s - 1 GPUs; published runs use 2 to 4 of them."""
    for row in profiles.cost_rows(method="asyncdiff"):
        options = dict(item.split("=") for item in row.options.split(";"))
        assert 2 <= row.degree - int(options["stride"]) + 1 <= 4


def test_rows_of_several_gpus_name_the_steps_they_average(profiles):
    """A published average over a run says how many steps the run had; the executors time single steps."""
    for row in profiles.costs:
        if row.kind != "measured":
            assert (row.degree > 1) == ("num_inference_steps=" in row.options)
        assert row.options == ";".join(sorted(row.options.split(";")))


def test_end_to_end_rows_are_not_called_quoted(profiles):
    """A step time that holds the text encoder and the VAE is modelled."""
    for row in profiles.costs:
        assert not row.notes.startswith("end to end") or row.kind == "modelled"


def test_a_step_row_is_found_for_the_very_call(profiles):
    """The row has the device, runtime, size and latents that were asked for."""
    row = profiles.step_row("rtx-4090", "onediff", "sdxl", (1024, 1024), latents=2)
    assert (row.device, row.runtime, row.model, row.latents) == ("rtx-4090", "onediff", "sdxl", 2)
    assert profiles.step_row("rtx-4090", "onediff", "sdxl", (1024, 768), latents=2) is None


def test_models_of_one_network_share_rows(profiles):
    """SD 1.4 is timed by SD 1.5's rows, and no pruned model is."""
    asked = ("a100-sxm-80gb", "eager")
    assert profiles.step_row(*asked, "sd14", (512, 512), latents=2) == profiles.step_row(
        *asked, "sd15", (512, 512), latents=2
    )
    assert profiles.step_row(*asked, "bk-sdm-tiny", (512, 512), latents=2) is None


def test_a_runtime_of_fixed_batch_gives_the_full_call(profiles):
    """Qualcomm's calls hold one latent, so a guided step finds the row of one call."""
    row = profiles.step_row("snapdragon-8-elite", "qnn", "sd15", (512, 512), latents=2)
    assert row.latents == 1


def test_the_default_source_is_the_best_and_newest(profiles):
    """Measured, quoted, modelled; then the newest; `prefer` overrules, best first."""
    asked = ("a100-sxm-80gb", "eager", "sd15", (512, 512))
    assert "onediff" in profiles.step_row(*asked, latents=2).source
    assert "torch2.0.md" in profiles.step_row(*asked, latents=2, prefer=("torch2.0.md", "onediff")).source
    assert "DiffServe" in profiles.step_row(*asked, latents=2, prefer=("DiffServe", "torch2.0.md")).source
    assert profiles.step_row(*asked, latents=2, precision="fp64") is None


def test_a_component_row_is_that_of_its_size(profiles):
    """A VAE row needs the size; a text encoder row does not."""
    vae, clip = profiles.component("autoencoder-kl"), profiles.component("clip-l")
    assert profiles.component_row("snapdragon-8-elite", "qnn", vae, (512, 512)).seconds_median < 0.18
    assert profiles.component_row("snapdragon-8-elite", "qnn", vae, (768, 768)) is None
    assert profiles.component_row("snapdragon-8-elite", "qnn", clip, (768, 768)).seconds_median == 0.001754


def test_a_model_load_is_that_of_the_model(profiles):
    """A device with rows of several models gives each its own; a model without one takes the row for any."""
    large, small = (profiles.model_load("cpu-2core", model) for model in ("sd14", "bk-sdm-tiny"))
    assert (large.model, small.model) == ("sd15", "bk-sdm-tiny")
    assert large.seconds_median > small.seconds_median
    assert profiles.model_load("cpu-2core", "sdxl").model == "*"
    assert profiles.model_load("cpu-2core").model == "*"


def test_a_model_load_falls_back_to_any_device(profiles):
    """The production trace's load time serves every device that has none of its own."""
    assert profiles.model_load("l40s").seconds_p95 == 45.446


def test_own_rows_stand_in_front(profiles):
    """A user's measurement is used before everything else, and changes the digest."""
    row = CostRow.model_validate(GOOD | {"seconds_median": "0.0205", "model": "sd15"}, strict=False)
    mine = profiles.with_costs([row])
    assert mine.step_row("rtx-4090", "eager", "sd14", (512, 512), latents=2) is row
    assert mine.digest != profiles.digest
    assert len(mine.costs) == len(profiles.costs) + 1


@pytest.mark.parametrize(
    ("method", "name", "nearest"),
    [
        ("gpu", "a100-sxm-80g", "a100-sxm-80gb"),
        ("edge_device", "iphone-14-max", "iphone-14-pro-max"),
        ("model", "sd1.5", "sd15"),
        ("component", "tae", "taesd"),
        ("interconnect", "pcie6", "pcie5"),
        ("network", "wifi7", "wifi6"),
        ("runtime", "tensor-rt", "tensorrt"),
        ("device", "snapdragon-8-elit", "snapdragon-8-elite"),
        ("peak_flop_per_s", "h100", "h100-sxm"),
    ],
)
def test_an_unknown_name_gives_the_nearest(profiles, method, name, nearest):
    """The error quotes the name and offers those that come close."""
    with pytest.raises(MissingDataError) as error:
        getattr(profiles, method)(name)
    assert repr(name) in str(error.value)
    assert nearest in str(error.value)


def test_nearest_names_rows_of_the_device_and_model(profiles):
    """The sentence for messages begins with the device's own rows of the model."""
    assert "sd21 768x768 on a100-sxm-80gb" in profiles.nearest("a100-sxm-80gb", "sd21").split(", ")[0]
    assert "on v100-sxm2-32gb" in profiles.nearest("h200-sxm", "bk-sdm-base")
    assert profiles.nearest("abacus", "dall-e") == "No step row has abacus or dall-e."


def test_the_digest_is_that_of_the_contents(profiles, folder):
    """A copy elsewhere has the same digest, also with other line ends; another price has another."""
    assert load_profiles(folder).digest == profiles.digest
    path = folder / "catalog" / "prices.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_profiles(folder).digest == profiles.digest
    spoil(path, "1.861", "1.862")
    assert load_profiles(folder).digest != profiles.digest


def test_measured_rows_join_the_shipped_ones(profiles, tmp_path):
    """A folder with measured rows alone is laid over the shipped one, and its rows win."""
    write_measured(tmp_path, {}, {"height_px": "640", "width_px": "640"})
    mine = load_profiles(tmp_path)
    row = mine.step_row("rtx-4090", "eager", "sd15", (512, 512), latents=2)
    assert (row.kind, row.seconds_median, row.guidance) == ("measured", 0.02, True)
    assert mine.step_row("rtx-4090", "eager", "sd15", (640, 640), latents=2)
    assert mine.metas["rtx-4090/sd15"].protocol.runs == 20
    assert mine.metas["rtx-4090/sd15"].libraries == {"torch": "2.9.0"}


@pytest.mark.parametrize("dates", [("2026-11-21", "2025-01-01"), ("2025-01-01", "2026-11-21")])
def test_a_folder_on_top_replaces_what_timed_the_same(profiles, tmp_path, dates):
    """The row of the last folder holds, whatever its date, and rows that timed something else stay."""
    for name, seconds, date in zip("ab", ("0.01", "0.03"), dates, strict=True):
        row = {"seconds_median": seconds, "seconds_p05": "", "seconds_p95": "", "source_date": date}
        write_measured(tmp_path / name, row)
    both = load_profiles([tmp_path / "a", tmp_path / "b"])
    rows = both.cost_rows(device="rtx-4090", model="sd15", runtime="eager", height_px=512, batch_size=1, guidance=True)
    assert [row.seconds_median for row in rows if row.precision == "fp16"] == [0.03]
    untouched = [row for row in profiles.costs if row.device != "rtx-4090"]
    assert [row for row in both.costs if row.device != "rtx-4090"] == untouched


def test_a_quoted_row_on_top_leaves_a_measured_one(tmp_path):
    """What is better known is not replaced."""
    write_measured(tmp_path / "mine", {})
    write_costs(tmp_path / "theirs" / "quoted" / "rumours.csv", {"kind": "quoted", "seconds_median": "0.021"})
    both = load_profiles([tmp_path / "mine", tmp_path / "theirs"])
    assert both.step_row("rtx-4090", "eager", "sd15", (512, 512), latents=2).seconds_median == 0.02


def test_two_catalogues_contradict_each_other(profiles):
    """Of several folders one may have a catalogue; none given means the shipped one."""
    assert load_profiles([]).digest == profiles.digest
    shipped = data_folder("profiles")
    with pytest.raises(InputError, match="only one of the folders"):
        load_profiles([shipped, shipped])


def test_all_problems_come_at_once_with_file_and_line(folder):
    """Problems of several files and lines are reported together, each where it stands."""
    line = spoil(folder / "catalog" / "gpus.csv", "L40S,48,", "L40S,-48,")
    price = spoil(folder / "catalog" / "prices.csv", ",1.861,", ",nan,")
    network = spoil(folder / "catalog" / "networks.csv", ",0.066,", ",,")
    write_costs(
        folder / "quoted" / "mine.csv",
        {"kind": "quoted", "source": ""},
        {"kind": "quoted", "seconds_median": "inf", "degree": "two"},
        {"kind": "quoted", "seconds_p05": "0.03"},
        {"kind": "quoted", "device": "rtx-409"},
        {"kind": "quoted", "model": "sd16", "runtime": "eagre"},
        {"kind": "quoted", "height_px": "0"},
        {"kind": "measured"},
    )
    with pytest.raises(InputError) as error:
        load_profiles(folder)
    told = str(error.value)
    expected = [f"gpus.csv:{line}", f"prices.csv:{price}", f"networks.csv:{network}"]
    expected += [f"mine.csv:{number}" for number in (2, 3, 3, 4, 5, 6, 6, 7, 8)]
    assert set(places(error)) >= set(expected)
    assert places(error).count("mine.csv:3") == 2
    assert "memory_gib: '-48'" in told
    assert "rtt_p5_s: empty" in told
    assert "finite" in told
    assert "Did you mean rtx-4090" in told
    assert "Did you mean eager" in told


def test_wrong_columns_are_named(folder):
    """Unknown, missing and doubled columns are found in the header, with the column that was meant."""
    spoil(folder / "catalog" / "gpus.csv", "memory_gib,", "memory_gb,")
    spoil(folder / "catalog" / "runtimes.csv", "label,", "label,label,")
    spoil(folder / "catalog" / "networks.csv", "rtt_p5_s,", "")
    with pytest.raises(InputError) as error:
        load_profiles(folder)
    told = str(error.value)
    assert "gpus.csv:1: column 'memory_gb'; no such column. Did you mean memory_gib?" in told
    assert "runtimes.csv:1: column 'label'; stands there twice" in told
    assert "networks.csv:1: column 'rtt_p5_s'; is missing" in told


def test_a_line_of_another_length_is_refused(folder):
    """A comma too many does not shift the cells."""
    line = spoil(folder / "catalog" / "gpus.csv", "Tesla T4,", "Tesla T4,,")
    with pytest.raises(InputError, match=f"gpus.csv:{line}: 9 cells|gpus.csv:{line}: 13 cells"):
        load_profiles(folder)


def test_names_must_be_unique_and_prices_have_one_default(folder):
    """A doubled name and a second default are errors of the lines they stand on."""
    path = folder / "catalog" / "networks.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("\nwifi6,", "\nwifi5,"), encoding="utf-8")
    spoil(folder / "catalog" / "prices.csv", ",true,", ",false,")
    with pytest.raises(InputError) as error:
        load_profiles(folder)
    assert sum(place.startswith("networks.csv:") for place in places(error)) == 2
    assert "has 0 rows with default true" in str(error.value)


def test_a_bad_config_is_an_error_of_its_row(folder):
    """A config that is not JSON is reported with its line."""
    line = spoil(folder / "catalog" / "models.csv", '"{""cross', '"{cross')
    with pytest.raises(InputError, match=f"models.csv:{line}: config"):
        load_profiles(folder)


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ("", "sd15.meta.yaml: empty"),
        ("device: [", "sd15.meta.yaml: .*must be YAML"),
        (META.replace("rtx-4090", "rtx-3090"), "sd15.meta.yaml: device: 'rtx-3090'; must be its folder's"),
        (META.replace("runs: 20", "runs: many"), "sd15.meta.yaml: protocol.runs"),
        (META + "host: mine\n", "sd15.meta.yaml: host"),
    ],
)
def test_a_bad_meta_is_refused(tmp_path, meta, told):
    """A measured file needs a meta that says whose it is and how it was made, and nothing else."""
    write_measured(tmp_path, {}, meta=meta)
    with pytest.raises(InputError, match=told):
        load_profiles(tmp_path)


def test_a_measured_file_needs_its_meta_and_its_kind(tmp_path):
    """Rows under `measured/` are measured, on the device of their folder, with a meta beside them."""
    path = write_measured(tmp_path, {"kind": "quoted"}, {"device": "rtx-3090"})
    with pytest.raises(InputError) as error:
        load_profiles(tmp_path)
    assert places(error) == ["sd15.csv:2", "sd15.csv:3"]
    path.with_suffix(".meta.yaml").unlink()
    with pytest.raises(InputError, match=r"sd15.meta.yaml: FileNotFoundError"):
        load_profiles(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    """A path without catalogue, quoted or measured rows is no profiles folder."""
    with pytest.raises(InputError, match="not a profiles folder"):
        load_profiles(tmp_path)


def test_a_missing_table_is_named(folder):
    """A catalogue without one of its tables says which."""
    (folder / "catalog" / "runtimes.csv").unlink()
    with pytest.raises(InputError, match=r"runtimes.csv: FileNotFoundError"):
        load_profiles(folder)
