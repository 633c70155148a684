"""Evaluations that are killed and stopped between episodes, and go on with the same command."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from workspace import AtEpisode, AtWrite, Workspace, sha256

from drama.pipeline.artifacts.evaluations import NOTE, vouching
from drama.pipeline.episodes import KeptEpisodes

ORIGIN = {"run": "a" * 64, "fingerprint": "b" * 64, "device": "cpu", "backend": "torch",
          "threads": 1}  # fmt: skip
ROW = {"episode": 0, "actions": "greedy", "seed": 3, "episode_return": 1.5, "length": 40,
       "truncated": False, "played": "0" * 16}  # fmt: skip


@pytest.fixture(scope="module")
def whole(undisturbed: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run whose evaluation, nobody stopped it, has both ways and three environments."""
    workspace = Workspace(tmp_path_factory.mktemp("whole") / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    for path in workspace.folder.glob("evaluation*"):
        path.unlink()
    workspace.plan("--set", "evaluation.both=true", "--set", "evaluation.environments=3")
    assert "0 of 10 episodes" in workspace.evaluate()
    return workspace


def evaluation(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("evaluation-*.parquet")
    return path


def files(workspace: Workspace) -> dict[str, str]:
    return {path.name: sha256(path) for path in workspace.folder.glob("evaluation*")}


@pytest.fixture
def copy(whole: Workspace, tmp_path: Path) -> Workspace:
    """The same run before its evaluation."""
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(whole.root, workspace.root)
    for path in workspace.folder.glob("evaluation*"):
        path.unlink()
    return workspace


def kept(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("evaluation-*.kept.json")
    return path


def test_an_evaluation_killed_and_stopped_again_and_again_ends_with_the_same_bytes(
    whole: Workspace, copy: Workspace
) -> None:
    had = 0
    for least, expected, number in (
        (1, -9, signal.SIGKILL), (4, 75, signal.SIGTERM), (7, 75, signal.SIGHUP),
    ):  # fmt: skip
        said = copy.evaluate(expected, AtEpisode(least - had, (number,)))
        assert f"{had} of 10 episodes" in said and "Traceback" not in said
        before, had = had, len(json.loads(kept(copy).read_bytes())["rows"])
        assert before < least <= had < 10
        if number != signal.SIGKILL:
            assert f"stopped after {had} of 10 episodes, which are kept. The same command" in said
    assert f"{had} of 10 episodes · sampled mean return" in copy.evaluate()
    assert files(copy) == files(whole) and len(files(copy)) == 2


@pytest.mark.whole
def test_a_kill_before_the_kept_episodes_are_removed_heals_itself(
    whole: Workspace, copy: Workspace
) -> None:
    copy.evaluate(75, AtEpisode(7, (signal.SIGTERM,)))
    copy.evaluate(-9, AtWrite(NOTE, share=None))
    assert kept(copy).is_file()
    assert "there already" in copy.evaluate()
    assert files(copy) == files(whole)


def test_a_half_written_file_of_kept_episodes_is_never_seen(
    whole: Workspace, copy: Workspace
) -> None:
    copy.evaluate(-9, AtWrite("*.kept.json", share=0.5))
    copy.evaluate()
    assert files(copy) == files(whole)


def test_kept_episodes_that_were_altered_are_played_again(
    whole: Workspace, copy: Workspace
) -> None:
    copy.evaluate(75, AtEpisode(4, (signal.SIGTERM,)))
    rows = json.loads(kept(copy).read_bytes())
    rows["rows"][0]["episode_return"] += 21
    kept(copy).write_text(json.dumps(rows))
    said = copy.evaluate()
    assert "evaluation-" in said and "passed over (altered since it was written)" in said
    assert files(copy) == files(whole)


# --- the file ------------------------------------------------------------------------------------


def written(folder: Path, rows: list[dict[str, Any]], **origin: Any) -> KeptEpisodes:
    path = KeptEpisodes.beside(folder / "evaluation-0.parquet")
    header = {"format": 1, **ORIGIN, **origin}
    path.write_text(json.dumps({**vouching(header, rows), "rows": rows}))
    return KeptEpisodes(folder / "evaluation-0.parquet", ORIGIN)


def test_what_fits_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(tmp_path, [ROW]).rows == [ROW]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"run": "c" * 64}, "played with another run"),
        ({"fingerprint": "c" * 64}, "played with another fingerprint"),
        ({"device": "NVIDIA H200"}, "played with another device"),
        ({"backend": "mamba_ssm", "threads": 2}, "played with another backend, threads"),
        ({"threads": 0}, "threads: Input should be greater"),
        ({"format": 2}, "format: Input should be 1"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_what_does_not_fit_is_named_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: dict[str, Any], said: str
) -> None:
    kept = written(tmp_path, [ROW], **origin)
    line = capsys.readouterr().err
    assert not kept.rows and line.count("\n") == 1
    assert line.startswith(f"{kept.path}: passed over ({said}") and "played again" in line


@pytest.mark.parametrize(
    "change", [{"length": 0}, {"played": "0"}, {"actions": "careful"}, {"episode": -1},
               {"episode_return": "1"}]
)  # fmt: skip
def test_rows_that_cannot_be_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    assert not written(tmp_path, [ROW, ROW | change]).rows
    assert "passed over (rows.1." in capsys.readouterr().err


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_pipe, "a pipe, not a file"),
        (Path.mkdir, "a folder, not a file"),
        (lambda path: path.write_text("{"), "not JSON from line 1 on"),
        (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        (lambda path: path.write_bytes(b""), "not JSON from line 1 on"),
    ],
)
def test_what_is_no_such_file_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, said: str
) -> None:
    make(KeptEpisodes.beside(tmp_path / "evaluation-0.parquet"))
    assert not KeptEpisodes(tmp_path / "evaluation-0.parquet", ORIGIN).rows
    assert f"passed over ({said})" in capsys.readouterr().err
