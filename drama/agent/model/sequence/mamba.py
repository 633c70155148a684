"""Mamba (Gu & Dao 2023) in plain PyTorch: a selective state-space model with diagonal A.

Per channel e, with N states of their own decay rates A < 0 and a step size dt_t > 0:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        h [N]
    y_t = C_t h_t + D x_t

Parameters carry the names and shapes of `mamba_ssm.modules.mamba_simple.Mamba`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.model.sequence.base import Mixer, State, parameter
from drama.agent.model.sequence.mamba2 import initial_dt_bias
from drama.agent.settings import SequenceModelSettings

CHANNELS_PER_RANK = 16
"""Step sizes come from a projection of rank D / 16, the authors' default."""


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t in chunks.

    The chunks walk side by side, the first from `state`, the others from zeros; then one state is
    carried from chunk to chunk, and its share is added to the outputs: L steps in 2 Q + chunks
    strides. One chunk is a plain loop. Decays are multiplied, never divided by, so nothing
    overflows.

    Args:
        x: inputs [B, L, inner].
        dt: step sizes [B, L, inner], positive.
        a: decay rates [inner, N], negative.
        b: input projections [B, L, N], shared by the channels.
        c: output projections [B, L, N], shared by the channels.
        state: h before the first step [B, inner, N].
        chunk_length: steps per chunk at most, at least 1; L need not be a multiple.

    Returns:
        y [B, L, inner] and h after the last step [B, inner, N].
    """
    length = x.shape[1]
    chunks = math.ceil(length / chunk_length)
    steps = math.ceil(length / chunks)  # Q
    # Steps of size zero at the end leave the state as it is.
    padding = (0, 0, 0, chunks * steps - length)
    x, dt, b, c = (F.pad(part, padding).unflatten(1, (chunks, steps)) for part in (x, dt, b, c))
    h = F.pad(state.unsqueeze(1), (0, 0, 0, 0, 0, chunks - 1))  # [B, chunks, inner, N]
    outputs: list[Tensor] = []  # each [B, chunks, inner]
    strides = zip((dt * x).unbind(2), dt.unbind(2), b.unbind(2), c.unbind(2), strict=True)
    for input_t, dt_t, b_t, c_t in strides:
        h = torch.exp(dt_t.unsqueeze(-1) * a) * h + input_t.unsqueeze(-1) * b_t.unsqueeze(-2)
        outputs.append((h * c_t.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, 2)  # [B, chunks, Q, inner]
    state = h[:, 0]
    if chunks > 1:
        carried, state = _carry(dt[:, 1:], a, c[:, 1:], h)
        y = torch.cat([y[:, :1], y[:, 1:] + carried], 1)
    return y.flatten(1, 2)[:, :length], state


def _carry(dt: Tensor, a: Tensor, c: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the state from chunk to chunk.

    Args:
        dt: step sizes of all chunks but the first [B, chunks - 1, Q, inner].
        a: decay rates [inner, N].
        c: output projections of all chunks but the first [B, chunks - 1, Q, N].
        ends: h at each chunk's end, had all but the first begun with zeros, [B, chunks, inner, N].

    Returns:
        What the carried states add to y [B, chunks - 1, Q, inner], and h after the last chunk
        [B, inner, N].
    """
    since = dt.cumsum(2)  # A times this is the logarithm of what is left of the chunk's first h
    kept = torch.exp(since[:, :, -1].unsqueeze(-1) * a)  # [B, chunks - 1, inner, N]
    state, *alone = ends.unbind(1)
    starts: list[Tensor] = []  # each [B, inner, N]
    for kept_of_start, added in zip(kept.unbind(1), alone, strict=True):
        starts.append(state)
        state = kept_of_start * state + added
    start = torch.stack(starts, 1)  # [B, chunks - 1, inner, N]
    outputs = [
        (torch.exp(since_t.unsqueeze(-1) * a) * start * c_t.unsqueeze(-2)).sum(-1)
        for since_t, c_t in zip(since.unbind(2), c.unbind(2), strict=True)
    ]  # each [B, chunks - 1, inner]
    return torch.stack(outputs, 2), state


class Mamba(Mixer):
    """A Mamba mixer: projection, causal convolution, selective scan, gate, projection.

    Args:
        settings: width D, expand, state_size N, convolution_width, chunk_length.
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.inner = settings.expand * width
        self.state_size = settings.state_size
        self.rank = math.ceil(width / CHANNELS_PER_RANK)
        self.chunk_length = settings.chunk_length
        self.memory = settings.convolution_width - 1
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.inner, self.inner, settings.convolution_width, groups=self.inner
        )
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(self.inner))
        rates = torch.arange(1, self.state_size + 1, device="cpu")  # S4D-Real: A = -1, -2, ..., -N
        self.A_log = parameter(rates.float().log(), self.inner, self.state_size)
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros: `convolution` [B, W - 1, inner] and `scan` [B, inner, N]."""
        return {
            "convolution": torch.zeros(batch, self.memory, self.inner, device=device),
            "scan": torch.zeros(batch, self.inner, self.state_size, device=device),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        raw, gate = self.in_proj(x).chunk(2, -1)  # [B, L, inner]
        history = torch.cat([state["convolution"].to(raw.dtype), raw], 1)  # [B, W - 1 + L, inner]
        inputs = F.silu(self.conv1d(history.transpose(1, 2)).transpose(1, 2))  # [B, L, inner]
        dt, b, c = self._select(inputs)
        # The scan sums many small terms: float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            inputs = inputs.float()
            y, scan = selective_scan(
                inputs, dt, self._decay_rates(), b, c, state["scan"], self.chunk_length
            )
            y = y + self.D * inputs  # [B, L, inner]
        output = self.out_proj(y * F.silu(gate))
        return output, {"convolution": history[:, -self.memory :].float(), "scan": scan}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: x [B, D] and the state to output [B, D] and the next state."""
        raw, gate = self.in_proj(x).chunk(2, -1)  # [B, inner]
        history = torch.cat([state["convolution"], raw.float().unsqueeze(1)], 1)  # [B, W, inner]
        convolved = torch.einsum("bwe,ew->be", history, self.conv1d.weight.squeeze(1).float())
        assert self.conv1d.bias is not None
        inputs = F.silu(convolved + self.conv1d.bias)  # [B, inner]
        dt, b, c = self._select(inputs)
        decay = torch.exp(dt.unsqueeze(-1) * self._decay_rates())  # [B, inner, N]
        scan = decay * state["scan"] + (dt * inputs).unsqueeze(-1) * b.unsqueeze(-2)
        y = (scan * c.unsqueeze(-2)).sum(-1) + self.D * inputs  # [B, inner]
        return self.out_proj(y * F.silu(gate)), {"convolution": history[:, 1:], "scan": scan}

    def _select(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return step sizes [..., inner], B and C [..., N], float32, from inputs [..., inner]."""
        sizes = [self.rank, self.state_size, self.state_size]
        low_rank, b, c = self.x_proj(inputs).split(sizes, -1)
        return F.softplus(self.dt_proj(low_rank).float()), b.float(), c.float()

    def _decay_rates(self) -> Tensor:
        """Return A [inner, N], negative."""
        return -self.A_log.float().exp()
