"""Clones with two whole runs, for the tests of what DVC keeps: real DVC, a folder as remote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dvc_project import STAGES, Clone, make_trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return make_trained(tmp_path_factory.mktemp("trained") / "clone")


@pytest.fixture(scope="session")
def recorded(trained: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Recorded, pushed and committed."""
    clone = trained.copy(tmp_path_factory.mktemp("recorded") / "copy")
    assert f"{STAGES} stages, {STAGES} recorded" in clone.run("drama", "record")
    clone.run("dvc", "push", "--quiet")
    clone.commit()
    return clone


@pytest.fixture
def fresh(trained: Clone, tmp_path: Path) -> Clone:
    """A copy with whole runs, not recorded yet."""
    return trained.copy(tmp_path / "copy")


@pytest.fixture
def project(recorded: Clone, tmp_path: Path) -> Clone:
    """A copy with everything recorded."""
    return recorded.copy(tmp_path / "copy")


@pytest.fixture
def other(recorded: Clone, tmp_path: Path) -> Clone:
    """Another user's clone: what git holds, and nothing else."""
    shutil.copytree(recorded.root.parent / "drama-artifacts", tmp_path / "drama-artifacts")
    return recorded.clone(tmp_path / "other")
