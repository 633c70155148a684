"""Aggregates over games and runs, with intervals: rliable's (Agarwal et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rliable import library, metrics

BOOTSTRAP_SEED = 2410
BOOTSTRAP_REPETITIONS = 5_000
CONFIDENCE = 0.95
AGGREGATES = (
    ("mean", "Mean"),
    ("median", "Median"),
    ("interquartile_mean", "Interquartile mean"),
    ("optimality_gap", "Optimality gap"),
)
"""Attributes of `Aggregates`, and what they are called."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, where one is defined."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Aggregates:
    """The four aggregates of human-normalised scores over `games` games and `runs` runs."""

    games: int
    runs: int
    mean: Estimate
    median: Estimate
    interquartile_mean: Estimate
    optimality_gap: Estimate


def aggregate(scores: Sequence[np.ndarray]) -> Aggregates:
    """Aggregate human-normalised scores with 95 % stratified bootstrap intervals.

    `scores` holds one float64 array [runs] per game; games may differ in their number of runs,
    and every game has the same weight (see `_estimates`). Runs are drawn with replacement within
    each game (Agarwal et al. 2021, section 4). Over a single run the bootstrap has nothing to
    draw from, so intervals are left out unless every game has two runs. Raises ValueError when a
    game is empty or a score is not finite.
    """
    games = [np.asarray(game, dtype=np.float64) for game in scores]
    if not games or any(game.ndim != 1 or game.size == 0 for game in games):
        raise ValueError(f"expected one non-empty array per game, got {list(scores)!r}")
    if not all(np.isfinite(game).all() for game in games):
        raise ValueError(f"scores must be finite, got {list(scores)!r}")
    runs = sum(game.size for game in games)
    if min(game.size for game in games) < 2:
        values = [Estimate(value) for value in _estimates(*games).tolist()]
    else:
        values = _with_intervals(games)
    return Aggregates(len(games), runs, *values)


def _with_intervals(games: list[np.ndarray]) -> list[Estimate]:
    # rliable 1.2.0 draws from NumPy's global generator whatever random_state it is given.
    state = np.random.get_state()
    np.random.seed(BOOTSTRAP_SEED)
    try:
        points, intervals = library.get_interval_estimates(
            {"runs": games}, _estimates, reps=BOOTSTRAP_REPETITIONS,
            confidence_interval_size=CONFIDENCE,
        )  # fmt: skip
    finally:
        np.random.set_state(state)
    return [
        Estimate(*row) for row in np.column_stack([points["runs"], *intervals["runs"]]).tolist()
    ]


def _estimates(*games: np.ndarray) -> np.ndarray:
    """Mean, median, interquartile mean and optimality gap, [4], of one array [runs] per game.

    Where games differ in their number of runs, each run is repeated until all games have equally
    many, which gives every game the same weight and leaves a rectangular input as it is.
    """
    rows = math.lcm(*(game.size for game in games))
    matrix = np.column_stack([np.repeat(game, rows // game.size) for game in games])
    return np.array([
        metrics.aggregate_mean(matrix),
        metrics.aggregate_median(matrix),
        metrics.aggregate_iqm(matrix),
        metrics.aggregate_optimality_gap(matrix),
    ])  # fmt: skip
