"""`drama status`: real runs in every state, real locks, and what is told when files are missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from report_files import write_evaluation

from drama.errors import ConfigurationError
from drama.files import canonical_json, sha256_file, sha256_text, write_json, write_text
from drama.pipeline.artifacts.overview import remarks
from drama.pipeline.artifacts.status import planned_results, read_statuses
from drama.pipeline.plans import PlannedRun, plan_text
from drama.runs.folder import locked

RUN, EVALUATION = "a" * 64, "b" * 64
GAME = "ChopperCommand"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results with one planned run, of which nothing is there yet."""
    plan(tmp_path / "results/xs", [(GAME, 4)])
    return tmp_path / "results/xs"


def plan(results: Path, runs: list[tuple[str, int]]) -> None:
    planned = [PlannedRun(results, game, seed, RUN, EVALUATION) for game, seed in runs]
    write_text(results / "recipes/report.json", plan_text("xs", False, planned, "0"))


def folder(results: Path) -> Path:
    return results / f"runs/{GAME}/seed4"


def live(results: Path, state: str, *, age: float = 0, **more: object) -> None:
    """Write status.json as a trainer does, some seconds ago."""
    updated = datetime.now(UTC) - timedelta(seconds=age)
    status = {
        "fingerprint": RUN, "state": state, "step": 25_000, "total_steps": 100_000,
        "steps_per_second": 10.0, "last_return": 1234.5, "wall_seconds": 1.0, "message": "",
        "updated": updated.isoformat(timespec="seconds"),
    }  # fmt: skip
    write_json(folder(results) / "status.json", status | more)


def whole(results: Path) -> None:
    write_json(folder(results) / f"run-{RUN[:16]}.json", {})


def log(results: Path, name: str, text: str) -> None:
    path = results / f"logs/{GAME}/seed4/{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def shown(results: Path, *arguments: str) -> list[str]:
    """What the command prints, without the folder above the table."""
    done = subprocess.run(
        [sys.executable, "-c", "from drama.cli import main; main()", "status", *arguments],
        cwd=results.parents[1],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.rstrip() for line in done.stdout.splitlines()]


def state(results: Path) -> str:
    (run,) = read_statuses(results)
    return run.state


def lock_of(results: Path, holder: str) -> None:
    """Leave the lock's file as a process that is gone leaves it."""
    path = folder(results).with_name(".seed4.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(holder, encoding="utf-8")


def test_a_run_that_nobody_began_is_waiting(results: Path) -> None:
    assert shown(results) == [
        "results/xs",
        "Game            Seed  State    Step  Steps/s  Time left  Return",
        f"{GAME}     4  waiting",
        "1 run: 1 waiting",
    ]


def test_a_run_under_way_tells_how_fast_it_is_and_how_long_it_will_take(results: Path) -> None:
    live(results, "running", age=1000)
    with locked(folder(results)):
        assert shown(results)[2] == (
            f"{GAME}     4  running  25000/100000     10.0  2 h 05 min  1234.5"
        )


def test_a_run_whose_trainer_was_killed_here_is_lost_at_once(results: Path) -> None:
    live(results, "running")
    lock_of(results, f"process 1 on {platform.node()}")
    assert shown(results)[2] == f"{GAME}     4  lost   25000/100000                      1234.5"


@pytest.mark.parametrize(("age", "expected"), [(5, "running"), (1000, "lost")])
def test_a_run_on_another_node_is_lost_when_it_falls_silent(
    results: Path, age: float, expected: str
) -> None:
    live(results, "running", age=age)
    lock_of(results, "process 1 on some-other-node")
    assert state(results) == expected


def test_looking_takes_no_lock_away(results: Path) -> None:
    live(results, "running")
    lock_of(results, f"process 1 on {platform.node()}")
    read_statuses(results)
    with locked(folder(results), wait=False):
        pass


def test_a_stopped_run_is_told_apart_from_a_lost_one(results: Path) -> None:
    live(results, "stopped", age=1000)
    assert state(results) == "stopped"


def test_a_failed_run_tells_its_logs_last_line(results: Path) -> None:
    live(results, "failed", message="short")
    log(results, f"train-{RUN[:16]}", "first\n" + "x" * 10_000 + "\nCUDA [out of] memory, 中\n\n")
    assert shown(results)[-2:] == [
        f"{GAME} seed 4 failed: CUDA [out of] memory, 中",
        "1 run: 1 failed",
    ]


def test_a_failed_run_without_a_log_tells_its_own_message(results: Path) -> None:
    live(results, "failed", message="loss is nan")
    assert f"{GAME} seed 4 failed: loss is nan" in shown(results)


def test_a_whole_run_is_trained_and_with_its_evaluation_done(results: Path) -> None:
    live(results, "done", step=100_000)
    whole(results)
    assert state(results) == "trained"
    log(results, f"evaluate-{EVALUATION[:16]}", "no memory left\n")
    assert next(remarks(read_statuses(results))).endswith("not evaluated: no memory left")
    # Sampled episodes beside the score, and an evaluation that is not whole, are no score.
    half = write_evaluation(folder(results), GAME, 4, RUN, EVALUATION, [1.0], beside=[9.0, 9.0])
    assert state(results) == "trained"
    write_evaluation(folder(results), GAME, 4, RUN, EVALUATION, [1.0, 2.0], beside=[9.0, 9.0])
    assert half.name == f"evaluation-{EVALUATION[:16]}.parquet"
    assert shown(results)[2:] == [
        f"{GAME}     4  done   100000/100000                         1.5",
        "1 run: 1 done",
    ]


def test_a_recorded_run_needs_neither_status_nor_log(results: Path) -> None:
    whole(results)
    assert state(results) == "trained"


def earlier(results: Path, **settings: int) -> None:
    """Let a whole, evaluated run of earlier code lie in the planned run's folder."""
    recipe = {"game": GAME, "settings": {"steps": 1}, "code": "1", "runtime": "1"}
    run, evaluation = sha256_text(canonical_json(recipe)), "c" * 64
    record = {"recipe": recipe, "fingerprint": run, "git_commit": "0123abcd", "steps": 100_000}
    write_json(folder(results) / f"run-{run[:16]}.json", record)
    scores = write_evaluation(folder(results), GAME, 4, run, evaluation, [1.0, 2.0])
    note = {"fingerprint": evaluation, "sha256": sha256_file(scores)}
    write_json(folder(results) / "evaluation.json", note)
    planned = recipe | {"code": "2", "settings": {"steps": 1} | settings}
    write_json(results / f"recipes/{GAME}/seed4.json", planned)


def test_a_whole_run_of_earlier_code_is_shown_as_one(results: Path) -> None:
    earlier(results)
    assert shown(results)[2:] == [
        f"{GAME}     4  earlier code  100000/100000                         1.5",
        "1 run of earlier code, commit 0123abcd",
        "1 run: 1 earlier code",
    ]


def test_one_of_other_settings_is_not(results: Path) -> None:
    earlier(results, steps=2)
    assert state(results) == "waiting"


def test_another_runs_status_says_nothing_about_this_one(results: Path) -> None:
    live(results, "running", fingerprint="c" * 64)
    assert state(results) == "waiting"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"fingerprint": 3}'])
def test_a_damaged_status_is_as_good_as_none(results: Path, text: str) -> None:
    folder(results).mkdir(parents=True)
    (folder(results) / "status.json").write_text(text, encoding="utf-8")
    assert state(results) == "waiting"


def test_every_preset_with_a_plan_is_shown_unless_one_is_named(results: Path) -> None:
    plan(results.parent / "quick", [("Pong", 0)])
    plan(results.parent / "learn/catch", [("Catch8", 0)])
    assert [line for line in shown(results) if line.startswith("results")] == [
        "results/learn/catch",
        "results/quick",
        "results/xs",
    ]
    assert shown(results, "results/xs")[0] == "results/xs"
    assert shown(results, "results/learn")[0] == "results/learn/catch"


def test_results_are_found_three_folders_below_and_not_among_the_runs(results: Path) -> None:
    above = results.parent
    inner = [above / name for name in ("a/b/c", "xs/inner", "learn/catch", "learn")]
    hidden = [
        above / name
        for name in ("a/b/c/d", "xs/runs/Pong", "xs/superseded/x", "xs/logs", "xs/runs/replay",
                     "campaigns/x", "xs/campaigns/x", ".cache")
    ]  # fmt: skip
    for place in (*inner, *hidden):
        plan(place, [("Pong", 0)])
    assert planned_results([above]) == sorted([*inner, results])
    # The same, named twice, is shown once; what is named itself is found whatever it is called.
    assert planned_results([above, results])[-1] == above / "xs/inner"
    assert planned_results([above / "campaigns/x"]) == [above / "campaigns/x"]


def test_a_place_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere: not found.* `drama plan` makes them"):
        planned_results([tmp_path / "nowhere"])


def test_a_plan_that_cannot_be_read_is_named(results: Path) -> None:
    (results / "recipes/report.json").write_text(json.dumps({"runs": [{}]}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"report.json: not a plan"):
        read_statuses(results)


def test_what_goes_into_a_pipe_is_plain_and_fits(results: Path) -> None:
    plan(results, [("ChopperCommand", seed) for seed in range(4, 44)])
    live(results, "running", step=99_999)
    lines = shown(results, "--all")
    assert len(lines) == 43
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= 80
