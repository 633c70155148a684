"""LaProp against a scalar implementation of the published formula; clipping, decay, warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drama.agent.model.sequence.mamba2 import GatedRMSNorm
from drama.agent.model.world_model import WorldModel
from drama.agent.settings import OptimiserSettings
from drama.agent.training.optim import LaProp, is_spared
from drama.pipeline.config import Preset

MakeSettings = Callable[..., OptimiserSettings]


@pytest.fixture
def make_settings(preset: Callable[..., Preset]) -> MakeSettings:
    """Size XS's world-model optimiser without warm-up and decay, but for what is given."""

    def make(**changes: Any) -> OptimiserSettings:
        plain: Mapping[str, Any] = {
            "learning_rate": 0.01, "warmup_updates": 0, "weight_decay": 0.0, "clip_norm": 1e9,
        }  # fmt: skip
        overrides = {"world_model": {"optimiser": {**plain, **changes}}}
        return preset("xs", overrides).world_model.optimiser

    return make


def parameter(values: list[float]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def apply(optimiser: LaProp, gradients: list[Any]) -> None:
    for p, gradient in zip(optimiser.parameters, gradients, strict=True):
        p.grad = None if gradient is None else torch.tensor(gradient)
    optimiser.step()


def scalar_laprop(
    theta: float,
    gradients: list[float],
    rates: list[float],
    decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-20,
) -> float:
    """The paper's update for one number: normalise first, then average; both corrected."""
    n = m = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        n = beta2 * n + (1 - beta2) * g * g
        m = beta1 * m + (1 - beta1) * g / (math.sqrt(n / (1 - beta2**t)) + epsilon)
        theta = theta * (1 - decay) - rate * m / (1 - beta1**t)
    return theta


def test_published_constants(preset: Callable[..., Preset]) -> None:
    """Betas 0.9 and 0.999, epsilon 1e-20, rate 4e-5, warm-up 1000; clip 1000 and 100."""
    for section, clip, decay in (("world_model", 1000, 1e-4), ("behaviour", 100, 0)):
        settings = getattr(preset("xs"), section).optimiser
        assert (settings.beta1, settings.beta2, settings.epsilon) == (0.9, 0.999, 1e-20)
        assert (settings.learning_rate, settings.warmup_updates) == (4e-5, 1000)
        assert (settings.clip_norm, settings.weight_decay) == (clip, decay)


def test_spared_parameters_keep_their_value(make_settings: MakeSettings) -> None:
    """Three updates without a gradient at decay 1/2: an eighth is left of what is not spared."""
    names = ("mixer.A_log", "mixer.D", "mixer.dt_bias", "norm.weight", "norm.bias", "conv.bias")
    left = {"norm.bias": 0.125, "conv.bias": 0.125, "matrix.weight": 0.125}
    for spares in ("nothing", "gains_and_dynamics"):
        parameters = {name: parameter([2.0, -4.0]) for name in names}
        parameters["matrix.weight"] = nn.Parameter(torch.tensor([[2.0, -4.0]]))
        optimiser = LaProp(parameters, make_settings(weight_decay=0.5, decay_spares=spares))
        for _ in range(3):
            apply(optimiser, [[[0.0, 0.0]] if p.ndim == 2 else [0.0, 0.0] for p in
                              parameters.values()])  # fmt: skip
        for name, p in parameters.items():
            share = 0.125 if spares == "nothing" else left.get(name, 1.0)
            assert p.flatten().tolist() == [2.0 * share, -4.0 * share], (spares, name)


@pytest.mark.parametrize("kind", ["mamba2", "mamba", "transformer", "gru", "rwkv"])
def test_what_is_spared_are_gains_and_dynamics(preset: Callable[..., Preset], kind: str) -> None:
    """By the layers' types: every norm's gain, and what mamba_ssm marks in a Mamba block."""
    overrides = {"sequence_model": {"kind": kind}}
    model = WorldModel(preset("quick", overrides).settings(), actions=3)
    norms = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, GatedRMSNorm)
    gains = {f"{n}.weight" for n, layer in model.named_modules() if isinstance(layer, norms)}
    marked = {"mamba2": ("A_log", "D", "dt_bias"), "mamba": ("A_log", "D")}.get(kind, ())
    blocks = preset("quick").sequence_model.blocks
    dynamics = {f"sequence.mixers.{b}.{name}" for b in range(blocks) for name in marked}
    spared = {name for name, p in model.named_parameters() if is_spared(name, p)}
    assert spared == gains | dynamics and len(gains) > 5


def test_nothing_is_spared_where_nothing_is_said(
    preset: Callable[..., Preset], make_settings: MakeSettings
) -> None:
    """xs, s and every toy; then the decayed are all parameters, in the one order of the others."""
    for name in ("xs", "s", "quick", "laptop", "catch", "xs-as-published"):
        assert preset(name).world_model.optimiser.decay_spares == "nothing"
    optimiser = LaProp({"norm.weight": parameter([1.0]), "D": parameter([1.0])}, make_settings())
    assert all(a is b for a, b in zip(optimiser.decayed, optimiser.parameters, strict=True))


def test_first_step_is_the_rate_whatever_the_gradient(make_settings: MakeSettings) -> None:
    """With both corrections the first update is rate * sign(gradient), from 1e-6 to 1e6."""
    p = parameter([1.0, 1.0, 1.0])
    apply(LaProp({"p": p}, make_settings()), [[1e-6, -1.0, 1e6]])
    torch.testing.assert_close(p.detach(), torch.tensor([0.99, 1.01, 0.99]))


def test_two_steps_by_hand(make_settings: MakeSettings) -> None:
    """Gradients 1 and 2, betas 1/2: ratios 1 and 2/sqrt(3), averaged 1/3 and 2/3."""
    p = parameter([0.0])
    optimiser = LaProp({"p": p}, make_settings(beta1=0.5, beta2=0.5))
    apply(optimiser, [[1.0]])
    apply(optimiser, [[2.0]])
    second = (0.25 * 1 + 0.5 * 2 / math.sqrt(2.25 / 0.75)) / 0.75
    assert p.item() == pytest.approx(-0.01 * (1 + second), rel=1e-5)


@pytest.mark.parametrize("epsilon", [1e-20, 0.1])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("warmup", [0, 7])
def test_against_the_scalar_formula(
    make_settings: MakeSettings, epsilon: float, decay: float, warmup: int
) -> None:
    """Twenty steps of three numbers in two tensors, gradients that change sign and size."""
    generator = np.random.default_rng(0)
    gradients = generator.normal(0, [[1.0, 1e-3, 50.0]], (20, 3))
    start = [0.7, -2.0, 3.0]
    one, two = parameter(start[:2]), parameter(start[2:])
    settings = make_settings(epsilon=epsilon, weight_decay=decay, warmup_updates=warmup)
    optimiser = LaProp({"one": one, "two": two}, settings)
    for g in gradients:
        apply(optimiser, [[float(g[0]), float(g[1])], [float(g[2])]])
    rates = [0.01 * min(1.0, (t + 1) / warmup) if warmup else 0.01 for t in range(20)]
    expected = [
        scalar_laprop(start[i], list(gradients[:, i]), rates, decay, epsilon=epsilon)
        for i in range(3)
    ]
    actual = torch.cat([one, two]).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_warm_up_rises_linearly(make_settings: MakeSettings) -> None:
    p = parameter([0.0])
    optimiser = LaProp({"p": p}, make_settings(learning_rate=0.8, warmup_updates=4))
    rates = []
    for _ in range(6):
        rates.append(optimiser.rate().item())
        apply(optimiser, [[1.0]])
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert p.item() == pytest.approx(-sum(rates), rel=1e-5), "a constant gradient moves by the rate"


def test_decay_is_not_scaled_by_the_rate(make_settings: MakeSettings) -> None:
    """Also in the first update of a long warm-up, and for parameters without a gradient."""
    one, two = parameter([2.0]), parameter([4.0])
    settings = make_settings(learning_rate=1e-9, warmup_updates=1000, weight_decay=0.25)
    apply(LaProp({"one": one, "two": two}, settings), [[1.0], None])
    assert one.item() == pytest.approx(1.5) and two.item() == pytest.approx(3.0)


def test_clipping_by_hand(make_settings: MakeSettings) -> None:
    """Norm 5 over two tensors, clipped to 1; the norm before is returned."""
    for clip, factor in ((1.0, 0.2), (10.0, 1.0)):
        one, two = parameter([1.0]), parameter([1.0])
        optimiser = LaProp({"one": one, "two": two}, make_settings(clip_norm=clip))
        norm = optimiser.minimise(3 * one.sum() + 4 * two.sum())
        assert norm.item() == pytest.approx(5.0)
        gradients = [one.grad.item(), two.grad.item()]
        assert gradients == pytest.approx([3 * factor, 4 * factor], rel=1e-4)
        squares = [s.item() for s in optimiser.squares]
        expected = [0.001 * (3 * factor) ** 2, 0.001 * (4 * factor) ** 2]
        assert squares == pytest.approx(expected, rel=1e-3)


def test_gradients_do_not_pile_up(make_settings: MakeSettings) -> None:
    p = parameter([1.0])
    optimiser = LaProp({"p": p}, make_settings())
    for _ in range(3):
        norm = optimiser.minimise(2 * p.sum())
    assert norm.item() == pytest.approx(2.0) and p.grad.item() == pytest.approx(2.0)


def test_it_finds_a_minimum(make_settings: MakeSettings) -> None:
    p = parameter([3.0, -1.0])
    optimiser = LaProp({"p": p}, make_settings(learning_rate=0.05, warmup_updates=10))
    for _ in range(400):
        optimiser.minimise(((p - torch.tensor([1.0, 2.0])) ** 2 * torch.tensor([1.0, 1e4])).sum())
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 2.0]), atol=0.1, rtol=0)


def test_zero_gradients_move_nothing(make_settings: MakeSettings) -> None:
    p = parameter([1.0, 2.0])
    apply(LaProp({"p": p}, make_settings()), [[0.0, 0.0]])
    assert p.tolist() == [1.0, 2.0]


def losses(p: nn.Parameter) -> list[Tensor]:
    return [(p * torch.tensor([float(i), -1.0])).sum() for i in range(1, 5)]


def test_state_round_trip_goes_on_exactly(make_settings: MakeSettings) -> None:
    """Also in the middle of the warm-up; through arrays, as a checkpoint holds them."""
    settings = make_settings(warmup_updates=5, weight_decay=1e-3)
    p = parameter([1.0, 2.0])
    optimiser = LaProp({"p": p}, settings)
    for loss in losses(p)[:2]:
        optimiser.minimise(loss)
    state = optimiser.state_dict()
    saved = {
        "updates": state["updates"],
        "averages": {name: v.numpy().copy() for name, v in state["averages"].items()},
        "squares": {name: v.numpy().copy() for name, v in state["squares"].items()},
    }
    q = nn.Parameter(p.detach().clone())
    other = LaProp({"p": q}, settings)
    other.load_state_dict(saved)
    for i in (2, 3):
        optimiser.minimise(losses(p)[i])
        other.minimise(losses(q)[i])
    assert torch.equal(p, q) and optimiser.rate() == other.rate() == settings.learning_rate


def test_states_of_other_parameters_are_refused(make_settings: MakeSettings) -> None:
    optimiser = LaProp({"p": parameter([1.0])}, make_settings())
    state = LaProp({"q": parameter([1.0])}, make_settings()).state_dict()
    with pytest.raises(KeyError, match="other parameters"):
        optimiser.load_state_dict(state)
