"""dvc.yaml: what `drama stages` writes, and that DVC takes it and works with it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from dvc_project import Clone, make_project
from test_pipeline import wait_for_training

from drama.pipeline.artifacts.stages import EXPERIMENT, dvc_yaml
from drama.pipeline.config import Experiment, load_experiment

pytestmark = pytest.mark.xdist_group("stages")


@pytest.fixture(autouse=True)
def _in_the_projects_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment(EXPERIMENT)


def matrix(text: str, stage: str) -> dict[str, list[object]]:
    found: dict[str, list[object]] = yaml.safe_load(text)["stages"][stage]["matrix"]
    return found


def test_the_committed_dvc_yaml_is_what_the_configuration_asks_for(experiment: Experiment) -> None:
    written = Path("dvc.yaml").read_text(encoding="utf-8")
    assert written == dvc_yaml(experiment), "`drama stages` writes dvc.yaml anew"


def test_a_game_and_a_seed_more_or_less_change_it(experiment: Experiment) -> None:
    games = {**experiment.games, "Pitfall": {}}
    more = dvc_yaml(experiment.model_copy(update={"games": games}))
    fewer = dvc_yaml(experiment.model_copy(update={"seeds": [0, 1]}))
    for stage in ("train", "evaluate"):
        assert matrix(more, stage)["game"] == [*experiment.games, "Pitfall"]
        assert matrix(fewer, stage)["seed"] == [0, 1]
    assert "results/xs/runs/Pitfall/seed4/evaluation.json" in more
    assert "seed2/evaluation.json" not in fewer


def test_its_commands_are_those_of_the_rules(experiment: Experiment) -> None:
    document = yaml.safe_load(dvc_yaml(experiment))["stages"]
    places = {
        "train": "results/xs/recipes/${item.game}/seed${item.seed}.json",
        "evaluate": "results/xs/recipes/${item.game}/seed${item.seed}.json",
        "report": "results/xs",
    }
    for name, argument in places.items():
        rule = Path(f"workflow/rules/{name}.smk").read_text(encoding="utf-8")
        (command,) = re.findall(r'^        "(?:exec )?{params.drama} (\w+) ', rule, re.MULTILINE)
        assert document[name]["cmd"] == f"drama {command} {argument}"


def test_dvc_runs_one_stage_and_goes_on_with_it_after_ctrl_c(tmp_path: Path) -> None:
    clone = make_project(tmp_path / "clone")
    clone.replace("config/presets/tiny.yaml", "total_steps: 60", "total_steps: 400")
    listed = clone.run("dvc", "stage", "list", "--name-only").split()
    assert set(listed) == {
        "plan", "train@Boxing-0", "train@Pong-0", "evaluate@Boxing-0", "evaluate@Pong-0", "report",
    }  # fmt: skip
    repro = ("dvc", "repro", "train@Pong-0")
    process = clone.start(*repro)
    assert wait_for_training(clone, process) == "Pong"
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode != 0 and "saved" in output, output
    assert not clone.results("runs/*/seed0/run-*.json")

    output = clone.run(*repro)
    (step,) = re.findall(r"Pong seed 0: from step (\d+) of 400", output)
    assert int(step) > 0, output
    assert clone.results("runs/Pong/seed0/run-*.json")
    assert not clone.results("runs/Boxing")
    # What DVC wrote into dvc.lock is what `drama record` would.
    before = clone.lock()
    clone.run("drama", "record")
    assert clone.lock() == before
    assert "didn't change" in clone.run(*repro)


def test_a_plan_that_dvc_gave_is_recorded_by_dvc(tmp_path: Path) -> None:
    clone: Clone = make_project(tmp_path / "clone")
    clone.run("dvc", "repro", "plan")
    clone.replace("config/config.yaml", "Pong: {}", "Pong: {replay: {alpha: 0.5}}")
    assert '"plan"' in clone.run("dvc", "status", "--json")
    clone.run("drama", "plan")
    status = clone.run("dvc", "status", "--json")
    assert '"plan"' not in status and '"train@Pong-0"' in status
