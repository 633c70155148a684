"""Reading files that anybody may have written: regular ones only, bounded, parsed before use.

Every reader raises an OSError where the system refuses, which may pass, and a ValueError where the
content is not what it should be, which stays; `drama.errors.reason` has words for both. Nothing
here starts a thread, so that files can be read where no more processes are allowed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, TypeAdapter

MOST = 16 * 2**20
"""Bytes of a text file, and of a table when it is unpacked, unless the reader knows better."""
BATCH = 256
"""Rows that are unpacked at a time."""
DEEPEST = 64
"""Levels of nesting; a recipe has four."""
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256, as files name it."""

Model = TypeVar("Model", bound=BaseModel)
Kind = TypeVar("Kind")


def open_regular(path: Path, *, links: bool = True) -> int:
    """Open a file for reading, without waiting for whoever might write to it.

    Args:
        path: the file.
        links: whether it may be a link to one.

    Returns:
        Its descriptor.

    Raises:
        OSError: when it cannot be opened.
        ValueError: when it is a pipe or a device, or a link where it may be none.
    """
    if not links and path.is_symlink():
        raise ValueError("a link, not a file")
    follow = 0 if links else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        if not stat.S_ISREG(mode):
            raise ValueError(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """Read a file of at most so many bytes; raises as `open_regular`, and when there are more."""
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def read_text(path: Path, most: int = MOST) -> str:
    """Read a file of UTF-8 text; raises as `read_bytes`, and a ValueError for other bytes."""
    return read_bytes(path, most).decode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of at most `DEEPEST` levels; raises a ValueError for anything else."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [data]
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return data
    raise ValueError("nested too deeply")


def read_json(path: Path, most: int = MOST) -> Any:
    """Read a JSON file; raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most))


def read_model(path: Path, model: type[Model], most: int = MOST) -> Model:
    """Read a JSON file into a model, strictly; raises as `read_bytes`, and a ValidationError."""
    return parse_model(read_bytes(path, most), model)


def parse_model(content: str | bytes, model: type[Model]) -> Model:
    """Parse JSON into a model, strictly; raises a ValueError, of which ValidationError is one."""
    parse_json(content)  # for its depth, which models with open parts do not bound
    return model.model_validate_json(content, strict=True)


def parse_kind(content: str | bytes, kind: TypeAdapter[Kind]) -> Kind:
    """Parse JSON into what an adapter describes, as `parse_model`."""
    parse_json(content)
    return kind.validate_json(content, strict=True)


# --- Parquet -------------------------------------------------------------------------------------


@contextmanager
def parquet(path: Path, schema: pa.Schema | None, most: int = MOST) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, whose pages' checksums are looked at as they are read.

    Args:
        path: the file.
        schema: names and types that its columns must have; None for any.
        most: bytes that all its columns may take when they are unpacked, as the file says.

    Raises:
        OSError: when it cannot be opened or read.
        ValueError: when it is damaged, larger than that, or has other columns; also for what
            PyArrow raises while the file is in use.
    """
    os.close(open_regular(path))
    try:
        with (
            pa.OSFile(str(path)) as source,
            pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False) as file,
        ):
            if schema is not None and not file.schema_arrow.equals(schema):
                raise ValueError(f"its columns are not {', '.join(schema.names)}")
            metadata = file.metadata
            # Of groups: PyArrow aborts the process over a column whose description is damaged.
            size = sum(
                metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
            )
            if not 0 <= size <= most:
                raise ValueError(f"{size} bytes when it is unpacked, where {most} are the most")
            yield file
    except (pa.ArrowException, OSError, IndexError, OverflowError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError("damaged, or not the Parquet file that it should be") from error


def unpack(
    file: pq.ParquetFile, most: int = MOST, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read an open Parquet file's columns, and no more bytes than there may be.

    What a file says of its size need not be so, and one value can stand for many rows.

    Raises:
        ValueError: when there are more, or fewer rows than it says.
    """
    batches, size = [], 0
    for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
        batch.validate(full=True)
        size += batch.nbytes
        if size > most:
            raise ValueError(f"more than {most} bytes when it is unpacked")
        batches.append(batch)
    rows, said = sum(map(len, batches)), file.metadata.num_rows
    if rows != said:
        raise ValueError(f"{rows} rows where it says {said}")
    schema = file.schema_arrow
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(batches, schema)


def read_table(path: Path, schema: pa.Schema | None, most: int = MOST) -> pa.Table:
    """Read a Parquet file as a whole, metadata included; raises as `parquet`."""
    with parquet(path, schema, most) as file:
        return unpack(file, most)
