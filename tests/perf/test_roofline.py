"""Laws of the roofline: more work never takes less, limits are exact, shares of a UNet add up to the whole."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hybridsd_sim import Profiles
from hybridsd_sim.perf import Floats, layer_table, total_work, unet_layers, unet_units
from hybridsd_sim.perf.partition import TIME_EMBEDDING
from hybridsd_sim.perf.roofline import HEAD_WIDTHS, KINDS, PARAMETERS, Batch, Kernels, LayerTable, plain_kernels
from small_models import SMALL

MODELS = ("sd15", "sd21", "sdxl", "bk-sdm-tiny", "hybrid-sd-224m", "koala-700m", "ssd-1b")
LARGEST_EXCESS = 2**0.125
"""Device and host that take equally long together take this much longer than either: overlap is never perfect."""
LOG_RANGES = ((1e11, 1e15), (0.2, 2.0), (0.1, 2.0), (1e10, 1e13), (1e-7, 1e-4), (1e-7, 1e-4))

models = st.sampled_from(MODELS)
sides_px = st.sampled_from([256, 512, 768, 1024])
stripes = st.sampled_from([2, 4, 8])
laws = st.tuples(*(st.floats(log(low), log(high)) for low, high in LOG_RANGES)).map(np.array)


@st.composite
def kernel_sets(draw: st.DrawFn) -> Kernels:
    """A few kernels of every size and kind, and their launches."""
    count = draw(st.integers(1, 6))
    kind = draw(arrays.arrays(np.int8, count, elements=st.integers(0, len(KINDS) - 1)))
    flop = draw(arrays.arrays(np.float64, count, elements=st.floats(0.0, 1e13)))
    padding = draw(arrays.arrays(np.float64, count, elements=st.floats(1.0, 2.0)))
    moved = draw(arrays.arrays(np.float64, count, elements=st.floats(1.0, 1e10)))
    return Kernels(kind, flop, flop * padding, moved, draw(st.floats(1.0, 5000.0)))


def seconds(kernels: Kernels, law: Floats) -> float:
    """Seconds of these kernels alone."""
    return float(Batch([kernels]).seconds(law)[0])


def table_of(profiles: Profiles, model: str, side_px: int) -> LayerTable:
    """The layers of a model of the catalogue."""
    entry = profiles.model(model)
    return layer_table(entry.config, side_px, side_px, entry.ops)


# ---- The law --------------------------------------------------------------------------------------------------------


@given(kernel_sets(), laws, st.sampled_from(["executed", "bytes", "ops"]), st.floats(1.0, 1e3), st.data())
def test_more_work_never_takes_less(
    kernels: Kernels, law: Floats, what: str, factor: float, data: st.DataObject
) -> None:
    """More FLOPs or bytes in any one kernel, or more launches, and the seconds do not fall."""
    index = data.draw(st.integers(0, len(kernels.kind) - 1))
    grown = {name: getattr(kernels, name).copy() for name in ("kind", "flop", "executed", "bytes")}
    ops = kernels.ops
    if what == "ops":
        ops *= factor
    else:
        grown[what][index] *= factor

    assert seconds(Kernels(**grown, ops=ops), law) >= seconds(kernels, law) * (1 - 1e-12)


@given(kernel_sets(), laws, st.floats(0.1, 100.0))
def test_all_work_together_scales_the_seconds(kernels: Kernels, law: Floats, factor: float) -> None:
    """Twice the FLOPs, bytes and launches take twice as long."""
    scaled = Kernels(
        kernels.kind, kernels.flop * factor, kernels.executed * factor, kernels.bytes * factor, kernels.ops * factor
    )

    assert seconds(scaled, law) == pytest.approx(factor * seconds(kernels, law))


@pytest.mark.parametrize(("kind", "share"), [("linear", 1.0), ("conv", 0.5), ("attention", 0.25)])
def test_a_large_kernel_runs_at_the_rate_of_its_kind(kind: str, share: float) -> None:
    """Bound by arithmetic, seconds are FLOPs over the rate, of which convolutions and attention reach their share."""
    law = np.log([1e14, 0.5, 0.25, 1e12, 1e-6, 1e-6])
    large = Kernels(np.array([KINDS.index(kind)], np.int8), np.array([1e16]), np.array([1e16]), np.zeros(1), 1.0)

    assert seconds(large, law) == pytest.approx(1e16 / (1e14 * share), rel=1e-6)


def test_pointwise_work_costs_bytes_alone() -> None:
    """Bound by memory, seconds are bytes over the rate, whatever a pointwise kernel computes."""
    law = np.log([1e14, 0.5, 0.25, 1e12, 1e-6, 1e-6])
    moved = Kernels(np.array([KINDS.index("pointwise")], np.int8), np.ones(1), np.ones(1), np.array([1e13]), 1.0)

    assert seconds(moved, law) == pytest.approx(10.0, rel=1e-6)


@given(kernel_sets(), laws)
def test_seconds_lie_just_above_the_longer_of_device_and_host(kernels: Kernels, law: Floats) -> None:
    """The device takes its roofline and a floor an operation, the host a launch each; together a tenth more at most."""
    linear, conv, attention, memory, per_op, launch = np.exp(law)
    rates = {"linear": linear, "conv": linear * conv, "attention": linear * attention, "pointwise": np.inf}
    device = kernels.ops * per_op + sum(
        max(flop / rates[KINDS[kind]], moved / memory)
        for kind, flop, moved in zip(kernels.kind, kernels.executed, kernels.bytes, strict=True)
    )
    longer = max(device, kernels.ops * launch)

    assert longer * (1 - 1e-9) <= seconds(kernels, law) <= longer * LARGEST_EXCESS * (1 + 1e-9)


@given(st.lists(kernel_sets(), min_size=1, max_size=5), laws)
def test_a_batch_times_each_as_if_alone(items: list[Kernels], law: Floats) -> None:
    """Items that are timed together do not see each other."""
    assert Batch(items).seconds(law) == pytest.approx([seconds(item, law) for item in items])


@given(kernel_sets(), laws)
def test_the_gradient_is_that_of_the_seconds(kernels: Kernels, law: Floats) -> None:
    """A small change of the law changes the logarithm of the seconds by gradient times change, but for kinks.

    Where a kernel is as long in arithmetic as in memory the law has a kink, and either side's slope will do.
    """
    batch, step = Batch([kernels]), 1e-5
    gradient = batch.gradient(law)[0]
    for index in range(len(law)):
        nudge = np.eye(len(law))[index] * step
        slopes = sorted(
            sign * log(float(batch.seconds(law + sign * nudge)[0] / batch.seconds(law)[0])) / step for sign in (1, -1)
        )
        assert slopes[0] - 1e-4 <= gradient[index] <= slopes[1] + 1e-4 or _near_a_kink(kernels, law)


def _near_a_kink(kernels: Kernels, law: Floats) -> bool:
    linear, conv, attention, memory = np.exp(law[:4])
    rates = np.array([linear, linear * conv, linear * attention, np.inf])[kernels.kind]
    with np.errstate(divide="ignore"):
        return bool(np.any(np.abs(np.log(kernels.executed / rates) - np.log(kernels.bytes / memory)) < 1e-3))


@given(kernel_sets(), laws)
def test_a_device_that_does_everything_twice_as_fast_takes_half(kernels: Kernels, law: Floats) -> None:
    """Seconds are linear in 1/rates and in seconds an operation, so the elasticities sum to one (Euler)."""
    gradient = dict(zip(PARAMETERS, Batch([kernels]).gradient(law)[0], strict=True))
    slower = -gradient["linear_flop_per_s"] - gradient["memory_bytes_per_s"]

    assert slower + gradient["seconds_per_op"] + gradient["launch_s_per_op"] == pytest.approx(1.0, abs=1e-6)


def test_bytes_added_to_kernels_are_read_at_the_memorys_rate() -> None:
    """What is copied beside the layers costs its bytes, no FLOPs and no launch."""
    law, kernels = np.log([1e14, 0.5, 0.25, 1e12, 1e-6, 1e-9]), plain_kernels(1e12, 1e12, 1e12, 100.0)
    more = kernels.and_bytes(1e12)

    assert (more.flops, more.ops) == (kernels.flops, kernels.ops)
    assert seconds(more, law) - seconds(kernels, law) == pytest.approx(1.0)


# ---- A UNet's layers ------------------------------------------------------------------------------------------------


@given(models, sides_px, st.integers(1, 16))
def test_flops_are_twice_the_macs(profiles: Profiles, model: str, side_px: int, latents: int) -> None:
    """The kernels of an evaluation hold the FLOPs of its layers, for each latent."""
    macs = total_work(unet_layers(profiles.model(model).config, side_px, side_px)).macs

    assert table_of(profiles, model, side_px).kernels(latents).flops == pytest.approx(2 * macs * latents)


@given(models, sides_px, laws)
def test_smaller_batches_and_sizes_lose_efficiency(profiles: Profiles, model: str, side_px: int, law: Floats) -> None:
    """FLOPs a second reached on 1, 2, 4 and 8 latents never fall: weights and launches are shared by more work."""
    table = table_of(profiles, model, side_px)
    reached = [(kernels := table.kernels(latents)).flops / seconds(kernels, law) for latents in (1, 2, 4, 8)]

    assert all(more >= fewer * (1 - 1e-12) for fewer, more in pairwise(reached))


@given(models, sides_px, laws, stripes, st.floats(0.0, 1.0))
def test_a_stripe_takes_more_than_its_share_and_less_than_the_whole(
    profiles: Profiles, model: str, side_px: int, law: Floats, count: int, key_share: float
) -> None:
    """1/N of the rows takes at least 1/N of the seconds, as weights and launches stay; fresh keys alone take less."""
    table = table_of(profiles, model, side_px)
    whole, stripe = table.kernels(2), table.kernels(2, stripe=1 / count)
    partial = table.kernels(2, stripe=1 / count, key_share=key_share)

    assert seconds(whole, law) / count <= seconds(stripe, law) * (1 + 1e-12)
    assert seconds(partial, law) <= seconds(stripe, law) <= seconds(whole, law)


@given(models, sides_px, stripes)
def test_stripes_share_the_image_and_repeat_text_and_time(
    profiles: Profiles, model: str, side_px: int, count: int
) -> None:
    """All stripes together do the whole's FLOPs, and those of the layers without an image once for each stripe."""
    table, layers = table_of(profiles, model, side_px), unet_layers(profiles.model(model).config, side_px, side_px)
    repeated = 2 * total_work(layer for layer in layers if layer.rows == 0).macs
    stripe = table.kernels(1, stripe=1 / count).flops

    assert count * stripe == pytest.approx(table.kernels(1).flops + (count - 1) * repeated)


@given(models, sides_px, st.floats(0.0, 1.0))
def test_a_share_of_the_keys_spares_self_attention_alone(
    profiles: Profiles, model: str, side_px: int, key_share: float
) -> None:
    """Fewer keys take score and value products away from self-attention; nothing else changes."""
    table, layers = table_of(profiles, model, side_px), unet_layers(profiles.model(model).config, side_px, side_px)
    products = 2 * sum(layer.macs for layer in layers if layer.op == "self_attention")
    partial = table.kernels(1, key_share=key_share).flops

    assert partial + (1 - key_share) * products == pytest.approx(table.kernels(1).flops)


@given(models, st.data())
def test_components_together_are_the_whole(profiles: Profiles, model: str, data: st.DataObject) -> None:
    """However the units are dealt out, FLOPs, bytes and launches of the parts sum to the whole's."""
    entry, latents = profiles.model(model), 2
    names = [unit.name for unit in unet_units(entry.config, 512, 512)]
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    parts = [[name for name, owner in zip(names, owners, strict=True) if owner == part] for part in set(owners)]
    table = table_of(profiles, model, 512)
    kernels, whole = [table.kernels(latents, units=part) for part in parts], table.kernels(latents)

    assert sum(part.flops for part in kernels) == pytest.approx(whole.flops)
    assert sum(float(part.executed.sum()) for part in kernels) == pytest.approx(float(whole.executed.sum()))
    assert sum(float(part.bytes.sum()) for part in kernels) == pytest.approx(float(whole.bytes.sum()))
    assert sum(part.ops for part in kernels) == pytest.approx(whole.ops)


def test_the_time_embedding_is_a_unit_that_parts_may_repeat(profiles: Profiles) -> None:
    """It reads no image; every rank computes it, and it is below a thousandth of the FLOPs."""
    table = table_of(profiles, "sdxl", 1024)
    time_embedding = table.kernels(2, units=[TIME_EMBEDDING])

    assert 0 < time_embedding.flops < 1e-3 * table.kernels(2).flops
    assert time_embedding == table.kernels(2, units=[TIME_EMBEDDING], stripe=0.5)


@given(models, sides_px, st.floats(0.5, 4.0), st.floats(0.5, 4.0), st.integers(1, 8))
def test_weights_are_read_once_and_activations_for_each_latent(
    profiles: Profiles, model: str, side_px: int, weight_bytes: float, element_bytes: float, latents: int
) -> None:
    """Bytes are weights at their precision, and activations at theirs times the latents."""
    table, entry = table_of(profiles, model, side_px), profiles.model(model)
    params = total_work(unet_layers(entry.config, side_px, side_px)).params

    def moved(count: int, *, weight_bytes: float = weight_bytes) -> float:
        kernels = table.kernels(count, weight_bytes=weight_bytes, element_bytes=element_bytes)
        return float(kernels.bytes.sum())

    activations = moved(1) - params * weight_bytes
    assert moved(latents) == pytest.approx(params * weight_bytes + latents * activations)
    assert moved(latents, weight_bytes=2 * weight_bytes) == pytest.approx(moved(latents) + params * weight_bytes)


@pytest.mark.parametrize(
    ("model", "side_px", "factors"),
    [("sd15", 512, {1.0, 64 / 40, 96 / 80, 192 / 160}), ("sd21", 768, {1.0}), ("sdxl", 1024, {1.0})],
)
def test_heads_of_a_width_that_is_not_built_are_padded(
    profiles: Profiles, model: str, side_px: int, factors: set[float]
) -> None:
    """SD 1.5's heads of 40, 80 and 160 run as 64, 96 and 192; those of SD 2.1 and SDXL are 64 wide, which is built."""
    table = table_of(profiles, model, side_px)
    padded = {layer.op for layer, factor in zip(table.layers, table.padding, strict=True) if factor > 1}

    assert set(table.padding.tolist()) == factors
    assert padded <= {"self_attention", "cross_attention"}


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([128, 160, 256, 384, 512]))
def test_padding_reaches_the_next_width_and_none_beyond_the_widest(heads: int, channels: int) -> None:
    """Where a built width fits, a head is computed at it; wider heads are computed as they are."""
    config = SMALL | {"block_out_channels": [channels] * 2, "attention_head_dim": heads}
    table, width = layer_table(config, 64, 64), channels / heads
    (factor,) = {p for layer, p in zip(table.layers, table.padding, strict=True) if layer.op.endswith("attention")}

    assert factor * width == next((built for built in HEAD_WIDTHS if built >= width), width)


def test_launches_that_nobody_counted_follow_the_layers(profiles: Profiles) -> None:
    """The share of launches a layer that stands in for a count is near that of every counted UNet."""
    for model in MODELS:
        entry = profiles.model(model)
        guessed = layer_table(entry.config, 512, 512).ops

        assert entry.ops == pytest.approx(guessed, rel=0.1), model


def test_a_network_of_totals_has_its_flops_by_kind() -> None:
    """Where only totals are known each kind is one kernel, run at its own rate."""
    law = np.log([1e14, 0.5, 0.25, 1e12, exp(-30), exp(-30)])

    assert seconds(plain_kernels(1e14, 2e14, 3e14, 1.0), law) == pytest.approx(1 / 0.5 + 2 + 3 / 0.25)
