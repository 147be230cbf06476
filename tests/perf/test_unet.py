"""The layers of a UNet against published counts, and the laws that any config obeys.

Counts "by flop_counter" were made with torch.utils.flop_counter on diffusers 0.42.1 models built on the meta device
(torch 2.13.0, 2026-11-21); parameter counts of SD 1.5, SD 2.1 and SDXL equal those of the released checkpoints.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError
from hybridsd_sim.perf import Unit, total_work, unet_layers, unet_params, unet_units
from hybridsd_sim.perf.unet import Layer

Config = Mapping[str, Any]

DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD15: Config = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21: Config = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
TINY: Config = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [DOWN] * 3,
    "up_block_types": [UP] * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
}
XL: Config = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [PLAIN_DOWN, DOWN, DOWN],
    "up_block_types": [UP, UP, PLAIN_UP],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL: Config = {**XL, "transformer_layers_per_block": [1, 2, 10]}
REFINER: Config = {
    **XL,
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": [PLAIN_DOWN, DOWN, DOWN, PLAIN_DOWN],
    "up_block_types": [PLAIN_UP, UP, UP, PLAIN_UP],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
HYBRID_SD_224M: Config = {  # cqyan/hybrid-sd-v1-4-lcm-224m config.json; bytedance/Hybrid-SD UNet
    **SD15,
    **TINY,
    "resnet_inner_channels": [256, 480, 960, 320, 320, 160, 160, 96, 256],
    "self_attention_heads": [8, 4, 6, 6, 8, 8, 4, 8, 8],
}
MODELS: Mapping[str, Config] = {
    "sd15": SD15,
    "lcm-sd15": {**SD15, "time_cond_proj_dim": 256},
    "sd21": SD21,
    "bk-sdm-base": {**SD15, "layers_per_block": 1},
    "bk-sdm-small": {**SD15, "layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": {**SD15, **TINY},
    "bk-sdm-tiny-v2": {**SD21, **TINY, "attention_head_dim": [5, 10, 20]},
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "ssd-1b": {
        **XL,
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "segmind-vega": {
        **XL,
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "koala-700m": {**XL, "layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
    "koala-1b": {**XL, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "hybrid-sd-224m": HYBRID_SD_224M,
}

PARAMS = {  # by flop_counter's models; 224M: published as 224.49 M (bytedance/Hybrid-SD)
    "sd15": 859_520_964,
    "lcm-sd15": 859_602_884,
    "sd21": 865_910_724,
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "bk-sdm-tiny-v2": 326_825_604,
    "sdxl": 2_567_463_684,
    "sdxl-refiner": 2_259_526_660,
    "ssd-1b": 1_331_334_404,
    "segmind-vega": 745_225_604,
    "koala-700m": 782_822_724,
    "koala-1b": 1_161_184_324,
    "hybrid-sd-224m": 224_492_676,
}

GFLOPS = {  # by flop_counter: one forward of batch 1; convolutions, linear layers, attention products
    ("sd15", 512): (443.95, 233.28, 126.05),
    ("sd15", 768): (998.88, 521.11, 628.13),
    ("sd15", 1024): (1775.78, 924.08, 1974.14),
    ("sd21", 512): (418.36, 259.84, 126.05),
    ("sd21", 768): (941.31, 579.66, 628.13),
    ("sd21", 1024): (1673.44, 1027.4, 1974.14),
    ("bk-sdm-base", 512): (305.74, 141.6, 75.65),
    ("bk-sdm-base", 768): (687.92, 316.19, 376.95),
    ("bk-sdm-base", 1024): (1222.98, 560.61, 1184.66),
    ("bk-sdm-small", 512): (297.77, 137.52, 75.6),
    ("bk-sdm-small", 768): (669.99, 307.39, 376.78),
    ("bk-sdm-small", 1024): (1191.1, 545.2, 1184.23),
    ("bk-sdm-tiny", 512): (272.4, 137.51, 75.6),
    ("bk-sdm-tiny", 768): (612.9, 307.38, 376.78),
    ("bk-sdm-tiny", 1024): (1089.6, 545.19, 1184.23),
    ("sdxl", 512): (405.78, 1127.95, 55.05),
    ("sdxl", 768): (913.0, 2472.23, 255.98),
    ("sdxl", 1024): (1623.11, 4354.21, 783.92),
    ("sdxl-refiner", 1024): (2409.58, 3685.63, 1190.8),
    ("ssd-1b", 512): (390.68, 554.43, 34.44),
    ("ssd-1b", 768): (879.03, 1217.13, 162.42),
    ("ssd-1b", 1024): (1562.71, 2144.91, 500.14),
    ("segmind-vega", 512): (390.68, 253.41, 18.8),
    ("segmind-vega", 768): (879.03, 557.5, 89.48),
    ("segmind-vega", 1024): (1562.71, 983.22, 276.51),
    ("koala-700m", 512): (257.3, 341.72, 23.86),
    ("koala-700m", 768): (578.92, 750.67, 113.15),
    ("koala-700m", 1024): (1029.2, 1323.19, 349.13),
    ("koala-1b", 1024): (1149.99, 1880.75, 401.08),
}


# ---- Published numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_equal_the_checkpoints(name: str) -> None:
    """Every model has exactly as many parameters as its checkpoint."""
    assert unet_params(MODELS[name]) == PARAMS[name]


@pytest.mark.parametrize(("name", "size_px"), GFLOPS)
def test_flops_by_kind_equal_the_flop_counter(name: str, size_px: int) -> None:
    """Convolution, linear and attention FLOPs equal torch's own count to the last printed digit."""
    done = total_work(unet_layers(MODELS[name], size_px, size_px))
    counted = tuple(round(2 * macs / 1e9, 2) for macs in (done.macs_conv, done.macs_linear, done.macs_attention))
    assert counted == GFLOPS[name, size_px]


@pytest.mark.parametrize(
    ("name", "size_px", "gmacs", "gmacs_with_attention"),
    [
        ("sd15", 512, 677.2, 803.3),  # AsyncDiff prints 34 T in 50 steps, Hybrid SD 16.93 T in 25
        ("sd21", 768, 1521.0, 2149.1),  # AsyncDiff prints 76 T in 50 steps
        ("sdxl", 1024, 5977.3, 6761.2),  # AsyncDiff prints 299 T without, DistriFusion 338 T with the products
        ("bk-sdm-small", 512, 435.3, 510.9),  # bytedance/Hybrid-SD's constant
        ("bk-sdm-tiny", 512, 409.9, 485.5),  # bytedance/Hybrid-SD's constant
        ("hybrid-sd-224m", 512, 302.6, 375.3),  # Hybrid SD prints 15.14 TFLOPs in 25 steps
    ],
)
def test_macs_of_a_guided_step(name: str, size_px: int, gmacs: float, gmacs_with_attention: float) -> None:
    """A batch of two needs the MACs that the papers print, with and without the attention products."""
    done = total_work(unet_layers(MODELS[name], size_px, size_px))
    assert round(2 * done.macs_without_attention / 1e9, 1) == gmacs
    assert round(2 * done.macs / 1e9, 1) == gmacs_with_attention


@pytest.mark.parametrize(
    ("switch_step", "published_tflop"), [(0, 15.14), (5, 18.89), (10, 22.64), (25, 33.89)]
)  # bytedance/Hybrid-SD notebooks/plots/plot_steps_fid.py, 25 steps of SD 1.4 and then the 224M model
def test_hybrid_sd_arithmetic(switch_step: int, published_tflop: float) -> None:
    """Hybrid SD's FLOPs follow from the two configs, to 0.1%."""
    large, small = (total_work(unet_layers(MODELS[name], 512, 512)) for name in ("sd15", "hybrid-sd-224m"))
    macs = switch_step * large.macs_without_attention + (25 - switch_step) * small.macs_without_attention
    assert 2 * 2 * macs / 1e12 == pytest.approx(published_tflop, rel=1e-3)


@pytest.mark.parametrize(
    ("size_px", "kv_elements", "halo_elements"), [(1024, 419_430_400, 8_192_000), (2048, 1_677_721_600, 16_384_000)]
)
def test_distrifusion_traffic(size_px: int, kv_elements: int, halo_elements: int) -> None:
    """SDXL's keys, values and halos at batch 2 give DistriFusion's communication (arXiv 2402.19481, Table 2).

    Halo of one device: both edges of its stripe for every convolution wider than 1 x 1 except conv_in.
    """
    layers = unet_layers(SDXL, size_px, size_px)
    kv, halo = (
        2 * sum(layer.kv_elements for layer in layers),
        2 * 2 * sum(layer.halo_elements for layer in layers if layer.unit != "conv_in"),
    )
    assert (kv, halo) == (kv_elements, halo_elements)
    if size_px == 1024:  # the paper's 0.42 G elements received by one of eight devices
        assert round((7 / 8 * kv + 7 * halo) / 1e9, 2) == 0.42


# AsyncDiff's components (czg1225/AsyncDiff, asyncdiff/pipe_config.py): each word is one wrapped module
ASYNCDIFF: Mapping[tuple[str, int, int], tuple[str, ...]] = {
    ("sd15", 512, 2): (
        "conv_in down0 down1 down2 down3 mid up0 up1.resnet0 up1.attention0 up1.resnet1",
        "up1.attention1 up1.resnet2 up1.attention2 up1.upsampler up2 up3 norm conv_out",
    ),
    ("sd15", 512, 3): (
        "conv_in down0 down1 down2 down3",
        "mid up0 up1 up2.resnet0 up2.attention0 up2.resnet1 up2.attention1 up2.resnet2",
        "up2.attention2 up2.upsampler up3 norm conv_out",
    ),
    ("sd15", 512, 4): (
        "conv_in down0 down1",
        "down2 down3 mid up0 up1.resnet0 up1.attention0 up1.resnet1",
        "up1.attention1 up1.resnet2 up1.attention2 up1.upsampler up2",
        "up3 norm conv_out",
    ),
    ("sd21", 768, 2): (
        "conv_in down0 down1 down2 down3 mid up0 up1.resnet0 up1.attention0 up1.resnet1 up1.attention1 up1.resnet2",
        "up1.attention2 up1.upsampler up2 up3 norm conv_out",
    ),
    ("sd21", 768, 3): ("conv_in down0 down1 down2 down3", "mid up0 up1 up2", "up3 norm conv_out"),
    ("sd21", 768, 4): (
        "conv_in down0 down1",
        "down2 down3 mid up0 up1",
        "up2 up3.resnet0",
        "up3.attention0 up3.resnet1 up3.attention1 up3.resnet2 up3.attention2 norm conv_out",
    ),
    ("sdxl", 1024, 2): (
        "down2 mid up0.resnet0 up0.attention0 up0.resnet1 up0.attention1",
        "conv_in down0 down1 up1 up2 norm conv_out up0.resnet2 up0.attention2 up0.upsampler",
    ),
    ("sdxl", 1024, 3): (
        "down2 mid up0.resnet0",
        "up0.attention0 up0.resnet1 up0.attention1 up0.resnet2 up0.attention2 up0.upsampler",
        "conv_in down0 down1 up1 up2 norm conv_out",
    ),
    ("sdxl", 1024, 4): (
        "down1.attention0 down1.resnet1 down1.attention1 down1.downsampler down2",
        "mid up0.resnet0 up0.attention0",
        "up0.resnet1 up0.attention1 up0.resnet2 up0.attention2 up0.upsampler",
        "conv_in down0 down1.resnet0 up1 up2 norm conv_out",
    ),
}
SHARES = {
    ("sd15", 512, 2): (0.44, 0.56),
    ("sd15", 512, 3): (0.31, 0.38, 0.31),
    ("sd15", 512, 4): (0.22, 0.22, 0.31, 0.25),
    ("sd21", 768, 2): (0.47, 0.53),
    ("sd21", 768, 3): (0.325, 0.384, 0.291),
    ("sd21", 768, 4): (0.25, 0.27, 0.22, 0.26),
    ("sdxl", 1024, 2): (0.56, 0.44),
    ("sdxl", 1024, 3): (0.35, 0.34, 0.31),
    ("sdxl", 1024, 4): (0.29, 0.23, 0.24, 0.23),
}
PAYLOAD_MB = {
    ("sd15", 512, 2): 65,
    ("sd15", 512, 3): 73,
    ("sd15", 512, 4): 65,
    ("sd21", 768, 2): 146,
    ("sd21", 768, 3): 129,
    ("sd21", 768, 4): 188,
    ("sdxl", 1024, 2): 257,
    ("sdxl", 1024, 3): 257,
    ("sdxl", 1024, 4): 276,
}


def members(units: Sequence[Unit], module: str) -> list[Unit]:
    """The units of one of AsyncDiff's modules; the norm before conv_out is counted with it."""
    return [unit for unit in units if unit.name == module or unit.name.startswith(f"{module}.")]


def broadcast_elements(units: Sequence[Unit], module: str) -> int:
    """What AsyncDiff caches of one module: its output, and of a whole down block every skip output again."""
    if module == "norm":
        return units[-2].out_elements
    inside = members(units, module)
    skips = (
        sum(unit.out_elements for unit in inside if unit.skip_to)
        if module in ("down0", "down1", "down2", "down3")
        else 0
    )
    return inside[-1].out_elements + skips


@pytest.mark.parametrize("case", ASYNCDIFF, ids=lambda case: f"{case[0]}-N{case[2]}")
def test_asyncdiff_components(case: tuple[str, int, int]) -> None:
    """Units give the MAC share of every AsyncDiff component (arXiv 2406.06911) and the bytes of a broadcast round."""
    name, size_px, _ = case
    units = unet_units(MODELS[name], size_px, size_px)
    components = [component.split() for component in ASYNCDIFF[case]]
    total = sum(unit.macs for unit in units)
    for component, share in zip(components, SHARES[case], strict=True):
        macs = sum(unit.macs for module in component for unit in members(units, module))
        assert macs / total == pytest.approx(share, abs=0.005)
    noise = units[-1].out_elements
    elements = noise + sum(broadcast_elements(units, module) for component in components for module in component)
    assert round(elements * 2 * 2 / 1e6) == PAYLOAD_MB[case]  # batch 2, fp16


# ---- Laws -----------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small UNets of every supported shape."""
    levels = draw(st.integers(1, 3))
    widths = draw(st.lists(st.sampled_from([32, 64, 96]), min_size=levels, max_size=levels))
    kinds = st.lists(st.booleans(), min_size=levels, max_size=levels)
    return {
        "block_out_channels": widths,
        "down_block_types": [DOWN if attends else PLAIN_DOWN for attends in draw(kinds)],
        "up_block_types": [UP if attends else PLAIN_UP for attends in draw(kinds)],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        "layers_per_block": draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels) | st.integers(1, 3)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": draw(st.sampled_from([1, 4, 8])),
        "cross_attention_dim": draw(st.integers(1, 64)),
        "use_linear_projection": draw(st.booleans()),
    }


sides_px = st.integers(1, 4).map(lambda count: 32 * count)


def image_macs(layers: Iterable[Layer], *ops: str) -> int:
    """MACs of some kinds of layer that depend on the image."""
    return sum(layer.macs for layer in layers if layer.op in ops and layer.tokens)


@settings(deadline=None)
@given(configs(), sides_px, sides_px)
def test_doubling_both_sides(config: Config, height_px: int, width_px: int) -> None:
    """Twice the height and width: 4 times the work per token, 16 times the self-attention, twice the halo."""
    once, twice = unet_layers(config, height_px, width_px), unet_layers(config, 2 * height_px, 2 * width_px)
    for ops, factor in ((("conv", "linear", "cross_attention"), 4), (("self_attention",), 16)):
        assert image_macs(twice, *ops) == factor * image_macs(once, *ops)
    for before, after in zip(once, twice, strict=True):
        assert (after.path, after.params, after.halo_elements) == (before.path, before.params, 2 * before.halo_elements)
        assert (after.rows, after.tokens) == (2 * before.rows, 4 * before.tokens)
        if not before.tokens:
            assert after == before


@settings(deadline=None)
@given(configs(), sides_px, sides_px)
def test_units_sum_to_the_layers(config: Config, height_px: int, width_px: int) -> None:
    """MACs and parameters of the units add up to the whole, unit by unit in execution order."""
    done, units = total_work(unet_layers(config, height_px, width_px)), unet_units(config, height_px, width_px)
    assert (sum(unit.macs for unit in units), sum(unit.params for unit in units)) == (done.macs, done.params)
    assert done.macs == done.macs_without_attention + done.macs_attention
    assert done.params == unet_params(config)
    assert list(dict.fromkeys(layer.unit for layer in unet_layers(config, height_px, width_px))) == [
        u.name for u in units
    ]


@settings(deadline=None)
@given(configs(), sides_px)
def test_skips_fill_the_concatenations(config: Config, side_px: int) -> None:
    """Every up-path resnet reads what the unit before it wrote and what exactly one skip partner wrote."""
    layers, units = unet_layers(config, side_px, 2 * side_px), unet_units(config, side_px, 2 * side_px)
    first = {layer.unit: layer for layer in reversed(layers)}
    givers = {unit.skip_to: unit for unit in units if unit.skip_to}
    takers = [(before, unit) for before, unit in pairwise(units) if unit.name.startswith("up")]
    for before, unit in ((before, unit) for before, unit in takers if ".resnet" in unit.name):
        assert first[unit.name].out_elements == before.out_elements + givers.pop(unit.name).out_elements
    assert not givers


@settings(deadline=None)
@given(configs())
def test_pruning_at_full_width_changes_nothing(config: Config) -> None:
    """Pruned fields that keep everything give the unpruned layers; halving a resnet inside keeps its output."""
    layers = unet_layers(config, 64, 64)
    widths = [layer.out_elements // layer.tokens for layer in layers if layer.path.endswith(".conv1")]
    blocks = [unit for unit in unet_units(config, 64, 64) if ".attention" in unit.name]
    kept = {"resnet_inner_channels": widths, "self_attention_heads": [config["attention_head_dim"]] * len(blocks)}
    assert unet_layers({**config, **kept}, 64, 64) == layers
    thin = unet_units({**config, "resnet_inner_channels": [32] * len(widths)}, 64, 64)
    assert [unit.out_elements for unit in thin] == [unit.out_elements for unit in unet_units(config, 64, 64)]


def test_text_and_time_do_not_depend_on_the_image() -> None:
    """Time embeddings, their projections and the text's keys and values have no rows and no tokens."""
    ends = ("time_emb_proj", "attn2.to_k", "attn2.to_v", "embedding.linear_1", "embedding.linear_2")
    for layer in unet_layers(SDXL, 1024, 1024):
        assert (layer.tokens == 0) == layer.path.endswith(ends)
        assert (layer.rows == 0) == (layer.tokens == 0)


def test_paths_and_units_are_diffusers() -> None:
    """Paths are diffusers' module paths, and each layer lies in the unit that AsyncDiff would move."""
    units = {layer.path: layer.unit for layer in unet_layers(SD15, 512, 512)}
    assert len(units) == len(unet_layers(SD15, 512, 512))
    assert units["down_blocks.0.attentions.1.transformer_blocks.0.attn1"] == "down0.attention1"
    assert units["down_blocks.2.downsamplers.0.conv"] == "down2.downsampler"
    assert units["mid_block.resnets.1.conv2"] == "mid.resnet1"
    assert units["up_blocks.1.upsamplers.0.conv"] == "up1.upsampler"
    assert units["conv_norm_out"] == units["conv_out"] == "conv_out"


def test_ssd_1b_has_one_resnet_in_the_middle() -> None:
    """UNetMidBlock2D has a single resnet and no attention, as diffusers builds it."""
    names = [unit.name for unit in unet_units(MODELS["ssd-1b"], 512, 512) if unit.name.startswith("mid")]
    assert names == ["mid.resnet0"]


def test_a_whole_config_file_is_read() -> None:
    """Fields at diffusers' defaults and fields without layers change nothing, and lists may be tuples."""
    file = {
        **SD15,
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "act_fn": "silu",
        "block_out_channels": (320, 640, 1280, 1280),
        "class_embed_type": None,
        "only_cross_attention": False,
        "norm_num_groups": 32,
    }
    assert unet_layers(file, 512, 512) == unet_layers(SD15, 512, 512)


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_blok": 1}, r"config\.layers_per_blok: 1; no such field\. Did you mean layers_per_block\?"),
        (
            {"layers_per_block": 0},
            "config.layers_per_block: 0; needs a whole number above 0, or a list of one per level",
        ),
        ({"layers_per_block": True}, "config.layers_per_block: true; needs a whole number"),
        ({"layers_per_block": 2.0}, "config.layers_per_block: 2.0; needs a whole number"),
        ({"layers_per_block": [1, 2]}, "needs one entry for each of the 4 levels"),
        ({"block_out_channels": [320, 650]}, "needs a list of positive multiples of 32"),
        ({"block_out_channels": []}, "needs a list of positive multiples of 32"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "must be 'CrossAttnDownBlock2D' or 'DownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "must be 'UNetMidBlock2DCrossAttn' or 'UNetMidBlock2D'"),
        ({"up_block_types": [UP]}, "needs one entry for each of the 4 levels"),
        ({"class_embed_type": "projection"}, 'config.class_embed_type: "projection"; only null is supported'),
        ({"conv_in_kernel": 5}, "config.conv_in_kernel: 5; only 3 is supported"),
        ({"attention_head_dim": 7}, "must divide"),
        ({"cross_attention_dim": [768] * 4}, "the same at every level"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim: null; .* SDXL has 2816"),
        ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "reverse_transformer_layers_per_block beside it"),
        ({"reverse_transformer_layers_per_block": [[1], 1, 1, 1]}, "this level has 3 layers"),
        ({"resnet_inner_channels": [32]}, "needs one entry for each of these 22: down0.resnet0"),
        ({"self_attention_heads": []}, "needs one entry for each of these 16: down0.attention0"),
        ({"in_channels": {4}}, "config.in_channels: .* must be a valid integer"),
    ],
)
def test_bad_configs_are_refused(change: Config, message: str) -> None:
    """What is not supported is refused with place, value, rule and, where there is one, remedy."""
    with pytest.raises(InputError, match=message):
        unet_layers({**SD15, **change}, 512, 512)


def test_all_problems_at_once() -> None:
    """A config with three mistakes is refused once, with three problems."""
    with pytest.raises(InputError) as refused:
        unet_params({"layers_per_block": 0, "class_embed_type": "timestep", "block_out_channels": 320})
    assert [problem.place for problem in refused.value.problems] == [
        "config.block_out_channels",
        "config.class_embed_type",
        "config.layers_per_block",
    ]


def test_order_and_types_of_values_matter_to_the_cache() -> None:
    """A value that merely equals a good one (1.0, true) is refused even when the good one was asked before."""
    assert unet_layers({"layers_per_block": 1}, 512, 512)
    for wrong in (1.0, True):
        with pytest.raises(InputError):
            unet_layers({"layers_per_block": wrong}, 512, 512)


def test_sizes_that_do_not_halve_are_refused() -> None:
    """Both sizes must be multiples of 8 x 2^(levels - 1); the nearest that are stand in the message."""
    with pytest.raises(InputError, match=r"height_px: 500; must be a multiple of 64.*Nearest: 448 and 512") as refused:
        unet_layers(SD15, 500, 32)
    assert [problem.place for problem in refused.value.problems] == ["height_px", "width_px"]
    assert refused.value.problems[1].remedy == "Nearest: 64."
    assert unet_layers(SDXL, 1024, 544)  # three levels: multiples of 32


def test_layers_are_plain_data() -> None:
    """A config that came through JSON gives the same layers."""
    assert unet_layers(json.loads(json.dumps(SDXL)), 512, 768) is unet_layers(SDXL, 512, 768)
