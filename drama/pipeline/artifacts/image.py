"""The container image: which file today's versions ask for, and which one this process runs in.

An image's name holds the hash of what decides its content: the versions that its lock files pin,
containers/drama.def with the digest of its base, and the scripts that install. The project's own
code is not in it, nor what only `drama report` imports, so a change of these needs no new image.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from drama.agent.settings import Fingerprint, Frozen
from drama.errors import ConfigurationError, reason
from drama.files import sha256_file, sha256_text, write_json
from drama.pipeline.fingerprints import lock_hash
from drama.pipeline.names import Bytes
from drama.reading import read_model, read_text
from drama.runs.folder import SHORT

Variant = Literal["cuda", "cpu"]

IMAGES = Path("containers/images")
SEEN = Path(".snakemake/images")
"""Where Snakemake keeps what is known of a working directory, which goes with `make clean`."""
DEFINITION = Path("containers/drama.def")
INSTALLERS = (Path("containers/install.sh"), Path("containers/uv.sh"))
LOCKS: dict[Variant, tuple[str, ...]] = {
    "cuda": ("run", "cuda", "kernels"),
    "cpu": ("run", "cpu"),
}
NO_COMMAND = re.compile(r"(?<!\\\n)^[ \t]*(#(?!!).*)?(\n|\Z)", re.MULTILINE)
"""A comment's line or a blank one; not `#!`, nor a line that the one before it goes on in."""

COMMANDS: dict[Variant, str] = {"cuda": "make container", "cpu": "make container VARIANT=cpu"}


class ImageMissing(ConfigurationError):
    """Jobs are to run in an image that is not there, or is of other versions."""


def variant_for(device: str) -> Variant:
    """Return which image jobs need: only `device: cpu` does without CUDA."""
    return "cpu" if device == "cpu" else "cuda"


def image_hash(variant: Variant) -> str:
    """Return the hash of what decides an image's content; hashes of files do not count.

    Nor do lines that only say something, and the version of uv, which installs what is pinned and
    is gone from the image afterwards.

    Raises:
        ConfigurationError: outside the project's root.
    """
    locks = [lock_hash(Path(f"containers/{name}.lock")) for name in LOCKS[variant]]
    scripts = [commands(path) for path in (DEFINITION, *INSTALLERS)]
    return sha256_text("\n".join([variant, *locks, *scripts]))


def commands(path: Path) -> str:
    """Return a build script without its comments and blank lines.

    Raises:
        ConfigurationError: when there is no such file.
    """
    try:
        return NO_COMMAND.sub("", read_text(path))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: not found; run this from the project's root") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: {reason(error)}; put back git's") from None


def current_image(variant: Variant) -> Path:
    """Return the file that today's versions ask for, whether it is there or not."""
    suffix = "-cpu" if variant == "cpu" else ""
    return IMAGES / f"drama-{image_hash(variant)[:SHORT]}{suffix}.sif"


def note_of(image: Path) -> Path:
    """Return the file beside an image that says what the image is: its SHA-256, size, variant."""
    return image.with_suffix(".json")


def require_image(variant: Variant) -> Path:
    """Return today's image.

    Raises:
        ImageMissing: when it is not there, or not as it was built; says what builds it.
    """
    path, command = current_image(variant), COMMANDS[variant]
    built = _noted(path)
    if built is None or not path.is_file():
        raise ImageMissing(
            f"{path}: jobs are to run in this image, and it is not there{_stale(path, variant)}. "
            f"`{command}` builds it"
        )
    if (found := path.stat().st_size) != built.bytes:
        raise ImageMissing(
            f"{path}: damaged, {found} bytes where {built.bytes} were built. Delete it, then "
            f"`{command}` builds it again"
        )
    return path


def hold_image(variant: Variant) -> None:
    """Hold today's image to the SHA-256 that was noted when it was built, before jobs run in it.

    Images have gigabytes, so the state of a file that held is remembered in `SEEN`, and the same
    file is not read again.

    Raises:
        ImageMissing: as `require_image`, and when it is another file.
    """
    path = require_image(variant)
    built, state, seen = _noted(path), _State.of(path), SEEN / f"{path.stem}.json"
    assert built, "an image without a note is missing"
    with suppress(OSError, ValueError):
        if read_model(seen, _Seen) == _Seen(state=state, sha256=built.sha256):
            return
    if (found := sha256_file(path)) != built.sha256:
        raise ImageMissing(
            f"{path}: not the image that was built: its SHA-256 is {found}, where "
            f"{note_of(path).name} says {built.sha256}. Delete it, then `{COMMANDS[variant]}` "
            "builds it again; or copy image and note anew from where they were built"
        )
    write_json(seen, _Seen(state=state, sha256=found).model_dump())


class _Note(BaseModel):
    sha256: Fingerprint
    bytes: Bytes


class _State(Frozen):
    """What changes with a file's content, whoever changes it."""

    bytes: int
    inode: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> _State:
        found = path.stat()
        times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
        return cls(bytes=found.st_size, inode=found.st_ino, **times)


class _Seen(Frozen):
    state: _State
    sha256: Fingerprint


def _noted(image: Path) -> _Note | None:
    """Return what the note beside an image says; None when there is none of use."""
    try:
        return read_model(note_of(image), _Note)
    except (OSError, ValueError):  # ValidationError is a ValueError
        return None


def _stale(wanted: Path, variant: Variant) -> str:
    """Name the images of the same variant that were built for other versions."""
    others = sorted(
        path.name
        for path in wanted.parent.glob("drama-*.sif")
        if path.name.endswith("-cpu.sif") == (variant == "cpu") and path != wanted
    )
    if not others:
        return ""
    built = "was built" if len(others) == 1 else "were built"
    return (
        f"; {', '.join(others)} {built} for other versions: the lock files or how they are "
        f"installed ({DEFINITION}) have changed since"
    )


def running_digest() -> str | None:
    """Return the SHA-256 of the image that this process runs in.

    Returns:
        None outside a container, and in one that `make container` did not build.
    """
    container = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    note = _noted(Path(container)) if container else None
    return note.sha256 if note else None
