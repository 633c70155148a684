"""Which backend computes Mamba-2 over a sequence, and the calls into mamba_ssm's fused kernels.

Two backends take the same parameters and carry the same state: `torch`, plain PyTorch, which runs
everywhere and is the reference, and `mamba_ssm`, the authors' CUDA kernels (Dao & Gu 2024, section
8) for the convolution and the scan. These compile when they first run, and can be captured in a
CUDA graph from then on. Shapes are in the paper's letters, as in `mamba2.py`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from drama.agent.settings import Backend, SequenceModelSettings
from drama.errors import ConfigurationError

MODULES = ("causal_conv1d", "mamba_ssm.ops.triton.ssd_combined")
CHANNEL_MULTIPLE = 8
"""The convolution kernel's condition on its number of channels, inner + 2N."""

KERNEL_SETTINGS = {
    # One choice of block sizes, and sums in a fixed order: the same bytes in every process.
    "MAMBA_DETERMINISTIC": "1",
    "CAUSAL_CONV1D_DETERMINISTIC": "1",
    # Triton would round the factors of float32 products to TF32's 11 bits.
    "TRITON_F32_DEFAULT": "tf32x3",
}
"""Environment variables that the kernels read; who sets one differently is left alone."""


@dataclass(frozen=True)
class Choice:
    """The backend that is used, and why."""

    name: Literal["torch", "mamba_ssm"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(wanted: Backend, device: torch.device, settings: SequenceModelSettings) -> Choice:
    """Choose the backend of a sequence model.

    Args:
        wanted: what was asked for; `auto` is mamba_ssm where it can be used, torch elsewhere.
        device: where the model lives.
        settings: of the sequence model; only Mamba-2 has a choice.

    Raises:
        ConfigurationError: when mamba_ssm is asked for and cannot be used, saying why.
    """
    if settings.kind != "mamba2":
        return Choice("torch", f"mamba_ssm is for mamba2; the sequence model is {settings.kind}")
    if wanted == "torch":
        return Choice("torch", "as asked")
    obstacle = _obstacle(device, settings)
    if not obstacle:
        return Choice("mamba_ssm", "as asked" if wanted == "mamba_ssm" else "it loads, on a GPU")
    if wanted == "mamba_ssm":
        raise ConfigurationError(
            f"backend = 'mamba_ssm': it cannot be used: {obstacle}. Use auto or torch, or run in "
            "the CUDA image of `make container`, which has it"
        )
    return Choice("torch", obstacle)


def _obstacle(device: torch.device, settings: SequenceModelSettings) -> str | None:
    """Say why mamba_ssm cannot be used for a Mamba-2 model, None when it can."""
    if device.type != "cuda":
        return f"mamba_ssm needs a CUDA GPU; the device is {device.type}"
    channels = settings.expand * settings.width + 2 * settings.state_size
    if channels % CHANNEL_MULTIPLE:
        return (
            f"causal_conv1d needs a multiple of {CHANNEL_MULTIPLE} channels, and "
            f"expand * width + 2 * state_size = {channels}"
        )
    for name, value in KERNEL_SETTINGS.items():
        os.environ.setdefault(name, value)
    for module in MODULES:
        try:
            with warnings.catch_warnings():  # it warns of what these settings ask for
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        # Compiled for other versions or another machine, it can fail in any way.
        except Exception as error:
            package = module.partition(".")[0]
            return f"{package} does not load: {type(error).__name__}: {error}"
    return None


# --- the kernels ---------------------------------------------------------------------------------


def convolve(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    """Convolve along time with one filter per channel, then SiLU; rounds once, at the end.

    Args:
        x: [B, W - 1 + L, channels], contiguous.
        convolution: depthwise, of width W, with bias.

    Returns:
        [B, L, channels], in x's dtype.
    """
    from causal_conv1d import causal_conv1d_fn

    weight = convolution.weight.squeeze(1)  # [channels, W]
    y = causal_conv1d_fn(x.transpose(1, 2), weight, convolution.bias, activation="silu")
    # It pads with zeros; x holds what really came before.
    return y.transpose(1, 2)[:, weight.shape[1] - 1 :]


def scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor,
    chunk_length: int,
) -> tuple[Tensor, Tensor]:
    """Compute Mamba-2's recurrence, step sizes and skip connection included.

    x, B and C are of one dtype, which is what products are taken in: float32's to some 21 bits,
    bfloat16's to 8. Sums, decays and the state between chunks are float32.

    Args as for `mamba2.chunked_scan`, but for:
        dt: step sizes before bias and softplus [B, L, H].
        dt_bias: [H].
        skip: D [H].

    Returns:
        y [B, L, H, P] in x's dtype and h after the last step, float32 [B, H, P, N].
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, state = mamba_chunk_scan_combined(
        x,
        dt,
        a,
        b.unsqueeze(2),  # [B, L, 1, N]: one group
        c.unsqueeze(2),
        chunk_length,
        D=skip,
        dt_bias=dt_bias,
        initial_states=state,
        dt_softplus=True,
        return_final_states=True,
    )
    return y, state
