"""dvc.yaml: that it has the stages of what is recorded, and that DVC works with them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import Clone, make_project
from test_pipeline import wait_for_training

from drama.pipeline.artifacts.stages import EXPERIMENT, dvc_yaml
from drama.pipeline.config import Experiment, load_experiment

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("stages")]


@pytest.fixture(autouse=True)
def _in_the_projects_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(EXPERIMENT)


def stages(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)["stages"]
    return found


def test_the_committed_dvc_yaml_is_about_the_configurations_results(experiment: Experiment) -> None:
    document = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))
    assert document["vars"] == [{"results": "results/xs"}] and experiment.preset == "xs"


def test_it_has_stages_for_what_is_recorded_only(experiment: Experiment) -> None:
    assert stages(dvc_yaml(experiment, ())) == {}
    names = {"train@Pong-1", "train@Alien-0", "evaluate@Pong-1", "train@Tetris-0", "report"}
    some = stages(dvc_yaml(experiment, names))
    assert list(some) == ["plan", "train", "evaluate", "report"]
    assert list(some["train"]["foreach"]) == ["Alien-0", "Pong-1"], "in the configuration's order"
    assert some["evaluate"]["foreach"] == {"Pong-1": {"game": "Pong", "seed": 1}}
    notes = [name for name in some["report"]["deps"] if name.endswith("evaluation.json")]
    assert notes == ["${results}/runs/Pong/seed1/evaluation.json"]


def test_its_commands_are_those_of_the_rules(experiment: Experiment) -> None:
    document = stages(dvc_yaml(experiment, {"train@Pong-0", "evaluate@Pong-0", "report"}))
    places = {
        "train": "${results}/recipes/${item.game}/seed${item.seed}.json",
        "evaluate": "${results}/recipes/${item.game}/seed${item.seed}.json",
        "report": "${results}",
    }
    for name, argument in places.items():
        rule = Path(f"workflow/rules/{name}.smk").read_text(encoding="utf-8")
        (command,) = re.findall(r'^        "(?:exec )?{params.drama} (\w+) ', rule, re.MULTILINE)
        made = document[name].get("do", document[name])
        assert made["cmd"] == f'drama {command} "{argument}"'


NEWCOMERS = {
    ("dvc", "pull"): (0, "Everything is up to date."),
    ("dvc", "pull", "train@Pong-0"): (1, "'train@Pong-0' does not exist as an output or a stage"),
    ("dvc", "status"): (0, "There are no data or pipelines tracked in this project yet."),
    ("dvc", "metrics", "show"): (0, ""),
    ("dvc", "plots", "show"): (0, "No plots were loaded"),
    ("dvc", "repro", "--dry", "--allow-missing"): (0, "Data and pipelines are up to date."),
}


def test_where_nothing_is_recorded_dvc_says_so_in_a_line_or_two(tmp_path: Path) -> None:
    clone = make_project(tmp_path / "clone")
    for command, (code, answer) in NEWCOMERS.items():
        said = clone.run(*command, expected=code)
        assert answer in said and len(said.splitlines()) <= 2, f"{command}: {said}"
    assert clone.git("status", "--porcelain") == ""


def test_dvc_runs_one_stage_and_goes_on_with_it_after_ctrl_c(project: Clone) -> None:
    project.replace("config/presets/tiny.yaml", "total_steps: 60", "total_steps: 400")
    project.run("drama", "plan")
    repro = ("dvc", "repro", "train@Pong-0")
    process = project.start(*repro)
    assert wait_for_training(project, process) == "Pong"
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode != 0 and "saved" in output, output
    assert not project.results("runs/Pong/seed0/run-*.json")

    output = project.run(*repro)
    (step,) = re.findall(r"Pong seed 0: from step (\d+) of 400", output)
    assert int(step) > 0, output
    assert project.results("runs/Pong/seed0/run-*.json")
    # What DVC wrote into dvc.lock is what `drama record` would; the old evaluation goes.
    before = yaml.safe_load(project.lock())["stages"]
    project.run("drama", "record")
    assert yaml.safe_load(project.lock())["stages"]["train@Pong-0"] == before["train@Pong-0"]
    assert "didn't change" in project.run(*repro)


def test_a_plan_that_dvc_gave_is_recorded_by_dvc(project: Clone) -> None:
    project.replace("config/config.yaml", "Pong: {}", "Pong: {replay: {alpha: 0.5}}")
    assert '"plan"' in project.run("dvc", "status", "--json")
    project.run("dvc", "repro", "plan")
    status = project.run("dvc", "status", "--json")
    assert '"plan"' not in status and '"train@Pong-0"' in status
