"""The image that jobs run in: its name, what makes it stale, and how Snakemake refuses it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import ROOT, SNAKEMAKE, Project, copy_sources

from drama.errors import ConfigurationError
from drama.pipeline.artifacts.image import (
    ImageMissing,
    Variant,
    current_image,
    image_hash,
    note_of,
    require_image,
    running_digest,
    variant_for,
)

IN_CONTAINERS = (*SNAKEMAKE, "--software-deployment-method", "apptainer")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    copy = copy_sources(tmp_path / "project")
    monkeypatch.chdir(copy.root)
    return copy


def pretend(variant: Variant, content: bytes = b"not a real image") -> Path:
    """Put a file in the image's place, with a note that describes it."""
    path = current_image(variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    note = {"sha256": "ab" * 32, "bytes": len(content), "variant": variant}
    note_of(path).write_text(json.dumps(note), encoding="utf-8")
    return path


def test_only_cpu_runs_do_without_cuda() -> None:
    assert [variant_for(device) for device in ("cpu", "auto", "cuda")] == ["cpu", "cuda", "cuda"]


def test_the_name_holds_the_hash_and_the_variant(project: Project) -> None:
    cuda, cpu = current_image("cuda"), current_image("cpu")
    assert re.fullmatch(r"containers/images/drama-[0-9a-f]{16}\.sif", str(cuda))
    assert re.fullmatch(r"containers/images/drama-[0-9a-f]{16}-cpu\.sif", str(cpu))
    assert cuda.name[6:22] == image_hash("cuda")[:16] != image_hash("cpu")[:16]


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("run.lock", "numpy==2", "numpy==1", {"cuda", "cpu"}),
        ("report.lock", "pandas==2", "pandas==1", {"cuda", "cpu"}),
        ("cuda.lock", "triton==3", "triton==2", {"cuda", "cpu"}),
        ("kernels.lock", "mamba-ssm==2", "mamba-ssm==1", {"cuda"}),
        ("drama.def", "set -eu", "set -e", {"cuda", "cpu"}),
        ("dev.lock", "ruff==0", "ruff==1", set()),
        ("workflow.lock", "dvc==3", "dvc==2", set()),
        ("run.lock", "--hash=sha256:", "--hash=sha256:0", set()),
        ("run.lock", "# Written", "# Put down", set()),
    ],
)
def test_pins_and_the_definition_change_the_name(
    project: Project, file: str, old: str, new: str, changes: set[Variant]
) -> None:
    variants: tuple[Variant, ...] = ("cuda", "cpu")
    before = {variant: current_image(variant) for variant in variants}
    project.replace(f"containers/{file}", old, new)
    assert {v for v in variants if current_image(v) != before[v]} == changes


def test_code_does_not_change_the_name(project: Project) -> None:
    before = current_image("cuda")
    project.append("drama/agent/model/__init__.py", "\nAN_ADDITION = 1\n")
    project.append("config/presets/tiny.yaml", "# a remark\n")
    assert current_image("cuda") == before


def test_outside_the_project_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="from the project's root"):
        current_image("cpu")


def test_a_whole_image_is_taken(project: Project) -> None:
    assert require_image_or_message("cpu") != ""
    assert pretend("cpu") == require_image("cpu")


def require_image_or_message(variant: Variant) -> str:
    """What is said about an image that is refused; nothing when it is taken."""
    try:
        require_image(variant)
    except ImageMissing as error:
        assert error.exit_code == 2
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("variant", "command"), [("cuda", "`make container`"), ("cpu", "`make container VARIANT=cpu`")]
)
def test_a_missing_image_is_named_with_what_builds_it(
    project: Project, variant: Variant, command: str
) -> None:
    other: Variant = "cpu" if variant == "cuda" else "cuda"
    pretend(other)
    message = require_image_or_message(variant)
    assert str(current_image(variant)) in message and command in message
    assert current_image(other).name not in message


def test_a_stale_image_is_named(project: Project) -> None:
    old = pretend("cpu")
    project.replace("containers/run.lock", "numpy==2", "numpy==1")
    message = require_image_or_message("cpu")
    assert f"{old.name} was built for other versions" in message
    assert str(current_image("cpu")) in message and "make container VARIANT=cpu" in message


@pytest.mark.parametrize("damage", ["cut", "no note", "half a note"])
def test_what_is_not_as_it_was_built_is_refused(project: Project, damage: str) -> None:
    path = pretend("cpu")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no note":
        note_of(path).unlink()
    else:
        note_of(path).write_text('{"bytes": ', encoding="utf-8")
    assert str(path) in require_image_or_message("cpu")


def test_the_digest_is_that_of_the_image_around_the_process(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    assert running_digest() is None
    image = pretend("cpu")
    monkeypatch.setenv("APPTAINER_CONTAINER", str(image.absolute()))
    assert running_digest() == "ab" * 32
    monkeypatch.setenv("APPTAINER_CONTAINER", str(tmp_path / "other.sif"))
    assert running_digest() is None


# --- real `snakemake` and `make container` -------------------------------------------------------


def test_without_apptainer_no_image_is_asked_for(project: Project) -> None:
    (project.root / "containers/drama.def").unlink()
    assert "Training Pong" in project.dry_run()


def test_snakemake_refuses_before_anything_is_trained(project: Project) -> None:
    message = project.run(*IN_CONTAINERS, "-n", expected=2)
    assert str(current_image("cpu")) in message and "make container VARIANT=cpu" in message
    assert "Traceback" not in message and "Training" not in message
    old = pretend("cpu")
    project.replace("containers/run.lock", "numpy==2", "numpy==1")
    message = project.run(*IN_CONTAINERS, "-n", expected=2)
    assert f"{old.name} was built for other versions" in message


def test_a_gpus_image_is_asked_for_where_a_gpu_may_be_used(project: Project) -> None:
    pretend("cpu")
    message = project.run(*IN_CONTAINERS, "-n", "--config", "device=auto", expected=2)
    assert str(current_image("cuda")) in message and "`make container`" in message


def build(*options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) if path is None else os.environ | {"PATH": path}
    command = [sys.executable, "containers/build.py", *options]
    environment["PYTHONPATH"] = str(Path.cwd())
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_image_that_is_there_is_not_built_again(project: Project) -> None:
    image = pretend("cpu")
    done = build("--variant", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"{image}: there already" in done.stdout
    assert image.read_bytes() == b"not a real image"


def test_building_says_what_is_missing(project: Project) -> None:
    done = build(path="/nonexistent")
    assert done.returncode == 1
    assert "apptainer was not found" in done.stderr and "Traceback" not in done.stderr
    done = build("--base", "/nonexistent/root")
    assert done.returncode == 2
    assert "/nonexistent/root: no such folder" in done.stderr


def test_a_build_that_fails_leaves_nothing(project: Project, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    apptainer = tools / "apptainer"
    apptainer.write_text("#!/bin/sh\nfor image; do last2=$last; last=$image; done\n"
                         'echo half >"$last2"\nexit 3\n')  # fmt: skip
    apptainer.chmod(0o755)
    done = build("--variant", "cpu", path=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "exit code 3" in done.stderr and "Traceback" not in done.stderr
    left = {path.name for path in (project.root / "containers/images").iterdir()}
    assert left == {".lock"}


def test_the_definition_names_every_lock_it_installs() -> None:
    definition = (ROOT / "containers/drama.def").read_text(encoding="utf-8")
    for name in ("run", "report", "cuda", "kernels"):
        assert f"containers/{name}.lock /opt/drama/locks/{name}.lock" in definition
