"""Evaluations read back: what they say, files that are not whole, altered ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from report_files import write_evaluation, write_vouching
from workspace import GAME, SEED, AtWrite, Command, Workspace

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import new_episode
from drama.files import sha256_file
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
    write_vouching(path, pa.Table.from_pylist(rows, schema), known)


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
    rewrite(path, [*rows, rows[0] | {"actions": "sampled"}], played={"greedy": 2})
    with pytest.raises(EvaluationDamaged, match="3 episodes"):
        read_evaluation(path)
    rewrite(path, [rows[0], rows[0]], played={"greedy": 2})
    with pytest.raises(EvaluationDamaged, match="not numbered from 0 on"):
        read_evaluation(path)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("actions", "careful", "actions: Input should be 'greedy' or 'sampled'"),
        ("length", 0, "length: Input should be greater"),
        ("seed", -1, "seed: Input should be greater"),
        ("played", "0" * 17, "played: String should match"),
        ("run", "a" * 63, "run: String should match"),
        ("fingerprint", "c" * 64, "it is evaluation c{16}, not what its name says"),
        ("played by", {"greedy": -2}, "played.greedy: Input should be greater"),
        ("device", "", "device: String should have at least"),
        ("format", 2, "format: Input should be 1"),
    ],
)
def test_what_cannot_be_is_refused_though_the_file_vouches_for_it(
    tmp_path: Path, where: str, value: Any, said: str
) -> None:
    path = written(tmp_path, [1.0, 2.0])
    rows = pq.read_table(path).to_pylist()
    if where in rows[0]:
        rewrite(path, [rows[0] | {where: value}, rows[1]])
    else:
        rewrite(path, rows, **{where.removesuffix(" by"): value})
    with pytest.raises(EvaluationDamaged, match=f"{path.name}: not a whole .*{said}"):
        read_evaluation(path)


def test_a_pipe_in_an_evaluations_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / f"evaluation-{'b' * 16}.parquet"
    os.mkfifo(path)
    with pytest.raises(EvaluationDamaged, match="a pipe, not a file"):
        read_evaluation(path)


# --- as commands ---------------------------------------------------------------------------------


@pytest.fixture
def evaluated(undisturbed: Workspace, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    return workspace


@pytest.fixture
def copy(evaluated: Workspace) -> Workspace:
    """The same before it is evaluated."""
    for path in evaluated.folder.glob("evaluation-*.parquet"):
        path.unlink()
    return evaluated


@pytest.mark.whole
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


@pytest.mark.whole
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


# --- altered -------------------------------------------------------------------------------------


def alter(path: Path, *, digest: bool = True) -> None:
    """Add 21 to a return and keep all else, the digest only where asked for."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["episode_return"] += 21
    header = json.loads(table.schema.metadata[b"drama"])
    if not digest:
        header.pop("digest")
    schema = table.schema.with_metadata({b"drama": json.dumps(header)})
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def of_an_earlier_version(path: Path) -> None:
    """Make an evaluation one without a digest, noted as it was when it was played."""
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"drama"])
    del header["digest"]
    pq.write_table(table.replace_schema_metadata({b"drama": json.dumps(header)}), path)
    fit(path)


def fit(path: Path) -> None:
    """Edit evaluation.json to fit the file."""
    note = path.with_name(NOTE)
    known = json.loads(note.read_text())
    note.write_text(json.dumps(known | {"sha256": sha256_file(path), "mean_return": 21.0}))


NOTES: dict[str, Callable[[Path], None]] = {
    "kept": lambda path: None,
    "removed": lambda path: path.with_name(NOTE).unlink(),
    "emptied": lambda path: path.with_name(NOTE).write_bytes(b""),
    "edited to fit": fit,
}


Refused = Callable[[Path, str], None]


@pytest.fixture
def refused_everywhere(
    evaluated: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Hold every command that reads evaluations to refusing one and writing nothing."""
    monkeypatch.chdir(evaluated.root)
    monkeypatch.setenv("COLUMNS", "2000")
    drama = Command(monkeypatch, capsys)

    def check(path: Path, said: str) -> None:
        before = {file: file.read_bytes() for file in evaluated.folder.iterdir() if file.is_file()}
        for command, place in (("evaluate", evaluated.recipe), ("report", "results/tiny"),
                               ("verify", "results/tiny"), ("status", "results/tiny")):  # fmt: skip
            code, out, err = drama(command, str(place))
            assert code == (command != "status"), out + err
            text = " ".join((out + err).split())
            assert said in text and path.name in text and "evaluate again" in text, text
            assert "1 done" not in text
        with pytest.raises(EvaluationDamaged, match=said):  # what `drama record` calls
            note_evaluation(path)
        after = {file: file.read_bytes() for file in evaluated.folder.iterdir() if file.is_file()}
        assert before == after

    return check


@pytest.mark.parametrize("note", NOTES)
def test_an_altered_evaluation_is_not_believed_and_not_noted_anew(
    evaluated: Workspace, refused_everywhere: Refused, note: str
) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    alter(path)
    NOTES[note](path)
    refused_everywhere(path, "altered since it was played")


@pytest.mark.parametrize("note", ["kept", "removed", "emptied"])
def test_an_earlier_versions_evaluation_is_held_to_its_note(
    evaluated: Workspace, refused_everywhere: Refused, note: str
) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    of_an_earlier_version(path)
    before = path.with_name(NOTE).read_bytes()
    assert note_evaluation(path).score.episodes == 5
    assert "1 of 1 runs hold" in evaluated.run("verify", "--device", "cpu")
    assert path.with_name(NOTE).read_bytes() == before, (
        "nothing is renewed that nothing vouches for"
    )
    if note == "kept":
        alter(path)
    NOTES[note](path)
    said = "not the bytes that evaluation.json noted" if note == "kept" else "of an earlier version"
    refused_everywhere(path, said)


def test_a_digest_cannot_be_dropped_from_a_noted_evaluation(
    evaluated: Workspace, refused_everywhere: Refused
) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    alter(path, digest=False)
    refused_everywhere(path, "not the bytes that evaluation.json noted")


def test_a_note_of_other_bytes_is_not_written_over(
    evaluated: Workspace, refused_everywhere: Refused
) -> None:
    """The file vouches for itself and the note for another: which is right cannot be told."""
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    note = path.with_name(NOTE)
    note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": "0" * 64}))
    refused_everywhere(path, "not the bytes that evaluation.json noted")


@pytest.mark.parametrize("damage", ["missing", "emptied", "a return", "another evaluation's"])
def test_a_note_is_written_anew_from_an_evaluation_that_vouches_for_itself(
    evaluated: Workspace, damage: str
) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    note = path.with_name(NOTE)
    right = note.read_bytes()
    known = json.loads(right)
    others = {"a return": {"mean_return": 21}, "another evaluation's": {"fingerprint": "0" * 64}}
    note.write_text(json.dumps(known | others[damage]) if damage in others else "")
    if damage == "missing":
        note.unlink()
    assert "there already" in evaluated.evaluate()
    assert note.read_bytes() == right


def test_an_evaluation_that_is_played_anew_replaces_what_was_noted_of_it(
    evaluated: Workspace,
) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    note, before = path.with_name(NOTE), path.read_bytes()
    right = note.read_bytes()
    path.unlink()
    note.write_text(json.dumps(json.loads(right) | {"sha256": "0" * 64}))
    evaluated.evaluate()
    assert (path.read_bytes(), note.read_bytes()) == (before, right)


@pytest.mark.parametrize("file", ["evaluation-*.parquet", NOTE])
def test_a_kill_between_evaluation_and_note_heals_itself(evaluated: Workspace, file: str) -> None:
    (path,) = evaluated.folder.glob("evaluation-*.parquet")
    right = path.read_bytes(), path.with_name(NOTE).read_bytes()
    path.unlink()
    path.with_name(NOTE).unlink()
    moment = AtWrite(file, share=None if file != NOTE else 0.5)
    evaluated.run("evaluate", str(evaluated.recipe), "--device", "cpu", moment=moment, expected=-9)
    assert path.is_file() and not path.with_name(NOTE).exists()
    assert "there already" in evaluated.evaluate()
    assert (path.read_bytes(), path.with_name(NOTE).read_bytes()) == right


def test_an_earlier_versions_evaluation_stays_vouched_for_when_another_is_noted(
    tmp_path: Path,
) -> None:
    old = written(tmp_path, [1.0, 2.0])
    note_evaluation(old)
    of_an_earlier_version(old)
    for number, name in enumerate("cd"):
        new = write_evaluation(tmp_path, "Pong", 0, "a" * 64, name * 64, [float(number)])
        note_evaluation(new)
        assert read_evaluation(old).score.mean_return == 1.5
    alter(old)
    with pytest.raises(EvaluationDamaged, match=r"not the bytes that evaluation\.json noted"):
        read_evaluation(old)
    old.unlink()
    note_evaluation(new)
    assert list(json.loads((tmp_path / NOTE).read_text())["earlier"]) == [
        f"evaluation-{'c' * 16}.parquet"
    ]
