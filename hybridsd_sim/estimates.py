"""Figures with 95% intervals from runs whose requests depend on each other, and areas under step functions of time.

Requests that follow each other share a queue, so intervals come from cells of time and not from requests. The
half-width is Student's t times the standard error of a ratio of sums over the cells (Cochran, Sampling Techniques, 3rd
ed., section 6.3). For cells of equal size that is the classical method of batch means, or of independent replications
(Law, Simulation Modeling and Analysis, 5th ed., section 9.5); where cells are unequal, as on a day with peaks, it stays
right. What cannot be estimated is NaN, never 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

NAN = math.nan
CONFIDENCE = 0.95
"""Level of every interval."""


class Estimate(NamedTuple):
    """A figure and its 95% interval; NaN where it cannot be estimated."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(NAN, NAN, NAN)


def student(freedom: int) -> float:
    """Student's t for the two-sided interval, by degrees of freedom."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def half_width(residual: np.ndarray, cells: int, total: float) -> float:
    """Student's t times the standard error of a ratio of sums, from each cell's deviation; NaN below two cells."""
    if cells < 2:
        return NAN
    return student(cells - 1) * math.sqrt(cells / (cells - 1) * float(residual @ residual)) / total


def ratio(top: np.ndarray, bottom: np.ndarray, ceiling: float = math.inf) -> Estimate:
    """Sum over sum, both given by cell, between 0 and a ceiling; cells with nothing below the line say nothing."""
    total = float(bottom.sum())
    if not total > 0:
        return UNKNOWN
    value = float(top.sum()) / total
    half = half_width(top - value * bottom, int(np.count_nonzero(bottom)), total)
    low, high = np.clip([value - half, value + half], 0.0, ceiling)  # unlike max and min, clip keeps NaN
    return Estimate(value, float(low), float(high))


def rate(count: np.ndarray, seconds: np.ndarray) -> Estimate:
    """Counted per second; what never happened has a rate of 0 and no interval."""
    found = ratio(count, seconds)
    return found if count.any() else Estimate(found.value, NAN, NAN)


def share(count: np.ndarray, total: np.ndarray) -> Estimate:
    """A share of requests. None or all of n do not vary between cells; there the interval is the exact binomial one.

    Clopper and Pearson, Biometrika 26 (1934): with 0 or n of n the far end leaves a tail of (1 - confidence) / 2.
    """
    found = ratio(count, total, 1.0)
    reach = ((1 - CONFIDENCE) / 2) ** (1 / max(float(total.sum()), 1.0))
    if found.value == 0.0:
        return Estimate(0.0, 0.0, 1.0 - reach)
    return Estimate(1.0, reach, 1.0) if found.value == 1.0 else found


def quantile(ordered: np.ndarray, cell: np.ndarray, p: float) -> Estimate:
    """A quantile of sorted values, each from a cell. An end of the interval that lies beyond the data is NaN.

    Woodruff, J. Am. Stat. Assoc. 47 (1952): the interval of the share of values below the quantile, turned back into
    values. The share is taken with and without the values equal to the quantile, and the wider interval counts.
    """
    if not len(ordered):
        return UNKNOWN
    value = value_at(ordered, p)
    sizes = np.bincount(cell)
    halves = []
    for below in (int(np.searchsorted(ordered, value, side)) for side in ("left", "right")):
        residual = np.bincount(cell[:below], minlength=len(sizes)) - below / len(ordered) * sizes
        halves.append(half_width(residual, int(np.count_nonzero(sizes)), len(ordered)))
    half = max(halves)
    return Estimate(value, value_at(ordered, p - half), value_at(ordered, p + half))


def value_at(ordered: np.ndarray, p: float) -> float:
    """The value at a share p of sorted values, between neighbours by a straight line; NaN outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        return NAN
    position = p * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def area(begin_s: np.ndarray, end_s: np.ndarray, weight: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Weight times time of the spans `[begin, end)` between each two edges; NaN: never begun, or not yet ended."""
    begun = ~np.isnan(begin_s)
    ended = begun & ~np.isnan(end_s)
    return np.diff(_ramp(begin_s[begun], weight[begun], edges_s) - _ramp(end_s[ended], weight[ended], edges_s))


def _ramp(times_s: np.ndarray, weight: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Sum of weight times the seconds that each time lies before an edge, for every edge; one pass and no sorting."""
    size = len(edges_s)
    first = np.searchsorted(edges_s, times_s)
    weights = np.bincount(first, weight, size + 1)[:size].cumsum()
    moments = np.bincount(first, weight * times_s, size + 1)[:size].cumsum()
    return np.asarray(edges_s * weights - moments)
