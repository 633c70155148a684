"""drama.report.scores: reading and normalising; the published numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_files import (
    digest,
    plan_anew,
    write_evaluation,
    write_record,
    write_results,
    write_vouching,
)

from drama.agent.settings import ATARI_100K
from drama.pipeline.plans import read_plan
from drama.report.scores import (
    ReportError,
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


def found(results: Path) -> list[tuple[str, int]]:
    games = read_scores(read_plan(results), BASELINES)
    return [(run.game, run.seed) for game in games for run in game.runs]


@pytest.mark.parametrize("which", [1, 2], ids=["not trained", "not evaluated"])
def test_a_run_that_is_not_whole_is_left_out_and_a_game_without_any(
    results: Path, which: int
) -> None:
    run_files(results)[which].unlink()
    assert found(results) == [("Pong", 1), ("Boxing", 0), ("Boxing", 1)]
    run_files(results, seed=1)[3 - which].unlink()
    assert found(results) == [("Boxing", 0), ("Boxing", 1)]
    assert read(results) == [("Boxing", pytest.approx((1.55 - 0.1) / 12.0))]


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing of use", b"\x00" * 4000])
def test_a_damaged_evaluation_is_refused(results: Path, content: bytes) -> None:
    run_files(results)[2].write_bytes(content)
    expect(results, "evaluate", "unreadable evaluation")


def test_an_evaluation_without_origin_is_refused(results: Path) -> None:
    path = run_files(results)[2]
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    expect(results, "evaluate", "unreadable evaluation")


def test_the_evaluation_of_another_run_is_refused(results: Path) -> None:
    path, other = run_files(results)[2], run_files(results, seed=1)[2]
    own = pq.read_table(path)
    path.write_bytes(other.read_bytes())
    expect(results, "evaluate", f"it is evaluation {other.stem[-16:]}, not what its name says")
    origin = json.loads(own.schema.metadata[b"drama"]) | {"run": digest("another")}
    write_vouching(path, own, origin)
    expect(results, "evaluate", "evaluation of another run")


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
    run_files(results)[1].write_text("")
    run_files(results, "Boxing", 1)[2].write_bytes(b"")
    run_files(results, seed=1)[1].unlink()
    expect(results, "train", "2 of 4 runs", "Boxing seed 1 has an unreadable evaluation")


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
    assert ("Pong", 0) not in found(results)


def test_one_that_was_not_evaluated_does_not(results: Path) -> None:
    plan_anew(results, "Pong", 0)
    (results / "runs/Pong/seed0/evaluation.json").unlink()
    assert ("Pong", 0) not in found(results)


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
    write_vouching(new, table, origin)
    assert read_scores(read_plan(results), BASELINES)[0].runs[0].current
    old.unlink()
    assert ("Pong", 0) not in found(results)
    sums = {"sha256": hashlib.sha256(new.read_bytes()).hexdigest()}
    (old.parent / "evaluation.json").write_text(json.dumps(note | sums))
    run = read_scores(read_plan(results), BASELINES)[0].runs[0]
    assert not run.current and run.evaluation == digest("earlier")
