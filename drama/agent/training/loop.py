"""The training loop: act, store, learn the model, learn the behaviour, log, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drama.agent.behaviour.agent import Agent
from drama.agent.env import make
from drama.agent.model.sequence import kernels, use_backend
from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.agent.replay.sampling import Sampler
from drama.agent.replay.tensors import RingTensors
from drama.agent.settings import Backend, Recipe, SequenceModelSettings
from drama.agent.training.graphs import Recorded
from drama.agent.training.learner import Learner
from drama.errors import DramaError, reason
from drama.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from drama.runs.folder import CHECKPOINT, EPISODES, REPLAY, STATUS, TRAINING
from drama.runs.metrics import (
    BEHAVIOUR_METRICS,
    EPISODE_SCHEMA,
    TRAINING_SCHEMA,
    WORLD_MODEL_METRICS,
    NonFiniteLoss,
    Table,
    Window,
)
from drama.runs.progress import Reporter, Status
from drama.runs.shards import ShardWriter, iterate_shards
from drama.runs.stopping import Stopped, stop_on_signal

CHECKPOINT_SECONDS = 300.0
"""What an interruption costs at most; a save takes a second or two."""


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; nothing here changes its result beyond rounding.

    Attributes:
        device: where tensors live.
        threads: CPU threads of PyTorch; the same number gives the same bytes.
        checkpoint_every: agent steps between checkpoints; by default `CHECKPOINT_SECONDS` apart.
        plain: whether to take the plain path, which the fast one equals but for rounding.
        backend: of the sequence model, auto, torch or mamba_ssm; the plain path's is torch.
    """

    device: torch.device
    threads: int
    checkpoint_every: int | None
    plain: bool = False
    backend: Backend = "auto"

    def choose_backend(self, settings: SequenceModelSettings) -> kernels.Choice:
        """Choose the sequence model's backend; raises ConfigurationError as `kernels.choose`."""
        return kernels.choose("torch" if self.plain else self.backend, self.device, settings)


class TrainingFailed(DramaError):
    """The run cannot go on; the text says why and from where it could."""


class Trainer:
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
        self.learner = Learner(self.agent, settings, self.ring, runtime.device, plain=runtime.plain)
        records = runtime.device.type == "cuda" and not runtime.plain
        self.graph_memory = torch.cuda.graph_pool_handle() if records else None
        self.update_world_model = self.recorded(self.learner.update_world_model)
        self.update_behaviour = self.recorded(self.learner.update_behaviour)
        self.decide = self.recorded(self.agent.explore)
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

    # --- the algorithm ---------------------------------------------------------------------------

    def run(self, reporter: Reporter, stop_requested: Callable[[], bool]) -> None:
        """Train to the end, or until asked to stop.

        Raises:
            Stopped: after saving, when `stop_requested` says so.
            TrainingFailed: when a loss is not finite.
        """
        training = self.settings.training
        while self.step < training.total_steps:
            self.act_and_store(reporter)
            if self.step >= training.random_steps:
                if self.step % training.world_model_every == 0:
                    self.learn_world_model()
                if self.step % training.behaviour_every == 0:
                    self.learn_behaviour()
            if self.step % training.log_every == 0:
                self.log(reporter)
            reporter.tick(self.step)
            if stop_requested():
                self.save()
                raise Stopped(
                    f"stopped at step {self.step} of {training.total_steps}; saved. "
                    "The same command goes on from here."
                )
            if self.checkpoint_is_due():
                self.save()
        self.shards.finish(self.buffer)
        self.save()

    def act_and_store(self, reporter: Reporter) -> None:
        """Take one step in the game and remember it."""
        exploring = self.step < self.settings.training.random_steps
        random_action = self.random_actions.integers(self.agent.actions)
        decided = exploring or self.episode_length == 0 or self.ignores_policy()
        action = self.agent.act(
            self.window,
            np.array([0]),
            self.frame[None],
            np.array([random_action if decided else -1]),
            greedy=False,
            decide=self.decide,
        )[0]
        frame, reward, terminated, truncated, info = self.environment.step(int(action))
        self.buffer.append(
            Transition(
                self.frame, int(action), float(reward), terminated, truncated,
                info["life_lost"], self.episode,
            )
        )  # fmt: skip
        self.ring.follow()
        self.shards.write_full(self.buffer)
        self.frame = frame
        self.step += 1
        self.episode_return += float(reward)
        self.episode_length += 1
        ended_early = (
            info["life_lost"] and self.settings.environment.life_loss_terminates == "episode"
        )
        if terminated or truncated or ended_early:
            self.end_episode(truncated, reporter)

    def ignores_policy(self) -> bool:
        """Say whether `epsilon` has this action drawn at random; draws nothing where it is 0."""
        epsilon = self.settings.behaviour.epsilon
        return epsilon > 0 and self.random_actions.random() < epsilon

    def end_episode(self, truncated: bool, reporter: Reporter) -> None:
        """Note a finished episode and begin the next."""
        self.episode_table.append(
            {
                "episode": self.episode,
                "step": self.step,
                "episode_return": self.episode_return,
                "length": self.episode_length,
                "truncated": truncated,
            }
        )
        reporter.status.last_return = self.episode_return
        self.episode += 1
        self.episode_return, self.episode_length = 0.0, 0
        self.frame, _ = self.environment.reset()
        self.window.clear(0)

    def learn_world_model(self) -> None:
        """Update the world model on a batch of windows."""
        settings = self.settings.world_model
        windows = self.sampler.draw_world_model(settings.batch_size, settings.sequence_length)
        self.note(self.world_model_metrics, self.update_world_model(*self.tensors(*windows)))

    def learn_behaviour(self) -> None:
        """Update actor and critic on imagined trajectories."""
        settings = self.settings.behaviour
        windows = self.sampler.draw_imagination(settings.contexts, settings.context_length)
        self.note(self.behaviour_metrics, self.update_behaviour(*self.tensors(windows.rows)))

    # --- around it -------------------------------------------------------------------------------

    def recorded(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return the function as a CUDA graph, or as it is where there is none."""
        if self.graph_memory is None:
            return function
        return Recorded(function, self.runtime.device, function.__name__, self.graph_memory)

    def tensors(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Turn arrays into tensors from which the device copies without anyone waiting."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.runtime.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.runtime.device, non_blocking=True) for tensor in tensors]

    def note(self, metrics: Window, values: torch.Tensor) -> None:
        """Add an update's scalars; on a CPU, where it costs nothing, check them at once."""
        metrics.add(self.step, values)
        if self.runtime.device.type == "cpu":
            self.check(metrics)

    def check(self, metrics: Window) -> None:
        """Stop the run when a loss is not finite."""
        try:
            metrics.check()
        except NonFiniteLoss as error:
            raise self.failure(str(error)) from None

    def failure(self, problem: str) -> TrainingFailed:
        """Return the error that says what went wrong and which state was the last good one."""
        checkpoint = self.folder / CHECKPOINT
        last = f"the last good state is {checkpoint}" if checkpoint.exists() else (
            "there is no checkpoint yet"
        )  # fmt: skip
        return TrainingFailed(f"{self.folder}: {problem}; training cannot go on; {last}")

    def log(self, reporter: Reporter) -> None:
        """Add a row to the training table."""
        for metrics in (self.world_model_metrics, self.behaviour_metrics):
            self.check(metrics)
        now = time.monotonic()
        then, before = self.log_mark
        self.log_mark = (now, self.step)
        means = self.world_model_metrics.means() | self.behaviour_metrics.means()
        rate = (self.step - before) / max(now - then, 1e-9)
        self.training_table.append({"step": self.step, **means, "steps_per_second": rate})
        reporter.show(means)

    # --- saving and going on ---------------------------------------------------------------------

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
        for metrics in (self.world_model_metrics, self.behaviour_metrics):
            self.check(metrics)
        if name := self.not_finite():
            raise self.failure(f"at step {self.step} {name} is not finite")
        self.training_table.write()
        self.episode_table.write()
        save_checkpoint(self.folder / CHECKPOINT, self.fingerprint, self.state_dict())
        self.saved_at = time.monotonic()

    def not_finite(self) -> str | None:
        """Return the name of a parameter or buffer that holds NaN or infinity, if there is one."""
        state = self.agent.state_dict().items()
        return next((name for name, tensor in state if not tensor.isfinite().all()), None)

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
        if first < written:
            for columns in iterate_shards(self.folder / REPLAY, first, written):
                self.buffer.extend(columns)
        self.buffer.extend(state["tail"])
        self.ring.follow()
        self.shards = ShardWriter(self.folder / REPLAY, rows_written=written)
        self.sampler.load_state_dict(state["sampler"])


def train(recipe: Recipe, fingerprint: str, folder: Path, runtime: Runtime) -> Status:
    """Carry out one run, from its checkpoint if there is one.

    Returns:
        The run's last status.

    Raises:
        Stopped: when it was asked to stop; it was saved.
        TrainingFailed: when it cannot go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status = Status.resumed(folder / STATUS, fingerprint, recipe.settings.training.total_steps)
    trainer = Trainer(recipe, fingerprint, folder, runtime)
    try:
        trainer.resume()
    except DramaError as error:
        status.fail(folder / STATUS, error)
        raise
    status.step = trainer.step
    title = f"{recipe.game} seed {recipe.seed}"
    with stop_on_signal() as stop, Reporter(title, status, folder / STATUS) as reporter:
        try:
            trainer.run(reporter, stop)
            status.state = "done"
        except Stopped:
            status.state = "stopped"
            raise
        except BaseException as error:
            status.state, status.message = "failed", reason(error)
            raise
        finally:
            trainer.environment.close()
    return status
