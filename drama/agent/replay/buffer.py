"""Replay memory: a preallocated ring of transitions, addressed by their order in time.

Transition number s (its step, counted from 0) lies in row s % capacity. Where a transition lies
therefore depends on its step alone, not on how the ring came to be filled, and a ring restored
from files is the ring that was saved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drama.runs.columns import COLUMN_TYPES, Columns, check_columns


class Transition(NamedTuple):
    """One agent step: what was seen, what was done about it, and what came of that.

    frame uint8 [S, S, 3]; reward is unclipped; terminated means game over only.
    """

    frame: npt.NDArray[np.uint8]
    action: int
    reward: float
    terminated: bool
    truncated: bool
    life_lost: bool
    episode: int


class ReplayBuffer:
    """The last `capacity` transitions.

    Args:
        capacity: transitions kept; older ones are overwritten.
        frame_shape: height, width, channels of a frame.

    Attributes:
        size: transitions stored now.
        total: transitions ever appended, which is the step of the next one.

    Raises:
        ValueError: capacity below 1.
    """

    def __init__(self, capacity: int, frame_shape: tuple[int, int, int] = (64, 64, 3)) -> None:
        if capacity < 1:
            raise ValueError(f"replay capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self.frame_shape = frame_shape
        # Zeroed memory is only reserved: the system hands out pages when they are first written,
        # so a ring larger than the run never costs its full size.
        self._rows: Columns = {
            name: np.zeros((capacity, *(frame_shape if name == "frame" else ())), dtype)
            for name, dtype in COLUMN_TYPES.items()
            if name != "step"
        }
        self.size = 0
        self.total = 0

    @property
    def first_step(self) -> int:
        """Step of the oldest transition stored."""
        return self.total - self.size

    def append(self, transition: Transition) -> None:
        """Store the next transition, in place of the oldest when the ring is full.

        Raises:
            ValueError: a frame of another shape or dtype, or a reward that is not finite.
        """
        frame = transition.frame
        if frame.shape != self.frame_shape or frame.dtype != np.uint8:
            raise ValueError(
                f"frame of step {self.total} is {frame.dtype} {frame.shape}, "
                f"the buffer holds uint8 {self.frame_shape}"
            )
        if not math.isfinite(transition.reward):
            raise ValueError(f"reward of step {self.total} is {transition.reward}")
        row = self.total % self.capacity
        for name, value in transition._asdict().items():
            self._rows[name][row] = value
        self.total += 1
        self.size = min(self.size + 1, self.capacity)

    def window_count(self, length: int) -> int:
        """Start positions that have `length` consecutive transitions from them on."""
        if length < 1:
            raise ValueError(f"window length must be at least 1, not {length}")
        return max(0, self.size - length + 1)

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Return the ring's rows of the windows of `length` transitions that begin at `starts`.

        Args:
            starts: int64 [B], positions in time order, 0 being the oldest transition stored, so
                that no window can join the newest transition to the oldest one.
            length: L, transitions per window.
        Returns:
            int64 [B, L].
        Raises:
            ValueError: starts of another rank or type, or outside [0, window_count(length)).
        """
        if starts.ndim != 1 or not np.issubdtype(starts.dtype, np.integer):
            raise ValueError(f"starts must be integers [B], not {starts.dtype} {starts.shape}")
        windows = self.window_count(length)
        if starts.size and (starts.min() < 0 or starts.max() >= windows):
            raise ValueError(
                f"window starts {starts.min()}..{starts.max()} lie outside [0, {windows}): "
                f"{self.size} transitions stored, windows of {length}"
            )
        steps = self.first_step + starts[:, None] + np.arange(length)  # [B, L]
        rows: npt.NDArray[np.int64] = steps % self.capacity
        return rows

    def ring(self) -> Columns:
        """Return the ring itself, one array [capacity, ...] per field: to read, not to write."""
        return self._rows

    def columns(self, first_step: int, stop_step: int) -> Columns:
        """Copy out the transitions of steps first_step, ..., stop_step - 1, one array per field.

        Returns:
            step int64 [steps], episode int32 [steps], frame uint8 [steps, S, S, 3], action int16
            [steps], reward float32 [steps], terminated, truncated and life_lost bool [steps];
            steps = stop_step - first_step.
        Raises:
            ValueError: steps that are not stored.
        """
        if not self.first_step <= first_step <= stop_step <= self.total:
            raise ValueError(
                f"steps [{first_step}, {stop_step}) are not all stored: "
                f"the buffer holds [{self.first_step}, {self.total})"
            )
        steps = np.arange(first_step, stop_step, dtype=np.int64)
        rows = steps % self.capacity
        return {"step": steps, **{name: values[rows] for name, values in self._rows.items()}}

    def extend(self, columns: Columns) -> None:
        """Append many transitions at once, as `columns` returned them.

        An empty buffer takes them from any step on and counts on from there; a buffer in use
        takes only the steps that follow its own.

        Raises:
            ValueError: fields missing, of different lengths, shapes or types, or steps with gaps.
        """
        check_columns(columns, self.frame_shape)
        steps = columns["step"]
        if not len(steps):
            return
        if self.total and steps[0] != self.total:
            raise ValueError(f"the next step is {self.total}, the rows begin at step {steps[0]}")
        kept = slice(-self.capacity, None)
        rows = steps[kept] % self.capacity
        for name, values in self._rows.items():
            values[rows] = columns[name][kept]
        self.total = int(steps[-1]) + 1
        self.size = min(self.size + len(steps), self.capacity)
