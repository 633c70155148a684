"""Environments, one of the innermost rings: imports nothing of the project but settings and errors.

base.py     the interface: a Gymnasium environment whose state can be saved
atari.py    every game that ale-py knows, under the protocol of Atari100k
catch.py    two small games for checking that the agent learns, also `gymnasium.make` ids
"""

from __future__ import annotations

import difflib

from drama.agent.env.atari import Atari, atari_names
from drama.agent.env.base import AgentEnvironment
from drama.agent.env.catch import SIZE, Catch
from drama.agent.settings import ATARI_100K, CATCH, EnvironmentSettings
from drama.errors import ConfigurationError

__all__ = ["AgentEnvironment", "game_names", "make"]


def game_names() -> list[str]:
    """Return the names of all games: the benchmark's first, then ale-py's others, then Catch's."""
    others = [name for name in atari_names() if name not in ATARI_100K]
    return [*ATARI_100K, *others, *CATCH]


def make(game: str, settings: EnvironmentSettings) -> AgentEnvironment:
    """Open a game by its name, one environment of its own.

    Args:
        game: one of `game_names`.
        settings: how it is played. Catch has one way to be played, at 64x64 pixels, without sticky
            actions and no-op starts; the other settings it does not know.

    Raises:
        ConfigurationError: there is no such game, or not with these settings.
    """
    if game in CATCH:
        if settings.image_size != SIZE:
            raise ConfigurationError(
                f"{game} is played at {SIZE}x{SIZE} pixels: environment.image_size is "
                f"{settings.image_size}, set it to {SIZE}"
            )
        for name in ("repeat_action_probability", "no_op_starts"):
            if value := getattr(settings, name):
                raise ConfigurationError(
                    f"{game} is no Atari game: environment.{name} is {value}, set it to 0"
                )
        return Catch(columns=int(game.removeprefix("Catch")))
    names = game_names()
    if game in names:
        return Atari(game, settings)
    nearest = difflib.get_close_matches(game, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigurationError(f"unknown game {game!r}: {hint}games are {', '.join(names)}")
