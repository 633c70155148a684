"""Replay shards: nothing lost, nothing half-written, nothing damaged that goes unnoticed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drama.agent.replay.buffer import ReplayBuffer, Transition
from drama.files import remove_leftovers
from drama.runs.shards import (
    ROWS_PER_GROUP,
    ROWS_PER_SHARD,
    ShardError,
    ShardWriter,
    iterate_shards,
    read_shard,
    read_shards,
    write_shard,
)

SHAPE = (4, 4, 3)


def transition(step: int) -> Transition:
    return Transition(
        frame=np.random.default_rng(step).integers(0, 256, SHAPE, np.uint8),
        action=step % 18,
        reward=float(step % 1000 - 500),
        terminated=step % 3 == 0,
        truncated=step % 5 == 0,
        life_lost=step % 7 == 0,
        episode=step // 4,
    )


def filled(steps: int, capacity: int = 10_000) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, SHAPE)
    for step in range(steps):
        buffer.append(transition(step))
    return buffer


def write(folder: Path, steps: int, rows_per_shard: int) -> ReplayBuffer:
    buffer = filled(steps)
    ShardWriter(folder, rows_per_shard).finish(buffer)
    return buffer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_holds(folder: Path, buffer: ReplayBuffer, first_step: int, stop_step: int) -> None:
    expected = buffer.columns(first_step, stop_step)
    actual = read_shards(folder, first_step, stop_step)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_every_range_of_steps_comes_back_as_it_was(tmp_path: Path) -> None:
    buffer = write(tmp_path, 25, rows_per_shard=10)
    assert names(tmp_path) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [len(read_shard(tmp_path / name)["step"]) for name in names(tmp_path)] == [10, 10, 5]
    for first_step in range(25):
        for stop_step in range(first_step + 1, 26):
            assert_holds(tmp_path, buffer, first_step, stop_step)


def test_a_buffer_refilled_a_shard_at_a_time_is_the_same_buffer(tmp_path: Path) -> None:
    original = filled(37, capacity=16)
    ShardWriter(tmp_path, 5, rows_written=25).finish(original)
    write_shard(tmp_path / "part-00000.parquet", [filled(5).columns(0, 5)], SHAPE)
    ShardWriter(tmp_path, 5).write_full(filled(25))
    restored = ReplayBuffer(16, SHAPE)
    for columns in iterate_shards(tmp_path, original.first_step, original.total):
        restored.extend(columns)
    assert (restored.first_step, restored.total) == (21, 37)
    for name, values in original.columns(21, 37).items():
        np.testing.assert_array_equal(restored.columns(21, 37)[name], values)


def test_plain_pandas_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path, 25, rows_per_shard=25)
    table = pd.read_parquet(tmp_path / "part-00000.parquet")
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        "step": "int64",
        "episode": "int32",
        "frame": "object",
        "action": "int16",
        "reward": "float32",
        "terminated": "bool",
        "truncated": "bool",
        "life_lost": "bool",
    }
    for step, row in enumerate(table.itertuples()):
        expected = transition(step)
        np.testing.assert_array_equal(
            np.frombuffer(row.frame, np.uint8).reshape(SHAPE), expected.frame
        )
        assert (row.step, row.episode, row.action) == (step, expected.episode, expected.action)
        assert row.reward == expected.reward
        assert (row.terminated, row.truncated, row.life_lost) == expected[3:6]


def test_the_file_is_laid_out_as_documented(tmp_path: Path) -> None:
    assert (ROWS_PER_SHARD, ROWS_PER_GROUP) == (10_000, 1_000)
    write(tmp_path, 2500, rows_per_shard=2500)
    file = pq.ParquetFile(tmp_path / "part-00000.parquet")
    assert json.loads(file.schema_arrow.metadata[b"drama"]) == {
        "format": 1,
        "frame_shape": list(SHAPE),
    }
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [1000, 1000, 500]
    for group in groups:
        for column in (group.column(i) for i in range(group.num_columns)):
            assert column.compression == "ZSTD"
            assert not column.has_dictionary_page
    # The one plain column: frames, read by everything that reads Parquet at all.
    assert file.schema.column(2).physical_type == "BYTE_ARRAY"


def test_frames_that_hardly_change_take_few_bytes(tmp_path: Path) -> None:
    buffer = ReplayBuffer(1000)
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for step in range(1000):
        moved = frame.copy()
        moved[step % 60 : step % 60 + 4, 30:34] = 255
        buffer.append(transition(step)._replace(frame=moved))
    ShardWriter(tmp_path, 1000).finish(buffer)
    assert (tmp_path / "part-00000.parquet").stat().st_size < 100 * 1000


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "at once", 2500, rows_per_shard=1200)
    buffer, writer = ReplayBuffer(1300, SHAPE), ShardWriter(tmp_path / "one by one", 1200)
    for step in range(2500):
        buffer.append(transition(step))
        writer.write_full(buffer)
    writer.finish(buffer)
    assert contents(tmp_path / "one by one") == contents(tmp_path / "at once")


def test_each_full_shard_is_written_once(tmp_path: Path) -> None:
    buffer, writer = ReplayBuffer(100, SHAPE), ShardWriter(tmp_path, 10)
    inodes: dict[str, int] = {}
    for step in range(47):
        buffer.append(transition(step))
        writer.write_full(buffer)
        assert writer.rows_written == (step + 1) // 10 * 10
        for path in tmp_path.iterdir():
            assert inodes.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
    assert len(inodes) == 4
    writer.finish(buffer)
    writer.finish(buffer)
    assert writer.rows_written == 47
    assert names(tmp_path)[-1] == "part-00004.parquet"


def test_a_finished_writer_goes_on_when_more_transitions_follow(tmp_path: Path) -> None:
    buffer, writer = filled(7), ShardWriter(tmp_path / "stopped", 10)
    writer.finish(buffer)
    writer = ShardWriter(tmp_path / "stopped", 10, rows_written=writer.rows_written)
    for step in range(7, 25):
        buffer.append(transition(step))
        writer.write_full(buffer)
    writer.finish(buffer)
    write(tmp_path / "not stopped", 25, rows_per_shard=10)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "not stopped")


def test_a_resumed_writer_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    buffer = write(tmp_path, 35, rows_per_shard=10)
    whole = contents(tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(b"")
    (tmp_path / "part-00003.parquet").write_bytes(b"")
    untouched = (tmp_path / "part-00000.parquet").stat().st_ino
    writer = ShardWriter(tmp_path, 10, rows_written=10)
    assert writer.rows_written == 10
    writer.finish(buffer)
    assert contents(tmp_path) == whole
    assert (tmp_path / "part-00000.parquet").stat().st_ino == untouched


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(
    capacity=st.integers(1, 12),
    rows_per_shard=st.integers(1, 12),
    steps=st.integers(1, 40),
)
def test_a_ring_of_any_size_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, rows_per_shard: int, steps: int
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    buffer, writer = ReplayBuffer(capacity, SHAPE), ShardWriter(folder, rows_per_shard)
    for step in range(steps):
        buffer.append(transition(step))
        writer.write_full(buffer)
    writer.finish(buffer)
    assert writer.rows_written == steps
    assert_holds(folder, filled(steps), 0, steps)


def test_transitions_lost_before_they_were_written_are_reported(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10)
    with pytest.raises(ValueError, match=r"steps \[0, 5\) were overwritten in the ring of 20"):
        writer.write_full(filled(25, capacity=20))
    assert not tmp_path.joinpath("part-00000.parquet").exists()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: float) -> None:
    write(tmp_path, 25, rows_per_shard=10)
    path = tmp_path / "part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ShardError, match=r"part-00001\.parquet is damaged .*Fetch the file again"):
        read_shards(tmp_path, 0, 25)
    assert len(read_shards(tmp_path, 0, 10)["step"]) == 10


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 25, rows_per_shard=10)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(ShardError, match=r"part-00001\.parquet is missing\. Fetch"):
        read_shards(tmp_path, 0, 25)
    with pytest.raises(ShardError, match=r"part-00003\.parquet is missing"):
        read_shards(tmp_path, 22, 40)
    with pytest.raises(ShardError, match=r"part-00000\.parquet is missing"):
        read_shards(tmp_path / "nowhere", 5, 10)


def test_no_changed_byte_of_a_row_goes_unnoticed(tmp_path: Path) -> None:
    """Incompressible frames: without checksums, Zstandard would pass changed literals on."""
    buffer = write(tmp_path, 25, rows_per_shard=25)
    path = tmp_path / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    expected = buffer.columns(0, 25)
    noticed = 0
    for position in range(4, footer, 7):
        changed = data.copy()
        changed[position] ^= 0x10
        path.write_bytes(changed)
        try:
            columns = read_shard(path)
        except ShardError as error:
            assert str(path) in str(error)
            noticed += 1
        else:  # a byte of a page header that carries no rows
            for name, values in expected.items():
                np.testing.assert_array_equal(columns[name], values)
    assert noticed > 0.8 * len(range(4, footer, 7))


def test_shards_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 25, rows_per_shard=10)
    (tmp_path / "part-00002.parquet").replace(tmp_path / "part-00001.parquet")
    with pytest.raises(ShardError, match=r"part-00001\.parquet holds steps 20 to 24, not step 10"):
        read_shards(tmp_path, 0, 25)


def test_files_that_are_not_replay_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    pd.DataFrame({"step": [0, 1]}).to_parquet(path)
    with pytest.raises(ShardError, match=re.escape(f"{path} is not a replay shard")):
        read_shard(path)
    table = pq.read_table(write_one(tmp_path / "good"))
    pq.write_table(
        table.replace_schema_metadata({b"drama": b'{"format": 2, "frame_shape": []}'}), path
    )
    with pytest.raises(ShardError, match="has format 2; this version reads 1"):
        read_shard(path)
    wrong_shape = json.dumps({"format": 1, "frame_shape": [5, 4, 3]}).encode()
    pq.write_table(table.replace_schema_metadata({b"drama": wrong_shape}), path)
    with pytest.raises(ShardError, match="frame 0 has 48 bytes"):
        read_shard(path)
    flat = json.dumps({"format": 1, "frame_shape": [4, 12]}).encode()
    others = table.replace_schema_metadata({b"drama": flat}), table.drop_columns(["life_lost"])
    for other in others:
        pq.write_table(other, path)
        with pytest.raises(ShardError, match="other fields"):
            read_shard(path)


def write_one(folder: Path) -> Path:
    write(folder, 3, rows_per_shard=3)
    return folder / "part-00000.parquet"


def test_rows_with_gaps_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    columns = filled(4).columns(0, 4)
    with pytest.raises(ValueError, match="step 1 is followed by step 3"):
        write_shard(path, [columns | {"step": np.array([0, 1, 3, 4])}], SHAPE)
    assert not path.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from drama.agent.replay.buffer import ReplayBuffer
from drama.runs.shards import ShardWriter, read_shards

class Killed(ReplayBuffer):
    '''Ends this process the hard way when rows are taken from it for the n-th time.'''
    left = int(sys.argv[3])

    def columns(self, first_step, stop_step):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().columns(first_step, stop_step)

buffer = Killed(10_000, (4, 4, 3))
buffer.extend(read_shards(Path(sys.argv[1]), 0, 5000))
ShardWriter(Path(sys.argv[2]), 2000).finish(buffer)
"""


@pytest.mark.parametrize(("reads", "whole"), [(0, 0), (1, 0), (3, 1), (4, 2)])
def test_a_process_killed_while_writing_leaves_only_whole_shards(
    tmp_path: Path, reads: int, whole: int
) -> None:
    """Shards of 2000 rows are taken from the buffer 1000 rows at a time."""
    source, folder = tmp_path / "source", tmp_path / "replay"
    buffer = write(source, 5000, rows_per_shard=2000)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(folder), str(reads)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    leftover, *finished = names(folder)
    assert leftover.startswith(f".part-{whole:05d}.parquet.") and leftover.endswith(".part")
    assert finished == names(source)[:whole]
    for name in names(source)[:whole]:
        assert (folder / name).read_bytes() == (source / name).read_bytes()

    remove_leftovers(folder)
    ShardWriter(folder, 2000).finish(buffer)
    assert contents(folder) == contents(source)
