"""The score of a finished run: episodes played with the final agent, which learns nothing more.

What varies between episodes. Each has a seed for the emulator, a random first action, noise for
latent samples and, where actions are sampled, noise for these. The seed matters only where the game
itself is random: an Atari game without sticky actions and no-op starts is the same machine every
time, so its episodes differ by the first action and by the agent's noise alone, and the greedy
episodes of a policy that minds neither are all one and the same. Hence every episode is kept with a
hash of all that was seen, done and got in it: how many are different is part of a score.

Episodes are handed out in advance, episode i to environment i modulo E, so short episodes are not
favoured over long ones (keeping those that finish first would). Noise comes from generators of the
episode's own: how many episodes are stepped together changes nothing but rounding. Greedy and
sampled episodes of one number share seed, first action and noise of the latents.

Nothing short of playing them shows that two episodes are the same, since their latents differ until
the end. So the early end (`evaluation.enough_same`) proves nothing about those not played: it stops
when the first so many, by number, were all the same. How many were played stands in the file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from drama.agent.behaviour.agent import ActingWindow, Agent
from drama.agent.env import AgentEnvironment, make
from drama.agent.settings import Actions, EvaluationSettings, Recipe
from drama.files import write_parquet

SCHEMA = pa.schema(
    [
        ("episode", pa.int32()),
        ("actions", pa.string()),
        ("seed", pa.int64()),
        ("episode_return", pa.float64()),
        ("length", pa.int32()),
        ("truncated", pa.bool_()),
        ("played", pa.string()),
    ]
)
EVALUATION_STREAM = 1_000_003
"""Keeps evaluation's generators apart from training's, which spawn from the run's seed alone."""


@dataclass
class Episode:
    """One evaluation episode.

    Attributes:
        index: its number, from 0.
        actions: how its actions are chosen, greedy or sampled.
        seed: of the emulator, 31 bits.
        generator: for latent samples and the random first action.
        choices: for sampled actions.
        episode_return: sum of rewards so far.
        length: agent steps so far.
        truncated: whether it was cut off.
        digest: SHA-256 of what was seen, done and got so far.
    """

    index: int
    actions: Actions
    seed: int
    generator: np.random.Generator = field(repr=False)
    choices: np.random.Generator = field(repr=False)
    episode_return: float = 0.0
    length: int = 0
    truncated: bool = False
    digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def note(
        self, action: int, reward: float, terminated: bool, truncated: bool, frame: np.ndarray
    ) -> None:
        """Take in a step."""
        self.episode_return += reward
        self.length += 1
        self.truncated = truncated and not terminated
        self.digest.update(struct.pack("<qd??", action, reward, terminated, truncated))
        self.digest.update(frame.tobytes())

    def row(self) -> dict[str, Any]:
        """Return the episode's row in the file, by the names of `SCHEMA`."""
        values = {name: getattr(self, name) for name in SCHEMA.names if hasattr(self, name)}
        return {"episode": self.index, **values}

    @property
    def played(self) -> str:
        """16 hex digits that two episodes share when they are the same from end to end."""
        return str(self.digest.hexdigest())[:16]


def new_episode(run_seed: int, index: int, actions: Actions = "greedy") -> Episode:
    """Derive an episode's seeds from the run's seed and the episode's number."""
    sequence = np.random.SeedSequence([EVALUATION_STREAM, run_seed, index])
    emulator, latents, choices = sequence.spawn(3)
    seed = int(emulator.generate_state(1)[0]) & 0x7FFF_FFFF
    generators = np.random.default_rng(latents), np.random.default_rng(choices)
    return Episode(index, actions, seed, *generators)


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
            self.episode.digest.update(self.frame.tobytes())

    def step(self, action: int) -> bool:
        """Take an action; says whether the episode ended, in which case the next has begun."""
        assert self.episode is not None
        self.frame, reward, terminated, truncated, _ = self.environment.step(action)
        self.episode.note(action, float(reward), terminated, truncated, self.frame)
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
        settings: how many episodes, how many side by side, how actions are chosen, when so many
            are enough.

    Returns:
        The finished episodes, by number: those of the score, then those beside it.
    """
    finished: list[Episode] = []
    for actions in settings.ways:
        episodes = [new_episode(recipe.seed, index, actions) for index in range(settings.episodes)]
        first = settings.enough_same or settings.episodes
        played = _play(agent, recipe, episodes[:first], settings.environments)
        if len({episode.played for episode in played}) > 1:
            played += _play(agent, recipe, episodes[first:], settings.environments)
        finished += played
    return finished


def _play(
    agent: Agent, recipe: Recipe, episodes: Sequence[Episode], environments: int
) -> list[Episode]:
    """Play these episodes to their ends and return them, in their order."""
    side_by_side = min(environments, len(episodes))
    places = [
        _Place(make(recipe.game, recipe.settings.environment), list(episodes[first::side_by_side]))
        for first in range(side_by_side)
    ]
    window = agent.new_window(side_by_side)
    greedy = any(episode.actions == "greedy" for episode in episodes)  # all of them alike
    try:
        while busy := [row for row, place in enumerate(places) if place.episode]:
            actions = _choose(agent, window, places, np.array(busy), greedy)
            for row, action in zip(busy, actions, strict=True):
                if places[row].step(int(action)):
                    window.clear(row)
    finally:
        for place in places:
            place.environment.close()
    finished = [episode for place in places for episode in place.finished]
    return sorted(finished, key=lambda episode: episode.index)


def _choose(
    agent: Agent, window: ActingWindow, places: list[_Place], rows: np.ndarray, greedy: bool
) -> np.ndarray:
    """Choose the next action of the environments `rows`."""
    shape = agent.noise_shape()
    noise = np.empty((len(rows), *shape), np.float32)
    action_noise = np.empty((len(rows), agent.actions), np.float32)
    random_actions = np.full(len(rows), -1)
    for i, row in enumerate(rows):
        episode = places[row].episode
        assert episode is not None
        if episode.length == 0:
            random_actions[i] = episode.generator.integers(agent.actions)
        noise[i] = episode.generator.standard_exponential(shape, np.float32)
        action_noise[i] = episode.choices.standard_exponential(agent.actions, np.float32)
    frames = np.stack([places[row].frame for row in rows])
    draws = torch.from_numpy(noise), torch.from_numpy(action_noise)
    return agent.act(
        window, rows, frames, random_actions, draws[0], greedy=greedy, action_noise=draws[1]
    )


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


def describe(episodes: Sequence[Episode], recipe: Recipe) -> dict[str, Any]:
    """Return what a file of episodes says of them: game, seed, how many were played in each way."""
    played = Counter(episode.actions for episode in episodes)
    return {"format": 1, "game": recipe.game, "seed": recipe.seed, "played": played}


def write_evaluation(
    path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]
) -> None:
    """Write one row per episode, and the header as the file's metadata."""
    schema = SCHEMA.with_metadata({b"drama": json.dumps(header, sort_keys=True)})
    write_parquet(path, pa.Table.from_pylist(rows, schema))
