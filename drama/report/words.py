"""Numbers and names as the report writes them, on the page, in its figures and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from drama.report.aggregates import Estimate

DASH = "\u2013"
SEPARATOR = " · "
"""Between the parts of a label."""


def typeset(text: str) -> str:
    """A formatted number with a true minus sign and thin spaces between groups of digits."""
    return text.replace(",", "\u202f").replace("-", "\u2212")


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 game", "2 games"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def number(value: float | None) -> str:
    """A return for reading: one decimal below 10 000, digits in groups of three."""
    if value is None:
        return DASH
    return typeset(f"{value:z,.1f}" if abs(value) < 10_000 else f"{value:,.0f}")


def ratio(value: float | None) -> str:
    """A human-normalised score for reading: three decimals."""
    return DASH if value is None else typeset(f"{value:z.3f}")


def interval(estimate: Estimate) -> str | None:
    """An estimate's interval for reading; None where there is none."""
    return None if estimate.low is None else f"{ratio(estimate.low)} to {ratio(estimate.high)}"


def duration(seconds: float) -> str:
    """A wall time for reading, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def integer(value: int) -> str:
    """A count for reading, digits in groups of three."""
    return typeset(f"{value:,}")


def span(values: Sequence[int]) -> str:
    """Counts for reading: the lowest to the highest, or the one that all are."""
    low, high = min(values), max(values)
    return integer(low) if low == high else f"{integer(low)} to {integer(high)}"


def method_name(method: str) -> str:
    """A published method's name as the report shows it."""
    return {"DreamerV3_2023": "DreamerV3 (2023)"}.get(method, method)
