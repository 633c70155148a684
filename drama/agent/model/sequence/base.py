"""What every sequence model shares: stem, residual blocks, norms; and how to add one.

A block is one or more sub-layers, each pre-norm and residual around a *mixer*, the part that
differs between sequence models. To add one, write a `Mixer` in a file of its own and name it in the
package's table, `BLOCKS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from drama.agent.model.nets import RMSNorm
from drama.agent.settings import SequenceModelSettings

State = dict[str, Tensor]
"""What a mixer carries from step to step: named tensors, batch first."""


class Mixer(nn.Module, ABC):
    """Mixes information along time inside a block.

    What it calls `out_proj`, if anything, writes into the residual stream: that layer's weight is
    divided by the square root of the number of mixers.
    """

    @abstractmethod
    def initial_state(self, batch: int, device: torch.device) -> State:
        """Return the state before the first step, batch first."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a whole sequence at once.

        Args:
            x: [B, L, D].
            state: what an earlier call returned, to go on from there; by default the start.

        Returns:
            Output [B, L, D] and the state after the last step.
        """

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: x [B, D] and a state to output [B, D] and the next state.

        A sequence of length one, where a mixer has no cheaper way.
        """
        output, state = self(x.unsqueeze(1), state)
        return output.squeeze(1), state


def parameter(values: Tensor, *sizes: int) -> nn.Parameter:
    """Return a parameter that begins with these values, broadcast, where modules are being built.

    Values are computed on the CPU: for that on its meta device, which a file's tensors are compared
    with, PyTorch imports its compiler, and every command that loads an agent takes seconds longer.
    """
    return nn.Parameter(torch.empty(sizes).copy_(values))


class SequenceModel(nn.Module):
    """Stem, residual blocks around mixers, final norm.

    Args:
        inputs: width of one step's input, Z + A.
        settings: width, number of blocks, dropout.
        mixers: in order; each gets its own norm and residual.
    """

    def __init__(self, inputs: int, settings: SequenceModelSettings, mixers: list[Mixer]) -> None:
        super().__init__()
        width = settings.width
        self.width = width
        projection = nn.Linear(inputs, width)
        nn.init.zeros_(projection.bias)
        self.stem = nn.Sequential(projection, RMSNorm(width), nn.SiLU())
        self.norms = nn.ModuleList(RMSNorm(width) for _ in mixers)
        self.mixers = cast(Sequence[Mixer], nn.ModuleList(mixers))
        self.final_norm = RMSNorm(width)
        self.dropout = nn.Dropout(settings.dropout)
        for mixer in mixers:
            if isinstance(output := getattr(mixer, "out_proj", None), nn.Linear):
                with torch.no_grad():
                    output.weight /= math.sqrt(len(mixers))

    def forward(self, x: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Run over a whole sequence at once.

        Args:
            x: latents and one-hot actions [B, L, Z + A].
            states: one per mixer, as returned by an earlier call; by default the start.

        Returns:
            d [B, L, D] and the states after the last step.
        """
        return self._run(x, self.mixers, states or [None] * len(self.mixers))

    def step(self, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Run one step: x [B, Z + A] and one state per mixer to d [B, D] and the next states."""
        return self._run(x, [mixer.step for mixer in self.mixers], states)

    def _run(
        self, x: Tensor, mixers: Iterable[Callable[..., Any]], states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        residual = self.dropout(self.stem(x)).float()  # [B, L, D], or [B, D] for one step
        after: list[State] = []
        for norm, mix, before in zip(self.norms, mixers, states, strict=True):
            mixed, state = mix(norm(residual), before)
            residual = residual + self.dropout(mixed).float()
            after.append(state)
        return self.final_norm(residual), after

    def initial_states(self, batch: int, device: torch.device) -> list[State]:
        """Return the states before the first step, one per mixer, batch first."""
        return [mixer.initial_state(batch, device) for mixer in self.mixers]
