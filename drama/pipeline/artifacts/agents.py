"""A recorded run's agent, ready to play: from its checkpoint, or from its weights without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import Episode, build_agent, new_agent, play
from drama.agent.settings import Recipe
from drama.errors import ConfigurationError
from drama.files import sha256_file
from drama.pipeline import history
from drama.pipeline.artifacts.records import RecordedRun, find_record, read_record
from drama.pipeline.artifacts.weights import (
    WeightsError,
    check_tensors,
    read_weights,
    read_weights_of,
    shapes_of,
)
from drama.runs.checkpoint import CheckpointError, load_checkpoint
from drama.runs.folder import CHECKPOINT
from drama.runs.shards import ROWS_PER_SHARD

SPARE = 2**26
"""Bytes that a checkpoint may hold besides: states of generators and games, tables of the run."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained agent and what it was trained on; its text names the run and the file.

    Attributes:
        agent: in evaluation mode.
        recipe: game, seed and every setting of the run.
        fingerprint: the run's, in full.
        source: the file that the agent was read from.
    """

    agent: Agent = field(repr=False)
    recipe: Recipe = field(repr=False)
    fingerprint: str
    source: Path

    def play(self, episodes: int = 1) -> list[Episode]:
        """Play the first episodes of an evaluation, greedily, with their own seeds.

        Returns:
            The episodes, each with its return, its length and whether it was cut off.
        """
        asked = {"episodes": episodes, "environments": 1}
        settings = history.read_evaluation_settings(asked, "LoadedRun.play")
        return play(self.agent, self.recipe, settings)


def load(place: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load a trained agent.

    Args:
        place: a weights file, a run's folder, its record or its recipe.
        device: where the agent is to lie.

    Raises:
        ConfigurationError: when there is no whole run, or no such device.
        WeightsError, Damaged, CheckpointError: when a file is missing or not what it was.
        OtherCode: when today's code builds another agent from the run's recipe.
    """
    place, device = Path(place), _usable(device)
    if place.suffix == ".safetensors":
        weights = read_weights(place)
        fingerprint = weights.metadata.fingerprint
        return LoadedRun(weights.agent(device), weights.recipe, fingerprint, place)
    run = read_record(find_record(place))
    agent, source = agent_of(run, device)
    return LoadedRun(agent, run.recipe, run.fingerprint, source)


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not of this build
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"device {str(device)!r}: cannot be used here: {reason}") from None


def agent_of(run: RecordedRun, device: torch.device) -> tuple[Agent, Path]:
    """Load a whole run's agent, in evaluation mode, and say which file it is from.

    Raises:
        WeightsError: when neither checkpoint nor weights are here, or the weights do not hold.
        CheckpointError: when the checkpoint is not what was recorded.
        OtherCode: when today's code builds another agent from the run's recipe.
    """
    checkpoint = run.folder / CHECKPOINT
    if not checkpoint.exists():
        if not run.weights.exists():
            raise WeightsError(
                f"{run.folder}: neither {CHECKPOINT} nor {run.weights.name} is here; "
                f"`dvc pull {run.stage}` where DVC keeps them"
            )
        return read_weights_of(run).agent(device), run.weights
    state = read_agent(run)
    check_tensors(checkpoint, run.recipe, shapes_of(state), run.record.git_commit)
    return build_agent(run.recipe, state, device), checkpoint


def read_agent(run: RecordedRun) -> dict[str, np.ndarray]:
    """Read a whole run's agent from its checkpoint: parameters and buffers by name.

    No more memory is taken than the run's recipe can ask for.

    Raises:
        CheckpointError: when the checkpoint is missing, damaged, another run's, or not the recorded
            one, such as one of an earlier step.
    """
    settings = run.recipe.settings
    with torch.device("meta"):
        tensors = new_agent(run.recipe).state_dict().values()
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    frame = 3 * settings.environment.image_size**2
    rows = min(ROWS_PER_SHARD, settings.replay.capacity)
    # The agent and its optimisers' two averages; frames in no shard yet; counters of the ring.
    most = 4 * parameters + rows * (frame + 64) + 8 * settings.replay.capacity + SPARE
    path = run.folder / CHECKPOINT
    agent = load_checkpoint(path, run.fingerprint, part="agent", most=most)
    if sha256_file(path) != run.checkpoint.sha256:
        raise CheckpointError(
            f"{path}: whole, but not the bytes that {run.path.name} recorded. Remove it, then "
            f"{run.remedy}, or put back a good copy"
        )
    return agent
