"""What a distribution over windows of the replay memory is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from drama.agent.settings import ReplaySettings

Counts = npt.NDArray[np.int32]
LogWeights = npt.NDArray[np.float64]


class Distribution(ABC):
    """Weighs windows by how often each was drawn.

    Args:
        settings: temperatures, alpha, beta.
        imagination_ratio: imagination batch / world-model batch.
    """

    def __init__(self, settings: ReplaySettings, imagination_ratio: float) -> None:
        self.settings = settings
        self.imagination_ratio = imagination_ratio

    @abstractmethod
    def of_world_model(self, world_model_counts: Counts) -> LogWeights:
        """Return log-weights of windows for world-model training, one for each count."""

    @abstractmethod
    def of_imagination(self, world_model_counts: Counts, imagination_counts: Counts) -> LogWeights:
        """Return log-weights of contexts to imagine from, one for each pair of counts."""
