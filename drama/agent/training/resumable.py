"""A run that can be stopped: everything it consists of, how that is saved, how it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama.agent.behaviour.agent import Agent
from drama.agent.env import make
from drama.agent.model.sequence import use_backend
from drama.agent.replay.buffer import ReplayBuffer
from drama.agent.replay.sampling import Sampler
from drama.agent.replay.tensors import RingTensors
from drama.agent.settings import Recipe
from drama.agent.training.learner import Learner
from drama.agent.training.runtime import CHECKPOINT_SECONDS, Runtime
from drama.errors import DramaError, reason
from drama.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from drama.runs.folder import CHECKPOINT, EPISODES, REPLAY, TRAINING
from drama.runs.metrics import (
    BEHAVIOUR_METRICS,
    EPISODE_SCHEMA,
    TRAINING_SCHEMA,
    WORLD_MODEL_METRICS,
    NonFiniteLoss,
    Table,
    Window,
)
from drama.runs.shards import ShardWriter, iterate_shards


class TrainingFailed(DramaError):
    """The run cannot go on; the text says why and from where it could."""


class ResumableRun:
    """One run: a game, a seed, an agent and everything that goes with it.

    Args:
        recipe: what to run.
        fingerprint: the recipe's.
        folder: where the run's files lie.
        runtime: how to run it.
    """

    def __init__(self, recipe: Recipe, fingerprint: str, folder: Path, runtime: Runtime) -> None:
        settings = recipe.settings
        self.recipe, self.fingerprint, self.folder = recipe, fingerprint, folder
        self.settings, self.runtime = settings, runtime
        torch.set_num_threads(runtime.threads)
        streams = np.random.SeedSequence(recipe.seed).spawn(4)
        environment_seed, torch_seed = (int(s.generate_state(1)[0]) for s in streams[:2])
        torch.manual_seed(torch_seed)
        self.random_actions = np.random.default_rng(streams[2])

        self.environment = make(recipe.game, settings.environment)
        actions = int(self.environment.action_space.n)
        self.agent = Agent(settings, actions).to(runtime.device)
        self.agent.world_model.choose_path(plain=runtime.plain)
        use_backend(self.agent, runtime.choose_backend(settings.sequence_model))
        size = settings.environment.image_size
        self.buffer = ReplayBuffer(settings.replay.capacity, (size, size, 3))
        self.sampler = Sampler(
            settings.replay,
            self.buffer,
            settings.behaviour.contexts / settings.world_model.batch_size,
            np.random.default_rng(streams[3]),
        )
        lives = settings.environment.life_loss_terminates
        self.ring = RingTensors(self.buffer, runtime.device, lives_end=lives != "nothing")
        self.learner = Learner(self.agent, self.ring, plain=runtime.plain)
        self.shards = ShardWriter(folder / REPLAY)
        self.window = self.agent.new_window(1)
        self.world_model_metrics = Window(WORLD_MODEL_METRICS)
        self.behaviour_metrics = Window(BEHAVIOUR_METRICS)
        self.training_table = Table(folder / TRAINING, TRAINING_SCHEMA)
        self.episode_table = Table(folder / EPISODES, EPISODE_SCHEMA)

        self.step = 0  # agent steps done
        self.episode = 0
        self.episode_return = 0.0
        self.episode_length = 0
        self.frame, _ = self.environment.reset(seed=environment_seed)
        self.log_mark = (time.monotonic(), 0)
        self.saved_at = time.monotonic()
        self.agent.eval()

    def checkpoint_is_due(self) -> bool:
        """Say whether it is time for the next checkpoint."""
        if every := self.runtime.checkpoint_every:
            return self.step % every == 0
        return time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write tables and checkpoint, in this order, each as a whole.

        Raises:
            TrainingFailed: when a loss or parameter is not finite; the earlier checkpoint stays.
        """
        self.check_losses()
        if name := self.not_finite():
            raise self.failure(f"at step {self.step} {name} is not finite")
        self.training_table.write()
        self.episode_table.write()
        save_checkpoint(self.folder / CHECKPOINT, self.fingerprint, self.state_dict())
        self.saved_at = time.monotonic()

    def check_losses(self) -> None:
        """Raise TrainingFailed when a loss since the last check is not finite."""
        try:
            self.world_model_metrics.check()
            self.behaviour_metrics.check()
        except NonFiniteLoss as error:
            raise self.failure(str(error)) from None

    def not_finite(self) -> str | None:
        """Return the name of a parameter or buffer that holds NaN or infinity, if there is one."""
        state = self.agent.state_dict().items()
        return next((name for name, tensor in state if not tensor.isfinite().all()), None)

    def failure(self, problem: str) -> TrainingFailed:
        """Return the error that says what went wrong and which state was the last good one."""
        checkpoint = self.folder / CHECKPOINT
        last = f"the last good state is {checkpoint}" if checkpoint.exists() else (
            "there is no checkpoint yet"
        )  # fmt: skip
        return TrainingFailed(f"{self.folder}: {problem}; training cannot go on; {last}")

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state of the run, but for replay rows that lie in shards."""
        cuda = self.runtime.device.type == "cuda"
        return {
            "agent": dict(self.agent.state_dict()),
            **self.learner.state_dict(),
            "generators": {
                "torch": torch.get_rng_state(),
                "random_actions": self.random_actions.bit_generator.state,
                **({"cuda": torch.cuda.get_rng_state(self.runtime.device)} if cuda else {}),
            },
            "replay": {
                "sampler": self.sampler.state_dict(),
                "rows_in_shards": self.shards.rows_written,
                "tail": self.buffer.columns(self.shards.rows_written, self.buffer.total),
            },
            "environment": self.environment.save_state(),
            "window": self.window.state_dict(),
            "episode": {
                "step": self.step,
                "episode": self.episode,
                "episode_return": self.episode_return,
                "episode_length": self.episode_length,
                "frame": self.frame,
            },
            "metrics": {
                "world_model": self.world_model_metrics.state_dict(),
                "behaviour": self.behaviour_metrics.state_dict(),
            },
        }

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one; says whether there was.

        Raises:
            CheckpointError, ShardError: when files are damaged or belong to another run.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        state = load_checkpoint(path, self.fingerprint)
        try:
            self.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: does not fit this code and these libraries: {reason(error)}. Go on with "
                "those that wrote it, or move the run's folder away to train it anew."
            ) from error
        if name := self.not_finite():
            raise CheckpointError(
                f"{path}: {name} is not finite. Put back an earlier copy, or move the run's folder "
                "away to train it anew."
            )
        for table in (self.training_table, self.episode_table):
            table.resume(self.step)
        self.log_mark = (time.monotonic(), self.step)
        return True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        agent = {name: torch.from_numpy(value) for name, value in state["agent"].items()}
        self.agent.load_state_dict(agent, strict=True)
        self.learner.load_state_dict(state)
        self._restore_replay(state["replay"])
        self.environment.load_state(state["environment"])
        self.window.load_state_dict(state["window"])
        for name, value in state["episode"].items():
            setattr(self, name, value)
        self.world_model_metrics.load_state_dict(state["metrics"]["world_model"])
        self.behaviour_metrics.load_state_dict(state["metrics"]["behaviour"])
        generators = state["generators"]
        self.random_actions.bit_generator.state = generators["random_actions"]
        torch.set_rng_state(torch.from_numpy(generators["torch"]))
        if "cuda" in generators and self.runtime.device.type == "cuda":
            cuda = torch.from_numpy(generators["cuda"])
            torch.cuda.set_rng_state(cuda, self.runtime.device)

    def _restore_replay(self, state: dict[str, Any]) -> None:
        written = state["rows_in_shards"]
        total = written + len(state["tail"]["step"])
        first = max(0, total - self.buffer.capacity)
        for columns in iterate_shards(self.folder / REPLAY, min(first, written), written):
            self.buffer.extend(columns)
        self.buffer.extend(state["tail"])
        self.ring.follow()
        self.shards.rows_written = written
        self.sampler.load_state_dict(state["sampler"])
