"""One request's access network where there is none: half a round trip each way, and bytes no faster than the rate.

What an application can shape are the moments at which bytes are given to the connection; what the machine's own network
takes comes on top of that, and disappears in the half round trip where it is shorter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hybridsd_sim.profiles import Network

Clock = Callable[[], float]

Sleep = Callable[[float], Awaitable[object]]

HalfRtt = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]

Rate = Annotated[float, Field(ge=128, allow_inf_nan=False)]

PIECE_S = 0.005
"""About so many seconds of the link go out at a time: shorter than any round trip, longer than a timer's error."""

SMALLEST_PIECE, LARGEST_PIECE = 256, 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network for as long as one request lasts: seconds of half a round trip, and bytes a second each way."""

    half_rtt_s: HalfRtt
    up_bytes_per_s: Rate
    down_bytes_per_s: Rate

    @classmethod
    def drawn(cls, network: Network, *, rate_u: float = 0.5, rtt_u: float = 0.5) -> Link:
        """The link of a user at these quantiles of a class of networks; by default the median one.

        Both directions have the quantile `rate_u` of their rates; half a round trip is half of the quantile `rtt_u`.
        """
        return cls(
            half_rtt_s=network.rtt_s.at(rtt_u) / 2,
            up_bytes_per_s=network.up_bytes_per_s.at(rate_u),
            down_bytes_per_s=network.down_bytes_per_s.at(rate_u),
        )

    def up_s(self, count: int) -> float:
        """Seconds until the last of `count` bytes sent at once has reached the cloud: latency, then bytes at the rate.

        The simulator charges a transfer by the same formula (`pricing.transfer_s`).
        """
        return self.half_rtt_s + count / self.up_bytes_per_s

    def down_s(self, count: int) -> float:
        """Seconds until the last of `count` bytes sent at once has reached the edge."""
        return self.half_rtt_s + count / self.down_bytes_per_s


async def sleep_until(when_s: float, *, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep) -> None:
    """Wait for a time of the clock; timers that ring too early are set again."""
    while (left_s := when_s - clock()) > 0.0:
        await sleep(left_s)


async def pace_payload(
    data: bytes,
    link: Link,
    *,
    start_s: float | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> AsyncIterator[bytes]:
    """The data in pieces, each at the moment at which its last byte would come out of the link's lower end.

    Sent at `start_s` (None: now), of which at a later time t no more than the rate times t - start_s - half_rtt_s has
    been given out. Whoever takes a piece late gets the next ones without delay until the link's time is caught up with.
    """
    begin_s = (clock() if start_s is None else start_s) + link.half_rtt_s
    rate = link.down_bytes_per_s
    size = min(max(int(rate * PIECE_S), SMALLEST_PIECE), LARGEST_PIECE)
    for first in range(0, len(data), size):
        piece = data[first : first + size]
        await sleep_until(begin_s + (first + len(piece)) / rate, clock=clock, sleep=sleep)
        yield piece
