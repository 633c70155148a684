"""Convolution stacks in parts: the same function and gradients as layer after layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from drama.model.nets import ConvolutionStack, Decoder, Encoder
from drama.model.parts import FRAMES_AT_ONCE, stages, train_in_parts

SIZE, CHANNELS, STRIDES, LATENT = 8, [4, 6], [1, 2], (3, 4)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64


def encoder() -> ConvolutionStack:
    return Encoder(SIZE, CHANNELS, STRIDES, *LATENT).backbone


def decoder() -> ConvolutionStack:
    return Decoder(SIZE, CHANNELS, STRIDES, LATENT[0] * LATENT[1]).backbone


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


def learn(stack: ConvolutionStack, x: Tensor, *, of_input: bool) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one pass."""
    x = x.clone().requires_grad_(of_input)
    output = stack(x)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype))
    found = {"output": output.detach(), **dict(stack.named_buffers())}
    found |= {f"gradient of {name}": p.grad for name, p in stack.named_parameters()}
    return found | ({"gradient of input": x.grad} if of_input else {})


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("count", [1, FRAMES_AT_ONCE, 2 * FRAMES_AT_ONCE + 5])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_parts_compute_what_layers_compute_one_after_the_other(
    make: Callable[[], ConvolutionStack], count: int, of_input: bool
) -> None:
    plain = random_stack(make)
    parts = copy.deepcopy(plain)
    parts.in_parts = True
    x = inputs(plain, count)
    expected, found = (learn(stack, x, of_input=of_input) for stack in (plain, parts))
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
    train_in_parts(list(stack), frames)
    for name, value in expected.named_buffers():
        found = dict(stack.named_buffers())[name]
        torch.testing.assert_close(found.double(), value.double(), rtol=3e-6, atol=3e-6)


def test_evaluation_uses_running_statistics_and_leaves_them() -> None:
    stack = random_stack(encoder)
    learn(stack, inputs(stack, 3), of_input=False)
    stack.eval()
    before = {name: value.clone() for name, value in stack.named_buffers()}
    x = inputs(stack, 3)
    plain = stack(x)
    stack.in_parts = True
    assert torch.equal(stack(x), plain)
    for name, value in stack.named_buffers():
        assert torch.equal(value, before[name]), name


def test_layers_that_form_no_stage_are_refused() -> None:
    with pytest.raises(AssertionError, match="ReLU"):
        stages([nn.Conv2d(3, 4, 5), nn.ReLU()])
