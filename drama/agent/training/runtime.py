"""How a run is carried out: where, by how many threads, on which path; no part of its recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drama.agent.model.sequence import kernels
from drama.agent.settings import Backend, SequenceModelSettings

CHECKPOINT_SECONDS = 300.0
"""What an interruption costs at most; a save takes a second or two."""


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; nothing here changes its result beyond rounding.

    Attributes:
        device: where tensors live.
        threads: CPU threads of PyTorch; the same number gives the same bytes.
        checkpoint_every: agent steps between checkpoints; by default `CHECKPOINT_SECONDS` apart.
        plain: whether to take the plain path, which the fast one equals but for rounding.
        backend: of the sequence model, auto, torch or mamba_ssm; the plain path's is torch.
    """

    device: torch.device
    threads: int
    checkpoint_every: int | None
    plain: bool = False
    backend: Backend = "auto"

    def choose_backend(self, settings: SequenceModelSettings) -> kernels.Choice:
        """Choose the sequence model's backend; raises ConfigurationError as `kernels.choose`."""
        return kernels.choose("torch" if self.plain else self.backend, self.device, settings)
