"""`drama campaign`: what a plan costs and when it ends, by hand and from real files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from report_files import digest, plan_anew, write_results
from rich.console import Console
from workspace import Command

from drama.errors import ConfigurationError
from drama.files import write_json
from drama.pipeline.artifacts.outlook import (
    Finished,
    Outlook,
    host_of,
    last_end,
    read_outlook,
    seconds_left,
    seconds_per_step,
    show,
    size,
    steps_left,
)
from drama.pipeline.artifacts.status import RunStatus
from drama.pipeline.plans import read_plan
from drama.runs.folder import locked

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
H100 = "NVIDIA H100 80GB HBM3"


def waiting(game: str, seed: int = 0, steps: int | None = 100_000) -> RunStatus:
    return RunStatus(game, seed, "waiting", total_steps=steps)


def running(game: str, seed: int, step: int, rate: float | None) -> RunStatus:
    return RunStatus(game, seed, "running", step, 100_000, rate)


def printed(outlook: Outlook) -> list[str]:
    buffer = io.StringIO()
    Console(file=buffer, width=80, highlight=False).print(show(outlook, NOW))
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    assert len(lines) <= 25 and max(map(len, lines)) <= 80
    return lines


# --- by hand -------------------------------------------------------------------------------------


def test_each_waiting_run_follows_the_first_that_ends() -> None:
    """Ends 5 and 8; 4 more follow at 5, 8 and 9: they end at 9, 12 and 13."""
    assert last_end([8.0, 5.0], [4.0, 4.0, 4.0]) == 13.0
    assert last_end([20.0, 5.0], [4.0]) == 20.0
    assert last_end([0.0], []) == 0.0


def test_seconds_left_by_hand() -> None:
    """10 and 30 steps/s: the first ends after 1000 s, the second after 2000 s. At the mean of 20
    steps/s a run of 100000 steps takes 5000 s and one stopped halfway 2500 s."""
    under_way = [running("Pong", 0, 90_000, 10.0), running("Pong", 1, 40_000, 30.0)]
    stopped = RunStatus("Pong", 2, "stopped", 50_000, 100_000)
    assert seconds_left(under_way) == 2000.0
    assert seconds_left([*under_way, stopped]) == 3500.0
    assert seconds_left([*under_way, waiting("Krull"), stopped]) == 6000.0
    assert seconds_left([*under_way, replace(stopped, state="done")]) == 2000.0
    # One that has just begun, and has no speed yet, goes at the others' mean: 5000 s.
    assert seconds_left([*under_way, running("Krull", 0, 0, None)]) == 5000.0


def test_without_a_speed_or_a_number_of_steps_no_end_is_told() -> None:
    assert seconds_left([waiting("Pong")]) is None
    assert seconds_left([running("Pong", 0, 10, None)]) is None
    assert seconds_left([running("Pong", 0, 10, 1.0), waiting("Krull", steps=None)]) is None
    assert steps_left([waiting("Pong"), waiting("Krull", steps=None)]) is None
    assert steps_left([waiting("Pong"), running("Pong", 1, 99_000, None)]) == 101_000


def test_devices_are_kept_apart_the_commonest_first() -> None:
    finished = [
        Finished("cpu", 1000, 500.0, 0, 0),
        Finished(H100, 1000, 10.0, 0, 0),
        Finished(H100, 3000, 70.0, 0, 0),
    ]
    assert list(seconds_per_step(finished).items()) == [(H100, 0.02), ("cpu", 0.5)]


@pytest.mark.parametrize(
    ("bytes_", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (111_000_000, "111 MB"),
     (14_430_000_000, "14.4 GB"), (2.5e12, "2.5 TB")],
)  # fmt: skip
def test_sizes_are_told_in_three_digits(bytes_: float, expected: str) -> None:
    assert size(bytes_) == expected


# --- what is told --------------------------------------------------------------------------------

FOUR = (
    RunStatus("Pong", 0, "done", None, 100_000),
    running("Pong", 1, 64_000, 10.0),
    RunStatus("Krull", 0, "stopped", 50_000, 100_000),
    waiting("Krull", 1),
)
PLANNED = Outlook(Path("results/xs"), "xs", FOUR, (), ("gpu-1",), 500_000_000_000)


def test_cost_and_end_by_hand() -> None:
    """0.144 s a step: 4 h a run, 16 h for four. Left are 36000 + 50000 + 100000 steps: 7.44 h."""
    finished = Finished(H100, 100_000, 14_400.0, 600_000, 110_000_000)
    lines = printed(replace(PLANNED, finished=(finished,)))
    assert lines[:2] == [
        "results/xs: 2 games x 2 seeds = 4 runs, 100,000 steps each, preset xs",
        "4 runs: 1 waiting, 1 running, 1 stopped, 1 done",
    ]
    assert lines[3].split() == ["a", "run", "all", "4", "the", "3", "left"]
    assert [line.rsplit(maxsplit=3) for line in lines[4:5]] == [
        [f"GPU hours, {H100}", "4.00", "16", "7.44"]
    ]
    assert lines[5].split()[-6:] == ["600", "kB", "2.4", "MB", "1.8", "MB"]
    assert lines[6].split()[-6:] == ["110", "MB", "440", "MB", "330", "MB"]
    assert lines[7].endswith("500 GB")
    assert lines[8] == "From 1 finished run; evaluations come on top."
    assert lines[10:12] == [
        "Host   Runs  Steps/s  Which",
        "gpu-1     1     10.0  Pong 1",
    ]
    # At 10 steps/s one at a time: 3600 s, then 5000 s, then 10000 s: 5 h 10 min.
    assert " ".join(lines[13:]) == (
        "10.0 steps/s by 1 run at a time: all are trained in 5 h 10 min, on Fri 27 Nov 2026, "
        "17:10 UTC."
    )


def test_before_a_run_is_finished_hours_are_of_those_under_way_and_disk_is_not_known() -> None:
    """By hand: 10 steps/s, 100000 steps in 2.78 h; of 186000 that are left, 5.17 h."""
    lines = printed(PLANNED)
    assert lines[4].split() == ["hours", "2.78", "11", "5.17"]
    assert [line.split()[-3:] for line in lines[5:7]] == [["unknown"] * 3] * 2
    assert " ".join(lines[8:10]) == (
        "Hours by the present speed of 1 run; evaluations come on top. Disk is not known until a "
        "run is finished."
    )


def test_before_a_run_is_under_way_no_figure_is_given() -> None:
    lines = printed(replace(PLANNED, runs=tuple(map(waiting, ("Pong", "Krull"))), hosts=()))
    assert [line.split()[-3:] for line in lines[4:7]] == [["unknown"] * 3] * 3
    assert lines[8] == "Hours are not known until a run is under way, disk until one is finished."
    assert lines[-1] == "Nothing is running, so no end can be told."


def test_while_nothing_is_running_the_time_depends_on_how_many_will_be() -> None:
    """By hand: 8 runs of 4 h take 32 h one at a time, 8 h four at a time, 4 h all together."""
    runs = tuple(waiting("Pong", seed) for seed in range(8))
    finished = (Finished("cpu", 100_000, 14_400.0, 1, 1),)
    lines = printed(replace(PLANNED, runs=runs, finished=finished, hosts=()))
    assert lines[4].split() == ["CPU", "hours", "4.00", "32", "32"]
    assert " ".join(lines[-2:]) == (
        "Nothing is running. By runs at a time, what is left takes 32 h 00 min at 1, 8 h 00 min at "
        "4, 4 h 00 min at 16."
    )


def test_when_all_are_trained_nothing_is_left() -> None:
    runs = (RunStatus("Pong", 0, "done"), RunStatus("Krull", 0, "trained"))
    lines = printed(replace(PLANNED, runs=runs, hosts=()))
    assert lines[3].split() == ["a", "run", "all", "2"] and lines[-1] == "All are trained."


def test_a_campaign_of_many_hosts_fits_80_columns_and_25_lines() -> None:
    names = [f"Montezuma{number}Revenge" for number in range(26)]
    runs = tuple(
        running(name, seed, 1, 1e-3) if seed < 3 else waiting(name, seed)
        for name in names for seed in range(5)
    )  # fmt: skip
    hosts = tuple(f"node-{number:03}.partition.cluster.example.org" for number in range(78))
    finished = tuple(
        Finished(f"NVIDIA A device with a long name {number}", 100, 1e6 + number, 10**7, 10**10)
        for number in range(6)
    )
    lines = printed(replace(PLANNED, runs=runs, hosts=hosts, finished=finished))
    assert "70 more" in " ".join(lines)
    assert sum("GPU hours" in line for line in lines) == 3


# --- from files ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four runs of 600 steps, one without a recipe; Boxing's are not begun."""
    results = write_results(tmp_path / "quick", {"Pong": [[1.0]] * 2, "Boxing": [[1.0]] * 2})
    for path in results.glob("runs/Boxing/*/*"):
        path.unlink()
    for run in ("Boxing/seed0", "Boxing/seed1", "Pong/seed0"):
        settings = {"training": {"total_steps": 600}}
        write_json(results / f"recipes/{run}.json", {"settings": settings})
    return results


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_what_finished_runs_left_is_read_from_their_records(results: Path) -> None:
    folder = results / "runs/Pong/seed0"
    (record,) = folder.glob("run-*.json")
    large = [
        {"path": "checkpoint.parquet", "sha256": "0" * 64, "bytes": 70_000},
        {"path": "replay/part-00000.parquet", "sha256": "0" * 64, "bytes": 5_000},
    ]
    edited(record, lambda data: data["artifacts"].extend(large))
    outlook = read_outlook(results)
    first, second = outlook.finished
    assert (first.device, first.steps, first.seconds, first.large) == ("cpu", 600, 3725.0, 75_000)
    assert (second.seconds, second.large) == (3726.0, 0)
    assert first.in_git == sum(path.stat().st_size for path in folder.iterdir())
    assert [run.total_steps for run in outlook.runs] == [600, None, 600, 600]
    assert [run.state for run in outlook.left] == ["waiting"] * 2


def test_runs_of_earlier_code_count_as_finished(results: Path) -> None:
    plan_anew(results, "Pong", 0)
    assert [run.seconds for run in read_outlook(results).finished] == [3725.0, 3726.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"artifacts": [{}]}'])
def test_a_damaged_record_is_passed_over(results: Path, text: str) -> None:
    next(results.glob("runs/Pong/seed0/run-*.json")).write_text(text)
    assert [run.seconds for run in read_outlook(results).finished] == [3726.0]


def test_the_host_of_a_running_run_is_the_one_that_holds_it(results: Path) -> None:
    import platform

    run = next(run for run in read_plan(results).runs if run.game == "Boxing")
    assert host_of(run) is None
    status = {"fingerprint": digest("run Boxing 0"), "state": "running", "step": 60,
              "total_steps": 600, "steps_per_second": 2.0, "updated": ""}  # fmt: skip
    write_json(run.folder / "status.json", status)
    with locked(run.folder):
        outlook = read_outlook(results)
        assert outlook.hosts == (platform.node(),)
        assert [run.state for run in outlook.runs] == ["done", "done", "running", "waiting"]
    assert read_outlook(results).hosts == (), "it is lost now"


def test_the_command_takes_the_configurations_results_when_none_are_named(
    drama: Command, tmp_path: Path
) -> None:
    assert drama("plan")[0] == 0
    code, output, errors = drama("campaign")
    assert (code, errors) == (0, "")
    assert output.startswith("results/tiny: 1 game x 1 seed = 1 run, 160 steps each, preset tiny\n")
    assert drama("campaign", "results/tiny")[1] == output
    code, output, errors = drama("campaign", "results/none")
    assert (code, output) == (2, "") and errors.startswith("results/none: not found")
    with pytest.raises(ConfigurationError):
        read_outlook(tmp_path)
