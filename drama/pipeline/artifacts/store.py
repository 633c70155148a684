"""Fetching a run's checkpoint from DVC's cache or its remote, when a job needs it.

Of ten `dvc pull`, one run each, started at once, nine fail: "Unable to acquire lock". This takes
none of DVC's locks and writes nothing of DVC's, so that jobs do it side by side. Jobs in the image
look into the cache only: it holds no DVC.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drama.errors import DramaError
from drama.files import replacing, sha256_file
from drama.pipeline.artifacts.lockfile import LOCK, read_ledger
from drama.pipeline.artifacts.records import Artifact, RecordedRun
from drama.runs.folder import CHECKPOINT, REPLAY

CACHE = Path(".dvc/cache/files/md5")


class NotFetched(DramaError):
    """A file that is neither here nor to be had."""


def fetch(run: RecordedRun) -> str:
    """Bring the checkpoint back that dvc.lock names, and hold it to the run's own checksum.

    Args:
        run: a whole run, with its place from the project's root.

    Returns:
        Where it came from.

    Raises:
        NotFetched: when there is no such file, or one with other bytes; nothing is written then.
    """
    path = run.folder / CHECKPOINT
    md5 = _recorded(path, run.stage)
    cached = CACHE / md5[:2] / md5[2:]
    damaged = ""
    if cached.is_file():
        if sha256_file(cached) == run.checkpoint.sha256:
            with replacing(path) as temporary:
                shutil.copyfile(cached, temporary)
            return str(CACHE)
        damaged = f"{cached} is damaged: its bytes are not those that the run recorded; remove it. "
    if find_spec("dvc") is None:
        raise NotFetched(
            f"{path}: not here. {damaged}DVC, which could fetch it, is not installed here either: "
            f"`dvc pull {run.stage}` where it is"
        )
    return _download(path, md5, run, damaged)


def cure(run: RecordedRun, artifact: Artifact) -> str:
    """Say where the damage of a run's file comes from, and what mends it.

    DVC takes what a remote holds on trust (its own check, `verify`, removes from the remote what it
    finds damaged, and then calls it absent), so damage there reaches the cache and the run.
    """
    path = run.folder / artifact.path
    size, bytes_here = path.stat().st_size, sha256_file(path)
    for cached in CACHE.glob("??/*"):
        if cached.stat().st_size == size and sha256_file(cached) == bytes_here:
            break
    else:
        return f"remove it, then {run.remedy}, or `git checkout` for what git keeps"
    here = f"{path} and its copy in DVC's cache, {cached}"
    try:
        there = _damaged_there(cached.parent.name + cached.name, run, artifact)
    except Exception as error:  # each kind of remote has a library with errors of its own
        return f"remove {here}; then {run.remedy}. DVC's remote could not be asked: {error}"
    if there is None:
        return f"DVC's remote holds a good copy: remove {here}; then {run.remedy}"
    return (
        f"it came so from DVC's remote, where {there} and {here}; then give "
        f"`dvc push {run.stage}` where a good copy is"
    )


def _damaged_there(md5: str, run: RecordedRun, artifact: Artifact) -> str | None:
    """Say what is damaged in DVC's remote and must be removed there; None for a good copy."""
    from dvc.repo import Repo

    with Repo() as repository, tempfile.TemporaryDirectory() as folder:
        odb: Any = repository.cloud.get_remote().odb
        source, copy = odb.oid_to_path(md5), Path(folder) / "copy"
        odb.fs.get_file(source, str(copy))
        if sha256_file(copy) == artifact.sha256:
            return None
        there = f"{source} is damaged. Remove that file there"
        if artifact.path.startswith(f"{REPLAY}/"):  # or DVC takes all that it lists to be there
            listing = next(_out(run.folder / REPLAY, run.stage), None)
            there += f", {odb.oid_to_path(listing)}, which lists it," if listing else ""
        return there


def _recorded(path: Path, stage: str) -> str:
    """Return a file's MD5, by which DVC finds it."""
    for md5 in _out(path, stage):
        return md5
    reason = read_ledger().damage or "it does not name this file"
    raise NotFetched(
        f"{path}: not here, and not to be found by {LOCK}: {reason}. Put back {LOCK} from git, or "
        "give `drama record` and `dvc push` where the run was trained. A run that is not kept in "
        "DVC can only be trained anew, with its folder moved away"
    )


def _out(path: Path, stage: str) -> Iterator[str]:
    """Yield the MD5s of a stage's file or folder that dvc.lock, or an older one, names."""
    for entries in read_ledger().sources:
        for out in entries.get(stage, {}).get("outs") or ():
            if out["path"] == path.as_posix():
                yield out["md5"]


def _download(path: Path, md5: str, run: RecordedRun, damaged: str) -> str:
    from dvc.repo import Repo

    where, source = "DVC's remote", "?"
    try:
        with Repo() as repository:
            remote: Any = repository.cloud.get_remote()
            where = f"remote {remote.name!r} ({remote.odb.fs.unstrip_protocol(remote.odb.path)})"
            source = remote.odb.oid_to_path(md5)
            with replacing(path) as temporary:
                remote.odb.fs.get_file(source, str(temporary))
                if sha256_file(temporary) != run.checkpoint.sha256:
                    raise NotFetched(
                        f"{path}: damaged in {where}: the bytes of {source} are not those that "
                        f"the run recorded. {damaged}Remove that file there and give "
                        f"`dvc push {run.stage}` where a good copy is"
                    )
    except NotFetched:
        raise
    except FileNotFoundError:
        raise NotFetched(
            f"{path}: neither here nor in {where}, where it would be {source}. {damaged}"
            f"Give `dvc push {run.stage}` where the run was trained"
        ) from None
    except Exception as error:  # each kind of remote has a library with errors of its own
        said = getattr(error, "strerror", None) or error  # without the system's number
        raise NotFetched(
            f"{path}: not here, and DVC cannot fetch it: {said}. {damaged}When that is mended, "
            f"give the same command again, or `dvc pull {run.stage}`"
        ) from error
    return where
