"""Returns of imagined trajectories, and the scale that makes advantages comparable."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lambda_return(
    rewards: Tensor,
    terminations: Tensor,
    values: Tensor,
    discount: float,
    lambda_: float,
    *,
    as_published: bool = False,
) -> Tensor:
    """Compute the lambda-return of imagined trajectories.

    G_t = r_t + discount (1 - e_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}),  G_H = V_H.

    Args:
        rewards: r_0 ... r_{H-1}, each following the action of its step, [B, H].
        terminations: e_t, whether that action ended the episode, bool or float [B, H].
        values: V_0 ... V_H, [B, H + 1].
        discount: gamma.
        lambda_: 0 gives one-step targets, 1 gives discounted sums.
        as_published: V_t in place of V_{t+1}, as the authors' published code has it.

    Returns:
        G_0 ... G_{H-1}, [B, H].
    """
    batch, horizon = rewards.shape
    assert terminations.shape == (batch, horizon), f"terminations {tuple(terminations.shape)}"
    assert values.shape == (batch, horizon + 1), f"values {tuple(values.shape)}"
    going_on = discount * (1 - terminations.to(rewards.dtype))  # [B, H]
    bootstraps = values[:, :-1] if as_published else values[:, 1:]  # [B, H]
    following = values[:, -1]  # [B]
    returns: list[Tensor] = []
    for t in reversed(range(horizon)):
        mixed = (1 - lambda_) * bootstraps[:, t] + lambda_ * following
        following = rewards[:, t] + going_on[:, t] * mixed
        returns.append(following)
    return torch.stack(returns[::-1], 1)


class ReturnScale(nn.Module):
    """Running average of the range that most returns lie in.

    Args:
        percentiles: lower and upper quantile of the range, in [0, 1].
        decay: of the running average, which starts from 0.
    """

    average: Tensor

    def __init__(self, percentiles: tuple[float, float], decay: float) -> None:
        super().__init__()
        self.percentiles = percentiles
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Take in the returns of one update, any shape."""
        low, high = (
            torch.quantile(returns.float().flatten(), quantile) for quantile in self.percentiles
        )
        self.average.mul_(self.decay).add_((1 - self.decay) * (high - low))

    def forward(self) -> Tensor:
        """Return what advantages are divided by: the range, but at least 1."""
        return self.average.clamp(min=1)
