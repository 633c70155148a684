"""Actor and critic, and what they learn from imagined trajectories (section 2.4 of the paper)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drama.agent.behaviour.imagination import Trajectories
from drama.agent.behaviour.returns import ReturnScale, lambda_return
from drama.agent.model.distributions import TwoHot, sample_one_hot
from drama.agent.model.nets import multilayer_perceptron
from drama.agent.settings import BehaviourSettings, Settings
from drama.agent.shapes import check_shapes

ACTOR_LAST_GAIN = 0.001
HIDDEN_GAIN = 2**0.5
INPUT_LIMIT = 10.0
VARIANCE_EPSILON = 1e-8


def initialise_orthogonal(net: nn.Sequential, last_gain: float) -> None:
    """Start linear layers orthogonal, with gain sqrt(2) but for the last; biases zero."""
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linear[-1] else HIDDEN_GAIN)
        nn.init.zeros_(layer.bias)


class InputNormaliser(nn.Module):
    """Normalise inputs by the mean and variance of all that was seen (Welford, in batches).

    The statistics, [width], are buffers: saved with the weights, changed only by `update`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))  # summed squared deviations

    @torch.no_grad()
    def update(self, inputs: Tensor) -> None:
        """Take in a batch of inputs [..., width]."""
        flat = inputs.detach().float().flatten(0, -2)  # [inputs, width]
        added = flat.shape[0]
        total = self.count + added
        mean = flat.mean(0)
        shift = mean - self.mean
        share = (added / total).float()
        self.squares += (flat - mean).square().sum(0) + shift.square() * (
            self.count * share
        ).float()
        self.mean += shift * share
        self.count.copy_(total)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise inputs [..., width] and clip them to [-10, 10]; identity before any update."""
        variance = torch.where(
            self.count > 0,
            self.squares / self.count.clamp(min=1).float(),
            torch.ones_like(self.mean),
        )
        scaled = (inputs.float() - self.mean) * torch.rsqrt(variance + VARIANCE_EPSILON)
        return scaled.clamp(-INPUT_LIMIT, INPUT_LIMIT)


class Actor(nn.Module):
    """The policy: normalised states to action logits.

    Args:
        width: width of a state, Z + D.
        actions: A.
        settings: hidden width and number of layers.
    """

    def __init__(self, width: int, actions: int, settings: BehaviourSettings) -> None:
        super().__init__()
        self.normaliser = InputNormaliser(width)
        self.net = multilayer_perceptron(width, settings.actor_hidden, settings.layers, actions)
        initialise_orthogonal(self.net, ACTOR_LAST_GAIN)

    def forward(self, states: Tensor) -> Tensor:
        """Return action logits: states [..., Z + D] to [..., A], float32."""
        return self.net(self.normaliser(states)).float()

    @torch.no_grad()
    def sample(self, states: Tensor) -> Tensor:
        """Draw actions from the policy: states [..., Z + D] to int64 [...]."""
        return self.draw(self(states))

    def draw(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw actions from logits [..., A]: int64 [...]; `noise` as `sample_one_hot` takes it."""
        return sample_one_hot(torch.softmax(logits, -1), noise).argmax(-1)


@dataclass(frozen=True)
class BehaviourLosses:
    """Scalars of one behaviour update; `total` is what is minimised."""

    total: Tensor
    actor: Tensor
    critic: Tensor
    entropy: Tensor
    return_scale: Tensor
    imagined_reward: Tensor
    imagined_value: Tensor


class Behaviour(nn.Module):
    """Actor, critic, slow critic and the running statistics they learn with.

    Args:
        width: width of a state, Z + D.
        actions: A.
        settings: section `behaviour`, and the two-hot bins of section `world_model`, are used.
    """

    def __init__(self, width: int, actions: int, settings: Settings) -> None:
        super().__init__()
        own, bins = settings.behaviour, settings.world_model.bins
        self.settings, self.width = own, width
        self.actor = Actor(width, actions, own)
        self.critic = multilayer_perceptron(width, own.critic_hidden, own.layers, bins)
        initialise_orthogonal(self.critic, last_gain=0.0)  # every state starts with value 0
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.two_hot = TwoHot(bins, settings.world_model.bin_limit)
        self.return_scale = ReturnScale(own.return_percentiles, own.return_ema)

    def loss(self, trajectories: Trajectories) -> BehaviourLosses:
        """Compute the losses of actor and critic; updates the running statistics first.

        Actor: REINFORCE on the advantage (G - V) / max(1, scale) with an entropy bonus. Critic:
        two-hot cross-entropy to the lambda-return G, and to the slow critic's as a regulariser.
        Steps after an imagined termination stay in the losses, as published.

        Raises:
            ValueError: for trajectories of other shapes than `Trajectories` says.
        """
        states = trajectories.states  # [B, H + 1, Z + D]
        check_shapes(
            {"width": self.width},
            states=(states, "B H+1 width"),
            actions=(trajectories.actions, "B H"),
            rewards=(trajectories.rewards, "B H"),
            terminations=(trajectories.terminations, "B H"),
        )
        acted_on = states[:, :-1]  # [B, H, Z + D]
        self.actor.normaliser.update(acted_on)
        value_logits = self.critic(states)  # [B, H + 1, bins]
        values = self.two_hot.decode(value_logits.detach())  # [B, H + 1]
        with torch.no_grad():
            slow_values = self.two_hot.decode(self.slow_critic(states))
        settings = self.settings
        returns, slow_returns = (
            lambda_return(
                trajectories.rewards, trajectories.terminations, bootstraps, settings.discount,
                settings.lambda_, as_published=settings.as_published,
            )
            for bootstraps in (values, slow_values)
        )  # fmt: skip
        self.return_scale.update(returns)

        advantage = (returns - values[:, :-1]) / self.return_scale()  # [B, H]
        log_policy = torch.log_softmax(self.actor(acted_on), -1)  # [B, H, A]
        chosen = log_policy.gather(-1, trajectories.actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
        actor = -(chosen * advantage).mean() - settings.entropy_weight * entropy
        predicted = value_logits[:, :-1]
        critic = (
            self.two_hot.loss(predicted, returns) + self.two_hot.loss(predicted, slow_returns)
        ).mean()
        return BehaviourLosses(
            total=actor + critic,
            actor=actor,
            critic=critic,
            entropy=entropy,
            return_scale=self.return_scale.average.clone(),
            imagined_reward=trajectories.rewards.mean(),
            imagined_value=values.mean(),
        )

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic by one step of its running average."""
        decay = self.settings.slow_critic_ema
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
