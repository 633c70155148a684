"""Imagined trajectories: what was acted on, what followed, and from which state it was read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drama.agent.behaviour.imagination import Trajectories, imagine, join_state
from drama.agent.model.world_model import WorldModel
from drama.pipeline.config import Preset

ACTIONS, HORIZON, CONTEXT, BATCH = 3, 4, 5, 200
K, C, D = 3, 4, 8
TINY: dict[str, Any] = {
    "environment": {"image_size": 16},
    "world_model": {
        "channels": [4, 4], "strides": [2, 2], "categoricals": K, "classes": C, "head_hidden": 6,
        "uniform_mix": 0.0,
    },
    "sequence_model": {"width": D, "head_width": 4, "state_size": 3, "dropout": 0.5},
}  # fmt: skip


@pytest.fixture
def model(preset: Callable[..., Preset]) -> WorldModel:
    """A tiny world model, certain of what it sees, uncertain of what comes."""
    model = WorldModel(preset("quick", TINY).settings(), ACTIONS).eval()
    nn.init.normal_(model.reward_head[-1].weight)
    nn.init.normal_(model.encoder.logits.weight, std=1e6)
    nn.init.normal_(model.prior_head.weight)
    return model


class RecordingPolicy:
    """Acts on the state alone, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, states: Tensor) -> Tensor:
        self.shown.append(states.clone())
        return (states.sum(-1) * 1000).long() % ACTIONS


@pytest.fixture
def imagined(model: WorldModel) -> tuple[Trajectories, Tensor, Tensor, RecordingPolicy]:
    frames = torch.randint(0, 256, (BATCH, CONTEXT, 16, 16, 3), dtype=torch.uint8)
    actions = torch.randint(0, ACTIONS, (BATCH, CONTEXT))
    policy = RecordingPolicy()
    return imagine(model, policy, frames, actions, HORIZON), frames, actions, policy


Imagined = tuple[Trajectories, Tensor, Tensor, RecordingPolicy]


def test_shapes(imagined: Imagined) -> None:
    trajectories = imagined[0]
    assert trajectories.states.shape == (BATCH, HORIZON + 1, K * C + D)
    assert trajectories.actions.shape == (BATCH, HORIZON)
    assert trajectories.actions.dtype == torch.int64
    assert trajectories.rewards.shape == (BATCH, HORIZON)
    assert trajectories.terminations.shape == (BATCH, HORIZON)
    assert trajectories.terminations.dtype == torch.bool
    assert not trajectories.states.requires_grad and not trajectories.rewards.requires_grad


def test_states_join_latent_and_d() -> None:
    latents = torch.arange(6.0).view(1, 2, 3)
    joined = join_state(latents, torch.tensor([[7.0, 8.0]]))
    assert joined.tolist() == [[0, 1, 2, 3, 4, 5, 7, 8]]


def test_the_policy_acts_on_each_state_but_the_last(imagined: Imagined) -> None:
    trajectories, _, _, policy = imagined
    assert len(policy.shown) == HORIZON
    assert torch.equal(torch.stack(policy.shown, 1), trajectories.states[:, :-1])
    repeated = RecordingPolicy()(trajectories.states[:, :-1])
    assert torch.equal(trajectories.actions, repeated)
    assert len(trajectories.actions.unique()) == ACTIONS


def test_dynamics_are_those_of_the_parallel_form(model: WorldModel, imagined: Imagined) -> None:
    """Context latents and actions, then imagined ones: one sequence gives every d."""
    trajectories, frames, actions, _ = imagined
    seen = nn.functional.one_hot(model.posterior(frames).argmax(-1), C).float()
    latents = trajectories.states[:, :-1, : K * C].unflatten(-1, (K, C))
    everything = model.inputs(
        torch.cat([seen, latents], 1), torch.cat([actions, trajectories.actions], 1)
    )
    d, _ = model.sequence(everything)
    torch.testing.assert_close(
        trajectories.states[..., K * C :], d[:, CONTEXT - 1 :], rtol=1e-4, atol=1e-4
    )


def test_rewards_and_ends_are_read_after_the_action(model: WorldModel, imagined: Imagined) -> None:
    trajectories = imagined[0]
    d = trajectories.states[..., K * C :]
    torch.testing.assert_close(trajectories.rewards, model.reward(d[:, 1:]))
    assert torch.equal(trajectories.terminations, model.terminates(d[:, 1:]))
    assert not torch.allclose(trajectories.rewards, model.reward(d[:, :-1]))
    assert not torch.equal(trajectories.terminations, model.terminates(d[:, :-1]))


def test_as_published_they_are_read_before_the_action(model: WorldModel) -> None:
    """The same dream, told one step late: what a_t earned stands beside a_{t+1}."""
    frames = torch.randint(0, 256, (BATCH, CONTEXT, 16, 16, 3), dtype=torch.uint8)
    actions = torch.randint(0, ACTIONS, (BATCH, CONTEXT))
    dreams = []
    for as_published in (False, True):
        torch.manual_seed(3)
        dreams.append(
            imagine(model, RecordingPolicy(), frames, actions, HORIZON, as_published=as_published)
        )
    ours, theirs = dreams
    assert torch.equal(ours.states, theirs.states) and torch.equal(ours.actions, theirs.actions)
    torch.testing.assert_close(theirs.rewards[:, 1:], ours.rewards[:, :-1])
    assert torch.equal(theirs.terminations[:, 1:], ours.terminations[:, :-1])
    first = theirs.states[:, 0, K * C :]
    torch.testing.assert_close(theirs.rewards[:, 0], model.reward(first))
    assert torch.equal(theirs.terminations[:, 0], model.terminates(first))
    assert not torch.allclose(theirs.rewards, ours.rewards)


def test_latents_are_samples_of_the_prior_beside_them(
    model: WorldModel, imagined: Imagined
) -> None:
    """Summed over the batch, counts lie within five deviations of the priors' sums."""
    states = imagined[0].states
    latents = states[..., : K * C].unflatten(-1, (K, C))
    assert ((latents == 0) | (latents == 1)).all() and (latents.sum(-1) == 1).all()
    prior = model.prior(states[..., K * C :])  # [B, H + 1, K, C]
    deviation = (prior * (1 - prior)).sum(0).sqrt()
    assert ((latents.sum(0) - prior.sum(0)).abs() <= 5 * deviation + 1e-3).all()
    agreement = (latents * prior).sum(-1).mean()
    chance = (latents.roll(1, 0) * prior).sum(-1).mean()
    assert agreement > chance + 0.02, "each row must be drawn from its own prior"


def test_imagining_leaves_the_model_as_it_was(model: WorldModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frames = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8)
    imagine(model, RecordingPolicy(), frames, torch.zeros(4, 2, dtype=torch.int64), 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_imagining_in_training_mode_is_refused(model: WorldModel) -> None:
    frames = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="eval"):
        imagine(model.train(), RecordingPolicy(), frames, torch.zeros(1, 2).long(), 2)


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
def test_values_stay_in_float32_under_autocast(model: WorldModel) -> None:
    """Rewards of a thousand keep their last digit; bfloat16 has no room for it."""
    nn.init.zeros_(model.reward_head[-1].weight)
    with torch.no_grad():
        target = model.two_hot.encode(torch.tensor(1001.0)).clamp(min=1e-9).log()
        model.reward_head[-1].bias.copy_(target.bfloat16())
    frames = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8)
    actions = torch.zeros(4, 2, dtype=torch.int64)
    expected = imagine(model, RecordingPolicy(), frames, actions, 2).rewards
    with torch.autocast("cpu", torch.bfloat16):
        trajectories = imagine(model, RecordingPolicy(), frames, actions, 2)
    assert trajectories.states.dtype == trajectories.rewards.dtype == torch.float32
    torch.testing.assert_close(trajectories.rewards, expected, rtol=1e-4, atol=0)
