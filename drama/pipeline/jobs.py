"""What a job of the pipeline does: train one run, evaluate one run, each into the run's folder."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from drama.agent.evaluation import describe, write_evaluation
from drama.agent.model.sequence import kernels, use_backend
from drama.agent.settings import Backend
from drama.agent.training.loop import train
from drama.agent.training.resumable import TrainingFailed
from drama.agent.training.runtime import Runtime
from drama.errors import FAILED_FOR_GOOD, ConfigurationError, DramaError, cut
from drama.pipeline.artifacts.agents import agent_of
from drama.pipeline.artifacts.evaluations import Evaluation, note_evaluation, vouching
from drama.pipeline.artifacts.image import running_digest
from drama.pipeline.artifacts.records import Damaged, RecordedRun, read_record
from drama.pipeline.artifacts.store import fetch
from drama.pipeline.config import read_recipe_text
from drama.pipeline.episodes import KeptEpisodes, play_on
from drama.pipeline.fingerprints import Choices, run_code
from drama.pipeline.history import earlier_run
from drama.pipeline.plans import read_plan
from drama.pipeline.recipes import (
    EvaluationFiles,
    RunFiles,
    read_evaluation_recipe,
    read_recipe,
    run_files,
)
from drama.runs.checkpoint import PREVIOUS
from drama.runs.folder import (
    CHECKPOINT,
    SHORT,
    STATUS,
    is_current,
    is_whole,
    locked,
    make_current,
    write_record,
)
from drama.runs.progress import Status

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What glibc's malloc.h calls these two options of mallopt."""
KEPT_BELOW = 64 * 2**20
"""Bytes; the largest tensor at preset laptop has 12 MiB."""
KEPT_ALTOGETHER = 2**30
"""Bytes that may lie unused."""


class RunIncomplete(DramaError):
    """A run that is not trained to its end."""


class DeviceFailed(DramaError):
    """A device that has no memory left, or failed; what was saved is as it was."""


def say(text: str) -> None:
    """Tell people how a job is getting on."""
    print(text, file=sys.stderr, flush=True)


def device_name(device: torch.device) -> str:
    """Return a device's name for records, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def keep_freed_memory() -> None:
    """Have the C library keep the memory of tensors that come and go, instead of returning it.

    Fresh pages are cleared by the system when they are first written, which takes a tenth of an
    update at the sizes of preset laptop. Larger tensors than `KEPT_BELOW` are returned as always.
    Only glibc can be asked; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, KEPT_BELOW)
        mallopt(M_TRIM_THRESHOLD, KEPT_ALTOGETHER)


def slow_bfloat16(precision: str, device: torch.device) -> str:
    """Say that a CPU has no units for the precision that a run computes in; nothing if it has."""
    units = (name for name, there in torch.cpu.get_capabilities().items() if there)
    if precision != "bfloat16" or device.type != "cpu" or any("bf16" in name for name in units):
        return ""
    return (
        "training.precision = bfloat16: this CPU has no units for it, so this will be slow; "
        "`drama plan --set training.precision=float32` plans the run without, as another run"
    )


def train_run(run: RunFiles, runtime: Runtime) -> None:
    """Train a run to its end and write its record; a whole run is left alone.

    Waits when another process works on the run, such as one that outlived a killed Snakemake.

    Raises:
        ConfigurationError: when the backend cannot be used.
        RunIncomplete: when it goes on from another run, and that one's checkpoint is not here.
        Stopped: when it was asked to stop; the same call goes on.
        TrainingFailed, CheckpointError: when it cannot go on.
        DeviceFailed: when there is not enough memory.
    """
    with locked(run.folder):
        if _is_recorded(run):
            (run.folder / PREVIOUS).unlink(missing_ok=True)
            say(f"{run.record}: this run is whole already")
            return
        _check_taken_over(run)
        if orphan := unplanned(run):
            say(orphan)
        with _noting_failure(run), _naming_device(run, runtime.device):
            _train_and_record(run, runtime)


def _is_recorded(run: RunFiles) -> bool:
    """Say whether a run is whole, by a record that can be read; bring it back if it is set aside.

    A record that says this run's fingerprint and else what cannot be is written anew.
    """
    if not is_whole(run.folder, run.fingerprint):
        return False
    make_current(run.folder, run.fingerprint)
    with suppress(Damaged):
        read_record(run.record)
        return True
    return False


def _train_and_record(run: RunFiles, runtime: Runtime) -> None:
    backend = runtime.choose_backend(run.recipe.settings.sequence_model)
    say(f"Sequence backend: {backend}")
    if slow := slow_bfloat16(run.recipe.settings.training.precision, runtime.device):
        say(slow)
    keep_freed_memory()
    make_current(run.folder, run.fingerprint)
    if run.record.exists():
        say(f"{run.record}: not this run's record, or damaged; it is written anew")
    status = train(run.recipe, run.fingerprint, run.folder, runtime)
    write_record(
        run.record,
        run.recipe.model_dump(mode="json", by_alias=True),
        run.fingerprint,
        device=device_name(runtime.device),
        backend=backend.name,
        seconds=status.wall_seconds,
        steps=status.total_steps,
        image=running_digest(),
    )
    (run.folder / PREVIOUS).unlink(missing_ok=True)
    say(f"{run.record}: trained in {status.wall_seconds / 60:.1f} min")


@contextmanager
def _noting_failure(run: RunFiles) -> Iterator[None]:
    """Note in status.json that a run failed for good, unless its folder is another run's."""
    try:
        yield
    except DramaError as error:
        if isinstance(error, TrainingFailed):  # exit codes are no part of the agent's code
            error.exit_code = FAILED_FOR_GOOD
        if error.is_permanent and is_current(run.folder, run.fingerprint):
            steps = run.recipe.settings.training.total_steps
            with suppress(OSError):  # a full disk must not hide the error
                Status.failed(run.folder / STATUS, run.fingerprint, steps, error)
        raise


@contextmanager
def _naming_device(run: RunFiles, device: torch.device) -> Iterator[None]:
    """Have words for what PyTorch raises where a device cannot go on; a later try may succeed."""
    try:
        yield
    except RuntimeError as error:
        of_gpu = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
        if not of_gpu and "can't allocate memory" not in str(error):
            raise
        said = cut(str(error).split("\n")[0].removesuffix("."), 300)
        raise DeviceFailed(
            f"{run.folder}: {device}: {said}. What was saved is as it was; end what else uses this "
            "device, or name another, and the same command goes on"
        ) from error


def unplanned(run: RunFiles) -> str:
    """Say that a run is another one than was planned for its game and seed; nothing if it is not.

    So it is when a recipe was edited by hand.
    """
    with suppress(ConfigurationError):  # no plan beside it
        for planned in read_plan(run.folder.parents[2], run.path.absolute().parents[1]).runs:
            key = planned.game, planned.seed
            if key == (run.recipe.game, run.recipe.seed) and planned.fingerprint != run.fingerprint:
                return (
                    f"{run.path}: not the recipe that was planned (run {run.fingerprint[:SHORT]}, "
                    f"planned {planned.fingerprint[:SHORT]}), so Snakemake and `drama status` do "
                    "not know this run; `drama plan --set section.key=value` plans such a run"
                )
    return ""


def _check_taken_over(run: RunFiles) -> None:
    """Refuse to begin at step 0 what goes on from another run."""
    kept = any((run.folder / name).exists() for name in (CHECKPOINT, PREVIOUS))
    if run.recipe.ancestor is None or kept:
        return
    steps = run.recipe.settings.training.total_steps
    raise RunIncomplete(
        f"{run.folder / CHECKPOINT}: not here, and this run goes on from run "
        f"{run.recipe.ancestor[:SHORT]}, not from step 0. Put it back; or move the run's folder "
        f"away if there is one, and give `drama train --steps {steps}` with that run's recipe"
    )


def find_scored(path: Path) -> tuple[RunFiles, EvaluationFiles]:
    """Return the run that the evaluation of a recipe scores, and the evaluation.

    That is the recipe's own, or a whole one of earlier code that lies in its place: one whose
    recipe differs in code and library versions at most.

    Raises:
        ConfigurationError: when it is not a recipe, or of other code and there is no such run.
    """
    recipe, _ = read_recipe_text(path)
    run = run_files(path, recipe, "")
    made = earlier_run(run.folder, path)
    if made is None or made.recipe["code"] == run_code(Choices.of(recipe.game, recipe.settings)):
        run = read_recipe(path)
        return run, read_evaluation_recipe(run)
    say(f"{made.record}: of earlier code, commit {made.commit}; today's scores it")
    run = replace(run, fingerprint=made.fingerprint)
    return run, read_evaluation_recipe(run, of_earlier_code=True)


def evaluate_run(
    run: RunFiles,
    evaluation: EvaluationFiles,
    device: torch.device,
    threads: int,
    backend: Backend = "auto",
) -> Path:
    """Score a whole run and write its evaluation; one that is there is left alone.

    One that was stopped goes on with the episodes that were not finished.

    Returns:
        The evaluation's file.

    Raises:
        ConfigurationError: when the backend cannot be used.
        RunIncomplete: when the run is not whole.
        CheckpointError, WeightsError: when its checkpoint, or weights in its place, are not what
            was recorded.
        NotFetched: when neither is here and the checkpoint cannot be fetched from DVC.
        DeviceFailed: when there is not enough memory.
        Stopped: when it was asked to stop; the same call goes on.
    """
    torch.set_num_threads(threads)
    if not is_whole(run.folder, run.fingerprint):
        raise RunIncomplete(f"{run.folder}: not trained to its end; `drama train {run.path}`")
    with locked(run.folder), _naming_device(run, device):
        make_current(run.folder, run.fingerprint)
        if evaluation.path.exists():
            note_evaluation(evaluation.path)
            KeptEpisodes.beside(evaluation.path).unlink(missing_ok=True)
            say(f"{evaluation.path}: there already")
            return evaluation.path
        written = _play_and_write(run, evaluation, device, threads, backend)
    say(f"{evaluation.path}: {written.score}")
    for played in written.played.values():
        if played is not written.score:
            say(f"Beside the score: {played}")
        if warning := played.warning():
            say(f"Warning: {warning}")
    return evaluation.path


def _play_and_write(
    run: RunFiles,
    evaluation: EvaluationFiles,
    device: torch.device,
    threads: int,
    backend: Backend,
) -> Evaluation:
    """Play a whole run's episodes, but for those that were kept, and write their file and note."""
    choice = kernels.choose(backend, device, run.recipe.settings.sequence_model)
    say(f"Sequence backend: {choice}")
    recorded = read_record(run.record)
    _fetch_checkpoint(recorded)
    agent, source = agent_of(recorded, device)
    if source.name != CHECKPOINT:
        say(f"{source}: plays, since {CHECKPOINT} is not here")
    use_backend(agent, choice)
    origin = {
        "run": run.fingerprint,
        "fingerprint": evaluation.fingerprint,
        "device": device_name(device),
        "backend": choice.name,
    }
    kept = KeptEpisodes(evaluation.path, origin | {"threads": threads})
    episodes = play_on(agent, run.recipe, evaluation.settings, kept)
    rows = [episode.row() for episode in episodes]
    header = describe(episodes, run.recipe) | origin
    header["settings"] = evaluation.settings.model_dump()
    write_evaluation(evaluation.path, rows, vouching(header, rows))
    written = note_evaluation(evaluation.path, played_now=True)
    kept.path.unlink(missing_ok=True)
    return written


def _fetch_checkpoint(run: RecordedRun) -> None:
    """Fetch a whole run's checkpoint when neither it nor the weights are here, as in a clone."""
    checkpoint = run.folder / CHECKPOINT
    if checkpoint.exists() or run.weights.exists():
        return
    source = fetch(run)
    say(f"{checkpoint}: fetched from {source}")
