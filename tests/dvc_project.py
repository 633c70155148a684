"""A project of toy size under git and DVC, with two whole runs, for the tests of what DVC keeps."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from test_pipeline import EXPERIMENT, PRESET, ROOT, Project, copy_sources

GAMES = ("Boxing", "Pong")
STAGES = 2 + 2 * len(GAMES)
# Every command in one process: what takes time here is importing torch.
TRAIN = """
import sys, torch
from pathlib import Path
from drama.pipeline.jobs import evaluate_run, train_run
from drama.pipeline.recipes import plan, read_evaluation_recipe, read_recipe
from drama.report import write_report
from drama.agent.training.runtime import Runtime

planned = plan(Path("config/config.yaml"))
for run in planned.runs:
    files = read_recipe(run.recipe)
    train_run(files, Runtime(torch.device("cpu"), threads=1, checkpoint_every=1000))
    evaluate_run(files, read_evaluation_recipe(files), torch.device("cpu"), 1)
write_report(planned.results)
"""


@dataclass(frozen=True)
class Clone(Project):
    """A clone of the project; `dvc push` goes to a folder beside it."""

    def git(self, *arguments: str) -> str:
        names = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        return self.run("git", *names, *arguments)

    def commit(self) -> None:
        """Commit everything to git that git does not ignore."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=Results")

    def clone(self, root: Path) -> Clone:
        """Clone from this clone's last commit, as another user would."""
        subprocess.run(["git", "clone", "--quiet", str(self.root), str(root)], check=True)
        return Clone(root)

    def copy(self, root: Path) -> Clone:
        """Copy everything: this clone, its DVC cache and the remote beside it.

        Hard links stay hard links: the files of runs are links into DVC's cache.
        """
        root.mkdir()
        subprocess.run(["cp", "--archive", f"{self.root.parent}/.", str(root)], check=True)
        return Clone(root / self.root.name)

    def folder(self, game: str) -> Path:
        return self.root / f"results/tiny/runs/{game}/seed0"

    def lock(self) -> str:
        return (self.root / "dvc.lock").read_text(encoding="utf-8")

    def blobs(self, game: str) -> dict[str, str]:
        """What a run's record says of the files that DVC keeps."""
        listed = self.artifacts(game).items()
        return {path: checksum for path, checksum in listed if path.startswith(("check", "replay"))}

    def present(self, game: str) -> dict[str, str]:
        """Which of them are here, and their checksums."""
        files = {name: self.folder(game) / name for name in self.blobs(game)}
        return {name: sha256(path) for name, path in files.items() if path.exists()}

    def stored(self, folder: Path) -> Iterator[Path]:
        """Every file in a DVC cache, but what a kill left half-copied beside them."""
        files = (folder / "files/md5").glob("??/*")
        yield from (path for path in files if path.suffix != ".tmp")

    def assert_cache_is_sound(self) -> None:
        """DVC's cache names files by their MD5: nothing has been written through a link."""
        for path in self.stored(self.root / ".dvc/cache"):
            named = path.parent.name + path.name.removesuffix(".dir")
            assert hashlib.md5(path.read_bytes()).hexdigest() == named, path

    def remote_blob(self, game: str, name: str = "checkpoint.parquet") -> Path:
        """Where the remote keeps a run's file."""
        md5 = hashlib.md5((self.folder(game) / name).read_bytes()).hexdigest()
        return self.root.parent / "drama-artifacts/files/md5" / md5[:2] / md5[2:]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_project(root: Path) -> Clone:
    """A fresh project under git, with nothing trained."""
    root.mkdir(parents=True)
    clone = Clone(copy_sources(root).root)
    (root / "config/config.yaml").write_text(EXPERIMENT, encoding="utf-8")
    preset = PRESET.replace("total_steps: 160", "total_steps: 60")
    (root / "config/presets/tiny.yaml").write_text(preset, encoding="utf-8")
    (root / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    (root / "local").symlink_to("workflow/profiles/local")
    clone.git("init", "--quiet")
    clone.run("drama", "stages")
    clone.commit()
    return clone


def make_trained(root: Path) -> Clone:
    """A project with two whole runs, their evaluations and the report; nothing in DVC yet."""
    clone = make_project(root)
    clone.run("python", "-c", TRAIN)
    return clone


def records(clone: Clone) -> dict[str, str]:
    """Every run's fingerprint, by game."""
    files = clone.results("runs/*/seed0/run-*.json")
    return {f.parts[-3]: json.loads(f.read_text(encoding="utf-8"))["fingerprint"] for f in files}


def record_of(clone: Clone, game: str) -> Path:
    """A run's record, from the project's root."""
    (path,) = clone.folder(game).glob("run-*.json")
    return path.relative_to(clone.root)
