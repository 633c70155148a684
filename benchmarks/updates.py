"""Seconds per update at the paper's settings: the plain path and the fast one, in turn.

    python benchmarks/updates.py [PRESET] [THREADS]

The world model learns from 16 windows of 128 steps, imagination goes 16 steps from 1024 contexts of
8, and the behaviour learns from what was imagined. Frames are noise: how long things take does not
depend on what they show. Paths take turns, so that a busy machine slows both; each figure is the
better of two.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from drama.behaviour.agent import Agent
from drama.behaviour.imagination import imagine
from drama.config import load_preset
from drama.training.optim import LaProp

ACTIONS = 6
ROUNDS = 2


class Updates:
    """An agent at the start of its training, and random batches for it."""

    def __init__(self, preset: str) -> None:
        self.settings = load_preset(preset).settings()
        torch.manual_seed(0)
        self.agent = Agent(self.settings, ACTIONS).eval()
        model, behaviour = self.agent.world_model, self.agent.behaviour
        self.world_model_optimiser = LaProp(
            dict(model.named_parameters()), self.settings.world_model.optimiser
        )
        self.behaviour_optimiser = LaProp(
            {name: p for name, p in behaviour.named_parameters() if p.requires_grad},
            self.settings.behaviour.optimiser,
        )

        world_model, imagination = self.settings.world_model, self.settings.behaviour
        self.windows = self._noise(world_model.batch_size, world_model.sequence_length)
        self.contexts = self._noise(imagination.contexts, imagination.context_length)

    def _noise(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames, uint8 [*shape, H, W, 3], and actions, int64 [*shape]."""
        size = self.settings.environment.image_size
        frames = torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)
        return frames, torch.randint(0, ACTIONS, shape)

    def learn_world_model(self) -> None:
        """One update of the world model."""
        frames, actions = self.windows
        model = self.agent.world_model.train()
        never = torch.zeros(actions.shape, dtype=torch.bool)
        losses = model.loss(frames, actions, torch.zeros(actions.shape), never)
        self.world_model_optimiser.minimise(losses.total)
        model.eval()

    def imagine(self) -> None:
        """Trajectories for one update of the behaviour."""
        act = self.agent.behaviour.actor.sample
        horizon = self.settings.behaviour.horizon
        self.trajectories = imagine(self.agent.world_model, act, *self.contexts, horizon)

    def learn_behaviour(self) -> None:
        """One update of actor and critic."""
        self.behaviour_optimiser.minimise(self.agent.behaviour.loss(self.trajectories).total)
        self.agent.behaviour.update_slow_critic()


def seconds(work: Callable[[], Any]) -> float:
    """Return how long some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    preset = sys.argv[1] if len(sys.argv) > 1 else "xs"
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else torch.get_num_threads())
    updates = Updates(preset)
    taken: dict[tuple[str, bool], float] = defaultdict(lambda: float("inf"))
    parts = ("learn_world_model", "imagine", "learn_behaviour")
    for _ in range(ROUNDS):
        for plain in (True, False):
            updates.agent.world_model.choose_path(plain=plain)
            for part in parts:
                took = seconds(getattr(updates, part))
                taken[part, plain] = min(taken[part, plain], took)
    for plain in (True, False):
        taken["together", plain] = sum(taken[part, plain] for part in parts)
    print(f"preset {preset}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| part | plain, s | fast, s | ratio |\n|---|---:|---:|---:|")
    for part in (*parts, "together"):
        plain, fast = taken[part, True], taken[part, False]
        print(f"| {part.replace('_', ' ')} | {plain:.2f} | {fast:.2f} | {plain / fast:.2f} |")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
