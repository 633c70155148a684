"""A transformer (Vaswani et al. 2017): causal attention with rotary positions, then an MLP.

A block is two sub-layers, each pre-norm and residual: `Attention`, then `MLP`.

Attention looks back over a bounded context: step t sees steps t - CONTEXT + 1 ... t, in `forward`
as in `step`, however the sequence is cut into calls. The state is the keys and values of the steps
that are still in reach; it grows to CONTEXT - 1 of them and no further, so the cost of a step and
the memory stay bounded over an endless recurrence. CONTEXT covers the longest training window of
the comparison in the paper (2048); on shorter ones this is plain causal attention.

Positions are rotary (Su et al. 2021): only the distance between two steps matters. Keys are kept
unrotated and counted from the oldest one in reach, so angles do not grow with the number of steps
taken, and neither does their rounding error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drama.agent.model.sequence.base import Mixer, State
from drama.agent.settings import SequenceModelSettings

CONTEXT = 2048
"""Steps that attention sees, the current one included."""

ROTARY_BASE = 10_000.0


class Attention(Mixer):
    """Causal multi-head attention over the last `context` steps.

    Args:
        settings: width D, head_width P (even, divides D).
        context: steps that attention sees, at least 1.
    """

    def __init__(self, settings: SequenceModelSettings, context: int = CONTEXT) -> None:
        super().__init__()
        width = settings.width
        self.context = context
        self.head_width = settings.head_width
        self.heads = width // settings.head_width
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return no steps: `keys` and `values` [B, 0, heads, P]; later up to context - 1 steps."""
        empty = torch.zeros(batch, 0, self.heads, self.head_width, device=device)
        return {"keys": empty, "values": empty}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        outputs: list[Tensor] = []
        for part in x.split(self.context, 1):  # bounds the mask, whatever the length
            output, state = self._attend(part, state)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    def _attend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run over at most `context` steps; `span` counts those and the remembered ones."""
        length = x.shape[1]
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(-3)
        keys = torch.cat([state["keys"].to(k.dtype), k], 1)  # [B, span, heads, P]
        values = torch.cat([state["values"].to(v.dtype), v], 1)  # [B, span, heads, P]
        span = keys.shape[1]
        positions = torch.arange(span, device=x.device)
        first = span - length  # nothing is remembered: plain causal attention, the fastest kernel
        distance = positions[first:].unsqueeze(-1) - positions  # [L, span]
        mask = (distance >= 0) & (distance < self.context) if first else None
        y = F.scaled_dot_product_attention(
            rotate(q, positions[first:]).transpose(1, 2),
            rotate(keys, positions).transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=first == 0,
        )  # [B, heads, L, P]
        forgotten = max(0, span - (self.context - 1))
        state = {"keys": keys[:, forgotten:], "values": values[:, forgotten:]}
        return self.out_proj(y.transpose(1, 2).flatten(-2)), state


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn channel pairs by angles that grow with the position (Su et al. 2021, section 3.2).

    Args:
        x: queries or keys [B, L, heads, P]; channels i and i + P/2 are a pair.
        positions: [L].

    Returns:
        [B, L, heads, P].
    """
    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)  # [P/2]
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(1)  # [L, 1, P/2]
    cosine, sine = angles.cos(), angles.sin()
    real, imaginary = x[..., :half], x[..., half:]
    turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
    return torch.cat(turned, -1).to(x.dtype)


class MLP(Mixer):
    """Two layers with GELU between, each step by itself.

    Args:
        settings: width D, expand (hidden width over D).
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        hidden = settings.expand * settings.width
        self.in_proj = nn.Linear(settings.width, hidden)
        self.out_proj = nn.Linear(hidden, settings.width)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return nothing: no step sees another."""
        return {}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        return self.out_proj(F.gelu(self.in_proj(x))), {}
