"""The pipeline as DVC sees it: stages, what each needs and makes, and dvc.yaml.

One function describes a stage for both uses: with a game's name and a seed, the stage of one run;
with DVC's placeholders, the matrix in dvc.yaml that stands for all of them. `dvc stage add` knows
no matrix: it would be called 262 times, for a second of processor time each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drama.files import write_text
from drama.pipeline.artifacts.evaluations import NOTE
from drama.pipeline.config import Experiment, load_experiment, preset_layers
from drama.pipeline.fingerprints import LOCK_FILE, REPORT

DVC_YAML = Path("dvc.yaml")
EXPERIMENT = Path("config/config.yaml")
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
SCORES_PLOT = {
    "template": "scatter",
    "x": "human_normalised_score",
    "y": "game",
    "title": "Human-normalised score of every run",
}


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml.

    Attributes:
        name: as DVC calls it, such as train@Pong-0.
        description: what it does.
        command: what it runs.
        needs: files and folders it depends on.
        makes: files and folders that are kept in git.
        blobs: files and folders that are kept in DVC.
        metrics: like `makes`, shown by `dvc metrics`.
        plots: like `makes`, shown by `dvc plots`.
    """

    name: str
    description: str
    command: str
    needs: tuple[str, ...]
    makes: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()

    @property
    def outs(self) -> tuple[str, ...]:
        """Everything it makes."""
        return (*self.makes, *self.blobs, *self.metrics, *self.plots)


def plan_stage(experiment: Experiment, results: str) -> Stage:
    """Return the stage that turns configuration and code into recipes."""
    presets = [layer.source for layer in preset_layers(experiment.preset)]
    code = [f"drama/{part}" for part in PLANNING_CODE]
    return Stage(
        name="plan",
        description="Resolve the configuration into one recipe per game and seed",
        command="drama plan",
        needs=(str(EXPERIMENT), *presets, str(LOCK_FILE), *code),
        makes=(f"{results}/recipes",),
    )


def train_stage(results: str, game: str, seed: int | str) -> Stage:
    """Return the stage that trains one run."""
    recipe, run = f"{results}/recipes/{game}/seed{seed}.json", f"{results}/runs/{game}/seed{seed}"
    return Stage(
        name=f"train@{game}-{seed}",
        description="Train one run; a run that was stopped goes on where it was",
        command=f"drama train {recipe}",
        needs=(recipe,),
        makes=(f"{run}/episodes.parquet", f"{run}/training.parquet"),
        blobs=(f"{run}/checkpoint.parquet", f"{run}/replay"),
    )


def evaluate_stage(results: str, game: str, seed: int | str) -> Stage:
    """Return the stage that scores one run."""
    recipe, run = f"{results}/recipes/{game}/seed{seed}", f"{results}/runs/{game}/seed{seed}"
    return Stage(
        name=f"evaluate@{game}-{seed}",
        description="Score one run over its evaluation episodes",
        command=f"drama evaluate {recipe}.json",
        # It reads the checkpoint, and fetches it when it is not here. training.parquet stands for
        # the run, whose speed it holds and no other run shares, because it is in every clone.
        needs=(f"{recipe}.evaluation.json", f"{run}/training.parquet"),
        makes=(f"{run}/{NOTE}",),
    )


def report_stage(experiment: Experiment, results: str) -> Stage:
    """Return the stage that writes the report."""
    runs = [(game, seed) for game in experiment.games for seed in experiment.seeds]
    notes = [f"{results}/runs/{game}/seed{seed}/{NOTE}" for game, seed in runs]
    report = f"{results}/report"
    return Stage(
        name="report",
        description="Compare scores with people, random play and published methods",
        command=f"drama report {results}",
        needs=(f"{results}/recipes/report.json", *notes),
        makes=tuple(
            f"{report}/{name}"
            for name in ("aggregates.json", "figures", "index.html", "report.md", "scores.parquet")
        ),
        metrics=(f"{report}/metrics.json",),
        plots=(f"{report}/scores.csv",),
    )


def stages_of_runs(experiment: Experiment, results: str) -> Iterator[tuple[Stage, Stage]]:
    """Yield every run's stages, training and evaluation, in the order of configuration."""
    for game in experiment.games:
        for seed in experiment.seeds:
            yield train_stage(results, game, seed), evaluate_stage(results, game, seed)


# --- dvc.yaml ------------------------------------------------------------------------------------


def write_stages(path: Path = EXPERIMENT) -> int:
    """Write dvc.yaml for an experiment and return its number of stages.

    Raises:
        ConfigurationError: for any mistake in the configuration.
    """
    experiment = load_experiment(path)
    write_text(DVC_YAML, dvc_yaml(experiment))
    return 2 + 2 * len(experiment.games) * len(experiment.seeds)


def dvc_yaml(experiment: Experiment) -> str:
    """Return the text of dvc.yaml for an experiment."""
    results = results_folder(experiment)
    matrix = {"game": _Inline(experiment.games), "seed": _Inline(experiment.seeds)}
    placeholders = ("${item.game}", "${item.seed}")
    train, evaluate = train_stage(results, *placeholders), evaluate_stage(results, *placeholders)
    stages = {
        "plan": _document(plan_stage(experiment, results)),
        "train": _document(train, matrix),
        "evaluate": _document(evaluate, matrix),
        "report": _document(report_stage(experiment, results)),
    }
    parts = [_yaml({"stages": {name: stage}}) for name, stage in stages.items()]
    return HEADER + "stages:\n" + "\n".join(part.removeprefix("stages:\n") for part in parts)


def results_folder(experiment: Experiment) -> str:
    """Return the folder of an experiment's results."""
    return (Path(experiment.results) / experiment.preset).as_posix()


def _document(stage: Stage, matrix: dict[str, Any] | None = None) -> dict[str, Any]:
    # persist: what a run left is what it goes on from, so DVC must not remove it first.
    kept = {"persist": True}
    small = {"cache": False, **kept}
    outs = [{path: small} for path in stage.makes] + [{path: kept} for path in stage.blobs]
    return {
        "desc": stage.description,
        **({"matrix": matrix} if matrix else {}),
        "cmd": stage.command,
        "deps": list(stage.needs),
        "outs": outs,
        **({"metrics": [{path: small} for path in stage.metrics]} if stage.metrics else {}),
        **({"plots": [{p: small | SCORES_PLOT} for p in stage.plots]} if stage.plots else {}),
    }


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
