"""How figures are written: to the same digits everywhere, never as something that they are not."""

from __future__ import annotations

from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.estimate import MINUS, PREFIXES, exact, interval, money, number, percent, scaled, score, signed


def read(text):
    """A written number read again."""
    return float(text.replace(",", "").replace(MINUS, "-"))


@given(st.floats(1e-5, 1e9), st.booleans())
def test_numbers_keep_three_digits(size, negative):
    """A number as written is within half a unit of the third digit, without an exponent."""
    value = -size if negative else size
    text = number(value)
    assert "e" not in text
    assert read(text) == pytest.approx(value, rel=5.01e-3)


@given(st.floats(0.0, 1.0))
def test_only_all_is_called_a_hundred_per_cent(share):
    """Nothing but 1 is written 100%, and nothing but 0 is written 0%."""
    text = percent(share)
    assert (text == "100%") == (share == 1.0)
    assert (text == "0%") == (share == 0.0)
    assert not text.startswith(("100.0", "0.00"))


@given(st.floats(0.01, 1e9))
def test_money_is_told_to_the_cent(usd):
    """From a dollar up two decimals, below it three digits: never further off than half a cent."""
    assert read(money(usd)) == pytest.approx(usd, abs=0.00501)


@given(st.floats(1e-3, 1e6), st.integers(3, 12))
def test_what_somebody_wrote_is_as_it_was_written(value, digits):
    """So many digits of it, and no zeros behind the last one."""
    text = exact(value, digits)
    assert read(text) == float(f"{value:.{digits - 1}e}")
    assert "." not in text or text[-1] != "0"


def test_small_and_unknown_numbers():
    """Zero is 0, whole numbers stand in full, what is unknown is a dash, and the tiny keep their exponent."""
    assert [number(value) for value in (0.0, 12345, 12345.0, None, nan, 1.5e-7)] == [
        "0", "12,345", "12,300", "—", "—", "1.50e-7",
    ]  # fmt: skip
    assert [show(None) for show in (exact, percent, score, money)] == ["—"] * 4
    assert [exact(8.0), exact(0.285), exact(12345.6)] == ["8", "0.285", "12,345.6"]


def test_a_published_score_has_its_four_decimals():
    """0.28871 is 0.2887 wherever it stands, and a change of it has a sign."""
    assert score(0.28871) == "0.2887"
    assert signed(-0.0106, score) == f"{MINUS}0.0106"
    assert signed(0.05, percent) == "+5.0%"


def test_an_interval_has_one_unit_and_both_ends():
    """A percent sign stands once, an end that nobody can tell is a question mark, all but all says so."""
    assert interval(1.0, None) == "1.00–?"
    assert interval(0.961, 0.979, percent) == "96.1–97.9%"
    assert interval(0.99995, 1.0, percent) == ">99.99%"
    assert interval(0.961, 0.99995, percent) == "96.1–>99.99%"


def test_figures_of_one_size_share_a_prefix():
    """Rates in TFLOP/s, launches in microseconds."""
    show, unit = scaled(3.12e14, "FLOP/s")
    assert (show(3.12e14), unit) == ("312", "TFLOP/s")
    assert scaled(4.5e-6, "s")[1] == "µs"


@given(st.floats(1e-9, 9e14))
def test_scaled_figures_keep_their_size(value):
    """A parameter's figure times its prefix is the parameter, to three digits, and stands between 1 and 1000."""
    show, unit = scaled(value, "FLOP/s")
    factor = {prefix: size for size, prefix in PREFIXES}[unit.removesuffix("FLOP/s")]
    assert float(show(value).replace(",", "")) * factor == pytest.approx(value, rel=5.01e-3)
    assert 0.99 <= float(show(value).replace(",", "")) <= 1000
