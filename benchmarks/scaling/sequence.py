"""One update of a sequence model against the sequence's length, at equal parameter count.

The update is what the sequence model costs inside a world-model update: forward, backward and a
LaProp step, on random one-hot inputs at the paper's width. Only time per doubling is asked of it:
Mamba-2's work is linear in the length, so twice the length may take hardly more than twice the
time. The transformer attends to at most `CONTEXT` (2048) steps, so beyond that it is linear too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from measuring import (
    MIB,
    PRESETS,
    Figure,
    Timing,
    added_peak,
    autocast,
    in_fresh_process,
    take_turns,
)

from drama.agent.model.sequence import SequenceModel, build, kernels, use_backend
from drama.agent.settings import SequenceModelSettings, Settings
from drama.agent.training.optim import LaProp
from drama.pipeline.config import load_preset

ACTIONS = 6
# A block of the transformer or the GRU holds 6 D^2 parameters, one of Mamba-2 a little more; the
# transformer's at expand 1, its feed-forward layer being as wide as the residual stream.
EXPAND = {"mamba2": 2, "transformer": 1, "gru": 1}
KINDS = tuple(EXPAND)
DOUBLING_LIMIT = 2.2


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: whose width, blocks and latents are taken.
        batch: B on a CPU. With one sequence, tensors stay below the 32 MiB from which on the C
            library gives freed memory back to the system and asks for it anew: a step in time that
            is not the model's.
        batch_on_gpu: B on a GPU, which fewer sequences would leave idle.
        lengths: L, each twice the one before.
        rounds: turns.
    """

    preset: str = "xs"
    batch: int = 1
    batch_on_gpu: int = 16
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    rounds: int = 4


class SequenceUpdate:
    """A sequence model with its optimiser, and updates of it."""

    def __init__(self, kind: str, preset: str, device: torch.device) -> None:
        self.settings = load_preset(preset, folder=PRESETS).settings()
        self.device = device
        torch.manual_seed(0)
        self.model = sequence_model(kind, self.settings).to(device).train()
        # As a run does by default: mamba_ssm's kernels where they load.
        self.backend = kernels.choose("auto", device, sequence_settings(kind, self.settings))
        use_backend(self.model, self.backend)
        self.optimiser = LaProp(
            dict(self.model.named_parameters()), self.settings.world_model.optimiser
        )

    def inputs(self, batch: int, length: int) -> torch.Tensor:
        """Return random one-hot latents and actions, [B, L, Z + A]."""
        world_model = self.settings.world_model
        generator = torch.Generator().manual_seed(length)
        shape = (batch, length, world_model.categoricals)
        classes = torch.randint(0, world_model.classes, shape, generator=generator)
        actions = torch.randint(0, ACTIONS, shape[:2], generator=generator)
        latents = F.one_hot(classes, world_model.classes).flatten(-2)
        return torch.cat([latents, F.one_hot(actions, ACTIONS)], -1).float().to(self.device)

    def __call__(self, inputs: torch.Tensor) -> None:
        """Do one update."""
        with autocast(self.device):
            d, _ = self.model(inputs)  # [B, L, D]
        self.optimiser.minimise(d.sum())


def sequence_settings(kind: str, settings: Settings) -> SequenceModelSettings:
    """Return the settings with which a kind has as many parameters as the others."""
    return settings.sequence_model.model_copy(update={"kind": kind, "expand": EXPAND[kind]})


def sequence_model(kind: str, settings: Settings) -> SequenceModel:
    """Build a kind of sequence model with as many parameters as the others have."""
    world_model = settings.world_model
    inputs = world_model.categoricals * world_model.classes + ACTIONS
    return build(inputs, sequence_settings(kind, settings))


def parameter_count(kind: str, settings: Settings) -> int:
    """Return how many parameters a kind of sequence model has here."""
    return sum(p.numel() for p in sequence_model(kind, settings).parameters())


def peak_of_update(kind: str, preset: str, batch: int, length: int, device: str) -> int:
    """Return the most bytes that a model, its optimiser and two updates take.

    To be called in a fresh process, where no freed memory lies about.
    """
    place = torch.device(device)
    toy = SequenceUpdate(kind, "quick", place)
    toy(toy.inputs(1, 8))  # loads the libraries' kernels

    def work() -> None:
        update = SequenceUpdate(kind, preset, place)
        inputs = update.inputs(batch, length)
        for _ in range(2):
            update(inputs)

    return added_peak(work, place)


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield parameter counts, then seconds, time per doubling and peak memory of every kind."""
    points = points or Points()
    batch = points.batch_on_gpu if device.type == "cuda" else points.batch
    settings = load_preset(points.preset, folder=PRESETS).settings()
    updates = {kind: SequenceUpdate(kind, points.preset, device) for kind in KINDS}
    for kind in KINDS:
        count = parameter_count(kind, settings)
        yield Figure(
            "sequence", "parameters", {"kind": kind, "backend": updates[kind].backend.name},
            count, "parameters",
        )  # fmt: skip

    inputs = {length: updates[KINDS[0]].inputs(batch, length) for length in points.lengths}
    works = {
        (kind, length): partial(updates[kind], inputs[length])
        for kind in KINDS
        for length in points.lengths
    }
    timings = take_turns(works, device, points.rounds)
    for (kind, length), timing in timings.items():
        where: dict[str, str | int] = {"kind": kind, "length": length, "batch": batch}
        last = length == points.lengths[-1]
        yield Figure(
            "sequence", "update", where, timing.seconds, "s", timing.ratio,
            headline=f"sequence update, {length} steps x {batch}, {kind}" if last else "",
        )  # fmt: skip
    yield from _doublings(timings, points.lengths, batch)
    for kind in KINDS:
        for length in points.lengths:
            peak = in_fresh_process(peak_of_update, kind, points.preset, batch, length, str(device))
            where = {"kind": kind, "length": length, "batch": batch}
            yield Figure("sequence", "peak memory", where, peak / MIB, "MiB")


def _doublings(
    timings: dict[tuple[str, int], Timing], lengths: tuple[int, ...], batch: int
) -> Iterator[Figure]:
    """Yield how many times as long an update takes at every length as at half of it."""
    for kind in KINDS:
        doublings = {
            longer: timings[kind, longer].seconds / timings[kind, shorter].seconds
            for shorter, longer in pairwise(lengths)
        }
        limit = DOUBLING_LIMIT if kind == "mamba2" else None
        for length, doubling in doublings.items():
            where: dict[str, str | int] = {"kind": kind, "length": length, "batch": batch}
            yield Figure("sequence", "time per doubling", where, doubling, "times", limit=limit)
        yield Figure(
            "sequence", "largest time per doubling", {"kind": kind, "batch": batch},
            max(doublings.values()), "times", limit=limit,
            headline=f"twice the sequence length, at most, {kind}",
        )  # fmt: skip
