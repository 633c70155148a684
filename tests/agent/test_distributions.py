"""Latent categoricals and two-hot scalars against hand-worked cases and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drama.agent.model.distributions import (
    TwoHot,
    categorical_kl,
    mixed_probabilities,
    sample_one_hot,
    straight_through,
    symexp,
    symlog,
)

E = math.e
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


# --- symlog and two-hot --------------------------------------------------------------------------


def test_symlog_by_hand() -> None:
    values = torch.tensor([0.0, E - 1, 1 - E, E**3 - 1])
    torch.testing.assert_close(symlog(values), torch.tensor([0.0, 1.0, -1.0, 3.0]))
    torch.testing.assert_close(symexp(torch.tensor([0.0, 1.0, -1.0])), values[:3])


@given(finite)
def test_symexp_inverts_symlog(value: float) -> None:
    assert symexp(symlog(torch.tensor(value))).item() == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0.25, [0, 0, 0.75, 0.25, 0]),
        (-1.5, [0.5, 0.5, 0, 0, 0]),
        (1.0, [0, 0, 0, 1, 0]),
        (0.0, [0, 0, 1, 0, 0]),
        (2.0, [0, 0, 0, 0, 1]),
        (7.0, [0, 0, 0, 0, 1]),
        (-7.0, [1, 0, 0, 0, 0]),
    ],
)
def test_two_hot_by_hand(position: float, expected: list[float]) -> None:
    """Bins at -2, -1, 0, 1, 2 in symlog space; beyond them values are clipped."""
    value = math.copysign(math.expm1(abs(position)), position)
    encoded = TwoHot(5, 2.0).encode(torch.tensor(value))
    torch.testing.assert_close(encoded, torch.tensor(expected).float(), atol=1e-5, rtol=0)


@given(st.lists(finite, min_size=1, max_size=5))
def test_two_hot_round_trip(values: list[float]) -> None:
    two_hot = TwoHot(255, 20.0)
    value = torch.tensor(values)
    encoded = two_hot.encode(value)  # [values, 255]
    assert (encoded >= 0).all()
    torch.testing.assert_close(encoded.sum(-1), torch.ones(len(values)))
    for row in encoded:
        occupied = row.nonzero().flatten()
        assert len(occupied) <= 2 and occupied[-1] - occupied[0] <= 1
    mean = encoded.double() @ torch.linspace(-20, 20, 255, dtype=torch.float64)
    torch.testing.assert_close(mean.float(), symlog(value), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(two_hot.decode(encoded.log()), value, atol=1e-4, rtol=1e-4)


def test_decoding_averages_in_symlog_space() -> None:
    """Half of bin -2 and half of bin 1 is symexp(-1/2), not the mean of the two values."""
    logits = torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0]).log()
    assert TwoHot(5, 2.0).decode(logits).item() == pytest.approx(-(E**0.5 - 1), rel=1e-5)


def test_two_hot_cross_entropy_by_hand() -> None:
    """Softmax [1/4, 1/2, 1/4], target [0, 1/2, 1/2]: (ln 2 + ln 4) / 2."""
    logits = torch.tensor([[0.0, math.log(2), 0.0]])
    loss = TwoHot(3, 1.0).loss(logits, torch.tensor([math.expm1(0.5)]))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(1.5 * math.log(2), rel=1e-5)


def test_two_hot_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(AssertionError, match="must agree"):
        TwoHot(5, 2.0).loss(torch.zeros(4, 3, 5), torch.zeros(4, 1))


def test_decoding_keeps_its_digits_under_autocast() -> None:
    """A value of 1000 in bfloat16 would be off by tens."""
    two_hot = TwoHot(255, 20.0)
    values = torch.tensor([1000.0, 1003.0, -0.37])
    logits = two_hot.encode(values).log()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = two_hot.decode(logits)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, values, rtol=1e-4, atol=1e-4)


def test_a_value_that_is_not_a_number_shows_in_the_loss() -> None:
    """The run is stopped by a loss that is not finite; an index error would hide its name."""
    loss = TwoHot(5, 2.0).loss(torch.zeros(2, 5), torch.tensor([float("nan"), 1.0]))
    assert loss.isnan().tolist() == [True, False]


# --- categoricals --------------------------------------------------------------------------------


def test_uniform_mixing_by_hand() -> None:
    """K = 1, C = 4: softmax [1/2, 1/6, 1/6, 1/6]; the share is spread over C, not K."""
    mixed = mixed_probabilities(torch.tensor([[math.log(3), 0.0, 0.0, 0.0]]), 0.01)
    expected = [0.99 / 2 + 0.0025] + 3 * [0.99 / 6 + 0.0025]
    torch.testing.assert_close(mixed, torch.tensor([expected]))


@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 1000))
def test_mixed_probabilities_are_probabilities(k: int, c: int, seed: int) -> None:
    logits = 30 * torch.randn(3, k, c, generator=torch.Generator().manual_seed(seed))
    mixed = mixed_probabilities(logits, 0.01)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(3, k))
    assert mixed.min() >= 0.01 / c * (1 - 1e-6)


def test_sampled_frequencies_match_probabilities() -> None:
    draws = 40_000
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.0, 0.02]])  # [K, C]
    samples = sample_one_hot(rows.expand(draws, 2, 4))
    assert samples.shape == (draws, 2, 4)
    assert (samples.sum(-1) == 1).all() and ((samples == 0) | (samples == 1)).all()
    deviation = (rows * (1 - rows) / draws).sqrt()
    assert ((samples.mean(0) - rows).abs() <= 4 * deviation + 1e-9).all()
    assert samples[:, 1, 2].sum() == 0


def test_samples_are_independent_across_batch_and_categoricals() -> None:
    samples = sample_one_hot(torch.full((20_000, 2, 2), 0.5))[..., 0]  # [draws, K]
    pairs = torch.stack([samples[:, 0], samples[:, 1], samples[:, 0].roll(1)])
    correlation = np.corrcoef(pairs.numpy())
    assert np.abs(correlation - np.eye(3)).max() < 0.03


@pytest.mark.parametrize(
    ("probabilities", "noise", "winner"),
    [
        ([0.5, 0.5], [1.0, 2.0], 0),
        ([0.25, 0.75], [1.0, 2.0], 1),
        ([0.25, 0.75], [1.0, 4.0], 0),
        ([0.0, 1.0], [1e-6, 9.0], 1),
    ],
)
def test_given_noise_decides(probabilities: list[float], noise: list[float], winner: int) -> None:
    """Waiting times noise / p: the shorter one wins."""
    sample = sample_one_hot(torch.tensor(probabilities), torch.tensor(noise))
    assert sample.argmax().item() == winner and sample.sum() == 1


def test_straight_through_is_one_hot_with_the_probabilities_gradient() -> None:
    probabilities = torch.softmax(torch.randn(5, 3, 4), -1).requires_grad_()
    noise = torch.rand(5, 3, 4)
    sample = straight_through(probabilities, noise)
    assert torch.equal(sample, sample_one_hot(probabilities, noise))
    assert not sample_one_hot(probabilities, noise).requires_grad
    weights = torch.randn(5, 3, 4)
    (sample * weights).sum().backward()
    assert torch.equal(probabilities.grad, weights)


def test_kl_by_hand() -> None:
    """KL([1/2, 1/2] || [1/4, 3/4]) = (ln 2 + ln 2/3) / 2, summed over the categoricals."""
    left = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]])
    right = torch.tensor([[[0.25, 0.75], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]]])
    one = (math.log(2) + math.log(2 / 3)) / 2
    other = math.log(0.5) / 4 + 0.75 * math.log(1.5)
    torch.testing.assert_close(categorical_kl(left, right), torch.tensor([2 * one, other]))


def test_kl_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(AssertionError):
        categorical_kl(torch.full((2, 3, 2), 0.5), torch.full((1, 3, 2), 0.5))


def test_kl_against_torch_distributions() -> None:
    left, right = (torch.softmax(torch.randn(6, 3, 4), -1) for _ in range(2))
    distribution = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(distribution(left), distribution(right)).sum(-1)
    torch.testing.assert_close(categorical_kl(left, right), expected)
