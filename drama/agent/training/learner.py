"""One update of the world model, one of the behaviour: functions of tensors on one device.

Neither asks anything of the CPU, so that a GPU can go through whole updates, as a CUDA graph or
otherwise, while Python is ahead of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drama.agent.behaviour.agent import Agent
from drama.agent.behaviour.imagination import imagine
from drama.agent.replay.tensors import RingTensors
from drama.agent.training.optim import LaProp


class Learner:
    """Learns from the replay ring.

    Args:
        agent: what learns.
        ring: where batches are read from; all lies on its device.
        plain: whether to encode every frame of every context, also the same one twice.
    """

    def __init__(self, agent: Agent, ring: RingTensors, *, plain: bool) -> None:
        self.agent, self.settings, self.ring, self.device = agent, agent.settings, ring, ring.device
        # How many frames differ is not known before: a GPU would have to be asked.
        self.encodes_once = self.device.type == "cpu" and not plain
        self.world_model_optimiser = LaProp(
            dict(agent.world_model.named_parameters()), self.settings.world_model.optimiser
        )
        self.behaviour_optimiser = LaProp(
            {n: p for n, p in agent.behaviour.named_parameters() if p.requires_grad},
            self.settings.behaviour.optimiser,
        )

    def update_world_model(self, rows: Tensor, reward_rows: Tensor) -> Tensor:
        """Update the world model on a batch of windows.

        Args:
            rows: of the ring, int64 [B, L].
            reward_rows: the rows that rewards are read from, int64 [B, L].

        Returns:
            What `WORLD_MODEL_METRICS` names, float64 [7].
        """
        model = self.agent.world_model.train()
        with self._autocast():
            losses = model.loss(*self.ring.read(rows, reward_rows))
        norm = self.world_model_optimiser.minimise(losses.total)
        model.eval()
        return _row(
            losses.total, losses.reconstruction, losses.reward, losses.termination,
            losses.dynamics, losses.representation, norm,
        )  # fmt: skip

    def update_behaviour(self, rows: Tensor) -> Tensor:
        """Update actor and critic on trajectories imagined from contexts.

        Args:
            rows: of the ring, int64 [B, L].

        Returns:
            What `BEHAVIOUR_METRICS` names, float64 [7].
        """
        shown, places = rows, None
        if self.encodes_once:
            shown, places = torch.unique(rows, return_inverse=True)
        behaviour = self.agent.behaviour
        with self._autocast():
            trajectories = imagine(
                self.agent.world_model,
                behaviour.actor.sample,
                self.ring.frames(shown),
                self.ring.actions(rows),
                self.settings.behaviour.horizon,
                places,
                as_published=self.settings.behaviour.as_published,
            )
            losses = behaviour.loss(trajectories)
        norm = self.behaviour_optimiser.minimise(losses.total)
        behaviour.update_slow_critic()
        return _row(
            losses.actor, losses.critic, losses.entropy, losses.return_scale,
            losses.imagined_reward, losses.imagined_value, norm,
        )  # fmt: skip

    def _autocast(self) -> torch.autocast:
        """Return the precision that the settings name."""
        precision = self.settings.training.precision
        on_gpu = self.device.type == "cuda"
        enabled = precision == "bfloat16" or (precision == "auto" and on_gpu)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimisers' states."""
        return {
            "world_model_optimiser": self.world_model_optimiser.state_dict(),
            "behaviour_optimiser": self.behaviour_optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; other keys are left alone."""
        self.world_model_optimiser.load_state_dict(state["world_model_optimiser"])
        self.behaviour_optimiser.load_state_dict(state["behaviour_optimiser"])


def _row(*values: Tensor) -> Tensor:
    return torch.stack([value.detach().double() for value in values])
