"""`drama status` of many runs: what fits a terminal, what comes first, what is told together."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_status import plan

from drama.agent.settings import GAMES
from drama.pipeline.artifacts.overview import overview, table
from drama.pipeline.artifacts.status import RunStatus, duration

pytestmark = pytest.mark.usefixtures("signals_arrive")

XS = Path("results/xs")
STATUS = [sys.executable, "-c", "from drama.cli import main; main()", "status"]


def printed(plans: Mapping[Path, Sequence[RunStatus]], rows: int = 30, **how: bool) -> list[str]:
    buffer = io.StringIO()
    console = Console(file=buffer, width=80, highlight=False)
    console.print(overview(plans, rows, **how), soft_wrap=True)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def made(state: str, game: str, seed: int) -> RunStatus:
    """One of Atari's longest returns, in any state."""
    begun: dict[str, Any] = {} if state == "waiting" else {"step": 12_345, "last_return": -12_345.5}
    running = {"steps_per_second": 12.5} if state == "running" else {}
    failed = {"detail": "CUDA error: " + "a long story " * 30} if state == "failed" else {}
    earlier = {"commit": "0123abcd"} if state == "earlier code" else {}
    return RunStatus(
        game, seed, state, total_steps=100_000, **begun, **running, **failed, **earlier
    )  # type: ignore[arg-type]


def campaign(*states: tuple[str, int]) -> list[RunStatus]:
    """130 runs, 26 games x 5 seeds, so many in each state; the others wait."""
    names = [state for state, count in states for _ in range(count)]
    names += ["waiting"] * (130 - len(names))
    keys = [(game, seed) for game in GAMES[:26] for seed in range(5)]
    return [made(state, *key) for state, key in zip(names, keys, strict=True)]


MIXES: dict[str, list[tuple[str, int]]] = {
    "nothing begun": [],
    "at first": [("running", 8)],
    "half": [("done", 50), ("trained", 4), ("failed", 2), ("running", 8), ("lost", 3)],
    "many at a time": [("done", 30), ("running", 64), ("stopped", 10)],
    "all fail": [("failed", 130)],
    "all lost": [("lost", 130)],
    "all done": [("done", 130)],
    "earlier code": [("earlier code", 65), ("done", 40), ("failed", 6), ("running", 10)],
    "one of each": [(state, 1) for state in ("failed", "running", "lost", "stopped", "trained",
                                             "earlier code", "done")],
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rows", [30, 24])
def test_130_runs_fit_a_terminal_of_80_columns(mix: str, rows: int) -> None:
    """With the command above and the next prompt below."""
    runs = campaign(*MIXES[mix])
    lines = printed({XS: runs}, rows)
    assert len(lines) <= rows - 2
    assert max(map(len, lines)) <= 80
    assert lines[0] == "results/xs" and lines[1].startswith("130 runs: ")
    told = dict.fromkeys(run.state for run in runs)
    assert all(f" {state}" in " ".join(lines[1:3]) for state in told)


def test_what_goes_on_comes_first_and_the_rest_is_told_together() -> None:
    runs = campaign(("done", 12), ("stopped", 1), ("running", 2), ("lost", 1), ("failed", 1))
    lines = printed({XS: runs})
    assert lines[1] == "130 runs: 113 waiting, 2 running, 1 stopped, 1 lost, 12 done, 1 failed"
    assert lines[3].split() == [
        "Game",
        "Seed",
        "State",
        "Step",
        "Steps/s",
        "Time",
        "left",
        "Return",
    ]
    assert [line.split()[:3] for line in lines[4:9]] == [
        ["Asterix", "1", "failed"],
        ["Assault", "3", "running"],
        ["Assault", "4", "running"],
        ["Asterix", "0", "lost"],
        ["Assault", "2", "stopped"],
    ]
    assert lines[9].startswith("Asterix seed 1 failed: CUDA error: a long story")
    assert len(lines[9]) == 80 and lines[9].endswith("…")
    assert lines[10].startswith("waiting       113  Asterix 3, BankHeist 5, BattleZone 5, Boxing 5")
    assert lines[-2:] == [
        "done           12  mean return (seeds): Alien -12345.5 (5), Amidar -12345.5 (5),",
        "                   Assault -12345.5 (2)",
    ]


def test_a_game_keeps_its_number_at_a_lines_end() -> None:
    lines = printed({XS: campaign()})[3:]
    assert all(line.endswith((",", "5")) and not line.lstrip().startswith("5") for line in lines)


def test_done_games_show_the_mean_over_their_seeds() -> None:
    done = [RunStatus("Pong", 0, "done", last_return=-20.0), RunStatus("Pong", 1, "done",
            last_return=-17.5), RunStatus("Krull", 0, "done", last_return=9000.0)]  # fmt: skip
    waiting = [RunStatus("Hero", seed, "waiting") for seed in range(40)]
    lines = printed({XS: [*done, *waiting]})
    assert lines[-1] == "done            3  mean return (seeds): Pong -18.8 (2), Krull 9000 (1)"
    assert lines[-2] == "waiting        40  Hero 40"


def test_the_end_is_reckoned_from_speed_and_number_of_running_runs() -> None:
    """By hand: two runs at 10 steps/s end after 1000 and 3000 s. Of the three that wait, which take
    10000 s each, two follow these and end after 11000 and 13000 s, the third after 21000 s."""
    runs = [
        RunStatus("Pong", 0, "running", 90_000, 100_000, 10.0),
        RunStatus("Pong", 1, "running", 70_000, 100_000, 10.0),
        *(RunStatus("Krull", seed, "waiting", None, 100_000) for seed in range(3)),
        *(RunStatus("Hero", seed, "done", None, None) for seed in range(40)),
    ]
    assert printed({XS: runs})[2] == (
        "20.0 steps/s by 2 runs at a time; at that, all are trained in 5 h 50 min"
    )


def test_runs_that_there_is_no_room_for_are_counted() -> None:
    lines = printed({XS: campaign(("running", 64), ("stopped", 10))})
    assert len(lines) == 28
    assert "and 42 running, 10 stopped; --all shows them" in lines
    assert sum(line.split()[2:3] == ["running"] for line in lines) == 22
    assert lines[-1] == "waiting        56  of 12 games"
    every = printed({XS: campaign(("running", 64), ("stopped", 10))}, every=True)
    assert len(every) == 1 + 1 + 130 + 1
    assert every[-1] == "130 runs: 56 waiting, 64 running, 10 stopped"


def test_of_several_results_the_small_ones_are_shown_whole() -> None:
    plans = {
        Path("results/learn/catch"): [RunStatus("Catch8", seed, "done") for seed in range(3)],
        Path("results/xs"): campaign(("done", 50), ("running", 8)),
        Path("results/zero"): [made("waiting", "Pong", seed) for seed in range(2)],
    }
    lines = printed(plans)
    assert len(lines) <= 28 and max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("results")] == [*map(str, plans)]
    assert lines[2].startswith("Catch8") and lines[5] == "3 runs: 3 done"
    assert sum(line.split()[2:3] == ["running"] for line in lines) == 8


def test_up_to_20_runs_are_shown_one_by_one() -> None:
    runs = [made("failed", "Pong", seed) for seed in range(19)] + [made("waiting", "Pong", 19)]
    lines = printed({XS: runs})
    assert len(lines) == 2 + 20 + 19 + 1
    assert max(map(len, lines)) > 80, "the last line of a log, in full"
    more = printed({XS: [*runs, made("waiting", "Pong", 20)]})
    assert len(more) <= 28 and lines[-1] == "20 runs: 1 waiting, 19 failed"


@pytest.mark.parametrize("game", ["JourneyEscape", "MontezumaRevenge"])
def test_the_longest_names_and_numbers_fit(game: str) -> None:
    runs = [
        made("earlier code", game, 0),
        RunStatus(game, 1, "running", 100_000, 100_000, 1234.5, -12345.6),
        RunStatus(game, 2, "running", 1, 100_000, 0.5, 8.0),
    ]
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(table(runs))
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert lines[3].split() == [game, "2", "running", "1/100000", "0.5", "2", "d", "8", "h", "8"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 min"), (3569, "59 min"), (3571, "1 h 00 min"), (172_000, "47 h 47 min"),
     (172_799, "2 d 0 h"), (180_000, "2 d 2 h"), (1_000_000, "11 d 14 h")],
)  # fmt: skip
def test_times_are_told_in_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# --- watching ------------------------------------------------------------------------------------


def read_until(descriptor: int, text: bytes, seen: bytes = b"") -> bytes:
    end = time.monotonic() + 60
    while text not in seen and time.monotonic() < end:
        try:
            seen += os.read(descriptor, 65536)
        except OSError:  # the terminal is closed
            break
    return seen


def test_watching_takes_the_alternate_screen_and_gives_it_back(tmp_path: Path) -> None:
    plan(tmp_path / "results/xs", [("Pong", 0)])
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [*STATUS, "--watch", "1"], cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = read_until(ours, b"1 run: 1 waiting")
    process.send_signal(signal.SIGINT)
    seen = read_until(ours, b"\x1b[?1049l", seen)
    assert process.wait(60) == 0
    os.close(ours)
    before, _, after = seen.partition(b"1 run: 1 waiting")
    assert b"\x1b[?1049h" in before and b"\x1b[?25l" in before
    assert b"\x1b[?1049l" in after and b"\x1b[?25h" in after
    assert b"Traceback" not in seen and b"Aborted" not in seen


def test_watching_into_a_pipe_prints_plain_snapshots(tmp_path: Path) -> None:
    plan(tmp_path / "results/xs", [("Pong", 0)])
    process = subprocess.Popen(
        [*STATUS, "--watch", "1"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip() for _ in range(10)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert lines[:5] == lines[5:]
    assert [lines[0], *lines[3:5]] == ["results/xs", "1 run: 1 waiting", ""]
    assert "\x1b" not in "".join(lines)
