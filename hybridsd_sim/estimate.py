"""One figure with its doubt: value, interval, kind and sources, which it keeps through sums, factors and maxima.

Whatever the project says of seconds, scores or rates is an `Estimate` from the row that it was read from up to the
report, so that a reader can always ask how well a number is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["measured", "quoted", "modelled"]
"""How a figure is known: timed by the executors, published by somebody else, or derived by a stated rule."""
KIND_ORDER: Mapping[Kind, int] = {"measured": 0, "quoted": 1, "modelled": 2}
"""The better known first."""
NAN = math.nan
Z90 = 1.645
"""Standard deviations from the middle of a normal distribution to either end of its central 90%."""


def weakest(kinds: Iterable[Kind]) -> Kind:
    """The least known of some kinds; `modelled` where there are none."""
    return max(kinds, key=KIND_ORDER.__getitem__, default="modelled")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the ends of its interval; the maker says at which level (90% for costs, 95% for simulated figures).

    `value` is NaN where nobody knows the figure, for the reason in `note`; `low` and `high` are NaN where only the
    interval is unknown. NaN goes through every operation, so that a sum with an unknown term is unknown, never too
    small. `within` is false outside what was measured or published for this device or study.
    """

    value: float
    low: float = NAN
    high: float = NAN
    kind: Kind = "modelled"
    sources: tuple[str, ...] = ()
    note: str = ""
    within: bool = True

    @classmethod
    def exact(cls, value: float, kind: Kind = "modelled", sources: tuple[str, ...] = (), note: str = "") -> Estimate:
        """A figure without doubt: both ends of its interval are the value."""
        return cls(value, value, value, kind, sources, note)

    @classmethod
    def unknown(cls, note: str, kind: Kind = "modelled", sources: tuple[str, ...] = ()) -> Estimate:
        """A figure that nobody knows, and why."""
        return cls(NAN, NAN, NAN, kind, sources, note)

    @classmethod
    def by_factor(
        cls,
        value: float,
        factor: float,
        kind: Kind = "modelled",
        sources: tuple[str, ...] = (),
        note: str = "",
        *,
        within: bool = True,
    ) -> Estimate:
        """A figure that may be too large or too small by up to `factor`, at least 1.

        With `factor = exp(Z90 * s)` that is the 90% interval of a log-normal figure of median `value`, whose logarithm
        has the standard deviation `s`.
        """
        return cls(value, value / factor, value * factor, kind, sources, note, within)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    @property
    def value_or_none(self) -> float | None:
        """The value as JSON and tables write it: None where nobody knows it."""
        return self.value if self.known else None

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    @property
    def interval_or_none(self) -> tuple[float, float] | None:
        """Both ends as JSON and tables write them: None where the interval is unknown."""
        return None if math.isnan(self.low) or math.isnan(self.high) else (self.low, self.high)

    def __add__(self, other: Estimate) -> Estimate:
        """The sum, its interval as wide as if both were at the same end of theirs; as weak as the weaker one."""
        return Estimate(
            self.value + other.value,
            self.low + other.low,
            self.high + other.high,
            weakest((self.kind, other.kind)),
            merged(self.sources, other.sources),
            "; ".join(dict.fromkeys(note for note in (self.note, other.note) if note)),
            self.within and other.within,
        )

    def __mul__(self, factor: float) -> Estimate:
        """So many times the figure, for a factor of at least 0 that is known exactly."""
        if factor == 1:
            return self
        # not `replace`: every price multiplies, and that takes five times as long
        value, low, high = factor * self.value, factor * self.low, factor * self.high
        return Estimate(value, low, high, self.kind, self.sources, self.note, self.within)

    __rmul__ = __mul__

    def maximum(self, other: Estimate) -> Estimate:
        """The larger of two figures: each end is the larger one, all else is that of the figure with the larger value.

        Unknown where one of them is.
        """
        if not self.known or not other.known:
            return self if not self.known else other
        larger, smaller = (self, other) if self.value >= other.value else (other, self)
        return replace(larger, low=max(larger.low, smaller.low), high=max(larger.high, smaller.high))


def merged(*sources: Iterable[str]) -> tuple[str, ...]:
    """All sources, each once, in the order met."""
    return tuple(dict.fromkeys(source for each in sources for source in each))
