"""Choosing a GPU: real processes, given names of GPUs instead of GPUs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from drama.pipeline.gpus import count

CLAIM = (
    "import sys; from pathlib import Path; from drama.pipeline.gpus import claim\n"
    "print(claim(sys.argv[2:], Path(sys.argv[1])), flush=True)\n"
    "sys.stdin.read()\n"
)
GPUS = ("GPU-a", "GPU-b", "GPU-c")


class Claims:
    """Processes that took a GPU and hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, number: int, names: tuple[str, ...] = GPUS) -> list[int]:
        """Start some processes at once; return what each took."""
        started = [
            subprocess.Popen(
                [sys.executable, "-c", CLAIM, str(self.folder), *names],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(number)
        ]
        self.processes += started
        return [int(process.stdout.readline()) for process in started if process.stdout]

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()


@pytest.fixture
def claims(tmp_path: Path):
    started = Claims(tmp_path / "gpus")
    yield started
    for process in started.processes:
        started.kill(process)


def test_processes_started_at_once_each_get_a_gpu(claims: Claims) -> None:
    assert sorted(claims.start(3)) == [0, 1, 2]


def test_more_processes_than_gpus_share_them_evenly(claims: Claims) -> None:
    assert Counter(claims.start(6)) == {0: 2, 1: 2, 2: 2}


def test_a_killed_process_leaves_its_gpu_to_the_next(claims: Claims) -> None:
    taken = claims.start(3)
    claims.kill(claims.processes[taken.index(1)])
    assert claims.start(1) == [1]


def test_a_process_that_sees_fewer_gpus_chooses_among_those(claims: Claims) -> None:
    assert claims.start(1, ("GPU-b", "GPU-c")) == [0]
    assert sorted(claims.start(2)) == [0, 2], "GPU-b is taken, whatever its place in the list"


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("0", 1), ("0,2,GPU-77", 3)])
def test_gpus_that_were_chosen_for_us_are_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count() == expected


def test_a_machine_without_a_driver_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count() == 0
