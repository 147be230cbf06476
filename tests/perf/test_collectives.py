"""Laws of the exchange between GPUs: how long it takes, how much of it compute can hide, which link carries it."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles
from hybridsd_sim.perf import CONSTANTS, actual_link
from hybridsd_sim.perf.partition import Exchange, RankWork
from hybridsd_sim.perf.roofline import plain_kernels
from hybridsd_sim.perf.stage_time import (
    constants_of,
    exchange_s,
    link_bytes_per_s,
    reused_modules_s,
    unexplained_share,
)
from hybridsd_sim.profiles import Interconnect

NAMES = [constant.name for constant in CONSTANTS]
BELIEVED = np.log([constant.value for constant in CONSTANTS])
KINDS: tuple[Exchange, ...] = ("gather", "stripes", "broadcasts")

exchanges = st.sampled_from(KINDS)
rates = st.floats(1e9, 1e12)
latencies = st.floats(1e-7, 1e-4)
compute_times = st.floats(1e-4, 1.0)
degrees = st.sampled_from([2, 3, 4, 8])


@st.composite
def ranks(draw: st.DrawFn) -> RankWork:
    """What a rank may exchange in a round: any bytes in any messages, some of which block."""
    messages = draw(st.integers(1, 300))
    return RankWork(
        kernels=plain_kernels(0.0, 0.0, 0.0, 100.0),
        latents=2,
        exchange=draw(exchanges),
        received_bytes=draw(st.floats(0.0, 4e9)),
        messages=messages,
        blocking_messages=draw(st.integers(0, messages)),
        window=draw(st.sampled_from([0.0, 1 / 70, 0.5, 1.0])),
    )


def whole_s(rank: RankWork, rate: float, latency_s: float) -> float:
    """All of an exchange, when nothing hides."""
    return exchange_s(replace(rank, window=0.0), rate, latency_s, 1.0, BELIEVED)


def constant(name: str, value: float) -> np.ndarray:
    """The constants as believed, but for one."""
    changed = BELIEVED.copy()
    changed[NAMES.index(name)] = log(value)
    return changed


# ---- Seconds of an exchange -----------------------------------------------------------------------------------------


@given(ranks(), rates, latencies, compute_times)
def test_what_shows_lies_between_nothing_and_all_of_it(
    rank: RankWork, rate: float, latency_s: float, compute_s: float
) -> None:
    """Compute hides some of an exchange, never more than there is, and adds nothing to it."""
    shown, total = exchange_s(rank, rate, latency_s, compute_s, BELIEVED), whole_s(rank, rate, latency_s)

    assert 0.0 <= shown <= total * (1 + 1e-12)


@given(ranks(), rates, latencies, compute_times)
def test_no_more_hides_than_there_is_compute(rank: RankWork, rate: float, latency_s: float, compute_s: float) -> None:
    """A second of compute hides at most a second of exchange: all messages share one link."""
    hidden = whole_s(rank, rate, latency_s) - exchange_s(rank, rate, latency_s, compute_s, BELIEVED)

    assert hidden <= compute_s * (1 + 1e-9)


@given(ranks(), rates, latencies, compute_times)
def test_without_a_window_everything_shows(rank: RankWork, rate: float, latency_s: float, compute_s: float) -> None:
    """Bytes over the rate, and for each message the latency, and for stripes what packing and waiting cost."""
    overhead_s = np.exp(BELIEVED[NAMES.index("message_s")]) if rank.exchange == "stripes" else 0.0
    expected = rank.received_bytes / rate + rank.messages * (latency_s + overhead_s)

    assert exchange_s(replace(rank, window=0.0), rate, latency_s, compute_s, BELIEVED) == pytest.approx(expected)


@given(ranks(), rates, latencies, compute_times)
def test_blocking_messages_show_whole(rank: RankWork, rate: float, latency_s: float, compute_s: float) -> None:
    """Where everybody waits for every message, a window hides nothing; the fewer block, the less shows."""
    blocked = [replace(rank, blocking_messages=count) for count in (rank.messages, rank.messages // 2, 0)]
    shown = [exchange_s(some, rate, latency_s, compute_s, BELIEVED) for some in blocked]

    assert shown[0] == pytest.approx(whole_s(rank, rate, latency_s))
    assert shown[0] >= shown[1] * (1 - 1e-12)
    assert shown[1] >= shown[2] * (1 - 1e-12)


@given(ranks(), rates, latencies, compute_times, st.floats(1.0, 10.0))
def test_more_traffic_or_a_worse_link_never_shows_less(
    rank: RankWork, rate: float, latency_s: float, compute_s: float, factor: float
) -> None:
    """More bytes, a slower link, a longer latency and less compute to hide behind: none makes an exchange shorter."""
    shown = exchange_s(rank, rate, latency_s, compute_s, BELIEVED)
    more = replace(rank, received_bytes=rank.received_bytes * factor)
    worse = [
        exchange_s(more, rate, latency_s, compute_s, BELIEVED),
        exchange_s(rank, rate / factor, latency_s, compute_s, BELIEVED),
        exchange_s(rank, rate, latency_s * factor, compute_s, BELIEVED),
        exchange_s(rank, rate, latency_s, compute_s / factor, BELIEVED),
    ]

    assert min(worse) >= shown * (1 - 1e-9)


@given(ranks(), rates, latencies, compute_times)
def test_a_longer_window_hides_more(rank: RankWork, rate: float, latency_s: float, compute_s: float) -> None:
    """Behind a whole step hides no less than behind one interval between attentions."""
    shown = [
        exchange_s(replace(rank, window=window), rate, latency_s, compute_s, BELIEVED) for window in (0.0, 1 / 70, 1.0)
    ]

    assert shown[0] >= shown[1] * (1 - 1e-12)
    assert shown[1] >= shown[2] * (1 - 1e-12)


@given(ranks(), rates, latencies, st.floats(0.01, 1.0))
def test_the_hidden_share_is_that_of_what_may_hide(rank: RankWork, rate: float, latency_s: float, share: float) -> None:
    """With compute in plenty, just this part of the messages that do not block, and of all bytes, disappears."""
    free = replace(rank, window=1.0, blocking_messages=0)
    shown = exchange_s(free, rate, latency_s, 1e6, constant("hidden_share", share))

    assert shown == pytest.approx((1 - share) * whole_s(rank, rate, latency_s))


def test_no_messages_take_no_time() -> None:
    """A rank that talks to nobody waits for nobody."""
    silent = RankWork(kernels=plain_kernels(1.0, 1.0, 1.0, 1.0), latents=2)

    assert exchange_s(silent, 1e9, 1.0, 1.0, BELIEVED) == 0.0


# ---- The rate of a link ---------------------------------------------------------------------------------------------


def link(*, scales: bool, bandwidth: float = 1e10) -> Interconnect:
    """An interconnect, switch or shared bus."""
    return Interconnect(
        name="link", label="Link", bandwidth_bytes_per_s=bandwidth, bandwidth_low=bandwidth / 2,
        bandwidth_high=2 * bandwidth, latency_s=1e-5, peer_access=True, scales_with_devices=scales,
        kind="modelled", source="made up", source_date="2026",
    )  # fmt: skip


@given(ranks(), degrees)
def test_a_switch_serves_every_pair_at_once_and_a_bus_shares(rank: RankWork, degree: int) -> None:
    """On a switch the number of GPUs does not matter; on a bus gathers among many are slower, never faster."""
    switch, bus = link(scales=True), link(scales=False)
    pair = link_bytes_per_s(switch, rank, 2, BELIEVED)

    assert link_bytes_per_s(switch, rank, degree, BELIEVED) == pair
    assert link_bytes_per_s(bus, rank, 2, BELIEVED) == pair
    assert link_bytes_per_s(bus, rank, degree, BELIEVED) <= pair


def test_a_bus_slows_gathers_as_was_measured() -> None:
    """PCIe 5.0 reaches 54 GB/s between two GPUs, 35 among four and 28 among eight (NVIDIA/nccl#1639)."""
    bus = link(scales=False, bandwidth=54e9)
    gather = RankWork(kernels=plain_kernels(0, 0, 0, 1), latents=2, exchange="gather", messages=1)
    rates_reached = {degree: link_bytes_per_s(bus, gather, degree, BELIEVED) for degree in (2, 4, 8)}

    assert rates_reached == pytest.approx({2: 54e9, 4: 35e9, 8: 28e9}, rel=0.1)


@given(st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_a_broadcast_has_one_sender_at_a_time(degree: int, scales: bool) -> None:
    """Whole activations travel at the link's rate, switch or bus, however many listen."""
    rank = RankWork(kernels=plain_kernels(0, 0, 0, 1), latents=2, exchange="broadcasts", messages=1)
    share = np.exp(BELIEVED[NAMES.index("broadcasts_link_share")])

    assert link_bytes_per_s(link(scales=scales), rank, degree, BELIEVED) == pytest.approx(share * 1e10)


@given(ranks(), degrees, st.booleans(), st.floats(0.1, 1.0))
def test_many_small_gathers_reach_a_share_of_the_link(rank: RankWork, degree: int, scales: bool, share: float) -> None:
    """Stripes reach their share of what one gather reaches, whatever the link."""
    small, one = (
        link_bytes_per_s(
            link(scales=scales), replace(rank, exchange=kind), degree, constant("stripes_link_share", share)
        )
        for kind in ("stripes", "gather")
    )

    assert small == pytest.approx(share * one)


def test_a_bridge_joins_two_cards_and_more_meet_on_pcie(profiles: Profiles) -> None:
    """AsyncDiff's A5000 talk over NVLink in pairs, and over PCIe as soon as there are three of them."""
    assert actual_link(profiles, "nvlink-bridge", 2).name == "nvlink-bridge"
    assert {actual_link(profiles, "nvlink-bridge", degree).name for degree in (3, 4, 8)} == {"pcie4"}


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_what_has_no_pairs_carries_everybody(profiles: Profiles, degree: int) -> None:
    """A switch and a bus are the same link for every number of GPUs."""
    for name, known in profiles.interconnects.items():
        if known.beyond_pairs is None:
            assert actual_link(profiles, name, degree) is known


def test_every_link_falls_back_to_one_that_exists_and_is_slower(profiles: Profiles) -> None:
    """A bridge without the cards to join is never the faster choice."""
    for known in profiles.interconnects.values():
        if known.beyond_pairs is not None:
            below = profiles.interconnect(known.beyond_pairs)
            assert below.beyond_pairs is None
            assert below.bandwidth_bytes_per_s < known.bandwidth_bytes_per_s


# ---- Constants ------------------------------------------------------------------------------------------------------


def test_constants_are_the_fitted_ones_and_else_what_was_believed(profiles: Profiles) -> None:
    """A fitted row replaces the start; without rows everything is as believed, less surely."""
    fitted, doubts = constants_of(profiles)
    bare = replace(profiles, constants={})
    believed, first_doubts = constants_of(bare)

    assert np.exp(fitted) == pytest.approx([profiles.constants[name].value for name in NAMES])
    assert believed == pytest.approx(BELIEVED)
    assert all(np.diag(doubts) <= np.diag(first_doubts))
    assert unexplained_share(bare) > unexplained_share(profiles) > 0


@given(st.floats(0.0, 5000.0), st.floats(1e-6, 1e-4))
def test_walks_cost_the_host_a_share_of_its_launches(ops: float, launch_s: float) -> None:
    """Cached modules cost their launches times the share; without any nothing."""
    rank = RankWork(kernels=plain_kernels(0, 0, 0, 1.0), latents=2, reused_ops=ops)
    share = np.exp(BELIEVED[NAMES.index("walk_share")])

    assert reused_modules_s(rank, launch_s, BELIEVED) == pytest.approx(ops * launch_s * share)
