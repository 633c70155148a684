"""Distributions over windows of the replay memory, by the name that settings give."""

from drama.agent.replay.distribution.base import Counts, Distribution, LogWeights
from drama.agent.replay.distribution.dfs import DFS
from drama.agent.replay.distribution.uniform import Uniform

__all__ = ["DISTRIBUTIONS", "Counts", "LogWeights"]

DISTRIBUTIONS: dict[str, type[Distribution]] = {"dfs": DFS, "uniform": Uniform}
