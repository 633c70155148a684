"""Transitions as columns: what the replay memory holds, and the files that it is kept in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[Any]]
"""Consecutive transitions as one array per field, those of `COLUMN_TYPES`."""

COLUMN_TYPES: dict[str, type[np.generic]] = {
    "step": np.int64,
    "episode": np.int32,
    "frame": np.uint8,
    "action": np.int16,
    # Rewards are sums of integers, which float32 holds exactly up to 2**24, and it is what the
    # world model is given: one type from here to the files means nothing changes on the way.
    "reward": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "life_lost": np.bool_,
}


def check_columns(columns: Columns, frame_shape: tuple[int, ...]) -> None:
    """Assert that `columns` hold consecutive transitions with frames of this shape.

    Raises:
        ValueError: naming the field that is missing, unknown, or of a wrong shape or type, or the
            step after which there is a gap.
    """
    if columns.keys() != COLUMN_TYPES.keys():
        raise ValueError(f"fields are {sorted(columns)}, expected {sorted(COLUMN_TYPES)}")
    count = len(columns["step"])
    for name, dtype in COLUMN_TYPES.items():
        shape = (count, *frame_shape) if name == "frame" else (count,)
        values = columns[name]
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(
                f"{name} is {values.dtype} {values.shape}, expected {np.dtype(dtype)} {shape}"
            )
    steps = columns["step"]
    if count and steps[0] < 0:
        raise ValueError(f"steps begin at {steps[0]}")
    gaps = np.flatnonzero(np.diff(steps) != 1)
    if len(gaps):
        raise ValueError(f"step {steps[gaps[0]]} is followed by step {steps[gaps[0] + 1]}")
