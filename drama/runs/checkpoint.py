"""Checkpoints: the complete state of a run in one Parquet file, without pickle.

One row per tensor (name, dtype, shape, bytes); scalars and generator states, which are Python
numbers and strings, lie as JSON in the file's metadata. Loading one never executes code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from drama.errors import FileError, reason
from drama.files import flatten, sha256_text, unflatten, write_parquet

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


class CheckpointError(FileError):
    """A checkpoint that cannot be used; the text names the file and what to do."""


def save_checkpoint(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Write a checkpoint; the old file stays until the new one is whole.

    Args:
        path: the file.
        fingerprint: of the run it belongs to.
        state: nested dictionaries of tensors, arrays and JSON scalars.
    """
    rows: list[dict[str, Any]] = []
    scalars: dict[str, Any] = {}
    for name, value in flatten(state).items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            rows.append(
                {
                    "name": name,
                    "dtype": value.dtype.str,
                    "shape": list(value.shape),
                    "bytes": np.ascontiguousarray(value).tobytes(),
                }
            )
        else:
            scalars[name] = value
    header = json.dumps(
        {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "scalars": scalars,
            "rows_sha256": _digest(rows),
        },
        sort_keys=True,
    )
    # Parquet's own checksums cover neither metadata nor the headers of pages.
    schema = SCHEMA.with_metadata({METADATA: header, CHECKSUM: sha256_text(header)})
    write_parquet(path, pa.Table.from_pylist(rows, schema), use_dictionary=False)


def load_checkpoint(path: Path, fingerprint: str) -> dict[str, Any]:
    """Read a checkpoint back.

    Args:
        path: the file.
        fingerprint: of the run that wants it.

    Returns:
        What was given to `save_checkpoint`, tensors as NumPy arrays.

    Raises:
        CheckpointError: when the file is damaged or belongs to another run.
    """
    header = _read_header(path)
    if header["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path}: belongs to run {header['fingerprint'][:16]}, not {fingerprint[:16]}"
        )
    flat: dict[str, Any] = dict(header["scalars"])
    try:
        table = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True)
        rows = table.to_pylist()
        if _digest(rows) != header["rows_sha256"]:
            raise ValueError("its rows do not match their checksum")
        for row in rows:
            array = np.frombuffer(row["bytes"], dtype=np.dtype(row["dtype"]))
            flat[row["name"]] = array.reshape(row["shape"]).copy()
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return unflatten(flat)


def _digest(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row['name']} {row['dtype']} {row['shape']}\n".encode())
        digest.update(row["bytes"])
    return digest.hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    try:
        metadata = pq.read_schema(path).metadata
        text = metadata[METADATA].decode()
        header = {"fingerprint": "unknown", "scalars": {}} | json.loads(text)
        if metadata[CHECKSUM].decode() != sha256_text(text):
            raise ValueError("its metadata does not match its checksum")
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {header.get('format')!r}, this version reads {FORMAT}"
        )
    return header


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a whole checkpoint ({reason(error)}). Put back a good copy "
        "of the file, or move the run's folder away to train it anew.",
        error,
    )
