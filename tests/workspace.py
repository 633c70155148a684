"""A project of toy size to run the real `drama` in, stopped at a chosen moment or not.

Every process is a real one, running the real command. Signals come from inside, at a step or at a
file that is about to be renamed, because a signal from outside never strikes at the same place.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
GAME, SEED = "Breakout", 9  # a point and a lost life within the first steps
TOTAL_STEPS = 160

# Episodes of some 50 steps; a ring, and so shards, of 70; the first update after step 40.
PRESET = """\
base: quick
environment: {max_frames: 200}
replay: {capacity: 70}
world_model: {channels: [4, 8, 8], batch_size: 2, sequence_length: 8}
behaviour: {contexts: 4, horizon: 3, acting_window: 4}
training:
  total_steps: 160
  random_steps: 40
  world_model_every: 4
  behaviour_every: 8
  log_every: 15
evaluation: {episodes: 5, environments: 2}
"""
EXPERIMENT = f"""\
preset: tiny
games:
  {GAME}:
seeds: [{SEED}]
device: cpu
results: results
"""


@dataclass(frozen=True)
class AtStep:
    """Send `signals` one after another when `step` agent steps are done and nothing is learned."""

    step: int
    signals: tuple[int, ...] = (signal.SIGKILL,)


@dataclass(frozen=True)
class AtWrite:
    """Die by SIGKILL at the `count`-th time that a file of this name is about to be renamed.

    `share` of the temporary file's bytes are left; None: the file has been renamed before.
    """

    name: str
    count: int = 1
    share: float | None = 1.0


@dataclass(frozen=True)
class AtEpisode:
    """Send `signals` when the `count`-th episode of an evaluation has ended and is kept."""

    count: int
    signals: tuple[int, ...] = (signal.SIGKILL,)


Moment = AtStep | AtWrite | AtEpisode


@dataclass(frozen=True)
class Workspace:
    """A folder with configuration of toy size."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / f"results/tiny/recipes/{GAME}/seed{SEED}.json"

    @property
    def folder(self) -> Path:
        return self.root / f"results/tiny/runs/{GAME}/seed{SEED}"

    def run(
        self,
        *arguments: str,
        moment: Moment | None = None,
        file_limit: int | None = None,
        expected: int = 0,
    ) -> str:
        """Run `drama` in a process of its own; returns what it printed.

        Args:
            arguments: of the command.
            moment: when to send it signals.
            file_limit: bytes that a file may have, as if the disk were full beyond.
            expected: exit code; negative for the signal it died of.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["drama.cli", "drama.pipeline.jobs", "pandas"])
        output = self.root / "output.txt"
        process = context.Process(
            target=_drama, args=(self.root, arguments, output, moment, file_limit)
        )
        process.start()
        process.join()
        text = output.read_text(encoding="utf-8")
        assert process.exitcode == expected, f"exit code {process.exitcode}\n{text}"
        return text

    def plan(self, *arguments: str) -> None:
        self.run("plan", *arguments)

    def train(
        self,
        moment: Moment | None = None,
        *,
        expected: int = 0,
        every: int = 37,
        file_limit: int | None = None,
    ) -> str:
        arguments = ["train", str(self.recipe), "--device", "cpu", "--checkpoint-every", str(every)]
        return self.run(*arguments, moment=moment, expected=expected, file_limit=file_limit)

    def evaluate(self, expected: int = 0, moment: Moment | None = None) -> str:
        arguments = ("evaluate", str(self.recipe), "--device", "cpu")
        return self.run(*arguments, moment=moment, expected=expected)

    def result(self) -> dict[str, Any]:
        """Everything that must not depend on how often a run was stopped."""
        return {path.name: sha256(path) for path in sorted(self.folder.rglob("*.parquet"))}

    def tree(self) -> dict[str, tuple[str, int]]:
        """Every file's checksum and time of change, and every folder; not who held a run last."""
        return {
            str(path.relative_to(self.root)): (sha256(path), path.stat().st_mtime_ns)
            if path.is_file()
            else ("folder", 0)
            for path in self.root.rglob("*")
            if path.name != "output.txt" and not path.match(".*.lock")
        }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_workspace(root: Path, overrides: Mapping[str, str] | None = None) -> Workspace:
    """Set a workspace up; `overrides` are files to write beside the usual ones."""
    shutil.copytree(ROOT / "config" / "presets", root / "config" / "presets")
    (root / "containers").mkdir()
    shutil.copy(ROOT / "containers" / "run.lock", root / "containers" / "run.lock")
    files = {"config/presets/tiny.yaml": PRESET, "config/config.yaml": EXPERIMENT}
    for name, text in (files | dict(overrides or {})).items():
        (root / name).write_text(text, encoding="utf-8")
    return Workspace(root)


class Command:
    """The command, run in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit code, output and error output."""
        from drama.cli import main

        self.patch.setattr(sys, "argv", ["drama", *arguments])
        try:
            main()
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        captured = self.capture.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err


def settle(root: Path, arguments: tuple[str, ...], output: Path) -> None:
    """Have this process, a child, be a call of `drama` in a folder; what it says goes to a file."""
    import torch

    os.chdir(root)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under `nohup`
    torch.set_num_threads(1)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    sys.argv = ["drama", *arguments]


def _drama(
    root: Path,
    arguments: tuple[str, ...],
    output: Path,
    moment: Moment | None,
    file_limit: int | None,
) -> None:
    """Become the `drama` command, in the child process."""
    settle(root, arguments, output)
    if isinstance(moment, AtStep):
        _strike_at_step(moment)
    elif isinstance(moment, AtWrite):
        _strike_at_write(moment)
    elif isinstance(moment, AtEpisode):
        _strike_at_episode(moment)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    from drama.cli import main

    main()


def _strike_at_step(moment: AtStep) -> None:
    from drama.agent.training.loop import Trainer

    usual: Callable[..., None] = Trainer.act_and_store

    def act_and_store(self: Trainer, *arguments: Any) -> None:
        usual(self, *arguments)
        if self.step == moment.step:
            for number in moment.signals:
                os.kill(os.getpid(), number)

    Trainer.act_and_store = act_and_store  # type: ignore[method-assign]


def _strike_at_episode(moment: AtEpisode) -> None:
    from drama.pipeline import episodes

    usual = episodes.KeptEpisodes.add
    ended = 0

    def add(self: episodes.KeptEpisodes, those: Sequence[Any]) -> None:
        nonlocal ended
        usual(self, those)
        before, ended = ended, ended + len(those)
        if before < moment.count <= ended:
            for number in moment.signals:
                os.kill(os.getpid(), number)

    episodes.KEEP_SECONDS = 0.0
    episodes.KeptEpisodes.add = add  # type: ignore[method-assign]


def _strike_at_write(moment: AtWrite) -> None:
    usual = os.replace
    seen = 0

    def replace(source: Any, target: Any, **options: Any) -> None:
        nonlocal seen
        seen += Path(target).match(moment.name)
        struck = Path(target).match(moment.name) and seen == moment.count
        if struck and moment.share is not None:
            os.truncate(source, int(os.path.getsize(source) * moment.share))
            os.kill(os.getpid(), signal.SIGKILL)
        usual(source, target, **options)
        if struck:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
