"""Shaping by a class of networks: what has left when, on a clock of the test's own and once on the real one."""

import asyncio
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from executors.live import Link, sleep_until
from executors.live.shaping import pace_payload
from hybridsd_sim.pricing.pricer import transfer_s

LATEST_S = 0.02
"""How much too late a timer rings at most, on the test's clock."""


class Clock:
    """A clock that moves when somebody sleeps, with timers that ring late, or too early."""

    def __init__(self, errors_s=()):
        self.now_s = 1000.0
        self._errors_s = list(errors_s)

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        error_s = self._errors_s.pop() if self._errors_s else 0.0
        self.now_s += max(seconds + error_s, seconds / 2)


async def heard(data, link, clock, start_s=None, slow_s=0.0):
    """What comes out and when; whoever takes it is `slow_s` about every piece."""
    pieces = []
    async for piece in pace_payload(data, link, start_s=start_s, clock=clock, sleep=clock.sleep):
        pieces.append((clock(), piece))
        clock.now_s += slow_s
    return pieces


links = st.builds(
    Link,
    half_rtt_s=st.floats(0, 1),
    up_bytes_per_s=st.floats(1e3, 1e9),
    down_bytes_per_s=st.floats(1e3, 1e9),
)
late = st.lists(st.floats(-LATEST_S, LATEST_S), max_size=30)


@given(link=links, size=st.integers(1, 300_000), errors_s=late, slow_s=st.sampled_from([0.0, 0.001, 0.1]))
def test_no_more_has_left_than_the_link_carries(link, size, errors_s, slow_s):
    """At time t no more than rate times t - start - half a round trip is out, whatever timers and receivers do."""
    clock, data = Clock(errors_s), bytes(range(256)) * (size // 256 + 1)
    pieces = asyncio.run(heard(data[:size], link, clock, slow_s=slow_s))
    assert b"".join(piece for _, piece in pieces) == data[:size]
    out = 0
    for at_s, piece in pieces:
        out += len(piece)
        assert out <= link.down_bytes_per_s * (at_s - 1000.0 - link.half_rtt_s) * (1 + 1e-9) + 1e-3


@given(link=links, size=st.integers(1, 300_000), errors_s=late)
def test_the_last_byte_comes_when_the_link_has_carried_it(link, size, errors_s):
    """The end is half a round trip and the bytes at the rate, however many pieces and late timers came before."""
    clock = Clock(errors_s)
    last_s = asyncio.run(heard(bytes(size), link, clock))[-1][0]
    due_s = 1000.0 + link.down_s(size)
    assert due_s - 1e-6 <= last_s <= due_s + LATEST_S + 1e-6


@given(link=links, size=st.integers(1, 300_000), ago_s=st.floats(0, 10))
def test_what_was_sent_before_comes_sooner(link, size, ago_s):
    """Data sent a while ago come at the same time of the clock as if somebody had waited for them since then."""
    clock = Clock()
    last_s = asyncio.run(heard(bytes(size), link, clock, start_s=1000.0 - ago_s))[-1][0]
    assert last_s == pytest.approx(max(1000.0, 1000.0 - ago_s + link.down_s(size)), abs=1e-6)


def test_a_receiver_that_pauses_catches_up():
    """The link goes on while nobody listens: what it has carried by then comes without delay."""
    clock = Clock()
    link = Link(half_rtt_s=0.0, up_bytes_per_s=1e5, down_bytes_per_s=1e5)

    async def listen():
        times = []
        async for _ in pace_payload(bytes(100_000), link, clock=clock, sleep=clock.sleep):
            if not times:
                clock.now_s += 0.5
            times.append(clock())
        return times

    times = asyncio.run(listen())
    assert sum(at_s <= 1000.51 for at_s in times) / len(times) == pytest.approx(0.5, abs=0.02)
    assert times[-1] == pytest.approx(1001.0)


def test_on_the_real_clock_nothing_comes_early():
    """With real timers too: nothing before its time, and all of it there."""
    link = Link(half_rtt_s=0.03, up_bytes_per_s=1e6, down_bytes_per_s=1e6)

    async def listen():
        began_s, out = time.monotonic(), 0
        async for piece in pace_payload(bytes(50_000), link):
            out += len(piece)
            assert out <= 1e6 * (time.monotonic() - began_s - 0.03) + 1e-3
        return out, time.monotonic() - began_s

    out, took_s = asyncio.run(listen())
    assert out == 50_000
    assert took_s >= 0.08


def test_until_waits_again_for_timers_that_ring_too_early():
    """A timer that rings at half the time is set again."""
    clock = Clock([-LATEST_S] * 50)
    asyncio.run(sleep_until(1000.1, clock=clock, sleep=clock.sleep))
    assert clock() >= 1000.1


@pytest.mark.parametrize("name", ["lte", "ethernet"])
@given(rate_u=st.floats(0, 1), rtt_u=st.floats(0, 1), count=st.integers(0, 10**7))
def test_a_link_takes_what_the_simulator_charges(profiles, name, rate_u, rtt_u, count):
    """Drawn from a class of networks, a transfer takes exactly the seconds that the simulator puts down for it."""
    network = profiles.network(name)
    link = Link.drawn(network, rate_u=rate_u, rtt_u=rtt_u)
    rtt_s = network.rtt_s.at(rtt_u)
    assert link.down_s(count) == pytest.approx(transfer_s(count, network.down_bytes_per_s.at(rate_u), rtt_s))
    assert link.up_s(count) == pytest.approx(transfer_s(count, network.up_bytes_per_s.at(rate_u), rtt_s))
