"""Words for what Python and its libraries find wrong: real errors, nothing raw in what is said."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import ale_py
import numpy as np
import pyarrow.parquet as pq
import pytest

from drama.agent.settings import Recipe
from drama.errors import ConfigurationError, DramaError, FileError, reason

RAW = re.compile(r"Errno|errno|Error|Exception|Arrow|codec|type=|https?:|NoneType|b'")
DAMAGED = "damaged, or not the Parquet file that it should be"

ERRORS: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: (p / "no").read_text(), "not found"),
    (lambda p: pq.ParquetFile(p / "no"), "not found"),
    (lambda p: pq.read_table(p / "no"), "not found"),
    (lambda p: p.read_text(), "a folder, not a file"),
    (lambda p: (p / "text/a").mkdir(), "a file lies where a folder should"),
    (lambda p: (p / "text").mkdir(exist_ok=True), "a file lies where a folder should"),
    # Not by PyArrow, which removes a file that it could not write, this device included.
    (lambda p: Path("/dev/full").write_text("a"), "no space left on the disk"),
    (lambda p: (p / ("a" * 300)).read_text(), "file name too long"),
    (lambda p: pq.read_table(p / "text"), DAMAGED),
    (lambda p: pq.read_schema(p / "text"), DAMAGED),
    (lambda p: (p / "latin").read_text(encoding="utf-8"), "not UTF-8 text"),
    (lambda p: json.loads("{\n a"), "not JSON from line 2 on"),
    (lambda p: Recipe.model_validate_json("{"), "not JSON, or cut off"),
    (lambda p: Recipe.model_validate_json("{}"), "format: missing"),
    (lambda p: {"a": 1}["b"], "something is missing in it: b"),
    (lambda p: {}[b"drama"], "something is missing in it: drama"),
    (lambda p: len(None), "it does not have the form that it should"),
    (lambda p: json.loads("[" * 200_000), "nested too deeply"),
    (lambda p: np.zeros(10**15), "out of memory. Unable to allocate 7.11 PiB"),
    (lambda p: _fail(MemoryError()), "out of memory"),
    (lambda p: ale_py.ALEState(b"none"), "a library could not take what it holds"),
    (lambda p: _fail(ValueError("two\n  lines")), "two lines"),
    (lambda p: _fail(ConfigurationError("key = 1: too few")), "key = 1: too few"),
    (lambda p: _fail(AssertionError()), "AssertionError"),
]


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("cause", "said"), ERRORS, ids=[said for _, said in ERRORS])
def test_an_error_of_a_library_is_told_in_words(
    tmp_path: Path, cause: Callable[[Path], object], said: str
) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(BaseException) as caught:
        cause(tmp_path)
    assert reason(caught.value).startswith(said)
    assert said == "AssertionError" or not RAW.search(reason(caught.value))


def test_what_the_system_cannot_read_now_may_be_read_later_and_a_damaged_file_not() -> None:
    for cause, code in (
        (None, 3),
        (ValueError("its rows do not match"), 3),
        (OSError("Parquet magic bytes not found"), 3),
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (FileNotFoundError(errno.ENOENT, "not there yet"), 1),
    ):
        error = FileError("checkpoint.parquet: unusable", cause)
        assert (error.exit_code, error.is_permanent) == (code, code == 3), cause
    assert ConfigurationError("").is_permanent and not DramaError("").is_permanent
