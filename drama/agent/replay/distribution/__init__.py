"""Distributions over windows of the replay memory, by the name that settings give."""

from drama.agent.replay.distribution.base import Counts, Distribution, LogWeights
from drama.agent.replay.distribution.dfs import DFS
from drama.agent.replay.distribution.uniform import Uniform
from drama.agent.settings import ReplaySettings

__all__ = ["DISTRIBUTIONS", "Counts", "Distribution", "LogWeights", "distribution"]

DISTRIBUTIONS: dict[str, type[Distribution]] = {"dfs": DFS, "uniform": Uniform}


def distribution(settings: ReplaySettings, imagination_ratio: float) -> Distribution:
    """Return the distribution that the settings name.

    Args:
        settings: `sampling` names it.
        imagination_ratio: imagination batch / world-model batch.
    """
    return DISTRIBUTIONS[settings.sampling](settings, imagination_ratio)
