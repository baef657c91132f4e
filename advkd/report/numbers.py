"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

DASH = "–"  # where a number is missing
MINUS = "\N{MINUS SIGN}"


def is_finite(value: Any) -> bool:
    """Whether it is a real number that can be shown."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals; a zero has no sign."""
    if value is None:
        return DASH
    text = f"{value:,.{decimals}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", MINUS)


def common_decimals(
    values: Mapping[str, float | None],
    digits: int,
    spreads: Mapping[str, float | None] | None = None,
) -> dict[str, str]:
    """Numbers of one row with equally many decimals; the largest has `digits` significant ones.

    `spreads` are standard deviations that stand beside the numbers, where there are any.
    """
    largest = max((abs(value) for value in values.values() if value is not None), default=0.0)
    order = math.floor(math.log10(largest)) if largest > 0 else 0
    decimals = min(8, max(0, digits - 1 - order))
    shown = {column: fixed(value, decimals) for column, value in values.items()}
    for column, spread in (spreads or {}).items():
        if spread is not None and values.get(column) is not None:
            shown[column] += f" ± {fixed(spread, decimals)}"
    return shown


def brief(value: float | None) -> str:
    """A number with three significant digits; a whole number in full."""
    if value is None:
        return DASH
    if float(value).is_integer():
        return fixed(value, 0)
    return fixed(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def count(value: float) -> str:
    """A count in thousands or millions, with three significant digits."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{brief(round(value / size, 2))} {unit}"
    return fixed(value, 0)


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
