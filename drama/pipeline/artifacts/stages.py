"""The pipeline as DVC sees it: dvc.yaml, its stages and what each needs and makes.

`dvc stage add` knows no matrix: it would be called 262 times, for a second of processor time each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from drama.errors import ConfigurationError
from drama.files import write_text
from drama.pipeline.artifacts.evaluations import NOTE
from drama.pipeline.config import Experiment, load_experiment, preset_layers, project_file
from drama.pipeline.fingerprints import LOCK_FILE, REPORT

DVC_YAML = Path("dvc.yaml")
EXPERIMENT = Path("config/config.yaml")
RUN = "${item.game}/seed${item.seed}"
HEADER = f"""\
# The pipeline for DVC: `dvc repro`, `dvc status`, `dvc metrics show`, `dvc pull train@Pong-0`.
# Written by `drama stages` from {EXPERIMENT}: after a change of its games, seeds or preset,
# give that command instead of editing this file.
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


def write_stages() -> int:
    """Write dvc.yaml for config/config.yaml and return its number of stages.

    Raises:
        ConfigurationError: for any mistake in the configuration, and where DVC cannot keep results.
    """
    experiment = load_experiment(EXPERIMENT)
    if is_outside(results := results_folder(experiment)):
        raise ConfigurationError(
            f"{EXPERIMENT}: results = {experiment.results!r}: {remedy(results)}"
        )
    write_text(DVC_YAML, dvc_yaml(experiment))
    return 2 + 2 * len(experiment.games) * len(experiment.seeds)


def dvc_yaml(experiment: Experiment) -> str:
    """Return the text of dvc.yaml for an experiment."""
    results = results_folder(experiment)
    makers = {"plan": _plan, "train": _train, "evaluate": _evaluate, "report": _report}
    parts = [_yaml({"stages": {name: make(experiment, results)}}) for name, make in makers.items()]
    return HEADER + "stages:\n" + "\n".join(part.removeprefix("stages:\n") for part in parts)


def _plan(experiment: Experiment, results: str) -> dict[str, Any]:
    presets = [layer.source for layer in preset_layers(experiment.preset)]
    code = [f"drama/{part}" for part in PLANNING_CODE]
    return {
        "desc": "Resolve the configuration into one recipe per game and seed",
        "cmd": "drama plan",
        "deps": [str(EXPERIMENT), *presets, str(LOCK_FILE), *code],
        "outs": [{f"{results}/recipes": SMALL}],
    }


def _train(experiment: Experiment, results: str) -> dict[str, Any]:
    recipe, run = f"{results}/recipes/{RUN}.json", f"{results}/runs/{RUN}"
    return {
        "desc": "Train one run; a run that was stopped goes on where it was",
        "matrix": _matrix(experiment),
        "cmd": f"drama train {recipe}",
        "deps": [recipe],
        "outs": [
            {f"{run}/episodes.parquet": SMALL},
            {f"{run}/training.parquet": SMALL},
            {f"{run}/checkpoint.parquet": BLOB},
            {f"{run}/replay": BLOB},
        ],
    }


def _evaluate(experiment: Experiment, results: str) -> dict[str, Any]:
    recipe, run = f"{results}/recipes/{RUN}", f"{results}/runs/{RUN}"
    return {
        "desc": "Score one run over its evaluation episodes",
        "matrix": _matrix(experiment),
        "cmd": f"drama evaluate {recipe}.json",
        # It reads the checkpoint, and fetches it when it is not here. training.parquet stands for
        # the run, whose speed it holds and no other run shares, because it is in every clone.
        "deps": [f"{recipe}.evaluation.json", f"{run}/training.parquet"],
        "outs": [{f"{run}/{NOTE}": SMALL}],
    }


def _report(experiment: Experiment, results: str) -> dict[str, Any]:
    report = f"{results}/report"
    notes = (
        f"{results}/runs/{game}/seed{seed}/{NOTE}"
        for game in experiment.games
        for seed in experiment.seeds
    )
    names = ("aggregates.json", "figures", "index.html", "report.md", "scores.parquet")
    return {
        "desc": "Compare scores with people, random play and published methods",
        "cmd": f"drama report {results}",
        "deps": [f"{results}/recipes/report.json", *notes],
        "outs": [{f"{report}/{name}": SMALL} for name in names],
        "metrics": [{f"{report}/metrics.json": SMALL}],
        "plots": [{f"{report}/scores.csv": SMALL | SCORES_PLOT}],
    }


def _matrix(experiment: Experiment) -> dict[str, Any]:
    return {"game": _Inline(experiment.games), "seed": _Inline(experiment.seeds)}


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


def remedy(results: str) -> str:
    """Say how results on another disk can be kept in DVC all the same."""
    return (
        f"DVC keeps only what has a place in this folder. Results on another disk have one through "
        f"a link: `ln -s {results} results/{Path(results).name}`, with `results: results`"
    )


class _Inline(list[Any]):
    """A list that YAML writes between brackets."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Inline,
    lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True),
)


def _yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)
