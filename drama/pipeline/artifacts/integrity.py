"""Are a run's files those that the run recorded?

Asked before DVC commits them, since `dvc commit` takes down whatever bytes lie there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from drama.errors import DramaError
from drama.files import replacing, sha256_file
from drama.pipeline.artifacts.lockfile import LOCK
from drama.pipeline.artifacts.records import Artifact, RecordedRun, compare


class NotRecorded(DramaError):
    """Something that should be recorded and cannot be."""


def is_text_of(path: Path, fingerprint: str) -> bool:
    """Say whether a file's SHA-256 is a fingerprint."""
    return path.is_file() and sha256_file(path) == fingerprint


def verify(run: RecordedRun, cache: Path) -> list[str]:
    """Hold a run's files to its record.

    Args:
        run: a whole run.
        cache: folder of DVC's cache, where a missing file may be.

    Returns:
        What had to be brought back first, in words.

    Raises:
        NotRecorded: naming the first that is missing, damaged or not the run's.
    """
    missing, changed = compare(run)
    if changed:
        raise NotRecorded(
            f"{run.folder / changed[0].path}: damaged, its bytes are not those that "
            f"{run.path.name} recorded; {run.stage} is not recorded. Put back a good copy of the "
            "file, or move the run's folder away to train it anew"
        )
    known = {run.folder / artifact.path for artifact in run.record.artifacts}
    if strange := sorted(set(run.folder.glob("replay/*")) - known):
        raise NotRecorded(
            f"{strange[0]}: {run.path.name} does not know this file; {run.stage} is not recorded. "
            "Move the file away"
        )
    for artifact in missing:
        path = run.folder / artifact.path
        if not _bring_back(path, artifact, cache):
            raise NotRecorded(
                f"{path}: not here, and {LOCK} does not know it; {run.stage} is not recorded. "
                f"Put back {LOCK} from git, or give `drama record` where the run was trained"
            )
    return [
        f"{run.folder / artifact.path}: was missing; brought back from DVC's cache"
        for artifact in missing
    ]


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
