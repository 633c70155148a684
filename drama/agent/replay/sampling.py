"""Which windows of the replay memory are looked at: drawn by a distribution, and counted.

The distributions are in `drama.agent.replay.distribution`: Dynamic Frequency-Based Sampling (DFS)
and the uniform one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drama.agent.replay.buffer import ReplayBuffer
from drama.agent.replay.distribution import DISTRIBUTIONS, Counts, LogWeights
from drama.agent.settings import ReplaySettings


def draw_without_replacement(
    log_weights: LogWeights, count: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw `count` different indices, as if one after another with P(i) proportional to exp(w_i).

    Add independent standard Gumbel noise to every log-weight and keep the `count` largest sums.
    This is exactly sequential sampling without replacement. Noise -log(t), with t standard
    exponential, is Gumbel, and w - log(t) is large where the waiting time t / exp(w) is short: a
    race of independent exponential clocks with rates exp(w_i). The first clock to ring is i with
    probability exp(w_i) / sum_j exp(w_j). Clocks have no memory, so given who rang, the rest race
    on afresh at the same rates: the second is drawn from the remaining indices by their weights,
    and so on. (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"; Kool et
    al. 2019, arXiv 1903.06059, section 2.3.)

    Args:
        log_weights: float [windows], unnormalised, finite.
        count: number of indices, 1 to that of windows.
        generator: what is taken from it depends on that and `count`, never on the weights.
    Returns:
        int64 [count]: the indices in random order, so that a place in the batch says nothing
        about a weight.
    Raises:
        ValueError: a rank other than 1, or count outside [1, windows].
    """
    if log_weights.ndim != 1 or not 1 <= count <= len(log_weights):
        raise ValueError(f"cannot draw {count} different indices from {log_weights.shape}")
    keys = np.log(generator.standard_exponential(len(log_weights))) - log_weights  # negated
    chosen = np.argpartition(keys, count - 1)[:count]
    # The order within a partition is up to the processor's instruction set, hence sorted first.
    return generator.permutation(np.sort(chosen))


class Windows(NamedTuple):
    """Where the windows of a batch lie in the ring: rows, int64 [B, L] each.

    `reward_rows` are the rows that rewards are read from: the same, unless rewards are shuffled.
    """

    rows: npt.NDArray[np.int64]
    reward_rows: npt.NDArray[np.int64]


class Sampler:
    """Draws windows for the world model and contexts for imagination, and counts both.

    Args:
        settings: distribution, temperatures, alpha, beta, and the shuffled-reward control.
        buffer: where windows come from; it may grow and wrap around between calls.
        imagination_ratio: imagination batch / world-model batch.
        generator: owned by the sampler from here on; PCG64, what `numpy.random.default_rng` makes.
    Raises:
        ValueError: a ratio that is not positive, or a generator whose state is not plain integers.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        buffer: ReplayBuffer,
        imagination_ratio: float,
        generator: np.random.Generator,
    ) -> None:
        if not imagination_ratio > 0:
            raise ValueError(f"imagination ratio must be positive, not {imagination_ratio}")
        if not isinstance(generator.bit_generator, np.random.PCG64):
            raise ValueError(
                f"the sampler saves its generator as plain integers and needs PCG64, "
                f"not {type(generator.bit_generator).__name__}"
            )
        self.settings = settings
        self.buffer = buffer
        self.distribution = DISTRIBUTIONS[settings.sampling](settings, imagination_ratio)
        self.generator = generator
        # One row per row of the ring: step s is counted in row s % capacity.
        self._world_model_counts = np.zeros(buffer.capacity, np.int32)
        self._imagination_counts = np.zeros(buffer.capacity, np.int32)
        self._counted_steps = buffer.total

    def draw_world_model(self, batch_size: int, length: int) -> Windows:
        """Draw B different windows of L transitions to train the world model on.

        With `shuffle_rewards`, the rewards of the batch are permuted over all its B * L places:
        a control in which rewards have nothing to do with what happened.

        Raises:
            ValueError: fewer than B windows are stored.
        """
        windows = self._windows(batch_size, length)
        log_weights = self.distribution.of_world_model(
            self._in_time_order(self._world_model_counts, windows)
        )
        starts = draw_without_replacement(log_weights, batch_size, self.generator)
        self._world_model_counts[self._rows(starts)] += 1
        rows = self.buffer.rows(starts, length)
        if not self.settings.shuffle_rewards:
            return Windows(rows, rows)
        return Windows(rows, self.generator.permutation(rows.ravel()).reshape(rows.shape))

    def draw_imagination(self, batch_size: int, length: int) -> Windows:
        """Draw B different contexts of L transitions to imagine from.

        Raises:
            ValueError: fewer than B windows are stored.
        """
        windows = self._windows(batch_size, length)
        log_weights = self.distribution.of_imagination(
            self._in_time_order(self._world_model_counts, windows),
            self._in_time_order(self._imagination_counts, windows),
        )
        starts = draw_without_replacement(log_weights, batch_size, self.generator)
        self._imagination_counts[self._rows(starts)] += 1
        rows = self.buffer.rows(starts, length)
        return Windows(rows, rows)

    def counts(self) -> tuple[Counts, Counts]:
        """n and m, int32 [size] each: draws of the window starting at each stored transition.

        Position 0 is the oldest transition; the arrays are copies.
        """
        self._forget_overwritten()
        size = self.buffer.size
        return (
            self._in_time_order(self._world_model_counts, size),
            self._in_time_order(self._imagination_counts, size),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides future draws.

        Returns:
            `total`, the buffer's total (int); `world_model_counts` and `imagination_counts`,
            int32 [size], oldest transition first; `generator`, a dict of strings and Python
            integers of up to 128 bits, which JSON holds exactly.
        """
        world_model_counts, imagination_counts = self.counts()
        return {
            "total": self.buffer.total,
            "world_model_counts": world_model_counts,
            "imagination_counts": imagination_counts,
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the sampler that was saved, over a buffer already refilled with its rows.

        Raises:
            ValueError: other keys, or a buffer that does not hold the rows that were counted.
        """
        expected = {"total", "world_model_counts", "imagination_counts", "generator"}
        if state.keys() != expected:
            raise ValueError(f"sampler state has keys {sorted(state)}, expected {sorted(expected)}")
        counts = state["world_model_counts"], state["imagination_counts"]
        if state["total"] != self.buffer.total or any(len(n) != self.buffer.size for n in counts):
            raise ValueError(
                f"sampler state counts {len(counts[0])} and {len(counts[1])} transitions up to "
                f"step {state['total']}, the buffer holds {self.buffer.size} up to step "
                f"{self.buffer.total}: refill the buffer before loading the sampler"
            )
        rows = self._rows(np.arange(self.buffer.size))
        for own, saved in zip(
            (self._world_model_counts, self._imagination_counts), counts, strict=True
        ):
            own[:] = 0
            own[rows] = saved
        self._counted_steps = self.buffer.total
        self.generator.bit_generator.state = state["generator"]

    def _windows(self, batch_size: int, length: int) -> int:
        """Bring the counts up to date; return how many windows there are to draw from."""
        self._forget_overwritten()
        windows = self.buffer.window_count(length)
        if windows < batch_size:
            raise ValueError(
                f"cannot draw {batch_size} different windows of {length} steps: the buffer has "
                f"{windows} ({self.buffer.size} transitions stored)"
            )
        return windows

    def _forget_overwritten(self) -> None:
        """A new transition starts at zero, also in a row where an older one was counted."""
        new = min(self.buffer.total - self._counted_steps, self.buffer.capacity)
        rows = np.arange(self.buffer.total - new, self.buffer.total) % self.buffer.capacity
        self._world_model_counts[rows] = 0
        self._imagination_counts[rows] = 0
        self._counted_steps = self.buffer.total

    def _rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of the ring of these positions in time order."""
        return (self.buffer.first_step + positions) % self.buffer.capacity

    def _in_time_order(self, counts: Counts, length: int) -> Counts:
        """The counts of positions 0 .. length - 1."""
        first = self.buffer.first_step % self.buffer.capacity
        wrapped = max(0, first + length - self.buffer.capacity)
        return np.concatenate((counts[first : first + length], counts[:wrapped]))
