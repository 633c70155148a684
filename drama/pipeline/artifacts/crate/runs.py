"""Runs that go into a crate: those of a plan that are trained, or those of earlier code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from drama.pipeline.artifacts.evaluations import Evaluation
from drama.pipeline.artifacts.records import (
    Damaged,
    RecordedRun,
    evaluations_of,
    read_record,
    record_of,
)
from drama.pipeline.plans import PlannedRun


@dataclass(frozen=True)
class CratedRun:
    """A trained run that goes into a crate: as planned, as made, how it was scored."""

    planned: PlannedRun
    made: RecordedRun
    evaluations: tuple[Evaluation, ...]

    @property
    def current(self) -> bool:
        """Whether it is the planned run, not one of earlier code in its place."""
        return self.made.fingerprint == self.planned.fingerprint

    @property
    def name(self) -> str:
        """What its actions' names end with, such as Pong-0."""
        return f"{self.planned.game}-{self.planned.seed}"

    @property
    def finished(self) -> datetime:
        """When it was trained to its end.

        Raises:
            Damaged: when its record does not say so.
        """
        said = self.made.record.finished
        try:
            time = datetime.fromisoformat(said)
            if time.tzinfo is None:
                raise ValueError("no time zone")
            return time
        except ValueError:
            raise Damaged(
                f"{self.made.path}: finished = {said!r} is no time with its zone; `git checkout` "
                "brings it back"
            ) from None

    def place(self, file: str) -> str:
        """Where a file of the run lies in results, and in a crate."""
        return f"runs/{self.planned.game}/seed{self.planned.seed}/{file}"


def read_run(planned: PlannedRun) -> CratedRun | None:
    """Read a planned run, or one of earlier code in its place; None where neither is trained.

    Raises:
        Damaged, OtherCode: when its record or an evaluation of it cannot be read.
    """
    record = record_of(planned)
    if record is None:
        return None
    made = read_record(record)
    return CratedRun(planned, made, tuple(evaluations_of(made)))
