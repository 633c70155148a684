"""drama.report.aggregates: by hand, against NumPy and SciPy, against another bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.report.aggregates import aggregate


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spend little where a test does not look at the intervals' ends."""
    monkeypatch.setattr("drama.report.aggregates.BOOTSTRAP_REPETITIONS", 50)


def matrix(seed: int, runs: int = 5, games: int = 26) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.8, 0.9, size=(runs, games)) - 0.1


@pytest.mark.usefixtures("few_draws")
def test_aggregates_agree_with_numpy_and_scipy() -> None:
    scores = matrix(0)
    found = aggregate(list(scores.T))
    assert (found.games, found.runs) == (26, 130)
    per_game = scores.mean(axis=0)
    assert found.mean.value == pytest.approx(per_game.mean())
    assert found.median.value == pytest.approx(np.median(per_game))
    assert found.interquartile_mean.value == pytest.approx(
        scipy.stats.trim_mean(scores, 0.25, None)
    )
    # 130 runs: 32 are cut off at either end.
    assert found.interquartile_mean.value == pytest.approx(np.sort(scores.ravel())[32:-32].mean())
    assert found.optimality_gap.value == pytest.approx(1 - np.clip(scores, None, 1).mean())


def test_intervals_agree_with_another_bootstrap() -> None:
    scores = matrix(1)
    found = aggregate(list(scores.T))
    rng = np.random.default_rng(7)
    drawn = scores[rng.integers(5, size=(4000, 5, 26)), np.arange(26)]  # [draws, runs, games]
    draws = {
        "mean": drawn.mean(axis=(1, 2)),
        "median": np.median(drawn.mean(axis=1), axis=1),
        "interquartile_mean": scipy.stats.trim_mean(drawn.reshape(4000, -1), 0.25, axis=1),
        "optimality_gap": 1 - np.minimum(drawn, 1).mean(axis=(1, 2)),
    }
    for name, values in draws.items():
        low, high = np.quantile(values, [0.025, 0.975])
        estimate = getattr(found, name)
        assert estimate.low == pytest.approx(low, abs=0.08 * (high - low)), name
        assert estimate.high == pytest.approx(high, abs=0.08 * (high - low)), name


@pytest.mark.usefixtures("few_draws")
def test_interval_of_two_runs_by_hand() -> None:
    # Redrawn, the mean of {0, 1} is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: both ends are
    # likelier than 2.5 %.
    found = aggregate([np.array([0.0, 1.0])])
    assert (found.mean.low, found.mean.value, found.mean.high) == (0.0, 0.5, 1.0)


@pytest.mark.usefixtures("few_draws")
def test_games_with_different_numbers_of_runs_weigh_the_same_by_hand() -> None:
    found = aggregate([np.array([0.0, 1.0]), np.array([2.0, 2.0, 2.0, 5.0])])
    assert found.runs == 6
    assert found.mean.value == pytest.approx((0.5 + 2.75) / 2)
    assert found.median.value == pytest.approx((0.5 + 2.75) / 2)
    # With every run of the first game counted twice: 0 0 [1 1 2 2] 2 5.
    assert found.interquartile_mean.value == pytest.approx(1.5)
    assert found.optimality_gap.value == pytest.approx(1 - (0.5 + 1.0) / 2)
    assert found.mean.low is not None and found.mean.low < found.mean.value


def test_every_game_is_redrawn_with_its_own_number_of_runs() -> None:
    # The second game does not vary, so the interval is that of the first, scaled by its weight.
    alone = aggregate([np.array([0.0, 1.0, 5.0])]).mean
    beside = aggregate([np.array([0.0, 1.0, 5.0]), np.full(7, 3.0)]).mean
    assert alone.low is not None and alone.high is not None
    assert beside.low == pytest.approx((alone.low + 3) / 2, abs=0.05)
    assert beside.high == pytest.approx((alone.high + 3) / 2, abs=0.05)


def test_one_seed_has_no_interval() -> None:
    found = aggregate([np.array([0.2, 0.4]), np.array([0.9])])
    assert found.mean.value == pytest.approx(0.6)
    assert found.mean.low is None and found.median.high is None


@pytest.mark.usefixtures("few_draws")
def test_intervals_neither_use_nor_touch_the_global_generator() -> None:
    scores = [np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.2, 1.4])]
    np.random.seed(1)
    first = aggregate(scores)
    after = np.random.get_state()[1]
    np.random.seed(1)
    assert (after == np.random.get_state()[1]).all()
    np.random.seed(99)
    assert aggregate(scores) == first


@pytest.mark.parametrize("scores", [[], [np.array([])], [np.array([0.1, np.nan])], [np.eye(2)]])
def test_senseless_scores_are_refused(scores: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"expected one non-empty array|finite"):
        aggregate(scores)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 20), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_point_estimates_keep_their_bounds_and_ignore_order(scores: list[float], random) -> None:  # type: ignore[no-untyped-def]
    found = aggregate([np.array([score]) for score in scores])
    for estimate in (found.mean, found.median, found.interquartile_mean):
        assert min(scores) - 1e-9 <= estimate.value <= max(scores) + 1e-9
    assert found.optimality_gap.value >= -1e-12
    shuffled = random.sample(scores, len(scores))
    again = aggregate([np.array([score]) for score in shuffled])
    assert again.mean.value == pytest.approx(found.mean.value, abs=1e-12)
    assert again.interquartile_mean.value == pytest.approx(
        found.interquartile_mean.value, abs=1e-12
    )
