"""dvc.lock, which comes from anybody: what is taken for one, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from drama.pipeline.artifacts.lockfile import LOCK, read_ledger, write_ledger

STAGE = "train@Pong-0"


def entries() -> dict[str, Any]:
    listed = {"path": "a", "hash": "md5", "md5": "0" * 32, "size": 3, "isexec": True}
    folder = {"path": "b", "md5": "1" * 32 + ".dir", "size": 9, "nfiles": 2}
    outs = [folder, listed | {"path": "c"}]
    params = {"params.yaml": {"a": 1}}
    return {STAGE: {"cmd": "drama train", "deps": [listed], "outs": outs, "params": params}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_dvc_writes_is_read() -> None:
    write_ledger(entries())
    found = read_ledger()
    assert found.damage is None and found.entries == entries()


@pytest.mark.parametrize(
    "harm",
    [
        lambda stage: stage.pop("cmd"),
        lambda stage: stage.update(cmd=["drama train"]),
        lambda stage: stage.update(outs={"a": 1}),
        lambda stage: stage["outs"].append("a"),
        lambda stage: stage["outs"][0].pop("md5"),
        lambda stage: stage["outs"][0].update(md5=int("1" * 32)),
        lambda stage: stage["outs"][0].update(md5="../../../../../etc/passwd"),
        lambda stage: stage["outs"][0].update(path=7),
        lambda stage: stage["outs"][0].update(size="3"),
        lambda stage: stage["outs"][0].update(hash="sha1"),
        lambda stage: stage["deps"][0].update(cloud={"a": 5}),
        lambda stage: stage["deps"][0].update(files=3),
        lambda stage: stage.update(params=[3]),
        lambda stage: stage.update(more="x"),
    ],
)  # fmt: skip
def test_what_dvc_does_not_write_is_damaged(harm: Callable[[dict[str, Any]], object]) -> None:
    changed = entries()
    harm(changed[STAGE])
    LOCK.write_text(yaml.safe_dump({"schema": "2.0", "stages": changed}), encoding="utf-8")
    found = read_ledger()
    assert not found.entries and "cut off or was edited" in str(found.damage)
