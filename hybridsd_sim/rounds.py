"""One round of a gang as a function of everything it rests on, and from that how sure its seconds are.

A round takes as long as its slowest rank: the rank's kernels under the device's law (`calibration`), AsyncDiff's walks,
and the part of the exchange that stays visible (`transfers`). Its interval follows from the covariance of the device's
parameters, the spread of the method constants and of the link, and what the law left unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt

import numpy as np

from hybridsd_sim.calibration import Z90, Fit, call_kernels, calls
from hybridsd_sim.partition import RankWork
from hybridsd_sim.profiles import CostRow, Interconnect, Profiles
from hybridsd_sim.roofline import Batch, Floats
from hybridsd_sim.transfers import (
    constants_of,
    contention,
    exchange_s,
    link_bytes_per_s,
    unexplained_share,
    walk_s,
)

_STEP = 1e-4
"""Nudge of a logarithm in numeric derivatives."""


class Round:
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
        self._law, self._middle_s = fit.law, self._computed_s(fit.law)
        constants, doubts = profiles.memory.recall("constants", None, lambda: constants_of(profiles))
        self.middle: Floats = np.concatenate([fit.law, constants, [0.0]])
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
            busy, shown = compute + walk_s(rank, exp(law[-1]), constants), 0.0
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
