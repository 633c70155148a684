"""A run's folder: who owns it, what makes it whole, what happens to another run found there."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import drama
from drama.files import canonical_json, remove_leftovers, sha256_file, sha256_text, write_json
from drama.reading import read_json
from drama.runs.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    CheckpointDamaged,
    CheckpointError,
    Form,
    checkpoint_fingerprint,
    checkpoint_scalar,
    load_checkpoint,
)
from drama.runs.locks import RunBusy, locked
from drama.runs.progress import Status
from drama.runs.shards import check_shards

SHORT = 16
"""Hexadecimal digits of a fingerprint that file names carry."""

EPISODES = "episodes.parquet"
TRAINING = "training.parquet"
REPLAY = "replay"
STATUS = "status.json"
SUPERSEDED = "superseded"
DAMAGED = "checkpoint.damaged.parquet"
"""What a damaged checkpoint is renamed to when the one before is gone on from."""
ARTIFACTS = (CHECKPOINT, EPISODES, TRAINING, f"{REPLAY}/part-*.parquet")
RECORD = re.compile(rf"run-[0-9a-f]{{{SHORT}}}\.json")
COMMIT = "COMMIT"
"""The file in a frozen copy of the package that says which commit it was made of."""
VERSIONED = ("torch", "numpy", "gymnasium", "ale-py", "opencv-python-headless", "pyarrow")
KERNELS = ("mamba-ssm", "causal-conv1d", "triton")
"""Of the sequence backend mamba_ssm; only the CUDA image has them."""

GIT = ("git", "-c", "safe.directory=*")
"""Git that also answers about a checkout of another user, whose code runs here anyway."""

TRACKED = ("ls-files", "--error-unmatch", "--full-name", "__init__.py")
"""Git's arguments for the package's place in a repository that keeps it; an error in others."""

CHANGES = ("status", "--porcelain", "--", ".", ":(exclude,glob)**/__pycache__/**")
"""Git's arguments for what differs in a folder; what Python compiles there is no change."""


class FolderUnclear(CheckpointError):
    """A folder in which steps were done, and from which nothing can be gone on."""


def owner(folder: Path) -> str | None:
    """Return the (shortened) fingerprint of the run whose files lie in a folder, None if empty.

    A record says it, or a checkpoint. Only where neither can be read does a record's name, or
    status.json, which informs people; without these nobody can tell, `unknown`.
    """
    records = _records(folder)
    for record in records:
        if fingerprint := _recorded(record):
            return fingerprint[:SHORT]
    for name in (CHECKPOINT, PREVIOUS):
        if fingerprint := _saved_by(folder / name):
            return fingerprint[:SHORT]
    if records:
        return records[0].stem.removeprefix("run-")
    if status := Status.read(folder / STATUS):
        return status.fingerprint[:SHORT] or "unknown"
    return "unknown" if folder.is_dir() and any(folder.iterdir()) else None


def _records(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("run-*.json") if RECORD.fullmatch(path.name))


def is_whole(folder: Path, fingerprint: str) -> bool:
    """Say whether a run is trained to its end, in its folder or set aside, as its record says."""
    name = f"run-{fingerprint[:SHORT]}.json"
    places = (folder / name, superseded(folder, fingerprint) / name)
    return any(_recorded(path) == fingerprint for path in places)


def _recorded(path: Path) -> str | None:
    """Return the fingerprint of the run that a record is of; None when it is no such record."""
    try:
        record = read_json(path)
        fingerprint = sha256_text(canonical_json(record["recipe"]))
        named = path.name == f"run-{fingerprint[:SHORT]}.json"
        whole = named and record["fingerprint"] == fingerprint and record["artifacts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if whole else None


def _saved_by(checkpoint: Path) -> str | None:
    """Return the fingerprint of the run that a checkpoint is of; None when it is no such file."""
    with suppress(CheckpointError):
        return checkpoint_fingerprint(checkpoint)
    return None


def superseded(folder: Path, fingerprint: str) -> Path:
    """Return where a run is kept while another has its folder."""
    results, relative = folder.parents[2], folder.relative_to(folder.parents[1])
    return results / SUPERSEDED / relative / fingerprint[:SHORT]


def holds_whole(folder: Path) -> bool:
    """Say whether a whole run, whichever, lies in a folder."""
    return bool(_records(folder))


def is_current(folder: Path, fingerprint: str) -> bool:
    """Say whether a folder holds this run, or nothing while this run is not kept elsewhere."""
    present = owner(folder)
    if present == fingerprint[:SHORT]:
        return True
    return present is None and not superseded(folder, fingerprint).exists()


def make_current(folder: Path, fingerprint: str) -> None:
    """Give a run its folder: set another aside, bring this one back if it was set aside before.

    Call it with the folder locked, when the run is about to need it. Nothing is deleted or
    overwritten, and what is set aside is named.

    Raises:
        FolderUnclear: when the folder holds steps of a run, and whose cannot be told for sure.
    """
    remove_leftovers(folder)
    if is_current(folder, fingerprint):
        return
    present = owner(folder)
    _check_clear(folder, present, fingerprint)
    earlier = superseded(folder, fingerprint)
    if earlier.is_symlink():
        raise FolderUnclear(f"{earlier}: a link, which no run was set aside to; remove it")
    if present is not None:
        aside = _free(superseded(folder, present))
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        _say(
            f"{folder}: run {present} set aside to {aside}, as run {fingerprint[:SHORT]} takes its "
            "place"
        )
    if earlier.exists():
        if folder.is_dir():  # empty, or it would have had an owner
            folder.rmdir()
        earlier.rename(folder)


def _check_clear(folder: Path, present: str | None, fingerprint: str) -> None:
    """Raise FolderUnclear before files are set aside that may well be those of the run itself."""
    status = Status.read(folder / STATUS)
    if status and status.fingerprint == fingerprint and status.step:
        raise FolderUnclear(
            f"{folder / CHECKPOINT}: belongs to run {present}, though {STATUS} says that run "
            f"{fingerprint[:SHORT]} was trained here to step {status.step}. Put this run's own "
            f"back, or move the folder away to train run {fingerprint[:SHORT]} anew"
        )
    for name in (CHECKPOINT, PREVIOUS):
        if _saved_by(folder / name) == fingerprint:
            raise FolderUnclear(
                f"{folder}: {name} is of run {fingerprint[:SHORT]}, though other files here are of "
                f"run {present}. Move those away to go on with run {fingerprint[:SHORT]}, or the "
                "folder to train it anew"
            )
    if present == "unknown" and (trace := trace_of_steps(folder)):
        raise FolderUnclear(
            f"{folder}: there is {trace}, but no checkpoint or record that could be read and would "
            f"say which run it is of. Put {CHECKPOINT} back, or move the folder away to train run "
            f"{fingerprint[:SHORT]} anew"
        )


def trace_of_steps(folder: Path) -> str | None:
    """Return what shows that steps were done in a folder: a run's first file is a checkpoint."""
    for name in (CHECKPOINT, PREVIOUS, TRAINING, EPISODES, REPLAY):
        if (folder / name).exists():
            return name
    status = Status.read(folder / STATUS)
    return f"a {STATUS} of step {status.step}" if status and status.step else None


def load_latest(
    folder: Path, fingerprint: str, forms: Mapping[str, Form], optional: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Read a run's last good checkpoint: its last, or the one before where that is damaged.

    A damaged one is set aside and named.

    Args:
        folder: the run's, locked.
        fingerprint: the run's.
        forms, optional: as `load_checkpoint` takes them.

    Returns:
        What it holds; None when no step was done in this folder.

    Raises:
        CheckpointError: when there is none that can be gone on from, though steps were done.
    """
    last, before = folder / CHECKPOINT, folder / PREVIOUS
    try:
        return load_checkpoint(last, fingerprint, forms, optional=optional)
    except CheckpointDamaged as error:
        there = last.exists()
        if there and not error.is_permanent:  # the disk, and not the file
            raise
        if not there and not before.exists():
            if trace := trace_of_steps(folder):
                raise FolderUnclear(
                    f"{last}: not here, though there is {trace}, so steps of this run were done. "
                    "Put it back, as with `dvc pull`, or move the run's folder away to train it "
                    "anew.",
                    error.__cause__ or FileNotFoundError(),
                ) from None
            return None
        try:
            state = load_checkpoint(before, fingerprint, forms, optional=optional)
        except CheckpointError:
            raise error from None
        gone = "not here"
        if there:
            aside = _free(folder / DAMAGED)
            last.rename(aside)
            gone = f"damaged, set aside to {aside}"
        _say(f"{last}: {gone}; the run goes on from {before.name}, the one before")
        return state


def _free(path: Path) -> Path:
    """Return the path, or the first numbered one beside it that is not taken."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def restore(folder: Path, fingerprint: str) -> None:
    """Bring back a run that was set aside, unless somebody works on the run that has its folder.

    One that is not whole waits until it is trained on, rather than take the place of one that is.
    """
    aside = superseded(folder, fingerprint)
    if not aside.exists() or (holds_whole(folder) and not holds_whole(aside)):
        return
    try:
        with locked(folder, wait=False):
            make_current(folder, fingerprint)
    except RunBusy:
        return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_record(
    path: Path,
    recipe: dict[str, Any],
    fingerprint: str,
    *,
    device: str,
    backend: str,
    seconds: float,
    steps: int,
    image: str | None = None,
) -> None:
    """Write run-<fingerprint>.json, which says that the run in its folder is whole.

    Args:
        path: the record.
        recipe: what the run was made from.
        fingerprint: the recipe's SHA-256.
        device: what it ran on.
        backend: what computed Mamba-2.
        seconds: wall time of all sittings together.
        steps: agent steps.
        image: SHA-256 of the container image it ran in; None outside one.

    Raises:
        CheckpointError, ShardError: when a file is not what the run wrote.
    """
    folder = path.parent
    check_shards(folder / REPLAY, checkpoint_scalar(folder / CHECKPOINT, "replay/shards") or ())
    files = sorted(file for pattern in ARTIFACTS for file in folder.glob(pattern))
    record = {
        "format": 1,
        "fingerprint": fingerprint,
        "recipe": recipe,
        "artifacts": [
            {
                "path": file.relative_to(folder).as_posix(),
                "sha256": sha256_file(file),
                "bytes": file.stat().st_size,
            }
            for file in files
        ],
        "versions": versions(),
        "image": image,
        "device": device,
        "backend": backend,
        "wall_seconds": round(seconds, 1),
        "steps": steps,
        "git_commit": git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(path, record)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result may depend on."""
    installed = {"python": platform.python_version()}
    installed |= {name: version(name) for name in VERSIONED}
    for name in KERNELS:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def git_commit() -> str | None:
    """Return the code's commit; None outside a checkout of this project.

    `-dirty` stands behind it when the code differs from the commit. Configuration and recipes do
    not count: the record holds the recipe itself.
    """
    code = Path(drama.__file__).parent
    if (code / COMMIT).is_file():
        return (code / COMMIT).read_text(encoding="utf-8").strip() or None
    try:
        place, commit, changes = (
            subprocess.run(
                [*GIT, *arguments], cwd=code, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (TRACKED, ("rev-parse", "HEAD"), CHANGES)
        )
    except (OSError, subprocess.CalledProcessError) as error:  # no git, no repository, not in it
        if "dubious ownership" in (getattr(error, "stderr", None) or ""):
            _say(
                f"{code}: the commit is not recorded, since this git does not answer about a "
                "checkout of another user; `git config --global --add safe.directory "
                f"{code.parent}` lets it"
            )
        return None
    if place != "drama/__init__.py":  # a repository of somebody else, who keeps a copy in it
        return None
    return commit + ("-dirty" if changes else "")


def short_commit(commit: str) -> str:
    """Return a commit as people are shown it: twelve digits, and whether the code differed."""
    digits, dash, dirty = commit.partition("-")
    return f"{digits[:12]}{dash}{dirty}"
