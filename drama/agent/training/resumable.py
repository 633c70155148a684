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
from drama.files import flatten
from drama.runs.checkpoint import CheckpointError, Form, does_not_fit, save_checkpoint
from drama.runs.folder import CHECKPOINT, EPISODES, REPLAY, TRAINING, load_latest
from drama.runs.metrics import (
    BEHAVIOUR_METRICS,
    EPISODE_SCHEMA,
    TRAINING_SCHEMA,
    WORLD_MODEL_METRICS,
    NonFiniteLoss,
    Table,
    Window,
)
from drama.runs.shards import (
    ROWS_PER_SHARD,
    ShardWriter,
    check_shards,
    checksums,
    iterate_shards,
)

OPTIONAL = ("generators/cuda", "replay/shards", "tables/")
"""What a checkpoint may lack: what only a GPU has, and what version 0.2.0 did not write."""
MOST_OF_GENERATOR = 2**16
"""Bytes of a generator's state; PyTorch's has 5056."""
MOST_OF_EMULATOR = 2**24
"""Bytes of an emulator's state, and of the actions of one episode."""


class TrainingFailed(DramaError):
    """The run cannot go on; the text says why and from where it could."""


class NotSaved(DramaError):
    """A file of the run could not be written; what was saved before is as it was."""


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
        rows = min(ROWS_PER_SHARD, settings.replay.capacity)
        self.shards = ShardWriter(folder / REPLAY, rows)
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
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.agent.eval()

    def checkpoint_is_due(self) -> bool:
        """Say whether it is time for the next checkpoint."""
        if every := self.runtime.checkpoint_every:
            return self.step % every == 0
        return time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS

    def begin(self) -> None:
        """Go on from the last good checkpoint, or save the first one, of step 0.

        So a folder without a checkpoint holds no step of the run.

        Raises:
            CheckpointError, ShardError: when files are damaged, gone or of another run.
            TrainingFailed: as `save`.
        """
        if not self.resume():
            self.save_state()

    def save(self) -> None:
        """Write the checkpoint, then the tables that show what it holds, each as a whole.

        Raises:
            TrainingFailed: when a loss or parameter is not finite; the earlier checkpoint stays.
        """
        self.check_losses()
        if name := self.not_finite():
            raise self.failure(f"at step {self.step} {name} is not finite")
        self.save_state()
        self.training_table.write()
        self.episode_table.write()

    def save_state(self) -> None:
        """Write the checkpoint alone."""
        save_checkpoint(self.folder / CHECKPOINT, self.fingerprint, self.state_dict())
        self.saved_at, self.saved_step = time.monotonic(), self.step

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
        return TrainingFailed(
            f"{self.folder}: {problem}; training cannot go on; the last good state is "
            f"{self.folder / CHECKPOINT}, of step {self.saved_step}"
        )

    def not_saved(self, error: OSError) -> NotSaved:
        """Return the error that says which file could not be written, and what is saved."""
        return NotSaved(
            f"{error.filename or self.folder}: {reason(error)}. The run is saved to step "
            f"{self.saved_step} of {self.settings.training.total_steps}; when this is mended, the "
            "same command goes on from there"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state of the run, but for replay rows that lie in shards."""
        cuda = self.runtime.device.type == "cuda"
        rows = self.shards.rows_in_full  # the last shard, if it is short, may be written again
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
                "rows_in_shards": rows,
                "shards": list(self.shards.sha256),
                "tail": self.buffer.columns(rows, self.buffer.total),
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
            "tables": {
                "training": self.training_table.state_dict(),
                "episodes": self.episode_table.state_dict(),
            },
        }

    def resume(self) -> bool:
        """Go on from the last good checkpoint, if there is one; says whether there was.

        Raises:
            CheckpointError, ShardError: when files are damaged, gone or of another run.
        """
        state = load_latest(self.folder, self.fingerprint, self.forms(), OPTIONAL)
        if state is None:
            return False
        path = self.folder / CHECKPOINT
        try:
            self.load_state_dict(state)
        except (
            KeyError, OverflowError, RuntimeError, TypeError, ValueError,
            SystemError,  # ale-py's, of an emulator that is none
        ) as error:  # fmt: skip
            raise does_not_fit(path, reason(error)) from error
        if name := self.not_finite():
            raise CheckpointError(
                f"{path}: {name} is not finite. Put back an earlier copy, or move the run's folder "
                "away to train it anew."
            )
        return True

    def forms(self) -> dict[str, Form]:
        """Return what everything in a checkpoint of this run must be, by its flat name."""
        training = self.settings.training
        lengths = {
            "environment/": range(MOST_OF_EMULATOR),
            "generators/": range(MOST_OF_GENERATOR),
            "metrics/": range(training.log_every + 1),
            "replay/sampler/": range(self.buffer.capacity + 1),
            "replay/tail/": range(self.shards.rows_per_shard + 1),
            "tables/": range(training.total_steps + 1),
        }
        forms: dict[str, Form] = {"generators/cuda": ("|u1", (range(MOST_OF_GENERATOR),))}
        for name, value in flatten(self.state_dict()).items():
            if not isinstance(value, np.ndarray | torch.Tensor):
                forms[name] = type(value)
                continue
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
            any_of = [sizes for section, sizes in lengths.items() if name.startswith(section)]
            forms[name] = array.dtype.str, (*any_of, *array.shape[len(any_of) :])
        return forms

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        agent = {name: torch.from_numpy(value) for name, value in state["agent"].items()}
        self.agent.load_state_dict(agent, strict=True)
        self.learner.load_state_dict(state)
        self._restore_replay(state["replay"])
        self.environment.load_state(state["environment"])
        self.window.load_state_dict(state["window"])
        self._restore_episode(state["episode"])
        self.world_model_metrics.load_state_dict(state["metrics"]["world_model"])
        self.behaviour_metrics.load_state_dict(state["metrics"]["behaviour"])
        for name, table in (("training", self.training_table), ("episodes", self.episode_table)):
            if "tables" in state:
                table.load_state_dict(state["tables"][name])
            else:
                table.read(self.step)
        generators = state["generators"]
        self.random_actions.bit_generator.state = generators["random_actions"]
        torch.set_rng_state(torch.from_numpy(generators["torch"]))
        if "cuda" in generators and self.runtime.device.type == "cuda":
            cuda = torch.from_numpy(generators["cuda"])
            torch.cuda.set_rng_state(cuda, self.runtime.device)

    def _restore_episode(self, state: dict[str, Any]) -> None:
        if not state["step"] == self.buffer.total <= self.settings.training.total_steps:
            raise ValueError(f"step {state['step']} with {self.buffer.total} transitions")
        if not 0 <= state["episode_length"] <= state["step"] or state["episode"] < 0:
            raise ValueError(f"episode {state['episode']} of {state['episode_length']} steps")
        categories = ("latents", self.settings.world_model.classes), ("actions", self.agent.actions)
        for name, count in categories:
            _check_categories(name, getattr(self.window, name), count)
        self.step = self.saved_step = state["step"]
        self.episode = state["episode"]
        self.episode_return = state["episode_return"]
        self.episode_length = state["episode_length"]
        self.frame = state["frame"]

    def _restore_replay(self, state: dict[str, Any]) -> None:
        written, rows = state["rows_in_shards"], self.shards.rows_per_shard
        if "shards" in state:
            sha256 = state["shards"]
            if written != len(sha256) * rows:
                raise ValueError(f"{written} transitions in {len(sha256)} shards of {rows}")
            check_shards(self.folder / REPLAY, sha256)
        else:  # of version 0.2.0
            sha256 = checksums(self.folder / REPLAY, written // rows)
        total = written + len(state["tail"]["step"])
        first = max(0, total - self.buffer.capacity)
        for columns in iterate_shards(self.folder / REPLAY, min(first, written), written):
            self.buffer.extend(columns)
        self.buffer.extend(state["tail"])
        _check_categories("actions", self.buffer.ring()["action"], self.agent.actions)
        if not np.isfinite(self.buffer.ring()["reward"]).all():
            raise ValueError("a reward is not finite")
        self.ring.follow()
        self.shards.rows_written, self.shards.sha256 = written, list(sha256)
        self.sampler.load_state_dict(state["sampler"])


def _check_categories(name: str, values: np.ndarray, count: int) -> None:
    if values.min() < 0 or values.max() >= count:
        raise ValueError(f"{name} are {values.min()} to {values.max()}, not 0 to {count - 1}")
