"""Imagination: trajectories of the current policy inside the world model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drama.agent.model.world_model import WorldModel


@dataclass(frozen=True)
class Trajectories:
    """Imagined trajectories.

    Attributes:
        states: s_0 ... s_H, each a prior sample and the d it came from, [B, H + 1, Z + D].
        actions: a_0 ... a_{H-1}, int64 [B, H].
        rewards: what followed each action, [B, H].
        terminations: whether each action ended the episode, bool [B, H].
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor


def join_state(latents: Tensor, d: Tensor) -> Tensor:
    """Join latents [..., K, C] and d [..., D] into the state that the policy sees, [..., Z + D]."""
    return torch.cat([latents.flatten(-2), d.to(latents.dtype)], -1)


@torch.no_grad()
def imagine(
    world_model: WorldModel,
    policy: Callable[[Tensor], Tensor],
    frames: Tensor,
    actions: Tensor,
    horizon: int,
    places: Tensor | None = None,
    *,
    as_published: bool = False,
) -> Trajectories:
    """Roll the policy out in the world model, from real contexts.

    Reward and termination are read from the state after the imagined action, since that is the
    state they were learned from.

    Args:
        world_model: in evaluation mode (running statistics, no dropout).
        policy: draws actions: states [B, Z + D] to int64 [B].
        frames: contexts, uint8 [B, L, S, S, 3].
        actions: contexts, int64 [B, L].
        horizon: H, imagined steps.
        places: as for `WorldModel.observe`.
        as_published: read reward and termination from the state before the imagined action, as
            the authors' published code does.

    Raises:
        ValueError: for contexts, or actions of the policy, of other shapes than these.
    """
    assert not world_model.training, "imagination uses running statistics: call eval() first"
    latents, d, memory = world_model.observe(frames, actions, places)
    states = [join_state(latents, d)]  # each [B, Z + D]
    taken: list[Tensor] = []  # each [B]
    dynamics = [d]  # d_0 ... d_H, each [B, D]
    for _ in range(horizon):
        action = policy(states[-1])
        latents, d, memory = world_model.imagine_step(latents, action, memory)
        taken.append(action)
        dynamics.append(d)
        states.append(join_state(latents, d))
    read = torch.stack(dynamics[:-1] if as_published else dynamics[1:], 1)  # [B, H, D]
    return Trajectories(
        states=torch.stack(states, 1),
        actions=torch.stack(taken, 1),
        rewards=world_model.reward(read),
        terminations=world_model.terminates(read),
    )
