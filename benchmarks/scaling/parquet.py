"""Files: how fast replay is written and read, how small it gets, and what share of a run that is.

Games are really played, at random, and written and read by what a run writes and reads with. A
run's time is that of its steps at the speed wanted on a GPU, so the share holds for fast machines;
on a slow one it is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measuring import PRESETS, ROUNDS, Figure, Timing, take_turns

from drama.agent.env import make
from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.agent.settings import EnvironmentSettings
from drama.agent.training.loop import Trainer
from drama.agent.training.runtime import CHECKPOINT_SECONDS, Runtime
from drama.pipeline.config import load_preset
from drama.runs.columns import Columns
from drama.runs.folder import CHECKPOINT
from drama.runs.shards import ROWS_PER_SHARD, ShardWriter, iterate_shards
from scaling.memory import new_run

GAMES = ("Pong", "Boxing", "Krull", "KungFuMaster")
STEP_SECONDS = 0.010
"""What a step of a run is wanted to take on a GPU."""
SHARE_LIMIT = 2.0
"""Per cent of a run's time."""
MEGABYTE = 1e6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Points:
    """What is measured.

    Attributes:
        preset: of the runs.
        games: played at random.
        steps: of each.
        tail: transitions in a checkpoint, since they lie in no whole shard yet: half a shard is
            the mean.
        rounds: turns.
    """

    preset: str = "xs"
    games: tuple[str, ...] = GAMES
    steps: int = 4_000
    tail: int = ROWS_PER_SHARD // 2
    rounds: int = ROUNDS


def play(game: str, settings: EnvironmentSettings, steps: int) -> ReplayBuffer:
    """Play a game at random for so many steps and remember them."""
    environment = make(game, settings)
    buffer = ReplayBuffer(steps, (settings.image_size, settings.image_size, 3))
    choices = np.random.default_rng(0)
    frame, _ = environment.reset(seed=0)
    episode = 0
    for _ in range(steps):
        action = int(choices.integers(environment.action_space.n))
        following, reward, terminated, truncated, info = environment.step(action)
        buffer.append(
            Transition(
                frame, action, float(reward), terminated, truncated, info["life_lost"], episode
            )
        )
        frame = following
        if terminated or truncated:
            episode += 1
            frame, _ = environment.reset()
    environment.close()
    return buffer


def raw_bytes(buffer: ReplayBuffer) -> int:
    """Return the bytes of the transitions that a buffer holds."""
    columns = buffer.columns(buffer.first_step, buffer.total)
    return sum(values.nbytes for values in columns.values())


def wear(run: Trainer) -> None:
    """Fill the optimisers' averages, as training would: their zeros would be written too fast."""
    for optimiser in run.learner.state_dict().values():
        for averages in (optimiser["averages"], optimiser["squares"]):
            for tensor in averages.values():
                tensor.normal_()


def measure(device: torch.device, points: Points | None = None) -> Iterator[Figure]:
    """Yield rates and sizes per game, then the shares of a run that its files take."""
    points = points or Points()
    settings = load_preset(points.preset, folder=PRESETS).settings()
    total = settings.training.total_steps
    played = {game: play(game, settings.environment, points.steps) for game in points.games}
    yield from _measure_replay(played, points, total)
    tail = next(iter(played.values())).columns(0, min(points.tail, points.steps))
    yield from _measure_checkpoints(tail, points, device)


def _measure_replay(
    played: dict[str, ReplayBuffer], points: Points, total: int
) -> Iterator[Figure]:
    with TemporaryDirectory() as scratch:
        timings = _time_shards(played, Path(scratch), points.rounds)
        sizes = {
            game: sum(file.stat().st_size for file in (Path(scratch) / game).iterdir())
            for game in played
        }
    # The README names the worst of the games only.
    slowest = max(played, key=lambda game: timings[game, "writing"].seconds)
    largest = max(sizes, key=lambda game: sizes[game])
    for game, buffer in played.items():
        where: dict[str, str | int] = {"game": game}
        megabytes = raw_bytes(buffer) / MEGABYTE
        for verb in ("writing", "reading"):
            timing = timings[game, verb]
            headline = f"{verb} replay, {game}" if game == slowest else ""
            yield Figure(
                "parquet", verb, where, megabytes / timing.seconds, "MB/s",
                megabytes / timing.ratio, headline=headline,
            )  # fmt: skip
        headline = f"replay on disk, {game}" if game == largest else ""
        size = sizes[game] / points.steps
        yield Figure("parquet", "size", where, size, "bytes/step", headline=headline)
        timing = timings[game, "writing"]
        whole = Timing(timing.seconds * total / points.steps, timing.reference)
        headline = f"writing replay, {game}" if game == slowest else ""
        yield _share("writing replay", where, whole, total, headline)


def _measure_checkpoints(tail: Columns, points: Points, device: torch.device) -> Iterator[Figure]:
    """Yield what a save takes whose checkpoint holds these transitions, and its share of a run."""
    with TemporaryDirectory() as scratch:
        runtime = Runtime(device, torch.get_num_threads(), checkpoint_every=None)
        run = new_run(points.preset, points.games[0], Path(scratch), runtime)
        run.buffer.extend(tail)
        wear(run)
        saving = take_turns({"save": run.save}, CPU, points.rounds)["save"]
        size = (Path(scratch) / CHECKPOINT).stat().st_size
        run.environment.close()
    where: dict[str, str | int] = {"transitions": len(tail["step"])}
    yield Figure("parquet", "checkpoint", where, saving.seconds, "s", saving.ratio)
    yield Figure("parquet", "checkpoint size", where, size / MEGABYTE, "MB")
    share = "saving checkpoints, share of a run"
    yield Figure(
        "parquet", share, {}, 100 * saving.seconds / CHECKPOINT_SECONDS, "%", saving.ratio,
        limit=SHARE_LIMIT, headline=share,
    )  # fmt: skip


def _time_shards(
    played: dict[str, ReplayBuffer], scratch: Path, rounds: int
) -> dict[tuple[str, str], Timing]:
    """Time writing every game's transitions to a folder of its own, and reading them back."""

    def write(buffer: ReplayBuffer, folder: Path) -> None:
        ShardWriter(folder).finish(buffer)

    def read(buffer: ReplayBuffer, folder: Path) -> None:
        for _ in iterate_shards(folder, buffer.first_step, buffer.total):
            pass

    works: dict[tuple[str, str], Callable[[], None]] = {}
    for game, buffer in played.items():
        for verb, work in (("writing", write), ("reading", read)):
            works[game, verb] = partial(work, buffer, scratch / game)
    return take_turns(works, CPU, rounds, least=0)


def _share(
    name: str, where: dict[str, str | int], whole: Timing, steps: int, headline: str
) -> Figure:
    """Return the per cent of a run's wanted time that something takes over the whole run."""
    of_run = f", share of a run at {STEP_SECONDS * 1000:g} ms a step"
    return Figure(
        "parquet", name + of_run, where, 100 * whole.seconds / (steps * STEP_SECONDS), "%",
        whole.ratio, limit=SHARE_LIMIT, headline=headline and headline + of_run,
    )  # fmt: skip
