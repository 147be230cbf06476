"""One figure with its uncertainty: value, interval, kind and sources, which it keeps through sums, factors and maxima.

What the project says of seconds, scores and rates is an `Estimate` from the row that it was read from up to the price
of a plan, and again where simulation summarises; a candidate and the event loop carry its value alone. So a reader of a
report can always ask how well a number is known.

And how figures are written for people, everywhere the same (`number`, `exact`, `percent`, `score`, `money`, `signed`,
`interval`, `scaled`): in the terminal, on pages and in sentences. JSON and tables keep all digits instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

    >>> unet = Estimate(0.30, 0.27, 0.33, "measured", ("profiles/measured/cpu-2core",))
    >>> decoder = Estimate.by_factor(0.10, 1.5)
    >>> both = 2 * unet + decoder
    >>> both.kind, round(both.value, 3), round(both.low, 3), round(both.high, 3)
    ('modelled', 0.7, 0.607, 0.81)
    >>> (unet + Estimate.unknown("nobody timed it")).known
    False
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
        """A figure without uncertainty: both ends of its interval are the value."""
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


# ---- How figures are written ----------------------------------------------------------------------------------------

DASH, MINUS = "\N{EM DASH}", "\N{MINUS SIGN}"
SIGNIFICANT = 3
"""Digits of a computed figure: costs and simulations are seldom known to more."""
PREFIXES = (
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "\N{MICRO SIGN}"),
    (1e-9, "n"),
)
Show = Callable[[float | None], str]
"""How a figure of one sort is written; None and NaN are a dash."""


def number(value: float | None, digits: int = SIGNIFICANT) -> str:
    """A computed figure: three significant digits with separated thousands; whole numbers (`int`) in full.

    Only what is smaller than 0.00001 has an exponent.

    >>> number(0.28871), number(1234.5), number(12), number(float("nan"))
    ('0.289', '1,230', '12', '—')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if int(exponent) < -5:
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS, value < 0)
    rounded = float(f"{mantissa}e{exponent}")
    return f"{rounded:,.{max(0, digits - 1 - int(exponent))}f}".replace("-", MINUS)


def exact(value: float | None, digits: int = 12) -> str:
    """A figure that somebody wrote or published (an SLO, a floor, a price): as written, 8.0 as 8.

    >>> exact(8.0), exact(3.4309)
    ('8', '3.4309')
    """
    if value is None or not math.isfinite(value):
        return DASH
    return f"{float(f'{value:.{digits - 1}e}'):,.{digits}g}"


def percent(share: float | None) -> str:
    """A share of 1 as per cent; nothing but all is called 100%, and nothing but none 0%.

    >>> percent(0.95), percent(0.99999), percent(1.0)
    ('95.0%', '>99.99%', '100%')
    """
    if share is None or not math.isfinite(share):
        return DASH
    if share in {0.0, 1.0}:
        return "100%" if share else "0%"
    if 0.0 < share < 0.0001 or 0.9999 < share < 1.0:
        return "<0.01%" if share < 0.5 else ">99.99%"
    return f"{100 * share:.{1 if 0.001 <= abs(share) <= 0.999 or abs(share) > 1.0 else 2}f}%".replace("-", MINUS)


def score(value: float | None) -> str:
    """A CLIP or LPIPS score with the four decimals of the published tables."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.4f}"


def money(usd: float | None) -> str:
    """Dollars to the cent; amounts under a dollar with three significant digits.

    >>> money(10.2926), money(0.00123)
    ('10.29', '0.00123')
    """
    return number(usd) if usd is None or not math.isfinite(usd) or abs(usd) < 1.0 else f"{usd:,.2f}".replace("-", MINUS)


def signed(change: float, show: Show = number) -> str:
    """A change with its sign."""
    return f"{MINUS if change < 0 else '+'}{show(abs(change))}"


def interval(low: float | None, high: float | None, show: Show = number) -> str:
    """Both ends of an interval; a question mark stands for an end that nobody can tell.

    What lies above 99.99% or below 0.01% as a whole is that alone.

    >>> interval(2.29, 2.354), interval(0.9, float("nan"), percent)
    ('2.29–2.35', '90.0%–?')
    """
    first, last = ("?" if end is None or math.isnan(end) else show(end) for end in (low, high))
    if first[0] == ">" or last[0] == "<":
        return first if first[0] == ">" else last
    return f"{first.removesuffix('%') if last.endswith('%') else first}\N{EN DASH}{last}"


def scaled(value: float, unit: str) -> tuple[Show, str]:
    """How figures of this size are written, and their unit with its prefix (`TFLOP/s`, `µs`)."""
    size, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), PREFIXES[-1])
    return lambda figure: number(None if figure is None else figure / size), f"{prefix}{unit}"
