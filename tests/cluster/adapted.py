"""Copies of the project that can use the image, their cluster profile adapted to this Slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

from test_pipeline import EXPERIMENT, Project, copy_sources

from drama.pipeline.artifacts.image import note_of

ADAPTED = {"slurm_partition": "gpu", "slurm_account": "testing", "gpu_model": "h200"}


def cluster_project(root: Path, image: Path, seeds: list[int]) -> Project:
    """Copy the project, with its cluster profile adapted by editing the three marked lines.

    Runs are long enough to be disturbed: they save at step 2000, after random play, and then learn.
    The first five minutes, after which they would save by themselves, they never reach.
    """
    project = copy_sources(root)
    (root / "cluster").symlink_to("workflow/profiles/cluster")
    (root / "config/config.yaml").write_text(
        EXPERIMENT.replace("[0]", str(seeds)), encoding="utf-8"
    )
    project.replace("config/presets/tiny.yaml", "total_steps: 160", "total_steps: 3000")
    project.replace("config/presets/tiny.yaml", "random_steps: 40", "random_steps: 1990")
    threads = "--threads {threads}"
    project.replace("workflow/rules/train.smk", threads, f"{threads} --checkpoint-every 2000")
    adapt(root / "workflow/profiles/cluster/config.yaml")
    lend_image(root, image)
    return project


def lend_image(root: Path, image: Path) -> None:
    """Put the image and its note where a copy of the project looks for them."""
    for file in (image, note_of(image)):
        place = root / "containers/images" / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.hardlink_to(file)
        except OSError:  # on another file system
            shutil.copy(file, place)


def adapt(profile: Path) -> None:
    """Give the marked lines this cluster's values, and touch no other line."""
    lines = profile.read_text(encoding="utf-8").splitlines(keepends=True)
    marked = [number for number, line in enumerate(lines) if "# <-" in line]
    assert len(marked) == len(ADAPTED) == 3
    for number in marked:
        key = lines[number].split(":")[0].strip()
        lines[number] = f"  {key}: {ADAPTED[key]}\n"
    profile.write_text("".join(lines), encoding="utf-8")
