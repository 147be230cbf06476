"""Work and bytes read off running modules, held against the catalogue and against the planner's own counting."""

import pytest

from executors.profiling import component_rows, count_rows, pcpp_bytes_rows
from executors.profiling.flops import Count, count_component, count_model
from hybridsd_sim.errors import IllegalPlanError, InputError
from hybridsd_sim.perf import total_work, unet_layers
from hybridsd_sim.perf.unet import Layer
from hybridsd_sim.profiles import Profiles
from small_models import HEIGHT_PX, SMALL, WIDTH_PX

SIZES = {"sd15": (1024, 512), "sdxl": (1024, 1024), "hybrid-sd-224m": (1024, 1024)}
"""Sizes other than 512 x 512 px, one of them not square."""


@pytest.fixture(scope="module")
def counts(profiles: Profiles) -> dict[str, Count]:
    """Every catalogue model at 512 x 512 px, run on the meta device."""
    return {name: count_model(name, 512, 512, profiles=profiles) for name in profiles.models}


def by_layers(layers: tuple[Layer, ...]) -> dict[str, int]:
    """What the planner counts without torch, in the terms of a `Count`."""
    total = total_work(layers)
    return {
        "params": total.params,
        "flop_conv": 2 * total.macs_conv,
        "flop_linear": 2 * total.macs_linear,
        "flop_attention": 2 * total.macs_attention,
        "kv_elements": sum(layer.kv_elements for layer in layers),
        "halo_elements": sum(layer.halo_elements for layer in layers if layer.unit != "conv_in"),
        "self_attentions": sum(layer.op == "self_attention" for layer in layers),
        "group_norms": sum(layer.op == "group_norm" for layer in layers),
    }


def by_modules(count: Count) -> dict[str, int]:
    """The same from the modules that ran."""
    calls = {name: getattr(count.calls, name) for name in ("flop_conv", "flop_linear", "flop_attention")}
    names = ("params", "kv_elements", "halo_elements", "self_attentions", "group_norms")
    return calls | {name: getattr(count, name) for name in names}


def test_the_catalogues_models_come_from_here(profiles, counts):
    """Parameters and operations of every catalogue model are those of the module that ran."""
    counted = {name: (count.params, count.calls.ops) for name, count in counts.items()}
    assert counted == {name: (row.params, row.ops) for name, row in profiles.models.items()}


def test_the_catalogues_components_come_from_here(profiles):
    """Parameters, operations and FLOPs (given to 10 MFLOP) of decoders and text encoders are those that ran."""
    for name, row in profiles.components.items():
        count = count_component(name)
        assert (count.component, count.params, count.calls.ops) == (row.component, row.params, row.ops)
        flops = (count.calls.flop_conv, count.calls.flop_linear, count.calls.flop_attention)
        assert tuple(round(flop, -7) for flop in flops) == (
            row.flop_conv_512,
            row.flop_linear_512,
            row.flop_attention_512,
        )


def test_modules_and_planner_count_the_same_at_512(profiles, counts):
    """FLOPs by kind, keys and values, halos and GroupNorms of the modules equal those of `unet_layers`."""
    layers = {name: by_layers(unet_layers(row.config, 512, 512)) for name, row in profiles.models.items()}
    assert {name: by_modules(count) for name, count in counts.items()} == layers


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=SIZES)
def test_modules_and_planner_count_the_same_at_other_sizes(profiles, name, size):
    """They agree at other sizes too, whether square or not."""
    counted = by_modules(count_model(name, *size, profiles=profiles))
    assert counted == by_layers(unet_layers(profiles.model(name).config, *size))


@pytest.mark.parametrize(
    "extra",
    [{}, {"time_cond_proj_dim": 8}, {"self_attention_heads": [1, 2, 2, 3]}, {"use_linear_projection": True}],
    ids=["plain", "guidance-embedding", "pruned", "linear"],
)
def test_any_config_is_counted(extra):
    """A config without a name is counted as a catalogue model is."""
    config = {**SMALL, **extra}
    counted = by_modules(count_model(config, HEIGHT_PX, WIDTH_PX))
    assert counted == by_layers(unet_layers(config, HEIGHT_PX, WIDTH_PX))


def test_both_conventions_of_flops_are_given(counts):
    """SD 1.5 at 512 px: 803.27 GFLOP with attention products, 126.05 fewer without."""
    calls = counts["sd15"].calls
    assert round(calls.flop / 1e9, 2) == 803.27
    assert round((calls.flop - calls.flop_without_attention_products) / 1e9, 2) == 126.05


def test_boundaries_grow_with_the_image_and_shares_are_even(counts, profiles):
    """Components share all the work, none much above its part; four times the pixels are four times the tensors."""
    for count in counts.values():
        assert [boundary.components for boundary in count.boundaries] == [2, 3, 4]
        for boundary in count.boundaries:
            assert len(boundary.shares) == boundary.components
            assert sum(boundary.shares) == pytest.approx(1)
            assert max(boundary.shares) * boundary.components < 1.3
            assert boundary.fp16_bytes == boundary.elements * 2 * 2
    larger = count_model("sdxl", 1024, 1024, profiles=profiles)
    for big, small in zip(larger.boundaries, counts["sdxl"].boundaries, strict=True):
        assert (big.tensors, big.elements) == (small.tensors, 4 * small.elements)


def test_rows_name_their_units():
    """The table has a row per model and size, in the order asked for, with bytes and elements named as such."""
    rows = count_rows(["bk-sdm-tiny", "hybrid-sd-224m"], [512, (512, 768)])
    assert [(row["model"], row["height_px"], row["width_px"]) for row in rows] == [
        ("bk-sdm-tiny", 512, 512),
        ("bk-sdm-tiny", 512, 768),
        ("hybrid-sd-224m", 512, 512),
        ("hybrid-sd-224m", 512, 768),
    ]
    first = rows[0]
    assert first["flop"] == first["flop_conv"] + first["flop_linear"] + first["flop_attention"]
    assert first["asyncdiff_2_fp16_bytes_per_guided_image"] == 4 * first["asyncdiff_2_elements"]
    assert [row["height_px"] for row in component_rows(["taesd", "clip-l"], [256, 512])] == [256, 512, 0]


def test_sending_only_the_used_part_saves_bytes():
    """Whole stripes cost PCPP's two ranks as much as DistriFusion's; the used part alone costs less at any degree."""
    two, four = pcpp_bytes_rows(["sdxl"], [1024], [2, 4], partial=0.3)
    assert two["pcpp_whole_stripes_bytes"] == two["distrifusion_bytes"]
    assert four["pcpp_used_part_bytes"] < four["pcpp_whole_stripes_bytes"] < four["distrifusion_bytes"]
    whole = pcpp_bytes_rows(["sdxl"], [1024], [4], partial=1.0)[0]
    assert whole["pcpp_used_part_bytes"] == whole["pcpp_whole_stripes_bytes"] == four["pcpp_whole_stripes_bytes"]
    kv_bytes = 2 * 2 * count_model("sdxl", 1024, 1024).kv_elements
    saved = four["pcpp_whole_stripes_bytes"] - four["pcpp_used_part_bytes"]
    assert saved == pytest.approx((1 - 0.3) * 2 * kv_bytes / 4)


def test_what_cannot_be_counted_is_refused():
    """Sizes that do not fit, stripes that do not divide and unknown names are refused with the rule."""
    with pytest.raises(InputError, match=r"height_px: 500.*Nearest: 448 and 512"):
        count_model("sd15", 500, 512)
    with pytest.raises(IllegalPlanError, match="8 rows do not divide by 3"):
        pcpp_bytes_rows(["sd15"], [512], [3])
    with pytest.raises(InputError, match="sd15"):
        count_rows(["sd16"], [512])
    with pytest.raises(InputError, match="taesd"):
        count_component("tasd")
