"""RWKV-6 "Finch" (Peng et al. 2024): linear attention whose decay depends on the data.

A block is two sub-layers, each pre-norm and residual: `TimeMixing`, then `ChannelMixing`. Both see
the previous step beside the current one (token shift). Time mixing keeps, per head of width P, a
matrix S of P x P, with a decay w_t in (0, 1) per row and a bonus u for the current step:

    y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    S_t = diag(w_t) S_{t-1} + k_t v_t^T             w_t = exp(-exp(d_t))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.model.nets import NORM_EPSILON
from drama.agent.model.sequence.base import Mixer, State, parameter
from drama.agent.settings import SequenceModelSettings

SHIFT_RANK = 32
DECAY_RANK = 64
LOW_RANK_LIMIT = 0.01
DECAY_RANGE = (-6.0, -1.0)
"""d at the start, spread over the channels: w from 0.9975 down to 0.69."""

LONGEST_CHUNK = 16
"""A chunk of Q steps needs Q * Q * P decays, one per channel: short chunks are cheaper."""


def chunked_wkv(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor, chunk_length: int
) -> tuple[Tensor, Tensor]:
    """Compute y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t, S_t = diag(w_t) S_{t-1} + k_t v_t^T.

    Inside a chunk the recurrence is written out as masked attention; between chunks S is carried.

    Args:
        r: receptances [B, L, heads, P].
        k: keys [B, L, heads, P].
        v: values [B, L, heads, P].
        log_w: logarithms of the decays [B, L, heads, P], negative.
        u: weight of the current step [heads, P].
        state: S before the first step [B, heads, P, P], keys by values.
        chunk_length: steps per chunk, at least 1; L need not be a multiple.

    Returns:
        y [B, L, heads, P] and S after the last step [B, heads, P, P].
    """
    outputs: list[Tensor] = []
    r, k, v, log_w = (part.transpose(1, 2) for part in (r, k, v, log_w))  # [B, heads, L, P]
    parts = (part.split(chunk_length, 2) for part in (r, k, v, log_w))
    for r_chunk, k_chunk, v_chunk, log_w_chunk in zip(*parts, strict=True):
        y, state = _wkv_chunk(r_chunk, k_chunk, v_chunk, log_w_chunk, u, state)
        outputs.append(y)
    return torch.cat(outputs, 2).transpose(1, 2), state


def _wkv_chunk(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one chunk of Q steps; r, k, v, log_w and y are [B, heads, Q, P]."""
    decay = decay_between(log_w)  # [B, heads, Q + 1, Q + 1, P]
    scores = torch.einsum("bhtp,bhtsp,bhsp->bhts", r, decay[:, :, :-1, 1:], k)  # [B, heads, Q, Q]
    bonus = (r * u.unsqueeze(-2) * k).sum(-1)  # [B, heads, Q]
    carried = (r * decay[:, :, :-1, 0]) @ state  # [B, heads, Q, P]
    y = scores @ v + bonus.unsqueeze(-1) * v + carried
    added = (k * decay[:, :, -1, 1:]).transpose(-1, -2) @ v  # [B, heads, P, P]
    return y, decay[:, :, -1, 0].unsqueeze(-1) * state + added


def decay_between(log_w: Tensor) -> Tensor:
    """Return what is left at each moment of what was there at each earlier one.

    Moment i lies before step i, moment Q behind the last step. Each entry is summed from its own
    steps, not as a difference of running sums, which would lose digits after a strong decay.

    Args:
        log_w: logarithms of Q steps' decays [..., Q, P].

    Returns:
        [..., Q + 1, Q + 1, P]: at [m, j] exp of the sum of log_w over steps i, j <= i < m; 0 for
        m < j.
    """
    moments = log_w.shape[-2] + 1
    step_before = F.pad(log_w, (0, 0, 1, 0)).unsqueeze(-2)  # [..., Q + 1, 1, P]
    ordered = torch.ones(moments, moments, dtype=torch.bool, device=log_w.device).tril()  # j <= m
    after = ordered.tril(-1).unsqueeze(-1)  # j < m
    total = torch.where(after, step_before, 0.0).cumsum(-3)  # [..., Q + 1, Q + 1, P]
    return total.masked_fill(~ordered.unsqueeze(-1), -torch.inf).exp()


class TimeMixing(Mixer):
    """RWKV-6 time mixing: data-dependent token shift, decayed linear attention, norm, gate.

    Args:
        settings: width D, head_width P (divides D), chunk_length.
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.width = width
        self.head_width = settings.head_width
        self.heads = width // settings.head_width
        self.chunk_length = min(settings.chunk_length, LONGEST_CHUNK)
        # Five shifted inputs, for r, k, v, gate and decay; at first each channel takes its own
        # share of the previous step, from all to nothing.
        share = 1 - torch.arange(width, device="cpu") / width
        self.shift_base = parameter(share, width)
        self.shift = parameter(share, 5, width)
        self.shift_down = _low_rank(width, 5 * SHIFT_RANK)
        self.shift_up = _low_rank(5, SHIFT_RANK, width)
        self.decay = nn.Parameter(torch.linspace(*DECAY_RANGE, width))
        self.decay_down = _low_rank(width, DECAY_RANK)
        self.decay_up = _low_rank(DECAY_RANK, width)
        # At one, the current step weighs as much as one that nothing has decayed.
        self.bonus = nn.Parameter(torch.ones(self.heads, self.head_width))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        # A LayerNorm per head. The sum over P channels in r k is not scaled, so epsilon is.
        self.norm = nn.GroupNorm(self.heads, width, eps=self.head_width * NORM_EPSILON)
        self.out_proj = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros: `previous` [B, D], the last step's input, and `wkv` [B, heads, P, P]."""
        return {
            "previous": torch.zeros(batch, self.width, device=device),
            "wkv": torch.zeros(batch, self.heads, self.head_width, self.head_width, device=device),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        r, k, v, log_w, gate = self._project(x, shifted(x, state["previous"]))
        # The recurrence sums many small terms: float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            y, wkv = chunked_wkv(r, k, v, log_w, self.bonus, state["wkv"], self.chunk_length)
        return self._output(y, gate), {"previous": x[:, -1], "wkv": wkv}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: x [B, D] and the state to output [B, D] and the next state."""
        r, k, v, log_w, gate = self._project(x, state["previous"])
        bonus = (r * self.bonus * k).sum(-1, keepdim=True)  # [B, heads, 1]
        y = (r.unsqueeze(-1) * state["wkv"]).sum(-2) + bonus * v  # [B, heads, P]
        added = k.unsqueeze(-1) * v.unsqueeze(-2)  # [B, heads, P, P]
        wkv = log_w.exp().unsqueeze(-1) * state["wkv"] + added
        return self._output(y, gate), {"previous": x, "wkv": wkv}

    def _project(
        self, x: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return r, k, v and log w [..., heads, P] in float32, and the gate [..., D].

        Each comes from its own mixture of x and the previous step, both [..., D].
        """
        delta = previous - x
        low_rank = torch.tanh((x + delta * self.shift_base) @ self.shift_down)
        low_rank = low_rank.unflatten(-1, (5, SHIFT_RANK))
        share = self.shift + torch.einsum("...mr,mrd->...md", low_rank, self.shift_up)
        mixed = x.unsqueeze(-2) + delta.unsqueeze(-2) * share  # [..., 5, D]
        for_r, for_k, for_v, for_gate, for_decay = mixed.unbind(-2)
        decay = self.decay + torch.tanh(for_decay @ self.decay_down) @ self.decay_up
        log_w = -decay.float().exp()
        parts = (self.receptance(for_r), self.key(for_k), self.value(for_v), log_w)
        r, k, v, log_w = (
            part.float().unflatten(-1, (self.heads, self.head_width)) for part in parts
        )
        return r, k, v, log_w, self.gate(for_gate)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """Normalise each head of y [..., heads, P], gate it by [..., D], project it to [..., D]."""
        y = y.flatten(-2)  # [..., D]
        normalised = self.norm(y.reshape(-1, self.width)).reshape(y.shape)
        return self.out_proj(normalised * F.silu(gate))


class ChannelMixing(Mixer):
    """RWKV-6 channel mixing: token shift, squared ReLU, gate.

    Args:
        settings: width D, expand (hidden width over D).
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.width = width
        share = 1 - torch.arange(width, device="cpu") / width
        self.shift_key = parameter(share, width)
        self.shift_receptance = parameter(share, width)
        self.key = nn.Linear(width, settings.expand * width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(settings.expand * width, width, bias=False)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros: `previous` [B, D], the last step's input."""
        return {"previous": torch.zeros(batch, self.width, device=device)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        delta = shifted(x, state["previous"]) - x
        hidden = F.relu(self.key(x + delta * self.shift_key)).square()  # [B, L, expand * D]
        gate = torch.sigmoid(self.receptance(x + delta * self.shift_receptance))
        return gate * self.out_proj(hidden), {"previous": x[:, -1]}


def shifted(x: Tensor, previous: Tensor) -> Tensor:
    """Move x [B, L, D] one step later; `previous` [B, D] comes first, the last step drops out."""
    return torch.cat([previous.unsqueeze(1), x[:, :-1]], 1)


def _low_rank(*shape: int) -> nn.Parameter:
    """Return small uniform weights: at first little depends on the data."""
    return nn.Parameter(torch.empty(shape).uniform_(-LOW_RANK_LIMIT, LOW_RANK_LIMIT))
