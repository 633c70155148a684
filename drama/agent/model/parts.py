"""Convolution stacks while training on a CPU: the batch in parts that stay in the cache.

PyTorch applies one operation after the other to the whole batch. At size XS that is 2048 frames:
one activation takes half a gigabyte, and most of the time goes into moving such tensors to and from
memory. Here only the convolutions' outputs are stored. Batch norm and SiLU are computed on the way
into the next convolution, part by part, and once more on the way back.

Sums over the batch are added up in float64, part by part. They are more exact than those of
PyTorch's batch norm for channels-last tensors on a CPU, whose variances are off by 1.6e-3 at a
million values a channel (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

PART_VALUES = 2**20
"""Numbers in the largest activation of a part: 4 MiB, two cores' second-level cache."""
PARTS_THAT_PAY = 4
"""Fewer parts than that are as fast in one piece."""

Convolution: TypeAlias = nn.Conv2d | nn.ConvTranspose2d
Parts: TypeAlias = list[Tensor]
"""A batch cut into parts, each [F, channels, height, width] in channels-last memory."""


@dataclass(frozen=True)
class Stage:
    """What lies between two stored tensors: batch norm and SiLU, then a convolution.

    The first stage of an encoder has no norm, the last one no convolution.
    """

    norm: nn.BatchNorm2d | None
    convolution: Convolution | None

    def parameters(self) -> list[Tensor]:
        """Return weights and biases, in a fixed order."""
        return [
            p for module in (self.norm, self.convolution) if module for p in module.parameters()
        ]


class Moments(NamedTuple):
    """Mean and variance of each channel, float64 [channels], over so many values."""

    mean: Tensor
    variance: Tensor
    values: int


def stages(layers: Sequence[nn.Module]) -> list[Stage]:
    """Group convolutions, batch norms and the SiLU behind each batch norm into stages."""
    found: list[Stage] = []
    norm: nn.BatchNorm2d | None = None
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            norm = layer
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            found.append(Stage(norm, layer))
            norm = None
        else:
            assert isinstance(layer, nn.SiLU) and norm is not None, f"{layer} is of no stage"
    return found if norm is None else [*found, Stage(norm, None)]


def train_in_parts(layers: Sequence[nn.Module], x: Tensor, frames: int) -> Tensor:
    """Apply the layers in training mode, as `nn.Sequential` does, but for rounding.

    Under autocast everything stored is of its dtype; sums over the batch are not.

    Args:
        layers: as for `stages`, in training mode; running statistics are updated.
        x: [F, channels, height, width] on a CPU.
        frames: in a part.
    """
    order = stages(layers)
    parameters = [p for stage in order for p in stage.parameters()]
    lowered = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if lowered else x.dtype
    with torch.autocast("cpu", enabled=False):
        return _TrainInParts.apply(order, frames, x.to(dtype), *parameters)


def folded(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Return layers that compute the same in evaluation mode with batch norms in the convolutions.

    They hold copies of the parameters as these are now.
    """
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d) and kept and isinstance(kept[-1], nn.Conv2d):
            kept[-1] = fuse_conv_bn_eval(kept[-1], layer)
        else:
            kept.append(nn.SiLU(inplace=True) if isinstance(layer, nn.SiLU) else layer)
    return nn.Sequential(*kept)


class _TrainInParts(torch.autograd.Function):
    """Forward and backward pass of a list of stages."""

    @staticmethod
    def forward(
        ctx: Any, order: list[Stage], frames: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.order, ctx.frames, ctx.inputs, ctx.moments = order, frames, [], []
        parts = _split(x, frames)
        for stage in order:
            moments = _moments(parts) if stage.norm else None
            ctx.inputs.append(parts)
            ctx.moments.append(moments)
            convolve = _Convolution(stage.convolution, x.dtype)
            parts = [convolve.output(_activate(stage, moments, part)[1]) for part in parts]
            if stage.norm and moments:
                _update_running(stage.norm, moments)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs_input = ctx.needs_input_grad[2]
        parts = _split(gradient, ctx.frames)  # of what each stage puts out
        collected: list[Tensor] = []  # of the parameters, in the order of the stages
        norm: _NormGradient | None = None  # of the stage after this one
        for index, stage in reversed(list(enumerate(ctx.order))):
            moments, inputs = ctx.moments.pop(), ctx.inputs.pop()
            wanted = needs_input or index > 0 or stage.norm is not None
            convolution, norm_sums = _Convolution(stage.convolution, gradient.dtype), _Sums()
            for k, part in enumerate(inputs):
                normalised, activated = _activate(stage, moments, part)
                arriving = norm.input(k, parts[k]) if norm else parts[k]
                leaving = convolution.input_gradient(arriving, activated, wanted)
                if stage.norm:
                    leaving = torch.ops.aten.silu_backward(leaving, normalised)
                    norm_sums.add(_sum(leaving), _dot(leaving, part))
                parts[k] = leaving
            norm = stage.norm and _NormGradient(stage.norm, moments, inputs, norm_sums)
            own = [*(norm.parameters if norm else ()), *convolution.sums.values]
            collected = own + collected
        if not needs_input:
            return None, None, None, *collected
        whole = [norm.input(k, part) if norm else part for k, part in enumerate(parts)]
        return None, None, torch.cat(whole), *collected


class _Convolution:
    """A stage's convolution, or nothing, part by part; sums the gradients of its parameters.

    Args:
        layer: the convolution.
        dtype: what it computes in.
    """

    def __init__(self, layer: Convolution | None, dtype: torch.dtype) -> None:
        self.layer = layer
        self.sums = _Sums()
        if layer is None:
            return
        assert layer.bias is not None
        self.weight, self.bias = layer.weight.to(dtype), layer.bias.to(dtype)
        self.geometry = (
            layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding,
            layer.groups,
        )  # fmt: skip

    def output(self, x: Tensor) -> Tensor:
        """Convolve x."""
        if self.layer is None:
            return x
        return torch.ops.aten.convolution(x, self.weight, self.bias, *self.geometry)

    def input_gradient(self, gradient: Tensor, x: Tensor, wanted: bool) -> Tensor:
        """Return the gradient at the input x, if wanted."""
        if self.layer is None:
            return gradient
        leaving, *own = torch.ops.aten.convolution_backward(
            gradient, x, self.weight, self.bias.shape, *self.geometry, (wanted, True, True)
        )
        self.sums.add(*(value.to(self.layer.weight.dtype) for value in own))
        return leaving


class _NormGradient:
    """Gradient of a batch norm in training mode, once the sums over its whole batch are known.

    With g at its output, x^ its normalised input and means over each channel (Ioffe & Szegedy 2015,
    section 3): dx = weight / deviation * (g - mean(g) - x^ mean(g x^)), which is a g + b x + c.

    Args:
        norm: the batch norm.
        moments: of its input x.
        inputs: x, in parts.
        sums: over the batch, of g and of g x, float64 [channels] each.
    """

    def __init__(self, norm: nn.BatchNorm2d, moments: Moments, inputs: Parts, sums: _Sums) -> None:
        self.inputs = inputs
        total, product = sums.values
        mean, inverse = moments.mean, (moments.variance + norm.eps).rsqrt()  # float64 [channels]
        weight_gradient = (product - mean * total) * inverse  # sum of g x^
        a = norm.weight * inverse
        b = -a * inverse * weight_gradient / moments.values
        c = -a * total / moments.values - b * mean
        dtype = norm.weight.dtype
        self.parameters = [weight_gradient.to(dtype), total.to(dtype)]
        self.a, self.b, self.c = (v.to(dtype)[:, None, None] for v in (a, b, c))

    def input(self, k: int, gradient: Tensor) -> Tensor:
        """Turn part k of the gradient at the output into that at the input."""
        x = self.inputs[k]
        return torch.addcmul(self.c, x, self.b).addcmul_(gradient, self.a).to(x.dtype)


class _Sums:
    """Running sums of several tensors."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def add(self, *values: Tensor) -> None:
        """Add one part's."""
        if not self.values:
            self.values = list(values)
            return
        for total, value in zip(self.values, values, strict=True):
            total.add_(value)


def _split(x: Tensor, frames: int) -> Parts:
    return list(x.contiguous(memory_format=torch.channels_last).split(frames))


def _activate(stage: Stage, moments: Moments | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch norm of x and the SiLU of that; x itself where a stage has no norm."""
    norm = stage.norm
    if not norm or not moments:
        return x, x
    mean, variance = (moment.to(norm.weight.dtype) for moment in moments[:2])
    normalised = F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
    return normalised, F.silu(normalised)


def _moments(parts: Parts) -> Moments:
    count = sum(part.numel() // part.shape[1] for part in parts)
    sums = _Sums()
    for part in parts:
        sums.add(_sum(part), _dot(part, part))
    mean, square = (total / count for total in sums.values)
    return Moments(mean, (square - mean.square()).clamp(min=0), count)


def _sum(x: Tensor) -> Tensor:
    """Sum x [F, channels, height, width] over all but channels: float64 [channels]."""
    return x.sum((0, 2, 3), dtype=_at_least_float32(x)).double()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum the product of x and y over all but channels: float64 [channels].

    Both are [F, channels, height, width]. Through matrix products of all channels with all: far
    more multiplications than needed, and still faster than a product of that size that is written
    out and summed.
    """
    x, y = (  # [F, height width, channels]
        t.to(_at_least_float32(t)).permute(0, 2, 3, 1).flatten(1, 2) for t in (x, y)
    )
    return torch.bmm(x.transpose(1, 2), y).diagonal(dim1=1, dim2=2).sum(0).double()


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _update_running(norm: nn.BatchNorm2d, moments: Moments) -> None:
    """Move the running statistics as `nn.BatchNorm2d` does: the variance without bias."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None and norm.momentum is not None
    unbiased = moments.variance * moments.values / (moments.values - 1)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    norm.num_batches_tracked += 1
