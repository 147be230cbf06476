"""Seconds of one collective step of a worker group: what its ranks compute, what they exchange, and how sure that is.

A step takes as long as its slowest rank: the rank's kernels under the device fit, the modules whose cached outputs
AsyncDiff only hands on, and the part of the exchange that compute does not hide. Its interval follows from the
covariance of the device's parameters, the spread of the method constants and of the interconnect, and what the fit left
unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from hybridsd_sim.estimate import Z90
from hybridsd_sim.perf.device_fit import Fit, call_kernels, calls
from hybridsd_sim.perf.partition import RankWork
from hybridsd_sim.perf.roofline import Batch, Floats
from hybridsd_sim.profiles import CostRow, Interconnect, Profiles, derived


@dataclass(frozen=True, slots=True)
class Constant:
    """What a parallel method costs beside compute and bytes, the same on every device: where the fit starts.

    `value` and `spread` (standard deviation of the logarithm) are beliefs: orders of magnitude of NCCL calls, copies
    and hooks, chosen by people who had seen the published tables. Other centres, or spreads three times as wide, leave
    the held-out errors below 5%.
    """

    name: str
    value: float
    spread: float
    meaning: str


CONSTANTS = (
    Constant("message_s", 3e-5, 1.0, "seconds a layer's exchange costs a rank beside the link: pack, post, wait"),
    Constant("hidden_share", 0.5, 0.5, "part of an asynchronous exchange that hides behind compute"),
    Constant("stripes_link_share", 0.6, 0.5, "part of the link's bandwidth that many small gathers reach"),
    # The catalogue's bandwidths were measured with messages of this size, hence so little doubt.
    Constant("broadcasts_link_share", 1.0, 0.08, "part of the link's bandwidth that whole activations reach"),
    Constant("walk_share", 0.1, 1.0, "part of a launch that a cached module costs the host"),
)
"""The method constants, in the order of every vector of them."""

_NAMES = tuple(constant.name for constant in CONSTANTS)


@derived()
def constants_of(profiles: Profiles) -> tuple[Floats, Floats]:
    """Natural logarithms of the method constants as fitted and their covariance; where none was, as believed before."""
    rows = [profiles.constants.get(constant.name) for constant in CONSTANTS]
    values = [row.value if row else start.value for row, start in zip(rows, CONSTANTS, strict=True)]
    spreads = [row.spread if row else start.spread for row, start in zip(rows, CONSTANTS, strict=True)]
    return np.log(values), np.diag(np.square(spreads))


def unexplained_share(profiles: Profiles) -> float:
    """Standard deviation that published multi-GPU times keep around the model, relative; 10% before any were seen."""
    row = profiles.constants.get("unexplained_share")
    return row.value if row else 0.10


def contention(profiles: Profiles, link: Interconnect | None, device: str) -> tuple[float, float]:
    """By how much ranks of one machine's CPU slow each other's compute, and the spread of its logarithm."""
    shared = link is not None and link.shares_memory and device not in profiles.gpus
    row = profiles.constants.get("contention") if shared else None
    return (row.value, row.spread) if row else (1.0, 0.0)


def link_bytes_per_s(link: Interconnect, rank: RankWork, degree: int, constants: Floats) -> float:
    """Bytes a second that one rank receives in this kind of exchange.

    Over a shared bus, gathers of more than two GPUs slow down with the square root of their number (PCIe 5.0: 54 GB/s
    between two, 35 among four, 28 among eight; NVIDIA/nccl#1639); a broadcast has one sender at a time.
    """
    bandwidth = link.bandwidth_bytes_per_s
    if rank.exchange == "broadcasts":
        return bandwidth * exp(constants[_NAMES.index("broadcasts_link_share")])
    shared = 1.0 if link.scales_with_devices else min(1.0, sqrt(2.0 / degree))
    small = exp(constants[_NAMES.index("stripes_link_share")]) if rank.exchange == "stripes" else 1.0
    return bandwidth * shared * small


def exchange_s(rank: RankWork, bytes_per_s: float, latency_s: float, compute_s: float, constants: Floats) -> float:
    """Seconds of a round's exchange that its compute does not hide.

    Blocking messages show whole. Of the others a share hides, each up to its `window` of the compute, and all of them
    up to the compute itself: they share one link.
    """
    if rank.messages == 0:
        return 0.0
    message_s = latency_s + (exp(constants[_NAMES.index("message_s")]) if rank.exchange == "stripes" else 0.0)
    total = rank.received_bytes / bytes_per_s + rank.messages * message_s
    free = rank.messages - rank.blocking_messages
    if rank.window == 0.0 or free == 0:
        return total
    hideable = total - rank.blocking_messages * message_s
    share = min(1.0, exp(constants[_NAMES.index("hidden_share")]))
    return total - min(share * hideable, min(1.0, free * rank.window) * compute_s)


def reused_modules_s(rank: RankWork, launch_s_per_op: float, constants: Floats) -> float:
    """Seconds in which the host walks over modules that only hand their cached outputs on (AsyncDiff)."""
    return rank.reused_ops * launch_s_per_op * exp(constants[_NAMES.index("walk_share")])


def actual_link(profiles: Profiles, name: str, degree: int) -> Interconnect:
    """The interconnect that carries a gang of `degree` GPUs: a bridge joins two cards, more meet on the bus below."""
    link = profiles.interconnect(name)
    return profiles.interconnect(link.beyond_pairs) if link.beyond_pairs and degree > 2 else link


_STEP = 1e-4
"""Nudge of a logarithm in numeric derivatives."""


class CollectiveStep:
    """One round of a phase as a function of everything it rests on, each as a logarithm.

    The vector holds the device's law, then the method constants, then the link's bandwidth relative to its middle.
    """

    def __init__(
        self,
        ranks: Sequence[RankWork],
        fit: Fit,
        anchor: tuple[CostRow, float] | None,
        link: Interconnect | None,
        degree: int,
        profiles: Profiles,
    ) -> None:
        self.ranks, self.link, self.degree = ranks, link, degree
        row, level_spread = anchor or (None, fit.sigma)
        whole = [call_kernels(profiles, row)] if row else []
        self._anchor_s = row.seconds_median / calls(profiles, row.runtime, row.latents) if row else None
        self._batch = Batch([*whole, *(rank.kernels for rank in ranks)])
        self._law, self._middle_s = fit.log_parameters, self._computed_s(fit.log_parameters)
        constants, doubts = constants_of(profiles)
        self.middle: Floats = np.concatenate([fit.log_parameters, constants, [0.0]])
        link_spread = log(link.bandwidth_high / link.bandwidth_low) / (2 * Z90) if link else 0.0
        self._covariance = _blocks(fit.covariance, doubts, np.array([[link_spread**2]]))
        self._slower, doubt = contention(profiles, link, fit.device)
        self._noise = sqrt(level_spread**2 + doubt**2 + (unexplained_share(profiles) ** 2 if link else 0.0))

    def seconds(self, vector: Floats) -> tuple[float, float]:
        """Seconds of the slowest rank, and those of its exchange that show."""
        law, constants, width = self._split(vector)
        times = self._middle_s if (law == self._law).all() else self._computed_s(law)
        slowest = (0.0, 0.0)
        for rank, compute in zip(self.ranks, (times * self._slower).tolist(), strict=True):
            busy, shown = compute + reused_modules_s(rank, exp(law[-1]), constants), 0.0
            if self.link:
                rate = link_bytes_per_s(self.link, rank, self.degree, constants) * exp(width[0])
                shown = exchange_s(rank, rate, self.link.latency_s, compute, constants)
            slowest = max(slowest, (busy + shown, shown))
        return slowest

    def _split(self, vector: Floats) -> tuple[Floats, Floats, Floats]:
        """The device's law, the method constants, and the link's relative bandwidth."""
        return vector[: len(self._law)], vector[len(self._law) : -1], vector[-1:]

    def _computed_s(self, law: Floats) -> Floats:
        """Seconds that each rank computes under a law."""
        times = self._batch.seconds(law)
        return times[1:] * (self._anchor_s / times[0]) if self._anchor_s else times

    def seconds_with(self, constants: Floats) -> float:
        """Seconds with other method constants (logarithms), all else in its middle."""
        law, _, width = self._split(self.middle)
        return self.seconds(np.concatenate([law, constants, width]))[0]

    def log_spread(self) -> float:
        """Standard deviation of the logarithm of the round's seconds."""
        middle = self.seconds(self.middle)[0]
        nudges = np.eye(len(self.middle)) * _STEP
        gradient = np.array([log(self.seconds(self.middle + nudge)[0] / middle) for nudge in nudges]) / _STEP
        return sqrt(float(gradient @ self._covariance @ gradient) + self._noise**2)


def _blocks(*parts: Floats) -> Floats:
    """A covariance of independent groups."""
    size = sum(len(part) for part in parts)
    whole, at = np.zeros((size, size)), 0
    for part in parts:
        whole[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    return whole
