"""Are a run's files those that the run recorded?

Asked before DVC commits them, since `dvc commit` takes down whatever bytes lie there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from drama.errors import DramaError, reason
from drama.files import replacing, sha256_file
from drama.pipeline.artifacts.lockfile import LOCK
from drama.pipeline.artifacts.records import Artifact, Listing
from drama.pipeline.artifacts.stages import Stage
from drama.pipeline.plans import PlannedRun


class NotRecorded(DramaError):
    """Something that should be recorded and cannot be."""


def is_text_of(path: Path, fingerprint: str) -> bool:
    """Say whether a file's SHA-256 is, or begins with, a fingerprint."""
    return path.is_file() and sha256_file(path).startswith(fingerprint)


def read_artifacts(record: Path) -> tuple[Artifact, ...]:
    """Return what a run's record says of the run's files.

    Raises:
        NotRecorded: when the record cannot be read.
    """
    try:
        return Listing.model_validate_json(record.read_bytes()).artifacts
    except (OSError, ValueError) as error:
        raise NotRecorded(
            f"{record}: unreadable ({reason(error)}). Put it back from git, or move the run's "
            "folder away to train it anew"
        ) from None


def verify(run: PlannedRun, stage: Stage, cache: Path) -> list[str]:
    """Hold a run's files to its record.

    Args:
        run: a run of today's plan.
        stage: what DVC calls its training.
        cache: folder of DVC's cache, where a missing file may be.

    Returns:
        What had to be brought back first, in words.

    Raises:
        NotRecorded: naming the first that is missing, damaged or not the run's.
    """
    artifacts, notes = read_artifacts(run.record), []
    for artifact in artifacts:
        path = run.folder / artifact.path
        if not path.is_file():
            if not _bring_back(path, artifact, cache):
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


def _bring_back(path: Path, artifact: Artifact, cache: Path) -> bool:
    """Copy a file back from DVC's cache, by its content; say whether it was there.

    DVC removes a file before it puts a link in its place: killed in between, which is 1 % of a
    commit's time (1430 files), it leaves the bytes in its cache only, and dvc.lock without their
    name.
    """
    for cached in cache.glob("??/*"):
        same_size = cached.stat().st_size == artifact.bytes
        if same_size and sha256_file(cached) == artifact.sha256:
            with replacing(path) as temporary:
                shutil.copyfile(cached, temporary)
            return True
    return False
