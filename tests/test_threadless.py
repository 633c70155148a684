"""Where the system allows no more threads, as login nodes do: read alone, or say so; never hang."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from workspace import Workspace

from drama.pipeline.artifacts.export import export
from drama.runs.locks import lock_of

LIMITED = """
import ctypes, os, resource, sys

resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if os.getuid() == 0:  # the limit binds neither root nor who may set it
    libc = ctypes.CDLL(None, use_errno=True)
    header = lambda: (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    assert not libc.capget(header(), capabilities)
    for number in (0, 1, 2):  # effective, permitted, inheritable; CAP_SYS_ADMIN, CAP_SYS_RESOURCE
        capabilities[number] &= ~((1 << 21) | (1 << 24))
    os.setresuid(60_000 + os.getpid() % 5_000, 0, 0)
    assert not libc.capset(header(), capabilities)
import _thread
try:
    _thread.start_new_thread(int, ())
except RuntimeError:
    exec(sys.argv.pop(1))
else:
    sys.exit("threads can be started all the same")
"""
SENTENCE = "no more threads can be started here (a limit on processes, `ulimit -u`)"


@pytest.fixture(scope="module")
def limited(undisturbed: Workspace) -> Iterator[Workspace]:
    """A copy of a whole run, with its weights, that any user may write to."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "copy")
        shutil.copytree(undisturbed.root, workspace.root)
        export(workspace.recipe)
        for path in (Path(folder), workspace.root, *workspace.root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield workspace


def run(place: Path, code: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run code in a process that can start no thread; returns exit code and what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, code, *arguments],
            cwd=place, env={**kept, "MPLCONFIGDIR": str(place.parent), **environment},
            text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{arguments} hangs: {error.output!r}")
    return done.returncode, done.stdout


def drama(workspace: Workspace, *arguments: str) -> tuple[int, str]:
    return run(workspace.root, "from drama.cli import main; main()", *arguments)


def test_status_is_told(limited: Workspace) -> None:
    code, said = drama(limited, "status", "results/tiny")
    assert code == 0 and said.endswith("1 run: 1 done\n"), said


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_who_has_to_hold_a_folder_says_that_it_cannot(limited: Workspace, command: str) -> None:
    before = limited.tree()
    report = command == "report"
    code, said = drama(limited, command, *(["results/tiny"] if report else [
        str(limited.recipe), "--device", "cpu"]))  # fmt: skip
    held = limited.folder.parents[2] / "report" if report else limited.folder
    assert code == 1 and "Traceback" not in said
    assert said.count("\n") == 1 and f"{held.name}: {SENTENCE}" in said
    assert not lock_of(held).exists() and limited.tree() == before


def test_an_evaluation_is_played_again(limited: Workspace) -> None:
    """From weights: PyArrow, PyTorch, the emulator and OpenCV all do without."""
    (limited.folder / "checkpoint.parquet").unlink()
    code, said = drama(limited, "verify", "results/tiny", "--device", "cpu")
    assert code == 0 and "all 5 episodes exactly" in said, said


def test_tables_are_written_and_read(limited: Workspace) -> None:
    code, said = run(limited.root, """
from pathlib import Path
from drama.files import write_parquet
from drama.reading import read_table
import pyarrow as pa
table = pa.table({"number": range(1_000_000), "name": ["x"] * 1_000_000})
write_parquet(Path("table.parquet"), table, row_group_size=10_000)
print(read_table(Path("table.parquet"), table.schema).equals(table))
""")  # fmt: skip
    assert (code, said) == (0, "True\n")


def test_bars_are_drawn(limited: Workspace) -> None:
    code, said = run(limited.root, """
from pathlib import Path
from drama.runs.progress import EpisodesReporter, Reporter, Status
with EpisodesReporter("Pong seed 0", 3) as evaluation:
    evaluation.tick([{"actions": "greedy", "episode_return": 2.0}])
with Reporter("Pong seed 1", Status("f" * 64, "running", 0, 9), Path("status.json")) as training:
    training.tick(3)
""", TTY_COMPATIBLE="1", FORCE_COLOR="1", COLUMNS="80")  # fmt: skip
    assert code == 0 and "Pong seed 0" in said and "1/3" in said and "3/9" in said, said
