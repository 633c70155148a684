"""What several test files share: the project's root, one thread, settings of toy size."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from workspace import Command, Workspace, make_workspace

from drama.pipeline.config import Preset, load_preset
from drama.pipeline.layers import Layer

if TYPE_CHECKING:
    from test_pipeline import Project

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "config" / "presets"


@pytest.fixture(autouse=True)
def one_thread_and_fixed_generator() -> None:
    """The same numbers in every run, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def signals_arrive() -> Iterator[None]:
    """Have processes that a test starts heed requests to stop, also under `nohup` or after `&`."""
    numbers = signal.SIGINT, signal.SIGHUP
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def preset() -> Callable[..., Preset]:
    """Load a preset by name, with a nested mapping of settings over it."""

    def load(name: str = "quick", overrides: Mapping[str, Any] | None = None) -> Preset:
        layers = [Layer("test", overrides)] if overrides else []
        return load_preset(name, *layers, folder=PRESETS)

    return load


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A whole run of toy size that nobody stopped, and its evaluation; leave it as it is."""
    workspace = make_workspace(tmp_path_factory.mktemp("undisturbed"))
    workspace.plan()
    workspace.train(every=10_000)
    workspace.evaluate()
    return workspace


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project in which `snakemake` has done everything; leave it as it is."""
    from test_pipeline import SNAKEMAKE, copy_sources

    project = copy_sources(tmp_path_factory.mktemp("finished"))
    project.run(*SNAKEMAKE)
    return project


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A folder with configuration of toy size, the current one."""
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path)


@pytest.fixture
def drama(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The `drama` command, run in this process and in a folder of toy size."""
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)
