"""Lambda-returns and the return scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drama.agent.behaviour.returns import ReturnScale, lambda_return


def as_rows(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor([row]) for row in rows]


def test_by_hand() -> None:
    """gamma 1/2, lambda 1/2: G_1 = 2 + (4 + 4)/4 = 4, G_0 = 1 + (3 + 4)/4 = 2.75."""
    rewards, terminations, values = as_rows([1.0, 2.0], [0.0, 0.0], [100.0, 3.0, 4.0])
    returns = lambda_return(rewards, terminations, values, 0.5, 0.5)
    torch.testing.assert_close(returns, torch.tensor([[2.75, 4.0]]))


def test_by_hand_with_termination() -> None:
    """Nothing after an end counts: not the value of the next state, not the next reward."""
    rewards, values = as_rows([1.0, 2.0, 5.0], [100.0, 3.0, 4.0, 8.0])
    ended = torch.tensor([[False, True, False]])
    returns = lambda_return(rewards, ended, values, 0.5, 0.5)
    torch.testing.assert_close(returns, torch.tensor([[1 + (3 + 2) / 4, 2.0, 5 + 8 / 2]]))


def test_by_hand_as_published() -> None:
    """V_t instead of V_{t+1}: G_1 = 2 + (3 + 4)/4 = 3.75, G_0 = 1 + (100 + 3.75)/4.

    After an end neither counts; the last return is still followed by the last value.
    """
    values = torch.tensor([[100.0, 3.0, 4.0], [100.0, 3.0, 4.0]])
    ended = torch.tensor([[False, False], [True, False]])
    rewards = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    returns = lambda_return(rewards, ended, values, 0.5, 0.5, as_published=True)
    torch.testing.assert_close(returns, torch.tensor([[26.9375, 3.75], [1.0, 3.75]]))


trajectory = st.integers(1, 12).flatmap(
    lambda horizon: st.fixed_dictionaries(
        {
            "seed": st.integers(0, 9999),
            "horizon": st.just(horizon),
            "ends": st.lists(st.booleans(), min_size=horizon, max_size=horizon),
            "discount": st.floats(0.5, 1),
        }
    )
)


def draw(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(case["seed"])
    rewards = torch.randn(2, case["horizon"], generator=generator).double()
    values = torch.randn(2, case["horizon"] + 1, generator=generator).double()
    # The second row never ends: rows must not mix.
    ends = torch.tensor([case["ends"], [False] * case["horizon"]])
    return rewards, ends, values


@given(trajectory, st.floats(0, 1))
def test_is_the_mixture_of_n_step_returns(case: dict[str, Any], lambda_: float) -> None:
    """G_t = sum over n of (1 - lambda) lambda^(n-1) G^(n), the longest with the rest's weight."""
    rewards, ends, values = draw(case)
    horizon, discount = case["horizon"], case["discount"]
    expected = np.zeros((2, horizon))
    for row in range(2):
        for t in range(horizon):
            longest = horizon - t
            for n in range(1, longest + 1):
                weight = lambda_ ** (n - 1) * (1 - lambda_ if n < longest else 1)
                total, alive = 0.0, 1.0
                for k in range(n):
                    total += alive * rewards[row, t + k].item()
                    alive *= discount * (0 if ends[row, t + k] else 1)
                expected[row, t] += weight * (total + alive * values[row, t + n].item())
    actual = lambda_return(rewards, ends, values, discount, lambda_)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


@given(trajectory)
def test_lambda_zero_is_one_step(case: dict[str, Any]) -> None:
    rewards, ends, values = draw(case)
    expected = rewards + case["discount"] * ~ends * values[:, 1:]
    actual = lambda_return(rewards, ends, values, case["discount"], 0.0)
    torch.testing.assert_close(actual, expected)


@given(trajectory)
def test_lambda_one_uses_only_the_last_value(case: dict[str, Any]) -> None:
    rewards, ends, values = draw(case)
    other = torch.cat([torch.randn_like(values[:, :-1]), values[:, -1:]], 1)
    actual = lambda_return(rewards, ends, values, case["discount"], 1.0)
    torch.testing.assert_close(actual, lambda_return(rewards, ends, other, case["discount"], 1.0))


@pytest.mark.parametrize(("ends", "values"), [((2, 4), (2, 4)), ((2, 3), (2, 5)), ((1, 4), (2, 5))])
def test_shapes_that_would_broadcast_are_refused(
    ends: tuple[int, int], values: tuple[int, int]
) -> None:
    with pytest.raises(AssertionError):
        lambda_return(torch.zeros(2, 4), torch.zeros(ends), torch.zeros(values), 0.9, 0.9)


# --- the scale -----------------------------------------------------------------------------------


def test_scale_follows_the_range_from_zero() -> None:
    """EMA 0.99 from 0 of the range between the 5 % and the 95 % quantile."""
    scale = ReturnScale((0.05, 0.95), 0.99)
    expected = 0.0
    generator = np.random.default_rng(0)
    for _ in range(5):
        returns = generator.normal(3, 200, (6, 7)).astype(np.float32)
        scale.update(torch.from_numpy(returns))
        low, high = np.quantile(returns, [0.05, 0.95])
        expected = 0.99 * expected + 0.01 * (high - low)
        assert scale.average.item() == pytest.approx(expected, rel=1e-5)
        assert scale().item() == pytest.approx(max(1.0, expected), rel=1e-5)
    assert expected > 1


def test_small_ranges_are_not_blown_up() -> None:
    scale = ReturnScale((0.05, 0.95), 0.0)
    assert scale() == 1
    scale.update(torch.linspace(0, 0.5, 11))
    assert scale.average.item() == pytest.approx(0.45) and scale() == 1
    scale.update(torch.linspace(0, 50, 11))
    assert scale().item() == pytest.approx(45)


def test_scale_is_saved() -> None:
    scale, other = ReturnScale((0.05, 0.95), 0.5), ReturnScale((0.05, 0.95), 0.5)
    scale.update(torch.tensor([0.0, 10.0]))
    other.load_state_dict(scale.state_dict())
    assert other.average == scale.average and other.average > 0
