"""The profiles, as Snakemake itself reads them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from test_pipeline import ROOT, Project, copy_sources

PROFILES = ROOT / "workflow" / "profiles"
# Writes what Snakemake waits for, where `python -m drama train RECIPE` would after hours on a GPU.
STAND_IN = """\
#!/bin/sh
folder=$(dirname "$4" | sed s,/campaigns/[0-9a-f]*/recipes/,/runs/,)/$(basename "$4" .json)
mkdir -p "$folder"
touch "$folder/run-$(sha256sum "$4" | cut -c 1-16).json"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project, whose runs may use a GPU."""
    project = copy_sources(tmp_path_factory.mktemp("profiles"))
    (project.root / "local").symlink_to("workflow/profiles/local")
    experiment = (project.root / "config/quick.yaml").read_text(encoding="utf-8")
    (project.root / "config/gpus.yaml").write_text(
        experiment.replace("device: cpu", "device: auto"), encoding="utf-8"
    )
    return project


def test_snakemake_plans_with_the_kubernetes_profile(project: Project, tmp_path: Path) -> None:
    profile = ("--profile", "workflow/profiles/kubernetes")
    experiment = ("--config", "experiment=config/gpus.yaml", f"results={tmp_path}/results")
    output = project.run("snakemake", *profile, "-n", *experiment)
    runs = tmp_path / "results/tiny/runs"
    assert f"Training Pong, seed 0; progress: {tmp_path}/results/tiny/logs/Pong" in output
    # Everything lies on the shared volume: what is there counts, and nothing goes to a store.
    assert re.search(r"^train +2$", output, re.MULTILINE), output
    project.run("drama", "plan", "--config", "config/gpus.yaml")
    planned = project.root / "results/tiny/recipes/Pong/seed0.json"
    whole = runs / f"Pong/seed0/run-{hashlib.sha256(planned.read_bytes()).hexdigest()[:16]}.json"
    whole.parent.mkdir(parents=True)
    whole.touch()
    output = project.run("snakemake", *profile, "-n", *experiment)
    assert re.search(r"^train +1$", output, re.MULTILINE), output


def test_a_cluster_is_described_in_three_lines() -> None:
    lines = (PROFILES / "cluster/config.yaml").read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if "# <-" in line]
    assert [line.split(":")[0].strip() for line in marked] == [
        "slurm_partition", "slurm_account", "gpu_model",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cluster", "kubernetes"])
def test_elsewhere_every_run_asks_for_one_gpu_and_is_tried_again(name: str) -> None:
    profile = yaml.safe_load((PROFILES / name / "config.yaml").read_text(encoding="utf-8"))
    assert {rule: asked["gpu"] for rule, asked in profile["set-resources"].items()} == {
        "train": 1, "evaluate": 1,
    }  # fmt: skip
    assert profile["retries"] > 0


def test_the_kubernetes_profile_says_that_it_has_not_been_run() -> None:
    header = (PROFILES / "kubernetes/config.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert "NOT RUN YET" in header


def at_once(project: Project, tmp_path: Path, gpus: str, runs_per_gpu: int, *arguments: str) -> int:
    """How many runs Snakemake starts at once on a machine that shows these GPUs."""
    command = tmp_path / "bin" / "python"
    command.parent.mkdir()
    command.write_text(STAND_IN, encoding="utf-8")
    command.chmod(0o755)
    process = project.start(
        "env", f"PATH={command.parent}:{project.environment['PATH']}",
        f"CUDA_VISIBLE_DEVICES={gpus}",
        "snakemake", "--profile", "local", "--until", "train", "--cores", "8", *arguments,
        "--config", "experiment=config/gpus.yaml", "seeds=0,1", f"results={tmp_path}",
        f"runs_per_gpu={runs_per_gpu}",
    )  # fmt: skip
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return max(int(number) for number in re.findall(r"^Execute (\d+) jobs", output, re.MULTILINE))


@pytest.mark.parametrize(
    ("gpus", "runs_per_gpu", "arguments", "expected"),
    [
        ("0", 1, (), 1),
        ("0", 2, (), 2),
        ("0,1,2", 1, (), 3),
        ("0,1,2", 1, ("--resources", "gpu=2"), 2),
        ("", 1, (), 4),
    ],
)
def test_as_many_runs_at_a_time_as_gpus_allow(
    project: Project, tmp_path: Path, gpus: str, runs_per_gpu: int, arguments: tuple[str, ...],
    expected: int,
) -> None:  # fmt: skip
    assert at_once(project, tmp_path, gpus, runs_per_gpu, *arguments) == expected


@pytest.mark.parametrize(
    ("gpus", "experiment", "device"),
    [("0", "gpus", "cuda"), ("", "gpus", "auto"), ("0", "quick", "cpu")],
)
def test_where_a_gpu_was_asked_for_it_must_be_there(
    project: Project, gpus: str, experiment: str, device: str
) -> None:
    output = project.run(
        "env", f"CUDA_VISIBLE_DEVICES={gpus}", "snakemake", "--profile", "local", "-n", "-p",
        "--config", f"experiment=config/{experiment}.yaml", "games=Pong",
    )  # fmt: skip
    assert re.findall(r" --device (\w+) ", output) == [device] * 2, output  # train, evaluate
