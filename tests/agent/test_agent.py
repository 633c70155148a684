"""Acting in games: the window of past steps, what the policy sees, several games side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drama.agent.behaviour.agent import ActingWindow, Agent
from drama.agent.model.distributions import sample_one_hot
from drama.pipeline.config import Preset

ACTIONS, WINDOW = 4, 5
K, C, D = 3, 4, 8
TINY: dict[str, Any] = {
    "environment": {"image_size": 16},
    "world_model": {
        "channels": [4, 4], "strides": [2, 2], "categoricals": K, "classes": C, "head_hidden": 6,
    },
    "sequence_model": {"width": D, "head_width": 4, "state_size": 3, "dropout": 0.5},
}  # fmt: skip
MakeAgent = Callable[..., Agent]


@pytest.fixture
def make_agent(preset: Callable[..., Preset]) -> MakeAgent:
    """A tiny agent whose policy has strong opinions that depend on the state."""

    def make(**behaviour: Any) -> Agent:
        torch.manual_seed(11)
        overrides = TINY | {"behaviour": {"acting_window": WINDOW, **behaviour}}
        agent = Agent(preset("quick", overrides).settings(), ACTIONS).eval()
        for layer in (agent.world_model.encoder.logits, agent.world_model.prior_head):
            nn.init.normal_(layer.weight)
        nn.init.normal_(agent.behaviour.actor.net[-1].weight, std=3.0)
        return agent

    return make


def frames_of(environments: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (environments, 16, 16, 3), np.uint8)


def noise_of(environments: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(environments, 2, K, C).exponential_(generator=generator)


class Player:
    """Acts step after step in some environments with the noise each of them would have alone."""

    def __init__(self, agent: Agent, environments: int, greedy: bool = True) -> None:
        self.agent, self.greedy = agent, greedy
        self.window = agent.new_window(environments)
        self.states: dict[int, Tensor] = {}  # what the policy saw last, by environment
        self.seen: list[Tensor] = []
        agent.behaviour.actor.register_forward_hook(lambda _, given, __: self.seen.append(given[0]))

    def step(self, rows: list[int], seeds: list[int], random: dict[int, int]) -> np.ndarray:
        """Act in `rows`; `seeds` give each its frame and noise; `random` its random action."""
        self.seen.clear()
        frames = np.concatenate([frames_of(1, seed) for seed in seeds])
        noise = torch.cat([noise_of(1, seed) for seed in seeds])
        given = np.array([random.get(row, -1) for row in rows])
        actions = self.agent.act(
            self.window, np.array(rows), frames, given, noise, greedy=self.greedy
        )
        shown = zip(rows, self.seen[0], strict=True)
        self.states.update((row, state) for row, state in shown if row not in random)
        return actions


# --- one environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("act_on", ["prior", "posterior"])
def test_the_policy_sees_what_it_should(make_agent: MakeAgent, act_on: str) -> None:
    """d from the last L past latents and actions; a sample of its prior, or of the frame."""
    agent = make_agent(act_on=act_on)
    model, player = agent.world_model, Player(agent, 1)
    latents: list[Tensor] = []  # of every step so far, each [K, C]
    actions: list[int] = []
    for t in range(2 * WINDOW):
        random = {0: 2} if t in (0, 3) else {}
        action = player.step([0], [t], random)[0]
        noise = noise_of(1, t)
        encoded = sample_one_hot(model.posterior(torch.from_numpy(frames_of(1, t))), noise[:, 1])
        if not random:
            past = torch.stack(latents[-WINDOW:])[None]
            d = model.sequence(model.inputs(past, torch.tensor([actions[-WINDOW:]])))[0][:, -1]
            predicted = sample_one_hot(model.prior(d), noise[:, 0])
            latent = predicted if act_on == "prior" else encoded
            state = player.states[0]
            assert torch.equal(state[: K * C], latent.flatten()), f"step {t}"
            torch.testing.assert_close(state[K * C :], d[0], rtol=1e-4, atol=1e-5)
            assert action == agent.behaviour.actor(state[None]).argmax()
        else:
            assert action == 2
        latents.append(encoded[0])
        actions.append(int(action))


def test_the_first_action_must_be_random(make_agent: MakeAgent) -> None:
    player = Player(make_agent(), 2)
    with pytest.raises(AssertionError, match="first action"):
        player.step([0, 1], [0, 1], {0: 1})
    assert player.step([0, 1], [0, 1], {0: 1, 1: 3}).tolist() == [1, 3]
    assert not player.states, "nothing was left for the policy"


def test_clearing_forgets_the_episode(make_agent: MakeAgent) -> None:
    """After a reset an environment acts as one that has never played."""
    agent = make_agent()
    used, fresh = Player(agent, 2), Player(agent, 2)
    for t in range(WINDOW + 2):
        used.step([0, 1], [t, 50 + t], {0: 0, 1: 0} if t == 0 else {})
    used.window.clear(0)
    with pytest.raises(AssertionError, match="first action"):
        used.step([0], [7], {})
    for player in (used, fresh):
        player.step([0], [70], {0: 3})
        player.step([0], [71], {})
    assert torch.equal(used.states[0], fresh.states[0])
    assert used.window.lengths.tolist() == [2, WINDOW]


def test_greedy_takes_the_most_probable_action_and_sampling_does_not_always(
    make_agent: MakeAgent,
) -> None:
    agent = make_agent()
    nn.init.zeros_(agent.behaviour.actor.net[-1].weight)
    probabilities = torch.tensor([0.1, 0.2, 0.6, 0.1])
    with torch.no_grad():
        agent.behaviour.actor.net[-1].bias.copy_(probabilities.log())
    environments = 4000
    window, rows = agent.new_window(environments), np.arange(environments)
    frames = np.zeros((environments, 16, 16, 3), np.uint8)
    undecided = np.full(environments, -1)
    agent.act(window, rows, frames, np.zeros(environments, np.int64), greedy=False)
    greedy = agent.act(window, rows, frames, undecided, greedy=True)
    assert (greedy == 2).all()
    sampled = agent.act(window, rows, frames, undecided, greedy=False)
    shares = np.bincount(sampled, minlength=ACTIONS) / environments
    np.testing.assert_allclose(shares, probabilities.numpy(), atol=0.04)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_of_acting_while_training_only(
    make_agent: MakeAgent, temperature: float
) -> None:
    """`explore` draws from softmax(logits / T); `decide`, which evaluates, from the policy."""
    agent, plain = make_agent(temperature=temperature), make_agent()
    probabilities = torch.tensor([0.1, 0.2, 0.6, 0.1])
    for one in (agent, plain):
        nn.init.zeros_(one.behaviour.actor.net[-1].weight)
        with torch.no_grad():
            one.behaviour.actor.net[-1].bias.copy_(probabilities.log())
    environments = 4000
    window, rows = agent.new_window(environments), np.arange(environments)
    frames = np.zeros((environments, 16, 16, 3), np.uint8)
    agent.act(window, rows, frames, np.zeros(environments, np.int64), greedy=False)
    given = (
        torch.from_numpy(frames), torch.from_numpy(window.latents),
        torch.from_numpy(window.actions), torch.ones(environments, dtype=torch.int64),
        noise_of(environments, 5),
    )  # fmt: skip
    decided = []
    for decide in (agent.explore, agent.decide, plain.decide):
        torch.manual_seed(9)
        decided.append(decide(*given))
    explored = torch.bincount(decided[0][:, 1], minlength=ACTIONS) / environments
    expected = probabilities ** (1 / temperature)
    torch.testing.assert_close(explored, expected / expected.sum(), atol=0.04, rtol=0)
    assert (decided[0][:, 0] == 2).all(), "the most probable action has no temperature"
    assert torch.equal(decided[1], decided[2])
    assert torch.equal(decided[0], decided[1]) == (temperature == 1)


def test_on_the_prior_the_current_frame_cannot_matter(make_agent: MakeAgent) -> None:
    for act_on, matters in (("prior", False), ("posterior", True)):
        agent = make_agent(act_on=act_on)
        states = []
        for last in range(5, 25):  # a latent's sample need not differ between two of them
            player = Player(agent, 1)
            player.step([0], [1], {0: 1})
            frames, noise = frames_of(1, last), noise_of(1, 2)
            agent.act(player.window, np.array([0]), frames, np.array([-1]), noise, greedy=True)
            states.append(player.seen[-1])
        assert all(torch.equal(state, states[0]) for state in states) is not matters


# --- several side by side ------------------------------------------------------------------------


@pytest.mark.parametrize("act_on", ["prior", "posterior"])
def test_side_by_side_is_as_alone(make_agent: MakeAgent, act_on: str) -> None:
    """Windows of different lengths, random actions at different times, a pause and a reset."""
    agent = make_agent(act_on=act_on)
    together, alone = Player(agent, 3), [Player(agent, 1) for _ in range(3)]
    begin = (0, 2, 4)  # step at which each environment begins
    decided = 0
    for t in range(14):
        rows = [row for row in (2, 0, 1) if t >= begin[row] and (row, t) != (1, 8)]
        if t == 10:
            together.window.clear(0)
            alone[0].window.clear(0)
        random = {row: row for row in rows if t == begin[row] or t % 5 == row or t == 10}
        seeds = [100 * row + t for row in rows]
        actions = together.step(rows, seeds, random)
        for row, seed, action in zip(rows, seeds, actions, strict=True):
            given = {0: random[row]} if row in random else {}
            assert alone[row].step([0], [seed], given)[0] == action
            if not given:
                decided += 1
                one, other = together.states[row], alone[row].states[0]
                assert torch.equal(one[: K * C], other[: K * C])
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert decided > 15
    assert together.window.lengths.tolist() == [4, 5, 5]


def test_acting_changes_nothing_but_the_window(make_agent: MakeAgent) -> None:
    agent = make_agent()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    player = Player(agent, 2, greedy=False)
    given = np.array([1, 2])
    kept = given.copy()
    for t in range(3):
        player.step([0, 1], [t, 10 + t], {0: 0, 1: 0} if t == 0 else {})
    agent.act(player.window, np.array([0, 1]), frames_of(2, 0), given, greedy=False)
    assert (given == kept).all()
    for name, value in agent.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_noise_comes_from_the_global_generator_unless_given(make_agent: MakeAgent) -> None:
    agent = make_agent()
    latents = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        window = agent.new_window(50)
        agent.act(window, np.arange(50), frames_of(50, 0), np.zeros(50, np.int64), greedy=True)
        latents.append(window.latents.copy())
    assert (latents[0] == latents[1]).all() and (latents[0] != latents[2]).any()
    assert agent.noise_shape() == (2, K, C)


def test_acting_in_training_mode_is_refused(make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.world_model.train()
    with pytest.raises(AssertionError, match="eval"):
        Player(agent, 1).step([0], [0], {0: 0})


# --- the window ----------------------------------------------------------------------------------


def remember(window: ActingWindow, rows: list[int], value: int) -> None:
    """Append a step whose latents and action all carry one number."""
    count = len(rows)
    window.append(np.array(rows), np.full((count, K), value), np.full(count, value))


def test_window_keeps_the_last_steps_in_order() -> None:
    window = ActingWindow(2, 3, K)
    for value in range(1, 6):
        remember(window, [1], value)
    remember(window, [0, 1], 6)
    assert window.lengths.tolist() == [1, 3]
    assert window.actions[1].tolist() == [4, 5, 6] and window.actions[0, 0] == 6
    assert (window.latents[1] == window.actions[1][:, None]).all()


def test_window_is_saved_and_restored() -> None:
    window, other = ActingWindow(2, 3, K), ActingWindow(2, 3, K)
    for value in range(1, 5):
        remember(window, [0], value)
    saved = window.state_dict()
    remember(window, [0, 1], 9)
    other.load_state_dict(saved)
    assert other.lengths.tolist() == [3, 0] and other.actions[0].tolist() == [2, 3, 4]
    remember(other, [0, 1], 9)
    for name, value in window.state_dict().items():
        assert (other.state_dict()[name] == value).all()
    with pytest.raises(KeyError):
        other.load_state_dict({"latents": saved["latents"]})
