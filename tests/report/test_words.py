"""drama.report.words: numbers as people read them."""

from __future__ import annotations

import pytest

from drama.report.words import count, duration, number, ratio, typeset


def test_words_and_numbers() -> None:
    assert typeset("-12,345.6") == "\u221212\u202f345.6"
    assert (count(1, "game"), count(3, "game")) == ("1 game", "3 games")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\u2013"), (-20.7, "\u221220.7"), (7127.7, "7\u202f127.7"), (69571.3, "69\u202f571"),
     (-0.04, "0.0"), (0.0, "0.0"), (-12345.6, "\u221212\u202f346")],
)  # fmt: skip
def test_returns_for_reading(value: float | None, text: str) -> None:
    assert number(value) == text


def test_ratios_and_durations_for_reading() -> None:
    assert (ratio(-0.0001), ratio(-0.0126), ratio(None)) == ("0.000", "\u22120.013", "\u2013")
    assert [duration(s) for s in (41.4, 61, 3599.7, 33120)] == [
        "41 s", "1 min 01 s", "1 h 00 min", "9 h 12 min",
    ]  # fmt: skip
