"""Presets: those that ship, what they start from, a folder's own beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from drama.agent.settings import ATARI_100K
from drama.errors import ConfigurationError
from drama.pipeline.config import Preset, load_preset, preset_files, preset_layers
from drama.pipeline.layers import Layer, resolve

PRESETS = Path(__file__).resolve().parents[2] / "config" / "presets"


@pytest.mark.parametrize("name", preset_files(PRESETS))
def test_every_preset_loads_and_is_frozen(name: str) -> None:
    preset = load_preset(name, folder=PRESETS)
    with pytest.raises(ValidationError):
        preset.training.total_steps = 1  # type: ignore[misc]
    assert preset.complete_protocol == (name.split("-")[0] in ("xs", "s"))


def test_size_xs_has_the_published_values() -> None:
    xs = load_preset("xs", folder=PRESETS)
    game, replay, model = xs.environment, xs.replay, xs.world_model
    assert (game.action_repeat, game.image_size, game.max_frames) == (4, 64, 108_000)
    assert (game.actions, replay.sampling) == ("minimal", "dfs")
    assert (game.repeat_action_probability, game.no_op_starts) == (0, 0)
    assert game.life_loss_terminates == "learning"
    assert (replay.world_model_temperature, replay.imagination_temperature) == (10, 10)
    assert (replay.alpha, replay.beta, replay.capacity) == (1, 1, 100_000)
    assert (model.channels, model.strides) == ((16, 32, 48, 64, 64), (1, 2, 2, 2, 2))
    assert (model.categoricals, model.classes, model.uniform_mix) == (32, 32, 0.01)
    assert (model.batch_size, model.sequence_length, model.free_nats) == (16, 128, 1)
    assert (model.dynamics_weight, model.representation_weight) == (1, 0.1)
    assert (model.bins, model.bin_limit, model.head_hidden) == (255, 20, 256)
    sequence, behaviour = xs.sequence_model, xs.behaviour
    assert (sequence.kind, sequence.width, sequence.blocks, sequence.dropout) == (
        "mamba2", 512, 2, 0.1,
    )  # fmt: skip
    assert (sequence.state_size, sequence.convolution_width) == (16, 4)
    assert (sequence.expand, sequence.head_width) == (2, 64)
    assert (behaviour.contexts, behaviour.context_length, behaviour.horizon) == (1024, 8, 16)
    assert (behaviour.discount, behaviour.lambda_, behaviour.entropy_weight) == (0.985, 0.95, 3e-4)
    assert (behaviour.actor_hidden, behaviour.critic_hidden, behaviour.layers) == (256, 512, 3)
    assert (behaviour.return_percentiles, behaviour.return_ema) == ((0.05, 0.95), 0.99)
    assert (behaviour.slow_critic_ema, behaviour.act_on, behaviour.acting_window) == (
        0.98, "prior", 16,
    )  # fmt: skip
    assert (behaviour.temperature, behaviour.epsilon, behaviour.as_published) == (1, 0, False)
    for optimiser, clip, decay in ((model.optimiser, 1000, 1e-4), (behaviour.optimiser, 100, 0)):
        assert optimiser.decay_spares == "nothing"
        assert (optimiser.learning_rate, optimiser.warmup_updates) == (4e-5, 1000)
        assert (optimiser.beta1, optimiser.beta2, optimiser.epsilon) == (0.9, 0.999, 1e-20)
        assert (optimiser.clip_norm, optimiser.weight_decay) == (clip, decay)
    training = xs.training
    assert (training.total_steps, training.random_steps) == (100_000, 1032)
    assert (training.world_model_every, training.behaviour_every) == (1, 1)
    assert (xs.evaluation.episodes, len(ATARI_100K)) == (100, 26)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("xs-as-published", ("behaviour", "as_published"), True),
        ("xs-exempt-decay", ("world_model", "optimiser", "decay_spares"), "gains_and_dynamics"),
    ],
)
def test_an_ablation_changes_one_thing(name: str, keys: tuple[str, ...], value: object) -> None:
    expected: Any = load_preset("xs", folder=PRESETS).model_dump()
    *sections, key = keys
    section = expected
    for step in sections:
        section = section[step]
    assert section[key] != value
    section[key] = value
    assert load_preset(name, folder=PRESETS).model_dump() == expected


def test_size_s_doubles_the_channels_and_nothing_else() -> None:
    xs, s = (load_preset(name, folder=PRESETS) for name in ("xs", "s"))
    doubled = tuple(2 * channels for channels in xs.world_model.channels)
    model = xs.world_model.model_copy(update={"channels": doubled})
    assert s == xs.model_copy(update={"world_model": model})


def test_later_layers_win_key_by_key() -> None:
    layers = [
        *preset_layers("quick", PRESETS),
        Layer("a", {"behaviour": {"horizon": 7, "lambda": 0.5}}),
        Layer("b", {"behaviour": {"horizon": 9}}),
    ]
    behaviour = resolve(Preset, layers).behaviour
    assert (behaviour.horizon, behaviour.lambda_, behaviour.context_length) == (9, 0.5, 4)


def test_presets_that_start_from_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: two\n")
    (tmp_path / "two.yaml").write_text("base: one\n")
    with pytest.raises(ConfigurationError, match=r"two\.yaml: base.*one -> two -> one"):
        preset_layers("one", tmp_path)


@pytest.mark.parametrize("base", ["quikc", "5", "[quick]", "{}"])
def test_a_preset_that_starts_from_nothing_is_refused(tmp_path: Path, base: str) -> None:
    (tmp_path / "quick.yaml").write_text("{}\n")
    (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigurationError, match=r"mine\.yaml: base = .*no such preset.*quick"):
        preset_layers("mine", tmp_path)


def test_a_folders_own_presets_stand_beside_the_packages_and_before_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: quick\n")
    mine = load_preset("mine", folder=tmp_path)
    assert mine == load_preset("quick", folder=PRESETS)
    (tmp_path / "quick.yaml").write_text("base: xs\n")
    mine = load_preset("mine", folder=tmp_path)
    assert mine == load_preset("xs", folder=PRESETS)
