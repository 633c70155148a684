"""Who holds a run: with flock, on file systems without it, and where other nodes do not see it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drama.runs import locks
from drama.runs.locks import Holder, NoLock, RunBusy, died_here, flock_works, locked, read_holder

FORK = multiprocessing.get_context("fork")
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs/Pong/seed0"


def take_flock_away(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> list[object]:
    """Stand in for a file system without flock; returns the calls that it refuses."""
    calls: list[object] = []

    def refuse(file: object, how: int) -> None:
        calls.append(file)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_FLOCK_WORKS", {})
    return calls


@pytest.fixture(params=["flock", "no flock"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":
        take_flock_away(monkeypatch)
    return str(request.param)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    take_flock_away(monkeypatch)


def leave(folder: Path, silence: float = 0, text: str | None = None, **named: Any) -> Path:
    """Leave a lock file as a holder leaves it who gave the last sign of life some seconds ago."""
    path = locks.lock_of(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"host": "node7", "process": 4321, "since": "2026-11-01T10:00:00+00:00"} | named
    path.write_text(json.dumps(holder) if text is None else text, encoding="utf-8")
    os.utime(path, (time.time() - silence,) * 2)
    return path


def is_busy(folder: Path) -> bool:
    try:
        with locked(folder, wait=False):
            return False
    except RunBusy:
        return True


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- one lock, with flock and without ------------------------------------------------------------


@pytest.mark.usefixtures("either")
def test_two_cannot_have_a_run_and_the_next_can(folder: Path) -> None:
    for _ in range(2):
        with locked(folder):
            with (
                pytest.raises(RunBusy, match=f"seed0: process {os.getpid()} on "),
                locked(folder, wait=False),
            ):
                pass
            assert not is_busy(folder.with_name("seed1"))
        assert not any(folder.parent.iterdir()), "nothing is left"


def _hold(folder: Path, ready: Callable[[], None]) -> None:
    with locked(folder):
        ready()
        signal.pause()


@pytest.mark.usefixtures("either")
def test_a_killed_holder_on_this_node_is_dead_at_once(folder: Path) -> None:
    ready = FORK.Event()
    process = FORK.Process(target=_hold, args=(folder, ready.set))
    process.start()
    assert ready.wait(60) and process.pid is not None
    assert is_busy(folder) and not died_here(folder)
    found = read_holder(folder)
    assert found is not None and (found.host, found.process) == (platform.node(), process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert read_holder(folder) is None and died_here(folder)
    assert not is_busy(folder)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("silence", [31, -3600], ids=["waited", "clock set back"])
def test_who_is_killed_while_taking_the_lock_keeps_nobody_waiting_for_long(
    folder: Path, silence: float
) -> None:
    leave(folder, 1, text="")
    assert is_busy(folder), "its holder may just be writing its name"
    leave(folder, silence, text="")
    assert not is_busy(folder)


def _count(folder: Path, turns: Any) -> None:
    mark = folder.parent / "mark"
    for _ in range(3):
        with locked(folder):
            mark.touch(exist_ok=False)
            time.sleep(0.002)
            mark.unlink()
            with turns.get_lock():
                turns.value += 1


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("host", [platform.node(), "node7"])
def test_of_many_who_find_the_holder_dead_one_at_a_time_takes_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    leave(folder, silence=1000, host=host, process=dead_process())
    turns = FORK.Value("i", 0)
    processes = [FORK.Process(target=_count, args=(folder, turns)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert turns.value == 24
    assert not any(folder.parent.iterdir()), "no claim is left"


@pytest.mark.usefixtures("either")
def test_one_who_died_taking_over_is_in_nobodys_way(folder: Path) -> None:
    path = leave(folder, silence=1000)
    look = locks._look(path)
    assert look is not None
    claim = path.with_name(f"{path.name}.{look.identity}")
    claim.write_text(json.dumps({"host": platform.node(), "process": dead_process()}))
    with locked(folder):
        pass
    assert not any(folder.parent.iterdir())


def test_one_who_waits_without_flock_goes_on_when_the_other_ends(
    folder: Path, without: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "PAUSE", 0.05)
    turns = FORK.Value("i", 0)
    with locked(folder):
        process = FORK.Process(target=_count, args=(folder, turns))
        process.start()
        time.sleep(0.3)
        assert turns.value == 0
    process.join(60)
    assert turns.value == 3
    assert capfd.readouterr().err.count(f"waiting for process {os.getpid()} on ") == 1


# --- holders on other nodes ----------------------------------------------------------------------


@pytest.mark.usefixtures("either")
def test_one_on_another_node_is_alive_until_it_is_silent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for silence, alive in ((0, True), (200, True), (400, False)):
        leave(folder, silence, job="77", cluster="alpha")
        assert (read_holder(folder) is not None) == alive
        assert not died_here(folder)
        assert is_busy(folder) == alive
    assert "process 4321 on node7, Slurm job 77 is gone" in capsys.readouterr().err


SQUEUE = {
    "running": ("echo RUNNING", True),
    "over": ("true", False),
    "over for a while": ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),
    "no answer": ("echo Unable to contact slurm controller >&2; exit 1", True),
}


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("answer", SQUEUE)
def test_one_whose_slurm_job_is_over_is_dead_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    script, alive = SQUEUE[answer]
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n[ $3 = --jobs=77 ] || exit 9\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alpha")
    for cluster, silence in (("beta", 100), ("alpha", 5)):
        leave(folder, silence, job="77", cluster=cluster)
        assert is_busy(folder), "another cluster's queue says nothing, nor is it asked at once"
    leave(folder, 100, job="77", cluster="alpha")
    assert is_busy(folder) == alive


def test_a_holder_names_its_job_and_gives_signs_of_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with locked(folder):
        path = locks.lock_of(folder)
        assert json.loads(path.read_text(encoding="utf-8"))["job"] == "77"
        found = read_holder(folder)
        assert found is not None and (found.process, found.job) == (os.getpid(), "77")
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert read_holder(folder) is None


def test_one_that_finds_its_run_taken_over_ends_without_saving(folder: Path) -> None:
    code = (
        "import time; from pathlib import Path; from drama.runs import locks\n"
        "locks.HEARTBEAT = 0.05\n"
        f"with locks.locked(Path({str(folder)!r})): print(flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    path = leave(folder)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "process 4321 on node7 took this run over" in errors
    assert path.exists(), "the other's lock stays"


# --- what is tolerated ---------------------------------------------------------------------------


def test_flock_is_tried_once_per_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    assert flock_works(folder)
    for number in MISSING:
        calls = take_flock_away(monkeypatch, number)
        assert not flock_works(folder)
        for _ in range(3):
            assert not is_busy(folder)
        assert len(calls) == 1


def test_lock_files_of_version_0_1_0_are_understood(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "process 12 on node7"
    assert Holder.parse(text) == Holder("node7", 12)
    leave(folder, text=text)
    assert not is_busy(folder), "its holder would have flock"
    leave(folder, text=f"process 1 on {platform.node()}")
    assert died_here(folder) and not is_busy(folder)
    take_flock_away(monkeypatch)
    leave(folder, text=text)
    assert is_busy(folder)


# Also by a stranger: a process that stands for all of them, a job that is an option of squeue's.
DAMAGED = (
    "", "{", "[]", '{"host": "node7"}', '{"process": "1"}', "\0", "[" * 100_000,
    '{"host": "node7", "process": -1}', '{"host": "node7", "process": 0}',
    '{"host": "node7", "process": 1e99}', '{"host": ["node7"], "process": 1}',
    '{"host": "node7", "process": 1, "job": "1 --user=root"}',
    '{"host": "' + "n" * 1000 + '", "process": 1}', "process 99999999999999999999 on node7",
)  # fmt: skip


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_lock_file_counts_as_one_that_is_just_being_written(
    folder: Path, text: str
) -> None:
    leave(folder, text=text)
    assert is_busy(folder) and read_holder(folder) == Holder("unknown", 0)
    leave(folder, silence=1000, text=text)
    assert not is_busy(folder)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_what_is_no_lock_file_is_named_and_waits_for_nobody(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    for target in (tmp_path / "nowhere", leave(tmp_path / "another's")):
        path = locks.lock_of(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target) if kind == "a link" else os.mkfifo(path)
        for look in (lambda: is_busy(folder), lambda: read_holder(folder)):
            with pytest.raises(NoLock, match=f"{kind}, .*remove it"):
                look()
        path.unlink()


@pytest.mark.usefixtures("either")
def test_a_lock_file_that_is_overwritten_with_anything_is_left(folder: Path) -> None:
    path = locks.lock_of(folder)
    with locked(folder):
        path.write_bytes(b"\xff\xfe")
    assert path.read_bytes() == b"\xff\xfe"
