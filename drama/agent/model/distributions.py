"""Distributions over latents and returns: mixed categoricals, symlog two-hot bins, their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def symlog(x: Tensor) -> Tensor:
    """Compress magnitudes: sign(x) ln(1 + |x|), any shape."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """Invert `symlog`: sign(x) (exp |x| - 1), any shape."""
    return torch.sign(x) * torch.expm1(x.abs())


class TwoHot(nn.Module):
    """A scalar as a categorical over bins that are evenly spaced in symlog space.

    Args:
        bins: number of bins.
        limit: outermost bins lie at -limit and +limit, in symlog space.
    """

    centres: Tensor

    def __init__(self, bins: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.step = 2 * limit / (bins - 1)
        self.register_buffer("centres", torch.linspace(-limit, limit, bins), persistent=False)

    def encode(self, value: Tensor) -> Tensor:
        """Spread each value over its two neighbouring bins.

        Args:
            value: any shape [...], in units of the game; beyond the outermost bins it is clipped.

        Returns:
            [..., bins], non-negative, summing to 1, whose mean bin is symlog(value).
        """
        bins = len(self.centres)
        position = (symlog(value.float()).clamp(-self.limit, self.limit) + self.limit) / self.step
        # A value that is not a number stays one, for the loss to show it; only its index is safe.
        lower = position.nan_to_num().floor().clamp(max=bins - 2).long()  # [...]
        upper_weight = (position - lower).unsqueeze(-1)  # [..., 1]
        target = torch.zeros(*value.shape, bins, device=value.device)  # [..., bins]
        target.scatter_(-1, lower.unsqueeze(-1), 1 - upper_weight)
        target.scatter_(-1, lower.unsqueeze(-1) + 1, upper_weight)
        return target

    def decode(self, logits: Tensor) -> Tensor:
        """Return the value in units of the game: symexp of the mean bin, [..., bins] -> [...]."""
        # Not a matrix product, which autocast would carry out with bfloat16's three digits.
        return symexp((torch.softmax(logits.float(), -1) * self.centres).sum(-1))

    def loss(self, logits: Tensor, value: Tensor) -> Tensor:
        """Cross-entropy between the encoded value [...] and logits [..., bins]; returns [...]."""
        assert logits.shape[:-1] == value.shape, (
            f"logits {tuple(logits.shape)} and values {tuple(value.shape)} must agree but for bins"
        )
        return -(self.encode(value) * torch.log_softmax(logits.float(), -1)).sum(-1)


def mixed_probabilities(logits: Tensor, uniform_mix: float) -> Tensor:
    """Softmax over the last axis with a share of the uniform distribution over its C classes.

    Args:
        logits: [..., K, C].
        uniform_mix: share of the uniform distribution, 0 to 1 (0.01 in the paper).

    Returns:
        Probabilities [..., K, C], float32; each is at least uniform_mix / C.
    """
    probabilities = torch.softmax(logits.float(), -1)
    return (1 - uniform_mix) * probabilities + uniform_mix / logits.shape[-1]


def sample_one_hot(probabilities: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draw a one-hot sample over the last axis.

    The class with the smallest waiting time wins: with independent waiting times t_c / p_c,
    t_c ~ Exponential(1), class c comes first with probability p_c.

    Args:
        probabilities: [..., C].
        noise: Exponential(1) draws [..., C]; by default from torch's global generator.

    Returns:
        One-hot [..., C] of the same dtype, without gradient.
    """
    with torch.no_grad():
        if noise is None:
            # A third of the time of `exponential_`, which a CPU draws one number at a time.
            noise = torch.rand_like(probabilities).log_().neg_()
        winner = (probabilities / noise).argmax(-1)
        return F.one_hot(winner, probabilities.shape[-1]).to(probabilities.dtype)


def straight_through(probabilities: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draw one-hot samples [..., C] whose gradient is that of the probabilities."""
    return sample_one_hot(probabilities, noise) + (probabilities - probabilities.detach())


def categorical_kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) in nats, summed over the K categoricals.

    Args:
        left: probabilities [..., K, C], strictly positive.
        right: probabilities [..., K, C], strictly positive.

    Returns:
        [...].
    """
    assert left.shape == right.shape, f"{tuple(left.shape)} against {tuple(right.shape)}"
    return (left * (left.log() - right.log())).sum((-2, -1))
