"""Campaigns as a user drives them: edits, other calls and looks while Snakemake runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_pipeline import (
    EXPERIMENT,
    GAMES,
    NOTHING,
    SNAKEMAKE,
    Project,
    copy_sources,
    wait_for_training,
)

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("pipeline")]

PONG = "Pong: {behaviour: {horizon: 2}}"


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.root, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def tree(project: Project) -> dict[str, tuple[int, bytes]]:
    """Every file of the project but Snakemake's own, with its time and content."""
    files = (path for path in sorted(project.root.rglob("*")) if path.is_file())
    kept = (path for path in files if not {".snakemake", "__pycache__"} & {*path.parts})
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


def plan_of(project: Project) -> dict[tuple[str, int], str]:
    """What the plan in the results lists: every run's fingerprint."""
    (path,) = project.results("recipes/report.json")
    return {(run["game"], run["seed"]): run["run"] for run in json.loads(path.read_text())["runs"]}


def whole(project: Project) -> set[str]:
    return {path.stem.split("-")[1] for path in project.results("runs/*/*/run-*.json")}


def test_looking_writes_nothing(project: Project) -> None:
    """With a recipe to be written anew, one to be removed, and a run that is to come back."""
    project.replace("config/quick.yaml", "Pong: {}", PONG)
    project.run(*SNAKEMAKE, "--until", "train")
    assert len(project.results("superseded/Pong/seed0/*/run-*.json")) == 1
    project.replace("config/quick.yaml", PONG, "Pong: {}")
    project.replace("config/quick.yaml", "  Boxing: {}\n", "  Krull: {}\n")
    before = tree(project)
    output = project.run(*SNAKEMAKE, "-n")
    assert "Training Krull" in output and "Pong" not in output, "set aside is not lost"
    for look in ("--dag", "--summary", "--list", "--rulegraph"):
        project.run(*SNAKEMAKE, look)
    page = project.root.parent / "seen.html"
    project.run(*SNAKEMAKE, "--report", str(page))
    shown = page.read_text(encoding="utf-8")
    captions = ("The comparison with people", "Returns of the training", "What a run recorded")
    for words in ("Scores", "Learning", "index.html", "returns-Boxing.svg", *captions):
        assert words in shown, words
    said = project.run("drama", "plan", "--config", "config/quick.yaml", "--dry-run")
    assert "Would be written: Krull seed 0" in said and "to be removed: Boxing seed0" in said
    project.run("drama", "status", "results/tiny")
    assert tree(project) == before
    project.run(*SNAKEMAKE, "--until", "train")
    assert set(plan_of(project)) == {("Pong", 0), ("Krull", 0)}
    assert not project.results("recipes/Boxing/*") and project.results("runs/Boxing/seed0/run-*")


def test_what_was_asked_for_is_what_runs(finished: Project, tmp_path: Path) -> None:
    """Everything is edited, and broken, while the first of two runs is under way."""
    project = copy_sources(tmp_path)
    process = project.start(*SNAKEMAKE, "--cores", "1")
    game = wait_for_training(project, process)
    (other,) = {*GAMES} - {game}
    project.replace("config/quick.yaml", f"  {other}: {{}}\n", "")
    project.append("config/presets/tiny.yaml", "replay: {alpha: 0.5}\n")
    for name in ("agent/training/loop.py", "pipeline/jobs.py", "cli.py", "report/page.py"):
        project.append(f"drama/{name}", "\nthis is no Python\n")
    for name in ("train", "evaluate", "report"):
        project.append(f"workflow/rules/{name}.smk", "\nnor this\n")
    (project.root / "drama/agent/training/loop.py~").write_text("a backup\n")
    project.append("Snakefile", "\nnor this\n")
    (project.root / "containers/run.lock").unlink()
    shutil.rmtree(project.root / "results/tiny/recipes")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    for each in GAMES:
        mine, undisturbed = project.artifacts(each), finished.artifacts(each)
        assert mine.pop("training.parquet") and undisturbed.pop("training.parquet")
        assert mine == undisturbed
    assert project.results("report/index.html")

    for path in ("drama", "workflow", "Snakefile", "containers"):
        there = project.root / path
        shutil.rmtree(there) if there.is_dir() else there.unlink()
    mended = copy_sources(tmp_path / "mended")
    for path in ("drama", "workflow", "Snakefile", "containers"):
        (mended.root / path).rename(project.root / path)
    assert project.planned() == {f"train {game}", f"evaluate {game}", "report"}


def test_two_calls_at_once_do_not_disturb_each_other(finished: Project, tmp_path: Path) -> None:
    """Of different games, and of the same one."""
    project = copy_sources(tmp_path)
    calls = [
        project.start(*SNAKEMAKE, "--cores", "1", "--config", "experiment=config/quick.yaml", games)
        for games in ("games=Pong", "games=Boxing", "games=Boxing")
    ]
    for process in calls:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert set(plan_of(project)) == {("Pong", 0), ("Boxing", 0)}
    assert whole(project) == whole(finished)
    # Of the two that wanted Boxing, one trained it and the other found it whole; the log is the
    # later one's, since Snakemake begins each job's log anew.
    for path in project.results("logs/*/seed0/train-*.log"):
        text = path.read_text(encoding="utf-8")
        assert text.count(": trained in") + text.count("this run is whole already") == 1, text
    assert project.planned() <= {"report"}


def test_narrowing_forgets_nothing(project: Project) -> None:
    before, scores = plan_of(project), project.results("report/scores.csv")[0].read_text()
    narrow = ("--config", "experiment=config/quick.yaml", "games=Pong", "seeds=7")
    project.run(*SNAKEMAKE, *narrow, "--until", "train")
    assert set(plan_of(project)) == {*before, ("Pong", 7)}
    assert before.items() <= plan_of(project).items()
    status = project.run("drama", "status", "results/tiny")
    assert "trained" in status and status.count("done") >= 2
    assert scores == project.results("report/scores.csv")[0].read_text()
    project.run(*SNAKEMAKE, *narrow)
    lines = project.results("report/scores.csv")[0].read_text().splitlines()
    assert len(lines) == 4 and {*scores.splitlines()[1:]} < {*lines}
    assert NOTHING in project.run(*SNAKEMAKE, *narrow, "-n")
    assert project.planned() == {"report"}, "without seed 7"
    project.run(*SNAKEMAKE)
    assert plan_of(project) == before


def test_the_report_can_follow_every_game(tmp_path: Path) -> None:
    project = copy_sources(tmp_path)
    output = project.run(
        *SNAKEMAKE, "--cores", "1", "--config", "experiment=config/quick.yaml", "report_after=game"
    )
    assert "Writing the report after Boxing" in output
    assert "Writing the report after everything" in output
    assert not list((project.root / ".snakemake").glob("reported*"))
    assert project.planned() == set()


def test_a_place_with_spaces_and_what_a_shell_would_read_otherwise(tmp_path: Path) -> None:
    project = copy_sources(tmp_path / "a project")
    results = "all; touch seen & results #1 (a*)"
    text = EXPERIMENT.replace("results: results", f'results: "{results}"')
    (project.root / "config/quick.yaml").write_text(text.replace("  Boxing: {}\n", ""))
    project.run(*SNAKEMAKE)
    assert not (project.root / "seen").exists()
    assert list((project.root / results / "tiny/runs/Pong/seed0").glob("evaluation-*.parquet"))
    assert NOTHING in project.run(*SNAKEMAKE, "-n")
    subprocess.run(["chmod", "-R", "u+w", str(project.root)], check=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [("a{b}c", "{ stands"), ("a:b", ": stands"), ("it's", "' stands"), ("$(touch a)", "$ stands")],
)
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, name: str, said: str) -> None:
    project = copy_sources(tmp_path)
    project.replace("config/quick.yaml", "results: results", f'results: "{name}"')
    output = project.run(*SNAKEMAKE, "-n", expected=2)
    assert said in output and "config/quick.yaml" in output and "Traceback" not in output


OUTER = """
module drama:
    snakefile:
        "{root}/Snakefile"
    config:
        config["agent"]


use rule * from drama as drama_*


rule mine:
    input:
        rules.drama_all.input,
    output:
        "mine.txt",
    default_target: True
    shell:
        "ls {{input}} > {{output}}"
"""


def test_another_workflow_can_use_this_one_as_a_module(project: Project, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    shutil.copytree(project.root / "config/presets", outer / "config/presets")
    (outer / "Snakefile").write_text(OUTER.format(root=project.root), encoding="utf-8")
    experiment = yaml.safe_load(EXPERIMENT) | {"results": f"{project.root}/results"}
    experiment["games"]["Pong"] = {"evaluation": {"episodes": 1}}
    config = json.dumps({"agent": experiment, "another": "key"})
    (outer / "config.json").write_text(config, encoding="utf-8")
    call = (
        "snakemake", "--profile", f"{project.root}/workflow/profiles/local",
        "--configfile", f"{outer}/config.json", "--directory", str(outer),
        "--snakefile", f"{outer}/Snakefile",
    )  # fmt: skip
    output = project.run(*call)
    assert "Evaluating Pong" in output
    assert "Training" not in output and "Evaluating Boxing" not in output
    assert len((outer / "mine.txt").read_text(encoding="utf-8").split()) == 5
    assert len(project.results("runs/Pong/seed0/evaluation-*.parquet")) == 2
