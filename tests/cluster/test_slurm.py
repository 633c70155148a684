"""Runs as Slurm jobs in the container: left alone, disturbed in every way, and without Snakemake.

Every test compares with one undisturbed call of `snakemake --profile cluster`, byte by byte.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from adapted import cluster_project
from test_pipeline import NOTHING, Project

from drama.pipeline.artifacts.image import note_of
from drama.runs.checkpoint import checkpoint_scalar
from drama.runs.folder import RunBusy, locked

GAMES = ("Boxing", "Pong")
SEEDS = (0, 1)
RUNS = [(game, seed) for game in GAMES for seed in SEEDS]
# As typed, but for asking every few seconds instead of every 40 how jobs are getting on.
SNAKEMAKE = ("snakemake", "--profile", "cluster", "--slurm-init-seconds-before-status-checks", "4")
PATIENCE = 400
Start = Callable[..., subprocess.Popen[str]]


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def jobs(project: Project, states: str = "all") -> list[tuple[str, str, str]]:
    """This project's Slurm jobs: number, name and state, the oldest first."""
    listed = slurm("squeue", "-h", f"--states={states}", "--sort=i", "--format=%i|%j|%T|%Z")
    rows = [line.split("|") for line in listed.splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if row[3] == str(project.root)]


def job_of(project: Project, game: str, seed: int) -> str:
    """The number of the running job that trains a run."""
    (number,) = [
        number for number, name, _ in jobs(project, "RUNNING") if name == f"{game}-{seed}-train"
    ]
    return number


def folder(project: Project, game: str, seed: int) -> Path:
    return project.root / "results/tiny/runs" / game / f"seed{seed}"


def log(project: Project, game: str, seed: int) -> str:
    logs = sorted((project.root / f"results/tiny/logs/{game}/seed{seed}").glob("train-*.log"))
    return "".join(path.read_text(encoding="utf-8") for path in logs)


def holder(run: Path) -> int | None:
    """The process that trains a run and has saved steps; None while there is none."""
    checkpoint = run / "checkpoint.parquet"
    if not checkpoint.exists() or list(run.glob("run-*.json")):
        return None
    if not checkpoint_scalar(checkpoint, "episode/step"):  # the first is saved before any step
        return None
    try:
        with locked(run, wait=False):
            return None
    except RunBusy as busy:
        found = re.search(r"process (\d+) on ", str(busy))
        return int(found[1]) if found else None


def result(project: Project, game: str, seed: int) -> dict[str, str]:
    """Checksums of everything that must not depend on how often a run was disturbed."""
    run = folder(project, game, seed)
    (record,) = run.glob("run-*.json")
    listed = json.loads(record.read_text(encoding="utf-8"))["artifacts"]
    return {item["path"]: item["sha256"] for item in listed}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"Snakemake ended before: {what}\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def snakemake() -> Iterator[Start]:
    """Start Snakemake in a project; a test that fails leaves none behind."""
    started: list[subprocess.Popen[str]] = []

    def start(project: Project, *arguments: str) -> subprocess.Popen[str]:
        started.append(project.start(*SNAKEMAKE, *arguments))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def undisturbed(cluster: Path, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = cluster_project(tmp_path_factory.mktemp("undisturbed"), image, [*SEEDS])
    project.run(*SNAKEMAKE)
    return project


def test_all_runs_finish_as_jobs_named_after_them_on_a_gpu_each(
    undisturbed: Project, image: Path
) -> None:
    done = jobs(undisturbed)
    assert {state for _, _, state in done} == {"COMPLETED"}
    assert sorted(name for _, name, _ in done) == sorted(
        f"{game}-{seed}-{rule}" for game, seed in RUNS for rule in ("train", "evaluate")
    )
    for number, _, _ in done:
        assert "gres:gpu:h200:1\n" in slurm("scontrol", "show", "job", number)
    sha256 = json.loads(note_of(image).read_text(encoding="utf-8"))["sha256"]
    for game, seed in RUNS:
        (record,) = folder(undisturbed, game, seed).glob("run-*.json")
        assert json.loads(record.read_text(encoding="utf-8"))["image"] == sha256
    assert (undisturbed.root / "results/tiny/report/index.html").exists()
    assert NOTHING in undisturbed.run(*SNAKEMAKE, "-n")
    status = undisturbed.run("drama", "status")
    assert len(re.findall(r"^(?:Boxing|Pong) +\d +done +3000/3000 ", status, re.MULTILINE)) == 4
    assert status.endswith("4 runs: 4 done\n")


def kill_the_process(project: Project, game: str, seed: int) -> None:
    process = holder(folder(project, game, seed))
    assert process is not None
    os.kill(process, signal.SIGKILL)


def kill_the_job(project: Project, game: str, seed: int) -> None:
    slurm("scancel", "--signal=KILL", "--full", job_of(project, game, seed))


def cancel(project: Project, game: str, seed: int) -> None:
    slurm("scancel", job_of(project, game, seed))


def requeue(project: Project, game: str, seed: int) -> None:
    slurm("scontrol", "requeue", job_of(project, game, seed))


def near_the_time_limit(project: Project, game: str, seed: int) -> None:
    """Slurm looks at limits every half minute: hold the run until it has been asked to save."""
    trainer = holder(folder(project, game, seed))
    assert trainer is not None
    os.kill(trainer, signal.SIGSTOP)
    slurm("scontrol", "update", f"JobId={job_of(project, game, seed)}", "EndTime=now+110")

    def let_it_go_on() -> None:
        status, wanted = Path(f"/proc/{trainer}/status"), 1 << (signal.SIGTERM - 1)
        with suppress(OSError):  # Slurm may have let it go on itself, and it saved and ended
            while not int(re.findall(r"ShdPnd:\s*(\w+)", status.read_text())[0], 16) & wanted:
                time.sleep(0.2)
            os.kill(trainer, signal.SIGCONT)

    threading.Thread(target=let_it_go_on, daemon=True).start()


Disturbance = Callable[[Project, str, int], None]
DISTURBANCES: dict[tuple[str, int], list[Disturbance]] = {
    ("Boxing", 0): [kill_the_process, kill_the_job],
    ("Boxing", 1): [cancel],
    ("Pong", 0): [requeue],
    ("Pong", 1): [near_the_time_limit],
}
KILLS = {kill_the_process, kill_the_job}


def test_however_a_job_ends_its_run_goes_on_to_the_same_bytes(
    undisturbed: Project, image: Path, tmp_path: Path, snakemake: Start
) -> None:
    project = cluster_project(tmp_path / "project", image, [*SEEDS])
    process = snakemake(project, "--until", "train")
    ahead = {run: [*disturbances] for run, disturbances in DISTURBANCES.items()}
    seen: set[int] = set()
    statuses = ""

    def disturb() -> bool:
        nonlocal statuses
        for run, disturbances in ahead.items():
            trainer = holder(folder(project, *run))
            if disturbances and trainer and trainer not in seen:
                statuses += project.run("drama", "status")
                disturbances.pop(0)(project, *run)
                seen.add(trainer)
        return not any(ahead.values())

    wait_for(disturb, process, "every run was disturbed")
    finish(process)

    assert re.search(r"^(?:Boxing|Pong) +\d +running +\d+/3000 ", statuses, re.MULTILINE), statuses
    assert re.search(r"^(?:Boxing|Pong) +\d +waiting *$", statuses, re.MULTILINE), statuses
    for run, disturbances in DISTURBANCES.items():
        (step,) = re.findall(r"from step (\d+) of", log(project, *run))  # of the last attempt
        # A kill may lose what came after the checkpoint at step 2000, and all else saves first.
        assert int(step) >= 2000 + (disturbances[-1] not in KILLS), f"{run}: from step {step}"
        assert result(project, *run) == result(undisturbed, *run), run
    assert "Training" not in project.run(*SNAKEMAKE, "-n"), "nothing is trained twice"


def test_snakemake_killed_and_called_again_takes_its_jobs_over(
    undisturbed: Project, image: Path, tmp_path: Path, snakemake: Start
) -> None:
    project = cluster_project(tmp_path / "project", image, [0])
    process = snakemake(project)
    both = [folder(project, game, 0) for game in GAMES]
    wait_for(lambda: all(map(holder, both)), process, "both runs are under way")
    process.kill()
    process.communicate()
    first = {name: number for number, name, _ in jobs(project, "RUNNING")}
    assert set(first) == {"Boxing-0-train", "Pong-0-train"}, "the jobs outlive Snakemake"
    project.replace("config/config.yaml", "Pong: {}", "Pong: {behaviour: {horizon: 2}}")

    process = snakemake(project)

    def successor() -> list[str]:
        return [number for number, name, _ in jobs(project) if name == "Pong-0-train"][1:]

    wait_for(successor, process, "the new Pong is queued")
    assert f"afterany:{first['Pong-0-train']}" in slurm("scontrol", "show", "job", successor()[0])
    output = finish(process)
    assert f"earlier call: Slurm job {first['Boxing-0-train']}" in output
    assert f"scancel {first['Pong-0-train']}" in output

    done = jobs(project)
    assert {state for _, _, state in done} == {"COMPLETED"}
    assert sorted(name for _, name, _ in done) == [
        "Boxing-0-evaluate", "Boxing-0-train", "Pong-0-evaluate", "Pong-0-train", "Pong-0-train",
    ]  # fmt: skip
    assert log(project, "Boxing", 0).count("from step") == 1
    assert result(project, "Boxing", 0) == result(undisturbed, "Boxing", 0)
    (earlier,) = project.results("superseded/Pong/seed0/*/run-*.json")
    (expected,) = undisturbed.results("runs/Pong/seed0/run-*.json")
    assert earlier.name == expected.name
    assert NOTHING in project.run(*SNAKEMAKE, "-n")


def test_what_was_submitted_is_what_runs(
    undisturbed: Project, image: Path, tmp_path: Path, snakemake: Start
) -> None:
    """Configuration, code and rules are edited while every job waits; the place has a space."""
    project = cluster_project(tmp_path / "a project", image, [0])
    (node,) = slurm("sinfo", "--noheader", "--format=%n").split()
    slurm("scontrol", "update", f"NodeName={node}", "State=drain", "Reason=test")
    try:
        process = snakemake(project, "--configfile", "config/config.yaml")
        wait_for(lambda: len(jobs(project, "PENDING")) == 2, process, "both runs are queued")
        project.replace("config/config.yaml", "  Boxing: {}\n", "")
        project.replace("config/config.yaml", "Pong: {}", "Pong: {behaviour: {horizon: 2}}")
        for name in ("config.yaml", "presets/tiny.yaml"):
            project.append(f"config/{name}", "mistyped: [\n")
        for name in ("Snakefile", "workflow/rules/train.smk", "drama/agent/training/loop.py"):
            project.append(name, "\nthis is no Python\n")
        (project.root / "drama/pipeline/#jobs.py#").write_text("an editor's\n", encoding="utf-8")
        for path in project.root.rglob("*.py"):
            path.touch()
    finally:
        slurm("scontrol", "update", f"NodeName={node}", "State=resume")
    finish(process)
    for game in GAMES:
        assert result(project, game, 0) == result(undisturbed, game, 0)
    assert {state for _, _, state in jobs(project)} == {"COMPLETED"}
    assert project.results("report/index.html")

    for name in ("Snakefile", "workflow/rules/train.smk", "drama/agent/training/loop.py"):
        project.replace(name, "\nthis is no Python\n", "")
    for name in ("config.yaml", "presets/tiny.yaml"):
        project.replace(f"config/{name}", "mistyped: [\n", "")
    output = project.run(*SNAKEMAKE, "-n")
    assert "Training Pong" in output and "Boxing" not in output
