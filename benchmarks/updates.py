"""Seconds per update at the paper's settings: the plain path and the fast one, in turn.

The world model learns from 16 windows of 128 steps, imagination goes 16 steps from 1024 contexts of
8, and the behaviour learns from what was imagined. Frames are noise: how long things take does not
depend on what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from measuring import PRESETS, Figure, Timing, take_turns
from torch.utils.flop_counter import FlopCounterMode

from drama.agent.behaviour.agent import Agent
from drama.agent.behaviour.imagination import imagine
from drama.agent.training.optim import LaProp
from drama.pipeline.config import load_preset

ACTIONS = 6
ROUNDS = 2
PARTS = {
    "learn_world_model": "world-model update",
    "imagine": "imagination",
    "learn_behaviour": "behaviour update",
}
PATHS = {"plain": (True, False), "fast": (False, False), "fast, bfloat16": (False, True)}
"""Whether each is plain, and whether it has bfloat16 on a CPU, where that is not the default."""


class Updates:
    """An agent at the start of its training, and random batches for it.

    Args:
        preset: name of the preset.
        device: where tensors are made; by default where PyTorch makes them.

    Attributes:
        bfloat16: whether losses are computed under autocast.
    """

    def __init__(self, preset: str, device: torch.device | None = None) -> None:
        self.device = device or torch.get_default_device()
        self.bfloat16 = self.device.type == "cuda"
        self.settings = load_preset(preset, folder=PRESETS).settings()
        torch.manual_seed(0)
        with device or nullcontext():
            self.agent = Agent(self.settings, ACTIONS).eval()
            world_model, imagination = self.settings.world_model, self.settings.behaviour
            self.windows = self._noise(world_model.batch_size, world_model.sequence_length)
            self.contexts = self._noise(imagination.contexts, imagination.context_length)
        model, behaviour = self.agent.world_model, self.agent.behaviour
        self.world_model_optimiser = LaProp(
            dict(model.named_parameters()), self.settings.world_model.optimiser
        )
        self.behaviour_optimiser = LaProp(
            {name: p for name, p in behaviour.named_parameters() if p.requires_grad},
            self.settings.behaviour.optimiser,
        )

    def _noise(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames, uint8 [*shape, S, S, 3], and actions, int64 [*shape]."""
        size = self.settings.environment.image_size
        frames = torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)
        return frames, torch.randint(0, ACTIONS, shape)

    def learn_world_model(self) -> None:
        """One update of the world model."""
        frames, actions = self.windows
        model = self.agent.world_model.train()
        rewards = torch.zeros(actions.shape, device=actions.device)
        with self._autocast():
            losses = model.loss(frames, actions, rewards, rewards.bool())
        self.world_model_optimiser.minimise(losses.total)
        model.eval()

    def imagine(self) -> None:
        """Trajectories for one update of the behaviour."""
        act = self.agent.behaviour.actor.sample
        horizon = self.settings.behaviour.horizon
        with self._autocast():
            self.trajectories = imagine(self.agent.world_model, act, *self.contexts, horizon)

    def learn_behaviour(self) -> None:
        """One update of actor and critic."""
        with self._autocast():
            losses = self.agent.behaviour.loss(self.trajectories)
        self.behaviour_optimiser.minimise(losses.total)
        self.agent.behaviour.update_slow_critic()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def measure(device: torch.device, preset: str = "xs", rounds: int = ROUNDS) -> Iterator[Figure]:
    """Yield the seconds of every part on every path, and their gain over the plain one."""
    updates = Updates(preset, device)
    on_gpu = device.type == "cuda"
    paths = {name: path for name, path in PATHS.items() if not (on_gpu and path[1])}

    def work(part: str, path: str) -> None:
        plain, updates.bfloat16 = paths[path][0], paths[path][1] or on_gpu
        updates.agent.world_model.choose_path(plain=plain)
        getattr(updates, part)()

    yield from _operations(updates)
    works: dict[tuple[str, str], Callable[[], None]] = {
        (part, path): partial(work, part, path) for path in paths for part in PARTS
    }
    timings = take_turns(works, device, rounds)
    for path in paths:
        timings["together", path] = Timing(
            sum(timings[part, path].seconds for part in PARTS),
            sum(timings[part, path].reference for part in PARTS) / len(PARTS),
        )
    whole = f"one update of everything, preset {preset}"
    for part, name in {**PARTS, "together": "together"}.items():
        for path in paths:
            timing = timings[part, path]
            yield Figure(
                "updates", name, {"path": path}, timing.seconds, "s", timing.ratio,
                headline=f"{whole}, {path} path" if part == "together" else "",
            )  # fmt: skip
            if path == "plain":
                continue
            gain = timings[part, "plain"].seconds / timing.seconds
            yield Figure(
                "updates", f"{name}, {path} over plain", {}, gain, "times as fast",
                headline=f"{whole}, {path} path over plain" if part == "together" else "",
            )  # fmt: skip


def _operations(updates: Updates) -> Iterator[Figure]:
    """Yield the operations of matrix products and convolutions, counted while they are done."""
    counts: dict[str, float] = {}
    for part, name in PARTS.items():
        with FlopCounterMode(display=False) as counter:
            getattr(updates, part)()
        counts[name] = counter.get_total_flops() / 1e12
    counts["together"] = sum(counts.values())
    for name, count in counts.items():
        yield Figure(
            "updates", f"{name}, operations", {}, count, "TFLOP",
            headline="operations of one update of everything" if name == "together" else "",
        )  # fmt: skip
