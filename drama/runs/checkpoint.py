"""Checkpoints: the complete state of a run in one Parquet file, without pickle.

One row per tensor (name, dtype, shape, bytes); scalars and generator states, which are Python
numbers and strings, lie as JSON in the file's metadata. Loading one never executes code, and
unpacks no more than was expected.

A checkpoint says whose it is, and what the files beside it hold: nothing else is asked. The one
before stays as checkpoint.previous.parquet until the next has been written and read back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from drama.errors import FileError, reason
from drama.files import PARQUET, flatten, replacing, sha256_text, unflatten
from drama.reading import MOST, Fingerprint, parquet, parse_json, unpack

CHECKPOINT = "checkpoint.parquet"
PREVIOUS = "checkpoint.previous.parquet"
FORMAT = 1
METADATA = b"drama"
CHECKSUM = b"drama_sha256"
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("bytes", pa.large_binary()),
    ]
)
DTYPES = {
    np.dtype(name).str
    for name in ("bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")
}
LARGEST = 2**33
"""Bytes that a checkpoint's tensors may take where nobody knows better; preset xs has 2**28."""

Tensor = tuple[str, tuple[int, ...]]
"""Dtype and shape."""
Form = tuple[str, tuple[int | range, ...]] | type
"""What something in a checkpoint must be: dtype and sizes, or their ranges; a scalar's type."""


class CheckpointError(FileError):
    """A checkpoint that cannot be used; the text names the file and what to do."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint that is not what was written."""


class CheckpointMisfit(CheckpointError):
    """A checkpoint that is whole, and not what this code reads."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: does not fit this code and these libraries: {problem}. Go on with those that "
            "wrote it, or move the run's folder away to train it anew."
        )


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal[1]
    fingerprint: Fingerprint
    scalars: dict[str, Any]
    rows_sha256: Fingerprint


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Write a checkpoint; the old file stays until the new one is whole and has been read back.

    Args:
        path: the file. Beside it the one before is kept, under the name `PREVIOUS`.
        fingerprint: of the run it belongs to.
        state: nested dictionaries of tensors, arrays and JSON scalars.

    Raises:
        OSError: when it cannot be written; both files are as they were.
        CheckpointDamaged: when what was written does not read back.
    """
    with replacing(path) as temporary:
        pq.write_table(_table(fingerprint, state), temporary, **PARQUET, use_dictionary=False)
        load_checkpoint(temporary, fingerprint, part="nothing")
        _keep_previous(path)


def _table(fingerprint: str, state: dict[str, Any]) -> pa.Table:
    """Return a state as a checkpoint's rows, and its header as their metadata."""
    rows: list[dict[str, Any]] = []
    scalars: dict[str, Any] = {}
    digest = hashlib.sha256()
    for name, value in flatten(state).items():
        if hasattr(value, "detach"):  # a tensor; PyTorch itself is not needed here
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            scalars[name] = value
            continue
        content = np.ascontiguousarray(value).tobytes()
        row = {"name": name, "dtype": value.dtype.str, "shape": [*value.shape], "bytes": content}
        rows.append(row)
        _add(digest, **row)
    header = json.dumps(
        {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "scalars": scalars,
            "rows_sha256": digest.hexdigest(),
        },
        sort_keys=True,
    )
    # Parquet's own checksums cover neither metadata nor the headers of pages.
    schema = SCHEMA.with_metadata({METADATA: header, CHECKSUM: sha256_text(header)})
    return pa.Table.from_pylist(rows, schema)


def _keep_previous(path: Path) -> None:
    """Give the checkpoint that is about to be replaced the name `PREVIOUS` too."""
    if not path.exists():
        return
    with replacing(path.with_name(PREVIOUS)) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # there are file systems without
            shutil.copyfile(path, temporary)


def _add(digest: Any, name: str, dtype: str, shape: list[int], bytes: bytes) -> None:
    digest.update(f"{name} {dtype} {shape}\n".encode())
    digest.update(bytes)


# --- reading -------------------------------------------------------------------------------------


def load_checkpoint(
    path: Path,
    fingerprint: str,
    forms: Mapping[str, Form] | None = None,
    *,
    optional: tuple[str, ...] = (),
    part: str = "",
    most: int = LARGEST,
) -> dict[str, Any]:
    """Read a checkpoint back, all of it held to its checksums.

    Args:
        path: the file.
        fingerprint: of the run that wants it.
        forms: what everything in it must be, by its flat name; looked at before any tensor is
            unpacked. By default it may be anything.
        optional: beginnings of names that may be missing.
        part: the section to look at and to return, such as `agent`; by default everything.
        most: bytes that all its tensors may take.

    Returns:
        What was given to `save_checkpoint`, tensors as NumPy arrays.

    Raises:
        CheckpointDamaged: when the file is missing or damaged.
        CheckpointMisfit: when it holds other things than expected.
        CheckpointError: when it belongs to another run.
    """
    header = _read_header(path)
    if header.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to run {header.fingerprint[:16]}, not {fingerprint[:16]}. Put this "
            "run's own back, or move the run's folder away to train it anew."
        )
    tensors, prefix = _read_tensors(path, most), f"{part}/" if part else ""
    flat = {name: value for name, value in header.scalars.items() if name.startswith(prefix)}
    if forms is not None:
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if problem := _difference(forms, found, flat, optional):
            raise CheckpointMisfit(path, problem)
    for name, array in _arrays(path, tensors, header.rows_sha256):
        if name.startswith(prefix):
            flat[name] = array.copy()
    return unflatten({name.removeprefix(prefix): value for name, value in flat.items()})


def checkpoint_fingerprint(path: Path) -> str:
    """Return the fingerprint of the run that a checkpoint belongs to, from its header.

    Raises:
        CheckpointDamaged: when the file is missing or its header is damaged.
    """
    return _read_header(path).fingerprint


def checkpoint_scalar(path: Path, name: str) -> Any:
    """Return one of a checkpoint's scalars, None when it has none of that name; raises likewise."""
    return _read_header(path).scalars.get(name)


def _read_header(path: Path) -> _Header:
    try:
        with parquet(path, SCHEMA, LARGEST) as file:
            metadata = file.metadata.metadata or {}
        text = metadata[METADATA]
        if len(text) > MOST or metadata[CHECKSUM].decode() != hashlib.sha256(text).hexdigest():
            raise ValueError("its metadata does not match its checksum")
        said = parse_json(text)
        if isinstance(said, dict) and said.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path}: format {said['format']!r:.20}, this version reads {FORMAT}"
            )
        return _Header.model_validate(said)
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None


def _read_tensors(path: Path, most: int) -> dict[str, Tensor]:
    """Return every tensor's dtype and shape without unpacking any."""
    try:
        with parquet(path, SCHEMA, LARGEST) as file:
            table = unpack(file, columns=SCHEMA.names[:-1])  # all but the bytes
        tensors = {row["name"]: _checked(row["dtype"], row["shape"]) for row in table.to_pylist()}
        if len(tensors) != len(table) or None in tensors:
            raise ValueError("names that are missing or given twice")
        if (size := _bytes(tensors)) > most:
            raise ValueError(f"tensors of {size} bytes, where {most} are the most")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return tensors


def _checked(dtype: Any, shape: Any) -> Tensor:
    """Return a tensor's dtype and shape; raises a ValueError when there is none such."""
    sizes = tuple(shape or ())
    if dtype not in DTYPES or shape is None or any(size is None or size < 0 for size in sizes):
        raise ValueError(f"a tensor of type {dtype!r:.20} and shape {shape!r:.60}")
    return dtype, sizes


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in tensors.values())


def _arrays(
    path: Path, tensors: Mapping[str, Tensor], sha256: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor's name and array, one in memory at a time.

    Raises:
        CheckpointDamaged: also at the end, when all together do not match their checksum.
    """
    digest = hashlib.sha256()
    try:
        with parquet(path, SCHEMA, _bytes(tensors) + MOST) as file:
            for batch in file.iter_batches(batch_size=1, use_threads=False):
                for row in batch.to_pylist():
                    dtype, shape = tensors[row["name"]]
                    _add(digest, **row)
                    yield row["name"], np.frombuffer(row["bytes"], dtype).reshape(shape)
        if digest.hexdigest() != sha256:
            raise ValueError("its rows do not match their checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _difference(
    forms: Mapping[str, Form],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    optional: tuple[str, ...],
) -> str:
    """Say how a checkpoint's contents differ from what was expected; nothing when they do not."""
    found = {**tensors, **scalars}
    for name in sorted(forms.keys() | found.keys()):
        if name not in forms:
            return f"{name[:100]!r} is unknown"
        if name not in found:
            if not name.startswith(optional or ("?",)):
                return f"{name} is missing"
            continue
        form, value = forms[name], found[name]
        if isinstance(form, type):
            if name in tensors or type(value) is not form:
                return f"{name} is {value!r:.60}, not of type {form.__name__}"
        elif name in scalars or not _fits(value, form):
            return f"{name} is {value!r:.60}, not {form!r:.100}"
    return ""


def _fits(tensor: Tensor, form: tuple[str, tuple[int | range, ...]]) -> bool:
    (dtype, shape), (wanted, sizes) = tensor, form
    return (
        dtype == wanted
        and len(shape) == len(sizes)
        and all(
            size in want if isinstance(want, range) else size == want
            for size, want in zip(shape, sizes, strict=True)
        )
    )


def _damaged(path: Path, error: Exception) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{path}: not a whole checkpoint ({reason(error)}). Put back a good copy "
        "of the file, or move the run's folder away to train it anew.",
        error,
    )
