"""Actor and critic: input statistics, initialisation, losses worked by hand, slow critic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drama.agent.behaviour.actor_critic import Actor, Behaviour, InputNormaliser
from drama.agent.behaviour.imagination import Trajectories
from drama.agent.settings import BehaviourSettings
from drama.pipeline.config import Preset

WIDTH, ACTIONS, BINS = 6, 3, 41
MakeBehaviour = Callable[..., Behaviour]


@pytest.fixture
def settings(preset: Callable[..., Preset]) -> BehaviourSettings:
    return preset("quick").behaviour


@pytest.fixture
def make_behaviour(preset: Callable[..., Preset]) -> MakeBehaviour:
    """Keywords change the section `behaviour`; two-hot bins at -4, -3.8 ... 4."""

    def make(actions: int = ACTIONS, **changes: Any) -> Behaviour:
        bins = {"bins": BINS, "bin_limit": 4.0}
        changed = preset("quick", {"behaviour": changes, "world_model": bins})
        return Behaviour(WIDTH, actions, changed.settings())

    return make


def trajectories(batch: int = 5, horizon: int = 4) -> Trajectories:
    return Trajectories(
        states=torch.randn(batch, horizon + 1, WIDTH),
        actions=torch.randint(0, ACTIONS, (batch, horizon)),
        rewards=torch.randn(batch, horizon),
        terminations=torch.rand(batch, horizon) < 0.2,
    )


def randomise(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)


# --- the actor's inputs --------------------------------------------------------------------------


def test_statistics_are_those_of_everything_seen() -> None:
    """Batches of different sizes, far from zero, against NumPy over all of them at once."""
    generator = np.random.default_rng(0)
    shapes = [(7, 3), (1, 3), (2, 5, 3), (100, 3)]
    batches = [generator.normal([0, 50, -3], [1, 5, 0.1], shape) for shape in shapes]
    normaliser = InputNormaliser(3)
    for batch in batches:
        normaliser.update(torch.from_numpy(batch).float())
    seen = np.concatenate([batch.reshape(-1, 3) for batch in batches])
    x = generator.normal([0, 50, -3], [1, 5, 0.1], (9, 3))
    expected = (x - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    assert normaliser.count == len(seen) == 118
    actual = normaliser(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_one_batch_by_hand() -> None:
    """1 and 3: mean 2, variance 1 (not 2, which a divisor of N - 1 gives)."""
    normaliser = InputNormaliser(1)
    normaliser.update(torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(
        normaliser(torch.tensor([[4.0], [2.0]])), torch.tensor([[2.0], [0.0]])
    )


def test_constants_and_outliers_are_clipped() -> None:
    normaliser = InputNormaliser(2)
    normaliser.update(torch.tensor([[5.0, -1.0], [5.0, 1.0]]))
    given = torch.tensor([[5.0, 100.0], [6.0, -100.0], [5.0 + 1e-6, 0.0]])
    expected = torch.tensor([[0.0, 10.0], [10.0, -10.0], [1e-6 / 1e-4, 0.0]])
    torch.testing.assert_close(normaliser(given), expected, atol=2e-3, rtol=1e-4)


def test_inputs_pass_before_any_update() -> None:
    x = torch.randn(4, 3)
    torch.testing.assert_close(InputNormaliser(3)(x), x)


def test_normalising_and_acting_do_not_move_statistics(settings: BehaviourSettings) -> None:
    actor = Actor(WIDTH, ACTIONS, settings)
    actor.normaliser.update(torch.randn(20, WIDTH))
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    for mode in (True, False):
        actor.train(mode)
        actor(torch.randn(5, WIDTH))
        actor.sample(torch.randn(5, 2, WIDTH))
    for name, value in actor.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_are_saved(settings: BehaviourSettings) -> None:
    actor, other = Actor(WIDTH, ACTIONS, settings), Actor(WIDTH, ACTIONS, settings)
    actor.normaliser.update(3 + 2 * torch.randn(20, WIDTH))
    other.load_state_dict(actor.state_dict())
    x = torch.randn(5, WIDTH)
    assert torch.equal(actor(x), other(x))
    for one in (actor, other):
        one.normaliser.update(x)
    assert torch.equal(actor(x), other(x)), "counts must be saved too"


# --- the networks --------------------------------------------------------------------------------


def test_actor_starts_orthogonal(preset: Callable[..., Preset]) -> None:
    """Gain sqrt(2), for the last layer 0.001; zero biases."""
    actor = Actor(40, 6, preset("xs", {"behaviour": {"actor_hidden": 32}}).behaviour)
    linear = [layer for layer in actor.net if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [
        (32, 40),
        (32, 32),
        (32, 32),
        (6, 32),
    ]
    for layer, gain in zip(linear, [2**0.5, 2**0.5, 2**0.5, 0.001], strict=True):
        product = layer.weight @ layer.weight.T / gain**2
        torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-4, rtol=0)
        assert (layer.bias == 0).all()
    probabilities = torch.softmax(actor(torch.randn(9, 40)), -1)
    torch.testing.assert_close(probabilities, torch.full((9, 6), 1 / 6), atol=0.01, rtol=0)


def test_sizes_of_the_published_networks(preset: Callable[..., Preset]) -> None:
    behaviour = Behaviour(1536, 6, preset("xs").settings())
    shapes = [tuple(m.weight.shape) for m in behaviour.actor.net if isinstance(m, nn.Linear)]
    assert shapes == [(256, 1536), (256, 256), (256, 256), (6, 256)]
    shapes = [tuple(m.weight.shape) for m in behaviour.critic if isinstance(m, nn.Linear)]
    assert shapes == [(512, 1536), (512, 512), (512, 512), (255, 512)]


def test_actions_are_drawn_with_the_policys_probabilities(settings: BehaviourSettings) -> None:
    actor = Actor(WIDTH, ACTIONS, settings)
    nn.init.zeros_(actor.net[-1].weight)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        actor.net[-1].bias.copy_(probabilities.log() + 4)
    actions = actor.sample(torch.randn(10_000, 2, WIDTH))
    assert actions.shape == (10_000, 2) and actions.dtype == torch.int64
    shares = torch.bincount(actions.flatten(), minlength=3) / actions.numel()
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_values_start_at_zero(make_behaviour: MakeBehaviour) -> None:
    losses = make_behaviour().loss(trajectories())
    assert abs(losses.imagined_value.item()) < 1e-4


# --- losses by hand ------------------------------------------------------------------------------


def two_actions(make_behaviour: MakeBehaviour, **changes: Any) -> Behaviour:
    """A policy [1/4, 3/4] and a value of zero everywhere."""
    behaviour = make_behaviour(actions=2, **changes)
    for net in (behaviour.actor.net, behaviour.critic, behaviour.slow_critic):
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
    with torch.no_grad():
        behaviour.actor.net[-1].bias.copy_(torch.tensor([0.0, math.log(3)]))
    return behaviour


def one_step(actions: list[int], rewards: list[float]) -> Trajectories:
    """One imagined step each; the game ends with it, so that G = r."""
    return Trajectories(
        states=torch.randn(len(actions), 2, WIDTH),
        actions=torch.tensor(actions)[:, None],
        rewards=torch.tensor(rewards)[:, None],
        terminations=torch.ones(len(actions), 1, dtype=torch.bool),
    )


@pytest.mark.parametrize(("as_published", "bootstrap"), [(False, 2.0), (True, 1.0)])
def test_the_bootstrap_by_hand(
    make_behaviour: MakeBehaviour, as_published: bool, bootstrap: float
) -> None:
    """One step under V = 1, 2 with gamma = 1/2, lambda = 0: G = 3 + V/2, advantage G - 1.

    A policy [1/4, 3/4] that took action 0, no entropy weight: loss -(G - 1) ln(1/4).
    """
    behaviour = two_actions(
        make_behaviour, entropy_weight=0.0, discount=0.5, as_published=as_published,
        return_percentiles=[0, 1], return_ema=0, **{"lambda": 0.0},
    )  # fmt: skip
    behaviour.two_hot.decode = lambda logits: torch.tensor([[1.0, 2.0]])  # type: ignore[method-assign]
    dream = one_step([0], [3.0])
    losses = behaviour.loss(replace(dream, terminations=torch.zeros(1, 1, dtype=torch.bool)))
    expected = -(3 + bootstrap / 2 - 1) * math.log(0.25)
    assert losses.actor.item() == pytest.approx(expected, rel=1e-5)


def test_reinforce_by_hand(make_behaviour: MakeBehaviour) -> None:
    """Advantages 1 and -0.5 for actions 0 and 1 under [1/4, 3/4], no entropy weight.

    Loss -(1 ln(1/4) - 0.5 ln(3/4)) / 2; gradient -(sum of advantage (one-hot - policy)) / 2.
    """
    behaviour = two_actions(make_behaviour, entropy_weight=0.0)
    losses = behaviour.loss(one_step([0, 1], [1.0, -0.5]))
    expected = -(math.log(0.25) - 0.5 * math.log(0.75)) / 2
    assert losses.actor.item() == pytest.approx(expected, rel=1e-5)
    losses.actor.backward()
    first = -(1 * (1 - 0.25) - 0.5 * (0 - 0.25)) / 2
    gradient = behaviour.actor.net[-1].bias.grad
    torch.testing.assert_close(gradient, torch.tensor([first, -first]), rtol=1e-4, atol=1e-6)


def test_entropy_by_hand(make_behaviour: MakeBehaviour) -> None:
    """No advantage: only the bonus is left, and pushes towards the uniform policy."""
    behaviour = two_actions(make_behaviour, entropy_weight=0.5)
    losses = behaviour.loss(one_step([0, 1], [0.0, 0.0]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert losses.entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert losses.actor.item() == pytest.approx(-0.5 * entropy, rel=1e-4)
    losses.total.backward()
    gradient = behaviour.actor.net[-1].bias.grad  # of -w H: w p_i (ln p_i + H)
    first = 0.5 * 0.25 * (math.log(0.25) + entropy)
    torch.testing.assert_close(gradient, torch.tensor([first, -first]), rtol=1e-4, atol=1e-6)


def test_advantages_are_divided_by_the_scale(make_behaviour: MakeBehaviour) -> None:
    """Returns 0 ... 1000: S = 0.01 * 900 after one update, in use at once."""
    rewards = np.linspace(0, 1000, 21)
    behaviour = two_actions(make_behaviour, entropy_weight=0.0)
    losses = behaviour.loss(one_step([0] * 21, list(map(float, rewards))))
    assert losses.return_scale.item() == pytest.approx(9, rel=1e-4)
    assert losses.actor.item() == pytest.approx(-math.log(0.25) * 500 / 9, rel=1e-4)


def test_critic_loss_by_hand(make_behaviour: MakeBehaviour) -> None:
    """Uniform logits cost ln(bins), once for the return and once for the slow critic's."""
    behaviour = two_actions(make_behaviour)
    losses = behaviour.loss(one_step([0, 1], [1.0, -0.5]))
    assert losses.critic.item() == pytest.approx(2 * math.log(BINS), rel=1e-5)
    assert losses.total.item() == pytest.approx((losses.actor + losses.critic).item())


# --- losses against an independent computation ---------------------------------------------------


def numpy_net(net: nn.Sequential, x: Tensor) -> np.ndarray:
    return net.double()(x.double()).detach().numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def returns(rewards: np.ndarray, ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The lambda-return by its recursion, gamma 0.985, lambda 0.95."""
    result = np.zeros_like(rewards)
    following = values[:, -1]
    for t in range(rewards.shape[1] - 1, -1, -1):
        ahead = 0.05 * values[:, t + 1] + 0.95 * following
        following = rewards[:, t] + 0.985 * (1 - ends[:, t]) * ahead
        result[:, t] = following
    return result


def cross_entropy(logits: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Two-hot cross-entropy with bins at -4, -3.8 ... 4."""
    position = (np.clip(np.sign(value) * np.log1p(np.abs(value)), -4, 4) + 4) / 0.2
    weights = np.clip(1 - np.abs(position[..., None] - np.arange(BINS)), 0, None)
    return -(weights * log_softmax(logits)).sum(-1)


def test_losses_against_numpy(make_behaviour: MakeBehaviour) -> None:
    """Two updates: running statistics of inputs and returns carry over to the second."""
    behaviour = make_behaviour(entropy_weight=0.1, return_ema=0.5)
    randomise(behaviour.actor.net, behaviour.critic, behaviour.slow_critic)
    seen, scale = [], 0.0
    for _ in range(2):
        t = trajectories()
        t = Trajectories(3 + 2 * t.states, t.actions, 5 * t.rewards, t.terminations)
        behaviour.float()
        losses = behaviour.loss(t)
        acted_on = t.states[:, :-1]
        seen.append(acted_on.reshape(-1, WIDTH).double().numpy())
        everything = np.concatenate(seen)
        normed = (acted_on.double().numpy() - everything.mean(0)) / everything.std(0)
        value_logits = numpy_net(behaviour.critic, t.states)
        slow_logits = numpy_net(behaviour.slow_critic, t.states)
        log_policy = log_softmax(
            numpy_net(behaviour.actor.net, torch.from_numpy(np.clip(normed, -10, 10)))
        )
        bins = np.linspace(-4, 4, BINS)
        mean, slow_mean = (np.exp(log_softmax(x)) @ bins for x in (value_logits, slow_logits))
        values, slow_values = (np.sign(m) * np.expm1(np.abs(m)) for m in (mean, slow_mean))
        rewards, ends = t.rewards.double().numpy(), t.terminations.numpy().astype(float)
        target, slow_target = (returns(rewards, ends, v) for v in (values, slow_values))
        low, high = np.quantile(target, [0.05, 0.95])
        scale = 0.5 * scale + 0.5 * (high - low)
        advantage = (target - values[:, :-1]) / max(1, scale)
        chosen = np.take_along_axis(log_policy, t.actions.numpy()[..., None], -1)[..., 0]
        entropy = -(np.exp(log_policy) * log_policy).sum(-1).mean()
        actor = -(chosen * advantage).mean() - 0.1 * entropy
        predicted = value_logits[:, :-1]
        critic = cross_entropy(predicted, target) + cross_entropy(predicted, slow_target)
        assert scale > 1.5 and np.abs(target - slow_target).max() > 0.1
        assert losses.return_scale.item() == pytest.approx(scale, rel=1e-4)
        assert losses.entropy.item() == pytest.approx(entropy, rel=1e-4)
        assert losses.actor.item() == pytest.approx(actor, rel=1e-3, abs=1e-4)
        assert losses.critic.item() == pytest.approx(critic.mean(), rel=1e-4)
        assert losses.imagined_value.item() == pytest.approx(values.mean(), rel=1e-3)
        assert losses.imagined_reward.item() == pytest.approx(rewards.mean(), rel=1e-4)


@pytest.mark.parametrize(("term", "taught"), [("actor", "actor"), ("critic", "critic")])
def test_each_loss_teaches_its_own_network(
    make_behaviour: MakeBehaviour, term: str, taught: str
) -> None:
    """The advantage is a constant to the actor, the return one to the critic."""
    behaviour = make_behaviour()
    randomise(behaviour.critic, behaviour.slow_critic, behaviour.actor.net)
    getattr(behaviour.loss(trajectories()), term).backward()
    for name, part in behaviour.named_children():
        for parameter in part.parameters():
            reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert reached == (name == taught), name


def test_the_state_after_the_last_action_is_not_learned_from(
    make_behaviour: MakeBehaviour,
) -> None:
    """s_H only bootstraps: with every step ending the game it changes nothing."""
    t = trajectories()
    ends = torch.ones_like(t.terminations)
    other = torch.cat([t.states[:, :-1], torch.randn_like(t.states[:, -1:])], 1)
    results = []
    for states in (t.states, other):
        torch.manual_seed(1)
        behaviour = make_behaviour()
        randomise(behaviour.critic, behaviour.actor.net)
        losses = behaviour.loss(Trajectories(states, t.actions, t.rewards, ends))
        results.append((losses.actor.item(), losses.critic.item()))
    assert results[0] == results[1]


# --- the slow critic -----------------------------------------------------------------------------


def test_slow_critic_follows_by_hand(make_behaviour: MakeBehaviour) -> None:
    """0.98 of the old and 0.02 of the critic, for every parameter."""
    behaviour = make_behaviour(slow_critic_ema=0.98)
    fast, slow = list(behaviour.critic.parameters()), list(behaviour.slow_critic.parameters())
    assert len(fast) == len(slow) == 3 * 3 + 2
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, other), "it starts as a copy"
        nn.init.constant_(one, 1.0)
        nn.init.constant_(other, 0.0)
    behaviour.update_slow_critic()
    behaviour.update_slow_critic()
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(other, torch.full_like(other, 0.02 + 0.98 * 0.02))
        assert (one == 1).all() and not other.requires_grad


def test_the_loss_alone_leaves_the_slow_critic(make_behaviour: MakeBehaviour) -> None:
    behaviour = make_behaviour()
    before = [p.clone() for p in behaviour.slow_critic.parameters()]
    behaviour.loss(trajectories()).total.backward()
    for old, new in zip(before, behaviour.slow_critic.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_only_actor_and_critic_are_learned(make_behaviour: MakeBehaviour) -> None:
    behaviour = make_behaviour()
    learned = {name for name, p in behaviour.named_parameters() if p.requires_grad}
    assert learned and {name.split(".")[0] for name in learned} == {"actor", "critic"}
