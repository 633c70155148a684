"""Imagination against its horizon and against the number of contexts.

It walks step by step, so it grows linearly with the horizon; each step is one batch of contexts, so
it grows at most linearly with those too. Contexts are short here, for what is asked about is the
imagined steps: encoding the real ones is a constant beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from measuring import PRESETS, Figure, autocast, take_turns
from updates import ACTIONS

from drama.agent.behaviour.agent import Agent
from drama.agent.behaviour.imagination import imagine
from drama.pipeline.config import load_preset


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: of the agent.
        horizons: H, each twice the one before, at `contexts` contexts.
        batches: B, each twice the one before, over `horizon` steps.
        contexts: B where the horizon varies.
        horizon: H where the number of contexts varies.
        context_length: real steps each starts from.
        rounds: turns.
    """

    preset: str = "xs"
    horizons: tuple[int, ...] = (4, 8, 16, 32, 64)
    batches: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    contexts: int = 256
    horizon: int = 16
    context_length: int = 2
    rounds: int = 2


class Imagining:
    """An agent at the start of its training, and random contexts for it."""

    def __init__(self, points: Points, device: torch.device) -> None:
        self.device = device
        settings = load_preset(points.preset, folder=PRESETS).settings()
        torch.manual_seed(0)
        self.agent = Agent(settings, ACTIONS).to(device).eval()
        shape = (max(points.contexts, *points.batches), points.context_length)
        size = settings.environment.image_size
        self.frames = torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8).to(device)
        self.actions = torch.randint(0, ACTIONS, shape).to(device)

    def __call__(self, batch: int, horizon: int) -> None:
        """Imagine so many trajectories of so many steps."""
        frames, actions = self.frames[:batch], self.actions[:batch]
        act = self.agent.behaviour.actor.sample
        with autocast(self.device):
            imagine(self.agent.world_model, act, frames, actions, horizon)


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield seconds, and time per doubling, along the horizon and along the contexts."""
    points = points or Points()
    imagining = Imagining(points, device)
    along = {
        "horizon": [(points.contexts, horizon) for horizon in points.horizons],
        "contexts": [(batch, points.horizon) for batch in points.batches],
    }
    wanted = {point for line in along.values() for point in line}
    works = {point: partial(imagining, *point) for point in sorted(wanted)}
    timings = take_turns(works, device, points.rounds)
    for (batch, horizon), timing in timings.items():
        where = {"contexts": batch, "horizon": horizon}
        yield Figure("imagination", "imagination", where, timing.seconds, "s", timing.ratio)
    for axis, line in along.items():
        for shorter, longer in pairwise(line):
            doubling = timings[longer].seconds / timings[shorter].seconds
            yield Figure(
                "imagination", "time per doubling",
                {"along": axis, "contexts": longer[0], "horizon": longer[1]}, doubling, "times",
            )  # fmt: skip
