"""A checkpoint is fetched from DVC's cache or remote where it is needed, and held to the record."""

from __future__ import annotations

from pathlib import Path

import pytest
from dvc_project import Clone, record_of

from drama.pipeline.artifacts.records import read_record
from drama.pipeline.artifacts.store import NotFetched, fetch

pytestmark = pytest.mark.xdist_group("ledger")

CHECKPOINT = Path("results/tiny/runs/Pong/seed0/checkpoint.parquet")


def test_evaluating_fetches_the_checkpoint(other: Clone, recorded: Clone) -> None:
    (evaluation,) = other.results("runs/Pong/seed0/evaluation-*.parquet")
    expected = evaluation.read_bytes()
    evaluation.unlink()
    command = ("drama", "evaluate", "results/tiny/recipes/Pong/seed0.json", "--device", "cpu")
    assert "fetched from remote 'artifacts'" in other.run(*command)
    assert evaluation.read_bytes() == expected
    assert set(other.present("Pong")) == {"checkpoint.parquet"}
    assert "nothing new" in other.run("drama", "record")
    assert other.git("status", "--porcelain") == ""


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_bad_blob_is_named_and_never_taken(
    other: Clone, recorded: Clone, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = other.root.parent / recorded.remote_blob("Pong").relative_to(recorded.root.parent)
    blob.chmod(0o644)
    if fault == "missing":
        blob.unlink()
    else:
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    monkeypatch.chdir(other.root)
    with pytest.raises(NotFetched) as caught:
        fetch(read_record(record_of(other, "Pong")))
    for word in (str(CHECKPOINT), str(blob), "dvc push train@Pong-0"):
        assert word in str(caught.value)
    assert not CHECKPOINT.exists() and not list(CHECKPOINT.parent.glob(".*.part"))

    process = other.start("dvc", "pull")
    output, _ = process.communicate()
    assert process.returncode != 0, output
    assert str(CHECKPOINT) in output or blob.name in output
    assert "checkpoint.parquet" not in other.present("Pong")
    assert other.present("Boxing") == other.blobs("Boxing")


def test_a_damaged_copy_in_the_cache_is_passed_over(
    project: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    run = read_record(record_of(project, "Pong"))
    md5 = project.remote_blob("Pong")
    cached = Path(".dvc/cache/files/md5") / md5.parent.name / md5.name
    content = CHECKPOINT.read_bytes()
    CHECKPOINT.unlink()
    assert fetch(run) == ".dvc/cache/files/md5"
    CHECKPOINT.unlink()
    cached.chmod(0o644)
    cached.write_bytes(b"damaged")
    assert "remote" in fetch(run)
    assert CHECKPOINT.read_bytes() == content
