"""Sequence models: d_t = f(z_<=t, a_<=t), in parallel over a sequence or one step at a time."""

from __future__ import annotations

from torch import nn

from drama.agent.model.sequence import kernels
from drama.agent.model.sequence.base import Mixer, SequenceModel, State
from drama.agent.model.sequence.gru import GRU
from drama.agent.model.sequence.mamba import Mamba
from drama.agent.model.sequence.mamba2 import Mamba2
from drama.agent.model.sequence.rwkv import ChannelMixing, TimeMixing
from drama.agent.model.sequence.transformer import MLP, Attention
from drama.agent.settings import SequenceModelSettings

__all__ = ["BLOCKS", "SequenceModel", "State", "build", "use_backend"]

BLOCKS: dict[str, tuple[type[Mixer], ...]] = {
    "mamba2": (Mamba2,),
    "mamba": (Mamba,),
    "transformer": (Attention, MLP),
    "gru": (GRU,),
    "rwkv": (TimeMixing, ChannelMixing),
}
"""The mixers of one block, by the kind that settings name."""


def build(inputs: int, settings: SequenceModelSettings) -> SequenceModel:
    """Build the sequence model that the settings name.

    Args:
        inputs: width of one step's input, Z + A.
        settings: `kind` names the mixers of a block, `blocks` says how many blocks there are.
    """
    block = BLOCKS[settings.kind]
    mixers = [mixer(settings) for _ in range(settings.blocks) for mixer in block]
    return SequenceModel(inputs, settings, mixers)


def use_backend(model: nn.Module, choice: kernels.Choice) -> None:
    """Let every Mamba-2 mixer in a model use the chosen backend."""
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.fused = choice.name == "mamba_ssm"
