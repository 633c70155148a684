"""Convolution stacks in parts: the same function and gradients as layer after layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from drama.agent.model.nets import ConvolutionStack, Decoder, Encoder, largest_activation
from drama.agent.model.parts import PARTS_THAT_PAY, folded, stages, train_in_parts
from drama.agent.settings import WorldModelSettings
from drama.pipeline.config import Preset

SIZE = 8
SETTINGS = WorldModelSettings.model_construct(
    channels=(4, 6), kernel=5, strides=(1, 2), categoricals=3, classes=4
)
PART = 5  # frames
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64


def encoder() -> ConvolutionStack:
    return Encoder(SIZE, SETTINGS).backbone


def decoder() -> ConvolutionStack:
    return Decoder(SIZE, SETTINGS).backbone


def random_stack(make: Callable[[], ConvolutionStack]) -> ConvolutionStack:
    """A stack in float64 whose every parameter is random, so that none can go unused unnoticed."""
    torch.manual_seed(0)
    stack = make().double().train()
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    return stack


def inputs(stack: ConvolutionStack, count: int) -> Tensor:
    first = next(layer for layer in stack if not isinstance(layer, nn.SiLU))
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.num_features
    side = SIZE if isinstance(first, nn.Conv2d) else SIZE // 2
    return torch.randn(count, channels, side, side, dtype=torch.float64)


def learn(
    stack: ConvolutionStack, x: Tensor, *, in_parts: bool, of_input: bool
) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one pass."""
    x = x.clone().requires_grad_(of_input)
    output = train_in_parts(list(stack), x, PART) if in_parts else stack(x)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype))
    found = {"output": output.detach(), **dict(stack.named_buffers())}
    found |= {f"gradient of {name}": p.grad for name, p in stack.named_parameters()}
    return found | ({"gradient of input": x.grad} if of_input else {})


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("count", [1, PART, 2 * PART + 2])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_parts_compute_what_layers_compute_one_after_the_other(
    make: Callable[[], ConvolutionStack], count: int, of_input: bool
) -> None:
    plain = random_stack(make)
    parts = copy.deepcopy(plain)
    x = inputs(plain, count)
    expected = learn(plain, x, in_parts=False, of_input=of_input)
    found = learn(parts, x, in_parts=True, of_input=of_input)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_statistics_of_many_values_keep_float32s_precision() -> None:
    """PyTorch's own batch norm, given the same channels-last memory, is off by 2e-4 here."""
    stack = random_stack(encoder).float()
    frames = torch.rand(2048, 3, 32, 32)
    expected = random_stack(encoder)
    expected(frames.double())
    train_in_parts(list(stack), frames, 16)
    for name, value in expected.named_buffers():
        found = dict(stack.named_buffers())[name]
        torch.testing.assert_close(found.double(), value.double(), rtol=3e-6, atol=3e-6)


def test_under_autocast_statistics_and_gradients_are_float32s() -> None:
    """And what is computed is float32's but for what bfloat16's 8 bits cost."""
    stack = random_stack(encoder).float()
    lowered, x = copy.deepcopy(stack), torch.rand(64, 3, SIZE, SIZE)
    expected = learn(stack, x, in_parts=True, of_input=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = train_in_parts(list(lowered), x, PART)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected["output"], rtol=0.1, atol=0.1)
    for name, buffer in lowered.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=2e-2, atol=2e-2)
    for name, parameter in lowered.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_folded_layers_compute_what_evaluation_computes() -> None:
    stack = random_stack(encoder)
    learn(stack, inputs(stack, 3), in_parts=False, of_input=False)  # moves the statistics
    stack.eval()
    x = inputs(stack, 3)
    fewer = folded(list(stack))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fewer)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    torch.testing.assert_close(fewer(x), stack(x), **TOLERANCE)
    for name, value in stack.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_parts_are_for_training_on_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for whoever chose them."""
    calls: list[int] = []
    monkeypatch.setattr(
        "drama.agent.model.nets.train_in_parts",
        lambda layers, x, frames: calls.append(frames) or train_in_parts(layers, x, frames),
    )
    stack = random_stack(encoder)
    stack.frames_at_once = PART
    large = inputs(stack, PARTS_THAT_PAY * PART + 1)
    stack(large)
    stack.in_parts = True
    stack(large[1:])
    stack.eval()(large)
    assert not calls
    stack.train()(large)
    assert calls == [PART]


def test_the_largest_activation(preset: Callable[..., Preset]) -> None:
    """Size XS: 16 channels of 64 x 64, of which 16 frames make a part."""
    xs = preset("xs").world_model
    assert largest_activation(64, xs) == 16 * 64 * 64
    inner = SETTINGS.model_copy(update={"channels": (4, 64), "strides": (4, 1)})
    assert largest_activation(64, inner) == 64 * 16 * 16
    assert Encoder(64, xs).backbone.frames_at_once == 16


def test_layers_that_form_no_stage_are_refused() -> None:
    with pytest.raises(AssertionError, match="ReLU"):
        stages([nn.Conv2d(3, 4, 5), nn.ReLU()])
