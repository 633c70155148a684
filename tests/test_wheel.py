"""An installed wheel: everything from plan to report in an empty folder, as from a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drama.pipeline.config import SHIPPED

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "results/quick/recipes/Catch8/seed0.json"
# Preset quick, smaller still.
PLAN = ["plan", "--preset", "quick", "--games", "Catch8", "--seeds", "0"] + [
    word
    for assignment in (
        "world_model.channels=[4,8,8]", "training.total_steps=160", "training.random_steps=60",
        "world_model.batch_size=2", "world_model.sequence_length=8", "behaviour.contexts=4",
        "behaviour.horizon=3", "evaluation.episodes=2", "evaluation.environments=2",
    )
    for word in ("--set", assignment)
]  # fmt: skip


def environment(packages: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of this project, built out of its source distribution, lies in.

    A repository of somebody else holds it, as happens to a virtual environment.
    """
    made = tmp_path_factory.mktemp("wheel")
    source = made / "source"
    source.mkdir()
    for name in ("drama", "config"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    (source / "containers").mkdir()
    for name in ("containers/run.lock", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    backend = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    built = subprocess.run(
        [sys.executable, "-c", backend], cwd=source, check=True, capture_output=True, text=True
    )
    subprocess.run(["git", "init", "--quiet"], cwd=made, check=True)
    subprocess.run(
        ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org",
         "commit", "--quiet", "--allow-empty", "--message=Theirs"], cwd=made, check=True,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
         "--no-build-isolation", "--disable-pip-version-check", "--target", made / "packages",
         source / built.stdout.splitlines()[-1]], check=True,
    )  # fmt: skip
    shutil.rmtree(source)
    return made / "packages"


def test_a_wheel_takes_an_empty_folder_from_plan_to_report(packages: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [packages / "bin/drama", *arguments], cwd=tmp_path, env=environment(packages),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    planned = run(*PLAN)
    shipped = packages / "drama/pipeline/shipped/config/config.yaml"
    assert planned.stderr == f"config/config.yaml: not here; planned from {shipped}\n"
    run("train", RECIPE, "--device", "cpu")
    run("evaluate", RECIPE, "--device", "cpu")
    assert "Catch8" in run("report", "results/quick").stdout
    assert "1 done" in run("status").stdout
    assert "all 2 episodes exactly" in run("verify", RECIPE, "--device", "cpu").stdout
    (record,) = (tmp_path / "results/quick/runs/Catch8/seed0").glob("run-*.json")
    assert '"git_commit": null' in record.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"results"}


def test_a_wheel_plans_what_a_checkout_plans(packages: Path, tmp_path: Path) -> None:
    """Each asked where the other's files are not: an empty folder, and the project's own."""
    texts = []
    for place, installed in (("wheel", packages), ("checkout", ROOT)):
        folder = tmp_path / place
        folder.mkdir()
        if place == "checkout":
            for name in ("config", "containers"):
                (folder / name).symlink_to(ROOT / name)
        subprocess.run(
            [sys.executable, "-m", "drama", *PLAN], cwd=folder, env=environment(installed),
            check=True,
        )  # fmt: skip
        recipes = (folder / "results").rglob("*.json")
        texts.append({path.relative_to(folder): path.read_bytes() for path in recipes})
    assert texts[0] == texts[1] and len(texts[0]) == 3


def test_a_checkout_ships_its_own_files_and_nothing_else(packages: Path) -> None:
    for shipped in (SHIPPED, packages / "drama/pipeline/shipped"):
        names = {
            str(path.relative_to(shipped))
            for place in (shipped / "config", shipped / "config/presets", shipped / "containers")
            for path in place.iterdir()
            if path.is_file() and (shipped != SHIPPED or path.suffix != ".md")
        }
        expected = {str(path.relative_to(ROOT)) for path in (ROOT / "config").rglob("*.yaml")}
        assert names == {*expected, "containers/run.lock"}
        assert all((shipped / name).read_bytes() == (ROOT / name).read_bytes() for name in names)
