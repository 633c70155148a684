"""Checkpoints, shards and tables changed in every way, checksums put right: read, or refused.

A change is drawn from its number alone. The cases run in a process of their own, which would die
with an interpreter that a file can crash. `DRAMA_FUZZ_CASES` is their number for each kind of file.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from changing import CHANGES, read, write
from workspace import make_workspace

from drama.runs.folder import CHECKPOINT

CASES = int(os.environ.get("DRAMA_FUZZ_CASES", "0")) or 25
BATCH = 500
"""Cases of one process."""
MEMORY = 2**30
"""Bytes beyond what the process has before the first case."""
LONGEST = 4000
STEP = 45
"""Where the run is: a whole shard, half of which is still in the ring, and a tail."""

PRESET = """\
base: quick
replay: {capacity: 30}
world_model: {channels: [4, 8, 8], batch_size: 2, sequence_length: 8}
behaviour: {contexts: 4, horizon: 3, acting_window: 4}
training: {total_steps: 60, random_steps: 30, log_every: 15}
"""
EXPERIMENT = "preset: tiny\ngames: {%s: {}}\nseeds: [0]\ndevice: cpu\nresults: results\n"


def _trainer(root: Path, game: str, folder: Path | None = None):  # type: ignore[no-untyped-def]
    import torch

    from drama.agent.training.loop import Trainer
    from drama.agent.training.runtime import Runtime
    from drama.pipeline.recipes import read_recipe

    os.chdir(root)
    run = read_recipe(Path(f"results/tiny/recipes/{game}/seed0.json"))
    runtime = Runtime(torch.device("cpu"), threads=1, checkpoint_every=1000)
    return Trainer(run.recipe, run.fingerprint, folder or run.folder, runtime)


def _train(root: Path, game: str) -> None:
    """Train to `STEP`, in the child process."""
    from drama.runs.folder import PREVIOUS, STATUS
    from drama.runs.progress import Reporter, Status
    from drama.runs.stopping import Stopped

    trainer = _trainer(root, game)
    trainer.begin()
    status = Status.resumed(trainer.folder / STATUS, trainer.fingerprint, 60)
    with Reporter("run", status, trainer.folder / STATUS) as reporter:
        try:
            trainer.run(reporter, lambda: trainer.step == STEP)
        except Stopped:
            (trainer.folder / PREVIOUS).unlink()


def _in_child(function: object, *arguments: object) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["drama.cli", "drama.pipeline.jobs"])
    process = context.Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module", params=["Catch8", "Breakout"])
def under_way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run that was stopped on its way."""
    root = tmp_path_factory.mktemp("fuzzed") / "project"
    texts = {
        "config/presets/tiny.yaml": PRESET,
        "config/config.yaml": EXPERIMENT % request.param,
    }
    make_workspace(root, texts).plan()
    assert _in_child(_train, root, request.param) == 0
    return root


def _begin(root: Path, kind: str, numbers: range, log: Path) -> None:
    """Go on from changed files, in the child process; says in the log what is wrong."""
    from drama.errors import DramaError, reason, shown

    (run,) = (root / "results/tiny/runs").glob("*/seed0")
    game, case = run.parent.name, root.parent / f"case-{kind}"
    _trainer(root, game)  # whatever this needs once
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    words, wrong = {"read": 0, "refused": 0}, ""
    for number in numbers:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(run, case)
        name = f"{kind} case {number} of {game}"
        log.write_text(f"{wrong}{name}: the process died\n", encoding="utf-8")
        CHANGES[kind](random.Random(f"{kind} {number}"), case)
        try:
            trainer = _trainer(root, game, case)
            trainer.begin()
            trainer.environment.close()
            words["read"] += 1
        except DramaError as error:
            text = str(error)
            if len(text) > LONGEST or shown(text) != text or "allocate" in text:
                wrong += f"{name}: {text!r}\n"
            words["refused"] += 1
        except (
            MemoryError
        ) as error:  # ale-py believes its own states when they say how long they are
            if kind != "emulator":
                wrong += f"{name}: {traceback.format_exc()}\n"
            words["refused"] += bool(reason(error))
        except BaseException:
            wrong += f"{name}: {traceback.format_exc()}\n"
    log.write_text(wrong or f"{words}", encoding="utf-8")
    sys.exit(bool(wrong))


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_goes_on_from_whatever_lies_there_or_refuses_in_words(
    under_way: Path, tmp_path: Path, kind: str
) -> None:
    atari = (under_way / "results/tiny/runs/Breakout").exists()
    if atari != (kind == "emulator"):
        pytest.skip("tried with the other game")
    for first in range(0, CASES, BATCH):
        log = tmp_path / "log.txt"
        numbers = range(first, min(first + BATCH, CASES))
        assert _in_child(_begin, under_way, kind, numbers, log) == 0, log.read_text()
        print(kind, numbers, log.read_text())


def test_an_emulator_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    """What ale-py raises for it was once shown with a traceback."""
    from drama.runs.checkpoint import CheckpointError

    root = tmp_path / "project"
    files = {"config/presets/tiny.yaml": PRESET, "config/config.yaml": EXPERIMENT % "Breakout"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        make_workspace(root, files).plan()
        trainer = _trainer(root, "Breakout")
        trainer.begin()
        header, rows = read(trainer.folder / CHECKPOINT)
        (emulator,) = (row for row in rows if row["name"] == "environment/before_reset")
        emulator |= {"bytes": b"none", "shape": [4]}
        write(trainer.folder / CHECKPOINT, header, rows)
        with pytest.raises(CheckpointError, match="a library could not take what it holds"):
            trainer.begin()
        trainer.environment.close()
