"""What the tests on a real Slurm and Apptainer share: the cluster and the image.

They need root on Debian 12 and what tests/cluster/install installs; `make test-cluster` sees to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pipeline import ROOT

from drama.pipeline.artifacts.image import ImageMissing, require_image

HERE = Path(__file__).parent
CACHE = ROOT / "build" / "cluster"


def pytest_sessionstart() -> None:
    """Fail, and say why, where these tests cannot run: they are never skipped."""
    check = subprocess.run([HERE / "install", "--check"], text=True, capture_output=True)
    if check.returncode:
        pytest.exit(check.stderr.strip(), returncode=1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running Slurm with a partition gpu and two GPUs of type h200; stopped at the end.

    Its folder is what tests/cluster/slurm takes.
    """
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([HERE / "slurm", "up", folder], check=True)
        yield folder
    finally:
        subprocess.run([HERE / "slurm", "down", folder], check=True)


@pytest.fixture(scope="session")
def image() -> Path:
    """The CPU image of today's lock files, built once and kept between sessions."""
    try:
        return ROOT / require_image("cpu")
    except ImageMissing:
        build_image()
        return ROOT / require_image("cpu")


def build_image() -> None:
    """Build the CPU image on a root file system of Debian 12's own packages."""
    base = CACHE / "bookworm"
    if not base.exists():
        partial = base.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--variant=minbase", "--include=python3,python3-venv,git"]
        subprocess.run(["mmdebstrap", *options, "bookworm", str(partial)], check=True)
        partial.rename(base)
    subprocess.run(
        [sys.executable, "containers/build.py", "--variant", "cpu", "--base", str(base)],
        check=True,
        cwd=ROOT,
        env=os.environ | build_settings(),
    )


def build_settings() -> dict[str, str]:
    """What Apptainer must be told where root is not allowed to raise limits, as in a container."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    bounding = re.search(r"^CapBnd:\s*(\w+)", status, re.MULTILINE)
    raises_limits = bounding is None or int(bounding[1], 16) >> 24 & 1
    return {} if raises_limits else {"APPTAINER_DROP_CAPS": "CAP_SYS_RESOURCE"}
