"""Checkpoints: everything comes back bit for bit; what is damaged is never taken for whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drama.files import flatten, sha256_text
from drama.runs.checkpoint import (
    CHECKSUM,
    METADATA,
    PREVIOUS,
    SCHEMA,
    CheckpointDamaged,
    CheckpointError,
    Form,
    load_checkpoint,
    save_checkpoint,
)

FINGERPRINT = "f" * 64
DTYPES = ("float32", "float64", "uint8", "int16", "int32", "int64", "bool")


def same(left: Any, right: Any) -> bool:
    """Equal to the bit: NaN's payload, the sign of zero and the dtype included."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.tobytes() == right.tobytes()
        )
    return type(left) is type(right) and repr(left) == repr(right)


STATE: dict[str, Any] = {
    "agent": {
        "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
        "count": torch.tensor(3, dtype=torch.int64),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    },
    "replay": {"tail": {"frame": np.zeros((0, 4, 4, 3), np.uint8), "step": np.zeros(0, np.int64)}},
    "generator": {"state": 2**127 + 1, "name": "PCG64"},
    "episode": {"return": 0.1 + 0.2, "over": False, "frame": np.full((2, 2, 3), 7, np.uint8)},
}


def as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: as_arrays(value)
        if isinstance(value, dict)
        else (value.numpy() if isinstance(value, torch.Tensor) else value)
        for name, value in state.items()
    }


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    assert same(load_checkpoint(path, FINGERPRINT), as_arrays(STATE))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.lists(
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
        ),
        min_size=1,
        max_size=4,
    ),
    scalars=st.lists(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
    ),
)
def test_any_array_and_scalar_comes_back_to_the_bit(
    tmp_path: Path, arrays: list[np.ndarray], scalars: list[Any]
) -> None:
    path = tmp_path / "checkpoint.parquet"
    state = {
        "arrays": {str(i): array for i, array in enumerate(arrays)},
        "scalars": {str(i): value for i, value in enumerate(scalars)} or {"one": 1},
    }
    save_checkpoint(path, FINGERPRINT, state)
    assert same(load_checkpoint(path, FINGERPRINT), state)


def test_what_comes_back_is_ours_to_change(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    load_checkpoint(path, FINGERPRINT)["episode"]["frame"][:] = 1


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    for path in paths:
        save_checkpoint(path, FINGERPRINT, STATE)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_it_is_plain_parquet_with_one_row_per_tensor(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    table = pq.read_table(path)
    arrays = {k for k, v in flatten(STATE).items() if isinstance(v, (np.ndarray, torch.Tensor))}
    assert set(table["name"].to_pylist()) == arrays
    header = json.loads(table.schema.metadata[b"drama"])
    assert header["fingerprint"] == FINGERPRINT
    assert header["scalars"]["generator/state"] == 2**127 + 1
    assert pq.read_metadata(path).row_group(0).column(3).compression == "ZSTD"


def test_a_failed_write_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, FINGERPRINT, {"scalar": object()})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_the_one_before_is_kept(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", raise_permission_error)
    path = tmp_path / "checkpoint.parquet"
    for count in range(4):
        save_checkpoint(path, FINGERPRINT, {"count": count})
        assert load_checkpoint(path, FINGERPRINT) == {"count": count}
        if count:
            assert load_checkpoint(tmp_path / PREVIOUS, FINGERPRINT) == {"count": count - 1}
    assert {item.name for item in tmp_path.iterdir()} == {path.name, PREVIOUS}


def raise_permission_error(*_: object) -> None:
    raise PermissionError(errno.EPERM, "a file system without links")


def test_what_does_not_read_back_takes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk, or in a memory, that changes a bit on the way."""
    path = tmp_path / "checkpoint.parquet"
    for count in range(2):
        save_checkpoint(path, FINGERPRINT, STATE | {"count": count})
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    write = pq.write_table

    def flip(table: pa.Table, where: Path, **options: Any) -> None:
        write(table, where, **options)
        content = bytearray(where.read_bytes())
        content[len(content) // 3] ^= 1
        where.write_bytes(content)

    monkeypatch.setattr(pq, "write_table", flip)
    with pytest.raises(CheckpointDamaged):
        save_checkpoint(path, FINGERPRINT, STATE | {"count": 2})
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, {"a": np.zeros(2**25, np.uint8)})
    assert path.stat().st_size < 2**20
    forms: dict[str, Form] = {"a": ("|u1", (range(1000),))}
    with pytest.raises(CheckpointError, match=r"does not fit.*: a is"):
        load_checkpoint(path, FINGERPRINT, forms)
    # A file whose rows hold more than they say.
    table = pq.read_table(path)
    lying = table.set_column(2, "shape", pa.array([[10]], pa.list_(pa.int64())))
    pq.write_table(lying, path, compression="zstd")
    with pytest.raises(CheckpointError, match="when it is unpacked"):
        load_checkpoint(path, FINGERPRINT)


FORMS: dict[str, Form] = {"scalar": int, "flag": bool, "array": ("<f4", (range(4), 2))}
FITTING = {"scalar": 1, "flag": True, "array": np.zeros((3, 2), np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scalar": "1"}, "scalar is '1', not of type int"),
        ({"scalar": True}, "scalar is True, not of type int"),
        ({"scalar": np.zeros(1)}, r"scalar is \('<f8', \(1,\)\), not of type int"),
        ({"flag": None}, "flag is None, not of type bool"),
        ({"array": 1}, "array is 1, not"),
        ({"array": np.zeros((4, 2), np.float32)}, r"array is .*4, 2.*, not"),
        ({"array": np.zeros((3, 2))}, "array is .*<f8"),
        ({"array": np.zeros(2, np.float32)}, "array is"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_only_what_was_expected_is_loaded(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, FITTING)
    assert same(load_checkpoint(path, FINGERPRINT, FORMS), FITTING)
    save_checkpoint(path, FINGERPRINT, FITTING | change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path, FINGERPRINT, FORMS)


def test_only_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, {n: v for n, v in FITTING.items() if n != "flag"})
    load_checkpoint(path, FINGERPRINT, FORMS, optional=("fl",))
    with pytest.raises(CheckpointError, match="flag is missing"):
        load_checkpoint(path, FINGERPRINT, FORMS, optional=("sc",))


def test_a_part_is_read_alone_and_everything_checked(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    assert same(load_checkpoint(path, FINGERPRINT, part="agent"), as_arrays(STATE)["agent"])
    text = json.loads(pq.read_schema(path).metadata[METADATA]) | {"rows_sha256": "0" * 64}
    header = json.dumps(text)
    schema = SCHEMA.with_metadata({METADATA: header, CHECKSUM: sha256_text(header)})
    pq.write_table(pq.read_table(path).cast(schema), path)
    with pytest.raises(CheckpointDamaged, match="do not match their checksum"):
        load_checkpoint(path, FINGERPRINT, part="agent")


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    save_checkpoint(path, "a" * 64, STATE)
    with pytest.raises(CheckpointError, match=r"checkpoint\.parquet: belongs to run a{16}, not f"):
        load_checkpoint(path, FINGERPRINT)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "checkpoint.parquet"
    save_checkpoint(path, FINGERPRINT, STATE)
    return path.read_bytes()


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    tmp_path: Path, content: bytes, place: int, bit: int
) -> None:
    place %= len(content)
    path = tmp_path / "flipped.parquet"
    path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    try:
        assert same(load_checkpoint(path, FINGERPRINT), as_arrays(STATE))
    except CheckpointError as error:
        assert str(path) in str(error)


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_file_is_never_whole(tmp_path: Path, content: bytes, share: float) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.parquet: not a whole checkpoint"):
        load_checkpoint(path, FINGERPRINT)


def rewritten(path: Path, row: dict[str, Any], header: object) -> None:
    """Write a well-formed file that says of itself what `header` holds, with its checksum."""
    text = json.dumps(header)
    schema = SCHEMA.with_metadata({METADATA: text, CHECKSUM: sha256_text(text)})
    pq.write_table(pa.Table.from_pylist([{"name": "a", **row}], schema), path)


WHOLE = {"format": 1, "fingerprint": FINGERPRINT, "scalars": {}}


@pytest.mark.parametrize(
    "header",
    [WHOLE, WHOLE | {"rows_sha256": "0" * 64}, {"format": 1}, [], "text", None, {}],
    ids=repr,
)
def test_a_file_that_says_something_else_of_itself_is_refused(
    tmp_path: Path, header: object
) -> None:
    path = tmp_path / "checkpoint.parquet"
    rewritten(path, {"dtype": "<f4", "shape": [1], "bytes": b"1234"}, header)
    with pytest.raises(CheckpointError, match=r"checkpoint\.parquet"):
        load_checkpoint(path, FINGERPRINT)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"dtype": "|O", "shape": [1], "bytes": b"12345678"}, "type '|O'"),  # objects are code
        ({"dtype": "<f4", "shape": [2], "bytes": b"1234"}, "reshape"),
        ({"dtype": "<f4", "shape": [1], "bytes": b"123"}, "buffer size"),
        ({"dtype": "nothing", "shape": [1], "bytes": b"1234"}, "type 'nothing'"),
        ({"dtype": "<f4", "shape": [-1], "bytes": b"1234"}, "shape [-1]"),
        ({"dtype": "<f4", "shape": [2**62, 8], "bytes": b"1234"}, "are the most"),
    ],
)
def test_rows_that_are_no_arrays_are_refused(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = tmp_path / "checkpoint.parquet"
    text = f"a {row['dtype']} {row['shape']}\n".encode() + row["bytes"]
    rewritten(path, row, WHOLE | {"rows_sha256": hashlib.sha256(text).hexdigest()})
    with pytest.raises(CheckpointError, match="not a whole checkpoint") as caught:
        load_checkpoint(path, FINGERPRINT)
    assert said in str(caught.value)
    good = {"dtype": "<f4", "shape": [1], "bytes": b"1234"}
    text = b"a <f4 [1]\n1234"
    rewritten(path, good, WHOLE | {"rows_sha256": hashlib.sha256(text).hexdigest()})
    assert load_checkpoint(path, FINGERPRINT)["a"].tobytes() == b"1234"


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.parquet"
    rewritten(path, {"dtype": "<f4", "shape": [1], "bytes": b"1234"}, WHOLE | {"format": 2})
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        load_checkpoint(path, FINGERPRINT)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.parquet"):
        load_checkpoint(tmp_path / "nowhere.parquet", FINGERPRINT)
