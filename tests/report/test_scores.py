"""drama.report.scores: reading, normalising, aggregating; the published numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from report_files import digest, plan_anew, write_evaluation, write_record, write_results

from drama.agent.settings import ATARI_100K
from drama.errors import ConfigurationError
from drama.pipeline.plans import read_plan
from drama.report.scores import (
    ReportError,
    aggregate,
    human_normalised_score,
    load_baselines,
    published_aggregates,
    read_scores,
)

BASELINES = load_baselines()
EPISODES = pa.schema([("step", pa.int64()), ("episode_return", pa.float64())])
RETURNS = {"Pong": [[-20.0, -18.0], [-21.0, -20.4]], "Boxing": [[1.0, 3.0, 5.0], [0.1, 0.1, 0.1]]}

# Human-normalised mean and median over the 26 games, as recomputed when the table was collected.
PUBLISHED = {
    "SimPLe": (0.332, 0.134), "SPR": (0.616, 0.396), "TWM": (0.956, 0.505), "IRIS": (1.046, 0.289),
    "STORM": (1.266, 0.580), "DreamerV3": (1.247, 0.494), "Drama": (1.049, 0.270),
    "DIAMOND": (1.459, 0.373), "DreamerV3_2023": (1.124, 0.485), "HarmonyDream": (1.364, 0.671),
    "DeltaIRIS": (1.383, 0.594), "REM": (1.222, 0.280), "Simulus": (1.645, 0.982),
    "SGF": (0.884, 0.152), "EfficientZero": (1.943, 1.090), "BBF": (2.247, 0.917),
}  # fmt: skip


# -- normalised scores ------------------------------------------------------------------------


def test_human_normalised_score_by_hand() -> None:
    # Pong: random -20.7, human 14.6, so the unit is 35.3 points.
    assert human_normalised_score(-20.7, -20.7, 14.6) == 0.0
    assert human_normalised_score(14.6, -20.7, 14.6) == 1.0
    assert human_normalised_score(15.0, -20.7, 14.6) == pytest.approx(35.7 / 35.3, abs=1e-15)
    assert human_normalised_score(-21.0, -20.7, 14.6) == pytest.approx(-0.3 / 35.3, abs=1e-15)


def test_a_scale_without_unit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both 3\.0"):
        human_normalised_score(1.0, 3.0, 3.0)


# -- published results ------------------------------------------------------------------------


def test_the_baselines_cover_the_benchmark() -> None:
    assert BASELINES.games == ATARI_100K
    assert BASELINES.single_source == {"Breakout", "Freeway", "Pong", "PrivateEye"}
    assert BASELINES.published("Drama", "Krull") == 9693
    assert BASELINES.random["Pong"] == -20.7
    assert BASELINES.human["PrivateEye"] == 69571.3


def test_a_method_without_values_is_not_a_method_and_other_games_have_no_reference() -> None:
    assert "TWISTER" not in BASELINES.methods
    assert BASELINES.published("TWISTER", "Pong") is None
    assert BASELINES.published("Drama", "Catch8") is None
    assert BASELINES.normalise("Catch8", 1.0) is None
    assert BASELINES.normalise("Pong", None) is None


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_aggregates_over_all_games(method: str) -> None:
    found = published_aggregates(BASELINES, method, ATARI_100K)
    assert found is not None
    assert (found.games, found.runs) == (26, 26)
    assert (round(found.mean.value, 3), round(found.median.value, 3)) == PUBLISHED[method]
    assert found.mean.low is None and found.optimality_gap.high is None


def test_published_aggregates_need_every_game() -> None:
    assert published_aggregates(BASELINES, "Drama", ["Pong", "Catch8"]) is None
    assert published_aggregates(BASELINES, "EDELINE", ["Pong"]) is None
    assert published_aggregates(BASELINES, "Drama", []) is None


# -- aggregates -------------------------------------------------------------------------------


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spend little where a test does not look at the intervals' ends."""
    monkeypatch.setattr("drama.report.scores.BOOTSTRAP_REPETITIONS", 50)


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


# -- reading ----------------------------------------------------------------------------------


def read(results: Path) -> list[tuple[str, float | None]]:
    games = read_scores(read_plan(results), BASELINES)
    return [(game.game, game.human_normalised_score) for game in games]


def test_scores_are_read_and_averaged(tmp_path: Path) -> None:
    results = write_results(tmp_path / "quick", RETURNS)
    pong, boxing = read_scores(read_plan(results), BASELINES)
    assert [run.mean_return for run in pong.runs] == pytest.approx([-19.0, -20.7])
    assert pong.mean_return == pytest.approx(-19.85)
    assert pong.human_normalised_score == pytest.approx(0.85 / 35.3)
    assert pong.runs[1].human_normalised_score == pytest.approx(0.0, abs=1e-12)
    first = boxing.runs[0]
    assert (first.seed, first.episodes, first.steps, first.device) == (0, 3, 600, "cpu")
    assert first.standard_deviation == pytest.approx(np.sqrt(8 / 3))
    assert first.run == digest("run Boxing 0")
    assert first.git_commit == "abcdef0123456789"
    assert boxing.human_normalised_score == pytest.approx((1.55 - 0.1) / 12.0)


def rewrite(results: Path, game: str = "Pong", seed: int = 0, **evaluation: Any) -> None:
    """Write a run's evaluation anew."""
    names = digest(f"run {game} {seed}"), digest(f"evaluation {game} {seed}")
    write_evaluation(results / f"runs/{game}/seed{seed}", game, seed, *names, **evaluation)


def test_a_score_is_of_the_actions_that_the_settings_name(results: Path) -> None:
    sampled = {"actions": "sampled"}
    rewrite(results, returns=[1.0, 2.0], beside=[4.0, 6.0], settings=sampled, truncated=1)
    pong, _ = read_scores(read_plan(results), BASELINES)
    first, second = pong.runs
    assert (first.actions, second.actions) == ("sampled", "greedy")
    assert (first.mean_return, first.standard_deviation, first.truncated) == (5.0, 1.0, 1)
    assert (first.return_by("greedy"), first.return_by("sampled")) == (1.5, 5.0)
    assert pong.mean_return == pytest.approx((5 - 20.7) / 2)
    assert pong.return_by("greedy") == pytest.approx((1.5 - 20.7) / 2)
    assert pong.return_by("sampled") is None, "the other run was not played that way"


def test_the_training_return_is_of_the_last_ten_episodes(results: Path) -> None:
    """By hand: 0 to 4 in five episodes; then 0 to 24, of which 15 to 24 are the last ten."""
    pong, _ = read_scores(read_plan(results), BASELINES)
    assert (pong.runs[0].training_return, pong.runs[0].training_episodes) == (2.0, 5)
    folder, record, _ = run_files(results)
    steps = pa.array(range(25), pa.int64())
    for returns, expected in (([float(i) for i in range(25)], (19.5, 10)), ([], (None, 0))):
        table = pa.table({"step": steps[: len(returns)], "episode_return": returns})
        pq.write_table(table.cast(EPISODES), folder / "episodes.parquet")
        record.unlink()
        write_record(folder, digest("run Pong 0"), 600, 0)
        pong, _ = read_scores(read_plan(results), BASELINES)
        assert (pong.runs[0].training_return, pong.runs[0].training_episodes) == expected
    assert pong.training_return is None, "one run has none"


def run_files(results: Path, game: str = "Pong", seed: int = 0) -> tuple[Path, Path, Path]:
    folder = results / "runs" / game / f"seed{seed}"
    return (
        folder,
        folder / f"run-{digest(f'run {game} {seed}')[:16]}.json",
        folder / f"evaluation-{digest(f'evaluation {game} {seed}')[:16]}.parquet",
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "quick", RETURNS)


def expect(results: Path, command: str, *parts: str) -> None:
    with pytest.raises(ReportError) as caught:
        read(results)
    text = str(caught.value)
    recipe = results / "recipes" / "Pong" / "seed0.json"
    assert f"drama {command} {recipe}" in text
    for part in ("Pong seed 0", *parts):
        assert part in text


def test_a_run_not_trained_names_the_command(results: Path) -> None:
    run_files(results)[1].unlink()
    expect(results, "train", "has not finished training")


def test_a_run_not_evaluated_names_the_command(results: Path) -> None:
    run_files(results)[2].unlink()
    expect(results, "evaluate", "has not been evaluated")


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing of use", b"\x00" * 4000])
def test_a_damaged_evaluation_is_refused(results: Path, content: bytes) -> None:
    run_files(results)[2].write_bytes(content)
    expect(results, "evaluate", "unreadable evaluation")


def test_a_truncated_evaluation_is_refused(results: Path) -> None:
    path = run_files(results)[2]
    path.write_bytes(path.read_bytes()[:-100])
    expect(results, "evaluate", "unreadable evaluation")


def test_an_evaluation_without_origin_is_refused(results: Path) -> None:
    path = run_files(results)[2]
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    expect(results, "evaluate", "unreadable evaluation")


def test_the_evaluation_of_another_run_is_refused(results: Path) -> None:
    run_files(results)[2].write_bytes(run_files(results, seed=1)[2].read_bytes())
    expect(results, "evaluate", "evaluation of another run")


@pytest.mark.parametrize("returns", [[1.0, float("nan")], [1.0, float("inf")], []])
def test_returns_that_are_no_numbers_are_refused(results: Path, returns: list[float]) -> None:
    run, evaluation = digest("run Pong 0"), digest("evaluation Pong 0")
    write_evaluation(run_files(results)[0], "Pong", 0, run, evaluation, returns)
    expect(results, "evaluate", f"{len(returns)} greedy episodes")


def test_missing_episodes_are_noticed(results: Path) -> None:
    path = run_files(results)[2]
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    expect(results, "evaluate", "1 greedy episodes", "where 2 were asked for")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": "0"}'])
def test_a_damaged_record_is_refused(results: Path, content: str) -> None:
    run_files(results)[1].write_text(content)
    expect(results, "train", "unreadable record")


def test_the_record_of_another_run_is_refused(results: Path) -> None:
    run_files(results)[1].write_bytes(run_files(results, seed=1)[1].read_bytes())
    expect(results, "train", "record of another run")


@pytest.mark.parametrize("name", ["episodes.parquet", "training.parquet"])
def test_curves_that_are_not_the_runs_own_are_refused(results: Path, name: str) -> None:
    folder = run_files(results)[0]
    (folder / name).write_bytes((run_files(results, seed=1)[0] / name).read_bytes())
    expect(results, "train", name, "not the file that the run recorded")
    (folder / name).unlink()
    expect(results, "train", name, "is missing")


def test_all_problems_are_told_at_once(results: Path) -> None:
    run_files(results)[1].unlink()
    run_files(results, "Boxing", 1)[2].unlink()
    expect(results, "train", "2 of 4 runs", "Boxing seed 1 has not been evaluated")


# -- the plan ---------------------------------------------------------------------------------


# -- runs of earlier code ---------------------------------------------------------------------


def test_a_whole_run_of_earlier_code_stands_in_for_the_planned_one(results: Path) -> None:
    before = read(results)
    commit = plan_anew(results, "Pong", 1)
    assert read(results) == before
    (pong, *_) = read_scores(read_plan(results), BASELINES)
    assert [run.current for run in pong.runs] == [True, False]
    assert pong.runs[1].git_commit == commit


def test_one_of_other_settings_does_not(results: Path) -> None:
    plan_anew(results, "Pong", 0, steps=601)
    expect(results, "train", "Pong seed 0 has not finished training")


def test_one_that_was_not_evaluated_does_not(results: Path) -> None:
    plan_anew(results, "Pong", 0)
    (results / "runs/Pong/seed0/evaluation.json").unlink()
    expect(results, "train", "Pong seed 0 has not finished training")


def test_damage_to_one_of_earlier_code_is_told(results: Path) -> None:
    plan_anew(results, "Pong", 0)
    (results / "runs/Pong/seed0/episodes.parquet").write_bytes(b"")
    expect(results, "train", "Pong seed 0 is damaged")


def test_an_evaluation_of_earlier_code_stands_in_too(results: Path) -> None:
    _, _, old = run_files(results)
    note = {"fingerprint": digest("earlier")}
    table = pq.read_table(old)
    origin = json.loads(table.schema.metadata[b"drama"]) | note
    new = old.with_name(f"evaluation-{digest('earlier')[:16]}.parquet")
    pq.write_table(table.replace_schema_metadata({b"drama": json.dumps(origin)}), new)
    assert read_scores(read_plan(results), BASELINES)[0].runs[0].current
    old.unlink()
    expect(results, "evaluate", "Pong seed 0 has not been evaluated")
    sums = {"sha256": hashlib.sha256(new.read_bytes()).hexdigest()}
    (old.parent / "evaluation.json").write_text(json.dumps(note | sums))
    run = read_scores(read_plan(results), BASELINES)[0].runs[0]
    assert not run.current and run.evaluation == digest("earlier")


def test_without_a_plan_the_error_says_how_to_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="drama plan --preset quick"):
        read_plan(tmp_path / "quick")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"runs": []}, "it lists no run"),
        ({"runs": [{"game": "Pong"}]}, "missing"),
        ({"runs": 3}, "runs: "),
        ({"complete_protocol": "false"}, "complete_protocol: "),
        ({"complete_protocol": 1}, "complete_protocol: "),
    ],
)
def test_a_senseless_plan_is_refused(
    results: Path, change: dict[str, object], message: str
) -> None:
    path = results / "recipes" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(results)


def test_a_run_listed_twice_is_refused(results: Path) -> None:
    path = results / "recipes" / "report.json"
    plan = json.loads(path.read_text())
    plan["runs"].append(plan["runs"][0])
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigurationError, match="Pong seed 0 more than once"):
        read_plan(results)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("game", "../../etc"), ("seed", "0"), ("seed", -1), ("run", "ab"), ("evaluation", "../x"),
        ("folder", "runs/Boxing/seed0"), ("folder", "/tmp"),
    ],
)  # fmt: skip
def test_a_plan_leads_nowhere_but_to_its_own_runs(results: Path, key: str, value: object) -> None:
    path = results / "recipes" / "report.json"
    plan = json.loads(path.read_text())
    plan["runs"][0][key] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigurationError, match="not a plan"):
        read_plan(results)
