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
from typing import TYPE_CHECKING, TextIO

from drama.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

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


def choose(name: str) -> torch.device:
    """Turn a device's name into one that is there; of several GPUs, cuda takes one by `claim`.

    Args:
        name: auto (a GPU when there is one), cpu, cuda or cuda:<number>.

    Raises:
        ConfigurationError: when there is no such device, naming the option `--device`.
    """
    import torch  # only now: counting GPUs must stay cheap

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name}: allowed are auto, cpu, cuda, cuda:<number>")
    if found.type == "cpu":
        return found
    if (found.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use cpu or auto"
        )
    if found.index is None:
        every = range(torch.cuda.device_count())
        names = [str(torch.cuda.get_device_properties(index).uuid) for index in every]
        found = torch.device("cuda", claim(names))
    torch.cuda.set_device(found)
    return found
