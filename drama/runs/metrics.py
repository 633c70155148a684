"""What is measured while training: losses averaged over windows of steps, finished episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from drama.errors import reason
from drama.files import write_parquet
from drama.reading import read_table
from drama.runs.checkpoint import CheckpointError

WORLD_MODEL_METRICS = (
    "loss/total",
    "loss/reconstruction",
    "loss/reward",
    "loss/termination",
    "loss/dynamics",
    "loss/representation",
    "gradient_norm/world_model",
)
BEHAVIOUR_METRICS = (
    "loss/actor",
    "loss/critic",
    "entropy",
    "return_scale",
    "imagined_reward",
    "imagined_value",
    "gradient_norm/behaviour",
)
TRAINING_SCHEMA = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in (*WORLD_MODEL_METRICS, *BEHAVIOUR_METRICS)]
)
EPISODE_SCHEMA = pa.schema(
    [
        ("episode", pa.int32()),
        ("step", pa.int64()),
        ("episode_return", pa.float64()),
        ("length", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


class NonFiniteLoss(Exception):
    """Losses became NaN or infinite; the text says at which step, and which."""


class Window:
    """Measurements of one kind of update since the last row of the log.

    Values stay on their device until they are asked for, so that adding some does not wait for a
    GPU.

    Args:
        names: of the metrics, in the order they are added in.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._steps: list[int] = []
        self._values: list[Tensor] = []
        self._checked = 0

    def add(self, step: int, values: Tensor) -> None:
        """Add one update's scalars, float64 [names]."""
        assert values.shape == (len(self.names),), f"{tuple(values.shape)} for {self.names}"
        self._steps.append(step)
        self._values.append(values.detach())

    def check(self) -> None:
        """Look at what was added since the last check.

        Raises:
            NonFiniteLoss: naming what is not finite of the first update with such values.
        """
        values = self._array(self._checked)
        for row in np.flatnonzero(~np.isfinite(values).all(1)):
            named = zip(self.names, values[row].tolist(), strict=True)
            wrong = [f"{name} is {value}" for name, value in named if not math.isfinite(value)]
            raise NonFiniteLoss(f"at step {self._steps[self._checked + row]} {', '.join(wrong)}")
        self._checked = len(self._steps)

    def means(self) -> dict[str, float]:
        """Return each metric's mean, NaN when there was no update, and start a new window."""
        values = self._array(0)
        self._steps, self._values, self._checked = [], [], 0
        means = values.mean(0) if len(values) else np.full(len(self.names), math.nan)
        return dict(zip(self.names, means.tolist(), strict=True))

    def _array(self, start: int) -> np.ndarray:
        rows = self._values[start:]
        if not rows:
            return np.empty((0, len(self.names)))
        # After a resume, earlier rows lie on the CPU and new ones perhaps on a GPU.
        return torch.stack([row.to(rows[-1].device) for row in rows]).cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Return the window so far."""
        return {"steps": np.array(self._steps, np.int64), "values": self._array(0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved window; a ValueError says that it is none."""
        if len(state["steps"]) != len(state["values"]):
            raise ValueError(f"{len(state['values'])} values of {len(state['steps'])} updates")
        self._steps = state["steps"].tolist()
        self._values = list(torch.from_numpy(state["values"]))
        self._checked = len(self._steps)


class Table:
    """Rows that grow while a run goes on, and the Parquet file that shows them.

    The checkpoint holds the rows too, and is what a run goes on from.

    Args:
        path: the file.
        schema: its columns; the column `step` orders them.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)

    def write(self) -> None:
        """Write all rows."""
        write_parquet(self.path, pa.Table.from_pylist(self.rows, self.schema))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the columns, by names without slashes."""
        return {
            _key(field.name): np.array(
                [row[field.name] for row in self.rows], field.type.to_pandas_dtype()
            )
            for field in self.schema
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over saved columns.

        Raises:
            ValueError: when they are not equally long.
        """
        columns = [state[_key(name)].tolist() for name in self.schema.names]
        self.rows = [
            dict(zip(self.schema.names, row, strict=True)) for row in zip(*columns, strict=True)
        ]

    def read(self, step: int) -> None:
        """Take over the file's rows up to a step, where the checkpoint is older than this table.

        The first checkpoints hold none, and training tables had a column of speed then.

        Raises:
            CheckpointError: when the file cannot be read.
        """
        try:
            table = read_table(self.path, None)
            if missing := [name for name in self.schema.names if name not in table.column_names]:
                raise ValueError(f"it has no column {missing[0]}")
            table = table.select(self.schema.names).cast(self.schema)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: the run cannot go on without this file ({reason(error)}). Put back "
                "a good copy, or move the run's folder away to train it anew.",
                error,
            ) from None
        self.rows = table.filter(pc.field("step") <= step).to_pylist()


def _key(name: str) -> str:
    return name.replace("/", ".")
