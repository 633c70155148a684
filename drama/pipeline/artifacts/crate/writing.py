"""A campaign's results as a Workflow Run RO-Crate: one folder that can be archived as it is.

Files lie in a crate as they do in results/<preset>, so the other commands read a crate, too. What
it says of them is in `provenance`, by means of `graph`; `croissant` describes the tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from drama.errors import ConfigurationError
from drama.pipeline.artifacts.crate.folders import replacing_folder
from drama.pipeline.artifacts.crate.provenance import MADE_BY, METADATA, WORKFLOW, Provenance
from drama.pipeline.artifacts.crate.runs import read_run
from drama.pipeline.artifacts.records import Artifact
from drama.pipeline.artifacts.status import plural
from drama.pipeline.plans import read_plan
from drama.reading import read_model

LARGEST = 1 << 28
"""Bytes of a crate's metadata: some thousand for each file in it."""
CRATES = Path("crates")
"""Where crates go when no other folder is named."""


@dataclass(frozen=True)
class Crate:
    """A written crate.

    Attributes:
        folder: where it is.
        bytes: of the files in it.
        summary: which of the planned runs it holds, such as "37 of 130 runs".
        absent: the large files that it describes and does not hold.
        report: what to know about the report in it, or why there is none; mostly nothing.
        at_hand: whether any of these is here all the same.
    """

    folder: Path
    bytes: int
    summary: str
    absent: tuple[Artifact, ...]
    report: str
    at_hand: bool

    def lines(self) -> Iterator[str]:
        """Yield what to say of it."""
        yield f"{self.folder}: {self.summary}, {_size(self.bytes)}"
        if self.absent:
            size = _size(sum(item.bytes for item in self.absent))
            why = "--with-large puts in those here" if self.at_hand else "they are not here"
            yield f"Named and not in it: {plural(len(self.absent), 'large file')}, {size}; {why}"
        if self.report:
            yield self.report


def write_crate(results: Path, folder: Path | None = None, *, with_large: bool = False) -> Crate:
    """Write a crate of the runs that are trained, whole or not at all; an earlier one is replaced.

    Args:
        results: a preset's results.
        folder: where the crate is to be; crates/<preset> by default.
        with_large: put checkpoints and replay into it as well, where they are here.

    Raises:
        ConfigurationError: when there is no plan or no trained run, the working directory is not
            the project's root, or something else lies in the crate's place.
        Damaged, OtherCode: when a run's files are not those that it recorded.
        ModuleNotFoundError: where rocrate is not installed.
    """
    plan = read_plan(results)
    folder = folder or CRATES / results.resolve().name
    if not WORKFLOW.is_file():
        raise ConfigurationError(f"{WORKFLOW}: not found; run this from the project's root")
    if folder.resolve().is_relative_to(results.resolve()):
        raise ConfigurationError(f"{folder}: in the results themselves. Name another folder")
    runs = [run for run in map(read_run, plan.runs) if run]
    if not runs:
        raise ConfigurationError(
            f"{results}: {plural(len(plan.runs), 'run')} planned and none of them trained yet, so "
            f"there is nothing to put into a crate. `drama status {results}` says how they get on"
        )
    contents = Provenance(plan, runs, with_large)
    with replacing_folder(folder, _stray) as staging:
        contents.write(staging)
    return Crate(
        folder=folder,
        bytes=contents.graph.bytes,
        summary=contents.summary,
        absent=tuple(contents.absent),
        report=contents.report_note,
        at_hand=contents.at_hand,
    )


class _Thing(BaseModel):
    id: Annotated[str, Field(alias="@id")]
    description: str = ""


class _Metadata(BaseModel):
    graph: Annotated[list[_Thing], Field(alias="@graph")]


def _stray(folder: Path) -> str | None:
    """Return what lies in a folder that no earlier crate put there; None when nothing does."""
    try:
        things = read_model(folder / METADATA, _Metadata, LARGEST).graph
    except (OSError, ValueError):  # ValidationError is one
        return next((path.name for path in sorted(folder.iterdir())), None)
    known = {thing.id: thing.description for thing in things}
    if not known.get(METADATA, "").startswith(MADE_BY):
        return METADATA
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in files)
    return next((name for name in names if name not in known), None)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
