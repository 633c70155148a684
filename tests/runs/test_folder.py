"""A run's folder: who works on it, whose it is, what makes it whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

import drama
from drama.files import canonical_json, sha256_file, sha256_text, write_json
from drama.runs.checkpoint import checkpoint_scalar, save_checkpoint
from drama.runs.folder import (
    FolderUnclear,
    RunBusy,
    git_commit,
    is_whole,
    locked,
    make_current,
    owner,
    restore,
    superseded,
    write_record,
)
from drama.runs.progress import Status

RECIPES = {sha256_text(canonical_json({"game": name})): {"game": name} for name in "abc"}
ONE, TWO, THREE = RECIPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results/quick/runs/Pong/seed0"


def begin(folder: Path, fingerprint: str, text: str = "") -> None:
    """Leave what a run leaves that was begun and not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    Status(fingerprint, "stopped", 1, 160).write(folder / "status.json")
    save_checkpoint(folder / "checkpoint.parquet", fingerprint, {"text": text or fingerprint})


def finish(folder: Path, fingerprint: str) -> None:
    record = {"fingerprint": fingerprint, "recipe": RECIPES[fingerprint], "artifacts": [{}]}
    write_json(folder / f"run-{fingerprint[:16]}.json", record)


def held(folder: Path) -> str:
    return str(checkpoint_scalar(folder / "checkpoint.parquet", "text"))


# --- the lock ------------------------------------------------------------------------------------


def test_two_cannot_have_a_run_and_the_next_can(folder: Path) -> None:
    with locked(folder):
        busy = f"seed0: process {os.getpid()} on "
        with pytest.raises(RunBusy, match=busy), locked(folder, wait=False):
            pass
        with locked(folder.with_name("seed1")):
            pass
    with locked(folder):
        pass
    assert not folder.exists(), "a lock makes no run"


def _hold(folder: Path, ready: Callable[[], None]) -> None:
    with locked(folder):
        ready()
        signal.pause()


def test_another_processs_lock_holds_and_goes_with_it_when_killed(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(folder, ready.set))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunBusy), locked(folder, wait=False):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(folder):
        pass


def test_one_who_waits_says_for_whom_and_goes_on_when_the_other_ends(folder: Path) -> None:
    code = (
        "from pathlib import Path; from drama.runs.folder import locked\n"
        f"with locked(Path({str(folder)!r})): print('mine', flush=True)\n"
    )
    with locked(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        said = process.stderr.readline()
        assert f"waiting for process {os.getpid()} on " in said and str(folder) in said
        assert process.poll() is None
    assert process.communicate(timeout=60) == ("mine\n", "")


def test_a_programs_child_does_not_keep_the_lock(folder: Path) -> None:
    code = (
        "import subprocess, sys; from pathlib import Path; from drama.runs.folder import locked\n"
        f"with locked(Path({str(folder)!r})):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "    print(child.pid, flush=True)\n"
        "    import os; os._exit(0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.wait() == 0
        with locked(folder, wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


# --- whose folder it is --------------------------------------------------------------------------


def test_a_folder_belongs_to_the_run_whose_files_lie_in_it(folder: Path) -> None:
    assert owner(folder) is None
    folder.mkdir(parents=True)
    assert owner(folder) is None
    Status(THREE, "stopped", 1, 160).write(folder / "status.json")
    assert owner(folder) == THREE[:16]
    begin(folder, ONE)
    assert owner(folder) == ONE[:16]
    finish(folder, TWO)
    assert owner(folder) == TWO[:16]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"fingerprint": "../../x"}', f'{{"fingerprint": "{TWO}"}}']
)
def test_whatever_the_status_says_a_checkpoint_says_whose_a_folder_is(
    folder: Path, content: str
) -> None:
    begin(folder, ONE)
    (folder / "status.json").write_text(content)
    assert owner(folder) == ONE[:16]
    make_current(folder, ONE)
    assert held(folder) == ONE


def test_a_status_that_names_a_place_moves_nothing(folder: Path) -> None:
    folder.mkdir(parents=True)
    status = asdict(Status("", "stopped", 0, 160)) | {"fingerprint": "../../../elsewhere"}
    (folder / "status.json").write_text(json.dumps(status))
    assert owner(folder) == "unknown"
    make_current(folder, ONE)
    assert (superseded(folder, "unknown") / "status.json").is_file()


def test_runs_take_turns_and_none_is_lost(folder: Path) -> None:
    for fingerprint in (ONE, TWO, THREE):
        make_current(folder, fingerprint)
        begin(folder, fingerprint)
    for fingerprint in (ONE, THREE, THREE, TWO, ONE):
        make_current(folder, fingerprint)
        assert held(folder) == fingerprint
        assert owner(folder) == fingerprint[:16]
        others = {ONE, TWO, THREE} - {fingerprint}
        assert {held(superseded(folder, other)) for other in others} == others
    aside = superseded(folder, TWO)
    assert aside == folder.parents[2] / "superseded/Pong/seed0" / TWO[:16]


def test_a_half_made_switch_is_finished(folder: Path) -> None:
    """As after a kill between setting one run aside and bringing the other back."""
    begin(folder, ONE)
    make_current(folder, TWO)
    begin(folder, TWO)
    aside = superseded(folder, TWO)
    aside.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    make_current(folder, ONE)
    assert held(folder) == ONE
    assert held(aside) == TWO


@pytest.mark.parametrize("left", [[], [".status.json.abc.part"]])
def test_an_empty_folder_is_in_nobodys_way(folder: Path, left: list[str]) -> None:
    """As after a kill before the first file, or within it."""
    begin(folder, ONE)
    make_current(folder, TWO)
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text("half")
    make_current(folder, ONE)
    assert held(folder) == ONE
    assert not superseded(folder, "unknown").exists()


def test_files_that_are_no_runs_are_kept_too_each_apart(folder: Path) -> None:
    for text in ("first", "second"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notes.txt").write_text(text)
        make_current(folder, TWO)
    kept = superseded(folder, "unknown")
    assert (kept / "notes.txt").read_text() == "first"
    assert (kept.with_name("unknown-2") / "notes.txt").read_text() == "second"


@pytest.mark.parametrize("trace", ["checkpoint.parquet", "training.parquet", "replay"])
def test_steps_of_nobody_knows_whom_are_neither_moved_nor_begun_over(
    folder: Path, trace: str
) -> None:
    folder.mkdir(parents=True)
    (folder / trace).mkdir() if trace == "replay" else (folder / trace).write_text("damaged")
    with pytest.raises(FolderUnclear, match=rf"{trace}.*move the folder away"):
        make_current(folder, ONE)
    assert [item.name for item in folder.iterdir()] == [trace]


def leave_record(folder: Path) -> None:
    finish(folder, TWO)


def leave_checkpoint(folder: Path) -> None:
    (folder / "checkpoint.parquet").rename(folder / "checkpoint.previous.parquet")
    save_checkpoint(folder / "checkpoint.parquet", TWO, {"text": "another's"})


@pytest.mark.parametrize("leave", [leave_record, leave_checkpoint])
@pytest.mark.parametrize("informed", [True, False])
def test_a_run_is_not_begun_over_where_another_one_left_a_file_beside_its_checkpoint(
    folder: Path, leave: Callable[[Path], None], informed: bool
) -> None:
    begin(folder, ONE)
    leave(folder)
    if not informed:
        (folder / "status.json").unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(FolderUnclear, match=TWO[:16]):
        make_current(folder, ONE)
    assert sorted(folder.iterdir()) == before
    make_current(folder, THREE)
    assert sorted(path.name for path in superseded(folder, TWO).iterdir()) == [
        path.name for path in before
    ]


def test_no_run_is_brought_back_from_behind_a_link(folder: Path, tmp_path: Path) -> None:
    begin(folder, ONE)
    aside, elsewhere = superseded(folder, TWO), tmp_path / "elsewhere"
    elsewhere.mkdir()
    aside.parent.mkdir(parents=True)
    aside.symlink_to(elsewhere)
    with pytest.raises(FolderUnclear, match="a link"):
        make_current(folder, TWO)
    assert held(folder) == ONE and aside.is_symlink()


def test_a_current_run_is_not_touched(folder: Path) -> None:
    begin(folder, ONE)
    before = folder.stat().st_ino
    make_current(folder, ONE)
    assert folder.stat().st_ino == before and held(folder) == ONE


def test_restoring_waits_for_nobody(folder: Path) -> None:
    begin(folder, ONE)
    make_current(folder, TWO)
    begin(folder, TWO)
    with locked(folder):
        restore(folder, ONE)
        assert held(folder) == TWO
    restore(folder, THREE)  # never was there
    assert held(folder) == TWO
    restore(folder, ONE)
    assert held(folder) == ONE


def test_restoring_takes_no_whole_runs_place_for_half_a_run(folder: Path) -> None:
    begin(folder, ONE)
    make_current(folder, TWO)
    begin(folder, TWO)
    finish(folder, TWO)
    restore(folder, ONE)
    assert held(folder) == TWO
    finish(superseded(folder, ONE), ONE)
    restore(folder, ONE)
    assert held(folder) == ONE


def test_what_is_set_aside_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_current(folder, ONE)
    begin(folder, ONE)
    make_current(folder, ONE)
    assert capsys.readouterr().err == ""
    make_current(folder, TWO)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run {ONE[:16]} set aside to {superseded(folder, ONE)}" in line and TWO[:16] in line


def test_a_run_is_whole_wherever_it_is_kept(folder: Path) -> None:
    assert not is_whole(folder, ONE)
    begin(folder, ONE)
    assert not is_whole(folder, ONE)
    finish(folder, ONE)
    assert is_whole(folder, ONE) and not is_whole(folder, TWO)
    make_current(folder, TWO)
    assert is_whole(folder, ONE) and not is_whole(folder, TWO)


@pytest.mark.parametrize(
    "changed", [{"fingerprint": "f" * 64}, {"recipe": {}}, {"artifacts": []}, {"recipe": None}]
)
def test_a_record_that_is_not_one_makes_no_run_whole_and_takes_no_folder(
    folder: Path, changed: dict[str, object]
) -> None:
    begin(folder, ONE)
    for fingerprint in (ONE, TWO):
        record = {"fingerprint": fingerprint, "recipe": RECIPES[fingerprint], "artifacts": [{}]}
        write_json(folder / f"run-{fingerprint[:16]}.json", record | changed)
        assert not is_whole(folder, fingerprint)
        assert owner(folder) == ONE[:16]


# --- the record ----------------------------------------------------------------------------------


def test_a_record_lists_every_artifact_as_it_is(folder: Path) -> None:
    begin(folder, ONE)
    (folder / "replay").mkdir()
    for name in ("episodes.parquet", "training.parquet", "replay/part-00000.parquet"):
        (folder / name).write_text(name)
    (folder / "evaluation-0123456789abcdef.parquet").write_text("not the run's")
    (folder / "replay/part-00001.parquet.partial").write_text("not whole")
    path = folder / f"run-{ONE[:16]}.json"
    write_record(
        path, {"game": "Pong"}, ONE,
        device="cpu", backend="torch", seconds=1.26, steps=160, image="ab",
    )  # fmt: skip
    record = json.loads(path.read_text())
    assert set(record) == {
        "format", "fingerprint", "recipe", "artifacts", "versions", "image", "device",
        "backend", "wall_seconds", "steps", "git_commit", "finished",
    }  # fmt: skip
    assert record["image"] == "ab"
    assert record["recipe"] == {"game": "Pong"} and record["fingerprint"] == ONE
    assert (record["wall_seconds"], record["steps"]) == (1.3, 160)
    assert (record["device"], record["backend"]) == ("cpu", "torch")
    assert {"python", "torch", "ale-py", "numpy"} <= set(record["versions"])
    assert [item["path"] for item in record["artifacts"]] == [
        "checkpoint.parquet", "episodes.parquet", "replay/part-00000.parquet", "training.parquet",
    ]  # fmt: skip
    for item in record["artifacts"]:
        file = folder / item["path"]
        assert item["sha256"] == sha256_file(file) and item["bytes"] == file.stat().st_size


def test_the_commit_is_the_codes_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = git_commit()
    monkeypatch.chdir(tmp_path)
    assert git_commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_only_changed_code_makes_a_commit_dirty(root: Path, tmp_path: Path) -> None:
    shutil.copytree(
        root / "drama", tmp_path / "drama", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "recipe.json").write_text("{}")

    def git(*arguments: str) -> str:
        names = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        command = ["git", *names, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    def commit() -> str:
        code = "from drama.runs.folder import git_commit; print(git_commit())"
        return subprocess.check_output(
            [sys.executable, "-c", code], cwd=tmp_path, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        ).strip()  # fmt: skip

    assert commit() == "None"
    git("init", "--quiet")
    git("add", "recipe.json")
    git("commit", "--quiet", "--message=A repository of somebody else")
    assert commit() == "None"
    git("add", ".")
    git("commit", "--quiet", "--message=All of it")
    for folder in ("drama", "drama/agent/env"):  # and no .gitignore names them
        (tmp_path / folder / "__pycache__").mkdir(exist_ok=True)
        (tmp_path / folder / "__pycache__/new.pyc").touch()
    (tmp_path / "recipe.json").write_text('{"changed": 1}')
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "drama/new.py").write_text("")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_copy_in_somebody_elses_repository_has_no_commit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "theirs" / "drama"
    code.mkdir(parents=True)
    shutil.copy(root / "drama/__init__.py", code)
    for arguments in (["init", "--quiet"], ["add", "."],
                      ["-c", "user.name=Test", "-c", "user.email=test@example.org",
                       "commit", "--quiet", "--message=All of it"]):  # fmt: skip
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(drama, "__file__", str(code / "__init__.py"))
    assert git_commit() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a checkout to another user")
def test_a_checkout_of_another_user_has_its_commit_or_a_warning(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "checkout" / "drama"
    code.mkdir(parents=True)
    shutil.copy(root / "drama/__init__.py", code)
    names = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for arguments in (["init"], ["add", "."], [*names, "commit", "--message=All of it"]):
        command = ["git", *arguments]
        subprocess.run(command, cwd=code.parent, check=True, stdout=subprocess.DEVNULL)
    monkeypatch.setattr(drama, "__file__", str(code / "__init__.py"))
    commit = git_commit()
    assert commit is not None
    for path in (code.parent, *code.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    refused = subprocess.run(["git", "status"], cwd=code, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert git_commit() == commit and capsys.readouterr().err == ""

    git = tmp_path / "bin/git"  # stands in for one that takes this from files only
    git.parent.mkdir()
    git.write_text(f'#!/bin/sh\nshift 2\nexec {shutil.which("git")} "$@"\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    assert git_commit() is None
    said = capsys.readouterr().err
    assert f"--add safe.directory {code.parent}" in said and said.count("\n") == 1
