"""The replay memory as Parquet files: one row per transition, 10 000 rows a shard.

Plain pandas, DuckDB or Polars read them: `frame` holds one frame's height * width * channels bytes
in C order, the schema's metadata key `drama` the shape. A frame is a variable-length binary, not a
fixed-length one, because several readers know only the former.

A shard is written to a temporary file beside it, flushed to disk and renamed: under its own name
it is whole or absent. The same rows give the same bytes (with the same PyArrow), so a resumed
run may write a shard again and nothing changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from drama.errors import FileError, reason
from drama.files import replacing, sha256_file
from drama.reading import parquet, parse_model, unpack
from drama.runs.columns import COLUMN_TYPES, Columns, check_columns

FORMAT = 1
ROWS_PER_SHARD = 10_000
ROWS_PER_GROUP = 1_000
LARGEST = 2**31
"""Bytes of a shard when it is unpacked; 10 000 frames of 256 x 256 pixels have 1.97e9."""

_FIELDS = [
    pa.field(name, pa.binary() if name == "frame" else pa.from_numpy_dtype(kind), nullable=False)
    for name, kind in COLUMN_TYPES.items()
]

_ADVICE = (
    "Fetch the file again from where the run is stored, or remove the run's folder and train the "
    "run again."
)


Side = Annotated[int, Field(ge=1, le=256)]


class _Metadata(BaseModel):
    format: int
    frame_shape: Annotated[tuple[Side, ...], Field(max_length=3)]


class ShardError(FileError):
    """A replay file is missing, damaged or not what it should be; the text says which and why."""


class Ring(Protocol):
    """What a shard writer asks of the replay memory."""

    capacity: int
    frame_shape: tuple[int, int, int]

    @property
    def total(self) -> int:
        """Transitions ever appended."""

    @property
    def first_step(self) -> int:
        """Step of the oldest transition stored."""

    def columns(self, first_step: int, stop_step: int) -> Columns:
        """Copy out consecutive transitions."""


class ShardWriter:
    """Writes a growing replay buffer into `folder` as part-00000.parquet, part-00001.parquet, ...

    Call `write_full` after every append (with nothing to do it costs a comparison), and no
    transition is overwritten in the ring before it is on disk. For the same reason a ring smaller
    than `rows_per_shard` is written in shards of its own capacity.

    Args:
        folder: made when missing.
        rows_per_shard: rows of every shard but the last.
        rows_written: transitions already in whole files, when a run is resumed. Shards beyond,
            left by a process that was killed later than its last checkpoint, are replaced.

    Attributes:
        sha256: checksum of every shard that has all its rows, which is never written again.

    Raises:
        ValueError: rows_per_shard below 1 or rows_written below 0.
    """

    def __init__(
        self, folder: Path, rows_per_shard: int = ROWS_PER_SHARD, rows_written: int = 0
    ) -> None:
        if rows_per_shard < 1 or rows_written < 0:
            raise ValueError(f"rows_per_shard {rows_per_shard}, rows_written {rows_written}")
        self.folder = folder
        self.rows_per_shard = rows_per_shard
        self.rows_written = rows_written
        self.sha256: list[str] = []

    def write_full(self, ring: Ring) -> None:
        """Write every shard that is complete and not yet written.

        Raises:
            ValueError: the buffer has already overwritten transitions of an unwritten shard.
        """
        rows = min(self.rows_per_shard, ring.capacity)
        while ring.total - (first := self.rows_written // rows * rows) >= rows:
            self._write(ring, first // rows, first, first + rows)

    def finish(self, ring: Ring) -> None:
        """Write what is not yet on disk, the last shard being as short as it comes.

        More transitions may follow: that shard is then written again, longer.

        Raises:
            ValueError: the buffer has already overwritten transitions of an unwritten shard.
        """
        self.write_full(ring)
        rows = min(self.rows_per_shard, ring.capacity)
        if ring.total > self.rows_written:
            first = self.rows_written // rows * rows
            self._write(ring, first // rows, first, ring.total)

    @property
    def rows_in_full(self) -> int:
        """Transitions in shards that have all their rows."""
        return self.rows_written // self.rows_per_shard * self.rows_per_shard

    def _write(self, ring: Ring, part: int, first_step: int, stop_step: int) -> None:
        if first_step < ring.first_step:
            raise ValueError(
                f"replay steps [{first_step}, {ring.first_step}) were overwritten in the ring "
                f"of {ring.capacity} before they were written to {self.folder}: call write_full "
                f"after every append"
            )
        # A row group at a time, so that the shard is never in memory a second time.
        groups = (
            ring.columns(step, min(step + ROWS_PER_GROUP, stop_step))
            for step in range(first_step, stop_step, ROWS_PER_GROUP)
        )
        path = shard_path(self.folder, part)
        write_shard(path, groups, ring.frame_shape)
        self.rows_written = stop_step
        if stop_step - first_step == min(self.rows_per_shard, ring.capacity):
            self.sha256[part:] = [sha256_file(path)]


def checksums(folder: Path, parts: int) -> list[str]:
    """Return the SHA-256 of so many first shards.

    Raises:
        ShardError: naming the first that is missing or cannot be read.
    """
    found = []
    for part in range(parts):
        path = shard_path(folder, part)
        try:
            found.append(sha256_file(path))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
    return found


def check_shards(folder: Path, sha256: Sequence[str]) -> None:
    """Hold the first shards, also those that the ring no longer needs, to their checksums.

    Raises:
        ShardError: naming the first that is missing or has other bytes.
    """
    for part, (found, wanted) in enumerate(
        zip(checksums(folder, len(sha256)), sha256, strict=True)
    ):
        if found != wanted:
            raise ShardError(
                f"Replay shard {shard_path(folder, part)} is damaged: its bytes are not those that "
                f"the run wrote. {_ADVICE}"
            )


def shard_path(folder: Path, part: int) -> Path:
    """The file of shard number `part`, counted from 0."""
    return folder / f"part-{part:05d}.parquet"


def write_shard(path: Path, groups: Iterable[Columns], frame_shape: tuple[int, int, int]) -> None:
    """Write one file, a row group for each of `groups`: whole or not at all.

    Raises:
        ValueError: groups whose fields have other shapes or types, or gaps between their steps.
    """
    metadata = {"format": FORMAT, "frame_shape": list(frame_shape)}
    schema = pa.schema(_FIELDS, metadata={b"drama": json.dumps(metadata).encode()})
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            compression_level=9,
            use_dictionary=False,
            write_statistics=["step"],
            write_page_checksum=True,
        ) as writer,
    ):
        for columns in groups:
            check_columns(columns, frame_shape)
            writer.write_batch(_to_arrow(columns, schema), row_group_size=ROWS_PER_GROUP)


def read_shard(path: Path) -> Columns:
    """All rows of one file.

    Returns:
        The fields as `ReplayBuffer.columns` gives them; read-only views of the file's rows.
    Raises:
        ShardError: the file is missing, truncated, damaged, or not a replay shard.
    """
    try:
        with parquet(path, None, LARGEST) as file:
            frame_shape = _frame_shape(path, file.schema_arrow)
            rows = file.metadata.num_rows
            if not rows <= ROWS_PER_SHARD or rows * math.prod(frame_shape) > LARGEST:
                raise ValueError(f"{rows} rows of {frame_shape}")
            table = unpack(file, LARGEST)
        columns = _from_arrow(table, frame_shape)
        check_columns(columns, frame_shape)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return columns


def iterate_shards(folder: Path, first_step: int, stop_step: int) -> Iterator[Columns]:
    """The transitions of steps first_step, ..., stop_step - 1, a file at a time.

    `for columns in iterate_shards(...): ring.extend(columns)` refills a buffer while holding
    one shard beside it.

    Raises:
        ValueError: first_step below 0 or beyond stop_step.
        ShardError: a file is missing, damaged, or does not go on where the one before ended, or
            the files end too early; files before first_step are not looked into.
    """
    if not 0 <= first_step <= stop_step:
        raise ValueError(f"steps [{first_step}, {stop_step})")
    part = _part_of(folder, first_step) if first_step < stop_step else 0
    step = first_step
    while step < stop_step:
        path = shard_path(folder, part)
        columns = read_shard(path)
        steps = columns["step"]
        if not len(steps) or not (steps[0] == step or steps[0] <= step == first_step <= steps[-1]):
            held = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no rows"
            raise ShardError(f"Replay shard {path} holds {held}, not step {step}. {_ADVICE}")
        wanted = slice(step - int(steps[0]), stop_step - int(steps[0]))
        columns = {name: values[wanted] for name, values in columns.items()}
        yield columns
        step = int(columns["step"][-1]) + 1
        part += 1


def read_shards(folder: Path, first_step: int, stop_step: int) -> Columns:
    """The transitions of steps first_step, ..., stop_step - 1, as one array per field.

    Raises:
        ValueError: first_step not below stop_step.
        ShardError: as `iterate_shards`.
    """
    if first_step >= stop_step:
        raise ValueError(f"steps [{first_step}, {stop_step})")
    pieces = list(iterate_shards(folder, first_step, stop_step))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _part_of(folder: Path, step: int) -> int:
    """The shard that holds a step: all shards but the last have as many rows as the first."""
    if step == 0:
        return 0
    path = shard_path(folder, 0)
    try:
        with parquet(path, None, LARGEST) as file:
            rows: int = file.metadata.num_rows
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return step // rows if rows else 0


def _unreadable(path: Path, error: Exception) -> ShardError:
    """Turn what reading a file raises into an error for people."""
    if isinstance(error, FileNotFoundError):
        return ShardError(f"Replay shard {path} is missing. {_ADVICE}", error)
    return ShardError(f"Replay shard {path} is damaged ({reason(error)}). {_ADVICE}", error)


def _frame_shape(path: Path, schema: Any) -> tuple[int, int, int]:
    """The frame shape that the file's metadata states, after checking that it is one of ours."""
    try:
        metadata = parse_model((schema.metadata or {})[b"drama"], _Metadata)
    except (KeyError, ValueError) as error:
        raise ShardError(f"{path} is not a replay shard of this project. {_ADVICE}") from error
    if metadata.format != FORMAT:
        raise ShardError(
            f"Replay shard {path} has format {metadata.format}; this version reads {FORMAT}."
        )
    if len(metadata.frame_shape) != 3 or not schema.equals(pa.schema(_FIELDS)):
        raise ShardError(f"Replay shard {path} has other fields than format {FORMAT}. {_ADVICE}")
    height, width, channels = metadata.frame_shape
    return height, width, channels


def _to_arrow(columns: Columns, schema: Any) -> Any:
    """A record batch of these rows; frames are not copied."""
    frames = np.ascontiguousarray(columns["frame"])
    count = len(frames)
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(frames[0].size if count else 0)
    binary = pa.Array.from_buffers(
        pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(frames)]
    )
    arrays = [
        binary if field.name == "frame" else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _from_arrow(table: Any, frame_shape: tuple[int, int, int]) -> Columns:
    """The rows of a table as arrays; frames are a view of the table's memory."""
    columns: Columns = {}
    for name in table.column_names:
        chunks = table[name].chunks
        if name == "frame":
            pieces = [_frames(chunk, frame_shape) for chunk in chunks]
            empty = np.empty((0, *frame_shape), np.uint8)
        else:
            pieces = [chunk.to_numpy(zero_copy_only=False) for chunk in chunks]
            empty = np.empty(0, table.schema.field(name).type.to_pandas_dtype())
        columns[name] = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, empty])
    return columns


def _frames(chunk: Any, frame_shape: tuple[int, int, int]) -> Any:
    """uint8 [rows, height, width, channels] from a binary array."""
    size = int(np.prod(frame_shape))
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
    wrong = np.flatnonzero(np.diff(offsets) != size)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"frame {row} has {offsets[row + 1] - offsets[row]} bytes, {frame_shape} has {size}"
        )
    frames = np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return frames.reshape(len(chunk), *frame_shape)
