"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drama.reading import open_regular

ABANDONED = 86_400.0
"""Seconds after which a temporary file counts as left behind where no lock can tell."""

_OURS: set[Path] = set()
"""Temporary files of this process, whose locks go when something else replaces them."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, durably.

    On an error the temporary file is removed and `path` is as it was. Permissions are those that
    the umask leaves. What processes that were killed left beside `path` is removed.

    Raises:
        OSError: naming `path`, when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, deep=False)
        temporary, descriptor = _create_beside(path)
        _OURS.add(temporary)
        try:
            yield temporary
            with temporary.open("rb+") as file:  # which may be another one by now
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            _OURS.discard(temporary)
            os.close(descriptor)
    except OSError as error:
        # PyArrow names no file, and the temporary one says nothing to anybody.
        if not error.filename or f".{path.name}." in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise


def _create_beside(path: Path) -> tuple[Path, int]:
    """Create a temporary file and lock it, so that nobody takes it for left behind."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # there are file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # somebody was quicker than the lock


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable: it is on disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, *, deep: bool = True) -> None:
    """Remove temporary files that killed processes left in a folder, and below it if `deep`.

    One that somebody writes is locked; where that cannot be seen, it is left for a day.
    """
    for leftover in folder.rglob(".*.part") if deep else folder.glob(".*.part"):
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            if leftover not in _OURS and leftover.is_file() and _is_abandoned(leftover):
                leftover.unlink()


def _is_abandoned(temporary: Path) -> bool:
    with temporary.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical_json(data: Any) -> str:
    """Return indented JSON with a final newline, the same for equal data."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Write data as canonical JSON, as a whole."""
    write_text(path, canonical_json(data))


PARQUET: dict[str, Any] = {
    "compression": "zstd", "compression_level": 3, "write_page_checksum": True
}  # fmt: skip
"""How tables are written: with checksums that readers can verify."""


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file as a whole, as `PARQUET` and the options say."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **PARQUET, **options)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; raises as `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(nested: dict[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one whose keys are paths."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        assert separator not in key, f"{prefix}{key}: a key cannot hold a {separator}"
        if isinstance(value, dict):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, Any], separator: str = "/") -> dict[str, Any]:
    """Invert `flatten` (empty dictionaries aside)."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, key = path.split(separator)
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return nested
