"""What the training loop stores, sees, does and learns, held against a game played anew.

Each test fails with one mistake in the loop that a loss curve would not show: a frame stored one
step late, a window kept over an episode's end, a greedy policy, an update that never comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from workspace import PRESET, SEED

from drama.agent.env import make
from drama.agent.replay.tensors import RingTensors
from drama.agent.settings import Recipe
from drama.agent.training import resumable
from drama.agent.training.loop import Trainer
from drama.agent.training.runtime import Runtime
from drama.pipeline.config import Preset
from drama.runs.columns import Columns
from drama.runs.folder import REPLAY
from drama.runs.progress import Reporter, Status
from drama.runs.shards import read_shards
from drama.runs.stopping import Stopped

STEPS, RANDOM, WORLD_MODEL_EVERY, BEHAVIOUR_EVERY = 130, 40, 3, 5
CONTEXTS, CONTEXT_LENGTH = 6, 5
ON_CPU = Runtime(torch.device("cpu"), threads=1, checkpoint_every=10_000)
TRAINING = {
    "total_steps": STEPS, "random_steps": RANDOM, "log_every": 15,
    "world_model_every": WORLD_MODEL_EVERY, "behaviour_every": BEHAVIOUR_EVERY,
}  # fmt: skip
# Games whose episodes end in each way: cut off, with a life (where the seed matters), over.
GAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "cut": ("Breakout", {}),
    "lives": (
        "Breakout",
        {
            "repeat_action_probability": 0.25,
            "no_op_starts": 30,
            "life_loss_terminates": "episode",
        },
    ),
    "over": ("Catch8", {}),
}


@dataclass
class Decision:
    """What one action was chosen from, and what the policy would have done."""

    frame: np.ndarray
    latents: np.ndarray  # [steps in the window, K]
    actions: np.ndarray  # [steps in the window]
    length: int
    sampled: int
    encoded: np.ndarray  # [K]


@dataclass
class Run:
    """A whole run of toy size, and what was seen of it on the way."""

    trainer: Trainer
    stored: Columns
    decisions: list[Decision] = field(default_factory=list)
    # By step: the rows that an update was given.
    world_model_rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    behaviour_rows: dict[int, Tensor] = field(default_factory=dict)
    updates: list[tuple[int, str]] = field(default_factory=list)  # in their order
    slow_critics: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = field(
        default_factory=list
    )


MakeTrainer = Callable[..., tuple[Trainer, Reporter]]


@pytest.fixture(scope="module")
def make_trainer(
    preset: Callable[..., Preset], tmp_path_factory: pytest.TempPathFactory
) -> MakeTrainer:
    """A trainer of toy size, by the name of its case."""

    def made(case: str) -> tuple[Trainer, Reporter]:
        game, environment = GAMES[case]
        toy = yaml.safe_load(PRESET)
        toy["environment"] |= environment
        toy["behaviour"] |= {"contexts": CONTEXTS, "context_length": CONTEXT_LENGTH}
        toy["training"] = TRAINING
        settings = preset(toy.pop("base"), toy).settings()
        recipe = Recipe(
            format=1, preset="tiny", game=game, seed=SEED, settings=settings, code="", runtime=""
        )
        folder: Path = tmp_path_factory.mktemp(case)
        status = folder / "status.json"
        reporter = Reporter(case, Status.resumed(status, "f" * 64, STEPS), status)
        return Trainer(recipe, "f" * 64, folder, ON_CPU), reporter

    return made


@pytest.fixture(scope="module", params=GAMES)
def run(make_trainer: MakeTrainer, request: pytest.FixtureRequest) -> Run:
    torch.set_num_threads(1)
    trainer, reporter = make_trainer(request.param)
    run = Run(trainer, {})
    watch(run)
    trainer.run(reporter, lambda: False)
    trainer.environment.close()
    run.stored = read_shards(trainer.folder / REPLAY, 0, STEPS)
    return run


def watch(run: Run) -> None:
    """Look on at every decision and update of a run; changes nothing about them."""
    trainer, behaviour = run.trainer, run.trainer.agent.behaviour
    decide, update = trainer.decide, trainer.update_behaviour
    update_world_model = trainer.update_world_model

    def deciding(
        frames: Tensor, latents: Tensor, actions: Tensor, lengths: Tensor, *noise: Tensor
    ) -> Tensor:
        given = [tensor[0].numpy().copy() for tensor in (frames, latents, actions)]
        decided = decide(frames, latents, actions, lengths, *noise)
        chosen = decided[0].numpy()
        run.decisions.append(Decision(*given, int(lengths[0]), int(chosen[1]), chosen[2:]))
        return decided

    def weights(module: torch.nn.Module) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in module.parameters()]

    def updating(rows: Tensor) -> Tensor:
        run.behaviour_rows[trainer.step] = rows
        run.updates.append((trainer.step, "behaviour"))
        before = weights(behaviour.slow_critic)
        values = update(rows)
        run.slow_critics.append((before, weights(behaviour.slow_critic), weights(behaviour.critic)))
        return values

    def updating_world_model(rows: Tensor, reward_rows: Tensor) -> Tensor:
        run.world_model_rows[trainer.step] = rows, reward_rows
        run.updates.append((trainer.step, "world model"))
        return update_world_model(rows, reward_rows)

    trainer.decide, trainer.update_behaviour = deciding, updating
    trainer.update_world_model = updating_world_model


def first_steps(stored: Columns) -> np.ndarray:
    """The step at which the episode of each step began."""
    begins = np.flatnonzero(np.diff(stored["episode"], prepend=-1))
    return np.repeat(begins, np.diff(begins, append=STEPS))


def test_stored_actions_played_anew_give_what_was_stored(run: Run) -> None:
    """In a fresh environment, across the ends of episodes: every frame, reward and flag."""
    recipe, stored = run.trainer.recipe, run.stored
    lives_end = recipe.settings.environment.life_loss_terminates == "episode"
    seeds = np.random.SeedSequence(recipe.seed).spawn(4)
    environment = make(recipe.game, recipe.settings.environment)
    frame, _ = environment.reset(seed=int(seeds[0].generate_state(1)[0]))
    episode = 0
    for step in range(STEPS):
        assert np.array_equal(stored["frame"][step], frame), f"frame of step {step}"
        frame, *outcome, info = environment.step(int(stored["action"][step]))
        played = [*outcome, info["life_lost"], episode]
        names = ("reward", "terminated", "truncated", "life_lost", "episode")
        assert [stored[name][step] for name in names] == played, f"step {step}"
        if outcome[1] or outcome[2] or (lives_end and info["life_lost"]):
            frame, _ = environment.reset()
            episode += 1
    environment.close()
    assert episode >= 2 and np.ptp(stored["frame"], axis=0).any()


def test_the_agent_decides_on_this_episode_alone(run: Run) -> None:
    """On the frame that is stored, and on what it saw and did in the last steps of the episode."""
    remembered = run.trainer.settings.behaviour.acting_window
    assert len(run.decisions) == STEPS
    for step, first in enumerate(first_steps(run.stored)):
        decision = run.decisions[step]
        assert np.array_equal(decision.frame, run.stored["frame"][step])
        past = np.arange(max(first, step - remembered), step)
        assert decision.length == max(1, len(past)), f"at step {step}"
        assert np.array_equal(decision.actions[: len(past)], run.stored["action"][past])
        for place, earlier in enumerate(past):
            assert np.array_equal(decision.latents[place], run.decisions[earlier].encoded)


def test_actions_are_random_at_first_and_then_the_policys(run: Run) -> None:
    """An episode's first action is random, too; the random ones come from their own generator."""
    generator = np.random.default_rng(np.random.SeedSequence(SEED).spawn(4)[2])
    drawn = np.array([generator.integers(run.trainer.agent.actions) for _ in range(STEPS)])
    steps = np.arange(STEPS)
    random = (steps < RANDOM) | (first_steps(run.stored) == steps)
    sampled = np.array([decision.sampled for decision in run.decisions])
    assert random[RANDOM:].any() and not random.all()
    assert run.stored["action"].tolist() == np.where(random, drawn, sampled).tolist()


def test_updates_come_as_often_as_the_settings_say(run: Run) -> None:
    learner = run.trainer.learner
    for steps, every, optimiser in (
        (run.world_model_rows, WORLD_MODEL_EVERY, learner.world_model_optimiser),
        (run.behaviour_rows, BEHAVIOUR_EVERY, learner.behaviour_optimiser),
    ):
        assert list(steps) == [step for step in range(RANDOM, STEPS + 1) if step % every == 0]
        assert int(optimiser.updates) == len(steps)


def test_behaviour_is_learned_in_the_world_model_of_the_same_step(run: Run) -> None:
    both = [step for step in run.behaviour_rows if step in run.world_model_rows]
    assert both
    for step in both:
        assert run.updates.index((step, "world model")) < run.updates.index((step, "behaviour"))


def test_updates_are_given_windows_of_what_was_stored(run: Run) -> None:
    """As many and as long as the settings say; rewards are those of the same steps."""
    world_model, sampler = run.trainer.settings.world_model, run.trainer.sampler
    shapes = world_model.batch_size, world_model.sequence_length
    for step, (rows, reward_rows) in run.world_model_rows.items():
        assert rows.shape == shapes and torch.equal(rows, reward_rows)
        assert_consecutive(run, step, rows)
    for step, rows in run.behaviour_rows.items():
        assert rows.shape == (CONTEXTS, CONTEXT_LENGTH)
        assert_consecutive(run, step, rows)
    assert CONTEXTS / sampler.distribution.imagination_ratio == world_model.batch_size, (
        "an update of the behaviour must count as much as one of the world model"
    )


def assert_consecutive(run: Run, step: int, rows: Tensor) -> None:
    """The rows hold consecutive steps among those that were stored when `step` were done."""
    capacity = run.trainer.buffer.capacity
    age = (step - 1 - rows) % capacity
    assert (age < step).all() and (age.diff(dim=1) == -1).all()


def test_each_behaviour_update_moves_the_slow_critic_once(run: Run) -> None:
    decay = run.trainer.settings.behaviour.slow_critic_ema
    moved = 0
    for before, after, critic in run.slow_critics:
        for old, new, fast in zip(before, after, critic, strict=True):
            torch.testing.assert_close(new, decay * old + (1 - decay) * fast)
            moved += not torch.equal(new, old)
    assert moved > len(run.slow_critics)


def test_while_training_actions_are_drawn_from_the_policy(make_trainer: MakeTrainer) -> None:
    """A policy that wants 60, 30 and 10 % gets them, but for the first steps, one in 15."""
    trainer, reporter = make_trainer("over")
    last = trainer.agent.behaviour.actor.net[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.6, 0.3, 0.1]).log()
    trainer.step, played = RANDOM, []  # nothing is learned here
    for _ in range(450):
        trainer.act_and_store(reporter)
        played.append(trainer.buffer.columns(trainer.buffer.total - 1, trainer.buffer.total))
    trainer.environment.close()
    shares = np.bincount([int(row["action"][0]) for row in played], minlength=3) / len(played)
    expected = (14 * np.array([0.6, 0.3, 0.1]) + 1 / 3) / 15
    np.testing.assert_allclose(shares, expected, atol=0.08)


def test_each_use_of_chance_has_a_stream_of_its_own(make_trainer: MakeTrainer) -> None:
    """Game, weights, random actions and windows: none is told by another."""
    trainer, _ = make_trainer("lives")
    game, weights, actions, windows = np.random.SeedSequence(SEED).spawn(4)
    assert torch.initial_seed() == weights.generate_state(1)[0] != game.generate_state(1)[0]
    for generator, stream in (
        (trainer.random_actions, actions),
        (trainer.sampler.generator, windows),
    ):
        assert generator.bit_generator.state == np.random.default_rng(stream).bit_generator.state
    trainer.environment.close()


def test_a_copy_of_the_ring_goes_on_after_a_stop(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU batches are read from a copy, which must hold what was stored before, too."""
    monkeypatch.setattr(resumable, "RingTensors", partial(RingTensors, copies=True))
    trainer, reporter = make_trainer("over")
    with pytest.raises(Stopped):
        trainer.run(reporter, lambda: trainer.step == 90)
    again = Trainer(trainer.recipe, trainer.fingerprint, trainer.folder, ON_CPU)
    assert again.resume() and again.step == 90
    for going_on in (trainer, again):
        going_on.act_and_store(reporter)
        going_on.environment.close()
        assert going_on.ring.copies
        rows = torch.arange(going_on.buffer.capacity)[None]
        read, ring = going_on.ring.read(rows, rows), going_on.buffer.ring()
        for found, name in zip(read, ("frame", "action", "reward", "terminated"), strict=True):
            assert found.any() and np.array_equal(found[0].numpy(), ring[name]), name
