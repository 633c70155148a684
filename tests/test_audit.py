"""What is installed is held to the lock files; a change of one byte is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def audit(first: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "containers/audit.py"), "iniconfig"],
        env=os.environ | {"PYTHONPATH": str(first)},
        capture_output=True,
        text=True,
        check=False,
    )


def _flip(package: Path, described: Path) -> None:
    file = package / "__init__.py"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def _lose(package: Path, described: Path) -> None:
    (package / "__init__.py").unlink()


def _other(package: Path, described: Path) -> None:
    text = (described / "METADATA").read_text().replace("\nVersion: ", "\nVersion: 99.", 1)
    (described / "METADATA").write_text(text)


def _need(package: Path, described: Path) -> None:
    with (described / "METADATA").open("r+") as file:
        text = file.read().replace(
            "\nVersion: ", "\nRequires-Dist: nowhere-to-be-had\nVersion: ", 1
        )
        file.seek(0)
        file.write(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, ""),
        (_flip, "iniconfig/__init__.py is not what was installed"),
        (_lose, "iniconfig/__init__.py is not what was installed"),
        (_other, "the locks pin"),
        (_need, "needs nowhere-to-be-had"),
    ],
)
def test_a_package_that_is_not_as_it_was_installed_is_named(
    tmp_path: Path, change: Callable[[Path, Path], None] | None, said: str
) -> None:
    source = Path(str(distribution("iniconfig").locate_file("")))
    for path in source.glob("iniconfig*"):
        shutil.copytree(path, tmp_path / path.name)
    (described,) = tmp_path.glob("iniconfig-*.dist-info")
    if change:
        change(tmp_path / "iniconfig", described)
    done = audit(tmp_path)
    assert done.returncode == (change is not None), done.stderr
    assert said in done.stderr
    assert all(line.startswith("iniconfig ") for line in done.stderr.splitlines())
