"""What a distribution over windows of the replay memory is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from drama.agent.settings import ReplaySettings

Counts = npt.NDArray[np.int32]
LogWeights = npt.NDArray[np.float64]


class Distribution(ABC):
    """Weighs windows by how often each was drawn: n times for the world model, m for imagination.

    Counts are int32 [windows], weights float64 [windows], logarithms and not normalised.

    Args:
        settings: temperatures tau and tau', alpha, beta.
        imagination_ratio: imagination batch / world-model batch (64 at paper size).
    """

    def __init__(self, settings: ReplaySettings, imagination_ratio: float) -> None:
        self.settings = settings
        self.imagination_ratio = imagination_ratio

    @abstractmethod
    def of_world_model(self, world_model_counts: Counts) -> LogWeights:
        """Return log-weights of windows for world-model training."""

    @abstractmethod
    def of_imagination(self, world_model_counts: Counts, imagination_counts: Counts) -> LogWeights:
        """Return log-weights of contexts to imagine from."""
