"""The training loop: act, store, learn the model, learn the behaviour, log, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from drama.agent.replay.buffer import Transition
from drama.agent.settings import Recipe
from drama.agent.training.graphs import recorder
from drama.agent.training.resumable import ResumableRun
from drama.agent.training.runtime import Runtime
from drama.errors import DramaError, reason
from drama.runs.folder import STATUS
from drama.runs.metrics import Window
from drama.runs.progress import Reporter, Status
from drama.runs.stopping import Stopped, stop_on_signal


class Trainer(ResumableRun):
    """Trains a run: what it consists of, saves and resumes is `ResumableRun`'s."""

    def __init__(self, recipe: Recipe, fingerprint: str, folder: Path, runtime: Runtime) -> None:
        super().__init__(recipe, fingerprint, folder, runtime)
        record = recorder(runtime.device, wanted=not runtime.plain)
        self.update_world_model = record(self.learner.update_world_model)
        self.update_behaviour = record(self.learner.update_behaviour)
        self.decide = record(self.agent.explore)

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
        reporter.finish_episode(self.episode_return)
        self.episode += 1
        self.episode_return, self.episode_length = 0.0, 0
        self.frame, _ = self.environment.reset()
        self.window.clear(0)

    def learn_world_model(self) -> None:
        """Update the world model on a batch of windows."""
        settings = self.settings.world_model
        windows = self.sampler.draw_world_model(settings.batch_size, settings.sequence_length)
        self.note(self.world_model_metrics, self.update_world_model(*self.ring.send(*windows)))

    def learn_behaviour(self) -> None:
        """Update actor and critic on imagined trajectories."""
        settings = self.settings.behaviour
        windows = self.sampler.draw_imagination(settings.contexts, settings.context_length)
        self.note(self.behaviour_metrics, self.update_behaviour(*self.ring.send(windows.rows)))

    def note(self, metrics: Window, values: Tensor) -> None:
        """Add an update's scalars; on a CPU, where it costs nothing, check them at once."""
        metrics.add(self.step, values)
        if self.runtime.device.type == "cpu":
            self.check_losses()

    def log(self, reporter: Reporter) -> None:
        """Add a row to the training table."""
        self.check_losses()
        means = self.world_model_metrics.means() | self.behaviour_metrics.means()
        self.training_table.append({"step": self.step, **means})
        reporter.show(means)


def train(recipe: Recipe, fingerprint: str, folder: Path, runtime: Runtime) -> Status:
    """Carry out one run, from its checkpoint if there is one.

    Returns:
        The run's last status.

    Raises:
        Stopped: when it was asked to stop; it was saved.
        TrainingFailed: when it cannot go on.
        NotSaved: when a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status = Status.resumed(folder / STATUS, fingerprint, recipe.settings.training.total_steps)
    trainer = Trainer(recipe, fingerprint, folder, runtime)
    try:
        trainer.begin()
    except OSError as error:
        raise trainer.not_saved(error) from error
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
        except OSError as error:
            unsaved = trainer.not_saved(error)
            status.state, status.message = "failed", str(unsaved)
            raise unsaved from error
        except BaseException as error:
            status.state, status.message = "failed", reason(error)
            raise
        finally:
            trainer.environment.close()
    return status
