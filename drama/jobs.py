"""What a job of the pipeline does: train one run, evaluate one run, each into the run's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from drama.artifacts.agents import agent_of
from drama.artifacts.evaluations import note_evaluation
from drama.artifacts.image import running_digest
from drama.artifacts.records import read_record
from drama.artifacts.store import fetch
from drama.artifacts.weights import weights_path
from drama.errors import DramaError
from drama.evaluation import play, write_evaluation
from drama.model.sequence import kernels
from drama.recipes import EvaluationFiles, RunFiles
from drama.runs import is_whole, locked, make_current, write_record
from drama.settings import Backend
from drama.training.loop import CHECKPOINT, Runtime, train


class RunIncomplete(DramaError):
    """A run that is not trained to its end."""


def device_name(device: torch.device) -> str:
    """Return a device's name for records, such as `cpu` or `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def train_run(run: RunFiles, runtime: Runtime) -> None:
    """Train a run to its end and write its record; a whole run is left alone.

    Waits when another process works on the run, such as one that outlived a killed Snakemake.

    Raises:
        ConfigurationError: when the backend cannot be used.
        Stopped: when it was asked to stop; the same call goes on.
        TrainingFailed, CheckpointError: when it cannot go on.
    """
    with locked(run.folder):
        if is_whole(run.folder, run.fingerprint):
            make_current(run.folder, run.fingerprint)
            _say(f"{run.record}: this run is whole already")
            return
        backend = runtime.choose_backend(run.recipe.settings.sequence_model)
        _say(f"Sequence backend: {backend}")
        make_current(run.folder, run.fingerprint)
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
        _say(f"{run.record}: trained in {status.wall_seconds / 60:.1f} min")


def evaluate_run(
    run: RunFiles,
    evaluation: EvaluationFiles,
    device: torch.device,
    threads: int,
    backend: Backend = "auto",
) -> Path:
    """Score a whole run and write its evaluation; one that is there is left alone.

    Returns:
        The evaluation's file.

    Raises:
        ConfigurationError: when the backend cannot be used.
        RunIncomplete: when the run is not whole.
        CheckpointError, WeightsError: when its checkpoint, or weights in its place, are damaged.
        NotFetched: when neither is here and the checkpoint cannot be fetched from DVC.
    """
    torch.set_num_threads(threads)
    if not is_whole(run.folder, run.fingerprint):
        raise RunIncomplete(f"{run.folder}: not trained to its end; `drama train {run.path}`")
    with locked(run.folder):
        make_current(run.folder, run.fingerprint)
        if evaluation.path.exists():
            note_evaluation(evaluation.path, evaluation.fingerprint)
            _say(f"{evaluation.path}: there already")
            return evaluation.path
        choice = kernels.choose(backend, device, run.recipe.settings.sequence_model)
        _say(f"Sequence backend: {choice}")
        _fetch_checkpoint(run)
        agent, source = agent_of(read_record(run.record), device)
        if source.name != CHECKPOINT:
            _say(f"{source}: plays, since {CHECKPOINT} is not here")
        kernels.use(agent, choice)
        episodes = play(agent, run.recipe, evaluation.settings)
        header = {
            "run": run.fingerprint,
            "fingerprint": evaluation.fingerprint,
            "settings": evaluation.settings.model_dump(),
            "device": device_name(device),
            "backend": choice.name,
        }
        write_evaluation(evaluation.path, episodes, run.recipe, header)
        note_evaluation(evaluation.path, evaluation.fingerprint)
    mean = sum(episode.episode_return for episode in episodes) / len(episodes)
    _say(f"{evaluation.path}: mean return {mean:g} over {len(episodes)} episodes")
    return evaluation.path


def _fetch_checkpoint(run: RunFiles) -> None:
    """Fetch a whole run's checkpoint when neither it nor the weights are here, as in a clone."""
    checkpoint = run.folder / CHECKPOINT
    if checkpoint.exists() or weights_path(run.folder, run.fingerprint).exists():
        return
    source = fetch(run.record, CHECKPOINT, f"train@{run.recipe.game}-{run.recipe.seed}")
    _say(f"{checkpoint}: fetched from {source}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
