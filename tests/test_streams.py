"""Standard streams that are closed, or that lack characters, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPENED = """
from drama.streams import settle_streams
settle_streams()
import sys
with open("opened", "w") as file:
    print(file.fileno(), file=file)
print("said")
print("said", file=sys.stderr)
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_no_file_gets_a_closed_streams_number(tmp_path: Path, closed: str) -> None:
    command = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, OPENED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "opened").read_text()) > 2
    assert done.stdout == "said\n" * (" >&-" not in f" {closed}")
    assert done.stderr == "said\n" * ("2>&-" not in closed)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_shows_what_it_can(encoding: str) -> None:
    code = "from drama.streams import settle_streams; settle_streams(); print('1 → 1·1')"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0
    assert done.stdout.strip() == "1 → 1·1".encode(encoding, "replace")


def test_the_command_settles_them(tmp_path: Path) -> None:
    command = 'exec "$0" -m drama train nowhere.json >out 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").read_bytes()
