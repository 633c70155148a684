"""Recipes and fingerprints: one file per run that says everything about it.

`plan` resolves the configuration into recipes. A run's fingerprint is the SHA-256 of its recipe,
which holds every setting and names the code and the library versions that define a run
(`drama.pipeline.fingerprints`). Results carry the fingerprint in their names: what is current is a
question of names, never of modification times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from drama.agent.settings import CATCH, EvaluationSettings, Fingerprint, Frozen, Recipe
from drama.errors import ConfigurationError, reason
from drama.files import canonical_json, sha256_text, write_text
from drama.pipeline.config import Experiment, Preset, load_experiment, load_preset, read_recipe_text
from drama.pipeline.fingerprints import (
    LOCK_FILE,
    Choices,
    evaluation_code,
    report_code,
    run_code,
    runtime,
)
from drama.pipeline.layers import Layer, resolve
from drama.pipeline.plans import CAMPAIGNS, PLAN, RECIPES, Plan, PlannedRun, plan_text, read_plan
from drama.reading import parse_model, read_bytes, read_text
from drama.runs.folder import SHORT, locked, restore


@dataclass(frozen=True)
class Planning:
    """What a configuration comes to, before anything is written.

    Attributes:
        plan: of everything in the results: the runs that were asked for, and where games or seeds
            were named on the command line, those that were planned before.
        asked: the runs that were asked for.
        texts: their recipes, by path.
        complete: whether the runs that were asked for keep to the whole Atari100k protocol.
        code: hash of the code that makes the report.
        narrowed: whether games or seeds were named on the command line.
    """

    plan: Plan
    asked: tuple[PlannedRun, ...]
    texts: Mapping[Path, str]
    complete: bool
    code: str
    narrowed: bool

    @property
    def text(self) -> str:
        """The plan's file."""
        plan = self.plan
        return plan_text(plan.preset, plan.complete_protocol, plan.runs, self.code)

    def changed(self) -> list[PlannedRun]:
        """Return the runs that were asked for whose recipes are not there yet."""
        there = {path for path, text in self.texts.items() if holds(path, text)}
        return [
            run for run in self.asked if not {run.recipe, evaluation_recipe(run.recipe)} <= there
        ]

    def left(self) -> list[Path]:
        """Return the recipes of runs that the whole configuration does not ask for any more."""
        if self.narrowed:
            return []
        asked = {run.recipe for run in self.asked}
        found = sorted((self.plan.results / RECIPES).glob("*/seed*.json"))
        return [path for path in found if path not in asked and not path.match(f"*{EVALUATION}")]

    def write(self) -> None:
        """Write every file whose text is not there yet, and give runs their folders back.

        A run that was set aside and is wanted again gets its folder. Recipes of runs that are not
        planned any more are removed.
        """
        recipes = self.plan.results / RECIPES
        left = self.left()
        if left or self.changed() or not holds(recipes / PLAN, self.text):
            with locked(recipes):  # two that plan at once must both be in the plan
                latest = _over_earlier(self) if self.narrowed else self
                write_changed({**self.texts, recipes / PLAN: latest.text})
                for path in left:
                    path.unlink(missing_ok=True)
                    evaluation_recipe(path).unlink(missing_ok=True)
        for run in self.asked:
            restore(run.folder, run.fingerprint)


def plan(
    experiment: Path,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[Layer] = (),
    *,
    write: bool = True,
) -> Plan:
    """Resolve an experiment into recipes, writing each whose content changed; see `prepare`.

    Args:
        experiment: the YAML file that says what to run.
        overrides: keys of that file to replace.
        settings: layers over every game's settings.
        write: False to only say what the plan is, and touch no file.

    Returns:
        The plan of everything in the results.
    """
    planning = prepare(experiment, overrides, settings)
    if write:
        planning.write()
    return planning.plan


def prepare(
    experiment: Path,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[Layer] = (),
) -> Planning:
    """Resolve an experiment into recipes, and write nothing.

    Where games or seeds are among the overrides, the results' other runs stay planned as they are.

    Args:
        experiment: the YAML file that says what to run.
        overrides: keys of that file to replace (preset, games, seeds, device, results).
        settings: layers over every game's settings, such as `--set` gives.

    Raises:
        ConfigurationError: for any mistake in any layer.
    """
    wanted = load_experiment(experiment, overrides)
    results = Path(wanted.results) / wanted.preset
    texts: dict[Path, str] = {}
    runs: list[PlannedRun] = []
    complete = True
    for game, own in wanted.games.items():
        layer = Layer(str(experiment), own, prefix=f"games.{game}")
        preset = load_preset(wanted.preset, layer, *settings)
        complete &= game not in CATCH and is_complete_protocol(preset)
        for seed, text, evaluation in _recipes(wanted, preset, game):
            run = PlannedRun(results, game, seed, sha256_text(text), sha256_text(evaluation))
            texts |= {run.recipe: text, evaluation_recipe(run.recipe): evaluation}
            runs.append(run)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    # Games with settings of their own behind them come from a whole configuration file.
    whole = isinstance(given.get("games"), Mapping)
    narrowed = not whole and not given.keys().isdisjoint(("games", "seeds"))
    asked = tuple(runs)
    made = _plan_of(wanted.preset, results, complete, asked, report_code())
    planning = Planning(made, asked, texts, complete, report_code(), narrowed)
    return _over_earlier(planning) if narrowed else planning


def _recipes(wanted: Experiment, preset: Preset, game: str) -> Iterator[tuple[int, str, str]]:
    """Yield the seeds of a game with the recipes of the run and of its evaluation."""
    settings, todays = preset.settings(), evaluation_code()
    code = run_code(Choices.of(game, settings))
    for seed in wanted.seeds:
        recipe = Recipe(
            format=1,
            preset=wanted.preset,
            game=game,
            seed=seed,
            settings=settings,
            code=code,
            runtime=runtime(),
        )
        text = recipe_text(recipe)
        yield seed, text, evaluation_text(sha256_text(text), preset.evaluation, todays)


def _plan_of(
    preset: str, results: Path, complete: bool, runs: tuple[PlannedRun, ...], code: str
) -> Plan:
    fingerprint = sha256_text(plan_text(preset, complete, runs, code))
    return Plan(preset, results, complete, runs, fingerprint)


def _over_earlier(planning: Planning) -> Planning:
    """Put the runs that were asked for into the plan that lies there, if one does."""
    try:
        earlier = read_plan(planning.plan.results)
    except ConfigurationError:
        return planning
    new = {(run.game, run.seed): run for run in planning.asked}
    kept = {(run.game, run.seed): run for run in earlier.runs}
    others = kept.keys() - new.keys()
    plan = planning.plan
    # The protocol holds for all runs of a plan or is not claimed.
    complete = planning.complete and (earlier.complete_protocol or not others)
    runs = tuple((kept | new).values())
    merged = _plan_of(plan.preset, plan.results, complete, runs, planning.code)
    return replace(planning, plan=merged)


def write_changed(texts: Mapping[Path, str]) -> None:
    """Write every file whose text is not there yet."""
    for path, text in texts.items():
        if not holds(path, text):
            write_text(path, text)


def holds(path: Path, text: str) -> bool:
    """Say whether a file is there and holds this text; what cannot be read does not."""
    content = text.encode()
    try:
        return read_bytes(path, len(content)) == content
    except (OSError, ValueError):
        return False


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


EVALUATION = ".evaluation.json"


def evaluation_recipe(recipe: Path) -> Path:
    """Return where the evaluation's recipe lies: beside the run's."""
    return recipe.with_suffix(EVALUATION)


def evaluation_text(fingerprint: str, settings: EvaluationSettings, code: str) -> str:
    """Return the evaluation's recipe; its SHA-256 is the evaluation's fingerprint."""
    return canonical_json(
        {"format": 1, "run": fingerprint, "settings": settings.model_dump(), "code": code}
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
    todays = run_code(Choices.of(recipe.game, recipe.settings))
    if recipe.code != todays:
        raise ConfigurationError(
            f"{path}: made for other code ({recipe.code[:SHORT]}; today's is {todays[:SHORT]}). "
            f"{renewal}; `drama verify` plays a run that other code made"
        )
    if recipe.runtime != runtime():
        raise ConfigurationError(
            f"{path}: made for other library versions than {LOCK_FILE} pins. {renewal}"
        )
    return run_files(path, recipe, text)


def run_files(path: Path, recipe: Recipe, text: str) -> RunFiles:
    """Return the run of a recipe, whose files lie in runs/ beside recipes/."""
    results = shortened(results_of(path))
    folder = results / "runs" / recipe.game / f"seed{recipe.seed}"
    return RunFiles(path, recipe, sha256_text(text), folder)


def results_of(recipe: Path) -> Path:
    """Return the preset's results that a recipe's run belongs to: a campaign's lie in them."""
    place = recipe.absolute().parents[2]
    return place.parents[1] if place.parent.name == CAMPAIGNS else place


def shortened(path: Path) -> Path:
    """Return a place below the working directory by its short name, for messages."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def extended_preset(recipe: Recipe) -> str:
    """Return what the results of longer runs are called, such as xs-to200000."""
    return f"{recipe.preset}-to{recipe.settings.training.total_steps}"


def _renewal(recipe: Recipe) -> str:
    """Say what brings a recipe up to date."""
    if recipe.ancestor is None:
        return "`drama plan` brings it up to date"
    steps = recipe.settings.training.total_steps
    return f"`drama train --steps {steps}` with the recipe it went on from brings it up to date"


class _Evaluation(Frozen):
    format: Literal[1]
    run: Fingerprint
    settings: dict[str, Any]
    code: Fingerprint


@dataclass(frozen=True)
class EvaluationFiles:
    """An evaluation's recipe that was read, and the file it makes."""

    settings: EvaluationSettings
    fingerprint: str
    path: Path


def read_evaluation_recipe(run: RunFiles, *, of_earlier_code: bool = False) -> EvaluationFiles:
    """Read the evaluation's recipe beside a run's.

    Args:
        run: the run to evaluate.
        of_earlier_code: whether earlier code made it. Then only settings are read, and the
            fingerprint covers all of today's code that plays: the run's own says what trained it.

    Raises:
        ConfigurationError: when it is missing, of another run or of other code.
    """
    path = evaluation_recipe(run.path)
    try:
        text = read_text(path)
        made = parse_model(text, _Evaluation)
        # First of all: an older recipe may have other settings.
        todays = of_earlier_code or (made.run, made.code) == (run.fingerprint, evaluation_code())
        settings = todays and resolve(EvaluationSettings, [Layer(str(path), made.settings)])
    except (OSError, ValueError, ConfigurationError) as error:  # ValidationError is a ValueError
        raise ConfigurationError(
            f"{path}: not an evaluation's recipe ({reason(error)}). {_renewal(run.recipe)}"
        ) from None
    if not settings:
        raise ConfigurationError(f"{path}: out of date. {_renewal(run.recipe)}")
    if of_earlier_code:
        played_by = evaluation_code(), run_code(Choices.of(run.recipe.game, run.recipe.settings))
        text = evaluation_text(run.fingerprint, settings, sha256_text("\n".join(played_by)))
    fingerprint = sha256_text(text)
    name = f"evaluation-{fingerprint[:SHORT]}.parquet"
    return EvaluationFiles(settings, fingerprint, run.folder / name)
