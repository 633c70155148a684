"""Means over windows of steps, losses that are not finite, tables that go on."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drama.runs.checkpoint import CheckpointError
from drama.runs.metrics import (
    BEHAVIOUR_METRICS,
    EPISODE_SCHEMA,
    TRAINING_SCHEMA,
    WORLD_MODEL_METRICS,
    NonFiniteLoss,
    Table,
    Window,
)

NAMES = ("loss/total", "loss/part", "norm")
FINITE = st.floats(-1e6, 1e6, width=32)
ROWS = st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=8)


def filled(rows: list[tuple[float, ...]], first_step: int = 1) -> Window:
    window = Window(NAMES)
    for step, row in enumerate(rows, first_step):
        window.add(step, torch.tensor(row, dtype=torch.float64))
    return window


@given(ROWS)
def test_means_are_means(rows: list[tuple[float, ...]]) -> None:
    means = filled(rows).means()
    assert list(means) == list(NAMES)
    expected = np.array(rows, np.float32).astype(float).mean(0)
    assert np.allclose(list(means.values()), expected, rtol=1e-12, atol=1e-12)


def test_means_begin_a_new_window() -> None:
    window = filled([(1.0, 2.0, 3.0)])
    window.means()
    assert all(math.isnan(value) for value in window.means().values())
    window.add(5, torch.full((3,), 7.0, dtype=torch.float64))
    assert window.means()["norm"] == 7.0


def test_gradients_are_not_kept() -> None:
    window = Window(NAMES)
    window.add(1, torch.ones(3, requires_grad=True) * 2)
    assert window.means()["norm"] == 2.0


@given(ROWS, st.data())
def test_a_window_goes_on_where_it_was_saved(
    rows: list[tuple[float, ...]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    undisturbed, saved = filled(rows), filled(rows[:cut])
    resumed = Window(NAMES)
    resumed.load_state_dict(saved.state_dict())
    for step, row in enumerate(rows[cut:], cut + 1):
        resumed.add(step, torch.tensor(row, dtype=torch.float64))
    resumed.check()
    assert np.array_equal(resumed.state_dict()["steps"], undisturbed.state_dict()["steps"])
    assert repr(resumed.means()) == repr(undisturbed.means())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named_with_its_step(value: float) -> None:
    window = filled([(1, 1, 1), (1, 1, 1), (value, value, 1), (1, 1, value)], first_step=10)
    with pytest.raises(NonFiniteLoss) as caught:
        window.check()
    assert str(caught.value) == f"at step 12 loss/total is {value}, loss/part is {value}"


def test_what_came_since_the_last_check_is_checked() -> None:
    window = filled([(1, 1, 1)])
    window.check()
    window.add(2, torch.tensor([1.0, 1.0, math.nan]))
    with pytest.raises(NonFiniteLoss, match="at step 2 norm is nan"):
        window.check()


def test_a_wrong_number_of_values_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Window(NAMES).add(1, torch.ones(1))


# --- tables --------------------------------------------------------------------------------------


def row(step: int) -> dict[str, Any]:
    return {"episode": step, "step": step, "episode_return": 0.5, "length": 3, "truncated": False}


def test_the_training_table_holds_every_metric_once() -> None:
    names = TRAINING_SCHEMA.names
    assert names == ["step", *WORLD_MODEL_METRICS, *BEHAVIOUR_METRICS]
    assert len(set(names)) == len(names)


def test_a_table_goes_on_from_the_rows_up_to_a_step(tmp_path: Path) -> None:
    """What was written after the checkpoint that a run goes on from is done again."""
    path = tmp_path / "episodes.parquet"
    table = Table(path, EPISODE_SCHEMA)
    for step in (10, 20, 30):
        table.append(row(step))
    table.write()
    before = path.read_bytes()
    resumed = Table(path, EPISODE_SCHEMA)
    resumed.read(20)
    assert [item["step"] for item in resumed.rows] == [10, 20]
    resumed.append(row(30))
    resumed.write()
    assert path.read_bytes() == before
    assert pq.read_schema(path).equals(EPISODE_SCHEMA)


def test_values_that_are_missing_stay_missing(tmp_path: Path) -> None:
    path = tmp_path / "training.parquet"
    table = Table(path, TRAINING_SCHEMA)
    empty = dict.fromkeys(TRAINING_SCHEMA.names, math.nan)
    table.append(empty | {"step": 1})
    table.write()
    before = path.read_bytes()
    table.read(1)
    table.write()
    assert path.read_bytes() == before


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "episodes.parquet"
    Table(path, EPISODE_SCHEMA).write()
    resumed = Table(path, EPISODE_SCHEMA)
    resumed.read(100)
    assert resumed.rows == []


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"no table at all"])
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "episodes.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"episodes\.parquet: the run cannot go on"):
        Table(path, EPISODE_SCHEMA).read(1)


def test_a_flipped_bit_within_a_value_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "episodes.parquet"
    table = Table(path, EPISODE_SCHEMA)
    table.append(row(10) | {"episode_return": 0.1})
    table.write()
    content = path.read_bytes()
    place = content.index(struct.pack("<d", 0.1))
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"episodes\.parquet"):
        table.read(10)


def test_a_table_of_other_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "episodes.parquet"
    pq.write_table(pa.table({"step": ["a"]}), path)
    with pytest.raises(CheckpointError, match=r"episodes\.parquet"):
        Table(path, EPISODE_SCHEMA).read(1)
