"""Evaluations read back: what they say, files that are not whole, altered ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from report_files import write_evaluation
from workspace import GAME, SEED, Workspace

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import new_episode
from drama.pipeline.artifacts.evaluations import (
    NOTE,
    EvaluationDamaged,
    note_evaluation,
    read_evaluation,
)
from drama.pipeline.artifacts.verify import Finding, verify
from drama.pipeline.recipes import read_recipe
from drama.runs.checkpoint import save_checkpoint
from drama.runs.folder import CHECKPOINT, write_record

CPU = torch.device("cpu")


def written(folder: Path, returns: Sequence[float], **more: Any) -> Path:
    return write_evaluation(folder, "Pong", 0, "a" * 64, "b" * 64, returns, **more)


# --- what they say -------------------------------------------------------------------------------


def test_a_score_says_how_many_episodes_are_different(tmp_path: Path) -> None:
    found = read_evaluation(written(tmp_path, [1.0, 2.0, 6.0], beside=[4.0, 4.0, 5.0], truncated=2))
    assert (found.run, found.fingerprint, found.device) == ("a" * 64, "b" * 64, "cpu")
    assert list(found.played) == ["greedy", "sampled"]
    assert str(found.score) == (
        "mean return 3 over 3 greedy episodes, 3 different among them, 2 truncated"
    )
    assert found.played["sampled"].mean_return == 13 / 3
    assert not found.score.warning()


def test_sampled_actions_can_be_the_score(tmp_path: Path) -> None:
    path = written(tmp_path, [1.0, 2.0], beside=[4.0, 6.0], settings={"actions": "sampled"})
    score = read_evaluation(path).score
    assert (score.actions, score.mean_return) == ("sampled", 5.0)


def test_episodes_that_are_all_the_same_are_warned_of(tmp_path: Path) -> None:
    score = read_evaluation(written(tmp_path, [1.0, 1.0], same=True)).score
    assert score.different == 1
    assert score.warning() == (
        "all 2 greedy episodes are the same: their mean says no more than one of them"
    )
    early = {"episodes": 9, "enough_same": 2}
    score = read_evaluation(written(tmp_path, [1.0, 1.0], same=True, settings=early)).score
    assert score.warning().endswith("; 7 more were not played (evaluation.enough_same)")
    alone = read_evaluation(written(tmp_path, [1.0], same=True)).score
    assert not alone.warning(), "one episode was all that was asked for"


def test_the_note_holds_both_ways(tmp_path: Path) -> None:
    path = written(tmp_path, [1.0, 2.0], beside=[4.0, 5.0], truncated=1)
    note_evaluation(path)
    note = json.loads((tmp_path / NOTE).read_text())
    assert note["fingerprint"] == "b" * 64
    assert (note["actions"], note["episodes"], note["mean_return"]) == ("greedy", 2, 1.5)
    assert note["played"] == {
        "greedy": {"episodes": 2, "different": 2, "truncated": 1, "mean_return": 1.5},
        "sampled": {"episodes": 2, "different": 2, "truncated": 1, "mean_return": 4.5},
    }


# --- not whole -----------------------------------------------------------------------------------


def rewrite(path: Path, rows: list[dict[str, Any]], **header: Any) -> None:
    schema = pq.read_schema(path)
    known = json.loads(schema.metadata[b"drama"]) | header
    schema = schema.with_metadata({b"drama": json.dumps(known)})
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


@pytest.mark.parametrize(
    ("settings", "returns", "said"),
    [
        ({"episodes": 3}, [1.0, 1.0], "2 greedy episodes, 2 of them .* where 3 were asked for"),
        ({}, [1.0, float("nan")], "2 greedy episodes, 1 of them with a finite return"),
        ({"both": True}, [1.0, 1.0], "0 sampled episodes"),
        ({"episodes": 3, "enough_same": 3}, [1.0, 1.0], "where 3 were asked for"),
        ({"actions": "careful"}, [1.0, 1.0], "actions = 'careful': .*greedy, sampled"),
        ({"enough_same": 1}, [1.0, 1.0], "enough_same = 1: must be 0 .* or at least 2"),
        ({"episodes": None}, [1.0, 1.0], "episodes = None: expected a whole number"),
        ({"new": 1}, [1.0, 1.0], "new = 1: unknown key"),
    ],
)
def test_fewer_episodes_than_asked_for_are_noticed(
    tmp_path: Path, settings: dict[str, Any], returns: list[float], said: str
) -> None:
    path = written(tmp_path, returns, same=True, settings=settings)
    with pytest.raises(EvaluationDamaged, match=f"{path.name}: not a whole .*{said}"):
        read_evaluation(path)


def test_an_early_end_needs_episodes_that_are_the_same(tmp_path: Path) -> None:
    early = {"episodes": 9, "enough_same": 2}
    assert read_evaluation(written(tmp_path, [1.0, 1.0], same=True, settings=early))
    with pytest.raises(EvaluationDamaged, match="where 9 were asked for"):
        read_evaluation(written(tmp_path, [1.0, 1.0], settings=early))
    with pytest.raises(EvaluationDamaged, match="where 9 were asked for"):
        read_evaluation(written(tmp_path, [1.0, 1.0, 1.0], same=True, settings=early))


def test_rows_are_held_to_what_the_header_says_was_played(tmp_path: Path) -> None:
    path = written(tmp_path, [1.0, 2.0])
    rows = pq.read_table(path).to_pylist()
    assert read_evaluation(path).score.episodes == 2
    rewrite(path, rows, played={"greedy": 2, "sampled": 2})
    with pytest.raises(EvaluationDamaged, match="were played"):
        read_evaluation(path)
    rewrite(path, [*rows, rows[0] | {"actions": "careful"}], played={"greedy": 2})
    with pytest.raises(EvaluationDamaged, match="3 episodes"):
        read_evaluation(path)


# --- as commands ---------------------------------------------------------------------------------


@pytest.fixture
def copy(undisturbed: Workspace, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    for path in workspace.folder.glob("evaluation-*.parquet"):
        path.unlink()
    return workspace


def test_both_ways_are_played_stored_reported_and_verified(copy: Workspace) -> None:
    copy.plan("--set", "evaluation.both=true", "--set", "evaluation.actions=sampled")
    output = copy.evaluate()
    assert "over 5 sampled episodes" in output
    assert "Beside the score: mean return" in output and "over 5 greedy episodes" in output
    (path,) = copy.folder.glob("evaluation-*.parquet")
    found = read_evaluation(path)
    assert [row["actions"] for row in found.rows] == ["sampled"] * 5 + ["greedy"] * 5
    score = found.score.mean_return
    assert score == json.loads((copy.folder / NOTE).read_text())["mean_return"]
    copy.run("report", "results/tiny")
    (row,) = pq.read_table(copy.root / "results/tiny/report/scores.parquet").to_pylist()
    assert (row["actions"], row["mean_return"], row["sampled_return"]) == ("sampled", score, score)
    assert row["greedy_return"] == found.played["greedy"].mean_return
    (record,) = copy.folder.glob("run-*.json")
    verdict = verify(record, CPU)
    assert verdict.finding is Finding.VERIFIED and "all 10 episodes exactly" in verdict.text
    assert f"score {score:g} again" in verdict.text
    rewrite(path, [found.rows[0] | {"played": "0" * 16}, *found.rows[1:]])
    path.with_name("evaluation.json").unlink()  # it notes the checksum of what was there
    verdict = verify(record, CPU)
    assert verdict.finding is Finding.DIFFERENT and "9 of 10 episodes exactly" in verdict.text


def stubborn_run(workspace: Workspace, seed: int) -> Path:
    """Make a whole run, untrained, of an agent that prefers one action; returns its recipe."""
    workspace.plan("--seeds", str(seed), "--set", "evaluation.enough_same=2",
                   "--set", "evaluation.both=true")  # fmt: skip
    recipe = workspace.recipe.with_name(f"seed{seed}.json")
    run = read_recipe(recipe)
    agent = Agent(run.recipe.settings, actions=4)
    agent.behaviour.actor.net[-1].weight.data.zero_()
    agent.behaviour.actor.net[-1].bias.data.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    shutil.copytree(workspace.folder, run.folder)
    next(run.folder.glob("run-*.json")).unlink()
    save_checkpoint(run.folder / CHECKPOINT, run.fingerprint, {"agent": agent.state_dict()})
    write_record(
        run.record, run.recipe.model_dump(mode="json", by_alias=True), run.fingerprint,
        device="cpu", backend="torch", seconds=1.0, steps=1, image=None,
    )  # fmt: skip
    return recipe


def test_an_early_end_is_said_stored_and_verified(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.root)
    firsts = {
        seed: [int(new_episode(seed, i).generator.integers(4)) for i in range(2)]
        for seed in range(100)
    }
    seed = next(seed for seed, (one, other) in firsts.items() if one == other and seed != SEED)
    recipe = stubborn_run(copy, seed)
    output = copy.run("evaluate", str(recipe), "--device", "cpu")
    assert "over 2 greedy episodes, 1 different among them" in output
    assert "Warning: all 2 greedy episodes are the same" in output and "3 more were not" in output
    assert "over 5 sampled episodes, 5 different among them" in output
    folder = read_recipe(recipe).folder
    (path,) = folder.glob("evaluation-*.parquet")
    assert json.loads(pq.read_schema(path).metadata[b"drama"])["played"] == {
        "greedy": 2, "sampled": 5,
    }  # fmt: skip
    verdict = verify(next(folder.glob("run-*.json")), CPU)
    assert verdict.finding is Finding.VERIFIED and "all 7 episodes exactly" in verdict.text
    copy.run("report", "results/tiny")
    text = (copy.root / "results/tiny/report/report.md").read_text()
    assert f"All greedy episodes are one and the same in {GAME} (seed {seed})" in text
    assert f"2 greedy episodes, where 5 were asked for, in {GAME} (seed {seed})" in text


def test_an_altered_evaluation_is_not_believed_and_not_noted_anew(copy: Workspace) -> None:
    """Its bytes are held to the checksum that was kept when it was played."""
    copy.evaluate()
    (path,) = copy.folder.glob("evaluation-*.parquet")
    note = path.with_name("evaluation.json").read_bytes()
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["episode_return"] += 21
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    (record,) = copy.folder.glob("run-*.json")
    for play_again in (False, True):
        verdict = verify(record, CPU, play_again=play_again)
        assert verdict.finding is Finding.DAMAGED and "evaluation.json noted" in verdict.text
    for command, place in (("evaluate", copy.recipe), ("report", "results/tiny")):
        said = copy.run(command, str(place), expected=1)
        assert "not the bytes that evaluation.json noted" in said
    assert path.with_name("evaluation.json").read_bytes() == note
