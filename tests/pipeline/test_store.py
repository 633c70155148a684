"""A checkpoint is fetched from DVC's cache or remote where it is needed, and held to the record."""

from __future__ import annotations

import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from dvc_project import Clone, record_of

from drama.pipeline.artifacts.records import read_record
from drama.pipeline.artifacts.store import NotFetched, fetch

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("ledger")]

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
        blob.chmod(0o444)  # as DVC left it: what can be written to, it looks at again itself
    monkeypatch.chdir(other.root)
    with pytest.raises(NotFetched) as caught:
        fetch(read_record(record_of(other, "Pong")))
    for word in (str(CHECKPOINT), str(blob), "dvc push train@Pong-0"):
        assert word in str(caught.value)
    assert not CHECKPOINT.exists() and not list(CHECKPOINT.parent.glob(".*.part"))

    missing = fault == "missing"
    assert ("failed to pull" in other.run("dvc", "pull", expected=int(missing))) == missing
    assert other.present("Boxing") == other.blobs("Boxing")
    assert blob.exists() != missing, "DVC removed it from the remote"
    verdict = other.run("drama", "verify", "--files-only", expected=1)
    if missing:
        assert "missing    results/tiny/runs/Pong/seed0: not here: checkpoint.parquet" in verdict
    else:
        (line,) = re.findall(r"damaged .*", verdict)
        assert f"from DVC's remote, where {blob} is damaged" in line

    blob.unlink(missing_ok=True)
    shutil.copy(recorded.remote_blob("Pong"), blob)
    if not missing:
        line = other.run("drama", "verify", "--files-only", expected=1)
        ((here, cached),) = re.findall(r"a good copy: remove (\S+) and .* cache, (\S+); then", line)
        for path in (here, cached):
            (other.root / path).unlink()
    other.run("dvc", "pull", "train@Pong-0")
    other.run("drama", "verify", "--files-only")


def test_a_damaged_shard_is_mended_as_it_is_told(other: Clone, recorded: Clone) -> None:
    """The remote's list of the replay must go as well, or DVC pushes nothing."""
    blob = recorded.remote_blob("Pong", "replay/part-00000.parquet")
    there = other.root.parent / blob.relative_to(recorded.root.parent)
    good = there.read_bytes()
    there.unlink()
    there.write_bytes(good[:-1] + b"?")
    there.chmod(0o444)
    other.run("dvc", "pull")
    line = other.run("drama", "verify", "--files-only", expected=1)
    told = re.search(r"where (\S+) is damaged. Remove that file there, (\S+), which lists", line)
    ((here, cached),) = re.findall(
        r"and (results\S+) and its copy in DVC's cache, (\S+); then", line
    )
    assert told and told[1] == str(there), line
    for path in (told[1], told[2], other.root / here, other.root / cached):
        Path(path).unlink()
    shutil.copytree(recorded.root, other.root.parent / "clone", symlinks=True)
    Clone(other.root.parent / "clone").run("dvc", "push", "train@Pong-0")
    assert there.read_bytes() == good
    other.run("dvc", "pull", "train@Pong-0")
    other.run("drama", "verify", "--files-only")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_results_can_be_pulled_from_a_web_server(other: Clone) -> None:
    handler = partial(Quiet, directory=other.root.parent / "drama-artifacts")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        other.run(
            "dvc", "remote", "add", "--local", "web", f"http://127.0.0.1:{server.server_port}"
        )
        other.run("dvc", "pull", "--remote", "web", "train@Pong-0")
        other.run("dvc", "config", "--local", "core.remote", "web")
        recipe = "results/tiny/recipes/Boxing/seed0.json"
        (evaluation,) = other.results("runs/Boxing/seed0/evaluation-*.parquet")
        evaluation.unlink()
        assert "from remote 'web'" in other.run("drama", "evaluate", recipe, "--device", "cpu")
        server.shutdown()
    assert other.present("Pong") == other.blobs("Pong")
    assert set(other.present("Boxing")) == {"checkpoint.parquet"}


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
