"""Does an entry of dvc.lock hold, and are a run's files those that the run recorded?"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from drama.errors import DramaError, reason
from drama.files import replacing, sha256_file
from drama.pipeline.artifacts.lockfile import LOCK, Entry
from drama.pipeline.artifacts.stages import Stage
from drama.pipeline.plans import PlannedRun

CACHE = Path(".dvc/cache/files/md5")


class NotRecorded(DramaError):
    """Something that should be recorded and cannot be."""


def holds(stage: Stage, entry: Entry) -> bool:
    """Say whether an entry of dvc.lock is of this stage and of the small files that are here.

    A run's training.parquet holds its speed, which no two runs share: who has the same has the
    same run.
    """
    items = _items(entry)
    if entry["cmd"] != stage.command or not names_all(stage, entry):
        return False
    for path in sorted({*stage.needs, *stage.outs} - set(stage.blobs)):
        if Path(path).is_dir():
            continue
        if not Path(path).is_file() or items[path] != file_item(Path(path)):
            return False
    return True


def names_all(stage: Stage, entry: Entry) -> bool:
    """Say whether an entry names everything that a stage needs and makes, and nothing else."""
    return set(_items(entry)) == {*stage.needs, *stage.outs}


def _items(entry: Entry) -> dict[str, Entry]:
    return {item["path"]: item for key in ("deps", "outs") for item in entry.get(key) or ()}


def is_kept(stage: Stage, entry: Entry) -> bool:
    """Say whether those of a stage's blobs that are here are in DVC's cache, too."""
    items = {item["path"]: item["md5"] for item in entry["outs"]}
    return all(
        (CACHE / items[blob][:2] / items[blob][2:]).exists()
        for blob in stage.blobs
        if Path(blob).exists()
    )


def file_item(path: Path) -> Entry:
    """Return what dvc.lock says of a file."""
    size = path.stat().st_size
    return {"path": path.as_posix(), "hash": "md5", "md5": _md5(path), "size": size}


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def is_text_of(path: Path, fingerprint: str) -> bool:
    """Say whether a file's SHA-256 is, or begins with, a fingerprint."""
    return path.is_file() and sha256_file(path).startswith(fingerprint)


@dataclass(frozen=True)
class Artifact:
    """A file of a run, as the run's record names it: its path in the run's folder."""

    path: str
    sha256: str
    bytes: int


def read_artifacts(record: Path) -> list[Artifact]:
    """Return what a run's record says of the run's files.

    Raises:
        NotRecorded: when the record cannot be read.
    """
    try:
        listed = json.loads(record.read_text(encoding="utf-8"))["artifacts"]
        return [Artifact(item["path"], item["sha256"], item["bytes"]) for item in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotRecorded(
            f"{record}: unreadable ({reason(error)}). Put it back from git, or move the run's "
            "folder away to train it anew"
        ) from None


def verify(run: PlannedRun, stage: Stage) -> list[str]:
    """Hold a run's files to its record.

    Returns:
        What had to be brought back first, in words.

    Raises:
        NotRecorded: naming the first that is missing, damaged or not the run's.
    """
    artifacts, notes = read_artifacts(run.record), []
    for artifact in artifacts:
        path = run.folder / artifact.path
        if not path.is_file():
            if not _bring_back(path, artifact):
                raise NotRecorded(
                    f"{path}: not here, and {LOCK} does not know it; {stage.name} is not recorded. "
                    f"Put back {LOCK} from git, or give `drama record` where the run was trained"
                )
            notes.append(f"{path}: was missing; brought back from DVC's cache")
        elif sha256_file(path) != artifact.sha256:
            raise NotRecorded(
                f"{path}: damaged, its bytes are not those that {run.record.name} recorded; "
                f"{stage.name} is not recorded. Put back a good copy of the file, or move the "
                "run's folder away to train it anew"
            )
    present = {path.relative_to(run.folder).as_posix() for path in run.folder.glob("replay/*")}
    strange = sorted(present - {artifact.path for artifact in artifacts})
    if strange:
        raise NotRecorded(
            f"{run.folder / strange[0]}: {run.record.name} does not know this file; {stage.name} "
            "is not recorded. Move the file away"
        )
    return notes


def _bring_back(path: Path, artifact: Artifact) -> bool:
    """Copy a file back from DVC's cache, by its content; say whether it was there.

    DVC removes a file before it puts a link in its place: killed in between, as `dvc repro` may
    be, it leaves the bytes in its cache only, and dvc.lock without their name.
    """
    for cached in CACHE.glob("??/*"):
        same_size = cached.stat().st_size == artifact.bytes
        if same_size and sha256_file(cached) == artifact.sha256:
            with replacing(path) as temporary:
                shutil.copyfile(cached, temporary)
            return True
    return False
