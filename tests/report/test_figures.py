"""drama.report.figures: curves, labels, and SVG that is the same every time."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_files import write_results

from drama.pipeline.plans import read_plan
from drama.report.aggregates import aggregate
from drama.report.figures import draw, mean_curve, smooth, spread, thin
from drama.report.scores import (
    GameScore,
    ReportError,
    load_baselines,
    read_scores,
)

BASELINES = load_baselines()
RETURNS = {"Pong": [[-20.0], [-18.0]], "Catch8": [[0.5]]}
LABEL = "preset quick: not a reproduction"

floats = st.floats(-1e6, 1e6)


def scores(folder: Path, returns: dict[str, list[list[float]]] = RETURNS) -> list[GameScore]:
    results = write_results(folder, returns)
    return list(read_scores(read_plan(results), BASELINES))


def figures(games: list[GameScore], label: str | None = LABEL) -> dict[str, str]:
    scored = [game for game in games if game.human_normalised_score is not None]
    found = aggregate([np.array([g.human_normalised_score]) for g in scored]) if scored else None
    return dict(draw(games, BASELINES, found, label))


def text(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


# -- curves -----------------------------------------------------------------------------------


def test_thin_takes_means_of_groups_by_hand() -> None:
    steps, values = thin(np.arange(6.0), np.array([1.0, 3.0, 5.0, 7.0, 2.0, 4.0]), points=3)
    assert steps.tolist() == [0.5, 2.5, 4.5]
    assert values.tolist() == [2.0, 6.0, 3.0]


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=300), st.integers(1, 50))
def test_thin_keeps_the_bounds_and_the_number_of_points(values: list[float], points: int) -> None:
    steps, thinned = thin(np.arange(len(values), dtype=float), np.array(values), points)
    assert steps.size == thinned.size == min(len(values), points)
    assert (np.diff(steps) > 0).all()
    assert min(values) - 1e-6 <= thinned.min() and thinned.max() <= max(values) + 1e-6


@settings(deadline=None)
@given(st.lists(floats, min_size=2, max_size=40), st.floats(0.001, 1000))
def test_smoothing_stays_within_the_data(values: list[float], bandwidth: float) -> None:
    steps = np.cumsum(np.arange(1.0, len(values) + 1))
    grid, smoothed = smooth(steps, np.array(values), bandwidth)
    assert grid[0] == steps[0] and grid[-1] == steps[-1]
    assert min(values) - 1e-3 <= smoothed.min() and smoothed.max() <= max(values) + 1e-3


def test_smoothing_by_hand() -> None:
    # Two rows at 0 and 10, kernel as wide as their distance: at 0 the far one weighs exp(-1/2).
    _, smoothed = smooth(np.array([0.0, 10.0]), np.array([0.0, 1.0]), 1.0)
    far = np.exp(-0.5)
    assert smoothed[0] == pytest.approx(far / (1 + far))
    assert smoothed[-1] == pytest.approx(1 / (1 + far))


def test_mean_curve_covers_what_all_seeds_cover() -> None:
    one = (np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    two = (np.array([5.0, 20.0]), np.array([1.0, 1.0]))
    found = mean_curve([one, two])
    assert found is not None
    steps, values = found
    assert (steps[0], steps[-1]) == (5.0, 10.0)
    assert values == pytest.approx((steps + 1) / 2)


def test_mean_curve_of_seeds_that_never_meet() -> None:
    early = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    late = (np.array([2.0, 3.0]), np.array([0.0, 1.0]))
    assert mean_curve([early, late]) is None
    assert mean_curve([]) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_labels_are_moved_apart_in_order(positions: list[float]) -> None:
    placed = spread(positions, 0.13)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.13 - 1e-3).all()


def test_labels_far_apart_stay() -> None:
    assert spread([0.9, 0.1], 0.13) == [0.9, 0.1]


# -- figures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return figures(scores(tmp_path_factory.mktemp("drawn") / "quick"))


def test_every_figure_is_there_and_well_formed(drawn: dict[str, str]) -> None:
    assert set(drawn) == {
        "aggregates.svg", "scores.svg", "returns.svg", "returns-Pong.svg", "losses-Pong.svg",
        "returns-Catch8.svg", "losses-Catch8.svg",
    }  # fmt: skip
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_every_figure_says_what_it_is_not(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        assert LABEL in text(svg), name


def test_full_protocol_runs_carry_no_label(tmp_path: Path) -> None:
    for name, svg in figures(scores(tmp_path / "xs"), label=None).items():
        assert "reproduction" not in svg, name


def test_the_same_inputs_give_the_same_bytes(drawn: dict[str, str], tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "other"}):
        again = figures(scores(tmp_path / "elsewhere"))
        assert matplotlib.rcParams["font.size"] == 30
    assert again == drawn
    assert not any(re.search(r"<dc:date>|20\d\d-\d\d-\d\d", svg) for svg in drawn.values())


def test_figures_have_a_dark_variant_for_every_colour(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        style, drawing = svg.split("</style>", 1)
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawing))
        for colour in used - {"#000000"}:
            assert f'[style*="fill: {colour}"]' in style, (name, colour)


def test_reference_lines_are_drawn_where_they_fit_and_named_where_not(
    drawn: dict[str, str], tmp_path: Path
) -> None:
    # Training returns from 0 to 5 and an evaluation at -20: Human (14.6) and Drama (15) fit.
    words = text(drawn["returns-Pong.svg"])
    assert "Random \u221220.7" in words and "Human 14.6" in words and "Drama 15" in words
    assert "beyond" not in words
    # Alien: human 7127.7 against returns of a few hundred.
    words = text(figures(scores(tmp_path / "quick", {"Alien": [[300.0]]}))["returns-Alien.svg"])
    assert "Random 228" in words
    assert "beyond the axis: Human 7\u202f128, Drama 820" in words


def test_a_game_without_reference_has_no_lines(drawn: dict[str, str]) -> None:
    words = text(drawn["returns-Catch8.svg"])
    assert "Random" not in words and "Human" not in words
    assert "Catch8" not in text(drawn["scores.svg"])


def test_the_aggregates_stand_beside_published_world_models(drawn: dict[str, str]) -> None:
    words = text(drawn["aggregates.svg"])
    for name in ("These runs", "Drama", "IRIS", "DreamerV3 (2023)", "Optimality gap", "1 game"):
        assert name in words
    assert "BBF" not in words and "TWISTER" not in words


def test_only_games_without_reference_give_curves_alone(tmp_path: Path) -> None:
    drawn = figures(scores(tmp_path / "quick", {"Catch8": [[1.0]]}))
    assert set(drawn) == {"returns-Catch8.svg", "losses-Catch8.svg"}


def test_runs_too_short_for_an_episode_or_a_loss_are_drawn_empty(tmp_path: Path) -> None:
    games = scores(tmp_path / "quick", {"Pong": [[-20.0]]})
    folder = games[0].runs[0].folder
    for name in ("episodes", "training"):
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    drawn = figures(games)
    assert "no finished training episode" in text(drawn["returns-Pong.svg"])
    assert text(drawn["losses-Pong.svg"]).count("not recorded") == 6


def test_a_missing_column_leaves_its_panel_empty(tmp_path: Path) -> None:
    games = scores(tmp_path / "quick", {"Pong": [[-20.0]]})
    path = games[0].runs[0].folder / "training.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["return_scale"]), path)
    assert text(figures(games)["losses-Pong.svg"]).count("not recorded") == 1


def test_an_unreadable_curve_names_run_and_file(tmp_path: Path) -> None:
    games = scores(tmp_path / "quick", {"Pong": [[-20.0]]})
    (games[0].runs[0].folder / "episodes.parquet").write_bytes(b"nothing")
    with pytest.raises(ReportError, match=r"Pong seed 0: .*episodes\.parquet cannot be read"):
        figures(games)
