"""Which GPU a command takes on a machine with several: the one that the fewest others took.

Each command holds a lock for as long as it lives, so that commands started at the same moment do
not pick the same GPU. Nobody hands GPUs out, so nothing is left to tidy up after a kill.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

_HELD: list[TextIO] = []


def count() -> int:
    """Return the number of GPUs that commands started here may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip()])
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:  # no driver, so no GPU
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def claim(names: Sequence[str], folder: Path | None = None) -> int:
    """Take the GPU that the fewest living processes took, until this process ends.

    Args:
        names: of the GPUs to choose from, the same in every process on this machine.
        folder: where to keep locks; every process must name the same. By default one of this user's
            in the folder for temporary files.

    Returns:
        The chosen one's place among the names.
    """
    folder = folder or Path(tempfile.gettempdir(), f"drama-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in itertools.count():
        for index, name in enumerate(names):
            file = (folder / f"{name}.{place}").open("w", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _HELD.append(file)
            return index
    raise AssertionError("unreachable")
