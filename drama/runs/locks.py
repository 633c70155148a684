"""Who works on a run: a lock file beside the run's folder, which no two processes hold at a time.

Whoever takes the lock creates the file, and only if it is not there; it names its holder, who sets
its time anew every few seconds and removes it at the end. Where flock works the holder has that
too. It goes with the process, however that ends, so that on one node a death is seen at once. Some
cluster file systems have no flock, or one that other nodes do not see: there a holder counts as
dead when its process is gone from this node, its Slurm job from the queue, or its file is silent.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TextIO

from pydantic import Field, TypeAdapter

from drama.errors import DramaError
from drama.files import sha256_text
from drama.reading import open_regular

HEARTBEAT = 10.0
"""Seconds between two signs of life of a holder."""
DOUBT = 3 * HEARTBEAT
"""Seconds of silence after which Slurm is asked whether a holder's job still runs."""
SILENCE = 300.0
"""Seconds of silence after which a holder counts as dead, unless it has a flock that is seen."""
PAUSE = 5.0
"""Seconds between two looks at a lock that cannot be waited for."""

_FLOCK_WORKS: dict[int, bool] = {}
"""Which file systems have flock, by their device numbers."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=255)]
"""Of a node or a cluster."""
MOST = 4096
"""Bytes of a lock file that are read."""


class RunBusy(DramaError):
    """Another process works on the run."""


class NoLock(DramaError):
    """What lies in a lock file's place is something else."""


class NoThread(DramaError):
    """The system lets this user start no more threads, of which holding a run takes one."""


@dataclass(frozen=True)
class Holder:
    """Who works on a run.

    Attributes:
        host: its node.
        process: its number there.
        job: its Slurm job, if it runs in one.
        since: when it took the lock, ISO 8601 in UTC; nothing in files of version 0.1.0, whose
            holders give no sign of life.
        cluster: the Slurm cluster that the job is of.
    """

    host: Name
    process: Annotated[int, Field(ge=1, le=2**31 - 1)]
    job: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")] | None = None
    since: Annotated[str, Field(max_length=64)] = ""
    cluster: Name | None = None

    @classmethod
    def this(cls) -> Holder:
        """Return this process, as a holder from now on."""
        job, cluster = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "CLUSTER_NAME"))
        since = datetime.now(UTC).isoformat(timespec="microseconds")
        return cls(platform.node(), os.getpid(), job, since, cluster)

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Return whom a lock file names; None when it is empty or damaged."""
        try:
            if early := re.fullmatch(r"process (\d{1,10}) on (.+)", text):
                return _HOLDER.validate_python({"host": early[2], "process": int(early[1])})
            return _HOLDER.validate_json(text, strict=True)
        except ValueError:  # ValidationError is one
            return None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}"


_HOLDER = TypeAdapter(Holder)


@dataclass(frozen=True)
class _Look:
    """What a look at a lock file found.

    Attributes:
        holder: whom it names; None when that cannot be read, as before it is written.
        identity: of this file with this text, and no other.
        flocked: whether somebody has its flock; None where flock does not work.
        silence: seconds since the last sign of life.
    """

    holder: Holder | None
    identity: str
    flocked: bool | None
    silence: float

    def is_alive(self) -> bool:
        """Say whether the lock is held."""
        if self.flocked or self.silence >= SILENCE:
            return bool(self.flocked)
        if self.holder is None:  # created just now, or left by one that was killed just then
            return abs(self.silence) < DOUBT
        if self.holder.host == platform.node():
            return self.flocked is None and _is_process(self.holder.process)
        if not self.holder.since:
            return self.flocked is None
        return self.silence < DOUBT or not _is_over(self.holder)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a run's folder, so that no two processes work on it.

    Args:
        folder: the run's folder; it need not be there.
        wait: for another process that holds it, after saying which one.

    Raises:
        RunBusy: when another process holds it and is not to be waited for.
        NoLock: when something else lies in the lock's place.
        NoThread: when no sign of life can be given.
    """
    path = lock_of(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(Holder.this()))
    waiting = False
    while (file := _create(path, text)) is None:
        look = _look(path)
        if look is None:  # released between the two
            continue
        holder = look.holder or "another process"
        if not look.is_alive():
            if file := _take_over(path, look, text):
                break
            time.sleep(0.1)  # somebody else is taking over
            continue
        if not wait:
            raise RunBusy(f"{folder}: {holder} works on this run")
        if not waiting:
            waiting = True
            _say(
                f"{folder}: waiting for {holder}, which works on this run; "
                "stop that one, and this one goes on from where it was"
            )
        _wait(path, look)
    done = threading.Event()
    try:
        try:
            threading.Thread(target=_show_life, args=(path, text, done), daemon=True).start()
        except RuntimeError:
            raise NoThread(
                f"{folder}: no more threads can be started here (a limit on processes, "
                "`ulimit -u`): whoever works here has to show signs of life in one. End other "
                "processes of yours or raise the limit, and give the same command again"
            ) from None
        yield
    finally:
        done.set()
        if _read(path) == text:
            path.unlink(missing_ok=True)
        file.close()


def lock_of(folder: Path) -> Path:
    """Return the lock file of a run's folder."""
    return folder.with_name(f".{folder.name}.lock")


def read_holder(folder: Path) -> Holder | None:
    """Return who works on a run, None when nobody does; looking changes nothing."""
    look = _look(lock_of(folder))
    if look is None or not look.is_alive():
        return None
    return look.holder or Holder("unknown", 0)


def died_here(folder: Path) -> bool:
    """Say whether who worked on a run last did so on this node, and was killed."""
    look = _look(lock_of(folder))
    here = look is not None and look.holder and look.holder.host == platform.node()
    return look is not None and bool(here) and not look.is_alive()


def flock_works(folder: Path) -> bool:
    """Say whether files in a folder can be locked by the system, tried once per file system.

    A lock that is seen on its own node only counts as working; see `locked`.
    """
    device = folder.stat().st_dev
    if device not in _FLOCK_WORKS:
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _FLOCK_WORKS[device] = True
        except OSError:  # ENOLCK, ENOSYS, ENOTSUP; or nothing can be written here
            _FLOCK_WORKS[device] = False
    return _FLOCK_WORKS[device]


# --- the file ------------------------------------------------------------------------------------


def _create(path: Path, text: str) -> TextIO | None:
    """Create a lock file, flocked where that works; None when there is one."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return None
    try:
        if flock_works(path.parent):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        file.close()
        raise
    return file


def _look(path: Path) -> _Look | None:
    """Look at a lock file; None when there is none."""
    try:
        with _open(path) as file:
            flocked = None
            if flock_works(path.parent):
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    flocked = False
                except BlockingIOError:
                    flocked = True
            text, found = file.read(MOST), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    identity = sha256_text(f"{found.st_ino} {text}")[:16]
    return _Look(Holder.parse(text), identity, flocked, time.time() - found.st_mtime)


def _open(path: Path) -> TextIO:
    """Open a lock file for reading; raises as `open`, and NoLock."""
    try:
        return os.fdopen(open_regular(path, links=False), encoding="utf-8", errors="replace")
    except ValueError as error:
        raise NoLock(f"{path}: {error}, which no holder of a run makes; remove it") from None


def _read(path: Path) -> str | None:
    with suppress(OSError, NoLock), _open(path) as file:
        return file.read(MOST)
    return None


def _take_over(path: Path, dead: _Look, text: str) -> TextIO | None:
    """Put a lock file in the place of a dead holder's; None when somebody else did, or does.

    Of several that found the same holder dead, one creates the file that is named after it. Only
    that one may replace the holder's file, and only while it is still there.
    """
    claim = path.with_name(f"{path.name}.{dead.identity}")
    file = _create(claim, text)
    if file is None:
        other = _look(claim)
        if other and not other.is_alive():  # killed in the middle of this function
            claim.unlink(missing_ok=True)
        return None
    present = _look(path)
    if present and present.identity == dead.identity:
        with suppress(FileNotFoundError):
            os.replace(claim, path)
            if _read(path) == text:
                if dead.holder and dead.holder.host != platform.node():
                    _say(f"{path}: {dead.holder} is gone; its lock is taken over")
                return file
    claim.unlink(missing_ok=True)
    file.close()
    return None


def _wait(path: Path, look: _Look) -> None:
    """Wait until a lock that is held is free, or worth another look."""
    if not look.flocked:
        time.sleep(PAUSE)
        return
    with suppress(FileNotFoundError), _open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def _show_life(path: Path, text: str, done: threading.Event) -> None:
    """Set a lock file's time anew until done; end this process if it is another's by now.

    That is so after minutes in which it was suspended. What it would save is no longer wanted.
    """
    while not done.wait(HEARTBEAT):
        present = _read(path)
        if present == text:
            with suppress(OSError):
                os.utime(path)
        elif present and not done.is_set():
            _say(
                f"{path}: {Holder.parse(present) or 'another process'} took this run over, since "
                "this process was silent for minutes; it ends without saving"
            )
            os._exit(1)


# --- the holder ----------------------------------------------------------------------------------


def _is_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _is_over(holder: Holder) -> bool:
    """Say whether Slurm knows that a holder's job is over; not where it cannot be asked."""
    if holder.job is None or holder.cluster != os.environ.get("SLURM_CLUSTER_NAME"):
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={holder.job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not done.stdout.strip() and (
        done.returncode == 0 or "Invalid job id" in done.stderr  # over for a while
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
