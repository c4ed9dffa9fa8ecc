"""Numbers as the report writes them."""

from __future__ import annotations

import math

NOTHING = "none"
DECIMALS = 6


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, as far as six decimals hold them: 0.0147, 123.

    Below a millionth it has an exponent: 1.2e-9.
    """
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    power = math.floor(math.log10(abs(value)))
    if power < -DECIMALS:
        return f"{value / 10.0**power:.{min(digits, 2) - 1}f}e{power}"
    return f"{value:,.{min(max(0, digits - 1 - power), DECIMALS)}f}"


def interval(low: float | None, high: float | None) -> str:
    """An interval: 0.0094 to 0.0215."""
    if low is None or high is None:
        return NOTHING
    return f"{significant(low)} to {significant(high)}"


def percent(share: float | None) -> str:
    """A share: 7.4 %."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def latency(microseconds: float | None) -> str:
    """A time per decoded token: 870 us, 2.41 ms."""
    if microseconds is None:
        return NOTHING
    if microseconds < 1000:
        return f"{significant(microseconds)} us"
    return f"{significant(microseconds / 1000)} ms"
