"""The agent: world model and behaviour together, and how they act in a game."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.behaviour.actor_critic import Behaviour
from drama.behaviour.imagination import join_state
from drama.model.distributions import sample_one_hot
from drama.model.world_model import WorldModel
from drama.settings import Settings


class ActingWindow:
    """The last steps of several episodes played side by side.

    A frame's latent is sampled once, when the frame is seen, and kept as class indices.

    Args:
        environments: E, episodes side by side.
        length: W, steps remembered of each.
        categoricals: K.
    """

    def __init__(self, environments: int, length: int, categoricals: int) -> None:
        self.latents = np.zeros((environments, length, categoricals), np.int64)  # class indices
        self.actions = np.zeros((environments, length), np.int64)
        self.lengths = np.zeros(environments, np.int64)  # steps remembered so far

    def clear(self, environment: int) -> None:
        """Forget one environment's steps: its next episode begins."""
        self.lengths[environment] = 0

    def append(self, rows: np.ndarray, latents: np.ndarray, actions: np.ndarray) -> None:
        """Remember one step of the environments `rows`: latents [E, K], actions [E]."""
        full = rows[self.lengths[rows] == self.actions.shape[1]]
        self.latents[full, :-1] = self.latents[full, 1:]
        self.actions[full, :-1] = self.actions[full, 1:]
        self.lengths[full] -= 1
        self.latents[rows, self.lengths[rows]] = latents
        self.actions[rows, self.lengths[rows]] = actions
        self.lengths[rows] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the arrays."""
        return {name: value.copy() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved arrays; a KeyError names one that is missing."""
        for name, value in vars(self).items():
            value[...] = state[name]


class Agent(nn.Module):
    """World model, actor and critic.

    Args:
        settings: a run's settings.
        actions: A, the game's number of actions.
    """

    def __init__(self, settings: Settings, actions: int) -> None:
        super().__init__()
        self.settings = settings
        self.actions = actions
        self.world_model = WorldModel(settings, actions)
        self.behaviour = Behaviour(
            self.world_model.state_size,
            actions,
            settings.world_model.bins,
            settings.world_model.bin_limit,
            settings.behaviour,
        )

    def new_window(self, environments: int) -> ActingWindow:
        """Return an empty window for E environments."""
        return ActingWindow(
            environments,
            self.settings.behaviour.acting_window,
            self.settings.world_model.categoricals,
        )

    def noise_shape(self) -> tuple[int, int, int]:
        """Return the shape of the noise one environment needs for one step: [2, K, C]."""
        return (2, *self.world_model.latent_shape)

    @torch.no_grad()
    def act(
        self,
        window: ActingWindow,
        rows: np.ndarray,
        frames: np.ndarray,
        random_actions: np.ndarray,
        noise: Tensor | None = None,
        *,
        greedy: bool,
    ) -> np.ndarray:
        """Choose one action for each of E environments and remember the step in the window.

        The dynamics run over the window of past steps; the policy sees the prior of the current
        frame's latent (or a sample of its encoding, by `act_on`) and d. An environment whose
        window is empty, at the first step of an episode, takes its random action.

        Args:
            window: holds at least the environments `rows`.
            rows: the environments to act in, int64 [E].
            frames: current frames, uint8 [E, H, W, 3].
            random_actions: int64 [E]; negative where the policy decides.
            noise: Exponential(1) draws [E, 2, K, C] for prior and posterior samples; by default
                from torch's global generator.
            greedy: take the most probable action instead of a sample.

        Returns:
            Actions, int64 [E].
        """
        model = self.world_model
        assert not model.training, "acting uses running statistics: call eval() first"
        device = model.prior_head.weight.device
        if noise is None:
            noise = torch.empty(len(rows), *self.noise_shape(), device=device).exponential_()
        noise = noise.to(device)
        posterior = model.posterior(torch.from_numpy(frames).to(device))  # [E, K, C]
        encoded = sample_one_hot(posterior, noise[:, 1])
        actions = random_actions.copy()
        undecided = actions < 0
        assert (window.lengths[rows][undecided] > 0).all(), "the first action must be random"
        if undecided.any():
            here = torch.from_numpy(np.flatnonzero(undecided)).to(device)
            d = self._dynamics(window, rows[undecided], device)  # [E', D]
            latents = (
                sample_one_hot(model.prior(d), noise[here, 0])
                if self.settings.behaviour.act_on == "prior"
                else encoded[here]
            )
            states = join_state(latents, d)
            actor = self.behaviour.actor
            chosen = actor(states).argmax(-1) if greedy else actor.sample(states)
            actions[undecided] = chosen.cpu().numpy()
        window.append(rows, encoded.argmax(-1).cpu().numpy(), actions)
        return actions

    def _dynamics(self, window: ActingWindow, rows: np.ndarray, device: torch.device) -> Tensor:
        """Run the dynamics over the windows of some environments; returns the last d, [E, D].

        Shorter windows are padded behind their end, which a causal model does not see.
        """
        lengths = window.lengths[rows]
        longest = lengths.max()
        classes = torch.from_numpy(window.latents[rows, :longest]).to(device)  # [E, L, K]
        actions = torch.from_numpy(window.actions[rows, :longest]).to(device)  # [E, L]
        latents = F.one_hot(classes, self.world_model.latent_shape[1]).float()
        d, _ = self.world_model.sequence(self.world_model.inputs(latents, actions))
        last = torch.from_numpy(lengths - 1).to(device)
        return d[torch.arange(len(rows), device=device), last]
