"""Typed configuration: what a run is made of, checked before anything is written.

A run's settings are layered: a preset (config/presets/<name>.yaml, which may name the preset it
starts from under `base`), a game's own overrides, overrides from the command line. Every layer
remembers the file it came from, so that an error can name the key, the value, the file and what
would have been allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import ErrorDetails

ATARI_100K = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout",
    "ChopperCommand", "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero",
    "Jamesbond", "Kangaroo", "Krull", "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert",
    "RoadRunner", "Seaquest", "UpNDown",
)  # fmt: skip
"""The 26 games of the Atari100k benchmark (Kaiser et al. 2020), by their ALE names."""

CATCH = ("Catch8", "Catch16")
"""The project's own small games, for checking that the agent learns (drama/env/catch.py)."""

GAMES = ATARI_100K + CATCH

PRESETS = Path("config/presets")
"""Where presets lie, relative to the project's root."""


class DramaError(Exception):
    """An error for people: its text is the whole message.

    Attributes:
        exit_code: what the command exits with.
    """

    exit_code = 1


class ConfigurationError(DramaError):
    """A mistake in the configuration or on the command line."""

    exit_code = 2


class Frozen(BaseModel):
    """Base of all settings: immutable, strictly typed, no unknown keys, no hidden defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Widths = Annotated[tuple[Size, ...], Field(min_length=1)]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError("the first of the two must be the smaller one")
    return value


class EnvironmentSettings(Frozen):
    """How a game is played (Atari100k protocol)."""

    action_repeat: Annotated[int, Field(ge=1, le=64)]
    image_size: Annotated[int, Field(ge=8, le=256)]
    max_frames: Count
    actions: Literal["minimal", "full"]


class ReplaySettings(Frozen):
    """Replay memory and the distribution its windows are drawn from (DFS, section 2.3)."""

    sampling: Literal["dfs", "uniform"]
    capacity: Count
    world_model_temperature: Positive
    imagination_temperature: Positive
    alpha: NonNegative
    beta: NonNegative
    shuffle_rewards: bool


class OptimiserSettings(Frozen):
    """LaProp (Ziyin et al. 2020) with linear warm-up and gradient clipping."""

    learning_rate: Positive
    warmup_updates: Annotated[int, Field(ge=0)]
    clip_norm: Positive
    weight_decay: Rate
    beta1: Rate
    beta2: Rate
    epsilon: Positive


class SequenceModelSettings(Frozen):
    """The sequence model f, which turns latents and actions into deterministic states d."""

    kind: Literal["mamba2", "mamba", "transformer", "gru", "rwkv"]
    width: Size
    blocks: Annotated[int, Field(ge=1, le=64)]
    dropout: Rate
    state_size: Size
    convolution_width: Annotated[int, Field(ge=2, le=4)]
    expand: Annotated[int, Field(ge=1, le=8)]
    head_width: Size
    chunk_length: Size


class WorldModelSettings(Frozen):
    """Encoder, decoder, latent and heads of the world model, and how it is trained."""

    channels: Widths
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=4)], ...], Field(min_length=1)]
    categoricals: Size
    classes: Annotated[int, Field(ge=2, le=65_536)]
    uniform_mix: Rate
    head_hidden: Size
    bins: Annotated[int, Field(ge=3, le=65_535)]
    bin_limit: Positive
    free_nats: NonNegative
    dynamics_weight: NonNegative
    representation_weight: NonNegative
    batch_size: Count
    sequence_length: Annotated[int, Field(ge=2, le=1_000_000)]
    optimiser: OptimiserSettings


class BehaviourSettings(Frozen):
    """Actor, critic and the imagination they learn from."""

    actor_hidden: Size
    critic_hidden: Size
    layers: Annotated[int, Field(ge=1, le=16)]
    contexts: Count
    context_length: Count
    horizon: Count
    discount: Fraction
    lambda_: Annotated[float, Field(ge=0, le=1, alias="lambda")]
    entropy_weight: NonNegative
    return_percentiles: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
    return_ema: Rate
    slow_critic_ema: Rate
    act_on: Literal["prior", "posterior"]
    acting_window: Count
    optimiser: OptimiserSettings


class TrainingSettings(Frozen):
    """The schedule: how long, how much random play first, how often each part is updated."""

    total_steps: Count
    random_steps: Count
    world_model_every: Count
    behaviour_every: Count
    log_every: Count
    precision: Literal["auto", "float32", "bfloat16"]


class Settings(Frozen):
    """Everything, besides game and seed, that defines a run's result."""

    environment: EnvironmentSettings
    replay: ReplaySettings
    world_model: WorldModelSettings
    sequence_model: SequenceModelSettings
    behaviour: BehaviourSettings
    training: TrainingSettings


class Recipe(Frozen):
    """Everything that defines one run's result; its file's SHA-256 is the run's fingerprint.

    Attributes:
        format: version of this file's layout.
        preset: name of the preset it came from.
        game: name of the game.
        seed: the run's seed.
        settings: every hyperparameter.
        code: hash of the run-defining code.
        runtime: hash of the lock file that pins what the code runs on.
    """

    format: Literal[1]
    preset: str
    game: str
    seed: Annotated[int, Field(ge=0)]
    settings: Settings
    code: str
    runtime: str


class EvaluationSettings(Frozen):
    """How a finished run is scored."""

    episodes: Count
    environments: Count


class Preset(Settings):
    """A preset's file: a run's settings, its evaluation and what it may be called."""

    evaluation: EvaluationSettings
    complete_protocol: bool

    def settings(self) -> Settings:
        """Return the part that defines a run's result."""
        return Settings.model_validate(
            {name: getattr(self, name) for name in Settings.model_fields}
        )


class Experiment(Frozen):
    """What to run: config/config.yaml."""

    preset: str
    games: dict[str, dict[str, Any]]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    device: Literal["auto", "cpu", "cuda"]
    results: str


# --- reading files -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose floats include 1e-4, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigurationError: naming `source` and the line, when the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{source}: not valid YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigurationError: when the file is missing or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected keys and values, found {type(data).__name__}")
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
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(words)}"


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
    if details["type"] == "missing":
        sources = ", ".join(dict.fromkeys(layer.source for layer in layers))
        return f"{sources}: {'.'.join(location)}: missing; give it a value"
    # The location of an item inside a list is longer than the key that holds the list.
    lengths = range(len(location), 0, -1)
    path = next((location[:n] for n in lengths if location[:n] in origin), location)
    layer = origin.get(path, layers[-1])
    item = "".join(f"[{part}]" for part in location[len(path) :])
    message = details["msg"].removeprefix("Value error, ")
    allowed = details.get("ctx", {}).get("expected")
    if allowed is not None:
        choices = re.findall(r"'([^']*)'", str(allowed))
        message = nearest(str(details["input"]), choices)
    return f"{_where(layer, path)}{item} = {details['input']!r}: {message}"


# --- presets and experiments ---------------------------------------------------------------------


def preset_names(folder: Path = PRESETS) -> list[str]:
    """Return the names of the presets in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def preset_layers(name: str, folder: Path = PRESETS) -> list[Layer]:
    """Return a preset's layers: the presets it starts from first, its own file last.

    Raises:
        ConfigurationError: for a name without a file, or presets that start from each other.
    """
    layers: list[Layer] = []
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current in seen:
            raise ConfigurationError(f"presets start from each other: {' -> '.join(seen)}")
        if current not in preset_names(folder):
            raise ConfigurationError(
                f"{folder}: preset {current!r} does not exist. "
                f"{nearest(current, preset_names(folder))}"
            )
        seen.append(current)
        path = folder / f"{current}.yaml"
        data = read_mapping(path)
        current = data.pop("base", None)
        layers.insert(0, Layer(str(path), data))
    return layers


def load_preset(name: str, *overrides: Layer, folder: Path = PRESETS) -> Preset:
    """Resolve a preset with further layers over it.

    Raises:
        ConfigurationError: for anything unknown, mistyped, out of range or inconsistent.
    """
    layers = [*preset_layers(name, folder), *overrides]
    preset = resolve(Preset, layers)
    for path, problem in _conflicts(preset):
        layer, value = _last(layers, path)
        raise ConfigurationError(f"{_where(layer, path)} = {value!r}: {problem}")
    return preset


def _last(layers: list[Layer], path: tuple[str, ...]) -> tuple[Layer, Any]:
    """Return the layer that had the last word on a key, and that word."""
    for layer in reversed(layers):
        value: Any = layer.data
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return layer, value
    raise KeyError(path)


def _conflicts(settings: Preset) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield settings that are fine alone but not together, with the key to change."""
    model, sequence = settings.world_model, settings.sequence_model
    behaviour, training = settings.behaviour, settings.training
    capacity, image = settings.replay.capacity, settings.environment.image_size
    if len(model.strides) != len(model.channels):
        yield (
            ("world_model", "strides"),
            f"as many strides as channels are needed ({len(model.channels)})",
        )
    shrink = 1
    for stride in model.strides:
        shrink *= stride
    if image % shrink:
        yield (
            ("world_model", "strides"),
            f"their product {shrink} must divide environment.image_size = {image}",
        )
    inner = sequence.expand * sequence.width
    if sequence.kind == "mamba2" and inner % sequence.head_width:
        yield (
            ("sequence_model", "head_width"),
            f"must divide expand * width = {inner}",
        )
    if sequence.kind in ("transformer", "rwkv") and sequence.width % sequence.head_width:
        yield (
            ("sequence_model", "head_width"),
            f"must divide width = {sequence.width}",
        )
    for path, length in (
        (("world_model", "sequence_length"), model.sequence_length),
        (("behaviour", "context_length"), behaviour.context_length),
    ):
        if length > capacity:
            yield path, f"a sequence cannot be longer than the buffer, replay.capacity = {capacity}"
    for path, batch, length in (
        (("world_model", "batch_size"), model.batch_size, model.sequence_length),
        (("behaviour", "contexts"), behaviour.contexts, behaviour.context_length),
    ):
        stored = min(capacity, training.random_steps)
        if batch + length - 1 > stored:
            yield (
                path,
                f"that many different windows of {length} steps need {batch + length - 1} stored "
                f"transitions, but the first update comes after {stored} "
                "(the smaller of training.random_steps and replay.capacity)",
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
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if isinstance(given.get("games"), (list, tuple)):
        listed = data.get("games") if isinstance(data.get("games"), Mapping) else {}
        given["games"] = {game: (listed or {}).get(game) or {} for game in given["games"]}
    games = given.get("games", data.get("games"))
    if isinstance(games, Mapping):  # `Pong:` with nothing behind it is an empty override
        games = {game: value or {} for game, value in games.items()}
    source = {True: "command line", False: str(path)}
    layers = [Layer(str(path), data), Layer("command line", {**given})]
    layers.append(Layer(source["games" in given], {"games": games}))
    experiment = resolve(Experiment, layers)
    for game in experiment.games:
        if game not in GAMES:
            raise ConfigurationError(
                f"{source['games' in given]}: games.{game}: unknown game. {nearest(game, GAMES)}"
            )
    if not experiment.games:
        raise ConfigurationError(
            f"{source['games' in given]}: games = {{}}: name at least one game"
        )
    if len(set(experiment.seeds)) != len(experiment.seeds):
        raise ConfigurationError(
            f"{source['seeds' in given]}: seeds = {experiment.seeds}: a seed is given twice"
        )
    return experiment


def read_recipe_text(path: Path) -> tuple[Recipe, str]:
    """Read a recipe and its file's text.

    Raises:
        ConfigurationError: when the file is missing or is not a recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{path}: no recipe there ({error.strerror}). `drama plan` writes them to "
            "results/<preset>/recipes/<Game>/seed<k>.json"
        ) from None
    try:
        return Recipe.model_validate_json(text), text
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigurationError(f"{path}: not a recipe: {place}: {first['msg']}") from None
