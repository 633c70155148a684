"""The agent: world model and behaviour together, and how they act in a game."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.behaviour.actor_critic import Behaviour
from drama.agent.behaviour.imagination import join_state
from drama.agent.model.distributions import sample_one_hot
from drama.agent.model.world_model import WorldModel
from drama.agent.settings import Settings
from drama.agent.shapes import check_shapes


class ActingWindow:
    """The last steps of several episodes played side by side.

    A frame's latent is sampled once, when the frame is seen, and kept as class indices.

    Args:
        environments: E, episodes side by side.
        length: L, steps remembered of each.
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
        self.behaviour = Behaviour(self.world_model.state_size, actions, settings)

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
        action_noise: Tensor | None = None,
        decide: Callable[..., Tensor] | None = None,
    ) -> np.ndarray:
        """Choose one action for each of E environments and remember the step in the window.

        The dynamics run over the window of past steps; the policy sees the prior of the current
        frame's latent (or a sample of its encoding, by `act_on`) and d. An environment whose
        window is empty, at the first step of an episode, takes its random action.

        Args:
            window: holds at least the environments `rows`.
            rows: the environments to act in, int64 [E].
            frames: current frames, uint8 [E, S, S, 3].
            random_actions: int64 [E]; negative where the policy decides.
            noise: Exponential(1) draws [E, 2, K, C] for prior and posterior samples; by default
                from torch's global generator.
            greedy: take the most probable action instead of a sample.
            action_noise: Exponential(1) draws [E, A] for sampled actions; by default from torch's
                global generator.
            decide: stands in for `Agent.decide`, such as a recording of it for this E.

        Returns:
            Actions, int64 [E].

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(
            self.world_model.sizes,
            rows=(rows, "E"),
            frames=(frames, "E S S 3"),
            random_actions=(random_actions, "E"),
            noise=(noise, "E 2 K C"),
            action_noise=(action_noise, "E A"),
        )
        assert not self.world_model.training, "acting uses running statistics: call eval() first"
        undecided = random_actions < 0
        lengths = window.lengths[rows]
        assert (lengths[undecided] > 0).all(), "the first action must be random"
        device = self.world_model.prior_head.weight.device
        if noise is None:
            noise = torch.empty(len(rows), *self.noise_shape(), device=device).exponential_()
        given = frames, window.latents[rows], window.actions[rows], np.maximum(lengths, 1)
        tensors = [*map(torch.from_numpy, given), noise]
        if action_noise is not None:
            tensors.append(action_noise)
        decided = (decide or self.decide)(*(tensor.to(device) for tensor in tensors))
        chosen = decided.cpu().numpy()  # [E, 2 + K]
        actions = np.where(undecided, chosen[:, 0 if greedy else 1], random_actions)
        window.append(rows, chosen[:, 2:], actions)
        return actions

    @torch.no_grad()
    def explore(
        self, frames: Tensor, latents: Tensor, actions: Tensor, lengths: Tensor, noise: Tensor
    ) -> Tensor:
        """Decide as `decide` does, with the temperature that is set for acting while training."""
        temperature = self.settings.behaviour.temperature
        return self.decide(frames, latents, actions, lengths, noise, temperature=temperature)

    @torch.no_grad()
    def decide(
        self,
        frames: Tensor,
        latents: Tensor,
        actions: Tensor,
        lengths: Tensor,
        noise: Tensor,
        action_noise: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Look at the current frames and decide what the policy would do.

        Windows that are not full are padded behind their end, which a causal model does not see.

        Args:
            frames: uint8 [E, S, S, 3].
            latents: class indices of the window's steps, int64 [E, L, K].
            actions: int64 [E, L].
            lengths: steps in each window, at least 1, int64 [E].
            noise: Exponential(1) [E, 2, K, C].
            action_noise: Exponential(1) [E, A], or None for torch's global generator.
            temperature: of the policy that the sampled action is drawn from.

        Returns:
            int64 [E, 2 + K]: the most probable action, a sampled one, and the class indices of a
            sample of the frame's posterior.

        Raises:
            ValueError: for shapes other than these.
        """
        check_shapes(
            self.world_model.sizes,
            frames=(frames, "E S S 3"),
            latents=(latents, "E L K"),
            actions=(actions, "E L"),
            lengths=(lengths, "E"),
            noise=(noise, "E 2 K C"),
            action_noise=(action_noise, "E A"),
        )
        model, actor = self.world_model, self.behaviour.actor
        encoded = sample_one_hot(model.posterior(frames), noise[:, 1])  # [E, K, C]
        past = F.one_hot(latents, model.latent_shape[1]).float()  # [E, L, K, C]
        d, _ = model.sequence(model.inputs(past, actions))  # [E, L, D]
        last = (lengths - 1)[:, None, None].expand(-1, -1, d.shape[-1])
        d = d.gather(1, last).squeeze(1)  # [E, D]
        predicted = sample_one_hot(model.prior(d), noise[:, 0])
        on_prior = self.settings.behaviour.act_on == "prior"
        states = join_state(predicted if on_prior else encoded, d)
        logits = actor(states)
        choices = torch.stack(  # [E, 2]
            [logits.argmax(-1), actor.draw(logits / temperature, action_noise)], -1
        )
        return torch.cat([choices, encoded.argmax(-1)], -1)
