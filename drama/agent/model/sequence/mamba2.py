"""Mamba-2 (Dao & Gu 2024) in plain PyTorch: chunked parallel scan and single-step recurrence.

Per head with width P and state width N, with a scalar A < 0 and a step size dt_t > 0:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h [P, N]
    y_t = h_t C_t + D x_t

Parameters carry the names and shapes of `mamba_ssm.modules.mamba2.Mamba2` (one group, gated
RMSNorm after the scan), so weights move between the two.

Letters are the paper's: in shapes, H is the number of heads, P their width, N that of the state, Q
the steps of a chunk; B, L and D are everyone's (`drama.agent.shapes`), W is the convolution's
width. In formulas A, B, C, D, x, y and h are the tensors above.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.model.nets import NORM_EPSILON
from drama.agent.model.sequence import kernels
from drama.agent.model.sequence.base import Mixer, State, parameter
from drama.agent.settings import SequenceModelSettings

A_RANGE = (1.0, 16.0)
DT_RANGE = (0.001, 0.1)
DT_FLOOR = 1e-4


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t in blocks.

    Inside a chunk the recurrence is written out as masked attention; between chunks one state is
    carried (state-space duality, Dao & Gu 2024, section 6). Cost grows linearly with L.

    Args:
        x: inputs [B, L, H, P].
        dt: step sizes [B, L, H], positive.
        a: decay rates [H], negative.
        b: input projections [B, L, N], shared by the heads.
        c: output projections [B, L, N], shared by the heads.
        state: h before the first step [B, H, P, N].
        chunk_length: steps per chunk, at least 1; L need not be a multiple.

    Returns:
        y [B, L, H, P] and h after the last step [B, H, P, N].
    """
    outputs: list[Tensor] = []
    # Split once: each slice would have a gradient of the whole length, in all quadratic work.
    parts = zip(*(tensor.split(chunk_length, 1) for tensor in (x, dt, b, c)), strict=True)
    for x_part, dt_part, b_part, c_part in parts:
        y, state = _scan_chunk(x_part, dt_part, a, b_part, c_part, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _scan_chunk(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan one chunk of Q steps; shapes as in `chunked_scan` with L = Q."""
    length = x.shape[1]
    weighted = (x * dt.unsqueeze(-1)).transpose(1, 2)  # [B, H, Q, P]
    # Differences of long sums lose float32's last digits: one large step size among small ones
    # would put an error of 1e-4 on every later decay of its chunk.
    log_decay = (dt * a).transpose(1, 2).double().cumsum(-1)  # [B, H, Q]: from the start to t
    # Masked before the exponential: above the diagonal it would overflow.
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).to(x.dtype)  # from s to t
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    decay = between.masked_fill(~causal, -torch.inf).exp()  # [B, H, Q, Q]
    scores = torch.bmm(c, b.transpose(1, 2)).unsqueeze(1) * decay  # [B, H, Q, Q]
    inside = scores @ weighted  # [B, H, Q, P]
    carried = c.unsqueeze(1) @ state.transpose(-1, -2)  # [B, H, Q, P]
    from_start = log_decay.to(x.dtype).exp()  # [B, H, Q]
    y = inside + carried * from_start.unsqueeze(-1)
    to_end = (log_decay[..., -1:] - log_decay).to(x.dtype).exp()  # [B, H, Q]
    added = (weighted * to_end.unsqueeze(-1)).transpose(-1, -2) @ b.unsqueeze(1)  # [B, H, P, N]
    state = state * from_start[..., -1, None, None] + added
    return y.transpose(1, 2), state


def initial_dt_bias(count: int) -> Tensor:
    """Draw step sizes, even on a logarithmic scale; return what softplus makes them of, [count]."""
    low, high = map(math.log, DT_RANGE)
    dt = torch.exp(torch.rand(count, device="cpu") * (high - low) + low).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * SiLU(gate), with a learned scale per channel."""

    def __init__(self, width: int, epsilon: float = NORM_EPSILON) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise x [..., inner] after gating it with gate [..., inner], in float32."""
        gated = x.float() * F.silu(gate.float())
        return F.rms_norm(gated, gated.shape[-1:], self.weight, self.epsilon)


class Mamba2(Mixer):
    """A Mamba-2 mixer: projection, causal convolution, scan, gated norm, projection.

    Args:
        settings: width D, expand, head_width P, state_size N, convolution_width, chunk_length.
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.inner = settings.expand * width
        self.head_width = settings.head_width
        self.heads = self.inner // settings.head_width
        self.state_size = settings.state_size
        self.chunk_length = settings.chunk_length
        self.convolved = self.inner + 2 * settings.state_size
        self.projected = [self.inner, self.convolved, self.heads]  # gate, x with B and C, dt
        self.in_proj = nn.Linear(width, sum(self.projected), bias=False)
        self.conv1d = nn.Conv1d(
            self.convolved, self.convolved, settings.convolution_width, groups=self.convolved
        )
        self.memory = settings.convolution_width - 1
        self.dt_bias = parameter(initial_dt_bias(self.heads), self.heads)
        rates = torch.empty(self.heads, device="cpu").uniform_(*A_RANGE)
        self.A_log = parameter(rates.log(), self.heads)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.fused = False  # `use_backend` says otherwise

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros: `convolution` [B, W - 1, inner + 2N] and `scan` [B, H, P, N]."""
        return {
            "convolution": torch.zeros(batch, self.memory, self.convolved, device=device),
            "scan": torch.zeros(batch, self.heads, self.head_width, self.state_size, device=device),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        gate, raw, dt = self.in_proj(x).split(self.projected, -1)
        history = torch.cat([state["convolution"].to(raw.dtype), raw], 1)  # [B, W - 1 + L, ...]
        mix = self._mix_fused if self.fused else self._mix
        y, scan = mix(history, dt, state["scan"])  # [B, L, inner], [B, H, P, N]
        output = self.out_proj(self.norm(y, gate))
        return output, {"convolution": history[:, -self.memory :].float(), "scan": scan}

    def _mix(self, history: Tensor, dt: Tensor, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and scan in plain PyTorch.

        Args:
            history: what the convolution sees [B, W - 1 + L, inner + 2N].
            dt: raw step sizes [B, L, H].
            scan: h before the first step [B, H, P, N].

        Returns:
            y [B, L, inner] and h after the last step [B, H, P, N].
        """
        convolved = F.silu(self.conv1d(history.transpose(1, 2)).transpose(1, 2))  # [B, L, ...]
        # The scan sums many small terms: float32 also under autocast.
        with torch.autocast(history.device.type, enabled=False):
            inputs, b, c = self._split(convolved.float())
            step_size = F.softplus(dt.float() + self.dt_bias)  # [B, L, H]
            decay_rate = -self.A_log.float().exp()
            y, scan = chunked_scan(inputs, step_size, decay_rate, b, c, scan, self.chunk_length)
            return (y + self.D.unsqueeze(-1) * inputs).flatten(-2), scan

    def _mix_fused(self, history: Tensor, dt: Tensor, scan: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and scan with mamba_ssm's kernels, in the dtype of `history`; as `_mix`.

        The kernels take what the projection yields, as the authors' own layer does: float32, or
        bfloat16 under autocast, where `_mix` scans in float32. Every result and gradient agrees
        with `_mix` to 2e-5 of its largest number, under autocast to 8 roundings of that dtype.
        `step` has no such twin: their kernels for single steps overwrite the state, which callers
        keep, and have no gradient.
        """
        inputs, b, c = self._split(kernels.convolve(history, self.conv1d))
        decay_rate = -self.A_log.float().exp()
        y, scan = kernels.scan(
            inputs, dt, self.dt_bias, decay_rate, b, c, self.D, scan, self.chunk_length
        )
        return y.flatten(-2), scan

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: x [B, D] and the state to output [B, D] and the next state."""
        gate, raw, dt = self.in_proj(x).split(self.projected, -1)
        history = torch.cat([state["convolution"], raw.float().unsqueeze(1)], 1)  # [B, W, ...]
        assert self.conv1d.bias is not None
        # In float32 also under autocast, as in `forward`: errors in the state would pile up.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.conv1d.weight.squeeze(1).T  # [W, inner + 2N]
            convolved = (history * weight).sum(1) + self.conv1d.bias
            inputs, b, c = self._split(F.silu(convolved))
            step_size = F.softplus(dt.float() + self.dt_bias)  # [B, H]
            decay = torch.exp(-step_size * self.A_log.float().exp())[..., None, None]
            scan = state["scan"] * decay  # [B, H, P, N]
            scan.addcmul_((inputs * step_size.unsqueeze(-1)).unsqueeze(-1), b[:, None, None, :])
            # The vector stands first: the other way round takes five times as long on a CPU.
            y = torch.bmm(c.unsqueeze(1), scan.flatten(1, 2).mT).view_as(inputs)  # [B, H, P]
            y = y + self.D.unsqueeze(-1) * inputs
        output = self.out_proj(self.norm(y.flatten(-2), gate))
        return output, {"convolution": history[:, 1:], "scan": scan}

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x [..., H, P], B [..., N] and C [..., N]."""
        x, b, c = convolved.split([self.inner, self.state_size, self.state_size], -1)
        return x.unflatten(-1, (self.heads, self.head_width)), b, c
