"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, durably.

    On an error the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    os.close(descriptor)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable: it is on disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left below a folder nobody else writes to."""
    for leftover in folder.rglob(".*.part"):
        leftover.unlink()


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


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file as a whole, zstd-compressed, with checksums that readers can verify."""
    options |= {"compression": "zstd", "compression_level": 3, "write_page_checksum": True}
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **options)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
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
