"""The frame around every mixer: stem, residual stream, dropout, norms, carried states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drama.agent.model.sequence import SequenceModel, build
from drama.agent.model.sequence.mamba2 import Mamba2
from drama.pipeline.config import Preset

INPUTS = 7
MakeModel = Callable[..., SequenceModel]


@pytest.fixture
def make_model(preset: Callable[..., Preset]) -> MakeModel:
    def make(**changes: Any) -> SequenceModel:
        sizes = {"width": 8, "head_width": 4, "state_size": 3, "chunk_length": 4}
        settings = preset("quick", {"sequence_model": sizes | changes}).sequence_model
        return build(INPUTS, settings)

    return make


def test_parallel_and_recurrent_forms_agree(make_model: MakeModel) -> None:
    model = make_model().eval()
    x = torch.randn(3, 11, INPUTS)
    whole, after = model(x)
    states, steps = model.initial_states(3, x.device), []
    for t in range(11):
        d, states = model.step(x[:, t], states)
        steps.append(d)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert len(after) == len(states) == 2
    for one, other in zip(after, states, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_sequence_in_two_halves(make_model: MakeModel, cut: int) -> None:
    model = make_model().eval()
    x = torch.randn(3, 8, INPUTS)
    whole, _ = model(x)
    first, states = model(x[:, :cut])
    second, _ = model(x[:, cut:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x[:, cut:])[0], second, atol=1e-3), "the state must matter"


def test_causality(make_model: MakeModel) -> None:
    model = make_model().eval()
    x = torch.randn(1, 9, INPUTS)
    base = model(x)[0]
    for t in range(9):
        changed = x.clone()
        changed[:, t, 0] += 1
        moved = (model(changed)[0] != base).any(-1)[0]
        assert not moved[:t].any() and moved[t:].all()


def test_stem_is_linear_norm_silu_with_zero_bias(make_model: MakeModel) -> None:
    model = make_model()
    linear, norm, activation = model.stem
    assert isinstance(linear, nn.Linear) and (linear.bias == 0).all()
    assert isinstance(norm, nn.RMSNorm) and norm.eps == 1e-5
    assert isinstance(activation, nn.SiLU)
    x = torch.randn(4, INPUTS)
    projected = x @ linear.weight.T
    normed = projected / (projected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.stem(x), normed * torch.sigmoid(normed))


class Recorder:
    """Keeps what modules were given and what they returned."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        self.inputs.append(given[0])
        self.outputs.append(result[0] if isinstance(result, tuple) else result)


@pytest.mark.parametrize("training", [True, False])
def test_residual_stream(make_model: MakeModel, training: bool) -> None:
    """Stem and blocks pass dropout before they join; blocks see the normed sum so far."""
    model = make_model(dropout=0.5).train(training)
    with torch.no_grad():
        for norm in (*model.norms, model.final_norm):
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    mixers, dropout, last = Recorder(), Recorder(), Recorder()
    for mixer in model.mixers:
        mixer.register_forward_hook(mixers)
    model.dropout.register_forward_hook(dropout)
    model.final_norm.register_forward_hook(last)
    x = torch.randn(2, 5, INPUTS)
    d, _ = model(x)
    assert torch.equal(dropout.inputs[0], model.stem(x))
    for before, after in zip(mixers.outputs, dropout.inputs[1:], strict=True):
        assert torch.equal(before, after)
    for given, joined in zip(dropout.inputs, dropout.outputs, strict=True):
        dropped = (joined == 0).float().mean().item()
        assert (0.2 < dropped < 0.8) if training else torch.equal(given, joined)
    first, second, third = dropout.outputs
    torch.testing.assert_close(mixers.inputs[0], model.norms[0](first))
    torch.testing.assert_close(mixers.inputs[1], model.norms[1](first + second))
    torch.testing.assert_close(last.inputs[0], first + second + third)
    torch.testing.assert_close(d, model.final_norm(first + second + third))


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
def test_the_residual_stream_is_float32_under_autocast(make_model: MakeModel) -> None:
    model, last = make_model().eval(), Recorder()
    model.final_norm.register_forward_hook(last)
    x = torch.randn(2, 5, INPUTS)
    exact, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        d, states = model(x)
        stepped, _ = model.step(x[:, 0], states)
    assert d.dtype == stepped.dtype == torch.float32
    assert [given.dtype for given in last.inputs] == 3 * [torch.float32]
    assert {v.dtype for state in states for v in state.values()} == {torch.float32}
    torch.testing.assert_close(d, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_output_projections_shrink_with_depth(preset: Callable[..., Preset], blocks: int) -> None:
    settings = preset("quick", {"sequence_model": {"blocks": blocks}}).sequence_model
    mixers = [Mamba2(settings) for _ in range(blocks)]
    before = [mixer.out_proj.weight.clone() for mixer in mixers]
    SequenceModel(INPUTS, settings, list(mixers))
    for mixer, weight in zip(mixers, before, strict=True):
        torch.testing.assert_close(mixer.out_proj.weight, weight / math.sqrt(blocks))


def test_built_as_configured(preset: Callable[..., Preset]) -> None:
    """Size XS with 6 actions: two blocks of width 512, 3 737 504 parameters."""
    model = build(1024 + 6, preset("xs").sequence_model)
    assert len(model.mixers) == 2 and model.width == 512 and model.dropout.p == 0.1
    assert all(isinstance(mixer, Mamba2) for mixer in model.mixers)
    assert sum(p.numel() for p in model.parameters()) == 3_737_504
