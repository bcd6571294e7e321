"""Numbers as a person reads them, on the console and on a page."""

from __future__ import annotations

from typing import Any


def number(value: float | None) -> str:
    """A number as a person reads it: three decimals, fewer for large ones; – where there is none."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float | None) -> str:
    """The same with a plus before what is above 0."""
    return "–" if value is None else ("+" if value > 0 else "") + number(value)


def interval(estimate: Any) -> str:
    """value [low, high]; (a bound) where a fit ended at the edge of where it looked."""
    if "is a bound" in (getattr(estimate, "method", None) or ""):
        return f"{number(estimate.value)} (a bound)"
    if getattr(estimate, "low", None) is None:
        return number(getattr(estimate, "value", estimate))
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
