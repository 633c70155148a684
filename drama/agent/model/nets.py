"""Networks between pixels, latents and scalars: encoder, decoder, heads."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from drama.agent.model.parts import PART_VALUES, PARTS_THAT_PAY, folded, train_in_parts
from drama.agent.settings import WorldModelSettings

RGB = 3
NORM_EPSILON = 1e-5
"""For every RMSNorm: PyTorch's default depends on the dtype, 8e-3 under bfloat16."""
TRUNCATED_DEVIATION = 0.8796256610342398
"""Standard deviation of what is left of a unit normal when it is cut off at +-2."""


class RMSNorm(nn.RMSNorm):
    """The RMSNorm that the whole model uses: at its weight's precision, also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return super().forward(x.to(self.weight.dtype))


def glorot_truncated_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill with variance 2 / (fan-in + fan-out) from a normal truncated at two deviations."""
    deviation = math.sqrt(2 / (fan_in + fan_out)) / TRUNCATED_DEVIATION
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _initialise_convolution(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    area = layer.kernel_size[0] * layer.kernel_size[1]
    glorot_truncated_(layer.weight, layer.in_channels * area, layer.out_channels * area)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def initialise_linear(layer: nn.Linear) -> None:
    """Start a linear layer as the convolutions start: truncated normal, zero biases."""
    glorot_truncated_(layer.weight, layer.in_features, layer.out_features)
    nn.init.zeros_(layer.bias)


class _GradientChannelsLast(torch.autograd.Function):
    """Identity, whose gradient lies in memory as convolutions of channels-last weights want it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


class ConvolutionStack(nn.Sequential):
    """Convolutions, each batch norm followed by SiLU, in order.

    Args:
        layers: the modules.
        largest: numbers in the largest activation of one frame.

    Attributes:
        in_parts: whether to train large batches in parts on a CPU (see `drama.agent.model.parts`);
            rounding aside, the same.
        frames_at_once: in a part, so that it stays in the cache.
    """

    def __init__(self, layers: list[nn.Module], largest: int) -> None:
        super().__init__(*layers)
        self.in_parts = False
        self.frames_at_once = max(1, PART_VALUES // largest)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to x [F, channels, height, width]."""
        pays = len(x) > PARTS_THAT_PAY * self.frames_at_once
        if not self.in_parts or x.device.type != "cpu":
            return super().forward(x)
        if self.training and pays:
            return train_in_parts(list(self), x, self.frames_at_once)
        x = x.contiguous(memory_format=torch.channels_last)
        return _GradientChannelsLast.apply(super().forward(x))


def kernel_and_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Return a convolution's kernel size and padding, which shrink a picture `stride` times.

    Where the stride is larger than the kernel, the patches that it looks at would leave gaps: then
    it looks at the whole of each patch of stride x stride pixels, without overlap.
    """
    return (kernel, kernel // 2) if kernel >= stride else (stride, 0)


class Enlarge(nn.ConvTranspose2d):
    """The transposed convolution that undoes the size of one of the encoder's.

    Args:
        before: channels that go in.
        after: channels that come out.
        kernel: odd; see `kernel_and_padding`.
        stride: how many times larger the picture becomes.

    Attributes:
        as_product: whether to compute patches that do not overlap as one matrix product, which on a
            CPU is several times as fast; rounding aside, the same.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        size, padding = kernel_and_padding(kernel, stride)
        super().__init__(
            before, after, size, stride, padding, output_padding=stride - size + 2 * padding
        )
        self.as_product = False

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Enlarge x [F, before, height, width] to [F, after, stride height, stride width]."""
        if not self.as_product or self.padding != (0, 0) or x.device.type != "cpu":
            return super().forward(x, output_size)
        assert self.bias is not None
        side = self.stride[0]
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [side side after, before]
        bias = self.bias.repeat(side * side)
        patches = F.linear(x.permute(0, 2, 3, 1), weight, bias)  # [F, height, width, ...]
        rows = patches.unflatten(-1, (side, side * self.out_channels)).transpose(2, 3)
        height, width = x.shape[2] * side, x.shape[3] * side
        picture = rows.reshape(len(x), height, width, self.out_channels)
        return picture.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Frames to latent logits: q(z | o), from one frame alone.

    Args:
        image_size: height and width of a frame, pixels.
        settings: channels and strides, outermost first; kernel (see `kernel_and_padding`); K and C.
    """

    def __init__(self, image_size: int, settings: WorldModelSettings) -> None:
        super().__init__()
        self.latent_shape = (settings.categoricals, settings.classes)
        layers: list[nn.Module] = []
        before = RGB
        for after, stride in zip(settings.channels, settings.strides, strict=True):
            size, padding = kernel_and_padding(settings.kernel, stride)
            convolution = nn.Conv2d(before, after, size, stride, padding)
            _initialise_convolution(convolution)
            layers += [convolution, nn.BatchNorm2d(after), nn.SiLU()]
            before = after
        self.backbone = ConvolutionStack(layers, largest_activation(image_size, settings))
        features = math.prod(feature_shape(image_size, settings))
        self.logits = nn.Linear(features, math.prod(self.latent_shape))

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [F, 3, S, S], float in [0, 1], into logits [F, K, C]."""
        return self._logits(self.backbone(frames))

    def folded(self) -> Callable[[Tensor], Tensor]:
        """Return what computes `forward` in evaluation mode faster, with the parameters as now."""
        backbone = folded(list(self.backbone))
        return lambda frames: self._logits(backbone(frames))

    def _logits(self, features: Tensor) -> Tensor:
        return self.logits(features.flatten(1)).unflatten(-1, self.latent_shape)


class Decoder(nn.Module):
    """Latents to frames: the encoder's mirror, from z alone.

    Args:
        image_size: height and width of a frame, pixels.
        settings: the encoder's.
    """

    def __init__(self, image_size: int, settings: WorldModelSettings) -> None:
        super().__init__()
        channels = settings.channels
        self.feature_shape = feature_shape(image_size, settings)
        latent = settings.categoricals * settings.classes  # Z
        self.features = nn.Linear(latent, math.prod(self.feature_shape))
        initialise_linear(self.features)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels[-1]), nn.SiLU()]
        for level in reversed(range(len(channels))):
            after = channels[level - 1] if level else RGB
            convolution = Enlarge(channels[level], after, settings.kernel, settings.strides[level])
            _initialise_convolution(convolution)
            layers += [convolution]
            layers += [nn.BatchNorm2d(after), nn.SiLU()] if level else []
        self.backbone = ConvolutionStack(layers, largest_activation(image_size, settings))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents [F, Z] into frames [F, 3, S, S] in (0, 1)."""
        features = self.features(latents).unflatten(-1, self.feature_shape)
        return self.backbone(features).sigmoid()


def feature_shape(image_size: int, settings: WorldModelSettings) -> tuple[int, int, int]:
    """Return what the innermost convolution puts out for one frame: [channels, height, width]."""
    side = image_size // math.prod(settings.strides)
    return settings.channels[-1], side, side


def largest_activation(image_size: int, settings: WorldModelSettings) -> int:
    """Return how many numbers the largest output of a convolution has for one frame."""
    sides = (image_size // shrunk for shrunk in accumulate(settings.strides, operator.mul))
    return max(width * side * side for width, side in zip(settings.channels, sides, strict=True))


class Head(nn.Sequential):
    """A scalar's logits from the state: linear, RMSNorm, SiLU, linear.

    Args:
        width: D.
        hidden: width of the hidden layer.
        outputs: number of logits.
        zero_last: start with all logits zero (otherwise early imagined rewards reach +-50).
    """

    def __init__(self, width: int, hidden: int, outputs: int, *, zero_last: bool = False) -> None:
        last = nn.Linear(hidden, outputs)
        first = nn.Linear(width, hidden)
        super().__init__(first, RMSNorm(hidden), nn.SiLU(), last)
        for layer in (first, last):
            initialise_linear(layer)
        if zero_last:
            nn.init.zeros_(last.weight)


def multilayer_perceptron(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """Stack `layers` of [linear, RMSNorm, SiLU] and a last linear layer."""
    modules: list[nn.Module] = []
    for layer in range(layers):
        modules += [nn.Linear(hidden if layer else inputs, hidden), RMSNorm(hidden), nn.SiLU()]
    return nn.Sequential(*modules, nn.Linear(hidden, outputs))


def to_pixels(frames: Tensor) -> Tensor:
    """Turn stored frames, uint8 [..., S, S, 3], into [F, 3, S, S], float in [0, 1]."""
    flat = frames.flatten(0, -4) if frames.ndim > 4 else frames
    return flat.permute(0, 3, 1, 2).to(torch.float32).div_(255)
