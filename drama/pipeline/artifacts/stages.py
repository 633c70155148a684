"""The recorded runs as DVC sees them: dvc.yaml, its stages and what each needs and makes.

A run has stages from when it is first recorded. With stages for every planned run, as a matrix over
games and seeds would give, one that is not trained makes a whole `dvc pull` fail, and `dvc repro
--dry --allow-missing` says of it that it "didn't change".
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field

from drama.errors import ConfigurationError, brief
from drama.files import write_text
from drama.pipeline.artifacts.evaluations import NOTE
from drama.pipeline.config import (
    Experiment,
    Folder,
    load_experiment,
    preset_layers,
    project_file,
)
from drama.pipeline.fingerprints import LOCK_FILE, REPORT
from drama.pipeline.layers import PLAIN, load_yaml
from drama.reading import read_text
from drama.runs.folder import GIT

DVC_YAML = Path("dvc.yaml")
EXPERIMENT = Path("config/config.yaml")
RUN = "${item.game}/seed${item.seed}"
HEADER = f"""\
# What is recorded, for DVC: `dvc pull train@Pong-0`, `dvc status`, `dvc metrics show`, `dvc repro`.
# Written by `drama record`, together with dvc.lock. A run that is not here has not been recorded:
# `drama status` shows how far it is, `drama train` and Snakemake train it. After a change of
# {EXPERIMENT}'s preset, `drama stages` has DVC keep that preset's results instead.
"""
PLANNING_CODE = (
    "agent",
    *REPORT,
    *(
        f"pipeline/{name}"
        for name in ("accepted.json", "config.py", "layers.py", "fingerprints.py", "recipes.py")
    ),
)
# persist: what a run left is what it goes on from, so DVC must not remove it first.
BLOB = {"persist": True}
SMALL = {"cache": False, **BLOB}
SCORES_PLOT = {
    "template": "scatter",
    "x": "human_normalised_score",
    "y": "game",
    "title": "Human-normalised score of every run",
}


def write_stages() -> str:
    """Have DVC keep the results of the preset that config/config.yaml names, and no others.

    Returns:
        The folder of these results.

    Raises:
        ConfigurationError: for any mistake in the configuration, and where DVC cannot keep results.
    """
    experiment = load_experiment(EXPERIMENT)
    if is_outside(results := results_folder(experiment)):
        raise ConfigurationError(
            f"{EXPERIMENT}: results = {brief(experiment.results)}: {remedy(results)}"
        )
    if is_ignored(results):
        raise ConfigurationError(f"{EXPERIMENT}: preset = {experiment.preset!r}: {IGNORED}")
    if covered_results() != results:
        write_text(DVC_YAML, dvc_yaml(experiment, ()))
    return results


def covered_results() -> str | None:
    """Return the folder of the results that dvc.yaml is about; None when it cannot be read.

    DVC itself may be missing.
    """
    with suppress(OSError, yaml.YAMLError, ValueError):  # ValidationError is a ValueError
        document = _Document.model_validate(load_yaml(read_text(DVC_YAML), PLAIN))
        return document.vars[0].results
    return None


class _Variables(BaseModel):
    results: Folder


class _Document(BaseModel):
    vars: Annotated[list[_Variables], Field(min_length=1, max_length=1)]


def dvc_yaml(experiment: Experiment, recorded: Collection[str]) -> str:
    """Return the text of dvc.yaml.

    Args:
        recorded: the stages to be there, such as train@Pong-0; others than those of the
            experiment's runs and its report do not count.
    """
    stages: dict[str, Any] = {}
    for name, make in (("train", _train), ("evaluate", _evaluate)):
        if runs := {
            f"{game}-{seed}": _Inline({"game": game, "seed": seed})
            for game in experiment.games
            for seed in experiment.seeds
            if f"{name}@{game}-{seed}" in recorded
        }:
            stages |= {name: {"foreach": runs, "do": make()}}
    if stages:
        stages = {"plan": _plan(experiment), **stages}
    if stages and "report" in recorded:
        stages |= {"report": _report(stages.get("evaluate", {"foreach": {}})["foreach"].values())}
    document = {"vars": [{"results": results_folder(experiment)}], "stages": stages}
    return HEADER + _yaml(document)


def _plan(experiment: Experiment) -> dict[str, Any]:
    presets = [layer.source for layer in preset_layers(experiment.preset)]
    code = [f"drama/{part}" for part in PLANNING_CODE]
    return {
        "desc": "Resolve the configuration into one recipe per game and seed",
        "cmd": "drama plan",
        "deps": [str(EXPERIMENT), *presets, str(LOCK_FILE), *code],
        "outs": [{"${results}/recipes": SMALL}],
    }


def _train() -> dict[str, Any]:
    recipe, run = f"${{results}}/recipes/{RUN}.json", f"${{results}}/runs/{RUN}"
    return {
        "desc": "Train one run; a run that was stopped goes on where it was",
        "cmd": f'drama train "{recipe}"',
        "deps": [recipe],
        "outs": [
            {f"{run}/episodes.parquet": SMALL},
            {f"{run}/training.parquet": SMALL},
            {f"{run}/checkpoint.parquet": BLOB},
            {f"{run}/replay": BLOB},
        ],
    }


def _evaluate() -> dict[str, Any]:
    recipe, run = f"${{results}}/recipes/{RUN}", f"${{results}}/runs/{RUN}"
    return {
        "desc": "Score one run over its evaluation episodes",
        "cmd": f'drama evaluate "{recipe}.json"',
        # It reads the checkpoint, and fetches it when it is not here. training.parquet stands for
        # the run, because it is in every clone.
        "deps": [f"{recipe}.evaluation.json", f"{run}/training.parquet"],
        "outs": [{f"{run}/{NOTE}": SMALL}],
    }


def _report(evaluated: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    report = "${results}/report"
    notes = (f"${{results}}/runs/{run['game']}/seed{run['seed']}/{NOTE}" for run in evaluated)
    names = ("aggregates.json", "figures", "index.html", "report.md", "scores.parquet")
    return {
        "desc": "Compare scores with people, random play and published methods",
        "cmd": 'drama report "${results}"',
        "deps": ["${results}/recipes/report.json", *notes],
        "outs": [{f"{report}/{name}": SMALL} for name in names],
        "metrics": [{f"{report}/metrics.json": SMALL}],
        "plots": [{f"{report}/scores.csv": SMALL | SCORES_PLOT}],
    }


def results_folder(experiment: Experiment) -> str:
    """Return the folder of an experiment's results."""
    return (Path(experiment.results) / experiment.preset).as_posix()


def or_configured(results: Path | None) -> Path:
    """Return results as they are named; those that config/config.yaml names when they are not.

    Raises:
        ConfigurationError: for any mistake in the configuration.
    """
    return results or Path(results_folder(load_experiment(project_file(EXPERIMENT))))


def is_outside(results: str) -> bool:
    """Say whether results lie where DVC can keep none: not in the working directory."""
    return not Path(os.path.abspath(results)).is_relative_to(Path.cwd())


def is_ignored(results: str) -> bool:
    """Say whether git ignores the small results, without which what DVC keeps is of no use."""
    command = [*GIT, "check-ignore", "--quiet", f"{results}/runs/Pong/seed0/evaluation.json"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def remedy(results: str) -> str:
    """Say how results on another disk can be kept in DVC all the same."""
    return (
        f"DVC keeps only what has a place in this folder. Results on another disk have one through "
        f"a link: `ln -s {results} results/{Path(results).name}`, with `results: results`"
    )


IGNORED = "its results are ignored by git (.gitignore), so DVC is not asked to keep them"


class _Inline(dict[str, Any]):
    """A mapping that YAML writes between braces."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Inline,
    lambda dumper, items: dumper.represent_mapping("tag:yaml.org,2002:map", items, True),
)


def _yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)
