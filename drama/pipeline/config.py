"""The configuration: what to run, presets, games' overrides, the command line; recipes read back.

A run's settings are layered (`drama.pipeline.layers`): a preset (config/presets/<name>.yaml, which
may name the preset it starts from under `base`), a game's own overrides, overrides from the command
line.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

import drama
from drama.agent.settings import GAMES, Backend, EvaluationSettings, Frozen, Recipe, Settings
from drama.errors import ConfigurationError, brief, cut, reason
from drama.files import flatten
from drama.pipeline.layers import Layer, closest, nearest, problem, read_mapping, resolve
from drama.pipeline.names import PRESET, check_names
from drama.reading import parse_model, read_text
from drama.runs.folder import COMMIT

PRESETS = Path("config/presets")
"""Where presets lie, relative to the project's root."""

SHIPPED = Path(__file__).with_name("shipped")
"""What an installed package holds of the project's files, each where it lies in the project."""


FROZEN = Path(drama.__file__).with_name(COMMIT)
"""There only in a campaign's package."""


class Preset(Settings):
    """A preset's file: a run's settings, its evaluation and what it may be called."""

    evaluation: EvaluationSettings
    complete_protocol: bool

    def settings(self) -> Settings:
        """Return the part that defines a run's result."""
        return Settings.model_validate(
            {name: getattr(self, name) for name in Settings.model_fields}
        )


PROTOCOL = "complete_protocol"
"""The key of a preset's file that no layer above it can grant."""


MEANT_OTHERWISE = {
    ":": "Python's search path",
    "{": "Snakemake's wildcards",
    "}": "Snakemake's wildcards",
    "\\": "a shell",
    "$": "a shell",
    "`": "a shell",
    "'": "a shell",
    '"': "a shell",
}
"""Characters that a folder's name must do without, and where they mean something else."""


def _folder(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("name a folder, such as results")
    if value.startswith("~"):
        raise ValueError("~ is not understood here; write the folder's whole name")
    if value.startswith("-"):
        raise ValueError("a command would take it for an option; write ./ before it")
    files = [place for place in (Path(value), *Path(value).parents) if os.path.isfile(place)]
    if files:
        raise ValueError(f"{files[0]} is a file, and results need a folder")
    if found := sorted(set(value) & MEANT_OTHERWISE.keys()):
        raise ValueError(f"{found[0]} stands for something else in {MEANT_OTHERWISE[found[0]]}")
    return value


Folder = Annotated[str, Field(max_length=1000), AfterValidator(_folder)]


class Experiment(Frozen):
    """What to run: config/config.yaml."""

    preset: str
    games: dict[str, dict[str, Any]]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    device: Literal["auto", "cpu", "cuda"]
    backend: Backend = "auto"
    deterministic: bool = False
    runs_per_gpu: Annotated[int, Field(ge=1, le=100)] = 1
    report_after: Literal["everything", "game"] = "everything"
    results: Folder


# --- presets -------------------------------------------------------------------------------------


def project_file(place: Path) -> Path:
    """Return a file of the project: the working directory's own, else the installed package's.

    A campaign's frozen package is asked first: what the working directory has may be edited.
    """
    shipped = SHIPPED / place
    first, second = (shipped, place) if FROZEN.exists() else (place, shipped)
    return second if second.exists() and not first.exists() else first


def preset_files(folder: Path = PRESETS) -> dict[str, Path]:
    """Return all presets by name: a folder's own, and the installed package's others.

    Names become part of paths and commands; files with others are no presets.
    """
    places = (SHIPPED / PRESETS, folder)
    files = (path for place in places for path in sorted(place.glob("*.yaml")))
    return {path.stem: path for path in files if re.fullmatch(PRESET, path.stem)}


def preset_layers(name: str, folder: Path = PRESETS) -> list[Layer]:
    """Return a preset's layers: the presets it starts from first, its own file last.

    Raises:
        ConfigurationError: for a name without a file, or presets that start from each other.
    """
    layers: dict[str, Layer] = {}
    current: Any = name
    named = str(folder)
    while current is not None:
        path = find_preset(current, named, folder)
        if current in layers:
            chain = " -> ".join([*layers, current])
            raise ConfigurationError(
                f"{named} = {brief(current)}: presets start from each other: {chain}"
            )
        data = read_mapping(path)
        following = data.pop("base", None)
        layers[current] = Layer(str(path), data)
        current, named = following, f"{path}: base"
    return list(reversed(layers.values()))


def find_preset(name: Any, where: str, folder: Path = PRESETS) -> Path:
    """Return the file of a preset that was named somewhere, in a file and under a key.

    Raises:
        ConfigurationError: when there is no such preset.
    """
    files = preset_files(folder)
    if name not in list(files):
        raise ConfigurationError(
            f"{where} = {brief(name)}: no such preset in {folder}. {nearest(cut(str(name)), files)}"
        )
    return files[name]


def no_plan(place: Path) -> ConfigurationError:
    """Return the error that says that a place is no preset's results, and what makes them."""
    found = "a file" if place.is_file() else "no plan in it" if place.is_dir() else "not found"
    preset = f" --preset {place.name}" if place.name in preset_files() else ""
    return ConfigurationError(
        f"{place}: {found}. Name a preset's results, such as results/xs; `drama plan{preset}` "
        "makes them"
    )


def load_preset(name: str, *overrides: Layer, folder: Path = PRESETS) -> Preset:
    """Resolve a preset with further layers over it.

    Raises:
        ConfigurationError: for anything unknown, mistyped, out of range or inconsistent.
    """
    for layer in overrides:
        if (said := layer.data.get(PROTOCOL, False)) is not False:
            raise ConfigurationError(
                f"{layer.where(PROTOCOL)} = {brief(said)}: only a preset's file says that its runs "
                "are whole Atari100k runs; remove it here"
            )
    layers = [*preset_layers(name, folder), *overrides]
    preset = resolve(Preset, layers)
    for keys, trouble in (*_conflicts(preset), *_conflicting_evaluation(preset.evaluation)):
        raise ConfigurationError(f"{_last_word(layers, keys)}: {trouble}")
    return preset


def _last_word(layers: list[Layer], keys: tuple[str, ...]) -> str:
    """Say where the layer that had the last word on any of some settings says what."""
    for layer in reversed(layers):
        written = flatten(dict(layer.data), ".")
        for key in keys:
            if key in written:
                return f"{layer.where(key)} = {brief(written[key])}"
    raise KeyError(keys)


# --- settings that are fine alone but not together -----------------------------------------------

Conflict = tuple[tuple[str, ...], str]
"""The keys of settings that do not go together, and why."""


def _conflicts(settings: Settings) -> Iterator[Conflict]:
    yield from _conflicting_networks(settings)
    capacity, training = settings.replay.capacity, settings.training
    stored = min(capacity, training.random_steps)
    game = settings.environment
    if game.no_op_starts >= game.max_frames:
        yield (
            ("environment.no_op_starts", "environment.max_frames"),
            f"environment.no_op_starts = {game.no_op_starts} leaves nothing of an episode of "
            f"environment.max_frames = {game.max_frames}",
        )
    if training.total_steps <= training.random_steps:
        yield (
            ("training.total_steps", "training.random_steps"),
            f"training.total_steps = {training.total_steps} must be more than "
            f"training.random_steps = {training.random_steps}: before that nothing is learned",
        )
    for section, batch_key, length_key in (
        ("world_model", "batch_size", "sequence_length"),
        ("behaviour", "contexts", "context_length"),
    ):
        owner = getattr(settings, section)
        batch, length = getattr(owner, batch_key), getattr(owner, length_key)
        batches, lengths = f"{section}.{batch_key}", f"{section}.{length_key}"
        if length > capacity:
            yield (
                (lengths, "replay.capacity"),
                f"{lengths} = {length} cannot be longer than the buffer, "
                f"replay.capacity = {capacity}",
            )
        if batch + length - 1 > stored:
            yield (
                (batches, lengths, "training.random_steps", "replay.capacity"),
                f"{batches} = {batch} different windows of {length} steps need "
                f"{batch + length - 1} stored transitions, but the first update comes after "
                f"{stored} (the smaller of training.random_steps and replay.capacity)",
            )


def _conflicting_networks(settings: Settings) -> Iterator[Conflict]:
    model, sequence = settings.world_model, settings.sequence_model
    image, stride = settings.environment.image_size, math.prod(model.strides)
    if len(model.strides) != len(model.channels):
        yield (
            ("world_model.strides", "world_model.channels"),
            f"there must be as many world_model.strides ({len(model.strides)}) "
            f"as world_model.channels ({len(model.channels)})",
        )
    if image % stride:
        yield (
            ("world_model.strides", "environment.image_size"),
            f"the product of world_model.strides, {stride}, must divide "
            f"environment.image_size = {image}",
        )
    divided = {
        "mamba2": ("expand * width", sequence.expand * sequence.width),
        "transformer": ("width", sequence.width),
        "rwkv": ("width", sequence.width),
    }
    name, width = divided.get(sequence.kind, ("", 0))
    if width % sequence.head_width:
        keys = ("head_width", "width", "expand", "kind")
        yield (
            tuple(f"sequence_model.{key}" for key in keys),
            f"sequence_model.head_width = {sequence.head_width} must divide {name} = {width}",
        )
    if sequence.kind == "transformer" and sequence.head_width % 2:
        yield (
            ("sequence_model.head_width", "sequence_model.kind"),
            f"sequence_model.head_width = {sequence.head_width} must be even, since rotary "
            "positions turn pairs of channels",
        )


def _conflicting_evaluation(evaluation: EvaluationSettings) -> Iterator[Conflict]:
    if evaluation.enough_same > evaluation.episodes:
        yield (
            ("evaluation.enough_same", "evaluation.episodes"),
            f"evaluation.enough_same = {evaluation.enough_same} first episodes that are all the "
            f"same cannot be found among evaluation.episodes = {evaluation.episodes}; set it to as "
            "many at most, or to 0 to play all",
        )


# --- what to run ---------------------------------------------------------------------------------


def load_experiment(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read what to run, with single keys replaced from the command line.

    Raises:
        ConfigurationError: for unknown keys, games, presets and impossible values.
    """
    data = read_mapping(path)
    given = {
        key: _listed(value) if key in ("games", "seeds") else value
        for key, value in (overrides or {}).items()
        if value is not None
    }

    def where(key: str) -> str:
        return f"{'command line' if key in given else path}: {key}"

    if isinstance(listed := given.get("games"), (list, tuple)):
        listed = [*map(str, listed)]
        if len(set(listed)) != len(listed):
            raise ConfigurationError(f"{where('games')} = {brief(listed)}: a game is given twice")
        written = data.get("games")
        known = written if isinstance(written, Mapping) else {}
        given["games"] = {game: known.get(game) or {} for game in listed}
    chosen = given if "games" in given else data
    if isinstance(games := chosen.get("games"), Mapping):
        # `Pong:` with nothing behind it is an empty override.
        chosen["games"] = {game: {} if value is None else value for game, value in games.items()}
    elif games is not None:
        raise ConfigurationError(
            f"{where('games')} = {brief(games)}: expected names with their overrides, "
            "such as {Pong: {}, Krull: {}}"
        )
    experiment = resolve(Experiment, [Layer(str(path), data), Layer("command line", given)])
    find_preset(experiment.preset, where("preset"))
    for game in experiment.games:
        check_game(game, f"{where('games')}.{cut(game)}")
    if not experiment.games:
        raise ConfigurationError(f"{where('games')} = {{}}: name at least one game")
    if len(set(experiment.seeds)) != len(experiment.seeds):
        raise ConfigurationError(f"{where('seeds')} = {experiment.seeds}: a seed is given twice")
    return experiment


def _listed(value: Any) -> Any:
    """Split what stands for several games or seeds in one word, such as Pong,Krull or 0,1."""
    if not isinstance(value, (str, int)):
        return value
    words = [word.strip() for word in str(value).split(",")]
    return [int(word) if re.fullmatch("-?[0-9]{1,18}", word) else word for word in words]


def check_game(game: str, where: str) -> None:
    """Check that a game named somewhere exists: of the benchmark, of ale-py's others, or Catch.

    Raises:
        ConfigurationError: when it does not.
    """
    if game in GAMES:
        return
    # Imported here, so that planning the usual games loads neither ale-py nor OpenCV.
    from drama.agent.env import game_names

    if game not in (names := game_names()):
        raise ConfigurationError(
            f"{where}: unknown game. {closest(game, names)}`drama games` lists all {len(names)}"
        )


def read_recipe_text(path: Path) -> tuple[Recipe, str]:
    """Read a recipe and its file's text.

    Raises:
        ConfigurationError: when the file is missing or is not a recipe.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: no recipe there ({reason(error)}). `drama plan` writes them to "
            "results/<preset>/recipes/<Game>/seed<k>.json"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: not a recipe: {reason(error)}") from None
    return parse_recipe(text, str(path)), text


def parse_recipe(text: str, source: str) -> Recipe:
    """Parse a recipe's JSON and check that its settings go together.

    Raises:
        ConfigurationError: naming `source`, when it is not a recipe.
    """
    try:
        recipe = parse_model(text, Recipe)
        check_names(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        trouble = "missing" if first["type"] == "missing" else problem(first)
        what = f"{cut('.'.join(map(str, first['loc'])), 200)}: {trouble}".removeprefix(": ")
        raise ConfigurationError(f"{source}: not a recipe: {what}") from None
    except ValueError as error:
        raise ConfigurationError(f"{source}: not a recipe: {reason(error)}") from None
    check_game(recipe.game, f"{source}: game = {brief(recipe.game)}")
    for _, trouble in _conflicts(recipe.settings):
        raise ConfigurationError(f"{source}: settings: {trouble}")
    return recipe
