"""What a report says and where it is to be: read from a plan's runs, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drama.pipeline.artifacts.status import RunStatus
from drama.pipeline.plans import read_plan
from drama.report.aggregates import Aggregates, aggregate
from drama.report.missing import Missing, grouped, missing_runs, nothing_to_report
from drama.report.scores import (
    Baselines,
    GameScore,
    RunScore,
    load_baselines,
    read_scores,
    scored,
)
from drama.report.words import SEPARATOR, count


@dataclass(frozen=True)
class Report:
    """A written report: where it is and what it says."""

    path: Path  # index.html
    stamp: Path
    fingerprint: str  # of the plan
    preset: str
    complete_protocol: bool  # of the plan, whether or not its runs are all there
    games: tuple[GameScore, ...]
    missing: tuple[RunStatus, ...]  # planned runs without a score, in the plan's order
    aggregates: Aggregates | None  # None when no game has published reference values
    baselines: Baselines = field(repr=False)

    @property
    def runs(self) -> list[RunScore]:
        """All runs, in the order of games."""
        return [run for game in self.games for run in game.runs]

    @property
    def reproduction(self) -> bool:
        """Whether these are all runs of the whole Atari100k protocol."""
        return self.complete_protocol and not self.missing

    @property
    def partial(self) -> str | None:
        """How many of the planned runs it shows, "37 of 130 runs"; None when it shows all."""
        shown = f"{len(self.runs)} of {count(len(self.planned), 'run')}"
        return shown if self.missing else None

    @property
    def planned(self) -> list[RunScore | RunStatus]:
        """All planned runs, those that it shows first."""
        return [*self.runs, *self.missing]

    @property
    def planned_games(self) -> int:
        """How many games are planned."""
        return len({run.game for run in self.planned})

    @property
    def missing_by_state(self) -> list[Missing]:
        """The missing runs, a group of each state."""
        return grouped(self.missing, (run.game for run in self.planned))

    @property
    def origin(self) -> dict[str, Any]:
        """What each of the report's documents says of where its numbers come from."""
        origin = {"format": 1, "preset": self.preset, "reproduction": self.reproduction}
        return {**origin, **self.counts}

    @property
    def counts(self) -> dict[str, Any]:
        """What a partial report's documents say of its runs; nothing when all are there."""
        runs = {"done": len(self.runs), "planned": len(self.planned)}
        return {"partial": True, "runs": runs} if self.missing else {}

    @property
    def label(self) -> str | None:
        """What must stand beside every number; None for all runs of the full protocol."""
        protocol = None if self.complete_protocol else f"preset {self.preset}: not a reproduction"
        return SEPARATOR.join(filter(None, (protocol, self.partial))) or None


def read_report(results: Path, recipes: Path | None = None) -> Report:
    """Read what recipes/report.json lists of results/<preset>; nothing is written.

    `recipes` is another place of plan and recipes than there, such as a campaign's.

    Raises ReportError when a run is damaged or none is whole.
    """
    plan = read_plan(results, recipes)
    baselines = load_baselines()
    games = read_scores(plan, baselines)
    if not games:
        raise nothing_to_report(plan)
    missing = missing_runs(plan, games)
    normalised = [
        np.array([run.human_normalised_score for run in game.runs], dtype=np.float64)
        for game in scored(games)
    ]
    folder = results / "report"
    # The plan's own stamp would tell Snakemake that its runs are in the report.
    current = all(run.current for game in games for run in game.runs)
    kind = "-partial" if missing else "" if current else "-earlier"
    return Report(
        path=folder / "index.html",
        stamp=folder / f"report-{plan.fingerprint[:16]}{kind}.json",
        fingerprint=plan.fingerprint,
        preset=plan.preset,
        complete_protocol=plan.complete_protocol,
        games=games,
        missing=missing,
        aggregates=aggregate(normalised) if normalised else None,
        baselines=baselines,
    )
