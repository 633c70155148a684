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

An evaluation that was stopped goes on with the episodes that were not finished, and each turns out
as it would have. How many rows a batch has can change how numbers are rounded. So an episode begins
in the round in which it would have begun, beside as many others: where those were finished before,
rows that mean nothing stand in for them.

Nothing short of playing them shows that two episodes are the same, since their latents differ until
the end. So the early end (`evaluation.enough_same`) proves nothing about those not played: it stops
when the first so many, by number, were all the same. How many were played stands in the file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from drama.agent.behaviour.agent import ActingWindow, Agent
from drama.agent.env import AgentEnvironment, make
from drama.agent.settings import Actions, EnvironmentSettings, EvaluationSettings, Recipe
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

Kept: TypeAlias = Mapping[tuple[Actions, int], Mapping[str, Any]]


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
        played: 16 hex digits that two episodes share when they are the same from end to end;
            nothing before the end.
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
    played: str = ""
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
        if terminated or truncated:
            self.played = self.digest.hexdigest()[:16]

    def row(self) -> dict[str, Any]:
        """Return the episode's row in the file, by the names of `SCHEMA`."""
        values = {name: getattr(self, name) for name in SCHEMA.names if hasattr(self, name)}
        return {"episode": self.index, **values}

    def restore(self, row: Mapping[str, Any]) -> None:
        """Take over how the episode ended from its row."""
        for name in ("episode_return", "length", "truncated", "played"):
            setattr(self, name, row[name])


def new_episode(run_seed: int, index: int, actions: Actions = "greedy") -> Episode:
    """Derive an episode's seeds from the run's seed and the episode's number."""
    sequence = np.random.SeedSequence([EVALUATION_STREAM, run_seed, index])
    emulator, latents, choices = sequence.spawn(3)
    seed = int(emulator.generate_state(1)[0]) & 0x7FFF_FFFF
    generators = np.random.default_rng(latents), np.random.default_rng(choices)
    return Episode(index, actions, seed, *generators)


class _Place:
    """One environment and the episodes handed to it.

    Args:
        environment: to play in.
        episodes: to play, one after another.
        kept: rows of episodes that were finished before, by way and number.

    Attributes:
        start: the round in which it begins to play: all rounds before went into what was kept.
    """

    def __init__(
        self, environment: AgentEnvironment, episodes: Sequence[Episode], kept: Kept
    ) -> None:
        self.environment = environment
        self.waiting = list(episodes)
        self.finished: list[Episode] = []
        while self.waiting and (row := kept.get((self.waiting[0].actions, self.waiting[0].index))):
            self.waiting[0].restore(row)
            self.finished.append(self.waiting.pop(0))
        self.start = sum(episode.length for episode in self.finished)
        self.frame = np.zeros(environment.observation_space.shape, np.uint8)
        self.next_episode()

    def next_episode(self) -> None:
        self.episode = self.waiting.pop(0) if self.waiting else None
        if self.episode:
            self.frame, _ = self.environment.reset(seed=self.episode.seed)
            self.episode.digest.update(self.frame.tobytes())

    def playing(self, now: int) -> Episode | None:
        """Return the episode that is played in a round."""
        return self.episode if self.start <= now else None

    def is_counted(self, now: int) -> bool:
        """Say whether it has a row in a round's batch, were it only one that stands in."""
        return self.episode is not None or now < self.start

    def step(self, action: int) -> Episode | None:
        """Take an action; returns the episode when that ended it, and begins the next."""
        assert self.episode is not None
        self.frame, reward, terminated, truncated, _ = self.environment.step(action)
        self.episode.note(action, float(reward), terminated, truncated, self.frame)
        if not (terminated or truncated):
            return None
        ended = self.episode
        self.finished.append(ended)
        self.next_episode()
        return ended


def play(
    agent: Agent,
    recipe: Recipe,
    settings: EvaluationSettings,
    kept: Sequence[Mapping[str, Any]] = (),
    after_round: Callable[[list[Episode]], None] = lambda ended: None,
) -> list[Episode]:
    """Play evaluation episodes with the agent as it is.

    Args:
        agent: in evaluation mode.
        recipe: names the game and the run's seed.
        settings: how many episodes, how many side by side, how actions are chosen, when so many
            are enough.
        kept: rows of episodes that this very call finished before it was stopped.
        after_round: called whenever all environments have taken a step, with the episodes that
            this ended; what it raises ends the call.

    Returns:
        The finished episodes, by number: those of the score, then those beside it.
    """
    known = {(row["actions"], row["episode"]): row for row in kept}

    def finish(episodes: Sequence[Episode]) -> list[Episode]:
        return _play(agent, recipe, episodes, settings.environments, known, after_round)

    finished: list[Episode] = []
    for actions in settings.ways:
        episodes = [new_episode(recipe.seed, index, actions) for index in range(settings.episodes)]
        first = settings.enough_same or settings.episodes
        played = finish(episodes[:first])
        if len({episode.played for episode in played}) > 1:
            played += finish(episodes[first:])
        finished += played
    return finished


def _play(
    agent: Agent,
    recipe: Recipe,
    episodes: Sequence[Episode],
    environments: int,
    kept: Kept,
    after_round: Callable[[list[Episode]], None],
) -> list[Episode]:
    """Play these episodes to their ends and return them, in their order."""
    side_by_side = min(environments, len(episodes))
    places = [
        _Place(make(recipe.game, recipe.settings.environment), episodes[first::side_by_side], kept)
        for first in range(side_by_side)
    ]
    window = agent.new_window(side_by_side)
    greedy = any(episode.actions == "greedy" for episode in episodes)  # all of them alike
    now = min((place.start for place in places if place.episode), default=0)
    try:
        while any(place.episode for place in places):
            rows = [row for row, place in enumerate(places) if place.is_counted(now)]
            playing = [places[row].playing(now) for row in rows]
            frames = np.stack([places[row].frame for row in rows])
            actions = _choose(agent, window, np.array(rows), frames, playing, greedy)
            ended = []
            for row, episode, action in zip(rows, playing, actions, strict=True):
                over = places[row].step(int(action)) if episode else None
                ended += [over] if over else []
                if over or not episode:
                    window.clear(row)
            now += 1
            after_round(ended)
    finally:
        for place in places:
            place.environment.close()
    finished = [episode for place in places for episode in place.finished]
    return sorted(finished, key=lambda episode: episode.index)


def _choose(
    agent: Agent,
    window: ActingWindow,
    rows: np.ndarray,
    frames: np.ndarray,
    episodes: Sequence[Episode | None],
    greedy: bool,
) -> np.ndarray:
    """Choose the next action in the episodes that are played in the environments `rows`."""
    shape = agent.noise_shape()
    noise = np.ones((len(rows), *shape), np.float32)
    action_noise = np.ones((len(rows), agent.actions), np.float32)
    random_actions = np.full(len(rows), -1)
    for i, episode in enumerate(episodes):
        if episode is None:  # a row that stands in, whose window is empty
            random_actions[i] = 0
            continue
        if episode.length == 0:
            random_actions[i] = episode.generator.integers(agent.actions)
        noise[i] = episode.generator.standard_exponential(shape, np.float32)
        action_noise[i] = episode.choices.standard_exponential(agent.actions, np.float32)
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
    return Agent(recipe.settings, _count_actions(recipe.game, recipe.settings.environment))


@cache
def _count_actions(game: str, settings: EnvironmentSettings) -> int:
    """Return how many actions a game has; it is loaded for that, which takes a while."""
    environment = make(game, settings)
    actions = int(environment.action_space.n)
    environment.close()
    return actions


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
