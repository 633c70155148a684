"""Encoder, decoder, heads: shapes, order of layers, initialisation, pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from drama.agent.model.nets import (
    Decoder,
    Encoder,
    Enlarge,
    Head,
    RMSNorm,
    glorot_truncated_,
    multilayer_perceptron,
    to_pixels,
)
from drama.agent.settings import WorldModelSettings

XS_CHANNELS = (16, 32, 48, 64, 64)
XS_STRIDES = (1, 2, 2, 2, 2)


def sizes(
    channels: tuple[int, ...], kernel: int, strides: tuple[int, ...], *latent: int
) -> WorldModelSettings:
    """What encoder and decoder read of the settings; `latent` is K and C."""
    return WorldModelSettings.model_construct(
        channels=channels, kernel=kernel, strides=strides, categoricals=latent[0], classes=latent[1]
    )


def convolutions(module: nn.Module) -> list[tuple[int, int, int, int, int]]:
    """In, out, kernel, stride, padding of each convolution, in order."""
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0])
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]


def kinds(module: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in module]


def test_pixels_by_hand() -> None:
    frames = np.zeros((2, 3, 4, 5, 3), np.uint8)  # [B, L, height, width, 3]
    frames[1, 2, 3, 4, 1] = 255
    frames[0, 1, 0, 2, 2] = 51
    pixels = to_pixels(torch.from_numpy(frames))
    assert pixels.shape == (6, 3, 4, 5) and pixels.dtype == torch.float32
    assert pixels[5, 1, 3, 4] == 1
    assert pixels[1, 2, 0, 2] == pytest.approx(0.2)
    assert pixels.sum() == pytest.approx(1.2)
    assert torch.equal(to_pixels(torch.from_numpy(frames[1])), pixels[3:])


def test_xs_encoder_layers() -> None:
    encoder = Encoder(64, sizes(XS_CHANNELS, 5, XS_STRIDES, 32, 32))
    assert convolutions(encoder) == [
        (3, 16, 5, 1, 2),
        (16, 32, 5, 2, 2),
        (32, 48, 5, 2, 2),
        (48, 64, 5, 2, 2),
        (64, 64, 5, 2, 2),
    ]
    assert kinds(encoder.backbone) == 5 * ["Conv2d", "BatchNorm2d", "SiLU"]
    assert encoder.logits.in_features == 1024 and encoder.logits.out_features == 1024


def test_xs_decoder_layers() -> None:
    decoder = Decoder(64, sizes(XS_CHANNELS, 5, XS_STRIDES, 32, 32))
    assert (decoder.features.in_features, decoder.features.out_features) == (1024, 1024)
    assert convolutions(decoder) == [
        (64, 64, 5, 2, 2),
        (64, 48, 5, 2, 2),
        (48, 32, 5, 2, 2),
        (32, 16, 5, 2, 2),
        (16, 3, 5, 1, 2),
    ]
    block = ["Enlarge", "BatchNorm2d", "SiLU"]
    expected = ["BatchNorm2d", "SiLU", *4 * block, "Enlarge"]
    assert kinds(decoder.backbone) == expected


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "strides"),
    [
        (64, (4, 4, 4, 4, 4), 5, XS_STRIDES),
        (64, (2, 3, 5), 5, (4, 2, 2)),
        (16, (3,), 5, (4,)),
        (64, (4, 6), 3, (8, 2)),
        (48, (4, 6, 2), 3, (4, 3, 1)),
    ],
)
def test_decoder_mirrors_encoder(
    size: int, channels: tuple[int, ...], kernel: int, strides: tuple[int, ...]
) -> None:
    frames = torch.rand(2, 3, size, size)
    of_both = sizes(channels, kernel, strides, 3, 5)
    logits = Encoder(size, of_both)(frames)
    assert logits.shape == (2, 3, 5)
    decoded = Decoder(size, of_both)(logits.flatten(1))
    assert decoded.shape == frames.shape
    assert decoded.min() > 0 and decoded.max() < 1


def test_a_stride_beyond_the_kernel_takes_whole_patches() -> None:
    """Each patch of 8x8 pixels is seen by one place of the output, and by no other."""
    first = Encoder(32, sizes((4,), 3, (8,), 2, 3)).backbone[0]
    frame = torch.zeros(1, 3, 32, 32)
    still = first(frame)
    for row, column in ((0, 0), (7, 15), (31, 31), (8, 23)):
        shown = frame.clone()
        shown[0, :, row, column] = 1
        changed = (first(shown) != still).any(1)[0].nonzero().tolist()
        assert changed == [[row // 8, column // 8]]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 8), (1, 2), (3, 3), (5, 2)])
def test_enlarging_by_a_product_is_the_transposed_convolution(kernel: int, stride: int) -> None:
    layer = Enlarge(5, 3, kernel, stride).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for layer.as_product in (False, True):
        y = layer(x)
        weights = torch.arange(y.numel(), dtype=torch.float64).view_as(y).sin()
        wanted = [x, layer.weight, layer.bias]
        results.append([y, *torch.autograd.grad((y * weights).sum(), wanted)])
    assert results[0][0].shape == (2, 3, 4 * stride, 6 * stride)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_each_frame_is_encoded_alone_when_not_training() -> None:
    encoder = Encoder(16, sizes((4, 4), 5, (2, 2), 2, 3)).eval()
    frames = torch.rand(5, 3, 16, 16)
    alone = torch.cat([encoder(frame[None]) for frame in frames])
    torch.testing.assert_close(encoder(frames), alone)


def test_truncated_normal_has_the_variance_it_names() -> None:
    """2 / (fan-in + fan-out) after the truncation at two of the normal's deviations."""
    weight = torch.empty(400, 600)
    glorot_truncated_(weight, 600, 400)
    assert weight.var().item() == pytest.approx(2 / 1000, rel=0.02)
    parent = math.sqrt(2 / 1000) / 0.8796256610342398
    assert 1.95 * parent < weight.abs().max().item() <= 2 * parent
    assert abs(weight.mean().item()) < 4 * math.sqrt(2 / 1000 / weight.numel())


@pytest.mark.parametrize("module", ["encoder", "decoder"])
def test_convolutions_start_glorot_with_zero_biases(module: str) -> None:
    net = {"encoder": Encoder, "decoder": Decoder}[module](
        64, sizes(XS_CHANNELS, 5, XS_STRIDES, 2, 2)
    )
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            variance = 2 / (25 * (layer.in_channels + layer.out_channels))
            tolerance = 6 / math.sqrt(layer.weight.numel())
            assert layer.weight.var().item() == pytest.approx(variance, rel=tolerance)
            assert (layer.bias == 0).all()


def test_head_initialisation() -> None:
    zeroed, other = Head(64, 128, 30, zero_last=True), Head(64, 128, 30)
    assert (zeroed(torch.randn(3, 64)) == 0).all()
    for head in (zeroed, other):
        assert (head[0].bias == 0).all() and (head[3].bias == 0).all()
        assert head[0].weight.var().item() == pytest.approx(2 / 192, rel=0.06)
    assert other[3].weight.var().item() == pytest.approx(2 / 158, rel=0.08)


def numpy_block(layer: nn.Linear, norm: nn.RMSNorm, x: np.ndarray) -> np.ndarray:
    """Linear, RMSNorm (epsilon 1e-5), SiLU in float64."""
    x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    scale = norm.weight.detach().double().numpy()
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    return x / (1 + np.exp(-x))


def test_head_and_perceptron_against_numpy() -> None:
    for net in (Head(6, 5, 4), multilayer_perceptron(6, 5, 3, 4)):
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(7, 6)
        hidden = x.double().numpy()
        for first in range(0, len(net) - 1, 3):
            assert isinstance(net[first + 2], nn.SiLU)
            hidden = numpy_block(net[first], net[first + 1], hidden)
        last = net[-1]
        expected = hidden @ last.weight.detach().double().numpy().T
        expected += last.bias.detach().double().numpy()
        np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_perceptron_depth(layers: int) -> None:
    net = multilayer_perceptron(6, 5, layers, 4)
    assert kinds(net) == layers * ["Linear", "RMSNorm", "SiLU"] + ["Linear"]


def test_norm_does_not_change_its_epsilon_with_the_precision() -> None:
    """PyTorch's default epsilon under bfloat16 is 8e-3, which would swallow small inputs."""
    x = torch.full((1, 4), 1e-2)
    expected = 1e-2 / math.sqrt(1e-4 + 1e-5)
    assert RMSNorm(4)(x)[0, 0].item() == pytest.approx(expected, rel=1e-5)
    low = RMSNorm(4).bfloat16()(x.bfloat16())
    assert low[0, 0].item() == pytest.approx(expected, rel=0.01)
