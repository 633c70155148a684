"""What a person sees: a bar on a terminal, lines elsewhere, status.json for whoever asks."""

from __future__ import annotations

import json
import os
import pty
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from drama.runs import progress
from drama.runs.progress import Reporter, Status

FINGERPRINT = "f" * 64
MEANS = {"loss/reconstruction": 12.34, "loss/reward": 0.5, "loss/dynamics": 1.0, "entropy": 2.0}


def read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture
def status() -> Status:
    return Status(FINGERPRINT, "running", 20, 100)


def steps(path: Path, status: Status, fail: Callable[[], None] = lambda: None) -> None:
    with Reporter("Pong seed 3", status, path) as reporter:
        reporter.finish_episode(-21.0)
        reporter.show(MEANS)
        for step in range(21, 101):
            reporter.tick(step)
        fail()
        status.state = "done"


def test_status_says_where_a_run_is(tmp_path: Path, status: Status) -> None:
    path = tmp_path / "status.json"
    seen = []
    with Reporter("Pong seed 3", status, path) as reporter:
        seen.append(read(path))
        reporter.tick(60)
        status.state = "done"
    seen.append(read(path))
    assert [item["state"] for item in seen] == ["running", "done"]
    assert [item["step"] for item in seen] == [20, 60]
    assert seen[1]["total_steps"] == 100 and seen[1]["fingerprint"] == FINGERPRINT
    assert datetime.fromisoformat(str(seen[1]["updated"])).tzinfo == UTC
    assert abs(datetime.now(UTC).timestamp() - status_time(seen[1])) < 3600


def status_time(data: dict[str, object]) -> float:
    return datetime.fromisoformat(str(data["updated"])).timestamp()


def test_off_a_terminal_there_is_a_line_now_and_then(
    tmp_path: Path,
    status: Status,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps(tmp_path / "status.json", status)
    captured = capsys.readouterr()
    assert captured.err == "Pong seed 3: from step 20 of 100\n"
    assert captured.out == ""
    status.step = 20
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "STATUS_SECONDS", 0.0)
    steps(tmp_path / "status.json", status)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 40
    assert re.fullmatch(
        r"Pong seed 3: step 60 of 100 · [\d.]+ steps/s · \d+ min left · return -21 · "
        r"reconstruction 12\.3 · reward 0\.500 · dynamics 1\.00 · entropy 2\.00",
        lines[40],
    )


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        try:
            while piece := os.read(master, 65536):
                shown.append(piece)
        except OSError:
            pass  # the other end is closed

    watcher = threading.Thread(target=watch)
    watcher.start()
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        steps(tmp_path / "status.json", status)
    watcher.join()
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert "Pong seed 3" in text and "100/100" in text
    assert "steps/s" in text and "return -21" in text and "reconstruction 12.3" in text
    assert "from step" not in text


def test_time_adds_up_over_sittings_and_a_run_remembers_its_last_return(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    first = Status(FINGERPRINT, "stopped", 50, 100, wall_seconds=1000.0, last_return=-3.0)
    first.write(path)
    again = Status.resumed(path, FINGERPRINT, 100)
    assert (again.state, again.step, again.wall_seconds) == ("running", 0, 1000.0)
    assert again.last_return == -3.0 and again.message == ""
    with Reporter("Pong seed 3", again, path) as reporter:
        reporter.tick(51)
    assert 1000 < float(str(read(path)["wall_seconds"])) < 1600


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", json.dumps({"fingerprint": "other", "wall_seconds": 5})],
)
def test_a_status_that_says_nothing_about_the_run_is_no_obstacle(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "status.json"
    path.write_text(content)
    assert Status.resumed(path, FINGERPRINT, 100) == Status(FINGERPRINT, "running", 0, 100)
    assert Status.resumed(tmp_path / "no", FINGERPRINT, 7) == Status(FINGERPRINT, "running", 0, 7)


def test_an_error_is_not_hidden_by_a_status_that_cannot_be_written(
    tmp_path: Path, status: Status
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def fail() -> None:
        (folder / "status.json").unlink()
        folder.rmdir()
        folder.write_text("in the way")
        raise ZeroDivisionError("what really happened")

    with pytest.raises(ZeroDivisionError, match="what really happened"):
        steps(folder / "status.json", status, fail)
