"""drama.pipeline.accept: two codes whose runs are compared byte for byte, for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from workspace import Workspace, make_workspace

from drama.errors import ConfigurationError
from drama.files import flatten, write_parquet
from drama.pipeline.accept import BASE, PROBES, Names, checkout, enter, first_difference
from drama.pipeline.fingerprints import (
    LIBRARIES,
    LOCK_FILE,
    Accepted,
    Choices,
    evaluation_code_hash,
    lock_hash,
    run_code_hash,
)
from drama.runs.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.whole

# One small probe is enough here; the command itself has several.
ACCEPT = """\
import sys
from drama.pipeline import accept

accept.PROBES = (accept.Probe("gru", "Catch8", {"sequence_model": {"kind": "gru"}}),)
print(*accept.accept(sys.argv[1]), sep="\\n")
"""
NAME = "from drama.pipeline.fingerprints import *; print(run_code(Choices('catch', 'gru', 'dfs')))"


class Clone:
    """A clone of the project, whose code is edited and committed."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "--quiet", str(root), str(folder)], check=True)
        # What is not committed here is part of today's code as well.
        difference = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=root,
                                    capture_output=True, check=True).stdout  # fmt: skip
        if difference:
            subprocess.run(["git", "apply"], cwd=folder, input=difference, check=True)
        self.base = self.commit()

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert old in text, f"{path} has no {old!r}"
        file.write_text(text.replace(old, new), encoding="utf-8")

    def commit(self) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", *identity, "commit", "--quiet", "--all", "--allow-empty", "-m", "Change"]
        subprocess.run(command, cwd=self.folder, check=True)
        head = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(head, cwd=self.folder, text=True).strip()

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=self.folder, text=True,
            env={"PYTHONPATH": str(self.folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_a_refactoring_is_accepted_and_another_result_is_not(root: Path, tmp_path: Path) -> None:
    clone = Clone(root, tmp_path / "clone")
    before = clone.python(NAME).stdout
    path = "drama/agent/behaviour/returns.py"
    clone.edit(path, "def lambda_return(", "UNUSED = 1\n\n\ndef lambda_return(")
    done = clone.python(ACCEPT, clone.base)
    assert "commit the changes of drama/" in done.stdout, done.stdout
    refactored = clone.commit()
    assert clone.python(NAME).stdout != before
    done = clone.python(ACCEPT, clone.base)
    assert done.returncode == 0, done.stdout
    assert "gru (Catch8): 240 steps, stopped once, and its score are the same" in done.stdout
    assert clone.python(NAME).stdout == before, "recorded runs are current again"
    written = (clone.folder / "drama/pipeline/accepted.json").read_text(encoding="utf-8")
    assert json.loads(written)["commit"] == refactored
    accepted = clone.commit()
    assert "nothing to accept" in clone.python(ACCEPT, accepted).stdout
    clone.edit(
        "drama/agent/replay/sampling.py", "permutation(np.sort(chosen))", "permutation(chosen)"
    )
    clone.commit()
    done = clone.python(ACCEPT, accepted)
    assert "NotAccepted: probe gru (Catch8): replay: frame: " in done.stdout, done.stdout
    again = (clone.folder / "drama/pipeline/accepted.json").read_text(encoding="utf-8")
    assert again == written


def test_probes_cover_every_choice() -> None:
    kinds, samplings, games = set(), set(), set()
    for probe in PROBES:
        kinds.add(probe.settings.get("sequence_model", {}).get("kind", "mamba2"))
        samplings.add(probe.settings.get("replay", {}).get("sampling", "dfs"))
        games.add(probe.game)
    assert kinds == {choices.kind for choices in Choices.every()}
    assert samplings == {choices.sampling for choices in Choices.every()}
    assert {"Pong", "Breakout", "Catch8"} <= games
    assert BASE["replay"]["capacity"] < BASE["training"]["total_steps"], "the ring wraps"


@pytest.mark.parametrize("commit", ["--output=made", "nosuch", "HEAD:README.md"])
def test_what_names_no_commit_is_refused(tmp_path: Path, commit: str) -> None:
    with pytest.raises(ConfigurationError, match="git rev-parse says"):
        checkout(commit, tmp_path / "tree")
    assert not list(tmp_path.iterdir())
    assert not Path("made").exists()


def test_hashes_join_the_entry_of_the_earlier_name() -> None:
    names = Names({c: "a" * 64 for c in Choices.every()}, evaluation_code_hash(), "c" * 64)
    empty = Accepted(commit="1" * 40, code={}, evaluation={}, runtime={})
    once = enter(empty, names, "2" * 40)
    assert once.commit == "2" * 40
    assert set(once.code["a" * 64]) == {run_code_hash(choices) for choices in Choices.every()}
    assert once.evaluation == {}, "the same code needs no second name"
    assert once.runtime == {"c" * 64: [lock_hash(LOCK_FILE, LIBRARIES)]}
    assert enter(once, names, "2" * 40) == once


def test_what_equals_an_accepted_hash_joins_the_first_name() -> None:
    """As after a second refactoring: the commit accepted last plans by its own hashes."""
    names = Names({c: "b" * 64 for c in Choices.every()}, "e" * 64, "d" * 64)
    known = Accepted(
        commit="1" * 40,
        code={"a" * 64: ["b" * 64]},
        evaluation={"f" * 64: ["e" * 64]},
        runtime={"c" * 64: ["d" * 64]},
    )
    entered = enter(known, names, "2" * 40)
    assert set(entered.code) == {"a" * 64} and set(entered.runtime) == {"c" * 64}
    hashes = {run_code_hash(choices) for choices in Choices.every()}
    assert set(entered.code["a" * 64]) == {"b" * 64} | hashes
    assert entered.evaluation == {"f" * 64: ["e" * 64, evaluation_code_hash()]}


# --- comparing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Workspace]:
    """The same toy run twice."""
    both = []
    for name in ("one", "other"):
        workspace = make_workspace(tmp_path_factory.mktemp(name))
        workspace.plan()
        workspace.train(every=10_000)
        workspace.evaluate()
        both.append(workspace)
    return both[0], both[1]


def test_equal_runs_do_not_differ(two: tuple[Workspace, Workspace]) -> None:
    assert first_difference(two[0].folder, two[1].folder) is None


def test_one_bit_of_one_tensor_is_found(two: tuple[Workspace, Workspace]) -> None:
    path = two[1].folder / "checkpoint.parquet"
    (record,) = two[1].folder.glob("run-*.json")
    fingerprint = json.loads(record.read_bytes())["fingerprint"]
    whole, state = path.read_bytes(), load_checkpoint(path, fingerprint)
    name, tensor = next((n, t) for n, t in flatten(state["agent"]).items() if t.dtype == np.float32)
    tensor.ravel()[-1] = np.nextafter(tensor.ravel()[-1], np.float32(9))
    save_checkpoint(path, fingerprint, state)
    text = first_difference(two[0].folder, two[1].folder)
    path.write_bytes(whole)
    assert text and text.startswith(f"checkpoint.parquet: agent/{name}: "), text
    assert f"1 of {tensor.size} numbers differ" in text


@pytest.mark.parametrize("name", ["training.parquet", "episodes.parquet"])
def test_a_value_in_a_table_is_found_and_the_clock_is_not(
    two: tuple[Workspace, Workspace], name: str
) -> None:
    path = two[1].folder / name
    whole, table = path.read_bytes(), pq.read_table(path)
    column = table.column_names[-2 if name == "training.parquet" else 2]
    values = [*table[column].to_pylist()[:-1], 7.5]
    changed = table.set_column(table.column_names.index(column), column, [values])
    write_parquet(path, changed)
    text = first_difference(two[0].folder, two[1].folder)
    path.write_bytes(whole)
    assert text and text.startswith(f"{name}: {column}: ["), text
    if name == "training.parquet":
        write_parquet(path, table.append_column("steps_per_second", [[1.0] * len(table)]))
        assert first_difference(two[0].folder, two[1].folder) is None
        path.write_bytes(whole)
