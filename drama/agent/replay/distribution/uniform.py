"""The uniform distribution over windows, which DFS is compared with."""

from __future__ import annotations

import numpy as np

from drama.agent.replay.distribution.base import Counts, Distribution, LogWeights


class Uniform(Distribution):
    """Weighs all windows alike."""

    def of_world_model(self, world_model_counts: Counts) -> LogWeights:
        """Return zeros."""
        return np.zeros(len(world_model_counts))

    def of_imagination(self, world_model_counts: Counts, imagination_counts: Counts) -> LogWeights:
        """Return zeros."""
        return np.zeros(len(world_model_counts))
