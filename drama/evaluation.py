"""The score of a finished run: greedy episodes, each with seeds of its own.

Episodes are handed out in advance, episode i to environment i modulo E, so short episodes are not
favoured over long ones (keeping the first N to finish would). Every episode has its own seed for
the emulator and its own generator for latent samples: how many are stepped together changes
nothing but rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from drama.behaviour.agent import ActingWindow, Agent
from drama.config import EvaluationSettings
from drama.env import AgentEnvironment, make
from drama.files import write_parquet
from drama.settings import Recipe
from drama.training.checkpoint import load_checkpoint

SCHEMA = pa.schema(
    [
        ("episode", pa.int32()),
        ("seed", pa.int64()),
        ("episode_return", pa.float64()),
        ("length", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)
EVALUATION_STREAM = 1_000_003
"""Keeps evaluation's generators apart from training's, which spawn from the run's seed alone."""


@dataclass
class Episode:
    """One evaluation episode.

    Attributes:
        index: its number, from 0.
        seed: of the emulator, 31 bits.
        generator: for latent samples and the random first action.
        episode_return: sum of rewards so far.
        length: agent steps so far.
        truncated: whether it was cut off.
    """

    index: int
    seed: int
    generator: np.random.Generator
    episode_return: float = 0.0
    length: int = 0
    truncated: bool = False


def new_episode(run_seed: int, index: int) -> Episode:
    """Derive an episode's seeds from the run's seed and the episode's number."""
    emulator, latents = np.random.SeedSequence([EVALUATION_STREAM, run_seed, index]).spawn(2)
    seed = int(emulator.generate_state(1)[0]) & 0x7FFF_FFFF
    return Episode(index, seed, np.random.default_rng(latents))


class _Place:
    """One environment and the episodes handed to it."""

    def __init__(self, environment: AgentEnvironment, episodes: list[Episode]) -> None:
        self.environment = environment
        self.waiting = episodes
        self.finished: list[Episode] = []
        self.next_episode()

    def next_episode(self) -> None:
        self.episode = self.waiting.pop(0) if self.waiting else None
        if self.episode:
            self.frame, _ = self.environment.reset(seed=self.episode.seed)

    def step(self, action: int) -> bool:
        """Take an action; says whether the episode ended, in which case the next has begun."""
        assert self.episode is not None
        self.frame, reward, terminated, truncated, _ = self.environment.step(action)
        self.episode.episode_return += float(reward)
        self.episode.length += 1
        self.episode.truncated = truncated and not terminated
        if not (terminated or truncated):
            return False
        self.finished.append(self.episode)
        self.next_episode()
        return True


def play(agent: Agent, recipe: Recipe, settings: EvaluationSettings) -> list[Episode]:
    """Play evaluation episodes with the agent as it is.

    Args:
        agent: in evaluation mode.
        recipe: names the game and the run's seed.
        settings: how many episodes, how many side by side.

    Returns:
        The finished episodes, by number.
    """
    side_by_side = min(settings.environments, settings.episodes)
    episodes = [new_episode(recipe.seed, index) for index in range(settings.episodes)]
    places = [
        _Place(make(recipe.game, recipe.settings.environment), episodes[first::side_by_side])
        for first in range(side_by_side)
    ]
    window = agent.new_window(side_by_side)
    try:
        while busy := [row for row, place in enumerate(places) if place.episode]:
            rows = np.array(busy)
            for row, action in zip(busy, _choose(agent, window, places, rows), strict=True):
                if places[row].step(int(action)):
                    window.clear(row)
    finally:
        for place in places:
            place.environment.close()
    finished = [episode for place in places for episode in place.finished]
    return sorted(finished, key=lambda episode: episode.index)


def _choose(
    agent: Agent, window: ActingWindow, places: list[_Place], rows: np.ndarray
) -> np.ndarray:
    """Choose the next action of the environments `rows`."""
    shape = agent.noise_shape()
    noise = np.empty((len(rows), *shape), np.float32)
    random_actions = np.full(len(rows), -1)
    for i, row in enumerate(rows):
        episode = places[row].episode
        assert episode is not None
        if episode.length == 0:
            random_actions[i] = episode.generator.integers(agent.actions)
        noise[i] = episode.generator.standard_exponential(shape, np.float32)
    frames = np.stack([places[row].frame for row in rows])
    return agent.act(window, rows, frames, random_actions, torch.from_numpy(noise), greedy=True)


def load_agent(recipe: Recipe, checkpoint: Path, fingerprint: str, device: torch.device) -> Agent:
    """Build a run's agent and load its parameters and buffers from a checkpoint.

    Raises:
        CheckpointError: when the checkpoint is damaged or of another run.
    """
    return build_agent(recipe, load_checkpoint(checkpoint, fingerprint)["agent"], device)


def build_agent(recipe: Recipe, state: Mapping[str, np.ndarray], device: torch.device) -> Agent:
    """Build a recipe's agent from its parameters and buffers, in evaluation mode."""
    agent = new_agent(recipe)
    agent.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return agent.to(device).eval()


def new_agent(recipe: Recipe) -> Agent:
    """Build the agent that a recipe describes, untrained."""
    environment = make(recipe.game, recipe.settings.environment)
    actions = int(environment.action_space.n)
    environment.close()
    return Agent(recipe.settings, actions)


def write_evaluation(
    path: Path, episodes: list[Episode], recipe: Recipe, header: Mapping[str, Any]
) -> None:
    """Write one row per episode; `header` goes into the file's metadata beside game and seed."""
    rows = [
        {
            "episode": episode.index,
            "seed": episode.seed,
            "episode_return": episode.episode_return,
            "length": episode.length,
            "truncated": episode.truncated,
        }
        for episode in episodes
    ]
    metadata = {"format": 1, "game": recipe.game, "seed": recipe.seed, **header}
    schema = SCHEMA.with_metadata({b"drama": json.dumps(metadata, sort_keys=True)})
    write_parquet(path, pa.Table.from_pylist(rows, schema))
