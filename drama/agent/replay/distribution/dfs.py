"""Dynamic Frequency-Based Sampling (DFS).

The world model is trained on what it has seen least; behaviour is imagined from what the world
model has learned and imagination has not used up ("Drama", arXiv 2410.08893, section 2.3).
"""

from __future__ import annotations

import numpy as np

from drama.agent.replay.distribution.base import Counts, Distribution, LogWeights


class DFS(Distribution):
    """Weighs windows as section 2.3 does."""

    def of_world_model(self, world_model_counts: Counts) -> LogWeights:
        """Prefer what the world model has seen least: -n / tau."""
        return world_model_counts / -self.settings.world_model_temperature

    def of_imagination(self, world_model_counts: Counts, imagination_counts: Counts) -> LogWeights:
        """Prefer what the world model has learned and imagination has not used up.

        (n - alpha b - beta max(0, n - b)) / tau', where b = m / ratio brings m to the scale of n.
        """
        settings = self.settings
        scaled = imagination_counts * (1.0 / self.imagination_ratio)  # b [windows]
        ahead = world_model_counts - scaled  # n - b [windows]
        preferred = world_model_counts - settings.alpha * scaled
        preferred -= settings.beta * np.maximum(0.0, ahead)
        return preferred / settings.imagination_temperature
