"""Whole agent steps: environment, acting, both updates; every variant, equality, a profile, shares.

What a run does at each step is done by its own `Trainer`, in a replay memory that already holds
something. The first figure is the one that counts: milliseconds a step. Then the same by phase,
each waited for, so that a GPU's launches do not hide behind one another; what losses differ by
from the plain path's, from the same seeds; and steps a second of several runs on one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import MIB, PRESETS, ROOT, Figure, device_name, slug, synchronise
from scaling.memory import FINGERPRINT, new_run
from scaling.replay import fill
from torch.profiler import ProfilerActivity, profile

from drama.agent.model.sequence import kernels
from drama.agent.settings import Backend
from drama.agent.training.runtime import Runtime
from drama.pipeline.config import load_preset
from drama.runs.folder import STATUS
from drama.runs.progress import Reporter, Status

STEP_LIMIT = 10.0
"""Milliseconds a step on a GPU of the H200's class."""
MEMORY_LIMIT = 8 * 1024
"""MiB on a GPU."""
STEP_HEADLINE = "one agent step, preset {preset}, {path}"
MEMORY_HEADLINE = "memory reserved on the GPU, {path}"
RUNS_HEADLINE = "runs on one GPU: {runs}, steps of all"


@dataclass(frozen=True)
class Variant:
    """A way to run.

    Attributes:
        plain: the plain path.
        backend: of the sequence model.
        compiled: whether `torch.compile` has the encoder, decoder and sequence model.
    """

    plain: bool = False
    backend: Backend = "auto"
    compiled: bool = False


VARIANTS = {
    "plain": Variant(plain=True, backend="torch"),
    "fast": Variant(),
    "fast, torch backend": Variant(backend="torch"),
    "fast, compiled": Variant(compiled=True),
    "fast, torch backend, compiled": Variant(backend="torch", compiled=True),
}


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: of the runs.
        game: that they play.
        stored: transitions in the replay memory before.
        warm: steps before the clock starts, more than it takes to record a CUDA graph.
        steps: on the clock.
        equal: updates whose losses are compared.
        side_by_side: runs that share the device.
        profile_folder: where the profile goes.
    """

    preset: str = "xs"
    game: str = "Pong"
    stored: int = 20_000
    warm: int = 8
    steps: int = 100
    equal: int = 6
    side_by_side: tuple[int, ...] = (1, 2, 4, 8)
    profile_folder: Path = ROOT / "benchmarks" / "results"


def headlines(points: Points | None = None) -> list[str]:
    """Return the rows that the README's table has for a GPU, measured or not."""
    points = points or Points()
    steps = [STEP_HEADLINE.format(preset=points.preset, path=path) for path in ("plain", "fast")]
    runs = [RUNS_HEADLINE.format(runs=runs) for runs in points.side_by_side]
    return [*steps, MEMORY_HEADLINE.format(path="fast"), *runs]


class Run:
    """A run in the middle of its training.

    Args:
        points: preset, game and what is stored.
        variant: how it runs.
        device: where.
        folder: for its files.
    """

    def __init__(
        self, points: Points, variant: Variant, device: torch.device, folder: Path
    ) -> None:
        runtime = Runtime(
            device, torch.get_num_threads(), None, plain=variant.plain, backend=variant.backend
        )
        self.device = device
        self.trainer = trainer = new_run(points.preset, points.game, folder, runtime)
        if variant.compiled:
            model = trainer.agent.world_model
            for part in (model.encoder, model.decoder, model.sequence):
                part.compile()
        for _ in fill(trainer.buffer, points.stored):
            trainer.ring.follow()
        training = trainer.settings.training
        trainer.step = max(points.stored, training.random_steps)
        status = Status.resumed(folder / STATUS, FINGERPRINT, training.total_steps)
        self.reporter = Reporter("benchmark", status, folder / STATUS)
        self.phases: dict[str, Callable[[], None]] = {
            "act and store": partial(trainer.act_and_store, self.reporter),
            "world-model update": trainer.learn_world_model,
            "behaviour update": trainer.learn_behaviour,
        }

    def step(self) -> None:
        """One agent step with both updates."""
        for phase in self.phases.values():
            phase()

    def time_steps(self, steps: int) -> float:
        """Return the mean seconds of a step."""
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(self.device)
        return (time.perf_counter() - start) / steps

    def time_phases(self, steps: int) -> dict[str, float]:
        """Return the mean seconds of each phase, waiting for the device after each."""
        taken = dict.fromkeys(self.phases, 0.0)
        for _ in range(steps):
            for name, phase in self.phases.items():
                start = time.perf_counter()
                phase()
                synchronise(self.device)
                taken[name] += (time.perf_counter() - start) / steps
        return taken

    def losses(self, updates: int) -> torch.Tensor:
        """Return the metrics of the next updates, float64 [updates, both kinds]."""
        rows = []
        for _ in range(updates):
            self.step()
            metrics = self.trainer.world_model_metrics, self.trainer.behaviour_metrics
            rows.append([value for window in metrics for value in window.means().values()])
        return torch.tensor(rows, dtype=torch.float64)


@contextmanager
def running(points: Points, variant: Variant, device: torch.device) -> Iterator[Run]:
    """Provide a run, and clear away what it leaves."""
    with TemporaryDirectory() as folder:
        run = Run(points, variant, device, Path(folder))
        try:
            yield run
        finally:
            run.trainer.environment.close()


def variants(device: torch.device, preset: str) -> dict[str, Variant]:
    """Return the variants that differ on this device."""
    settings = load_preset(preset, folder=PRESETS).settings().sequence_model
    every = dict(VARIANTS)
    if kernels.choose("auto", device, settings).name == "torch":
        every = {name: v for name, v in every.items() if v.plain or v.backend == "auto"}
    if device.type == "cpu":
        every = {name: variant for name, variant in every.items() if not variant.compiled}
    return every


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield everything about whole steps on a device."""
    points = points or Points()
    plain: torch.Tensor | None = None
    for name, variant in variants(device, points.preset).items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with running(points, variant, device) as run:
            losses = run.losses(points.equal)
            plain = losses if plain is None else plain
            yield _difference(name, plain, losses)
            run.time_steps(points.warm)
            yield from _times(name, run, points)
            if name == "fast" and device.type == "cuda":
                write_profile(run, points)
        if device.type == "cuda":
            yield Figure(
                "training", "reserved on the GPU", {"path": name},
                torch.cuda.max_memory_reserved(device) / MIB, "MiB", limit=MEMORY_LIMIT,
                headline=MEMORY_HEADLINE.format(path=name) if name == "fast" else "",
            )  # fmt: skip
            torch.cuda.empty_cache()
    yield from _side_by_side(device, points)


def _difference(name: str, plain: torch.Tensor, losses: torch.Tensor) -> Figure:
    """Compare the first losses with the plain path's: those before rounding has spread."""
    scale = plain.abs().clamp(min=1e-3)
    worst = ((losses - plain).abs() / scale)[0].max().item()
    return Figure("training", "first losses' difference from plain", {"path": name}, worst, "")


def _times(name: str, run: Run, points: Points) -> Iterator[Figure]:
    milliseconds = 1000 * run.time_steps(points.steps)
    yield Figure(
        "training", "step", {"path": name}, milliseconds, "ms",
        limit=STEP_LIMIT if run.device.type == "cuda" and name == "fast" else None,
        headline=STEP_HEADLINE.format(preset=points.preset, path=name),
    )  # fmt: skip
    for phase, seconds in run.time_phases(max(1, points.steps // 4)).items():
        yield Figure("training", phase, {"path": name}, 1000 * seconds, "ms")


def write_profile(run: Run, points: Points) -> None:
    """Write which kernels a few steps spend their time in."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run.step()
        synchronise(run.device)
    table = found.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    path = points.profile_folder / f"{slug(device_name(run.device))}-profile.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table, encoding="utf-8")


def steps_per_second(points: Points, device: str, barrier: Any) -> float:
    """Return the speed of one run among several; to be called in a fresh process."""
    with running(points, Variant(), torch.device(device)) as run:
        run.losses(points.warm)
        barrier.wait()
        speed = 1 / run.time_steps(points.steps)
        barrier.wait()  # the others keep the device busy until all have been timed
    return speed


def _side_by_side(device: torch.device, points: Points) -> Iterator[Figure]:
    """Time several runs on one device at once, each in its own process."""
    context = get_context("spawn")
    for runs in points.side_by_side:
        with context.Manager() as manager, ProcessPoolExecutor(runs, mp_context=context) as pool:
            barrier = manager.Barrier(runs, timeout=600)
            work = [
                pool.submit(steps_per_second, replace(points, equal=0), str(device), barrier)
                for _ in range(runs)
            ]
            speed = sum(future.result() for future in work)
        yield Figure(
            "training", "steps of all runs", {"runs": runs}, speed, "steps/s",
            headline=RUNS_HEADLINE.format(runs=runs),
        )  # fmt: skip
