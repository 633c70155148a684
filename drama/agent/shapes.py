"""The letters that shapes are written in, each with one meaning, and the check that holds them.

A shape stands in brackets behind a tensor's dtype, such as int64 [B, L]; [] is a scalar and
[..., D] ends in D, whatever comes before. A letter is a size:

    A   actions of the game
    B   batch: windows, contexts or trajectories side by side
    C   classes of a categorical
    D   width of the sequence model, and so of d
    E   environments played side by side
    F   frames in a row: a batch's, one window after another, or each distinct one once
    H   horizon, imagined steps
    K   categoricals of a latent
    L   length: steps of a window, of a context, of what is remembered while acting
    S   side of a frame, pixels
    Z   K C, a latent as one vector

Inside the sequence models there are also, after their papers:

    N   width of a state-space model's state
    P   width of a head
    Q   steps of a chunk
    W   width of the convolution along time

Mamba-2 alone (`mamba2.py`, `kernels.py`) keeps its paper's H, the number of heads; nothing is
imagined there. All other sizes are words: [..., bins], [F, channels, height, width]. What formulas
call A, B, C, D or S after those papers are tensors, explained beside the formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Shaped(Protocol):
    """A tensor of any library."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""


def check_shapes(
    sizes: Mapping[str, int] | None = None, /, **given: tuple[Shaped | None, str]
) -> None:
    """Refuse tensors that do not have the shapes they should, or do not fit one another.

    `check_shapes({"A": 4}, actions=(actions, "B L"), logits=(logits, "B L A"))` wants two actions
    axes, three of logits, the same B and L in both, and A to be 4. An axis can also be a number, or
    a letter and what is more: "B H+1". Only shapes are looked at, never values, so this may stand
    where a CUDA graph is recorded.

    Args:
        sizes: of letters that are known beforehand.
        given: by name, each tensor and its axes; None stands for one that was not given.

    Raises:
        ValueError: naming the first that does not fit, its shape, and what was expected.
    """
    known = dict(sizes or {})
    for name, (tensor, text) in given.items():
        if tensor is None:
            continue
        axes, shape, before = text.split(), tuple(tensor.shape), dict(known)
        sized = zip(axes, shape, strict=False)
        if len(axes) != len(shape) or not all(_fits(axis, size, known) for axis, size in sized):
            raise ValueError(_complaint(name, axes, before, given))


def _fits(axis: str, size: int, known: dict[str, int]) -> bool:
    """Say whether an axis may have this size; a letter that was not known is from now on."""
    letter, _, more = axis.partition("+")
    extra = int(more or 0)
    wanted = int(letter) if letter.isdigit() else known.setdefault(letter, size - extra)
    return size == wanted + extra


def _complaint(
    name: str,
    axes: list[str],
    known: Mapping[str, int],
    given: Mapping[str, tuple[Shaped | None, str]],
) -> str:
    shapes = {
        other: list(tensor.shape) for other, (tensor, _) in given.items() if tensor is not None
    }
    text = f"{name} has shape {shapes.pop(name)}, expected [{', '.join(axes)}]"
    letters = dict.fromkeys(axis.partition("+")[0] for axis in axes)
    values = [f"{letter} = {known[letter]}" for letter in letters if letter in known]
    others = [f"{other} {shape}" for other, shape in shapes.items()]
    return (
        text
        + (f" with {', '.join(values)}" if values else "")
        + (f"; beside it {', '.join(others)}" if others else "")
    )
