"""The replay ring against a plain list of everything that was ever appended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.runs.columns import Columns

SHAPE = (2, 3, 3)


def transition(step: int) -> Transition:
    """A transition that tells its step in every field."""
    return Transition(
        frame=np.full(SHAPE, step % 251, np.uint8),
        action=step % 1000,
        reward=step / 2 - 7,
        terminated=step % 3 == 0,
        truncated=step % 5 == 0,
        life_lost=step % 7 == 0,
        episode=step // 4,
    )


def as_columns(first_step: int, transitions: list[Transition]) -> Columns:
    count = len(transitions)
    return {
        "step": np.arange(first_step, first_step + count, dtype=np.int64),
        "episode": np.array([t.episode for t in transitions], np.int32),
        "frame": np.array([t.frame for t in transitions], np.uint8).reshape(count, *SHAPE),
        "action": np.array([t.action for t in transitions], np.int16),
        "reward": np.array([t.reward for t in transitions], np.float32),
        "terminated": np.array([t.terminated for t in transitions], np.bool_),
        "truncated": np.array([t.truncated for t in transitions], np.bool_),
        "life_lost": np.array([t.life_lost for t in transitions], np.bool_),
    }


def assert_same_columns(actual: Columns, expected: Columns) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def filled(capacity: int, steps: int) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, SHAPE)
    for step in range(steps):
        buffer.append(transition(step))
    return buffer


@settings(deadline=None)
@given(
    capacity=st.integers(1, 12),
    blocks=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=6),
    length=st.integers(1, 6),
)
def test_the_ring_holds_the_last_transitions_and_no_window_crosses_its_seam(
    capacity: int, blocks: list[tuple[bool, int]], length: int
) -> None:
    buffer = ReplayBuffer(capacity, SHAPE)
    history: list[Transition] = []
    for at_once, count in blocks:
        new = [transition(len(history) + i) for i in range(count)]
        if at_once:
            buffer.extend(as_columns(len(history), new))
        else:
            for each in new:
                buffer.append(each)
        history += new

    stored = history[-capacity:]
    first = len(history) - len(stored)
    assert (buffer.total, buffer.size, buffer.first_step) == (len(history), len(stored), first)
    assert_same_columns(buffer.columns(first, len(history)), as_columns(first, stored))

    windows = [stored[i : i + length] for i in range(len(stored) - length + 1)]
    assert buffer.window_count(length) == len(windows)
    if not windows:
        return
    rows = buffer.rows(np.arange(len(windows)), length)
    assert (rows.shape, rows.dtype) == ((len(windows), length), np.int64)
    for own, window in zip(rows, windows, strict=True):
        for name, values in buffer.ring().items():
            np.testing.assert_array_equal(values[own], [getattr(t, name) for t in window])


def test_columns_do_not_change_when_the_ring_goes_on() -> None:
    buffer = filled(4, 4)
    columns = buffer.columns(0, 4)
    for step in range(4, 8):
        buffer.append(transition(step))
    assert columns["frame"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_an_empty_buffer_continues_at_the_step_of_the_rows_it_is_given() -> None:
    original = filled(5, 18)
    restored = ReplayBuffer(5, SHAPE)
    restored.extend(original.columns(13, 15))
    restored.extend(original.columns(15, 18))
    for step in range(18, 21):
        original.append(transition(step))
        restored.append(transition(step))
    assert (restored.total, restored.first_step) == (21, 16)
    assert_same_columns(restored.columns(16, 21), original.columns(16, 21))


def test_extending_by_nothing_changes_nothing() -> None:
    buffer = filled(5, 8)
    buffer.extend(as_columns(0, []))
    assert (buffer.total, buffer.size) == (8, 5)


@pytest.mark.parametrize("starts", [[-1], [7], [0, 7, 1], [-3, 2]])
def test_window_starts_out_of_range_are_refused_with_the_numbers(starts: list[int]) -> None:
    buffer = filled(10, 25)
    with pytest.raises(ValueError, match=r"lie outside \[0, 7\): 10 transitions .* windows of 4"):
        buffer.rows(np.array(starts), 4)


def test_window_starts_of_another_rank_or_type_are_refused() -> None:
    buffer = filled(10, 25)
    with pytest.raises(ValueError, match="float64"):
        buffer.rows(np.array([0.0]), 4)
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        buffer.rows(np.array([[0]]), 4)


@pytest.mark.parametrize("steps", [(14, 20), (20, 26), (20, 18)])
def test_columns_that_are_not_stored_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"the buffer holds \[15, 25\)"):
        filled(10, 25).columns(*steps)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frame": np.zeros((3, 2, 3), np.uint8)}, r"step 6 is uint8 \(3, 2, 3\)"),
        ({"frame": np.zeros(SHAPE, np.float32)}, "float32"),
        ({"reward": float("nan")}, "reward of step 6 is nan"),
    ],
)
def test_a_malformed_transition_is_refused_and_nothing_is_stored(
    wrong: dict[str, Any], message: str
) -> None:
    buffer = filled(4, 6)
    with pytest.raises(ValueError, match=message):
        buffer.append(transition(6)._replace(**wrong))
    assert buffer.total == 6
    assert buffer.columns(2, 6)["action"].tolist() == [2, 3, 4, 5]


def test_malformed_columns_are_refused_by_name() -> None:
    buffer = filled(10, 4)
    good = as_columns(4, [transition(step) for step in range(4, 8)])
    with pytest.raises(ValueError, match="next step is 4, the rows begin at step 5"):
        buffer.extend({**good, "step": good["step"] + 1})
    with pytest.raises(ValueError, match="step 5 is followed by step 7"):
        buffer.extend({**good, "step": np.array([4, 5, 7, 8])})
    with pytest.raises(ValueError, match="reward is float64"):
        buffer.extend({**good, "reward": good["reward"].astype(np.float64)})
    with pytest.raises(ValueError, match=r"action is int16 \(3,\)"):
        buffer.extend({**good, "action": good["action"][:3]})
    with pytest.raises(ValueError, match="fields"):
        buffer.extend({name: values for name, values in good.items() if name != "episode"})
    assert buffer.total == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_ring_takes_memory_only_as_it_fills() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    buffer = ReplayBuffer(100_000)
    buffer.append(transition(0)._replace(frame=np.ones((64, 64, 3), np.uint8)))
    assert (resident_pages() - before) * 4096 < 100e6  # the ring is 1.2 GB
