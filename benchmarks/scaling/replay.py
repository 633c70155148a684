"""Drawing from the replay memory (DFS) against how much it holds, and reading the batch from it.

A draw weighs every window stored, so it grows with the memory; reading what it says does not. The
two are measured apart: draws, which look at no frame, over frames of 3 bytes, since a million real
ones would take 12 GB, and reading on real frames in a memory of one size, on the device that learns
from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import PRESETS, ROUNDS, Figure, Timing, take_turns

from drama.agent.replay.buffer import ReplayBuffer
from drama.agent.replay.sampling import Sampler
from drama.agent.replay.tensors import RingTensors
from drama.pipeline.config import load_preset
from drama.runs.columns import COLUMN_TYPES, Columns

TINY_FRAME = (1, 1, 3)
ROWS_AT_ONCE = 10_000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: whose batches are drawn.
        sizes: transitions stored; the first is what the paper's first update draws from.
        read_from: transitions with frames of full size that batches are read from.
        rounds: turns.
    """

    preset: str = "xs"
    sizes: tuple[int, ...] = (1_032, 10_000, 100_000, 1_000_000)
    read_from: int = 10_000
    rounds: int = ROUNDS


def noise(first: int, rows: int, frame_shape: tuple[int, int, int], seed: int = 0) -> Columns:
    """Return consecutive transitions whose frames are noise and in which nothing happens."""
    columns: Columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMN_TYPES.items()}
    generator = np.random.default_rng([seed, first])
    columns["frame"] = generator.integers(0, 256, (rows, *frame_shape), np.uint8)
    columns["step"] = np.arange(first, first + rows)
    return columns


def fill(buffer: ReplayBuffer, rows: int, seed: int = 0) -> Iterator[int]:
    """Append noise until so many transitions are stored; yields how many are, now and then."""
    while buffer.total < rows:
        some = min(ROWS_AT_ONCE, rows - buffer.total)
        buffer.extend(noise(buffer.total, some, buffer.frame_shape, seed))
        yield buffer.total


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield the seconds of both kinds of draw at every size, and of reading both batches."""
    points = points or Points()
    settings = load_preset(points.preset, folder=PRESETS).settings()
    model, behaviour = settings.world_model, settings.behaviour
    shapes = {
        "world model": (model.batch_size, model.sequence_length),
        "imagination": (behaviour.contexts, behaviour.context_length),
    }
    draws: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in points.sizes:
        buffer = ReplayBuffer(size, TINY_FRAME)
        list(fill(buffer, size))
        ratio = behaviour.contexts / model.batch_size
        sampler = Sampler(settings.replay, buffer, ratio, np.random.default_rng(0))
        for kind, draw in (
            ("world model", sampler.draw_world_model),
            ("imagination", sampler.draw_imagination),
        ):
            draws[kind, size] = partial(draw, *shapes[kind])
    timings = take_turns(draws, CPU, points.rounds)
    for (kind, size), timing in timings.items():
        headline = f"DFS draw for {kind}, {size:,} transitions" if size == points.sizes[-2] else ""
        yield _figure("draw", kind, size, shapes[kind], timing, headline)

    edge = settings.environment.image_size
    buffer = ReplayBuffer(points.read_from, (edge, edge, 3))
    list(fill(buffer, points.read_from))
    ring = RingTensors(buffer, device)
    ring.follow()
    reads: dict[str, Callable[[], Any]] = {}
    for kind, (batch, length) in shapes.items():
        starts = np.random.default_rng(0).integers(0, buffer.window_count(length), batch)
        rows = torch.from_numpy(buffer.rows(starts, length)).to(device)
        reads[kind] = partial(ring.read, rows, rows)
    for kind, timing in take_turns(reads, device, points.rounds).items():
        yield _figure("read", kind, points.read_from, shapes[kind], timing)


def _figure(
    name: str, kind: str, size: int, shape: tuple[int, int], timing: Timing, headline: str = ""
) -> Figure:
    batch, length = shape
    return Figure(
        "replay", name, {"kind": kind, "transitions": size, "batch": f"{batch} x {length}"},
        timing.seconds, "s", timing.ratio, headline=headline,
    )  # fmt: skip
