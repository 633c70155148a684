"""Memory of a whole run: its replay memory full, both updates done, a checkpoint saved.

A run of the preset is set up in a process of its own and its replay filled with noise, which files
cannot make smaller; shards are written on the way, as in a run. The last shard is left nearly full,
since what lies in no shard goes into the checkpoint: this is a save at its largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import MIB, PRESETS, Figure, forget_peak, in_fresh_process, peak, resident

from drama.agent.settings import Recipe
from drama.agent.training.loop import Trainer
from drama.agent.training.runtime import Runtime
from drama.pipeline.config import load_preset
from drama.runs.folder import CHECKPOINT, STATUS
from drama.runs.progress import Reporter, Status
from scaling.replay import fill

FINGERPRINT = "0" * 64
GPU_LIMIT = 8 * 1024
"""MiB on a GPU."""


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: of the run.
        game: whose environment it holds.
    """

    preset: str = "xs"
    game: str = "Pong"


def new_run(preset: str, game: str, folder: Path, runtime: Runtime) -> Trainer:
    """Return a run at its start, with an empty replay memory."""
    settings = load_preset(preset, folder=PRESETS).settings()
    recipe = Recipe(
        format=1, preset=preset, game=game, seed=0, settings=settings, code="", runtime=""
    )
    return Trainer(recipe, FINGERPRINT, folder, runtime)


def follow_run(preset: str, game: str, device: str, threads: int) -> dict[str, int]:
    """Return the bytes held in every phase of a run; to be called in a fresh process."""
    place = torch.device(device)
    held = {"libraries": resident()}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = new_run(preset, game, folder, Runtime(place, threads, checkpoint_every=None))
        held["agent and optimisers"] = resident()
        # The step below leaves one to go: with it, the last shard would be written and gone.
        for _ in fill(run.buffer, run.buffer.capacity - 2):
            run.ring.follow()
            run.shards.write_full(run.buffer)
        held["replay full"] = resident()
        status = Status.resumed(folder / STATUS, FINGERPRINT, total_steps=run.buffer.capacity)
        forget_peak()
        run.act_and_store(Reporter("memory", status, folder / STATUS))
        run.learn_world_model()
        run.learn_behaviour()
        held["peak in a step"] = peak()
        held["after a step"] = resident()
        forget_peak()
        run.save()
        held["peak in a save"] = peak()
        held["checkpoint's file"] = (folder / CHECKPOINT).stat().st_size
        run.environment.close()
    if place.type == "cuda":
        held["peak on the GPU"] = torch.cuda.max_memory_allocated(place)
        held["reserved on the GPU"] = torch.cuda.max_memory_reserved(place)
    return held


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield what a whole run holds in memory, phase by phase."""
    points = points or Points()
    threads = torch.get_num_threads()
    held = in_fresh_process(follow_run, points.preset, points.game, str(device), threads)
    for phase, amount in held.items():
        label = f"memory of a run, preset {points.preset}: {phase}"
        yield Figure(
            "memory", phase, {"preset": points.preset}, amount / MIB, "MiB",
            limit=GPU_LIMIT if phase == "reserved on the GPU" else None,
            headline=label if phase in ("replay full", "peak in a step", "reserved on the GPU")
            else "",
        )  # fmt: skip
