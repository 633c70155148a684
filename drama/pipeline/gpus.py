"""Which GPU a command takes on a machine with several: the one that the fewest others took.

Each command holds a lock for as long as it lives, so that commands started at the same moment do
not pick the same GPU. Nobody hands GPUs out, so nothing is left to tidy up after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from drama.errors import ConfigurationError, DramaError, reason

if TYPE_CHECKING:
    import torch

HIDDEN = ("", "-1", "NoDevFiles")
"""What CUDA_VISIBLE_DEVICES is where a process is to see no GPU; the last is Slurm's."""
DRIVER = Path("/proc/driver/nvidia/version")

LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How a lock file is opened: never through a link, never waiting, never emptied."""
_HELD: list[int] = []


class GpuUnusable(DramaError):
    """A GPU was allocated, and PyTorch cannot use it: on another node it may well."""


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

    Raises:
        ConfigurationError: when the folder is not this user's alone.
    """
    folder = folder or Path(tempfile.gettempdir(), f"drama-gpus-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    with _own(folder) as descriptor:
        for place in itertools.count():
            for index, name in enumerate(names):
                file = os.open(f"{name}.{place}", LOCK, 0o600, dir_fd=descriptor)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(file)
                    continue
                _HELD.append(file)
                return index
    raise AssertionError("unreachable")


@contextmanager
def _own(folder: Path) -> Iterator[int]:
    """Open a folder, unless somebody else can put things into it, or has put it there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise _not_own(folder, "a file or a link, not a folder") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid():
            raise _not_own(folder, f"of another user, number {found.st_uid}")
        if found.st_mode & 0o077:
            raise _not_own(folder, f"open to other users, mode {found.st_mode & 0o777:o}")
        yield descriptor
    finally:
        os.close(descriptor)


def _not_own(folder: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{folder}: {what}, so commands cannot agree in it on who takes which GPU. Have it "
        "removed; or name a GPU, `--device cuda:0`; or set TMPDIR to a folder of your own"
    )


def choose(name: str, deterministic: bool = False) -> torch.device:
    """Turn a device's name into one that is there; of several GPUs, cuda takes one by `claim`.

    Args:
        name: auto (a GPU when there is one), cpu, cuda or cuda:<number>.
        deterministic: whether PyTorch is to add in a fixed order there.

    Raises:
        ConfigurationError: when there is no such device, naming the option `--device`.
        GpuUnusable: when the environment says that a GPU was allocated, and PyTorch cannot use it.
    """
    import torch  # only now: counting GPUs must stay cheap

    if deterministic:
        _fix_order()
    if name == "auto":
        name = "cuda" if allocated() or torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name}: allowed are auto, cpu, cuda, cuda:<number>")
    if found.type == "cpu":
        return found
    seen = torch.cuda.device_count()
    if seen == 0 and (source := allocated()):
        raise GpuUnusable(
            f"{source}: a GPU was allocated, and PyTorch sees none here: {_why_unseen()}. Another "
            "node may do, or `--device cpu`, which takes days where a GPU takes hours"
        )
    if (found.index or 0) >= seen:
        why = f" ({_why_unseen()})" if seen == 0 else ""
        raise ConfigurationError(
            f"--device {name}: PyTorch sees {seen} GPUs here{why}; use cpu or auto"
        )
    try:
        if found.index is None:
            names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(seen)]
            found = torch.device("cuda", claim(names))
        torch.cuda.set_device(found)
    except RuntimeError as error:
        raise GpuUnusable(
            f"--device {name}: PyTorch cannot use this GPU: {reason(error)}; {_driver()}"
        ) from error
    return found


def _fix_order() -> None:
    """Have PyTorch take algorithms that add in a fixed order, and warn where it has none."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # looked at as CUDA is begun
    torch.backends.cudnn.benchmark = False  # which takes the fastest of this minute
    torch.use_deterministic_algorithms(True, warn_only=True)


def allocated() -> str:
    """Return the environment's words for the GPUs that were allocated to us, or nothing.

    CUDA_VISIBLE_DEVICES decides where it is set, as it does for PyTorch.
    """
    for variable in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        value = os.environ.get(variable)
        if value is not None:
            return "" if value.strip() in HIDDEN else f"{variable}={value}"
    return ""


def _why_unseen() -> str:
    """Say why PyTorch sees no GPU, in its own words, and which driver is here."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter where it was built without CUDA
        return f"{reason(error).rstrip('.')}; {_driver()}"
    return f"it does not say why; {_driver()}"


def _driver() -> str:
    """Say which version of NVIDIA's driver this machine has; a container shares its host's."""
    try:
        said = DRIVER.read_text(encoding="utf-8")
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            said = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return f"NVIDIA's driver is {found[0]}" if found else "no NVIDIA driver here"
