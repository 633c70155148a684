"""Files that anybody may have written: read when they are as they should be, refused otherwise."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from drama.errors import reason
from drama.files import write_parquet
from drama.reading import (
    DEEPEST,
    MOST,
    parse_json,
    read_bytes,
    read_json,
    read_model,
    read_table,
    read_text,
)

SCHEMA = pa.schema([("step", pa.int64()), ("name", pa.string())])
ROWS = pa.Table.from_pylist([{"step": step, "name": f"n{step}"} for step in range(100)], SCHEMA)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _socket, _device, Path.mkdir])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "it")
    for read in (read_bytes, lambda path: read_table(path, None)):
        with pytest.raises((OSError, ValueError)) as caught:
            read(tmp_path / "it")
        assert "Parquet" not in reason(caught.value)


def test_a_file_may_be_as_large_as_was_said_and_no_larger(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"x" * 10)
    assert read_bytes(tmp_path / "it", 10) == b"x" * 10
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_bytes(tmp_path / "it", 9)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        read_text(tmp_path / "it")
    assert reason(caught.value) == "not UTF-8 text"


def _nested(levels: int, inner: str = "1") -> str:
    return "[" * levels + inner + "]" * levels


@pytest.mark.parametrize("levels", [DEEPEST, 500, 5_000, 1_000_000])
def test_json_that_is_nested_too_deeply_is_refused(levels: int) -> None:
    assert parse_json(_nested(DEEPEST - 1))
    for text in (_nested(levels), json.dumps({"a": 1})[:-1] + f', "b": {_nested(levels)}}}'):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)


def test_brackets_in_texts_are_no_nesting() -> None:
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_value_error(content: bytes) -> None:
    try:
        parse_json(content)
    except ValueError as error:
        assert reason(error)


class _Thing(BaseModel):
    count: int
    open: dict[str, object]


def test_models_are_read_strictly_and_their_open_parts_bounded(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text('{"count": 1, "open": {}}')
    assert read_model(path, _Thing).count == 1
    for text in ('{"count": "1", "open": {}}', f'{{"count": 1, "open": {{"a": {_nested(99)}}}}}'):
        path.write_text(text)
        with pytest.raises(ValueError):
            read_model(path, _Thing)
    path.write_text('{"count": 1}')
    with pytest.raises(ValueError):
        read_json(path, 3)


# --- Parquet -------------------------------------------------------------------------------------


def test_a_table_comes_back(tmp_path: Path) -> None:
    write_parquet(tmp_path / "it", ROWS)
    assert read_table(tmp_path / "it", SCHEMA).equals(ROWS)
    assert read_table(tmp_path / "it", None).equals(ROWS)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "it", ROWS.drop(["name"]))
    with pytest.raises(ValueError, match="its columns are not step, name"):
        read_table(tmp_path / "it", SCHEMA)


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    zeros = pa.array([bytes(2**28)], pa.large_binary())
    write_parquet(tmp_path / "it", pa.table({"bytes": zeros}), use_dictionary=False)
    assert (tmp_path / "it").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"\d{9} bytes when it is unpacked"):
        read_table(tmp_path / "it", None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_one_value_that_stands_for_many_rows_is_counted_for_each(tmp_path: Path) -> None:
    row = pa.array(["x" * 2**16] * 1000).dictionary_encode()
    pq.write_table(pa.table({"name": row.cast(pa.string())}), tmp_path / "it")
    assert (tmp_path / "it").stat().st_size < 2**17
    with pytest.raises(ValueError, match=f"more than {MOST} bytes when it is unpacked"):
        read_table(tmp_path / "it", None)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_table_is_refused_or_as_it_was(
    tmp_path: Path, place: int, bit: int, cut: bool
) -> None:
    path = tmp_path / "it"
    pq.write_table(ROWS, path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] ^= 1 << bit
    path.write_bytes(content[:place] if cut else content)
    try:
        table = read_table(path, SCHEMA)
    except ValueError as error:
        assert "\n" not in reason(error)
    else:
        assert np.array_equal(table["step"], ROWS["step"])
