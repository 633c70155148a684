"""Reading the configuration: presets, games' overrides, the command line; errors that help.

A run's settings are layered: a preset (config/presets/<name>.yaml, which may name the preset it
starts from under `base`), a game's own overrides, overrides from the command line. Every layer
remembers the file it came from, so that an error can name the key, the value, the file and what
would have been allowed.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
)
from pydantic_core import ErrorDetails

from drama.agent.settings import (
    GAMES,
    Backend,
    EvaluationSettings,
    Frozen,
    Recipe,
    Settings,
)
from drama.errors import ConfigurationError, reason

PRESETS = Path("config/presets")
"""Where presets lie, relative to the project's root."""

SHIPPED = Path(__file__).with_name("shipped")
"""What an installed package holds of the project's files, each where it lies in the project."""


class Preset(Settings):
    """A preset's file: a run's settings, its evaluation and what it may be called."""

    evaluation: EvaluationSettings
    complete_protocol: bool

    def settings(self) -> Settings:
        """Return the part that defines a run's result."""
        return Settings.model_validate(
            {name: getattr(self, name) for name in Settings.model_fields}
        )


def _folder(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("name a folder, such as results")
    if value.startswith("~"):
        raise ValueError("~ is not understood here; write the folder's whole name")
    files = [place for place in (Path(value), *Path(value).parents) if os.path.isfile(place)]
    if files:
        raise ValueError(f"{files[0]} is a file, and results need a folder")
    return value


class Experiment(Frozen):
    """What to run: config/config.yaml."""

    preset: str
    games: dict[str, dict[str, Any]]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    device: Literal["auto", "cpu", "cuda"]
    backend: Backend = "auto"
    runs_per_gpu: Annotated[int, Field(ge=1, le=100)] = 1
    results: Annotated[str, AfterValidator(_folder)]


# --- reading files -------------------------------------------------------------------------------


def project_file(place: Path) -> Path:
    """Return a file of the project: the working directory's own, else the installed package's."""
    shipped = SHIPPED / place
    return shipped if shipped.exists() and not place.exists() else place


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, 010, 1:30 and dates are words, and no key comes twice.

    A number without a fraction is a whole one, however it is written: 1e5 as much as 100000.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key: a key is a word",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        value: float = self.construct_yaml_float(node)
        exact = value.is_integer() and abs(value) <= EXACT
        return int(value) if exact else value


EXACT = 2**53
"""Up to this, a floating-point number holds every whole number."""

_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(?:0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [f for f in forms if f[0] not in {*_NUMBERS, "tag:yaml.org,2002:timestamp"}]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigurationError: naming `source` and the line, when the text is not YAML.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
        # Refuses what tags, anchors and escapes can make beyond plain values.
        json.dumps(data, ensure_ascii=False).encode()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark else ""
        snippet = mark.get_snippet() if mark else None
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigurationError(
            f"{source}{place}: not valid YAML: {problem}" + (f"\n{snippet}" if snippet else "")
        ) from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{source}: not valid YAML: {reason(error)}") from None
    return data


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigurationError: when the file is missing or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"{data!r:.60}"
        raise ConfigurationError(f"{path}: expected keys and values, found {found}")
    return data


# --- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A nested mapping of settings and where it was written."""

    source: str
    data: Mapping[str, Any]
    prefix: str = ""


Model = TypeVar("Model", bound=BaseModel)


def resolve(model: type[Model], layers: list[Layer]) -> Model:
    """Merge layers, later ones over earlier ones, and validate the result.

    Raises:
        ConfigurationError: naming key, value, file and the allowed values.
    """
    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], Layer] = {}
    for layer in layers:
        for path, value in _leaves(model, layer):
            _assign(merged, path, value)
            origin[path] = layer
    try:
        # Through JSON, because strict validation takes a JSON array for a tuple, not a list.
        return model.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        raise ConfigurationError(_explain(model, error, origin, layers)) from None


def _leaves(model: type[BaseModel], layer: Layer) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walk a layer along the model's sections, refusing keys that the model does not have."""

    def walk(at: type[BaseModel], data: Any, path: tuple[str, ...]) -> Iterator[Any]:
        if not isinstance(data, Mapping):
            raise ConfigurationError(
                f"{_where(layer, path)} = {data!r}: expected a section with keys "
                f"{', '.join(_keys(at))}"
            )
        fields = _keys(at)
        for key, value in data.items():
            if key not in fields:
                raise ConfigurationError(_unknown(layer, (*path, str(key)), value, fields))
            section = _section(fields[key])
            if section is None:
                yield (*path, key), value
            else:
                yield from walk(section, value, (*path, key))

    yield from walk(model, layer.data, ())


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _assign(target: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        target = target.setdefault(key, {})
    target[path[-1]] = value


def _where(layer: Layer, path: tuple[str, ...]) -> str:
    return f"{layer.source}: {'.'.join(filter(None, (layer.prefix, *path)))}"


def _unknown(layer: Layer, path: tuple[str, ...], value: Any, allowed: Mapping[str, Any]) -> str:
    return f"{_where(layer, path)} = {value!r}: unknown key. {nearest(path[-1], allowed)}"


def nearest(word: str, allowed: Any) -> str:
    """Say what was allowed, with the closest match to `word` first when there is one."""
    words = list(allowed)
    return f"{closest(word, words)}Allowed: {', '.join(words)}"


def closest(word: str, words: Sequence[str]) -> str:
    """Ask for the closest match to `word`, with a space behind; nothing when there is none."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


def _explain(
    model: type[BaseModel],
    error: ValidationError,
    origin: Mapping[tuple[str, ...], Layer],
    layers: list[Layer],
) -> str:
    return "\n".join(_explain_one(details, origin, layers) for details in error.errors())


def _explain_one(
    details: ErrorDetails, origin: Mapping[tuple[str, ...], Layer], layers: list[Layer]
) -> str:
    location = tuple(str(part) for part in details["loc"])
    # The location of an item inside a list is longer than the key that holds the list.
    lengths = range(len(location), 0, -1)
    path = next((location[:n] for n in lengths if location[:n] in origin), None)
    if path is None:
        sources = ", ".join(dict.fromkeys(layer.source for layer in layers if layer.data))
        missing = details["type"] == "missing"
        problem = "missing; give it a value" if missing else _problem(details)
        return f"{sources}: {'.'.join(location)}: {problem}"
    item = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in location[len(path) :])
    return f"{_where(origin[path], path)}{item} = {details['input']!r}: {_problem(details)}"


_PROBLEMS = {
    "bool_type": "expected true or false",
    "dict_type": "expected keys and values",
    "finite_number": "expected a finite number",
    "float_type": "expected a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "expected a whole number",
    "json_invalid": "not JSON, or cut off",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "expected a list such as [1, 2]",
    "missing": "too few are listed",
    "string_type": "expected a word",
    "too_long": "at most {max_length} can be listed",
    "too_short": "at least {min_length} must be listed",
    "tuple_type": "expected a list such as [1, 2]",
}
"""What Pydantic's kinds of errors are called to people; the others by Pydantic's own words."""


def _problem(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    if "expected" in context:
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return nearest(str(details["input"]), choices)
    if details["type"] in _PROBLEMS:
        return _PROBLEMS[details["type"]].format_map(context)
    return details["msg"].removeprefix("Value error, ")


# --- presets and experiments ---------------------------------------------------------------------


def preset_files(folder: Path = PRESETS) -> dict[str, Path]:
    """Return all presets by name: a folder's own, and the installed package's others."""
    places = (SHIPPED / PRESETS, folder)
    return {path.stem: path for place in places for path in sorted(place.glob("*.yaml"))}


def preset_layers(name: str, folder: Path = PRESETS) -> list[Layer]:
    """Return a preset's layers: the presets it starts from first, its own file last.

    Raises:
        ConfigurationError: for a name without a file, or presets that start from each other.
    """
    layers: list[Layer] = []
    seen: list[str] = []
    current: Any = name
    named = str(folder)
    while current is not None:
        if current in seen:
            chain = " -> ".join([*seen, current])
            raise ConfigurationError(
                f"{named} = {current!r}: presets start from each other: {chain}"
            )
        path = find_preset(current, named, folder)
        seen.append(current)
        data = read_mapping(path)
        current, named = data.pop("base", None), f"{path}: base"
        layers.insert(0, Layer(str(path), data))
    return layers


def find_preset(name: Any, where: str, folder: Path = PRESETS) -> Path:
    """Return a preset's file.

    Args:
        name: what was written.
        where: where that was, file and key.
        folder: of presets beside the installed package's.

    Raises:
        ConfigurationError: when there is no such preset.
    """
    files = preset_files(folder)
    if name not in list(files):
        raise ConfigurationError(
            f"{where} = {name!r}: no such preset in {folder}. {nearest(str(name), files)}"
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
    layers = [*preset_layers(name, folder), *overrides]
    preset = resolve(Preset, layers)
    for keys, problem in (*_conflicts(preset), *_conflicting_evaluation(preset.evaluation)):
        layer, path, value = _last(layers, keys)
        raise ConfigurationError(f"{_where(layer, path)} = {value!r}: {problem}")
    return preset


Keys = tuple[str, ...]
"""A setting's place: the keys that lead to it."""

Conflict = tuple[tuple[Keys, ...], str]
"""Settings that do not go together, and why."""


def _last(layers: list[Layer], paths: tuple[Keys, ...]) -> tuple[Layer, Keys, Any]:
    """Return the layer that had the last word on any of some settings, on which, and that word."""
    for layer in reversed(layers):
        for path in paths:
            value: Any = layer.data
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return layer, path, value
    raise KeyError(paths)


def _conflicts(settings: Settings) -> Iterator[Conflict]:
    """Yield settings that are fine alone but not together, and what is wrong with them."""
    yield from _conflicting_networks(settings)
    capacity, training = settings.replay.capacity, settings.training
    model, behaviour = settings.world_model, settings.behaviour
    stored = min(capacity, training.random_steps)
    game = settings.environment
    if game.no_op_starts >= game.max_frames:
        yield (
            (("environment", "no_op_starts"), ("environment", "max_frames")),
            f"environment.no_op_starts = {game.no_op_starts} leaves nothing of an episode of "
            f"environment.max_frames = {game.max_frames}",
        )
    ring, start = ("replay", "capacity"), ("training", "random_steps")
    if training.total_steps <= training.random_steps:
        yield (
            (("training", "total_steps"), start),
            f"training.total_steps = {training.total_steps} must be more than "
            f"training.random_steps = {training.random_steps}: before that nothing is learned",
        )
    for section, batch_key, batch, length_key, length in (
        ("world_model", "batch_size", model.batch_size, "sequence_length", model.sequence_length),
        ("behaviour", "contexts", behaviour.contexts, "context_length", behaviour.context_length),
    ):
        lengths = (section, length_key)
        if length > capacity:
            yield (
                (lengths, ring),
                f"{section}.{length_key} = {length} cannot be longer than the buffer, "
                f"replay.capacity = {capacity}",
            )
        if batch + length - 1 > stored:
            yield (
                ((section, batch_key), lengths, start, ring),
                f"{section}.{batch_key} = {batch} different windows of {length} steps need "
                f"{batch + length - 1} stored transitions, but the first update comes after "
                f"{stored} (the smaller of training.random_steps and replay.capacity)",
            )


def _conflicting_networks(settings: Settings) -> Iterator[Conflict]:
    model, sequence = settings.world_model, settings.sequence_model
    strides, channels = ("world_model", "strides"), ("world_model", "channels")
    image = settings.environment.image_size
    if len(model.strides) != len(model.channels):
        yield (
            (strides, channels),
            f"there must be as many world_model.strides ({len(model.strides)}) "
            f"as world_model.channels ({len(model.channels)})",
        )
    if image % math.prod(model.strides):
        yield (
            (strides, ("environment", "image_size")),
            f"the product of world_model.strides, {math.prod(model.strides)}, must divide "
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
            tuple(("sequence_model", key) for key in keys),
            f"sequence_model.head_width = {sequence.head_width} must divide {name} = {width}",
        )
    if sequence.kind == "transformer" and sequence.head_width % 2:
        yield (
            tuple(("sequence_model", key) for key in ("head_width", "kind")),
            f"sequence_model.head_width = {sequence.head_width} must be even, since rotary "
            "positions turn pairs of channels",
        )


def _conflicting_evaluation(evaluation: EvaluationSettings) -> Iterator[Conflict]:
    if evaluation.enough_same > evaluation.episodes:
        yield (
            (("evaluation", "enough_same"), ("evaluation", "episodes")),
            f"evaluation.enough_same = {evaluation.enough_same} first episodes that are all the "
            f"same cannot be found among evaluation.episodes = {evaluation.episodes}; set it to as "
            "many at most, or to 0 to play all",
        )


def parse_assignment(text: str) -> Layer:
    """Turn `section.key=value` from the command line into a layer.

    Raises:
        ConfigurationError: when there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigurationError(f"--set {text}: expected section.key=value")
    data: dict[str, Any] = {}
    _assign(data, tuple(key.strip().split(".")), parse_yaml(value, f"--set {text}"))
    return Layer("--set", data)


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
    if isinstance(given.get("games"), (list, tuple)):
        listed = data.get("games") if isinstance(data.get("games"), Mapping) else {}
        if len(set(given["games"])) != len(given["games"]):
            raise ConfigurationError(
                f"command line: games = {list(given['games'])!r}: a game is given twice"
            )
        given["games"] = {game: (listed or {}).get(game) or {} for game in given["games"]}
    games = given.get("games", data.get("games"))
    source = {True: "command line", False: str(path)}
    layers = [Layer(str(path), data), Layer("command line", {**given})]
    if isinstance(games, Mapping):  # `Pong:` with nothing behind it is an empty override
        games = {game: {} if value is None else value for game, value in games.items()}
        layers.append(Layer(source["games" in given], {"games": games}))
    elif games is not None:
        raise ConfigurationError(
            f"{source['games' in given]}: games = {games!r}: expected names with their overrides, "
            "such as {Pong: {}, Krull: {}}"
        )
    experiment = resolve(Experiment, layers)
    find_preset(experiment.preset, f"{source['preset' in given]}: preset")
    for game in experiment.games:
        check_game(game, f"{source['games' in given]}: games.{game}")
    if not experiment.games:
        raise ConfigurationError(
            f"{source['games' in given]}: games = {{}}: name at least one game"
        )
    if len(set(experiment.seeds)) != len(experiment.seeds):
        raise ConfigurationError(
            f"{source['seeds' in given]}: seeds = {experiment.seeds}: a seed is given twice"
        )
    return experiment


def _listed(value: Any) -> Any:
    """Split what stands for several games or seeds in one word, such as Pong,Krull or 0,1."""
    if not isinstance(value, (str, int)):
        return value
    words = [word.strip() for word in str(value).split(",")]
    return [int(word) if re.fullmatch("-?[0-9]{1,18}", word) else word for word in words]


def check_game(game: str, where: str) -> None:
    """Check that a game exists: one of the benchmark, of ale-py's others, or Catch.

    Args:
        game: what was written.
        where: where that was, file and key.

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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{path}: no recipe there ({reason(error)}). `drama plan` writes them to "
            "results/<preset>/recipes/<Game>/seed<k>.json"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not a recipe: {reason(error)}") from None
    return parse_recipe(text, str(path)), text


def parse_recipe(text: str, source: str) -> Recipe:
    """Parse a recipe's JSON and check that its settings go together.

    Raises:
        ConfigurationError: naming `source`, when it is not a recipe.
    """
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = "missing" if first["type"] == "missing" else _problem(first)
        raise ConfigurationError(
            f"{source}: not a recipe: {f'{place}: ' if place else ''}{problem}"
        ) from None
    check_game(recipe.game, f"{source}: game = {recipe.game!r}")
    for _, problem in _conflicts(recipe.settings):
        raise ConfigurationError(f"{source}: settings: {problem}")
    return recipe
