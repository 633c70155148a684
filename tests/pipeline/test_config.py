"""Configuration: what is allowed, how layers lie over each other, what an error says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from workspace import Workspace

from drama.agent.settings import Recipe, Settings
from drama.errors import ConfigurationError
from drama.pipeline.config import (
    Preset,
    load_experiment,
    load_preset,
    preset_layers,
    read_recipe_text,
)
from drama.pipeline.layers import Layer, resolve

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "config" / "presets"
EXPERIMENT = "preset: tiny\ngames: {Pong: {}}\nseeds: [0]\ndevice: cpu\nresults: results\n"


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    """A project's folder with presets, the current one."""
    return workspace.root


def written(text: str | bytes) -> Path:
    path = Path("config/written.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load_all(path: Path) -> list[Preset]:
    """Resolve an experiment's games as `plan` does."""
    experiment = load_experiment(path)
    return [
        load_preset(experiment.preset, Layer(str(path), data, prefix=f"games.{game}"))
        for game, data in experiment.games.items()
    ]


# --- errors name the key, the value, the file and what is allowed -------------------------------

GAME = "games.Pong."
WRONG_SETTINGS = [
    # A game's overrides, and what the error must say.
    ("{environment: {actions: 31}}", [GAME + "environment.actions = 31", "minimal, full"]),
    ("{environment: {actions: ful}}", ["= 'ful'", "Did you mean 'full'"]),
    ("{environment: {repeat_action_probability: 1}}", ["repeat_action_probability = 1", "than 1"]),
    ("{environment: {no_op_starts: -1}}", ["no_op_starts = -1", "at least 0"]),
    ("{environment: {no_op_starts: 1.5}}", ["no_op_starts = 1.5", "whole number"]),
    ("{environment: {no_op_starts: 200}}", [GAME + "environment.no_op_starts = 200", "max_frames"]),
    ("{environment: {life_loss_terminates: true}}", ["= True", "learning, nothing, episode"]),
    ("{behaviour: {temperature: 0}}", [GAME + "behaviour.temperature = 0", "at least 0.01"]),
    ("{behaviour: {epsilon: 1.1}}", [GAME + "behaviour.epsilon = 1.1", "at most 1"]),
    ("{behaviour: {as_published: 1}}", ["as_published = 1", "true or false"]),
    ("{world_model: {optimiser: {decay_spares: none}}}", ["= 'none'", "gains_and_dynamics"]),
    ("{behaviour: {horizon: -1}}", [GAME + "behaviour.horizon = -1", "at least 1"]),
    ("{behaviour: {horizon: 1.5}}", [GAME + "behaviour.horizon = 1.5", "whole number"]),
    ("{behaviour: {horizon: three}}", ["= 'three'", "whole number"]),
    ("{behaviour: {horizon: true}}", ["= True", "whole number"]),
    ("{behaviour: {horizon: '5'}}", ["= '5'", "whole number"]),
    ("{behaviour: {horizon: }}", ["= None", "whole number"]),
    ("{behaviour: {horizon: [5]}}", ["= [5]", "whole number"]),
    ("{behaviour: {discount: 1.1}}", ["= 1.1", "at most 1"]),
    ("{behaviour: {discount: .nan}}", ["= nan"]),
    ("{behaviour: {discount: '0.9'}}", ["= '0.9'", "expected a number"]),
    ("{behaviour: {slow_critic_ema: 1}}", ["= 1", "less than 1"]),
    ("{behaviour: {return_percentiles: [0.95, 0.05]}}", ["[0.95, 0.05]", "smaller"]),
    ("{behaviour: {return_percentiles: [0.05]}}", [GAME + "behaviour.return_perc", "too few"]),
    ("{behaviour: {return_percentiles: [0, 0.5, 1]}}", ["at most 2"]),
    ("{world_model: {optimiser: {learning_rate: 0}}}", ["learning_rate = 0", "more than 0"]),
    ("{world_model: {optimiser: {learning_rate: .inf}}}", ["= inf", "finite"]),
    ("{world_model: {optimiser: {weight_decay: -1e-4}}}", ["= -0.0001", "at least 0"]),
    ("{world_model: {channels: 16}}", ["channels = 16", "a list"]),
    ("{world_model: {channels: [4, x, 8]}}", ["channels[1] = 'x'", "whole number"]),
    ("{world_model: {channels: []}}", ["channels = []", "at least 1"]),
    ("{replay: {shuffle_rewards: 1}}", ["shuffle_rewards = 1", "true or false"]),
    ("{replay: {sampling: DFS}}", ["= 'DFS'", "dfs, uniform"]),
    ("{replay: {capacity: 1_000_000_000_000}}", ["capacity = 1000000000000", "at most"]),
    ("{sequence_model: {kind: mamba3}}", ["= 'mamba3'", "Did you mean 'mamba", "gru"]),
    ("{training: {total_steps: 40}}", [GAME + "training.total_steps = 40", "random_steps = 40"]),
    ("{training: {random_steps: 161}}", [GAME + "training.random_steps = 161", "total_steps = 16"]),
    # Keys.
    ("{behaviour: {horizn: 3}}", [GAME + "behaviour.horizn = 3", "Did you mean 'horizon'"]),
    ("{behavior: {horizon: 3}}", [GAME + "behavior = ", "Did you mean 'behaviour'"]),
    ("{behaviour: {lambda_: 0.5}}", ["lambda_ = 0.5", "Did you mean 'lambda'"]),
    ("{behaviour: {no: 1}}", ["behaviour.false = 1", "unknown key"]),
    ("{behaviour: 5}", [GAME + "behaviour = 5", "section", "horizon"]),
    ("{behaviour: [horizon]}", [GAME + "behaviour = ['horizon']", "section"]),
    ("{base: xs}", [GAME + "base = 'xs'", "unknown key"]),
    # What is fine alone, but not together.
    ("{world_model: {sequence_length: 71}}", [GAME + "world_model.sequence_length = 71", "70"]),
    ("{behaviour: {context_length: 71}}", [GAME + "behaviour.context_length = 71", "70"]),
    ("{world_model: {batch_size: 34}}", [GAME + "world_model.batch_size = 34", "41", "40"]),
    ("{behaviour: {contexts: 38}}", [GAME + "behaviour.contexts = 38", "41", "40"]),
    ("{replay: {capacity: 7}}", [GAME + "replay.capacity = 7", "sequence_length = 8"]),
    ("{world_model: {strides: [4, 2]}}", [GAME + "world_model.strides = [4, 2]", "(2)", "(3)"]),
    ("{world_model: {kernel: 4}}", [GAME + "world_model.kernel = 4", "odd"]),
    ("{world_model: {strides: [3, 2, 2]}}", ["strides, 12, must divide", "image_size = 64"]),
    ("{environment: {image_size: 60}}", [GAME + "environment.image_size = 60", "strides, 16"]),
    ("{sequence_model: {head_width: 48}}", [GAME + "sequence_model.head_width = 48", "64"]),
    (
        "{sequence_model: {kind: transformer, width: 9, head_width: 3}}",
        [GAME + "sequence_model.head_width = 3", "even"],
    ),
    ("{sequence_model: {width: 40}}", [GAME + "sequence_model.width = 40", "80"]),
    ("{training: {random_steps: 8}}", [GAME + "training.random_steps = 8", "9 stored"]),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG_SETTINGS, ids=lambda value: str(value)[:50])
def test_a_wrong_setting_is_explained(folder: Path, overrides: str, said: list[str]) -> None:
    path = written(EXPERIMENT.replace("{Pong: {}}", f"{{Pong: {overrides}}}"))
    with pytest.raises(ConfigurationError) as caught:
        load_all(path)
    text = str(caught.value)
    assert all(word in text for word in said), text
    assert text.startswith(f"{path}: games.Pong."), text
    assert "Input should be" not in text and caught.value.exit_code == 2


def test_the_largest_batch_that_fits_is_allowed(folder: Path) -> None:
    path = written(
        EXPERIMENT.replace(
            "{Pong: {}}", "{Pong: {world_model: {batch_size: 33}, behaviour: {contexts: 37}}}"
        )
    )
    assert load_all(path)[0].world_model.batch_size == 33


WRONG_EXPERIMENTS = [
    ("Pong", "Pnog", ["games.Pnog", "unknown game. Did you mean 'Pong'? `drama games` lists"]),
    ("Pong", "pong", ["games.pong", "Did you mean 'Pong'"]),
    ("Pong", "Spaceinvaders", ["games.Spaceinvaders", "Did you mean 'SpaceInvaders'"]),
    ("Pong", "ALE/Pong-v5", ["games.ALE/Pong-v5", "unknown game"]),
    ("{Pong: {}}", "[Pong, Krull]", ["games = ['Pong', 'Krull']", "{Pong: {}, Krull: {}}"]),
    ("{Pong: {}}", "Pong", ["games = 'Pong'", "{Pong: {}, Krull: {}}"]),
    ("{Pong: {}}", "{}", ["games = {}", "at least one"]),
    ("{Pong: {}}", "", ["games = None", "keys and values"]),
    ("games: {Pong: {}}\n", "", ["games: missing"]),
    ("{Pong: {}}", "{Pong: 5}", ["games.Pong = 5", "keys and values"]),
    ("{Pong: {}}", "{Pong: 0}", ["games.Pong = 0", "keys and values"]),
    ("{Pong: {}}", "{Pong: no}", ["games.Pong = False", "keys and values"]),
    ("{Pong: {}}", "{Pong: []}", ["games.Pong = []", "keys and values"]),
    ("{Pong: {}}", "{no: {}}", ["games.false", "unknown game"]),
    ("[0]", "0", ["seeds = 0", "a list"]),
    ("[0]", "[-1]", ["seeds[0] = -1", "at least 0"]),
    ("[0]", "[0, 4294967296]", ["seeds[1] = 4294967296", "less than 2147483648"]),
    ("[0]", "[1, 1]", ["seeds = [1, 1]", "twice"]),
    ("[0]", "[]", ["seeds = []", "at least 1"]),
    ("[0]", "[yes]", ["seeds[0] = True", "whole number"]),
    ("[0]", "[010]", ["seeds[0] = '010'", "whole number"]),
    ("cpu", "gpu", ["device = 'gpu'", "Did you mean 'cpu'", "auto, cpu, cuda"]),
    ("results: results", "results: a\nbackend: triton", ["backend = 'triton'", "auto, torch"]),
    ("cpu", "no", ["device = False", "auto, cpu, cuda"]),
    ("tiny", "tyni", ["preset = 'tyni'", "Did you mean 'tiny'", "quick", "config/presets"]),
    ("tiny", "5", ["preset = 5", "a word"]),
    ("tiny", "../xs", ["preset = '../xs'", "no such preset"]),
    ("seeds", "sedes", ["sedes = [0]", "Did you mean 'seeds'"]),
    ("results: results", "results: ''", ["results = ''", "name a folder"]),
    ("results: results", "results: ' '", ["results = ' '", "name a folder"]),
    ("results: results", 'results: "a\\0b"', ["results = 'a\\x00b'", "name a folder"]),
    ("results: results", "results: ~/a", ["results = '~/a'", "~ is not understood"]),
    ("results: results", "results: config/config.yaml", ["config/config.yaml is a file"]),
    ("results: results", "results: config/config.yaml/a", ["config/config.yaml is a file"]),
    ("results: results", "results: a\nruns_per_gpu: 101", ["runs_per_gpu = 101", "at most 100"]),
    ("results: results", "results: [a]", ["results = ['a']", "a word"]),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG_EXPERIMENTS, ids=lambda v: str(v)[:40])
def test_a_wrong_experiment_is_explained(folder: Path, old: str, new: str, said: list[str]) -> None:
    assert old in EXPERIMENT
    path = written(EXPERIMENT.replace(old, new))
    with pytest.raises(ConfigurationError) as caught:
        load_all(path)
    assert all(word in str(caught.value) for word in [str(path), *said]), str(caught.value)


def test_results_can_lie_anywhere(folder: Path) -> None:
    path = written(EXPERIMENT.replace("results: results", f"results: {folder}/new/folder"))
    assert load_experiment(path).results == f"{folder}/new/folder"


def test_any_game_that_ale_py_knows_can_be_named(folder: Path) -> None:
    path = written(EXPERIMENT.replace("{Pong: {}}", "{Pong: {}, SpaceInvaders: {}}"))
    assert list(load_experiment(path).games) == ["Pong", "SpaceInvaders"]


def test_the_26_games_are_planned_without_loading_an_emulator() -> None:
    program = (
        "import sys; from pathlib import Path; from drama.pipeline.recipes import plan;"
        "from drama.agent.settings import ATARI_100K;"
        "asked = {'games': list(ATARI_100K), 'seeds': [0, 1, 2, 3, 4], 'results': 'build/none'};"
        "assert len(plan(Path('config/config.yaml'), asked, write=False).runs) == 130;"
        "assert not {'ale_py', 'cv2', 'gymnasium', 'torch'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_game_with_nothing_behind_it_is_played_as_the_preset_says(folder: Path) -> None:
    path = written(EXPERIMENT.replace("games: {Pong: {}}", "games:\n  Pong:\n  Krull: {}"))
    assert load_experiment(path).games == {"Pong": {}, "Krull": {}}


def test_what_is_no_text_or_no_mapping_is_explained(folder: Path) -> None:
    for content, said in ((b"preset: \xff", "UTF-8"), (b"- a\n", "['a']"), (b"", "nothing")):
        with pytest.raises(ConfigurationError, match=r"config/written\.yaml") as caught:
            load_experiment(written(content))
        assert said in str(caught.value)
    for missing in (Path("config/nowhere.yaml"), Path("config")):
        with pytest.raises(ConfigurationError, match=f"{missing}: cannot be read"):
            load_experiment(missing)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"games": ["Pong", "Krul"]}, "command line: games.Krul: .*'Krull'"),
        ({"seeds": [1, 1]}, "command line: seeds = .*twice"),
        ({"sedes": [1]}, "command line: sedes = .*'seeds'"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_not_blamed_on_the_file(
    folder: Path, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_experiment(written(EXPERIMENT), overrides)


def test_games_from_the_command_line_keep_the_overrides_of_the_file(folder: Path) -> None:
    path = written(EXPERIMENT.replace("{Pong: {}}", "{Pong: {replay: {alpha: 2}}, Krull: {}}"))
    games = load_experiment(path, {"games": ["Boxing", "Pong"], "seeds": None}).games
    assert games == {"Boxing": {}, "Pong": {"replay": {"alpha": 2}}}


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        key = field.alias or name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("path", list(leaves(Settings)), ids=".".join)
def test_every_setting_is_typed_required_and_known_by_name(
    path: tuple[str, ...], preset: Callable[..., Preset]
) -> None:
    *sections, key = path

    def layer(name: str, value: object) -> dict[str, Any]:
        data: dict[str, Any] = {name: value}
        for section in reversed(sections):
            data = {section: data}
        return data

    where = ".".join(path)
    with pytest.raises(ConfigurationError, match=rf"test: {where} = \{{'a': 1\}}: "):
        preset("quick", layer(key, {"a": 1}))
    with pytest.raises(ConfigurationError, match=rf"test: {where}x = 1: .*Did you mean '{key}'"):
        preset("quick", layer(f"{key}x", 1))
    base = preset_layers("xs", PRESETS)[0]
    data: Any = base.data
    for section in sections:
        data = data[section]
    del data[key]
    with pytest.raises(ConfigurationError, match=f"{where}: missing"):
        resolve(Preset, [base])


# --- recipes -------------------------------------------------------------------------------------


def test_a_recipe_is_checked_like_configuration(tmp_path: Path) -> None:
    settings = load_preset("quick", folder=PRESETS).settings()
    recipe = Recipe(
        format=1,
        preset="quick",
        game="Pong",
        seed=0,
        settings=settings,
        code="c" * 64,
        runtime="d" * 64,
    )
    path = tmp_path / "seed0.json"
    text = recipe.model_dump_json(by_alias=True)
    path.write_text(text)
    assert read_recipe_text(path) == (recipe, text)
    path.write_text(text.replace('"Pong"', '"SpaceInvaders"'))
    assert read_recipe_text(path)[0].game == "SpaceInvaders"
    assert "ancestor" not in text, "a run that begins at step 0 has the recipe it always had"
    last = f'"runtime":"{"d" * 64}"'
    longer = text.replace(last, f'{last},"ancestor":"{"a" * 64}"')
    path.write_text(longer)
    assert read_recipe_text(path)[0] == recipe.model_copy(update={"ancestor": "a" * 64})
    assert read_recipe_text(path)[0].model_dump_json(by_alias=True) == longer
    for old, new, said in (
        ('"Pong"', '"Pnog"', "game = 'Pnog': unknown game. Did you mean 'Pong'"),
        ('"seed":0', '"seed":-1', "seed: must be at least 0"),
        ('"horizon":5', '"horizon":5.5', "settings.behaviour.horizon: expected a whole number"),
        ('"horizon":5', '"horizont":5', "settings.behaviour.horizon"),
        ('"strides":[4,2,2]', '"strides":[4,2]', "as many world_model.strides (2) as"),
        ('"format":1', '"format":2', "format: "),
        (last, f'{last},"ancestor":"a/../b"', "ancestor: "),
        ('"preset":"quick"', '"preset":"../../quick"', "preset: "),
        ('"code":"c', '"code":"$(c', "code: "),
        ('"seed":0', f'"seed":{2**31}', "seed: must be less than"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigurationError, match=str(path)) as caught:
            read_recipe_text(path)
        assert said in str(caught.value)
