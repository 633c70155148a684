"""Valid files of a run, changed a little and vouched for again, so that the change gets through."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from test_doors import DEEP, HOSTILE, KINDS

from drama.files import PARQUET, sha256_file, sha256_text
from drama.runs.checkpoint import CHECKSUM, DTYPES, METADATA, SCHEMA, _add
from drama.runs.folder import CHECKPOINT, EPISODES, REPLAY, TRAINING
from drama.runs.shards import shard_path

NAMES = ("agent/x", "", "/", "a/b/c", "environment", "agent/world_model", "\x1b[2J", "x" * 5000)
SIZES = (0, 1, 2, 3, 64, 1000, 2**31, 2**62, -1)
NUMBERS = (-(2**63), -1, 0, 1, 14, 15, 29, 30, 44, 46, 60, 61, 255, 2**31, 2**63 - 1)
AMOUNTS = (float("nan"), float("inf"), -1e308, 1e-320, 0.0)

Header = dict[str, Any]
Rows = list[dict[str, Any]]


# --- bytes ---------------------------------------------------------------------------------------


def change_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip a bit, cut, insert, or blank some."""
    place = chance.randrange(len(content) + 1)
    match chance.choice(("flip", "flip", "cut", "insert", "ones")):
        case "flip" if place < len(content):
            flipped = content[place] ^ 1 << chance.randrange(8)
            return content[:place] + bytes([flipped]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + chance.randbytes(chance.choice((1, 4, 1000))) + content[place:]
    return content[:place] + b"\xff" * len(content[place : place + 16]) + content[place + 16 :]


def change_file(chance: random.Random, path: Path) -> None:
    """Damage the file itself, or put something in its place that is none."""
    if chance.random() < 0.7:
        path.write_bytes(change_bytes(chance, path.read_bytes()))
    else:
        path.unlink()
        chance.choice((*KINDS, lambda gone: None))(path)


# --- the checkpoint ------------------------------------------------------------------------------


def read(path: Path) -> tuple[Header, Rows]:
    table = pq.read_table(path)
    return json.loads(table.schema.metadata[METADATA]), table.to_pylist()


def write(path: Path, header: Header | str, rows: Rows) -> None:
    """Write a checkpoint with checksums that hold, whatever is in it."""
    digest = hashlib.sha256()
    for row in rows:
        _add(digest, **row)
    if isinstance(header, dict):
        header = json.dumps(header | {"rows_sha256": digest.hexdigest()})
    schema = SCHEMA.with_metadata({METADATA: header, CHECKSUM: sha256_text(header)})
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **PARQUET, use_dictionary=False)


def change_checkpoint(chance: random.Random, folder: Path) -> None:
    path = folder / CHECKPOINT
    header, rows = read(path)
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice((_scalars, _scalars, _rows, _rows, _rows, _names))(chance, header, rows)
    text = chance.choice((*DEEP, "null", "[]", "{}", '{"format": 2}')) if _rarely(chance) else ""
    write(path, text or header, rows)


def _rarely(chance: random.Random) -> bool:
    return chance.random() < 0.05


def _scalars(chance: random.Random, header: Header, rows: Rows) -> None:
    said = header["scalars"]
    if _rarely(chance) or not said or not isinstance(said, dict):
        said = header
    name = chance.choice(sorted(said))
    value = said[name]
    if chance.random() < 0.5 and isinstance(value, (int, float)):
        values = AMOUNTS if isinstance(value, float) else (*NUMBERS, value + 1, value - 1)
        said[name] = chance.choice(values)
    elif isinstance(value, str) and chance.random() < 0.5:
        changed = change_bytes(chance, value.encode()).decode(errors="replace")
        said[name] = changed
    elif isinstance(value, list) and value and chance.random() < 0.5:
        value[chance.randrange(len(value))] = deepcopy(chance.choice(HOSTILE))
    elif chance.random() < 0.2:
        del said[name]
    else:
        lists = [[], ["0" * 64] * 3, ["x"], [1], {}]
        usable = [value for value in HOSTILE if value != "\ud800"]  # which no JSON in UTF-8 has
        said[name] = deepcopy(chance.choice([*usable, *lists]))


def _rows(chance: random.Random, header: Header, rows: Rows) -> None:
    """Change a tensor's values, dtype, or shape."""
    if not rows:
        return
    row = chance.choice(rows)
    match chance.choice(("bytes", "value", "value", "dtype", "shape", "resized", "kind")):
        case "bytes":
            row["bytes"] = change_bytes(chance, row["bytes"])
        case "value":
            array = np.frombuffer(row["bytes"], row["dtype"]).copy()
            if array.size:
                values = AMOUNTS if array.dtype.kind == "f" else NUMBERS
                with np.errstate(over="ignore"):
                    place = chance.randrange(array.size)
                    array[place] = np.array(chance.choice(values)).astype(array.dtype)
            row["bytes"] = array.tobytes()
        case "dtype":
            row["dtype"] = chance.choice((*sorted(DTYPES), "|O", "<U4", ">f4", "<M8[s]", "x", ""))
        case "shape":
            row["shape"] = chance.choice(([], [chance.choice(SIZES)] * 2, row["shape"][::-1]))
        case "resized":  # as a whole: more or fewer rows of it
            count, size = chance.choice((0, 1, 5, 10_000)), np.dtype(row["dtype"]).itemsize
            each = max(1, int(np.prod(row["shape"][1:])))
            row["shape"] = [count, *row["shape"][1:]]
            row["bytes"] = chance.choice((b"\x00", b"\x01", b"\xff")) * (count * each * size)
        case "kind":
            kind = np.dtype(chance.choice(sorted(DTYPES)))
            array = np.frombuffer(row["bytes"], row["dtype"])
            with np.errstate(all="ignore"):
                row["bytes"], row["dtype"] = array.astype(kind).tobytes(), kind.str


def _names(chance: random.Random, header: Header, rows: Rows) -> None:
    """Rename, double, drop, reorder, or add tensors."""
    row = chance.choice(rows) if rows else {"name": "", "dtype": "|u1", "shape": [0], "bytes": b""}
    match chance.choice(("name", "swap", "double", "drop", "order", "many", "section")):
        case "name":
            row["name"] = chance.choice(NAMES)
        case "swap":
            other = chance.choice(rows) if rows else row
            row["name"], other["name"] = other["name"], row["name"]
        case "double":
            rows.append(dict(row))
        case "drop":
            rows[:] = [other for other in rows if other is not row]
        case "order":
            chance.shuffle(rows)
        case "many":
            rows += [row | {"name": f"agent/{number}", "bytes": b""} for number in range(1000)]
        case "section":
            section = row["name"].split("/")[0]
            rows[:] = [other for other in rows if not other["name"].startswith(section)]


# --- replay and tables ---------------------------------------------------------------------------


def change_shard(chance: random.Random, folder: Path) -> None:
    """Change what a shard holds, and have the checkpoint vouch for it."""
    path = shard_path(folder / REPLAY, 0)
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    match chance.choice(("metadata", "rows", "rows", "column", "frame", "bytes")):
        case "metadata":
            said = json.loads(metadata[b"drama"])
            shapes = ([64, 64], [64, 64, 3, 1], [256] * 3, [0, 0, 0], [-64, -64, 3], [1, 1, 1])
            said[chance.choice(sorted(said))] = chance.choice((*HOSTILE[:9], *shapes))
            metadata[b"drama"] = json.dumps(said).encode()
        case "rows":
            table = _changed_column(chance, table)
        case "column":
            names = chance.sample(table.column_names, chance.randrange(len(table.column_names)))
            table = table.select(names)
        case "frame":
            frames = table["frame"].to_pylist()
            frames[chance.randrange(len(frames))] = bytes(chance.choice((0, 1, 12_287, 12_289)))
            place = table.column_names.index("frame")
            table = table.set_column(place, table.field(place), [frames])
        case "bytes":
            table = None
    if table is None:
        change_file(chance, path)
    else:
        pq.write_table(table.replace_schema_metadata(metadata), path, **PARQUET)
    header, rows = read(folder / CHECKPOINT)
    if path.is_file():
        header["scalars"]["replay/shards"] = [sha256_file(path)]
    write(folder / CHECKPOINT, header, rows)


def change_table(chance: random.Random, folder: Path) -> None:
    """Change a table that the checkpoint does not hold, as one of version 0.2.0 does not."""
    header, rows = read(folder / CHECKPOINT)
    kept = [row for row in rows if not row["name"].startswith("tables/")]
    write(folder / CHECKPOINT, header, kept)
    path = folder / chance.choice((TRAINING, EPISODES))
    if chance.random() < 0.4:
        change_file(chance, path)
        return
    table = _changed_column(chance, pq.read_table(path))
    if chance.random() < 0.3:
        table = table.drop_columns(chance.choice(table.column_names))
    pq.write_table(table, path, **PARQUET)


def _changed_column(chance: random.Random, table: pa.Table) -> pa.Table:
    """Change a value, the order, or the type of a column, or how many rows there are."""
    how = chance.choice(("value", "value", "fewer", "none", "again", "type", "missing"))
    if how in ("fewer", "none", "again"):
        if how == "again":
            return pa.concat_tables([table, table])
        return table.slice(0, chance.randrange(len(table)) if how == "fewer" else 0)
    place = chance.choice([i for i, name in enumerate(table.column_names) if name != "frame"])
    field, values = table.field(place), table.column(place).to_pylist()
    row = chance.randrange(len(values))
    if how == "type":
        kind = chance.choice((pa.string(), pa.float16(), pa.list_(pa.int8()), pa.null()))
        wrong = [None if kind != pa.string() else str(value) for value in values]
        return table.set_column(place, field.name, pa.array(wrong, kind))
    given = None if how == "missing" else chance.choice((*NUMBERS, *AMOUNTS))
    values[row] = given
    try:
        field = field.with_nullable(field.nullable or given is None)
        return table.set_column(place, field, [pa.array(values, field.type)])
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return table.set_column(place, field.name, [[str(value) for value in values]])


def change_emulator(chance: random.Random, folder: Path) -> None:
    """Change what the emulator is to be restored from."""
    path = folder / CHECKPOINT
    header, rows = read(path)
    of_game = [row for row in rows if row["name"].startswith("environment/")]
    for row in chance.sample(of_game, chance.choice((1, 1, 2))):
        match chance.choice(("bytes", "bytes", "noise", "none", "long")):
            case "bytes":
                row["bytes"] = change_bytes(chance, row["bytes"])
            case "noise":
                row["bytes"] = chance.randbytes(len(row["bytes"]))
            case "none":
                row["bytes"] = b""
            case "long":
                row["bytes"] += chance.randbytes(1000)
        row["shape"] = [len(row["bytes"])]
    if chance.random() < 0.3:
        header["scalars"]["environment/reset_due"] = True
    write(path, header, rows)


CHANGES: dict[str, Callable[[random.Random, Path], None]] = {
    "checkpoint": change_checkpoint,
    "file": lambda chance, folder: change_file(chance, folder / CHECKPOINT),
    "shard": change_shard,
    "table": change_table,
    "emulator": change_emulator,
}
