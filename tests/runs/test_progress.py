"""What a person sees: a bar on a terminal, lines elsewhere, status.json for whoever asks."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from drama.runs import progress
from drama.runs.progress import EpisodesReporter, Reporter, Status

FINGERPRINT = "f" * 64
MEANS = {"loss/reconstruction": 12.34, "loss/reward": 0.1234, "loss/dynamics": 1.234,
         "entropy": 0.1234, "loss/critic": 9.9}  # fmt: skip


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
        r"reconstruction 12\.3 · reward 0\.123 · dynamics 1\.23 · entropy 0\.12",
        lines[40],
    )


RUN = """
import sys
from pathlib import Path
from drama.runs.progress import Reporter, Status

status = Status("f" * 64, "running", 20, 100_000)
with Reporter(sys.argv[1], status, Path(sys.argv[2])) as reporter:
    reporter.show({**%r, **eval(sys.argv[3], {"nan": float("nan")})})
    for step in range(20, 100_001, 4999):
        reporter.tick(step)
        status.last_return = -21.0
    reporter._bar.refresh()
"""


def on_a_terminal(columns: int, path: Path, title: str, means: dict[str, float]) -> list[str]:
    """Run to the end on a terminal of so many columns; returns what the line said, over time."""
    return shown(columns, RUN % MEANS, title, str(path), repr(means))


def shown(columns: int, code: str, *arguments: str) -> list[str]:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment | {"TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    text = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(master, 65536):
            text += piece
    os.close(master)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    assert process.wait() == 0, said
    return [line.rstrip() for line in re.split(r"[\r\n]+", said) if line.strip()]


BAR = r"━+╸?╺?━*"


@pytest.mark.parametrize(
    ("columns", "title", "behind"),
    [
        (80, "RoadRunner seed 0", " return -21"),
        (80, "MontezumaRevenge seed 0", ""),
        (100, "Pong seed 3", " return -21 · reconstruction 12.3"),
        (160, "Pong seed 3", " return -21 · reconstruction 12.3 · reward 0.123 · dynamics 1.23 · "
                             "entropy 0.12"),
    ],
)  # fmt: skip
def test_on_a_terminal_a_bar_comes_first_and_losses_where_there_is_room(
    tmp_path: Path, columns: int, title: str, behind: str
) -> None:
    lines = on_a_terminal(columns, tmp_path / "status.json", title, {})
    assert max(map(len, lines)) <= columns
    pace = r"[\d.]+ steps/s (\d+|-):[\d-]{2}:[\d-]{2}"
    assert re.fullmatch(f"{title} {BAR} 100000/100000 {pace}{behind}", lines[-1]), lines[-1]


def test_a_loss_without_an_update_is_not_shown(
    tmp_path: Path, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = dict.fromkeys(MEANS, math.nan)
    lines = on_a_terminal(160, tmp_path / "status.json", "Pong seed 3", nothing)
    assert not any("nan" in line or "entropy" in line for line in lines)
    with Reporter("Pong seed 3", status, tmp_path / "status.json") as reporter:
        reporter.show(nothing)
        assert reporter._line().endswith(" left unknown")
        reporter.show({**MEANS, "entropy": math.nan})
        assert reporter._line().endswith(" · dynamics 1.23")


# --- evaluations ---------------------------------------------------------------------------------


def row(actions: str, episode_return: float) -> dict[str, object]:
    return {"actions": actions, "episode_return": episode_return}


EVALUATE = """
import sys
from drama.runs.progress import EpisodesReporter

with EpisodesReporter(sys.argv[1], 100) as reporter:
    for _ in range(37):
        reporter.tick([{"actions": "greedy", "episode_return": -20.25}])
    reporter.tick([])
    reporter._bar.refresh()
"""


@pytest.mark.parametrize("title", ["Pong seed 0", "MontezumaRevenge seed 10"])
def test_on_a_terminal_an_evaluation_is_a_bar_of_its_episodes(title: str) -> None:
    lines = shown(80, EVALUATE, title)
    assert max(map(len, lines)) <= 80
    left = r"(\d+|-):[\d-]{2}:[\d-]{2}"
    mean = " mean return -20.25" if len(title) < 20 else "( mean return -20.25)?"
    said = rf"{title} {BAR} +37/100 +episodes {left}{mean}"
    assert re.fullmatch(said, lines[-1]), lines[-1]


def test_off_a_terminal_an_evaluation_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with EpisodesReporter("Pong seed 0", 4) as reporter:
        reporter.tick([])
        reporter.tick([row("greedy", 1.0), row("greedy", 2.0)])
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        reporter._line_due = 0.0
        reporter.tick([])
        reporter.tick([row("sampled", 7.0)])
    assert capsys.readouterr().err.splitlines() == [
        "Pong seed 0: 0 of 4 episodes",
        "Pong seed 0: 2 of 4 episodes · mean return 1.5",
        "Pong seed 0: 3 of 4 episodes · sampled mean return 7",
    ]


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


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": "20"}, {"step": 1e300}, {"total_steps": None}, {"state": "lost"},
        {"steps_per_second": math.inf}, {"steps_per_second": -1.0}, {"last_return": math.nan},
        {"message": "x" * 1_000_000}, {"updated": ["now"]}, {"permanent": "yes"},
        {"fingerprint": "x" * 1000}, {"wall_seconds": 1e10}, {"steps_per_second": 1e300},
    ],
)  # fmt: skip
def test_a_status_that_was_not_written_here_is_none(
    status: Status, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "status.json"
    status.message = "why" * 10_000
    status.write(path)
    assert Status.read(path) == status and len(status.message) == 10_000
    path.write_text(json.dumps(read(path) | change))
    assert Status.read(path) is None
    assert Status.resumed(path, FINGERPRINT, 100) == Status(FINGERPRINT, "running", 0, 100)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, "\xff"])
def test_what_is_no_status_at_all_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    assert Status.read(tmp_path / "status.json") is None
