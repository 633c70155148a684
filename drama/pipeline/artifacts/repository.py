"""DVC, through its Python interface: many stages in one process, and dvc.lock written once.

`dvc commit` writes dvc.lock anew for every stage that is named: ten of 262 take 18 s of processor
time, where all at once take 5 s. Without names it stops at the first run that is not finished, and
records none (benchmarks/scale.md). What is done to a stage is what `dvc commit` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from drama.errors import reason
from drama.pipeline.artifacts.integrity import NotRecorded
from drama.pipeline.artifacts.lockfile import Entries, Entry
from drama.pipeline.artifacts.stages import DVC_YAML
from drama.reading import read_json

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

PROCESSES = Path(".dvc/tmp/rwlock")


class Repository:
    """DVC's repository in the working directory, opened and locked; see `open`.

    Attributes:
        cache: folder of DVC's cache.
    """

    def __init__(self, repository: Repo) -> None:
        self._repository = repository
        self.cache = Path(repository.cache.local.path)
        self.read_stages()

    def read_stages(self) -> None:
        """Read dvc.yaml anew, when it is next needed."""
        from dvc.dvcfile import ProjectFile

        self._file = ProjectFile(self._repository, str(DVC_YAML.absolute()))

    @classmethod
    @contextmanager
    def open(cls, *, wait: bool) -> Iterator[Repository]:
        """Open the repository, and hold its lock.

        Args:
            wait: for as long as another process holds the lock; otherwise for three seconds.

        Raises:
            NotRecorded: for whatever DVC complains about.
        """
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(_wait_for_lock=wait) as repository, repository.lock:
                yield cls(repository)
        except DvcException as error:
            raise NotRecorded(f"DVC: {error}") from error

    def knows(self, stage: str) -> bool:
        """Say whether dvc.yaml has a stage, such as train@Pong-0."""
        return self._file.resolver.has_key(stage)

    def is_there(self, stage: str) -> bool:
        """Say whether everything that a stage needs and makes is there."""
        known = self._load(stage, {})
        return all(file.exists for file in (*known.deps, *known.outs))

    def is_recorded(self, stage: str, entries: Entries) -> bool:
        """Say whether entries of dvc.lock are of a stage's files as they lie here.

        Blobs may be missing, as in a clone that has pulled nothing; what git keeps may not.

        Raises:
            NotRecorded: when DVC cannot tell.
        """
        if stage not in entries:
            return False
        with _complaints(stage):
            known = self._load(stage, entries)
            missing = {str(out) for out in known.outs if out.use_cache and not out.exists}
            needs, outs, command = known.changed_entries()
            lost = any(out.use_cache and out.changed_cache() for out in known.outs)
        return not (needs or command or set(outs) - missing or (lost and not missing))

    def commit(self, stage: str) -> Entry:
        """Put a stage's files into DVC's cache and link them from there.

        Returns:
            The stage's entry for dvc.lock.

        Raises:
            NotRecorded: when DVC cannot.
        """
        from dvc.stage.serialize import to_single_stage_lockfile

        # Without dvc.lock: what is committed is what lies there, not what was known before.
        known = self._load(stage, {})
        with _complaints(stage):
            known.save(run_cache=False)
            known.commit()
        return to_single_stage_lockfile(known)

    def _load(self, stage: str, entries: Entries) -> PipelineStage:
        from dvc.stage.loader import StageLoader

        return StageLoader(self._file, self._file.contents, {"stages": entries})[stage]

    def mend_processes(self) -> bool:
        """Remove DVC's list of processes when a kill has left it unreadable; say whether it had.

        6 of 46 kills of a `dvc commit` did, and DVC refuses even `dvc status` from then on. Entries
        of processes that are gone it removes itself.
        """
        from dvc.lock import make_lock
        from dvc.rwlock import SCHEMA
        from voluptuous import Invalid

        with make_lock(f"{PROCESSES}.lock"):  # or a living process may be just writing it
            try:
                SCHEMA(read_json(PROCESSES))
            except FileNotFoundError:
                return False
            except (ValueError, Invalid):
                PROCESSES.unlink()
                return True
        return False


@contextmanager
def _complaints(stage: str) -> Iterator[None]:
    """Turn what DVC complains about into NotRecorded."""
    from dvc.exceptions import DvcException

    try:
        yield
    except (DvcException, OSError) as error:
        raise NotRecorded(f"{stage}: not recorded; {reason(error)}") from error
