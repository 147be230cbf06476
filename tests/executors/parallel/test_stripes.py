"""A layer on a stripe against the same layer on the whole image, put together by hand from two steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from executors.parallel import Group, run_ranks
from executors.parallel.distrifusion import (
    TENSORS_PER_MESSAGE,
    Convolution,
    KeysOfAll,
    Normalisation,
    StaleExchange,
    register,
)
from executors.parallel.pcpp import KeysOfNeighbours, NeighbourExchange

RANKS, ROWS, CHANNELS = 3, 4, 64
"""Three stripes of four rows: the middle one has two neighbours."""


def drawn(seed: int, *shape: int) -> Tensor:
    """Seeded numbers, away from zero in the mean so that moments matter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


IMAGES = [drawn(seed, 2, CHANNELS, RANKS * ROWS, 8) for seed in range(3)]
TOKENS = [drawn(seed, 2, RANKS * 10, CHANNELS) for seed in range(3)]


def part_of(whole: Tensor, rank: int, dim: int) -> Tensor:
    """A rank's stripe of an image (dim 2) or of its tokens (dim 1)."""
    return whole.chunk(RANKS, dim)[rank]


def mixed(now: Tensor, before: Tensor, rank: int, dim: int) -> Tensor:
    """What a rank works on: its own part as it is now, the others' as they were one step before."""
    parts = list(before.chunk(RANKS, dim))
    parts[rank] = part_of(now, rank, dim)
    return torch.cat(parts, dim)


def outputs(group: Group, layer: nn.Module, hook_of, inputs: list[Tensor], dim: int) -> list[Tensor]:
    """What a hooked layer gives on this rank's parts, step after step; the first step is synchronous."""
    exchange = StaleExchange(group)
    module = copy_of(layer)
    register(module, hook_of(exchange))
    seen = []
    for step, whole in enumerate(inputs):
        exchange.synchronous = step == 0
        with torch.inference_mode():
            seen.append(module(part_of(whole, group.rank, dim)))
        exchange.flush()
    return seen


def copy_of(layer: nn.Module) -> nn.Module:
    """The layer again, with hooks of its own."""
    import copy

    return copy.deepcopy(layer)


def seeded(layer: nn.Module) -> nn.Module:
    """The layer with seeded weights."""
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(100 + index, *parameter.shape) * 0.1
    return layer.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_sees_stale_rows_beyond_its_edges(stride, channels_last):
    """A stripe's rows are those of the convolution over own fresh rows between the others' of the step before."""
    layer = seeded(nn.Conv2d(CHANNELS, 32, 3, stride=stride, padding=1))
    images = [image.contiguous(memory_format=torch.channels_last) for image in IMAGES] if channels_last else IMAGES
    ranks = run_ranks(outputs, RANKS, args=(layer, lambda exchange: Convolution("conv", exchange), images, 2))
    for rank, seen in enumerate(ranks):
        for step, ours in enumerate(seen):
            image = mixed(images[step], images[max(step - 1, 0)], rank, 2)
            torch.testing.assert_close(ours, part_of(layer(image), rank, 2))
            assert ours.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_self_attention_sees_stale_keys_of_the_others():
    """The keys of the whole image: own fresh ones in their place among the others' of the step before."""
    layer = seeded(nn.Linear(CHANNELS, 48, bias=False))
    ranks = run_ranks(outputs, RANKS, args=(layer, lambda exchange: KeysOfAll("to_k", exchange), TOKENS, 1))
    for rank, seen in enumerate(ranks):
        for step, ours in enumerate(seen):
            tokens = mixed(TOKENS[step], TOKENS[max(step - 1, 0)], rank, 1)
            torch.testing.assert_close(ours, layer(tokens))


@pytest.mark.parametrize("whole_stripes", [False, True])
@pytest.mark.parametrize("partial", [0.0, 0.3, 1.0])
def test_pcpp_sees_the_near_ends_of_its_neighbours(partial, whole_stripes):
    """Stale tail of the stripe above, the own stripe, stale head of the one below; nothing beyond the border."""
    layer, used = seeded(nn.Linear(CHANNELS, 48, bias=False)), round(10 * partial)
    for rank, seen in enumerate(run_ranks(neighbour_keys, RANKS, args=(layer, partial, whole_stripes))):
        torch.testing.assert_close(seen[0], layer(TOKENS[0]))
        for step in (1, 2):
            before, own = TOKENS[step - 1].chunk(RANKS, 1), part_of(TOKENS[step], rank, 1)
            above = [before[rank - 1][:, 10 - used :]] if rank > 0 else []
            below = [before[rank + 1][:, :used]] if rank + 1 < RANKS else []
            torch.testing.assert_close(seen[step], layer(torch.cat([*above, own, *below], dim=1)))


def neighbour_keys(group: Group, layer: nn.Module, partial: float, whole_stripes: bool) -> list[Tensor]:
    """A projection with PCPP's hook on this rank's tokens, step after step; the first step is synchronous."""

    class Settings:
        """What the hook asks its denoiser."""

        def __init__(self) -> None:
            self.partial = partial

        def sent_tokens(self, tokens: int) -> int:
            return tokens if whole_stripes else round(tokens * partial)

    everyone, ends, module = StaleExchange(group), NeighbourExchange(group), copy_of(layer)
    register(module, KeysOfNeighbours("to_k", everyone, ends, Settings()))
    seen = []
    for step, whole in enumerate(TOKENS):
        everyone.synchronous = step == 0
        with torch.inference_mode():
            seen.append(module(part_of(whole, group.rank, 1)))
        ends.flush()
    return seen


# ---- GroupNorm ------------------------------------------------------------------------------------------------------


def moments(stripe: Tensor) -> Tensor:
    """Mean and mean of squares of every group, in double precision."""
    groups = stripe.double().reshape(stripe.shape[0], 32, -1)
    return torch.stack([groups.mean(2), groups.square().mean(2)])


def normalised(stripe: Tensor, mean: Tensor, variance: Tensor, layer: nn.GroupNorm) -> Tensor:
    """GroupNorm by its definition, with moments from elsewhere."""
    groups = stripe.double().reshape(stripe.shape[0], 32, -1)
    flat = (groups - mean[..., None]) / (variance[..., None] + layer.eps).sqrt()
    shape = (1, -1, *(1 for _ in stripe.shape[2:]))
    return (flat.view(stripe.shape) * layer.weight.view(shape) + layer.bias.view(shape)).float()


def known_moments(mode: str, images: list[Tensor], step: int, rank: int) -> Tensor:
    """The moments that a mode uses at a step, from those of every stripe now and one step before."""
    now = torch.stack([moments(part_of(images[step], other, 2)) for other in range(RANKS)])
    if step == 0 or mode in {"full_sync", "sync_gn"}:
        return now.mean(0)
    if mode in {"separate_gn", "no_sync"}:
        return now[rank]
    before = torch.stack([moments(part_of(images[step - 1], other, 2)) for other in range(RANKS)])
    if mode == "corrected_async_gn":
        return before.mean(0) + now[rank] - before[rank]
    before[rank] = now[rank]
    return before.mean(0)


@pytest.mark.parametrize("mode", ["full_sync", "sync_gn", "corrected_async_gn", "stale_gn", "separate_gn", "no_sync"])
def test_group_norm_uses_the_moments_of_its_mode(mode):
    """The six modes: fresh of all, stale of all corrected by the own change, stale with own fresh, own alone."""
    layer = seeded(nn.GroupNorm(32, CHANNELS))
    hook = {"hook_of": lambda exchange: Normalisation("norm", exchange, mode)}
    for rank, seen in enumerate(run_ranks(outputs, RANKS, args=(layer, hook["hook_of"], IMAGES, 2))):
        for step, ours in enumerate(seen):
            mean, square = known_moments(mode, IMAGES, step, rank)
            wanted = normalised(part_of(IMAGES[step], rank, 2), mean, square - mean**2, layer)
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_corrected_variance_below_zero_gives_way_to_the_stripes_own():
    """A stripe that was wild and is calm now would correct the stale variance below zero; its own is used instead."""
    layer = seeded(nn.GroupNorm(32, CHANNELS))
    wild = IMAGES[0].clone()
    wild[:, :, :ROWS] *= 30
    images = [wild, IMAGES[1]]
    hook_of = lambda exchange: Normalisation("norm", exchange, "corrected_async_gn")  # noqa: E731
    ours = run_ranks(outputs, RANKS, args=(layer, hook_of, images, 2))[0][1]
    mean, square = known_moments("corrected_async_gn", images, 1, 0)
    assert (square - mean**2 < 0).all()
    own_mean, own_square = moments(part_of(images[1], 0, 2))
    wanted = normalised(part_of(images[1], 0, 2), mean, own_square - own_mean**2, layer)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)


def test_bfloat16_is_rounded_once():
    """Moments and factors are float32, so a gathered GroupNorm in bfloat16 is torch's own within one rounding."""
    layer = seeded(nn.GroupNorm(32, CHANNELS)).bfloat16()
    images = [(image + 20).bfloat16() for image in IMAGES]
    hook_of = lambda exchange: Normalisation("norm", exchange, "full_sync")  # noqa: E731
    for rank, seen in enumerate(run_ranks(outputs, RANKS, args=(layer, hook_of, images, 2))):
        wanted = part_of(layer.float()(images[0].float()), rank, 2)
        torch.testing.assert_close(seen[0].float(), wanted, rtol=2**-7, atol=2**-8)


# ---- The exchange ---------------------------------------------------------------------------------------------------


def swap_steps(group: Group, tensors: int, steps: int, synchronous: int, frozen: bool) -> list[list[list[float]]]:
    """What `swap` gives a rank, by step, tensor and sender; tensors say their step and rank."""
    exchange, seen = StaleExchange(group, frozen=frozen), []
    for step in range(steps):
        exchange.synchronous = step < synchronous
        dtypes = [torch.float32, torch.float16]
        own = [torch.full((2,), 100.0 * step + group.rank, dtype=dtypes[index % 2]) for index in range(tensors)]
        swapped = [exchange.swap(f"layer {index}", tensor) for index, tensor in enumerate(own)]
        seen.append([[float(tensor[0]) for tensor in everyone] for everyone in swapped])
        exchange.flush()
    return seen


@settings(max_examples=25)
@given(
    tensors=st.integers(1, 2 * TENSORS_PER_MESSAGE + 3),
    size=st.integers(2, 4),
    synchronous=st.integers(1, 3),
    frozen=st.booleans(),
)
def test_what_is_swapped_is_exactly_one_step_old(tensors, size, synchronous, frozen):
    """Others' tensors are fresh in synchronous steps, then one step old, or frozen at the last synchronous one."""
    for rank, seen in enumerate(run_ranks(swap_steps, size, args=(tensors, 5, synchronous, frozen))):
        for step, layers in enumerate(seen):
            age = step if step < synchronous else synchronous - 1 if frozen else step - 1
            wanted = [100.0 * (step if sender == rank else age) + sender for sender in range(size)]
            assert layers == [wanted] * tensors
