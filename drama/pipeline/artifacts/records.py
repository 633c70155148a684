"""What a whole run left in its folder, read back: its record and its evaluations.

Runs of any age are read: settings that they could not have known are filled in
(`drama.pipeline.history`).
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from drama.agent.settings import Count, Fingerprint, Recipe
from drama.errors import ConfigurationError, DramaError, reason
from drama.files import canonical_json, sha256_file, sha256_text
from drama.pipeline import history
from drama.pipeline.artifacts.evaluations import Evaluation, EvaluationDamaged, read_evaluation
from drama.pipeline.artifacts.stages import EXPERIMENT, results_folder
from drama.pipeline.config import load_experiment
from drama.pipeline.names import Backend, Bytes, Commit, Device, Library, Seconds, Time, Version
from drama.pipeline.plans import PlannedRun
from drama.pipeline.recipes import results_of, shortened
from drama.reading import read_model
from drama.runs.folder import CHECKPOINT, SHORT, SUPERSEDED, short_commit

FILES = r"^((checkpoint|episodes|training)\.parquet|replay/part-[0-9]{5,9}\.parquet)$"
"""What a run records; no record names a file elsewhere."""


MENDED = "`git checkout` brings it back, or `drama train` where the checkpoint is"


class Damaged(DramaError):
    """A record, or a file that it names, is not what it was."""


class OtherCode(DramaError):
    """A run that today's code cannot make sense of, though nothing is damaged."""


class Artifact(BaseModel):
    """A file of a run: its path in the run's folder, its checksum and its size."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: Annotated[str, Field(pattern=FILES)]
    sha256: Fingerprint
    bytes: Bytes


def _each_once(artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    if len({item.path for item in artifacts}) < len(artifacts):
        raise ValueError("a file is named twice")
    return artifacts


class Record(BaseModel):
    """What run-<fingerprint>.json says; keys that are not known are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)

    artifacts: Annotated[
        tuple[Artifact, ...], Field(max_length=100_000), AfterValidator(_each_once)
    ]
    format: Literal[1]
    fingerprint: Fingerprint
    recipe: dict[str, Any]
    versions: Annotated[dict[Library, Version], Field(max_length=100)]
    device: Device
    backend: Backend
    wall_seconds: Seconds
    steps: Count
    git_commit: Commit | None
    finished: Time
    image: Fingerprint | None = None


@dataclass(frozen=True)
class RecordedRun:
    """A whole run.

    Attributes:
        path: its record.
        record: what that says.
        recipe: the recorded recipe, as today's code understands it.
    """

    path: Path
    record: Record
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.path.parent

    @property
    def fingerprint(self) -> str:
        """The run's fingerprint, in full."""
        return self.record.fingerprint

    @property
    def checkpoint(self) -> Artifact:
        """The checkpoint, as it was recorded."""
        return next(item for item in self.record.artifacts if item.path == CHECKPOINT)

    @property
    def weights(self) -> Path:
        """Where its weights are exported to."""
        return self.folder / f"weights-{self.fingerprint[:SHORT]}.safetensors"

    @property
    def commit(self) -> str:
        """The commit that the run was made at, for people: shortened."""
        return short_commit(self.record.git_commit or "unknown")

    @property
    def stage(self) -> str:
        """What DVC calls the making of the run, such as train@Pong-0."""
        return f"train@{self.recipe.game}-{self.recipe.seed}"

    @property
    def remedy(self) -> str:
        """What brings back the run's large files, for people."""
        if self.recipe.ancestor is not None:  # in results of its own, unknown to dvc.yaml
            return "put back a copy"
        return f"`dvc pull {self.stage}`"


def record_of(planned: PlannedRun) -> Path | None:
    """Return a planned run's record, or that of earlier code in its place; None without either."""
    if planned.record.is_file():
        return planned.record
    made = history.earlier_run(planned.folder, planned.recipe)
    return made.record if made else None


def find_records(places: Sequence[Path] | None = None) -> list[Path]:
    """Return the records of all whole runs at or below the given places.

    Args:
        places: recipes, records, or folders of any level from a run's to `results`; by default
            the results that config/config.yaml names.

    Raises:
        ConfigurationError: when a place holds no whole run.
    """
    if not places:
        places = [Path(results_folder(load_experiment(EXPERIMENT)))]
    return [record for place in places for record in _records_at(place)]


def find_record(place: Path) -> Path:
    """Return the record of the one whole run that a recipe, a record or a folder stands for.

    Raises:
        ConfigurationError: when there is none, or more than one.
    """
    found = find_records([place])
    if len(found) > 1:
        raise ConfigurationError(f"{place}: {len(found)} whole runs there. Name one run's folder")
    return found[0]


def _records_at(place: Path) -> list[Path]:
    if place.is_file() and place.match("run-*.json"):
        return [place]
    folder = place
    if place.suffix == ".json":  # results/<preset>/recipes/<Game>/seed<k>.json
        folder = shortened(results_of(place)) / "runs" / place.absolute().parent.name / place.stem
    found = sorted(
        Path(below, name)
        for below, _, names in os.walk(folder, onerror=_raise_unless_missing)
        for name in fnmatch.filter(names, "run-*.json")
        if SUPERSEDED not in Path(below).relative_to(folder).parts
    )
    if not found:
        what = "no whole run there" if place.exists() else "not found"
        raise ConfigurationError(
            f"{place}: {what}. Name a recipe, a run's folder or a preset's results, "
            "such as results/xs"
        )
    return found


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def read_record(path: Path) -> RecordedRun:
    """Read a whole run's record.

    Raises:
        Damaged: when it is not one, or not this run's.
        OtherCode: when its recipe says what today's code does not know.
    """
    try:
        record = read_model(path, Record)
        fingerprint = sha256_text(canonical_json(record.recipe))
    except (OSError, ValueError, RecursionError) as error:  # ValidationError is a ValueError
        raise Damaged(f"{path} cannot be read ({reason(error)}); {MENDED}") from None
    if fingerprint != record.fingerprint or path.stem != f"run-{fingerprint[:SHORT]}":
        raise Damaged(
            f"{path} says {record.fingerprint[:SHORT]}, but its recipe's fingerprint is "
            f"{fingerprint[:SHORT]}; {MENDED}"
        )
    if CHECKPOINT not in {item.path for item in record.artifacts}:
        raise Damaged(f"{path} lists no {CHECKPOINT}; {MENDED}")
    return RecordedRun(path, record, known_recipe(record.recipe, path.name, record.git_commit))


def known_recipe(recorded: dict[str, Any], source: str, commit: str | None) -> Recipe:
    """Parse a recipe that was recorded at a commit.

    Raises:
        OtherCode: when it says what today's code does not know.
    """
    try:
        return history.read_recipe(recorded, source)
    except ConfigurationError as error:
        raise OtherCode(
            f"{error}. Today's code does not know this; the code of commit "
            f"{short_commit(commit or 'unknown')} does"
        ) from None


def compare(run: RecordedRun) -> tuple[list[Artifact], list[Artifact]]:
    """Hold a run's files to its record; returns those that are not here and those that changed."""
    missing, changed = [], []
    for item in run.record.artifacts:
        path = run.folder / item.path
        if not path.is_file():
            missing.append(item)
        elif path.stat().st_size != item.bytes or sha256_file(path) != item.sha256:
            changed.append(item)
    return missing, changed


def evaluations_of(run: RecordedRun) -> list[Evaluation]:
    """Read all evaluations that lie in a run's folder.

    Raises:
        Damaged: when one cannot be read or is another run's.
    """
    found = []
    for path in sorted(run.folder.glob("evaluation-*.parquet")):
        try:
            found.append(read_evaluation(path))
        except EvaluationDamaged as error:
            raise Damaged(f"{error}, or `git checkout` brings it back") from None
        if found[-1].run != run.fingerprint:
            raise Damaged(
                f"{path.name} is not this run's evaluation; `git checkout` brings it back"
            )
    return found
