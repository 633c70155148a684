"""What the agent asks of an environment: Gymnasium's interface, and a state that can be saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

Frame: TypeAlias = NDArray[np.uint8]
"""One observation, uint8 [height, width, 3], RGB."""

State: TypeAlias = dict[str, np.ndarray | int | float | bool | str]
"""A saved environment: plain values only, so that any file format can hold it."""

Step: TypeAlias = tuple[Frame, float, bool, bool, dict[str, Any]]
"""Frame, reward, terminated, truncated, info."""


class AgentEnvironment(gymnasium.Env[Frame, int]):
    """A Gymnasium environment whose continuation can be saved and taken up again.

    Observations are RGB uint8 [image_size, image_size, 3], a new array each time. `terminated` is
    true only when the game is over; `info["life_lost"]` (bool) tells of a lost life, and the game
    goes on: what else that ends, the training loop decides. Seeded by the first `reset(seed=...)`;
    a `reset()` without a seed continues the environment's own generator.
    """

    observation_space: gymnasium.spaces.Box  # type: ignore[assignment]
    action_space: gymnasium.spaces.Discrete  # type: ignore[assignment]

    @abstractmethod
    def save_state(self) -> State:
        """Return everything the continuation depends on; the environment itself is unchanged.

        The generator behind `action_space.sample()` is not part of it: it is the caller's.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, byte for byte: frames, rewards, flags, later resets.

        Args:
            state: what `save_state` of the same game returned, in this process or another.

        Raises:
            ValueError: the state is of another game, or not what `save_state` returns.
        """


def check_state(state: Mapping[str, Any], game: str, keys: frozenset[str]) -> None:
    """Raise ValueError unless a saved environment has exactly these keys and is of this game."""
    if set(state) != keys:
        missing, unknown = sorted(keys - set(state)), sorted(set(state) - keys)
        raise ValueError(f"saved environment state: missing keys {missing}, unknown {unknown}")
    if state["game"] != game:
        raise ValueError(f"saved environment state is of {state['game']!r}, this game is {game!r}")
