"""Verification: what a record promises, held to the files and to the score played again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from report_files import write_vouching
from workspace import GAME, SEED, Workspace

from drama.errors import ConfigurationError
from drama.files import canonical_json, sha256_file, sha256_text
from drama.pipeline import history, jobs
from drama.pipeline.artifacts import verify as module
from drama.pipeline.artifacts.export import export
from drama.pipeline.artifacts.records import find_records, read_record
from drama.pipeline.artifacts.verify import Finding, verify
from drama.pipeline.artifacts.weights import write_weights
from drama.pipeline.jobs import unplanned
from drama.pipeline.recipes import read_recipe
from drama.runs.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
STAGE = f"dvc pull train@{GAME}-{SEED}"


@pytest.fixture
def copy(undisturbed: Workspace, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    return workspace


def record(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("run-*.json")
    return path


def evaluation(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("evaluation-*.parquet")
    return path


def rewrite_evaluation(
    workspace: Workspace,
    change_row: Callable[[dict[str, Any]], None] = lambda row: None,
    change_header: Callable[[dict[str, Any]], None] = lambda header: None,
    which: int = 0,
) -> None:
    """Change one episode's row and the header of the recorded evaluation."""
    table = pq.read_table(evaluation(workspace))
    rows = table.to_pylist()
    header = json.loads(table.schema.metadata[b"drama"])
    change_row(rows[which])
    change_header(header)
    write_vouching(evaluation(workspace), pa.Table.from_pylist(rows, table.schema), header)
    # It notes the checksum of what was there.
    evaluation(workspace).with_name("evaluation.json").unlink(missing_ok=True)


def test_an_untouched_run_is_verified_and_left_alone(undisturbed: Workspace) -> None:
    before = undisturbed.tree()
    verdict = verify(record(undisturbed), CPU)
    assert verdict.finding is Finding.VERIFIED and verdict.holds
    assert "all 5 episodes exactly" in verdict.text
    assert undisturbed.tree() == before


@pytest.mark.parametrize("name", ["checkpoint.parquet", "episodes.parquet", "training.parquet"])
def test_one_flipped_bit_is_found_and_the_file_named(copy: Workspace, name: str) -> None:
    data = bytearray((copy.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy.folder / name).write_bytes(data)
    for play_again in (True, False):
        verdict = verify(record(copy), CPU, play_again=play_again)
        assert verdict.finding is Finding.DAMAGED and not verdict.holds
        assert f"not the recorded bytes: {name};" in verdict.text and STAGE in verdict.text


def test_a_missing_file_is_named_with_the_way_to_get_it(copy: Workspace) -> None:
    (lost, *_) = sorted((copy.folder / "replay").glob("*"))
    lost.unlink()
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.MISSING and not verdict.holds
    assert f"not here: replay/{lost.name};" in verdict.text and STAGE in verdict.text


@pytest.mark.parametrize(
    ("column", "change"), [("seed", 1), ("episode_return", 1.0), ("length", 1)]
)
def test_a_score_that_does_not_come_out_again_is_said(
    copy: Workspace, column: str, change: float
) -> None:
    rewrite_evaluation(copy, lambda row: row.update({column: row[column] + change}))
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.DIFFERENT and not verdict.holds
    assert "4 of 5 episodes exactly" in verdict.text


def test_a_score_made_elsewhere_need_not_come_out_exactly(copy: Workspace) -> None:
    rewrite_evaluation(
        copy,
        lambda row: row.update(episode_return=row["episode_return"] + 1),
        lambda header: header.update(device="NVIDIA H200"),
    )
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.SIMILAR and verdict.holds
    assert "another device" in verdict.text


@pytest.mark.parametrize("code", ["run_code", "evaluation_code"])
def test_todays_code_plays_a_score_of_other_code(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(module, code, lambda *_: "0" * 64)
    commit = json.loads(record(copy).read_text(encoding="utf-8"))["git_commit"][:12]
    said = f"with today's code; the run was made at commit {commit}"
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.VERIFIED and verdict.holds
    assert verdict.text.endswith(f"all 5 episodes exactly, {said}")
    rewrite_evaluation(copy, lambda row: row.update(length=row["length"] + 1))
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.EARLIER and not verdict.holds
    assert verdict.text.endswith(f"4 of 5 episodes exactly, {said}, which may be needed to play it")


def test_a_whole_run_of_earlier_code_is_scored_in_its_place_by_todays(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the code: the run's own recipe or, after `drama plan`, a later one."""
    monkeypatch.chdir(copy.root)
    before = read_record(record(copy)).fingerprint
    monkeypatch.setattr(jobs, "run_code", lambda choices: "e" * 64)
    recipe = Path(f"results/tiny/recipes/{GAME}/seed{SEED}.json")
    later = json.loads(recipe.read_text(encoding="utf-8")) | {"code": "e" * 64}
    for text in (recipe.read_text(encoding="utf-8"), canonical_json(later)):
        recipe.write_text(text, encoding="utf-8")
        evaluation(copy).unlink()
        files, scored = jobs.find_scored(recipe)
        assert files.fingerprint == before
        jobs.evaluate_run(files, scored, CPU, threads=1)
        assert scored.path == evaluation(copy).relative_to(copy.root)
        assert verify(record(copy), CPU).finding is Finding.VERIFIED
    other = later | {"seed": later["seed"], "preset": "another"}
    recipe.write_text(canonical_json(other), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="other code"):
        jobs.find_scored(recipe)


def test_an_earlier_codes_evaluation_beside_todays_is_played_too(copy: Workspace) -> None:
    today = evaluation(copy)
    earlier = today.with_name("evaluation-0000000000000000.parquet")
    shutil.copy(today, earlier)
    kept = today.rename(today.with_suffix(".kept"))
    rewrite_evaluation(copy, change_header=lambda header: header.update(fingerprint="0" * 64))
    kept.rename(today)
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.VERIFIED
    assert verdict.text.count("all 5 episodes exactly") == 2
    assert verdict.text.count("with today's code") == 1


@pytest.mark.parametrize("episodes", [1, 3, 99])
def test_the_first_episodes_alone_are_held_to_their_rows(copy: Workspace, episodes: int) -> None:
    last = pq.read_table(evaluation(copy)).num_rows - 1
    rewrite_evaluation(copy, which=last, change_row=lambda row: row.update(length=1))
    verdict = verify(record(copy), CPU, episodes=episodes)
    if episodes < 5:
        assert verdict.finding is Finding.VERIFIED
        assert f"the first {episodes} of 5 episodes again, exactly" in verdict.text
    else:
        assert verdict.finding is Finding.DIFFERENT
    rewrite_evaluation(copy, lambda row: row.update(length=1))
    assert verify(record(copy), CPU, episodes=episodes).finding is Finding.DIFFERENT


# --- in a clone: weights instead of checkpoint and replay ----------------------------------------


@pytest.fixture
def clone(copy: Workspace) -> Workspace:
    """What git keeps of a run whose weights were exported."""
    export(copy.recipe)
    (copy.folder / "checkpoint.parquet").unlink()
    shutil.rmtree(copy.folder / "replay")
    return copy


def weights(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("weights-*.safetensors")
    return path


def test_weights_stand_in_for_what_git_does_not_keep(clone: Workspace) -> None:
    before = clone.tree()
    verdict = verify(record(clone), CPU)
    assert verdict.finding is Finding.VERIFIED and verdict.holds
    assert verdict.text.startswith(
        "2 of 6 files intact, not here and not checked: checkpoint.parquet, "
        "replay/part-00000.parquet, replay/part-00001.parquet and 1 more; "
        "the weights are intact and name the recorded checkpoint; score "
    )
    assert clone.tree() == before


def test_weights_alone_prove_nothing_without_a_score(clone: Workspace) -> None:
    assert verify(record(clone), CPU, play_again=False).text.endswith("no score was played")
    evaluation(clone).unlink()
    verdict = verify(record(clone), CPU)
    assert verdict.finding is Finding.MISSING and "checkpoint.parquet" in verdict.text


def test_what_git_keeps_must_be_there_and_intact(clone: Workspace) -> None:
    (clone.folder / "episodes.parquet").write_bytes(b"other")
    assert verify(record(clone), CPU).finding is Finding.DAMAGED
    (clone.folder / "episodes.parquet").unlink()
    verdict = verify(record(clone), CPU)
    assert verdict.finding is Finding.MISSING and "episodes.parquet" in verdict.text


def test_damaged_weights_do_not_pass(clone: Workspace) -> None:
    data = bytearray(weights(clone).read_bytes())
    data[-1] ^= 1
    weights(clone).write_bytes(data)
    for play_again in (True, False):
        verdict = verify(record(clone), CPU, play_again=play_again)
        assert verdict.finding is Finding.DAMAGED and weights(clone).name in verdict.text


def test_weights_that_are_not_the_checkpoints_do_not_pass(copy: Workspace) -> None:
    export(copy.folder)
    run = read_record(record(copy))
    state = load_checkpoint(copy.folder / "checkpoint.parquet", run.fingerprint)["agent"]
    state["behaviour.actor.normaliser.mean"] += 1
    write_weights(run, state)
    verdict = verify(record(copy), CPU)
    assert (
        verdict.finding is Finding.DAMAGED and "not what checkpoint.parquet holds" in verdict.text
    )


# --- runs of earlier versions --------------------------------------------------------------------


def before_the_key(workspace: Workspace, section: str, key: str) -> Any:
    """Make the run one that was recorded before a setting was there; returns its value."""
    path = record(workspace)
    data = json.loads(path.read_text(encoding="utf-8"))
    value = data["recipe"]["settings"][section].pop(key)
    old, new = data["fingerprint"], sha256_text(canonical_json(data["recipe"]))
    checkpoint = workspace.folder / "checkpoint.parquet"
    save_checkpoint(checkpoint, new, load_checkpoint(checkpoint, old))
    for item in data["artifacts"]:
        if item["path"] == checkpoint.name:
            item |= {"sha256": sha256_file(checkpoint), "bytes": checkpoint.stat().st_size}
    path.unlink()
    (path.parent / f"run-{new[:16]}.json").write_text(
        canonical_json(data | {"fingerprint": new}), encoding="utf-8"
    )
    rewrite_evaluation(workspace, change_header=lambda header: header.update(run=new))
    return value


@pytest.mark.parametrize("here", ["checkpoint", "weights"])
def test_a_record_that_lacks_a_later_key_is_played(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    value = before_the_key(copy, "behaviour", "acting_window")
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.EARLIER and not verdict.holds
    assert "settings.behaviour.acting_window" in verdict.text and "commit" in verdict.text
    monkeypatch.setitem(history.ADDED, "behaviour.acting_window", value)
    if here == "weights":
        export(copy.folder)
        (copy.folder / "checkpoint.parquet").unlink()
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.VERIFIED and "with today's code" in verdict.text


def test_an_agent_that_todays_code_builds_otherwise_needs_earlier_code(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = before_the_key(copy, "behaviour", "actor_hidden")
    monkeypatch.setitem(history.ADDED, "behaviour.actor_hidden", value + 1)
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.EARLIER and not verdict.holds
    assert verdict.text.startswith("6 files intact; ")
    assert "behaviour.actor.net.0.weight is F32 [32, " in verdict.text


def test_without_a_score_the_files_are_checked(copy: Workspace) -> None:
    evaluation(copy).unlink()
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.INTACT and "no score" in verdict.text


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["recipe"].update(seed=SEED + 1),
        lambda data: data.update(fingerprint="0" * 64),
        lambda data: data.update(artifacts=data["artifacts"][1:]),
        lambda data: data.pop("artifacts"),
        lambda data: data["recipe"].pop("game"),
    ],
)
def test_a_changed_record_does_not_pass(
    copy: Workspace, change: Callable[[dict[str, Any]], None]
) -> None:
    path = record(copy)
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    verdict = verify(path, CPU)
    assert verdict.finding is Finding.DAMAGED
    assert path.name in verdict.text and "git checkout" in verdict.text


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_evaluation_is_named(copy: Workspace, damage: bytes | None) -> None:
    if damage is None:
        rewrite_evaluation(copy, change_header=lambda header: header.update(run="0" * 64))
    else:
        evaluation(copy).write_bytes(damage)
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.DAMAGED and evaluation(copy).name in verdict.text


def test_a_recipe_is_found_from_its_own_folder(
    undisturbed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(undisturbed.recipe.parent)
    here = Path(undisturbed.recipe.name)
    assert find_records([here]) == list(undisturbed.folder.glob("run-*.json"))
    assert unplanned(read_recipe(here)) == ""


def test_a_folder_that_cannot_be_looked_into_is_not_an_empty_one(
    undisturbed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: object) -> None:
        raise PermissionError(errno.EACCES, "", str(place))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        find_records([undisturbed.folder])


def test_runs_are_found_by_recipe_record_folder_or_preset(undisturbed: Workspace) -> None:
    path = record(undisturbed)
    results = undisturbed.root / "results"
    for place in (path, path.parent, undisturbed.recipe, results / "tiny", results):
        assert find_records([place]) == [path]


def test_runs_set_aside_are_found_only_when_named(copy: Workspace) -> None:
    aside = copy.root / f"results/tiny/superseded/{GAME}/seed{SEED}/{16 * '0'}"
    aside.parent.mkdir(parents=True)
    copy.folder.rename(aside)
    with pytest.raises(ConfigurationError, match="no whole run there"):
        find_records([copy.root / "results"])
    assert [path.parent for path in find_records([aside])] == [aside]


def test_the_command_counts_and_fails_when_a_run_does_not_hold(copy: Workspace) -> None:
    assert "1 of 1 runs hold" in copy.run("verify", str(copy.folder), "--device", "cpu")
    (copy.folder / "checkpoint.parquet").unlink()
    output = copy.run("verify", "--files-only", expected=1)
    assert "missing" in output and "0 of 1 runs hold" in output
    assert "no whole run there" in copy.run("verify", "config", expected=2)
