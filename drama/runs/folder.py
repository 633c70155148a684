"""A run's folder: who owns it, what makes it whole, what happens to another run found there."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import drama
from drama.files import remove_leftovers, sha256_file, write_json
from drama.runs.locks import RunBusy, locked

SHORT = 16
"""Hexadecimal digits of a fingerprint that file names carry."""

CHECKPOINT = "checkpoint.parquet"
EPISODES = "episodes.parquet"
TRAINING = "training.parquet"
REPLAY = "replay"
STATUS = "status.json"
SUPERSEDED = "superseded"
ARTIFACTS = (CHECKPOINT, EPISODES, TRAINING, f"{REPLAY}/part-*.parquet")
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


def owner(folder: Path) -> str | None:
    """Return the (shortened) fingerprint of the run whose files lie in a folder, None if empty."""
    for record in folder.glob("run-*.json"):
        return record.stem.removeprefix("run-")
    try:
        return str(json.loads((folder / STATUS).read_text(encoding="utf-8"))["fingerprint"])[:SHORT]
    except FileNotFoundError:
        return "unknown" if folder.is_dir() and any(folder.iterdir()) else None
    except (ValueError, KeyError, TypeError):
        return "unknown"


def is_whole(folder: Path, fingerprint: str) -> bool:
    """Say whether a run is trained to its end, in its folder or set aside."""
    name = f"run-{fingerprint[:SHORT]}.json"
    return any((place / name).exists() for place in (folder, superseded(folder, fingerprint)))


def superseded(folder: Path, fingerprint: str) -> Path:
    """Return where a run is kept while another has its folder."""
    results, relative = folder.parents[2], folder.relative_to(folder.parents[1])
    return results / SUPERSEDED / relative / fingerprint[:SHORT]


def holds_whole(folder: Path) -> bool:
    """Say whether a whole run, whichever, lies in a folder."""
    return any(folder.glob("run-*.json"))


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
    """
    remove_leftovers(folder)
    if is_current(folder, fingerprint):
        return
    present = owner(folder)
    if present is not None:
        aside = _free(superseded(folder, present))
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        _say(
            f"{folder}: run {present} set aside to {aside}, as run {fingerprint[:SHORT]} takes its "
            "place"
        )
    earlier = superseded(folder, fingerprint)
    if earlier.exists():
        if folder.is_dir():  # empty, or it would have had an owner
            folder.rmdir()
        earlier.rename(folder)


def _free(path: Path) -> Path:
    """Return the path, or the first numbered one beside it that is not taken."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
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
    """
    folder = path.parent
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
