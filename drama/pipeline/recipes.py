"""Recipes and fingerprints: one file per run that says everything about it.

`plan` resolves the configuration into recipes. A run's fingerprint is the SHA-256 of its recipe,
which holds every setting, the hash of the code that defines a run and the hash of the lock file.
Results carry the fingerprint in their names: what is current is a question of names, never of
modification times.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drama
from drama.agent.settings import CATCH, EvaluationSettings, Recipe
from drama.errors import ConfigurationError, reason
from drama.files import canonical_json, sha256_text, write_text
from drama.pipeline.config import (
    Experiment,
    Layer,
    Preset,
    load_experiment,
    load_preset,
    project_file,
    read_recipe_text,
    resolve,
)
from drama.runs.folder import SHORT, restore

PACKAGE = Path(drama.__file__).parent
RUN_CODE = tuple(
    f"agent/{part}" for part in ("settings.py", "env", "replay", "model", "behaviour", "training")
)
EVALUATION_CODE = ("agent/evaluation.py",)
REPORT_CODE = ("report", "pipeline/artifacts/evaluations.py", "pipeline/history.py")
LOCK_FILE = Path("containers/run.lock")


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan and the names of what it makes.

    Attributes:
        game: name of the game.
        seed: the run's seed.
        recipe: its recipe file.
        folder: where its files lie.
        record: the file that says the run is whole, run-<fingerprint>.json.
        evaluation: its evaluation, evaluation-<fingerprint>.parquet.
        fingerprint: the run's, in full.
        evaluation_fingerprint: the evaluation's, in full.
    """

    game: str
    seed: int
    recipe: Path
    folder: Path
    record: Path
    evaluation: Path
    fingerprint: str
    evaluation_fingerprint: str


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        preset: name of the preset.
        device: what to run on, auto, cpu or cuda.
        backend: what computes Mamba-2, auto, torch or mamba_ssm.
        runs_per_gpu: how many runs share a GPU on this machine.
        results: folder of the preset's results.
        runs: in the order of configuration.
        report: the file that says the report is whole, report-<fingerprint>.json.
    """

    preset: str
    device: str
    backend: str
    runs_per_gpu: int
    results: Path
    runs: list[PlannedRun]
    report: Path


def plan(
    experiment: Path,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[Layer] = (),
    *,
    write: bool = True,
) -> Plan:
    """Resolve an experiment into recipes, writing each whose content changed.

    Everything is resolved before anything is written. A run that was set aside and is wanted again
    gets its folder back.

    Args:
        experiment: the YAML file that says what to run.
        overrides: keys of that file to replace (preset, games, seeds, device, results).
        settings: layers over every game's settings, such as `--set` gives.
        write: False to only say what the plan is, and touch no file.

    Raises:
        ConfigurationError: for any mistake in any layer.
    """
    wanted = load_experiment(experiment, overrides)
    results = Path(wanted.results) / wanted.preset
    run_code, evaluation_code = code_hash(RUN_CODE), code_hash(EVALUATION_CODE)
    runtime = lock_hash(project_file(LOCK_FILE))
    texts: dict[Path, str] = {}
    runs: list[PlannedRun] = []
    complete = True
    for game, preset in _presets(wanted, experiment, settings):
        complete &= game not in CATCH and is_complete_protocol(preset)
        for seed in wanted.seeds:
            recipe = Recipe(
                format=1,
                preset=wanted.preset,
                game=game,
                seed=seed,
                settings=preset.settings(),
                code=run_code,
                runtime=runtime,
            )
            text = recipe_text(recipe)
            evaluation = evaluation_text(sha256_text(text), preset.evaluation, evaluation_code)
            run = planned_run(results, game, seed, sha256_text(text), sha256_text(evaluation))
            texts |= {run.recipe: text, evaluation_recipe(run.recipe): evaluation}
            runs.append(run)
    report = report_text(wanted.preset, complete, runs, results)
    texts[results / "recipes" / "report.json"] = report
    if write:
        write_changed(texts)
        for run in runs:
            restore(run.folder, run.fingerprint)
    stamp = results / "report" / f"report-{sha256_text(report)[:SHORT]}.json"
    return Plan(
        wanted.preset, wanted.device, wanted.backend, wanted.runs_per_gpu, results, runs, stamp
    )


def write_changed(texts: Mapping[Path, str]) -> None:
    """Write every file whose text is not there yet."""
    for path, text in texts.items():
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def _presets(
    wanted: Experiment, experiment: Path, settings: Sequence[Layer]
) -> Iterator[tuple[str, Preset]]:
    for game, overrides in wanted.games.items():
        layer = Layer(str(experiment), overrides, prefix=f"games.{game}")
        yield game, load_preset(wanted.preset, layer, *settings)


def planned_run(
    results: Path, game: str, seed: int, fingerprint: str, evaluation: str
) -> PlannedRun:
    """Return a run of a preset's results by its and its evaluation's fingerprints."""
    folder = results / "runs" / game / f"seed{seed}"
    return PlannedRun(
        game=game,
        seed=seed,
        recipe=results / "recipes" / game / f"seed{seed}.json",
        folder=folder,
        record=folder / f"run-{fingerprint[:SHORT]}.json",
        evaluation=folder / f"evaluation-{evaluation[:SHORT]}.parquet",
        fingerprint=fingerprint,
        evaluation_fingerprint=evaluation,
    )


def is_complete_protocol(preset: Preset) -> bool:
    """Say whether a run under these settings may be called an Atari100k run.

    How the agent learns is not asked: `xs-as-published` plays by the protocol as much as `xs`, and
    a report names its preset. How it acts is, since random actions in between are not its own play.
    Nor is the game asked: one that is not of the 26 has no share in the benchmark's scores anyway.
    """
    game, acting = preset.environment, preset.behaviour
    played = (game.action_repeat, game.max_frames, game.image_size, game.actions)
    usual = (game.repeat_action_probability, game.no_op_starts, game.life_loss_terminates)
    return (
        preset.complete_protocol
        and preset.training.total_steps == 100_000
        and preset.evaluation.episodes >= 100
        and preset.evaluation.actions == "greedy"
        and not preset.evaluation.enough_same
        and played == (4, 108_000, 64, "minimal")
        and usual == (0, 0, "learning")
        and (acting.temperature, acting.epsilon) == (1, 0)
        and not preset.replay.shuffle_rewards
    )


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe's file; its SHA-256 is the run's fingerprint."""
    return canonical_json(recipe.model_dump(mode="json", by_alias=True))


def evaluation_recipe(recipe: Path) -> Path:
    """Return where the evaluation's recipe lies: beside the run's."""
    return recipe.with_suffix(".evaluation.json")


def evaluation_text(fingerprint: str, settings: EvaluationSettings, code: str) -> str:
    """Return the evaluation's recipe; its SHA-256 is the evaluation's fingerprint."""
    return canonical_json(
        {"format": 1, "run": fingerprint, "settings": settings.model_dump(), "code": code}
    )


def report_text(preset: str, complete: bool, runs: Iterable[PlannedRun], results: Path) -> str:
    """Return recipes/report.json; its SHA-256 is the report's fingerprint."""
    return canonical_json(
        {
            "format": 1,
            "preset": preset,
            "complete_protocol": complete,
            "code": code_hash(REPORT_CODE),
            "runs": [
                {
                    "game": run.game,
                    "seed": run.seed,
                    "run": run.fingerprint,
                    "evaluation": run.evaluation_fingerprint,
                    "folder": run.folder.relative_to(results).as_posix(),
                }
                for run in runs
            ],
        }
    )


# --- reading recipes back ------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFiles:
    """A recipe that was read, and where its run's files lie."""

    path: Path
    recipe: Recipe
    fingerprint: str
    folder: Path

    @property
    def record(self) -> Path:
        """The file that says the run is whole."""
        return self.folder / f"run-{self.fingerprint[:SHORT]}.json"


def read_recipe(path: Path, renewal: str | None = None) -> RunFiles:
    """Read a recipe and check that today's code and lock file are those it names.

    Args:
        path: the recipe.
        renewal: what to do when they are not, instead of making the recipe anew.

    Raises:
        ConfigurationError: when it is not a recipe, or of other code or library versions.
    """
    recipe, text = read_recipe_text(path)
    place = Path("recipes", recipe.game, f"seed{recipe.seed}.json")
    folder = "<preset>" if recipe.ancestor is None else extended_preset(recipe)
    parts = path.absolute().parts
    if parts[-3:] != place.parts or (recipe.ancestor and parts[-4] != folder):
        raise ConfigurationError(
            f"{path}: this recipe is of {recipe.game}, seed {recipe.seed}; it belongs to "
            f"results/{folder}/{place}, and its run's files beside that, in runs/"
        )
    renewal = renewal or _renewal(recipe)
    if recipe.code != code_hash(RUN_CODE):
        raise ConfigurationError(
            f"{path}: made for other code ({recipe.code[:SHORT]}; today's is "
            f"{code_hash(RUN_CODE)[:SHORT]}). {renewal}; `drama verify` plays a run "
            "that other code made"
        )
    if recipe.runtime != lock_hash(project_file(LOCK_FILE)):
        raise ConfigurationError(
            f"{path}: made for other library versions than {LOCK_FILE} pins. {renewal}"
        )
    return run_files(path, recipe, text)


def run_files(path: Path, recipe: Recipe, text: str) -> RunFiles:
    """Return the run of a recipe, whose files lie in runs/ beside recipes/."""
    results = path.absolute().parents[2]
    if results.is_relative_to(Path.cwd()):  # short names in messages
        results = results.relative_to(Path.cwd())
    folder = results / "runs" / recipe.game / f"seed{recipe.seed}"
    return RunFiles(path, recipe, sha256_text(text), folder)


def extended_preset(recipe: Recipe) -> str:
    """Return what the results of longer runs are called, such as xs-to200000."""
    return f"{recipe.preset}-to{recipe.settings.training.total_steps}"


def _renewal(recipe: Recipe) -> str:
    """Say what brings a recipe up to date."""
    if recipe.ancestor is None:
        return "`drama plan` brings it up to date"
    steps = recipe.settings.training.total_steps
    return f"`drama train --steps {steps}` with the recipe it went on from brings it up to date"


@dataclass(frozen=True)
class EvaluationFiles:
    """An evaluation's recipe that was read, and the file it makes."""

    settings: EvaluationSettings
    fingerprint: str
    path: Path


def read_evaluation_recipe(run: RunFiles) -> EvaluationFiles:
    """Read the evaluation's recipe beside a run's.

    Raises:
        ConfigurationError: when it is missing, of another run or of other code.
    """
    path = evaluation_recipe(run.path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        # First of all: an older recipe may have other settings.
        current = (data["run"], data["code"]) == (run.fingerprint, code_hash(EVALUATION_CODE))
        settings = current and resolve(EvaluationSettings, [Layer(str(path), data["settings"])])
    except (OSError, ValueError, KeyError, TypeError, ConfigurationError) as error:
        raise ConfigurationError(
            f"{path}: not an evaluation's recipe ({reason(error)}). {_renewal(run.recipe)}"
        ) from None
    if not settings:
        raise ConfigurationError(f"{path}: out of date. {_renewal(run.recipe)}")
    return _evaluation_files(run, settings, text)


def todays_evaluation(run: RunFiles) -> EvaluationFiles:
    """Return the evaluation of a run of earlier code by today's, with the settings beside it.

    Its fingerprint covers all code that plays: the run's own says what trained it.

    Raises:
        ConfigurationError: when there is no such recipe.
    """
    path = evaluation_recipe(run.path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["settings"]
        settings = resolve(EvaluationSettings, [Layer(str(path), data)])
    except (OSError, ValueError, KeyError, TypeError, ConfigurationError) as error:
        raise ConfigurationError(
            f"{path}: not an evaluation's recipe ({reason(error)}). {_renewal(run.recipe)}"
        ) from None
    code = code_hash((*EVALUATION_CODE, *RUN_CODE))
    return _evaluation_files(run, settings, evaluation_text(run.fingerprint, settings, code))


def _evaluation_files(run: RunFiles, settings: EvaluationSettings, text: str) -> EvaluationFiles:
    fingerprint = sha256_text(text)
    name = f"evaluation-{fingerprint[:SHORT]}.parquet"
    return EvaluationFiles(settings, fingerprint, run.folder / name)


# --- hashes --------------------------------------------------------------------------------------


def lock_hash(path: Path) -> str:
    """Return the hash of a lock file's pins; comments, blank lines and files' hashes aside.

    A version has as many files as there are platforms, so their hashes do not define a run.

    Raises:
        ConfigurationError: when there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ConfigurationError(f"{path}: not found; run this from the project's root") from None
    pins = [_pin(line) for line in lines]
    return sha256_text("\n".join(sorted(filter(None, pins))))


def _pin(line: str) -> str:
    words = line.split("#")[0].removesuffix("\\").split()
    return " ".join(word for word in words if not word.startswith("--hash="))


def code_hash(parts: Iterable[str], package: Path = PACKAGE) -> str:
    """Return the hash of what code means: of its syntax trees, and of other files' bytes.

    Comments, docstrings and formatting do not count.

    Args:
        parts: files and folders inside the package.
        package: the package's folder.
    """
    digest = hashlib.sha256()
    for file in _source_files(parts, package):
        digest.update(f"\n{file.relative_to(package).as_posix()}\n".encode())
        if file.suffix == ".py":
            digest.update(_meaning(ast.parse(file.read_text(encoding="utf-8"))).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _source_files(parts: Iterable[str], package: Path) -> Iterator[Path]:
    for part in parts:
        path = package / part
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file.name[0] != ".":
                yield file


def _meaning(node: Any) -> str:
    """Write a syntax tree out, docstrings and empty fields aside.

    Any string that stands as a statement is a docstring here: those behind attributes, too.

    Own code instead of `ast.dump`, whose text differs between versions of Python: a recipe must
    not depend on the interpreter that planned it.
    """
    if isinstance(node, list):
        return f"[{','.join(_meaning(item) for item in node if not _is_text(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if value is not None and value != [] and name not in ("kind", "type_comment"):
            fields.append(f"{name}={_meaning(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_text(node: Any) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)
