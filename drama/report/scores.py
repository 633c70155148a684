"""Scores of finished runs: read, normalised, aggregated, set beside the published methods.

A run's score is the mean return of its evaluation episodes, played with the actions that its
settings name (greedy, as published, or sampled); a game's score is the mean over its runs ("Drama",
arXiv 2410.08893, section 3). Nothing here looks at a clock or at the file system beyond the files
that the plan names, so the same inputs always give the same numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from drama.agent.settings import Actions
from drama.errors import DramaError, cut, reason
from drama.files import sha256_file
from drama.pipeline.artifacts.evaluations import (
    Evaluation,
    EvaluationDamaged,
    Played,
    read_evaluation,
)
from drama.pipeline.artifacts.records import Artifact, Record
from drama.pipeline.history import earlier_run, noted_evaluation
from drama.pipeline.names import Game
from drama.pipeline.plans import Plan, PlannedRun
from drama.reading import read_model, read_table, read_text
from drama.report.aggregates import Aggregates, aggregate

PROTOCOL_STEPS = 100_000
"""Agent steps of the Atari100k protocol (400 000 frames)."""
PROTOCOL_EPISODES = 100
PROTOCOL_SEEDS = 5
TRAINING_EPISODES = 10
"""How many of the last training episodes make a run's training return, all where there are fewer.

Some publications (DreamerV3) evaluate nothing and give the mean return of the last episodes that
were played while training, with sampled actions. A number of episodes, not a share of the steps:
in games whose episodes last thousands of steps, a tenth of the steps holds a handful or none.
"""

DRAMA = "Drama"
FAMILIES = {
    "World models": (
        "Drama", "SimPLe", "TWM", "IRIS", "STORM", "DreamerV3", "DreamerV3_2023", "DIAMOND",
        "HarmonyDream", "DeltaIRIS", "REM", "Simulus", "DART", "SGF", "TWISTER", "EDELINE",
    ),
    "Search": ("EfficientZero", "EfficientZeroV2"),
    "Model-free": ("SPR", "SR-SPR", "BBF", "PPO"),
}  # fmt: skip


LARGEST = 1 << 28
"""Bytes of a run's curves when they are unpacked."""
BOUND = 1e15
"""Beyond what any game pays; sums and squares of it are still numbers."""


class ReportError(DramaError):
    """A report cannot be made from these files; the text says why and what to do."""


@dataclass(frozen=True)
class Baselines:
    """Published mean returns per game, with the reference values that scores are normalised by."""

    methods: tuple[str, ...]
    returns: dict[str, dict[str, float]]  # game -> method -> mean return; absent where unpublished
    random: dict[str, float]
    human: dict[str, float]
    single_source: frozenset[str]  # games whose value of Drama rests on one reading

    @property
    def games(self) -> tuple[str, ...]:
        """The games with reference values, in the benchmark's order."""
        return tuple(self.random)

    def published(self, method: str, game: str) -> float | None:
        """A method's published mean return in a game; None where there is none."""
        return self.returns.get(game, {}).get(method)

    def normalise(self, game: str, score: float | None) -> float | None:
        """Human-normalised score of a mean return; None without a return or a reference."""
        if score is None or game not in self.random:
            return None
        return human_normalised_score(score, self.random[game], self.human[game])


@dataclass(frozen=True)
class RunScore:
    """What one run reached, and where that came from."""

    game: str
    seed: int
    mean_return: float
    standard_deviation: float  # over episodes, dividing by their number
    episodes: int
    human_normalised_score: float | None
    steps: int
    device: str
    wall_seconds: float
    run: str
    evaluation: str
    git_commit: str | None
    folder: Path
    actions: Actions  # that the score was played with
    played: Mapping[Actions, Played]  # the score's episodes, and those played beside them
    different: int  # of the score's episodes
    truncated: int  # likewise
    training_return: float | None  # mean over the last training episodes; None without one
    training_episodes: int
    current: bool  # the planned run and evaluation, not those of earlier code

    def return_by(self, way: Actions) -> float | None:
        """Mean return with actions chosen in one way; None where that was not played."""
        return self.played[way].mean_return if way in self.played else None


@dataclass(frozen=True)
class GameScore:
    """One game's runs and the mean over them."""

    game: str
    runs: tuple[RunScore, ...]
    human_normalised_score: float | None

    @cached_property
    def mean_return(self) -> float:
        """Mean over the runs of their mean returns."""
        return float(np.mean([run.mean_return for run in self.runs]))

    @cached_property
    def training_return(self) -> float | None:
        """Mean over the runs of their training returns; None unless every run has one."""
        return _mean([run.training_return for run in self.runs])

    def return_by(self, way: Actions) -> float | None:
        """Mean over the runs with actions chosen in one way; None unless all played it."""
        return _mean([run.return_by(way) for run in self.runs])


def scored(games: Sequence[GameScore]) -> list[GameScore]:
    """Return the games that have published reference values."""
    return [game for game in games if game.human_normalised_score is not None]


def over_means(games: Sequence[GameScore]) -> Aggregates:
    """Aggregate the games' means, one value per game, as far as publications go."""
    return aggregate([np.array([game.human_normalised_score]) for game in games])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def human_normalised_score(score: float, random: float, human: float) -> float:
    """A mean return on the scale where random play is 0 and a human tester is 1.

    Raises ValueError when the two reference values are equal.
    """
    if human == random:
        raise ValueError(f"human and random reference are both {human}: the scale has no unit")
    return (score - random) / (human - random)


def load_baselines() -> Baselines:
    """The published results kept beside this module (baselines.csv; sources in baselines.md)."""
    with resources.as_file(resources.files("drama.report") / "baselines.csv") as path:
        return read_baselines(path)


def read_baselines(path: Path) -> Baselines:
    """Read published results; raises ReportError when they are not such a table."""
    try:
        return _baselines(list(csv.DictReader(read_text(path).splitlines(), strict=True)))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ReportError(f"{path}: no table of published results ({reason(error)}); put back "
                          "the project's own") from None  # fmt: skip


def _baselines(rows: Sequence[Mapping[str, str]]) -> Baselines:
    methods = tuple(name for family in FAMILIES.values() for name in family)
    known = TypeAdapter(Game)
    if unscaled := [row["game"] for row in rows if _number(row["Human"]) == _number(row["Random"])]:
        raise ValueError(f"human and random play are the same in {cut(unscaled[0])}")
    returns = {
        known.validate_python(row["game"]): {n: _number(row[n]) for n in methods if row[n]}
        for row in rows
    }
    return Baselines(
        methods=tuple(name for name in methods if any(name in game for game in returns.values())),
        returns=returns,
        random={row["game"]: _number(row["Random"]) for row in rows},
        human={row["game"]: _number(row["Human"]) for row in rows},
        single_source=frozenset(r["game"] for r in rows if r["Drama_status"] == "single-source"),
    )


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= BOUND:
        raise ValueError(f"{cut(text)} is no return")
    return value


def read_scores(plan: Plan, baselines: Baselines) -> tuple[GameScore, ...]:
    """Read the score of every whole run, grouped by game, in the plan's order of games.

    A run that is not both trained and evaluated is left out, and so is a game without any other.
    Raises ReportError naming every run that is damaged and the command that makes it.
    """
    games: dict[str, list[RunScore]] = {run.game: [] for run in plan.runs}
    problems = []
    for run in plan.runs:
        try:
            if at_hand := _at_hand(run):
                games[run.game].append(read_run(*at_hand, baselines))
        except ReportError as error:
            problems.append(str(error))
    if problems:
        shown = "\n".join(problems[:10])
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ReportError(
            f"{len(problems)} of {len(plan.runs)} runs cannot be reported on:\n{shown}{more}"
        )
    return tuple(_game_score(game, runs, baselines) for game, runs in games.items() if runs)


def _game_score(game: str, runs: list[RunScore], baselines: Baselines) -> GameScore:
    ordered = tuple(sorted(runs, key=lambda run: run.seed))
    mean = float(np.mean([run.mean_return for run in ordered]))
    return GameScore(game, ordered, baselines.normalise(game, mean))


def read_run(planned: PlannedRun, current: bool, baselines: Baselines) -> RunScore:
    """Read one run's record and evaluation.

    Raises ReportError when either is damaged or belongs to another run.
    """
    record = _read_record(planned)
    evaluation = _read_evaluation(planned)
    for artifact in record.artifacts:
        if artifact.path in ("episodes.parquet", "training.parquet"):
            _check_artifact(planned, artifact)
    training = read_curve(planned, "episodes.parquet", ["episode_return"])["episode_return"]
    last, score = training[-TRAINING_EPISODES:], evaluation.score
    return RunScore(
        game=planned.game,
        seed=planned.seed,
        mean_return=score.mean_return,
        standard_deviation=float(np.std(score.returns)),
        episodes=score.episodes,
        human_normalised_score=baselines.normalise(planned.game, score.mean_return),
        steps=record.steps,
        device=record.device,
        wall_seconds=record.wall_seconds,
        run=planned.fingerprint,
        evaluation=planned.evaluation_fingerprint,
        git_commit=record.git_commit,
        folder=planned.folder,
        actions=score.actions,
        played=evaluation.played,
        different=score.different,
        truncated=score.truncated,
        training_return=float(np.mean(last)) if last.size else None,
        training_episodes=last.size,
        current=current,
    )


def _at_hand(planned: PlannedRun) -> tuple[PlannedRun, bool] | None:
    """Return the planned run and True, or a whole run of earlier code in its place and False.

    None where neither is trained and evaluated.
    """
    if planned.record.is_file() and planned.evaluation.is_file():
        return planned, True
    run = planned.fingerprint
    if not planned.record.is_file():
        made = earlier_run(planned.folder, planned.recipe)
        if made is None:
            return None
        run = made.fingerprint
    noted = noted_evaluation(planned.folder)
    if noted is None:
        return None
    return replace(planned, fingerprint=run, evaluation_fingerprint=noted.fingerprint), False


def _read_record(planned: PlannedRun) -> Record:
    path = planned.record
    try:
        record = read_model(path, Record)
    except (OSError, ValueError) as error:  # ValidationError is one
        what = f"has an unreadable record, {path} ({reason(error)}); remove it"
        raise _problem(planned, what, "train") from error
    if (found := record.fingerprint) != planned.fingerprint:
        raise _problem(planned, f"has the record of another run, {found!r}, in {path}", "train")
    return record


def _read_evaluation(planned: PlannedRun) -> Evaluation:
    path = planned.evaluation
    try:
        found = read_evaluation(path)
    except EvaluationDamaged as error:
        raise _problem(planned, f"has an unreadable evaluation: {error}", "evaluate") from error
    if any(abs(value) > BOUND for way in found.played.values() for value in way.returns):
        raise _problem(planned, f"has a return beyond {BOUND:g} in {path}", "evaluate")
    if (found.run, found.fingerprint) != (planned.fingerprint, planned.evaluation_fingerprint):
        raise _problem(planned, f"has the evaluation of another run in {path}", "evaluate")
    return found


def _check_artifact(planned: PlannedRun, artifact: Artifact) -> None:
    path = planned.folder / artifact.path
    if not path.is_file():
        state = "is missing"
    elif sha256_file(path) != artifact.sha256:
        state = "is not the file that the run recorded"
    else:
        return
    raise _problem(planned, f"is damaged: {path} {state}. Restore it from version control, or "
        f"remove {planned.record.name} beside it and train again", "train",
    )  # fmt: skip


def _problem(planned: PlannedRun, what: str, command: str) -> ReportError:
    return ReportError(
        f"{planned.game} seed {planned.seed} {what}. Run: drama {command} {planned.recipe}"
    )


def read_curve(
    run: RunScore | PlannedRun, name: str, columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read columns of a run's episodes.parquet or training.parquet as float64 arrays [rows].

    A column that the file lacks is all NaN; null becomes NaN. Raises ReportError when the file
    cannot be read or has no column `step`.
    """
    path = run.folder / name
    try:
        table = read_table(path, None, LARGEST)
        steps = table["step"].to_numpy().astype(np.float64)
        if steps.size and not (steps[0] >= 0 and np.all(np.diff(steps) >= 0) and steps[-1] <= 1e9):
            raise ValueError("its steps are not in order")
        return {"step": steps} | {name: _column(table, name) for name in columns}
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ReportError(
            f"{run.game} seed {run.seed}: {path} cannot be read ({reason(error)}). "
            "Restore it from version control, or remove the record, run-*.json, beside it and "
            "train again."
        ) from error


def _column(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    values = table[name].cast(pa.float64()).to_numpy()
    if np.any(np.abs(values[np.isfinite(values)]) > BOUND):
        raise ValueError(f"{name}: a number beyond {BOUND:g}")
    return values


def published_aggregates(
    baselines: Baselines, method: str, games: Sequence[str]
) -> Aggregates | None:
    """A published method's aggregates over its means per game; None where a game lacks a value.

    Publications give one mean per game, not single runs, so there is no interval, and the
    interquartile mean and optimality gap are those of the games' means.
    """
    scores = [baselines.normalise(game, baselines.published(method, game)) for game in games]
    complete = [np.array([score]) for score in scores if score is not None]
    return aggregate(complete) if scores and len(complete) == len(scores) else None
