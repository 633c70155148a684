"""Verification: what a record promises, held to the files and to the score played again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from workspace import GAME, SEED, Workspace

from drama.artifacts import verify as module
from drama.artifacts.verify import Finding, find_records, verify
from drama.errors import ConfigurationError

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
) -> None:
    """Change the first episode's row and the header of the recorded evaluation."""
    table = pq.read_table(evaluation(workspace))
    rows = table.to_pylist()
    header = json.loads(table.schema.metadata[b"drama"])
    change_row(rows[0])
    change_header(header)
    schema = table.schema.with_metadata({b"drama": json.dumps(header)})
    pq.write_table(pa.Table.from_pylist(rows, schema), evaluation(workspace))


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


@pytest.mark.parametrize("code", ["RUN_CODE", "EVALUATION_CODE"])
def test_a_score_of_other_code_is_not_played(
    undisturbed: Workspace, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(module, code, ("errors.py",))
    verdict = verify(record(undisturbed), CPU)
    assert verdict.finding is Finding.UNPLAYABLE and not verdict.holds
    assert "other code" in verdict.text
    assert verify(record(undisturbed), CPU, play_again=False).finding is Finding.INTACT


def test_an_earlier_codes_evaluation_beside_todays_is_passed_over(copy: Workspace) -> None:
    today = evaluation(copy)
    earlier = today.with_name("evaluation-0000000000000000.parquet")
    shutil.copy(today, earlier)
    rewritten = today.with_suffix(".kept")
    today.rename(rewritten)
    rewrite_evaluation(copy, change_header=lambda header: header.update(fingerprint="0" * 64))
    rewritten.rename(today)
    verdict = verify(record(copy), CPU)
    assert verdict.finding is Finding.VERIFIED
    assert "made by other code" in verdict.text and "all 5 episodes exactly" in verdict.text


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
