"""Files are whole or absent, and say the same for the same data."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drama.files import (
    canonical_json,
    flatten,
    remove_leftovers,
    replacing,
    sha256_file,
    sha256_text,
    unflatten,
    write_json,
    write_parquet,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = st.text("abc.", min_size=1, max_size=3)
NESTED = st.recursive(
    st.integers() | st.lists(st.integers()),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=5,
)


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_what_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode


def test_what_the_dead_left_beside_a_file_goes_when_the_next_is_written(tmp_path: Path) -> None:
    left = tmp_path / ".other.txt.0123abcd.part"
    left.write_text("half")
    with replacing(tmp_path / "mine.txt") as temporary:
        assert not left.exists()
        write_text(tmp_path / "other.txt", "text")
        assert temporary.exists(), "what somebody writes just now is not left behind"


def test_a_temporary_file_may_be_replaced_by_who_fills_it(tmp_path: Path) -> None:
    """As Apptainer and DVC do; nothing that is written beside it takes it for left behind."""
    path = tmp_path / "image.sif"
    with replacing(path) as temporary:
        (tmp_path / "made").write_text("whole")
        os.replace(tmp_path / "made", temporary)
        write_text(tmp_path / "note.json", "{}")
        remove_leftovers(tmp_path)
    assert path.read_text() == "whole"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["image.sif", "note.json"]


@pytest.mark.parametrize("named", [True, False], ids=["by the system", "by a library"])
def test_a_full_disk_names_the_file(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(OSError) as caught, replacing(path) as temporary:
        raise OSError(errno.ENOSPC, "full", *([str(temporary)] if named else []))
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_earlier_file_is_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "first")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the sec")
        raise error
    assert path.read_text() == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]


def _die_within(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the sec")
        os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_kill_the_earlier_file_is_as_it_was_and_the_rest_can_be_cleared(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run" / "file.txt"
    write_text(path, "first")
    process = multiprocessing.get_context("fork").Process(target=_die_within, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "first"
    assert len(list(path.parent.iterdir())) == 2
    remove_leftovers(tmp_path / "run")
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_clearing_a_folder_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nowhere")


def test_a_link_is_replaced_and_what_it_led_to_kept(tmp_path: Path) -> None:
    """Artifacts may be links into a cache that many runs share."""
    (tmp_path / "cache").write_text("shared")
    path = tmp_path / "file.txt"
    path.symlink_to(tmp_path / "cache")
    write_text(path, "mine")
    assert not path.is_symlink() and path.read_text() == "mine"
    assert (tmp_path / "cache").read_text() == "shared"


@given(JSON)
def test_json_is_canonical(data: Any) -> None:
    text = canonical_json(data)
    assert json.loads(text) == data
    assert text == canonical_json(json.loads(text))
    assert text.endswith("\n")


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1, 2.5, None]}


def test_checksums_are_those_of_the_standard(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == sha256_text("abc") == abc


def test_parquet_is_the_same_for_the_same_rows_and_notices_a_flipped_bit(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(1000))})
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    for path in paths:
        write_parquet(path, table)
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes()
    assert pq.read_metadata(paths[0]).row_group(0).column(0).compression == "ZSTD"
    place = content.index(bytes.fromhex("28b52ffd")) + 30  # within a compressed page
    paths[1].write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(paths[1], page_checksum_verification=True)


@given(st.dictionaries(KEYS, NESTED, min_size=1, max_size=3))
def test_flattening_loses_nothing(nested: dict[str, Any]) -> None:
    flat = flatten(nested)
    assert not any(isinstance(value, dict) for value in flat.values())
    assert unflatten(flat) == nested


def test_flattening_by_hand() -> None:
    nested = {"a": {"b": 1, "c": {"d.e": [2]}}, "f": 3}
    assert flatten(nested) == {"a/b": 1, "a/c/d.e": [2], "f": 3}
    with pytest.raises(AssertionError, match="cannot hold a /"):
        flatten({"a": {"b/c": 1}})
