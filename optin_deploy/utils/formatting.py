"""Figures as text, the same in every rendering."""

from __future__ import annotations

import math
from typing import Protocol


class HasBounds(Protocol):
    """Anything with bounds, such as an interval."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def significant(value: float, digits: int = 3) -> str:
    """Return ``value`` to ``digits`` significant digits, in plain notation: 0.0123, 1.23, 123, 12300."""
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def scaled(value: float) -> str:
    """Return a large count with its SI prefix: "22.1 M". The unit follows it: "9.2 G" + "FLOPs"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}"
    return f"{value:g}"


def milliseconds(value: float) -> str:
    """Return a latency in milliseconds, without its unit."""
    return significant(value)


def per_second(value: float) -> str:
    """Return a throughput, without its unit."""
    return f"{value:,.0f}" if value >= 100 else significant(value)


def times(value: float) -> str:
    """Return a factor: "1.83×"."""
    return f"{value:.2f}×"


def bounds(interval: HasBounds) -> str:
    """Return the bounds of an interval: "1.79–1.87"."""
    return f"{interval.low:.2f}–{interval.high:.2f}"


def ratio(before: float, after: float) -> str:
    """Return ``after`` as a fraction of ``before``: "0.62"; a dash if ``before`` is 0."""
    return f"{after / before:.2f}" if before else "—"


def percent(share: float) -> str:
    """Return a fraction as percent: "49.8 %"."""
    return f"{100 * share:.1f} %"


def change(before: float, after: float) -> str:
    """Return a relative change: "−49.8 %"."""
    relative = 100 * (after / before - 1)
    return f"{'−' if relative < 0 else '+'}{abs(relative):.1f} %"


def noise(interval: HasBounds) -> str:
    """Return the largest distance of an A/A interval from 1: "±2.8 %"."""
    reach = 100 * max(abs(interval.low - 1), abs(interval.high - 1))
    return f"±{reach:.1f} %"


def scientific(value: float) -> str:
    """Return an error: "3.1e-06"."""
    return f"{value:.1e}"
