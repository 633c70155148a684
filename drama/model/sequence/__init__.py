"""Sequence models: d_t = f(z_<=t, a_<=t), in parallel over a sequence or one step at a time."""

from drama.model.sequence.base import SequenceModel, State, build

__all__ = ["SequenceModel", "State", "build"]
