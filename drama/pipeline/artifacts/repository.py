"""DVC, through its Python interface: many stages in one process, where the command takes one."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drama.errors import reason
from drama.pipeline.artifacts.entries import NotRecorded
from drama.pipeline.artifacts.lockfile import Entry
from drama.pipeline.artifacts.stages import DVC_YAML, Stage

if TYPE_CHECKING:
    from dvc.repo import Repo

TEMPORARY = Path(".dvc/tmp")
GUARD = TEMPORARY / "record.lock"
PROCESSES = TEMPORARY / "rwlock"


class Repository:
    """DVC's repository in the working directory, opened and locked; see `open`."""

    def __init__(self, repository: Repo) -> None:
        from dvc.dvcfile import load_file
        from dvc.stage.loader import StageLoader

        file = load_file(repository, str(DVC_YAML.absolute()))
        # Without dvc.lock: what is committed is what lies there, not what was known before.
        self._stages = StageLoader(file, file.contents, {})
        self._repository = repository

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Repository]:
        """Open the repository, and hold its lock.

        Raises:
            NotRecorded: for whatever DVC complains about.
        """
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo() as repository, repository.lock:
                yield cls(repository)
        except DvcException as error:
            raise NotRecorded(f"DVC: {error}") from error

    def commit(self, stage: Stage) -> Entry:
        """Put a stage's files into DVC's cache and link them from there.

        Returns:
            The stage's entry for dvc.lock.

        Raises:
            NotRecorded: when DVC cannot.
        """
        from dvc.exceptions import DvcException
        from dvc.stage.serialize import to_single_stage_lockfile

        try:
            known: Any = self._stages[stage.name]
            known.save(run_cache=False)
            known.commit(relink=False)
            for out in known.outs:
                self._link(out)
        except (DvcException, OSError) as error:
            raise NotRecorded(f"{stage.name}: not recorded; {reason(error)}") from error
        return _plain(to_single_stage_lockfile(known))

    def _link(self, out: Any) -> None:
        """Make the files of an output links into the cache, so that nothing is on disk twice.

        DVC does this too, but removes each file first: a kill would leave a run without it.
        """
        from dvc_objects.fs.generic import transfer

        if not out.use_cache:
            return
        cache, state = self._repository.cache.local, self._repository.state
        tree = out.obj if out.is_dir_checksum else [((), None, out.hash_info)]
        for key, _, checksum in tree:
            path, cached = Path(out.fs_path, *key), cache.oid_to_path(checksum.value)
            if path.samefile(cached):
                continue
            temporary = path.with_name(f".{path.name}.link.part")
            temporary.unlink(missing_ok=True)
            transfer(cache.fs, cached, out.fs, str(temporary), links=list(cache.cache_types))
            os.replace(temporary, path)
            state.save(str(path), out.fs, checksum)


def _plain(data: Any) -> Any:
    """Turn DVC's ordered mappings into ordinary ones."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(item) for item in data] if isinstance(data, list) else data


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process records; the lock goes with the process."""
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    with GUARD.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mend_processes() -> bool:
    """Remove DVC's list of processes when a kill has left it unreadable; say whether it had.

    Entries of processes that are gone DVC removes itself.
    """
    if _is_readable(PROCESSES):
        return False
    from dvc.lock import make_lock

    with make_lock(str(TEMPORARY / "rwlock.lock")):
        if _is_readable(PROCESSES):  # a living process was just writing it
            return False
        PROCESSES.unlink()
    return True


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False
