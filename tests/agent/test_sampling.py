"""DFS: the weights by hand, the draws against the weights, the counts against a plain model."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.agent.replay.distribution.dfs import DFS
from drama.agent.replay.sampling import (
    Sampler,
    Windows,
    draw_without_replacement,
)
from drama.agent.settings import ReplaySettings

SHAPE = (1, 1, 3)

CHI_SQUARE_0_999 = {3: 16.27, 4: 18.47, 5: 20.52, 11: 31.26, 23: 49.73}
"""99.9 % quantiles of the chi-square distribution by degrees of freedom (any table)."""


def settings(**changes: Any) -> ReplaySettings:
    return ReplaySettings.model_validate(
        {
            "sampling": "dfs",
            "capacity": 100,
            "world_model_temperature": 10.0,
            "imagination_temperature": 10.0,
            "alpha": 1.0,
            "beta": 1.0,
            "shuffle_rewards": False,
            **changes,
        }
    )


def append(buffer: ReplayBuffer, count: int) -> None:
    """Append transitions whose action and reward are their step."""
    for step in range(buffer.total, buffer.total + count):
        frame = np.full(SHAPE, step % 256, np.uint8)
        buffer.append(Transition(frame, step, float(step), False, False, False, 0))


def filled(capacity: int, steps: int) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, SHAPE)
    append(buffer, steps)
    return buffer


def sampler(buffer: ReplayBuffer, ratio: float = 2.0, seed: int = 0, **changes: Any) -> Sampler:
    return Sampler(settings(**changes), buffer, ratio, np.random.default_rng(seed))


def steps(own: Sampler, windows: Windows) -> np.ndarray:
    """The step of every transition of some windows, [B, L]."""
    steps: np.ndarray = own.buffer.ring()["action"][windows.rows]
    return steps


def rewards(own: Sampler, windows: Windows) -> np.ndarray:
    """The reward given for every transition of some windows, [B, L]."""
    rewards: np.ndarray = own.buffer.ring()["reward"][windows.reward_rows]
    return rewards


def first_steps(own: Sampler, windows: Windows) -> list[int]:
    """The step at which each window begins."""
    return [int(step) for step in steps(own, windows)[:, 0]]


def with_counts(own: Sampler, world_model: list[int], imagination: list[int]) -> None:
    """Put the counts to known values and leave the generator where it is."""
    own.load_state_dict(
        own.state_dict()
        | {
            "world_model_counts": np.array(world_model, np.int32),
            "imagination_counts": np.array(imagination, np.int32),
        }
    )


def assert_frequencies(drawn: Counter, probabilities: dict) -> None:
    """Pearson's chi-square test of the counts at the 0.1 % level."""
    assert math.isclose(sum(probabilities.values()), 1, rel_tol=1e-12)
    assert drawn.keys() <= probabilities.keys()
    draws = drawn.total()
    statistic = sum(
        (drawn[outcome] - draws * probability) ** 2 / (draws * probability)
        for outcome, probability in probabilities.items()
    )
    assert statistic < CHI_SQUARE_0_999[len(probabilities) - 1], drawn


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def test_world_model_weights_fall_by_e_with_every_tau_draws() -> None:
    weights = np.exp(DFS(settings(), 64.0).of_world_model(np.array([0, 10, 20, 5], np.int32)))
    np.testing.assert_allclose(weights, [1, math.e**-1, math.e**-2, math.e**-0.5], rtol=1e-14)


def test_imagination_weights_on_a_case_worked_by_hand() -> None:
    # Ratio 64: b = 10, 20, 0, 1/2.
    n = np.array([30, 10, 0, 3], np.int32)
    m = np.array([640, 1280, 0, 32], np.int32)
    # 30 - 10 - 20 = 0;  10 - 20 - 0 = -10;  0;  3 - 1/2 - 5/2 = 0; over 10.
    weights = DFS(settings(), 64.0).of_imagination(n, m)
    np.testing.assert_allclose(weights, [0, -1, 0, 0], atol=1e-15)
    # alpha 1/2, beta 1/4, tau' 5: 30 - 5 - 5 = 20;  10 - 10 - 0 = 0;  0;
    # 3 - 1/4 - 5/8 = 17/8; over 5.
    other = settings(alpha=0.5, beta=0.25, imagination_temperature=5.0)
    weights = DFS(other, 64.0).of_imagination(n, m)
    np.testing.assert_allclose(weights, [4, 0, 0, 0.425], atol=1e-15)


def test_imagination_prefers_what_the_world_model_has_learned_when_beta_is_zero() -> None:
    n = np.array([0, 5, 50], np.int32)
    log_weights = DFS(settings(beta=0.0), 64.0).of_imagination(n, np.zeros(3, np.int32))
    np.testing.assert_allclose(log_weights, [0, 0.5, 5], rtol=1e-14)


def test_sets_drawn_without_replacement_are_as_likely_as_drawn_one_after_another() -> None:
    """All ordered pairs of 4 indices, each order of a pair being equally likely."""
    probabilities = normalised([1.0, 2.0, 4.0, 0.5])
    log_weights = np.log(probabilities) + 3.0  # unnormalised
    expected = {}
    for i, j in itertools.permutations(range(4), 2):
        p, q = probabilities[i], probabilities[j]
        expected[i, j] = (p * q / (1 - p) + q * p / (1 - q)) / 2
    generator = np.random.default_rng(1)
    drawn = Counter(
        tuple(draw_without_replacement(log_weights, 2, generator).tolist()) for _ in range(20_000)
    )
    assert_frequencies(drawn, expected)


@hypothesis_settings(deadline=None)
@given(size=st.integers(1, 20), data=st.data())
def test_indices_drawn_are_different_and_in_range(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    log_weights = np.array(data.draw(st.lists(st.floats(-1e6, 50), min_size=size, max_size=size)))
    drawn = draw_without_replacement(log_weights, count, generator)
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert set(drawn.tolist()) <= set(range(size))


def test_drawing_everything_gives_every_order_equally_often() -> None:
    generator = np.random.default_rng(2)
    log_weights = np.array([5.0, 0.0, -5.0, 1.0])
    drawn = Counter(
        tuple(draw_without_replacement(log_weights, 4, generator).tolist()) for _ in range(20_000)
    )
    assert_frequencies(drawn, {order: 1 / 24 for order in itertools.permutations(range(4))})


@pytest.mark.parametrize("count", [0, 5])
def test_drawing_nothing_or_more_than_there_is_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} different indices from \(4,\)"):
        draw_without_replacement(np.zeros(4), count, np.random.default_rng(0))


def test_world_model_windows_are_drawn_with_the_probabilities_of_their_counts() -> None:
    # Steps 5..12 of a ring of 8: windows of 3 begin at steps 5..10.
    own = sampler(filled(8, 13), world_model_temperature=4.0)
    n = [0, 1, 2, 4, 8, 3, 0, 0]
    drawn: Counter = Counter()
    for _ in range(6000):
        with_counts(own, n, [9, 0, 0, 0, 0, 5, 0, 0])
        drawn.update(first_steps(own, own.draw_world_model(1, 3)))
    probabilities = normalised([math.exp(-count / 4) for count in n[:6]])
    assert_frequencies(drawn, dict(zip(range(5, 11), probabilities, strict=True)))


def test_imagination_contexts_are_drawn_with_the_probabilities_of_both_counts() -> None:
    own = sampler(filled(8, 13), ratio=2.0, imagination_temperature=4.0, alpha=1.0, beta=0.5)
    n, m = [0, 6, 2, 4, 8, 3, 0, 0], [4, 0, 8, 8, 2, 6, 0, 0]
    # b = 0.5 m:  2, 0, 4, 4, 1, 3
    # n - b - 0.5 max(0, n - b):  -2, 6 - 3 = 3, -2, 0, 7 - 3.5 = 3.5, 0
    probabilities = normalised([math.exp(x / 4) for x in (-2, 3, -2, 0, 3.5, 0)])
    drawn: Counter = Counter()
    for _ in range(6000):
        with_counts(own, n, m)
        drawn.update(first_steps(own, own.draw_imagination(1, 3)))
    assert_frequencies(drawn, dict(zip(range(5, 11), probabilities, strict=True)))


@pytest.mark.parametrize("draw", ["draw_world_model", "draw_imagination"])
def test_uniform_ignores_the_counts_but_keeps_them(draw: str) -> None:
    own = sampler(filled(8, 13), sampling="uniform")
    with_counts(own, [50, 0, 0, 0, 0, 9, 0, 0], [0, 0, 0, 90, 0, 0, 0, 0])
    before = np.array(own.counts())
    drawn: Counter = Counter()
    for _ in range(3000):
        drawn.update(first_steps(own, getattr(own, draw)(2, 3)))
    increase = np.array(own.counts()) - before
    which = 0 if draw == "draw_world_model" else 1
    assert increase[which].tolist() == [drawn[step] for step in range(5, 13)]
    assert not increase[1 - which].any()
    # Two of six without replacement are not independent: variance is 4/5 of the multinomial's,
    # so the usual bound only errs on the wide side.
    assert_frequencies(drawn, {step: 1 / 6 for step in range(5, 11)})


@hypothesis_settings(deadline=None)
@given(
    capacity=st.integers(2, 9),
    moves=st.lists(
        st.tuples(st.sampled_from(["append", "world model", "imagination"]), st.integers(1, 20)),
        max_size=12,
    ),
)
def test_counts_follow_their_transitions_and_new_ones_start_at_zero(
    capacity: int, moves: list[tuple[str, int]]
) -> None:
    buffer = filled(capacity, 2)
    own = sampler(buffer)
    world_model: Counter = Counter()  # by step, never forgotten
    imagination: Counter = Counter()
    for move, amount in moves:
        if move == "append":
            append(buffer, amount)
        else:
            batch_size = min(amount, buffer.window_count(2))
            if move == "world model":
                world_model.update(first_steps(own, own.draw_world_model(batch_size, 2)))
            else:
                imagination.update(first_steps(own, own.draw_imagination(batch_size, 2)))
        n, m = own.counts()
        stored = range(buffer.first_step, buffer.total)
        assert n.tolist() == [world_model[step] for step in stored]
        assert m.tolist() == [imagination[step] for step in stored]


def test_a_batch_has_no_window_twice_and_none_across_the_seam() -> None:
    own = sampler(filled(10, 27))
    for batch_size, length in ((7, 4), (3, 4), (1, 10)):
        windows = own.draw_world_model(batch_size, length)
        assert len(set(first_steps(own, windows))) == batch_size
        np.testing.assert_array_equal(np.diff(steps(own, windows), axis=1), 1)


@pytest.mark.parametrize("draw", ["draw_world_model", "draw_imagination"])
def test_too_few_windows_are_refused_with_the_numbers(draw: str) -> None:
    own = sampler(filled(10, 6))
    message = r"4 different windows of 4 steps: the buffer has 3 \(6 transitions stored\)"
    with pytest.raises(ValueError, match=message):
        getattr(own, draw)(4, 4)
    assert getattr(own, draw)(3, 4).rows.shape == (3, 4)


def play(own: Sampler, rounds: int) -> list[Windows]:
    """What a training loop does: append and draw for both."""
    drawn = []
    for _ in range(rounds):
        append(own.buffer, 1)
        drawn.append(own.draw_world_model(3, 4))
        drawn.append(own.draw_imagination(6, 2))
    return drawn


@pytest.mark.parametrize("played", [9, 12, 40], ids=["filling", "full", "wrapped"])
@pytest.mark.parametrize("changes", [{}, {"sampling": "uniform"}, {"shuffle_rewards": True}])
def test_a_restored_sampler_draws_what_the_saved_one_draws(
    played: int, changes: dict[str, Any]
) -> None:
    own = sampler(filled(12, played), **changes)
    play(own, 7)
    state = own.state_dict()
    state["generator"] = json.loads(json.dumps(state["generator"]))
    saved = own.buffer.columns(own.buffer.first_step, own.buffer.total)

    buffer = ReplayBuffer(12, SHAPE)
    buffer.extend(saved)
    restored = sampler(buffer, seed=99, **changes)
    restored.load_state_dict(state)

    for expected, actual in zip(play(own, 30), play(restored, 30), strict=True):
        for name in Windows._fields:
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_array_equal(restored.counts(), own.counts())


def test_a_saved_state_does_not_change_when_the_sampler_goes_on() -> None:
    own = sampler(filled(12, 30))
    state = own.state_dict()
    play(own, 5)
    assert not state["world_model_counts"].any()
    assert state["total"] == 30


def test_a_state_is_refused_over_a_buffer_it_does_not_belong_to() -> None:
    state = sampler(filled(12, 30)).state_dict()
    with pytest.raises(ValueError, match="step 30, the buffer holds 12 up to step 31"):
        sampler(filled(12, 31)).load_state_dict(state)
    with pytest.raises(ValueError, match="refill the buffer"):
        sampler(filled(20, 30)).load_state_dict(state)
    with pytest.raises(ValueError, match="keys"):
        sampler(filled(12, 30)).load_state_dict({"total": 30})


def test_shuffled_rewards_are_the_same_rewards_in_other_places_of_the_batch() -> None:
    own = sampler(filled(60, 60), shuffle_rewards=True)
    windows = own.draw_world_model(8, 5)
    true, given = steps(own, windows), rewards(own, windows)  # a transition's reward is its step
    np.testing.assert_array_equal(np.sort(given, axis=None), np.sort(true, axis=None))
    assert given.shape == true.shape
    assert (given != true).mean() > 0.5
    # Over the whole batch, neither within windows nor window by window.
    assert not any(set(mixed) == set(row) for mixed in given for row in true)


def test_only_the_world_model_is_shown_shuffled_rewards_and_the_buffer_keeps_the_true_ones() -> (
    None
):
    own = sampler(filled(60, 60), shuffle_rewards=True)
    own.draw_world_model(8, 5)
    windows = own.draw_imagination(8, 5)
    np.testing.assert_array_equal(rewards(own, windows), steps(own, windows))
    np.testing.assert_array_equal(own.buffer.columns(0, 60)["reward"], np.arange(60))


def test_rewards_are_not_shuffled_otherwise() -> None:
    own = sampler(filled(60, 60))
    windows = own.draw_world_model(8, 5)
    np.testing.assert_array_equal(rewards(own, windows), steps(own, windows))


def test_a_generator_that_could_not_be_saved_is_refused_at_once() -> None:
    generator = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(ValueError, match="PCG64, not MT19937"):
        Sampler(settings(), filled(5, 5), 64.0, generator)
