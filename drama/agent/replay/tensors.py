"""The replay ring as tensors: the ring itself on a CPU, a copy that follows it on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drama.agent.replay.buffer import ReplayBuffer
from drama.agent.shapes import check_shapes

READ = ("frame", "action", "reward", "terminated", "life_lost")
"""The fields that agents learn from."""


class Batch(NamedTuple):
    """Windows of consecutive transitions.

    frames uint8 [B, L, S, S, 3]; actions int64 [B, L]; rewards float32 [B, L]; terminations bool
    [B, L], true where the game ended, or a life if that counts.
    """

    frames: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor


class RingTensors:
    """Reads batches of windows from the ring, on the device that learns from them.

    On a GPU at 100 000 transitions of 64 x 64 pixels the copy takes 1.2 GB; each step sends one
    frame there, instead of thousands for every batch.

    Args:
        buffer: the ring.
        device: where batches are wanted.
        copies: whether to keep a copy; by default only where memory cannot be shared.
        lives_end: whether a lost life is a termination.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        device: torch.device,
        *,
        copies: bool | None = None,
        lives_end: bool = True,
    ) -> None:
        self.buffer, self.device, self.lives_end = buffer, device, lives_end
        self.copies = device.type != "cpu" if copies is None else copies
        self._source = {name: torch.from_numpy(buffer.ring()[name]) for name in READ}
        self._ring = self._source
        if self.copies:
            self._ring = {n: torch.zeros_like(t, device=device) for n, t in self._source.items()}
            pinned = device.type == "cuda"
            self._passing = {
                name: torch.empty_like(t[:1], pin_memory=pinned) for name, t in self._source.items()
            }
        self._followed = 0  # steps of the ring that the copy holds, or did before they were
        # overwritten

    def follow(self) -> None:
        """Copy what was appended since the last call.

        A single transition passes through pinned memory, so that nobody waits for it: the caller
        must have waited for the device since the last one.
        """
        first, total = max(self._followed, self.buffer.first_step), self.buffer.total
        self._followed = total
        if not self.copies or first == total:
            return
        capacity = self.buffer.capacity
        row = first % capacity
        if total - first == 1:
            for name, ring in self._ring.items():
                self._passing[name].copy_(self._source[name][row : row + 1])
                ring[row : row + 1].copy_(self._passing[name], non_blocking=True)
            return
        until = row + total - first
        for part in (slice(row, min(until, capacity)), slice(0, max(0, until - capacity))):
            for name, ring in self._ring.items():
                ring[part].copy_(self._source[name][part])

    def send(self, *rows: np.ndarray) -> list[Tensor]:
        """Turn arrays of rows into tensors that the device fetches without anyone waiting."""
        tensors = [torch.from_numpy(array) for array in rows]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def frames(self, rows: Tensor) -> Tensor:
        """Read the frames of any rows: int64 [...] to uint8 [..., S, S, 3]."""
        return self._ring["frame"][rows]

    def actions(self, rows: Tensor) -> Tensor:
        """Read the actions of any rows: int64 [...] to int64 [...]."""
        return self._ring["action"][rows].long()

    def read(self, rows: Tensor, reward_rows: Tensor) -> Batch:
        """Read windows with all that is learned from them.

        Args:
            rows: of the ring, int64 [B, L].
            reward_rows: the rows that rewards are read from, int64 [B, L].

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(rows=(rows, "B L"), reward_rows=(reward_rows, "B L"))
        ring = self._ring
        terminations = ring["terminated"][rows]
        if self.lives_end:
            terminations = terminations | ring["life_lost"][rows]
        return Batch(
            frames=self.frames(rows),
            actions=self.actions(rows),
            rewards=ring["reward"][reward_rows],
            terminations=terminations,
        )
