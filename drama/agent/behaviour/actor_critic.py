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
from drama.agent.settings import BehaviourSettings
from drama.agent.shapes import check_shapes

ACTOR_LAST_GAIN = 0.001
HIDDEN_GAIN = 2**0.5
INPUT_LIMIT = 10.0


def initialise_orthogonal(net: nn.Sequential, last_gain: float) -> None:
    """Start linear layers orthogonal, with gain sqrt(2) but for the last; biases zero."""
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linear[-1] else HIDDEN_GAIN)
        nn.init.zeros_(layer.bias)


class InputNormaliser(nn.Module):
    """Normalise inputs by the mean and variance of all that was seen (Welford, in batches).

    The statistics are buffers: saved with the weights, changed only by `update`.

    Args:
        width: number of inputs.
        epsilon: added to the variance.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon
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
        scaled = (inputs.float() - self.mean) * torch.rsqrt(variance + self.epsilon)
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
        bins: two-hot bins of the critic.
        bin_limit: their outermost position in symlog space.
        settings: the behaviour's settings.
    """

    def __init__(
        self, width: int, actions: int, bins: int, bin_limit: float, settings: BehaviourSettings
    ) -> None:
        super().__init__()
        self.settings, self.width = settings, width
        self.actor = Actor(width, actions, settings)
        self.critic = multilayer_perceptron(width, settings.critic_hidden, settings.layers, bins)
        initialise_orthogonal(self.critic, last_gain=0.0)  # every state starts with value 0
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.two_hot = TwoHot(bins, bin_limit)
        self.return_scale = ReturnScale(settings.return_percentiles, settings.return_ema)

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
        returns, slow_returns = (self._returns(trajectories, v) for v in (values, slow_values))
        self.return_scale.update(returns)

        advantage = (returns - values[:, :-1]) / self.return_scale()  # [B, H]
        log_policy = torch.log_softmax(self.actor(acted_on), -1)  # [B, H, A]
        chosen = log_policy.gather(-1, trajectories.actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
        actor = -(chosen * advantage).mean() - self.settings.entropy_weight * entropy
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

    def _returns(self, trajectories: Trajectories, values: Tensor) -> Tensor:
        return lambda_return(
            trajectories.rewards,
            trajectories.terminations,
            values,
            self.settings.discount,
            self.settings.lambda_,
            as_published=self.settings.as_published,
        )

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic by one step of its running average."""
        decay = self.settings.slow_critic_ema
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
