"""The pipeline as a user drives it: real `snakemake` and `drama`, real games, toy sizes.

One copy of the project is run to the end; every question is then asked of a fresh copy of that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from drama.runs.folder import locked

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("pipeline")]

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SOURCES = ("drama", "config", "workflow", "containers", "Snakefile", "pyproject.toml")
SNAKEMAKE = ("snakemake", "--profile", "workflow/profiles/quick")
NOTHING = "Nothing to be done"
GAMES = ("Boxing", "Pong")
EXPERIMENT = """\
preset: tiny
games:
  Boxing: {}
  Pong: {}
seeds: [0]
device: cpu
results: results
"""
PRESET = """\
base: quick
environment: {max_frames: 240}
world_model: {batch_size: 2, sequence_length: 8}
behaviour: {contexts: 4, context_length: 4, horizon: 3}
training: {total_steps: 160, random_steps: 40, log_every: 20}
evaluation: {episodes: 2, environments: 2}
"""
EVERYTHING = {f"{job} {game}" for job in ("train", "evaluate") for game in GAMES} | {"report"}


@dataclass(frozen=True)
class Project:
    """A copy of the project's sources, and of results if there are any, to run commands in."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """This copy's code first, and nothing of the user's Snakemake or thread settings."""
        kept = {key: value for key, value in os.environ.items() if "SNAKEMAKE" not in key}
        return kept | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, expected: int = 0) -> str:
        """Run a command to its end and return what it printed."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expected, output
        return output

    def dry_run(self) -> str:
        return self.run(*SNAKEMAKE, "-n")

    def planned(self) -> set[str]:
        """What Snakemake would do now, as "train Pong", "evaluate Pong", "report"."""
        output = self.dry_run()
        jobs = {f"train {game}" for game in re.findall(r"Training (\w+), seed 0", output)}
        jobs |= {f"evaluate {game}" for game in re.findall(r"Evaluating (\w+), seed 0", output)}
        jobs |= {"report"} if "Writing the report" in output else set()
        assert bool(jobs) != (NOTHING in output), output
        return jobs

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text(encoding="utf-8")
        assert old in text, f"{path} does not hold {old!r}"
        (self.root / path).write_text(text.replace(old, new), encoding="utf-8")

    def append(self, path: str, text: str) -> None:
        with (self.root / path).open("a", encoding="utf-8") as file:
            file.write(text)

    def results(self, pattern: str) -> list[Path]:
        return sorted((self.root / "results/tiny").glob(pattern))

    def artifacts(self, game: str) -> dict[str, str]:
        """Checksums of a whole run's artifacts, by path."""
        (record,) = self.results(f"runs/{game}/seed0/run-*.json")
        listed = json.loads(record.read_text(encoding="utf-8"))["artifacts"]
        return {item["path"]: item["sha256"] for item in listed}


def copy_sources(root: Path) -> Project:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, root / name, ignore=shutil.ignore_patterns("__pycache__", "images")
            )
        else:
            shutil.copy(source, root / name)
    (root / "config/quick.yaml").write_text(EXPERIMENT, encoding="utf-8")
    (root / "config/presets/tiny.yaml").write_text(PRESET, encoding="utf-8")
    return Project(root)


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.root, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def test_a_finished_project_holds_every_promised_file(finished: Project) -> None:
    for game in GAMES:
        folder = f"runs/{game}/seed0"
        for name in ("run-*.json", "evaluation-*.parquet", "episodes.parquet", "training.parquet"):
            assert len(finished.results(f"{folder}/{name}")) == 1, f"{folder}/{name}"
        assert finished.results(f"{folder}/checkpoint.parquet")
        assert finished.results(f"{folder}/replay/part-*.parquet")
        assert finished.results(f"logs/{game}/seed0/train-*.log")
    assert len(finished.results("report/report-*.json")) == 1
    for name in ("*.html", "*.md", "*.csv", "*.parquet"):
        assert finished.results(f"report/**/{name}"), name


def test_a_record_says_the_truth_about_its_artifacts(finished: Project) -> None:
    for game in GAMES:
        folder = finished.root / f"results/tiny/runs/{game}/seed0"
        assert finished.artifacts(game)
        for path, checksum in finished.artifacts(game).items():
            assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == checksum, path


def test_nothing_is_done_twice(project: Project) -> None:
    assert project.planned() == set()


@pytest.mark.parametrize("newest_first", [True, False])
def test_file_times_and_snakemakes_memory_play_no_part(
    project: Project, newest_first: bool
) -> None:
    shutil.rmtree(project.root / ".snakemake")
    shutil.rmtree(project.root / "results/tiny/logs")  # not in git, so not in a fresh clone
    # By name, recipes come before the runs made from them: one of the two orders makes every
    # recipe newer than its run, the other every run newer than its evaluation.
    files = sorted(path for path in project.root.rglob("*") if path.is_file())
    for age, path in enumerate(files if newest_first else reversed(files)):
        moment = time.time() - age
        os.utime(path, (moment, moment))
    assert project.planned() == set()


def test_a_games_settings_touch_that_game_and_the_report(project: Project) -> None:
    project.replace("config/quick.yaml", "Pong: {}", "Pong: {replay: {alpha: 0.5}}")
    assert project.planned() == {"train Pong", "evaluate Pong", "report"}
    project.replace("config/quick.yaml", "Pong: {replay: {alpha: 0.5}}", "Pong: {}")
    assert project.planned() == set()


def test_evaluation_settings_train_nothing(project: Project) -> None:
    project.replace("config/presets/tiny.yaml", "episodes: 2", "episodes: 3")
    assert project.planned() == {"evaluate Boxing", "evaluate Pong", "report"}


def test_the_reports_code_touches_the_report_only(project: Project) -> None:
    project.append("drama/report/__init__.py", "\nAN_ADDITION = 1\n")
    assert project.planned() == {"report"}


def test_words_in_the_models_code_touch_nothing(project: Project) -> None:
    for path in sorted((project.root / "drama/agent/model").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""'), f"{path} has no docstring to edit"
        path.write_text(
            text.replace('"""', '"""Reworded. ', 1) + "\n# A remark.\n", encoding="utf-8"
        )
    assert project.planned() == set()


@pytest.mark.parametrize("part", ["model", "replay", "training"])
def test_the_agents_code_touches_everything(project: Project, part: str) -> None:
    project.append(f"drama/agent/{part}/__init__.py", "\nAN_ADDITION = 1\n")
    assert project.planned() == EVERYTHING


def test_a_rules_wording_touches_nothing(project: Project) -> None:
    project.replace("workflow/rules/train.smk", "{params.drama} train", "nice {params.drama} train")
    project.replace("workflow/rules/train.smk", "train-{{fingerprint}}.log", "{{fingerprint}}.log")
    assert project.planned() == set()


def test_a_fixed_order_is_asked_of_jobs_that_compute_and_makes_no_other_run(
    project: Project,
) -> None:
    assert not project.planned()
    project.append("config/quick.yaml", "\ndeterministic: true\n")
    assert not project.planned()
    printed = project.run(*SNAKEMAKE, "-n", "-p", "--forceall")
    commands = re.findall(r"drama (train|evaluate|report) .*", printed)
    ordered = re.findall(r"drama (train|evaluate) .* --deterministic --threads 1 ", printed)
    assert ordered and sorted(ordered) == sorted(c for c in commands if c != "report")


def test_a_lost_evaluation_is_made_again(project: Project) -> None:
    (lost,) = project.results("runs/Pong/seed0/evaluation-*.parquet")
    before = lost.read_bytes()
    lost.unlink()
    assert project.planned() == {"evaluate Pong", "report"}
    project.run(*SNAKEMAKE, str(lost.relative_to(project.root)))
    assert lost.read_bytes() == before
    assert project.planned() == set()


def test_earlier_settings_are_current_again_when_they_return(project: Project) -> None:
    before = project.artifacts("Pong")
    project.replace("config/quick.yaml", "Pong: {}", "Pong: {behaviour: {horizon: 2}}")
    project.run(*SNAKEMAKE, "--until", "train")
    assert project.artifacts("Pong") != before
    assert project.planned() == {"evaluate Pong", "report"}
    project.replace("config/quick.yaml", "Pong: {behaviour: {horizon: 2}}", "Pong: {}")
    assert project.planned() == set()
    assert project.artifacts("Pong") != before, "looking moves nothing"
    assert NOTHING in project.run(*SNAKEMAKE)
    assert project.artifacts("Pong") == before


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("Pong: {}", "Pnog: {}", ["config/quick.yaml", "Pnog", "'Pong'"]),
        ("Pong: {}", "Pong: {replay: {alhpa: 1}}", ["config/quick.yaml", "alhpa", "'alpha'"]),
        ("seeds: [0]", "seeds: [-1]", ["config/quick.yaml", "seeds", "-1"]),
        ("preset: tiny", "preset: tyni", ["tyni", "'tiny'"]),
    ],
)
def test_a_wrong_configuration_is_explained_before_anything_is_written(
    tmp_path: Path, old: str, new: str, named: list[str]
) -> None:
    project = copy_sources(tmp_path)
    project.replace("config/quick.yaml", old, new)
    output = project.run(*SNAKEMAKE, "-n", expected=2)
    assert all(word in output for word in named), output
    assert "Traceback" not in output
    assert not (project.root / "results").exists()


def wait_for_training(project: Project, process: subprocess.Popen[str]) -> str:
    """Wait until a run says that it is under way; returns its game."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        for path in project.results("runs/*/seed0/status.json"):
            status = json.loads(path.read_text(encoding="utf-8"))
            if status["state"] == "running" and status["step"] > 0:
                return path.parts[-3]
        time.sleep(0.02)
    raise AssertionError("no run got under way")


def test_stopped_then_killed_it_goes_on_to_the_same_bytes(
    finished: Project, tmp_path: Path
) -> None:
    project = copy_sources(tmp_path)
    process = project.start(*SNAKEMAKE)
    game = wait_for_training(project, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode != 0
    with locked(project.root / f"results/tiny/runs/{game}/seed0"):
        pass  # the run outlives Snakemake for as long as it takes to save
    assert not project.results(f"runs/{game}/seed0/run-*.json")
    assert project.results(f"runs/{game}/seed0/checkpoint.parquet"), "stopped without saving"

    process = project.start(*SNAKEMAKE)
    wait_for_training(project, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    project.run(*SNAKEMAKE, "--until", "evaluate")
    assert project.planned() == {"report"}
    for game in GAMES:
        assert project.artifacts(game) == finished.artifacts(game)
        evaluation = f"runs/{game}/seed0/evaluation-*.parquet"
        (score,), (expected,) = project.results(evaluation), finished.results(evaluation)
        assert score.read_bytes() == expected.read_bytes()
