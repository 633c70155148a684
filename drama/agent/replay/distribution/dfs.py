"""Dynamic Frequency-Based Sampling (DFS).

The world model is trained on what it has seen least; behaviour is imagined from what the world
model has learned and imagination has not used up ("Drama", arXiv 2410.08893, section 2.3).
"""

from __future__ import annotations

import numpy as np

from drama.agent.replay.distribution.base import Counts, Distribution, LogWeights


def world_model_log_weights(world_model_counts: Counts, temperature: float) -> LogWeights:
    """Log-weights of windows for world-model training: -n / tau (section 2.3).

    Args:
        world_model_counts: n, int32 [windows], how often each window was drawn for the world
            model.
        temperature: tau > 0.
    Returns:
        float64 [windows], unnormalised.
    """
    log_weights: LogWeights = np.divide(world_model_counts, -temperature)  # [windows]
    return log_weights


def imagination_log_weights(
    world_model_counts: Counts,
    imagination_counts: Counts,
    ratio: float,
    alpha: float,
    beta: float,
    temperature: float,
) -> LogWeights:
    """Log-weights of imagination contexts: (n - alpha b - beta max(0, n - b)) / tau' (section 2.3).

    Args:
        world_model_counts: n, int32 [windows], how often each window was drawn for the world
            model.
        imagination_counts: m, int32 [windows], how often for imagination.
        ratio: imagination batch / world-model batch (64 at paper size), which brings m to the
            scale of n: b = m / ratio.
        alpha: weight of b.
        beta: weight of how far learning is ahead of imagination.
        temperature: tau' > 0.
    Returns:
        float64 [windows], unnormalised.
    """
    if world_model_counts.shape != imagination_counts.shape:
        raise ValueError(f"counts of {world_model_counts.shape} and {imagination_counts.shape}")
    scaled = imagination_counts * (1.0 / ratio)  # b [windows]
    ahead = world_model_counts - scaled  # n - b [windows]
    return (world_model_counts - alpha * scaled - beta * np.maximum(0.0, ahead)) / temperature


class DFS(Distribution):
    """Weighs windows as section 2.3 does."""

    def of_world_model(self, world_model_counts: Counts) -> LogWeights:
        """Prefer what the world model has seen least."""
        return world_model_log_weights(world_model_counts, self.settings.world_model_temperature)

    def of_imagination(self, world_model_counts: Counts, imagination_counts: Counts) -> LogWeights:
        """Prefer what the world model has learned and imagination has not used up."""
        return imagination_log_weights(
            world_model_counts,
            imagination_counts,
            self.imagination_ratio,
            self.settings.alpha,
            self.settings.beta,
            self.settings.imagination_temperature,
        )
