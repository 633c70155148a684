"""The world model's parts and losses: worked by hand, and against an independent computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drama.agent.model.distributions import sample_one_hot
from drama.agent.model.world_model import (
    WorldModel,
    gaussian_reconstruction_loss,
    reconstruction_loss,
)
from drama.agent.training.optim import LaProp
from drama.pipeline.config import Preset

ACTIONS = 3
K, C = 3, 5
TINY: dict[str, Any] = {
    "environment": {"image_size": 16},
    "world_model": {
        "channels": [4, 4],
        "strides": [2, 2],
        "categoricals": K,
        "classes": C,
        "head_hidden": 6,
    },
    "sequence_model": {
        "width": 8, "head_width": 4, "state_size": 3, "chunk_length": 4, "dropout": 0.0,
    },
}  # fmt: skip
MakeModel = Callable[..., WorldModel]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def make_model(preset: Callable[..., Preset]) -> MakeModel:
    """A tiny world model in evaluation mode; keywords change the section `world_model`."""

    def make(**changes: Any) -> WorldModel:
        overrides = TINY | {"world_model": TINY["world_model"] | changes}
        model = WorldModel(preset("quick", overrides).settings(), ACTIONS).eval()
        nn.init.normal_(model.reward_head[-1].weight)
        return model

    return make


def make_batch(batch: int = 2, length: int = 6) -> Batch:
    frames = torch.randint(0, 256, (batch, length, 16, 16, 3), dtype=torch.uint8)
    actions = torch.randint(0, ACTIONS, (batch, length))
    return frames, actions, torch.randn(batch, length), torch.rand(batch, length) < 0.3


def counts(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- size ----------------------------------------------------------------------------------------


def test_parameter_counts_of_size_xs(preset: Callable[..., Preset]) -> None:
    model = WorldModel(preset("xs").settings(), 6)
    latent_heads = counts(model.encoder.logits) + counts(model.prior_head)
    assert counts(model.encoder.backbone) == 232_272
    assert counts(model.decoder) == 1_281_811
    assert latent_heads == 1_574_912
    assert counts(model.sequence) == 3_737_504
    assert counts(model.reward_head) == 197_119
    assert counts(model.termination_head) == 131_841
    assert counts(model) == 7_155_459
    assert all(p.requires_grad for p in model.parameters())


def test_size_s_doubles_the_channels(preset: Callable[..., Preset]) -> None:
    small, large = preset("xs").world_model, preset("s").world_model
    assert large.channels == tuple(2 * channels for channels in small.channels)


# --- inputs and outputs --------------------------------------------------------------------------


def test_inputs_by_hand(make_model: MakeModel) -> None:
    """Latents row by row, then the one-hot action."""
    latents = torch.eye(C)[torch.tensor([[1, 0, 4]])]  # [1, K, C]
    joined = make_model().inputs(latents, torch.tensor([2]))
    assert joined.tolist() == [[0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]]
    with pytest.raises(AssertionError, match="must agree"):
        make_model().inputs(latents, torch.zeros(1, 1, dtype=torch.int64))


def test_posterior_sees_one_frame_and_is_mixed(make_model: MakeModel) -> None:
    model = make_model()
    nn.init.normal_(model.encoder.logits.weight, std=20.0)
    frames = make_batch()[0]
    posterior = model.posterior(frames)
    assert posterior.shape == (2, 6, K, C)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(2, 6, K))
    assert posterior.min().item() == pytest.approx(0.01 / C, rel=1e-3)
    for b, t in ((0, 0), (1, 4)):
        torch.testing.assert_close(model.posterior(frames[b, t][None])[0], posterior[b, t])


def test_prior_is_mixed(make_model: MakeModel) -> None:
    model = make_model()
    nn.init.normal_(model.prior_head.weight, std=50.0)
    prior = model.prior(torch.randn(2, 7, 8))
    assert prior.shape == (2, 7, K, C)
    torch.testing.assert_close(prior.sum(-1), torch.ones(2, 7, K))
    assert prior.min().item() == pytest.approx(0.01 / C, rel=1e-3)


def test_reward_and_termination_are_decoded(make_model: MakeModel) -> None:
    model = make_model()
    d = torch.randn(4, 5, 8)
    torch.testing.assert_close(model.reward(d), model.two_hot.decode(model.reward_head(d)))
    ended = model.terminates(d)
    assert ended.dtype == torch.bool and ended.shape == (4, 5)
    assert torch.equal(ended, torch.sigmoid(model.termination_head(d)[..., 0]) > 0.5)
    assert 0 < ended.float().mean() < 1


def test_rewards_start_at_zero(preset: Callable[..., Preset]) -> None:
    model = WorldModel(preset("quick", TINY).settings(), ACTIONS)
    assert model.reward(torch.randn(3, 8)).abs().max() < 1e-4


# --- losses --------------------------------------------------------------------------------------


def zero(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def test_losses_by_hand(make_model: MakeModel) -> None:
    """Everything uniform, frames black: each loss is a number one can write down."""
    model = make_model()
    zero(model.encoder.logits, model.prior_head, model.reward_head[-1], model.termination_head[-1])
    zero(model.decoder.backbone[-1])  # the sigmoid then says 1/2 everywhere
    frames, actions, rewards, terminations = make_batch()
    losses = model.loss(torch.zeros_like(frames), actions, rewards, terminations)
    assert losses.reconstruction.item() == pytest.approx(16 * 16 * 3 / 4)
    assert losses.reward.item() == pytest.approx(math.log(255), rel=1e-5)
    assert losses.termination.item() == pytest.approx(math.log(2), rel=1e-5)
    assert losses.dynamics.item() == pytest.approx(0, abs=1e-6)
    assert losses.representation.item() == pytest.approx(0, abs=1e-6)
    free = 1.0 * 1 + 0.1 * 1
    expected = 16 * 16 * 3 / 4 + math.log(255) + math.log(2) + free
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_uniform_posterior_and_known_prior_by_hand(make_model: MakeModel) -> None:
    """Prior softmax [3/7, 1/7 ...], mixed; both KLs are the same number, weighted 1 and 0.1."""
    model = make_model(uniform_mix=0.25, free_nats=0.0)
    zero(model.encoder.logits, model.prior_head)
    with torch.no_grad():
        model.prior_head.bias.view(K, C)[:, 0] = math.log(3)
    losses = model.loss(*make_batch())
    first, other = 0.75 * 3 / 7 + 0.25 / 5, 0.75 / 7 + 0.25 / 5
    kl = K * (math.log(0.2 / first) + 4 * math.log(0.2 / other)) / 5
    assert losses.dynamics.item() == pytest.approx(kl, rel=1e-4)
    assert losses.representation.item() == pytest.approx(kl, rel=1e-4)
    rest = losses.reconstruction + losses.reward + losses.termination
    assert (losses.total - rest).item() == pytest.approx(1.1 * kl, rel=1e-3)


def test_reward_and_termination_losses_by_hand(make_model: MakeModel) -> None:
    """The same logits at every step: cross-entropies of known probabilities."""
    model = make_model(bins=3, bin_limit=1.0)
    zero(model.reward_head[-1], model.termination_head[-1])
    with torch.no_grad():
        model.reward_head[-1].bias[1] = math.log(2)  # 1/4, 1/2, 1/4
        model.termination_head[-1].bias.fill_(math.log(3))  # ends with probability 3/4
    frames, actions, _, _ = make_batch(1, 4)
    rewards = torch.tensor([[0.0, math.expm1(0.5), -9.0, 0.0]])
    ended = torch.tensor([[True, False, False, False]])
    losses = model.loss(frames, actions, rewards, ended)
    assert losses.reward.item() == pytest.approx((1 + 1.5 + 2 + 1) / 4 * math.log(2), rel=1e-5)
    expected = (math.log(4 / 3) + 3 * math.log(4)) / 4
    assert losses.termination.item() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_loss_by_hand() -> None:
    """Summed over pixels and channels, averaged over images."""
    left, right = torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    left[0, 0, 0, 0], left[0, 2, 1, 1], right[3, 1, 0, 1] = 2, 1, 1
    assert reconstruction_loss(left, right).item() == pytest.approx((4 + 1 + 1) / 4)
    with pytest.raises(AssertionError):
        reconstruction_loss(torch.zeros(1, 3, 2, 2), right)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl_per_step(model: WorldModel, batch: Batch, seed: int) -> tuple[np.ndarray, Tensor]:
    """KL(q_{t+1} || p_t) [B, L - 1] in NumPy, and d, of the loss computed under this seed."""
    frames, actions, _, _ = batch
    torch.manual_seed(seed)
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    logits = model.encoder(pixels).unflatten(0, actions.shape).detach()
    q = 0.99 * softmax(logits.double().numpy()) + 0.01 / C
    latents = sample_one_hot(torch.from_numpy(q).float().flatten(0, 1)).view(*actions.shape, K * C)
    one_hot = torch.eye(ACTIONS)[actions]
    d = model.sequence(torch.cat([latents, one_hot], -1))[0].detach()
    prior_logits = model.prior_head(d).unflatten(-1, (K, C)).detach().double().numpy()
    p = 0.99 * softmax(prior_logits) + 0.01 / C
    kl = np.zeros((len(q), q.shape[1] - 1))
    for t in range(q.shape[1] - 1):
        kl[:, t] = (q[:, t + 1] * np.log(q[:, t + 1] / p[:, t])).sum((-2, -1))
    return kl, d


def test_losses_against_an_independent_computation(make_model: MakeModel) -> None:
    """The prior from d_t against the posterior of frame t + 1; reward and end t from d_t."""
    model = make_model(free_nats=0.0)
    nn.init.normal_(model.encoder.logits.weight)
    nn.init.normal_(model.prior_head.weight)
    batch = make_batch()
    torch.manual_seed(7)
    losses = model.loss(*batch)
    kl, d = kl_per_step(model, batch, seed=7)
    assert losses.dynamics.item() == pytest.approx(kl.mean(), rel=1e-4)
    assert losses.representation.item() == pytest.approx(kl.mean(), rel=1e-4)
    ends = batch[3].double().numpy()
    chance = 1 / (1 + np.exp(-model.termination_head(d)[..., 0].detach().double().numpy()))
    expected = -(ends * np.log(chance) + (1 - ends) * np.log(1 - chance)).mean()
    assert losses.termination.item() == pytest.approx(expected, rel=1e-4)
    log_bins = np.log(softmax(model.reward_head(d).detach().double().numpy()))
    target = model.two_hot.encode(batch[2]).double().numpy()
    assert losses.reward.item() == pytest.approx(-(target * log_bins).sum(-1).mean(), rel=1e-4)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_free_nats_apply_after_averaging(make_model: MakeModel, share: float) -> None:
    """Steps below the free nats count as they are while the mean lies above."""
    batch = make_batch()
    model = make_model(free_nats=0.0)
    nn.init.normal_(model.prior_head.weight)
    kl, _ = kl_per_step(model, batch, seed=3)
    free = share * kl.mean()
    assert np.maximum(kl, free).mean() > max(kl.mean(), free) * 1.005, "steps must differ"
    limited = make_model(free_nats=float(free))
    limited.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    losses = limited.loss(*batch)
    rest = losses.reconstruction + losses.reward + losses.termination
    regular = (losses.total - rest).item()
    assert regular == pytest.approx(1.1 * max(kl.mean(), free), rel=2e-4)
    assert losses.dynamics.item() == pytest.approx(kl.mean(), rel=1e-4)


def test_gaussian_reconstruction_is_a_likelihood_at_its_best_variance(
    make_model: MakeModel,
) -> None:
    """n / 2 ln(error / n): no variance beats it, and the logged error stays the squared one."""
    error, pixels = torch.tensor(30.0), 100
    loss = gaussian_reconstruction_loss(error, pixels)
    assert loss.item() == pytest.approx(50 * math.log(0.3), rel=1e-6)
    variances = np.linspace(0.05, 3, 500)
    likelihoods = 30 / (2 * variances) + 50 * np.log(variances)
    assert likelihoods.min() == pytest.approx(loss.item() + 50, rel=1e-3)

    batch = make_batch()
    published, calibrated = make_model(), make_model(reconstruction="gaussian")
    calibrated.load_state_dict(published.state_dict())
    losses = []
    for model in (published, calibrated):
        torch.manual_seed(3)
        losses.append(model.loss(*batch))
    assert losses[0].reconstruction.item() == losses[1].reconstruction.item()
    size = batch[0].shape[2] * batch[0].shape[3] * 3
    change = gaussian_reconstruction_loss(losses[0].reconstruction, size) - losses[0].reconstruction
    assert (losses[1].total - losses[0].total).item() == pytest.approx(change.item(), rel=1e-4)


# --- which term teaches what ---------------------------------------------------------------------


def taught(model: WorldModel, loss: Tensor) -> set[str]:
    """Names of the parts that get a gradient from a loss."""
    model.zero_grad()
    loss.backward()
    return {
        name
        for name, part in model.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("reconstruction", {"encoder", "decoder"}),
        ("reward", {"encoder", "sequence", "reward_head"}),
        ("termination", {"encoder", "sequence", "termination_head"}),
        ("dynamics", {"encoder", "sequence", "prior_head"}),
        ("representation", {"encoder"}),
    ],
)
def test_gradients_reach(make_model: MakeModel, term: str, parts: set[str]) -> None:
    """Latents pass gradients on, so the encoder also learns what helps prediction."""
    model = make_model()
    assert taught(model, getattr(model.loss(*make_batch()), term)) == parts


def logit_gradients(model: WorldModel, term: str) -> Tensor:
    """Gradient of a term with respect to the posterior's logits, summed per step, [B, L]."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: Any, result: Tensor) -> None:
        result.retain_grad()
        kept.append(result)

    handle = model.encoder.register_forward_hook(keep)
    getattr(model.loss(*make_batch()), term).backward()
    handle.remove()
    gradient = kept[0].grad
    assert gradient is not None
    return gradient.abs().sum((-2, -1)).unflatten(0, (2, 6))


def test_stop_gradients_of_the_kls(make_model: MakeModel) -> None:
    """The last frame is a target only, the first one only an input."""
    model = make_model()
    dynamics = logit_gradients(model, "dynamics")
    assert (dynamics[:, -1] == 0).all() and (dynamics[:, :-1] > 0).all()
    representation = logit_gradients(model, "representation")
    assert (representation[:, 0] == 0).all() and (representation[:, 1:] > 0).all()


@pytest.mark.parametrize(("free", "reached"), [(50.0, False), (1e-3, True)])
def test_kl_below_the_free_nats_teaches_nothing(
    make_model: MakeModel, free: float, reached: bool
) -> None:
    model = make_model(free_nats=free)
    nn.init.normal_(model.prior_head.weight)
    assert ("prior_head" in taught(model, model.loss(*make_batch()).total)) is reached


# --- batch normalisation -------------------------------------------------------------------------


def running_statistics(model: WorldModel) -> Iterator[Tensor]:
    return (b.clone() for name, b in model.named_buffers() if "running" in name)


def test_running_statistics_move_in_the_update_only(make_model: MakeModel) -> None:
    model = make_model()
    before = list(running_statistics(model))
    assert len(before) == 2 * (2 + 2)
    frames, actions, rewards, terminations = make_batch()
    latents, _, states = model.observe(frames, actions)
    model.imagine_step(latents, actions[:, 0], states)
    model.posterior(frames)
    for old, new in zip(before, running_statistics(model), strict=True):
        assert torch.equal(old, new)
    model.train().loss(frames, actions, rewards, terminations)
    for old, new in zip(before, running_statistics(model), strict=True):
        assert not torch.equal(old, new)


# --- going on from real steps --------------------------------------------------------------------


def sure_of_its_latents(make_model: MakeModel) -> WorldModel:
    """A model whose posterior is all but certain, so that its samples repeat."""
    model = make_model(uniform_mix=0.0)
    nn.init.normal_(model.encoder.logits.weight, std=1e6)
    return model


def test_observing_ends_in_the_last_d_and_its_prior(make_model: MakeModel) -> None:
    model = sure_of_its_latents(make_model)
    nn.init.normal_(model.prior_head.weight, std=1e6)
    frames, actions, _, _ = make_batch(4, 7)
    latents, d, states = model.observe(frames, actions)
    seen = sample_one_hot(model.posterior(frames))
    expected, after = model.sequence(model.inputs(seen, actions))
    torch.testing.assert_close(d, expected[:, -1])
    assert torch.equal(latents, sample_one_hot(model.prior(expected[:, -1])))
    for one, other in zip(states, after, strict=True):
        torch.testing.assert_close(one["scan"], other["scan"])
    assert not latents.requires_grad and not d.requires_grad


def test_an_imagined_step_goes_on_where_observing_ended(make_model: MakeModel) -> None:
    """d after the imagined step = d of the sequence with that latent and action at its end."""
    model = sure_of_its_latents(make_model)
    frames, actions, _, _ = make_batch(4, 7)
    latents, _, states = model.observe(frames, actions)
    action = torch.tensor([0, 1, 2, 0])
    following, d, _ = model.imagine_step(latents, action, states)
    seen = sample_one_hot(model.posterior(frames))
    longer = torch.cat([seen, latents.unsqueeze(1)], 1)
    expected, _ = model.sequence(model.inputs(longer, torch.cat([actions, action[:, None]], 1)))
    torch.testing.assert_close(d, expected[:, -1], rtol=1e-4, atol=1e-5)
    assert following.shape == (4, K, C) and (following.sum(-1) == 1).all()


# --- it learns the right thing -------------------------------------------------------------------


def light_switch(batch: int, length: int) -> Batch:
    """Action 1 lights the next frame and pays 1; action 2 ends the episode; 0 does nothing."""
    actions = torch.randint(0, ACTIONS, (batch, length))
    lit = torch.cat([torch.zeros(batch, 1, dtype=torch.bool), actions[:, :-1] == 1], 1)
    frames = torch.where(lit[..., None, None, None], 255, 0).expand(-1, -1, 16, 16, 3)
    return frames.to(torch.uint8), actions, (actions == 1).float(), actions == 2


def test_it_learns_what_follows_an_action(preset: Callable[..., Preset]) -> None:
    """Prior of the next frame, reward and end all come from the action just taken."""
    changes = {
        "head_hidden": 16, "bins": 21, "bin_limit": 2.0, "free_nats": 0.0,
        "optimiser": {"learning_rate": 0.01, "warmup_updates": 5},
    }  # fmt: skip
    overrides = TINY | {
        "world_model": TINY["world_model"] | changes,
        "sequence_model": TINY["sequence_model"] | {"width": 16},
    }
    settings = preset("quick", overrides).settings()
    model = WorldModel(settings, ACTIONS)
    optimiser = LaProp(dict(model.named_parameters()), settings.world_model.optimiser)
    for _ in range(100):
        optimiser.minimise(model.loss(*light_switch(4, 16)).total)
    model.eval()
    frames, actions, _, _ = light_switch(64, 6)
    latents, _, states = model.observe(frames, actions)
    for action, brightness, reward, ended in ((0, 0, 0, 0), (1, 1, 1, 0), (2, 0, 0, 1)):
        following, d, _ = model.imagine_step(latents, torch.full((64,), action), states)
        picture = model.decoder(following.flatten(1)).mean((1, 2, 3))
        assert (picture - brightness).abs().mean() < 0.25
        assert (model.reward(d) - reward).abs().mean() < 0.1
        assert (model.terminates(d) == bool(ended)).float().mean() > 0.9


# --- the fast path -------------------------------------------------------------------------------


def test_encoding_in_parts_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    for statistics in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.normal_(statistics.running_mean)
        nn.init.uniform_(statistics.running_var, 0.5, 2)
    frames = torch.randint(0, 256, (3, 27, 16, 16, 3), dtype=torch.uint8)
    model.choose_path(plain=True)
    with torch.no_grad():
        whole = model.posterior(frames)
        model.choose_path(plain=False)
        model.encoder.backbone.frames_at_once = 16  # 81 frames: five parts and one
        torch.testing.assert_close(model.posterior(frames), whole, rtol=0, atol=1e-6)


def test_the_fast_path_learns_what_the_plain_one_learns(make_model: MakeModel) -> None:
    gradients = []
    for plain in (True, False):
        torch.manual_seed(0)
        model = make_model().train()
        model.choose_path(plain=plain)
        for stack in (model.encoder.backbone, model.decoder.backbone):
            stack.frames_at_once = 3  # of 32
        torch.manual_seed(1)
        losses = model.loss(*make_batch(4, 8))
        losses.total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    slow, fast = gradients
    assert slow.norm() > 0.1
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6 * float(slow.norm()))
