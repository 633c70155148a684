"""The ring as tensors: windows as stored, and a copy that is never behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.agent.replay.tensors import RingTensors

SHAPE = (2, 2, 3)
CPU = torch.device("cpu")


def transition(step: int, **changes: bool) -> Transition:
    frame = np.full(SHAPE, step % 256, np.uint8)
    ends = {"terminated": step % 5 == 0, "truncated": step % 7 == 0, "life_lost": step % 3 == 0}
    return Transition(frame, step % 6, float(step), episode=step // 9, **{**ends, **changes})


def play(buffer: ReplayBuffer, steps: int) -> None:
    for _ in range(steps):
        buffer.append(transition(buffer.total))


@pytest.mark.parametrize("copies", [False, True])
def test_a_batch_has_the_promised_shapes_types_and_contents(copies: bool) -> None:
    buffer = ReplayBuffer(10, SHAPE)
    ring = RingTensors(buffer, CPU, copies=copies)
    play(buffer, 25)
    ring.follow()
    rows = torch.from_numpy(buffer.rows(np.array([3, 0, 6]), 4))
    batch = ring.read(rows, rows.flip(0))
    steps = 15 + torch.tensor([3, 0, 6])[:, None] + torch.arange(4)  # the ring holds 15 ... 24
    assert (batch.frames.shape, batch.frames.dtype) == ((3, 4, *SHAPE), torch.uint8)
    assert (batch.frames == steps[..., None, None, None]).all()
    assert batch.actions.dtype == torch.int64 and torch.equal(batch.actions, steps % 6)
    assert batch.rewards.dtype == torch.float32 and torch.equal(
        batch.rewards, steps.flip(0).float()
    )
    assert batch.terminations.dtype == torch.bool
    assert torch.equal(batch.terminations, (steps % 5 == 0) | (steps % 3 == 0))
    assert torch.equal(ring.frames(rows), batch.frames)
    assert torch.equal(ring.actions(rows), batch.actions)


def test_losing_a_life_ends_for_learning_and_the_frame_limit_does_not() -> None:
    buffer = ReplayBuffer(4, SHAPE)
    never = {"terminated": False, "truncated": False, "life_lost": False}
    for change in ({}, {"truncated": True}, {"life_lost": True}, {"terminated": True}):
        buffer.append(transition(1, **{**never, **change}))
    rows = torch.arange(4)[None]
    batch = RingTensors(buffer, CPU).read(rows, rows)
    assert batch.terminations.tolist() == [[False, False, True, True]]


def test_lives_can_be_left_out_of_what_ends() -> None:
    buffer = ReplayBuffer(3, SHAPE)
    never = {"terminated": False, "truncated": False, "life_lost": False}
    for change in ({"life_lost": True}, {"terminated": True}, {}):
        buffer.append(transition(1, **{**never, **change}))
    rows = torch.arange(3)[None]
    batch = RingTensors(buffer, CPU, lives_end=False).read(rows, rows)
    assert batch.terminations.tolist() == [[False, True, False]]


def test_on_a_cpu_the_ring_itself_is_read() -> None:
    buffer = ReplayBuffer(4, SHAPE)
    ring = RingTensors(buffer, CPU)
    play(buffer, 2)
    assert ring.frames(torch.tensor([1]))[0, 0, 0, 0] == 1


@settings(deadline=None)
@given(
    capacity=st.integers(1, 7),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 16)), max_size=8),
)
def test_a_copy_holds_what_the_ring_holds(capacity: int, moves: list[tuple[bool, int]]) -> None:
    """Followed after each step, after many, after a restored run's rows, and around the ring."""
    buffer = ReplayBuffer(capacity, SHAPE)
    ring = RingTensors(buffer, CPU, copies=True)
    for at_once, steps in moves:
        for _ in range(steps):
            play(buffer, 1)
            if not at_once:
                ring.follow()
        ring.follow()
        rows = torch.arange(buffer.size)[None]
        own, copy = (r.read(rows, rows) for r in (RingTensors(buffer, CPU), ring))
        for name, expected, found in zip(own._fields, own, copy, strict=True):
            assert torch.equal(expected, found), name


def test_a_copy_of_a_ring_that_begins_late() -> None:
    """A restored buffer's first step is not zero."""
    whole, restored = ReplayBuffer(4, SHAPE), ReplayBuffer(4, SHAPE)
    play(whole, 9)
    restored.extend(whole.columns(5, 9))
    ring = RingTensors(restored, CPU, copies=True)
    ring.follow()
    rows = torch.from_numpy(restored.rows(np.array([0]), 4))
    assert ring.read(rows, rows).rewards.tolist() == [[5, 6, 7, 8]]
