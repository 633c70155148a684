"""Writing a whole folder so that nobody ever sees half of one."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drama.errors import ConfigurationError


@contextmanager
def replacing_folder(folder: Path, stray: Callable[[Path], str | None]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes that one's place.

    On an error everything is as it was, and what a killed call left is cleared up by the next.

    Args:
        folder: what lies there is deleted on success.
        stray: names something in a folder that must not be deleted; None when nothing is.

    Raises:
        ConfigurationError: when something lies there that must not be deleted.
    """
    place = folder.resolve()
    found = stray(place) if place.is_dir() else ""
    if found or (place.exists() and not place.is_dir()):
        what = f"holds {found}, which no earlier call has put there" if found else "a file"
        raise ConfigurationError(f"{folder}: {what}. Name another folder, or move it away")
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(place.parent.glob(f".{glob.escape(place.name)}.*.part")):
        if leftover.name.endswith(".old.part") and not place.exists():
            leftover.rename(place)  # a killed call had just moved it away
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    old = staging.with_suffix(".old.part")
    try:
        staging.chmod(0o755)
        yield staging
        if place.exists():
            place.rename(old)
        staging.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
