"""A gated recurrent unit (Cho et al. 2014), with PyTorch's kernels.

    r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)
    u_t = sigmoid(W_u x_t + U_u h_{t-1} + b_u)
    n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + c_n))
    h_t = (1 - u_t) n_t + u_t h_{t-1}

What joins the residual is h itself: it lies in (-1, 1) and needs no further projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drama.agent.model.sequence.base import Mixer, State
from drama.agent.settings import SequenceModelSettings


class GRU(Mixer):
    """A GRU mixer; it has no parallel form, so `forward` walks along the sequence.

    Args:
        settings: width D.
    """

    def __init__(self, settings: SequenceModelSettings) -> None:
        super().__init__()
        self.gru = nn.GRU(settings.width, settings.width, batch_first=True)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return zeros: `hidden` [B, D]."""
        return {"hidden": torch.zeros(batch, self.gru.hidden_size, device=device)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence [B, L, D]; see `Mixer.forward`."""
        state = state or self.initial_state(x.shape[0], x.device)
        # Rounding would add up along the sequence: float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            y, hidden = self.gru(x.float(), state["hidden"].unsqueeze(0))  # [B, L, D], [1, B, D]
        return y, {"hidden": hidden.squeeze(0)}
