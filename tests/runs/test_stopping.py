"""Requests to stop: which signals are one, and what a closed terminal leaves of a command."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("signals_arrive")

WORK = """
import sys, time
from pathlib import Path
from drama.errors import DramaError
from drama.runs.progress import EpisodesReporter, Reporter, Status
from drama.runs.stopping import Stopped, stop_at_once, stop_on_signal

folder, early = Path(sys.argv[1]), sys.argv[2:] == ["early"]
try:
    with stop_at_once():
        if early:
            (folder / "ready").touch()
            time.sleep(60)
        status = Status("f" * 64, "running", 0, 1000)
        with (
            stop_on_signal() as stop,
            Reporter("Pong seed 0", status, folder / "status.json") as reporter,
        ):
            (folder / "ready").touch()
            for step in range(6000):
                reporter.tick(step % 1000)
                if stop():
                    print("saving", file=sys.stderr, flush=True)
                    (folder / "saved").touch()
                    raise Stopped("stopped; saved")
                if (folder / "enough").exists():
                    break
                time.sleep(0.01)
except DramaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start the work in a session of its own, and wait until it is under way."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder), *arguments],
        text=True,
        start_new_session=True,
        **{"stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )
    while not (folder / "ready").exists():
        assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(tmp_path: Path, number: int) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 75 and "stopped; saved" in said
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save_ends_it(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "early")
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 75 and said == "stopped; the same command goes on\n"


def ignoring() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_command_under_nohup_minds_no_closed_terminal(tmp_path: Path) -> None:
    process = start(tmp_path, preexec_fn=ignoring)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "enough").touch()
    _, said = process.communicate()
    assert process.returncode == 0 and "stop" not in said
    assert not (tmp_path / "saved").exists()


def test_one_under_nohup_can_be_stopped_all_the_same(tmp_path: Path) -> None:
    process = start(tmp_path, preexec_fn=ignoring)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75 and (tmp_path / "saved").exists()


def controlled_by(terminal: int) -> Callable[[], None]:
    return lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_terminal_that_is_closed_loses_nothing(tmp_path: Path) -> None:
    """What is printed from then on, the bar included, is an error that keeps from nothing."""
    master, slave = pty.openpty()
    process = start(
        tmp_path, stdin=slave, stdout=slave, stderr=slave, preexec_fn=controlled_by(slave)
    )
    os.close(slave)
    os.close(master)  # the system sends SIGHUP
    assert process.wait() == 75
    assert (tmp_path / "saved").exists()
