"""Catch: two small pixel games on which the whole agent must be seen to learn within minutes.

The screen is 64x64 RGB, cut into 8 columns (Catch8) or 16 (Catch16). An object one column wide and
as high (8x8 or 4x4 pixels) starts at the top of a random column and falls 4 pixels a step for 15
steps; a paddle three columns wide and 4 pixels high (24x4 or 12x4) starts at a random place on the
bottom row and moves one column a step, never off the screen. After the 15th step the object's upper
edge is level with the paddle's, and the episode ends: reward +1 when the object is caught, -1 when
it is not, 0 before. Object and paddle keep to the columns, so the object lies over the paddle as a
whole or not at all: there is no catching by half.

A paddle steered without a look at the object covers 3 of the columns wherever it is, so random play
returns 2 * 3/8 - 1 = -0.25 on average in Catch8 and 2 * 3/16 - 1 = -0.625 in Catch16. Measured over
400 000 random episodes each: -0.250 and -0.623 (standard errors 0.002 and 0.001). A player who
looks can always win: 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from drama.agent.env.base import AgentEnvironment, Frame, State, Step, check_state

SIZE = 64
FALL = 4
STEPS = 15
PADDLE_COLUMNS = 3
PADDLE_HEIGHT = 4
OBJECT_COLOUR = (255, 255, 255)
PADDLE_COLOUR = (64, 160, 255)

_STATE_KEYS = frozenset({"game", "random_state", "column", "paddle", "steps", "reset_due"})


class Catch(AgentEnvironment):
    """Catch on 8 or 16 columns; actions: 0 left, 1 stay, 2 right.

    `info` holds `life_lost` (bool), always false: there is one life, and its end is the game's.
    """

    def __init__(self, columns: int) -> None:
        """Set the game up.

        Args:
            columns: how many columns the screen is cut into, 8 or 16.

        Raises:
            ValueError: another number of columns.
        """
        if columns not in (8, 16):
            raise ValueError(f"Catch has 8 or 16 columns, not {columns}")
        self._game = f"Catch{columns}"
        self._columns = columns
        self._width = SIZE // columns
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)
        self._column = 0  # the object's
        self._paddle = 0  # the leftmost of the paddle's
        self._steps = 0
        self._reset_due = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Drop a new object from a random column, with the paddle at a random place.

        Args:
            seed: seeds the game's generator anew; without one it continues.
            options: not used.

        Returns:
            The first frame, uint8 [64, 64, 3], and the info.
        """
        super().reset(seed=seed)
        self._column = int(self.np_random.integers(self._columns))
        self._paddle = int(self.np_random.integers(self._columns - PADDLE_COLUMNS + 1))
        self._steps = 0
        self._reset_due = False
        return self._frame(), {"life_lost": False}

    def step(self, action: int) -> Step:
        """Move the paddle, then let the object fall.

        Args:
            action: 0 left, 1 stay, 2 right.

        Returns:
            Frame uint8 [64, 64, 3], reward, terminated (after the 15th step), truncated (never),
            info.

        Raises:
            ValueError: the action is out of range.
            gymnasium.error.ResetNeeded: the episode is over, or none was started.
        """
        if self._reset_due:
            raise gymnasium.error.ResetNeeded(f"{self._game}: no episode in progress, call reset()")
        if action not in (0, 1, 2):
            raise ValueError(f"{self._game}: action {action} is out of range (0 to 2)")
        rightmost = self._columns - PADDLE_COLUMNS
        self._paddle = min(max(self._paddle + int(action) - 1, 0), rightmost)
        self._steps += 1
        self._reset_due = self._steps == STEPS
        reward = 0.0
        if self._reset_due:
            reward = 1.0 if 0 <= self._column - self._paddle < PADDLE_COLUMNS else -1.0
        return self._frame(), reward, self._reset_due, False, {"life_lost": False}

    def save_state(self) -> State:
        """Return everything the continuation depends on; the environment itself is unchanged.

        Returns:
            game (str), random_state (str: the bit generator's state as JSON), column, paddle and
            steps (int), reset_due (bool).
        """
        return {
            "game": self._game,
            "random_state": json.dumps(self.np_random.bit_generator.state),
            "column": self._column,
            "paddle": self._paddle,
            "steps": self._steps,
            "reset_due": self._reset_due,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; see `AgentEnvironment.load_state`."""
        check_state(state, self._game, _STATE_KEYS)
        self.np_random.bit_generator.state = json.loads(state["random_state"])
        self._column = int(state["column"])
        self._paddle = int(state["paddle"])
        self._steps = int(state["steps"])
        self._reset_due = bool(state["reset_due"])

    def _frame(self) -> Frame:
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        left = self._paddle * self._width
        right = left + PADDLE_COLUMNS * self._width
        frame[SIZE - PADDLE_HEIGHT :, left:right] = PADDLE_COLOUR
        left, top = self._column * self._width, self._steps * FALL
        # In front of the paddle, and cut off at the screen's lower edge.
        frame[top : top + self._width, left : left + self._width] = OBJECT_COLOUR
        return frame


for _columns in (8, 16):
    gymnasium.register(
        id=f"drama/Catch{_columns}-v0",
        entry_point="drama.agent.env.catch:Catch",
        kwargs={"columns": _columns},
    )
