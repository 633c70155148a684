"""How every planned run is getting on, told from files alone, so that any node can tell it.

A run's trainer writes status.json every few seconds and holds the lock of the run's folder. A
status that says "running" while nobody holds the lock is of a trainer that was killed. A lock that
another node holds may not be seen everywhere, so there a fresh status counts as well.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from drama.agent.settings import Count
from drama.errors import shown
from drama.pipeline.artifacts.evaluations import EvaluationDamaged, read_evaluation
from drama.pipeline.config import no_plan
from drama.pipeline.history import earlier_run, noted_evaluation
from drama.pipeline.plans import PlannedRun, read_plan
from drama.reading import open_regular, read_model
from drama.runs.folder import SHORT, STATUS
from drama.runs.locks import died_here, read_holder
from drama.runs.progress import Status

SILENCE = 120.0
"""Seconds without a word after which a trainer on another node is taken for dead."""

TAIL = 4096
"""Bytes at a log's end among which its last line is looked for."""

DETAIL = 1000
"""Characters of it, or of a trainer's message, that are told."""

BELOW = 3
"""Folders below a place that results are looked for in: results/learn/catch/ lies two below."""

AGES = 1e10
"""Seconds that no run takes: a speed is wrong that asks for them."""

OTHERS = ("recipes", "runs", "report", "superseded", "logs", "replay", "campaigns")
"""Folders of results that hold no results themselves, and many files."""

COLOURS = {
    "waiting": "dim", "running": "cyan", "stopped": "yellow", "lost": "yellow",
    "trained": "blue", "done": "green", "earlier code": "green", "failed": "red",
}  # fmt: skip
"""Every state of a run, and how it is coloured."""


@dataclass(frozen=True)
class RunStatus:
    """How one run is getting on.

    Attributes:
        game: name of the game.
        seed: the run's seed.
        state: waiting; running; stopped, on request and resumable; lost, when its process is gone
            without a word, resumable as well; trained; done, when it is evaluated too; earlier
            code, when a whole run of the same settings and of earlier code lies there; failed.
        step: agent steps done, None before the first.
        total_steps: agent steps to do; None where neither the run nor its recipe says.
        steps_per_second: lately, None when it is not running.
        last_return: of the last training episode; the evaluation's mean when it is done.
        detail: for a failed run, the last line of its log; what is wrong with its evaluation.
        commit: that a run of earlier code was made at.
    """

    game: str
    seed: int
    state: str
    step: int | None = None
    total_steps: int | None = None
    steps_per_second: float | None = None
    last_return: float | None = None
    detail: str = ""
    commit: str = ""


def planned_results(places: Sequence[Path]) -> list[Path]:
    """Return the results folders that hold a plan: the places themselves, and those below them.

    Raises:
        ConfigurationError: when a place has none.
    """
    found: list[Path] = []
    for place in places:
        here = list(_results_below(place, BELOW))
        if not here:
            raise no_plan(place)
        found += here
    return list(dict.fromkeys(found))


def _results_below(place: Path, depth: int) -> Iterator[Path]:
    if (place / "recipes" / "report.json").is_file():
        yield place
    if not depth or not place.is_dir():
        return
    with os.scandir(place) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    for name in sorted(names):
        if name not in OTHERS and not name.startswith("."):
            yield from _results_below(place / name, depth - 1)


def read_statuses(results: Path) -> list[RunStatus]:
    """Return how the runs that were planned last are getting on, in the plan's order.

    Raises:
        ConfigurationError: when the plan cannot be read.
    """
    return [read_status(run) for run in read_plan(results).runs]


def read_status(run: PlannedRun) -> RunStatus:
    """Return how a run is getting on."""
    return _status(run, alive=_is_alive)


def as_written(run: PlannedRun) -> RunStatus:
    """Return how a run is getting on by its files alone, so that the same files say the same.

    Neither locks nor the clock are looked at: a run that was killed while it was running is running
    still, since that is what it wrote last.
    """
    return _status(run, alive=lambda *_: True)


def _status(run: PlannedRun, alive: Callable[[Path, str], bool]) -> RunStatus:
    logs = run.results / "logs" / run.game / f"seed{run.seed}"
    found, live = RunStatus(run.game, run.seed, "waiting"), Status.read(run.folder / STATUS)
    if live and live.fingerprint == run.fingerprint:
        steps, last = (live.step, live.total_steps), live.last_return
        found = RunStatus(run.game, run.seed, live.state, *steps, last_return=last)
    else:
        live = None
    if run.record.exists():
        score, trouble = _score(run.evaluation)
        if score is not None:
            return replace(found, state="done", last_return=score)
        log = _last_line(logs / f"evaluate-{run.evaluation_fingerprint[:SHORT]}.log")
        return replace(found, state="trained", detail=trouble or log)
    if made := earlier_run(run.folder, run.recipe):
        noted = noted_evaluation(run.folder)
        score, trouble = _score(run.folder / noted.name) if noted else (None, "")
        found = replace(found, step=made.steps, total_steps=made.steps, commit=made.commit)
        return replace(found, state="earlier code", last_return=score, detail=trouble)
    if live and live.state == "failed":
        log = _last_line(logs / f"train-{run.fingerprint[:SHORT]}.log")
        return replace(found, detail=log or _line(live.message))
    if live and live.state in ("running", "done"):  # a record comes a moment after the last step
        if not alive(run.folder, live.updated):
            return replace(found, state="lost")
        return replace(found, state="running", steps_per_second=live.steps_per_second or None)
    if found.total_steps is None:
        return replace(found, total_steps=planned_steps(run.recipe))
    return found


def planned_steps(recipe: Path) -> int | None:
    """Return the agent steps that a recipe asks for; None when it does not say."""
    try:
        return read_model(recipe, _Recipe).settings.training.total_steps
    except (OSError, ValueError):  # ValidationError is a ValueError
        return None


class _Training(BaseModel):
    total_steps: Count


class _Settings(BaseModel):
    training: _Training


class _Recipe(BaseModel):
    settings: _Settings


def _score(path: Path) -> tuple[float | None, str]:
    """Return an evaluation's mean return, or why there is none; neither where it is not there."""
    if not path.exists():
        return None, ""
    try:
        return read_evaluation(path).score.mean_return, ""
    except EvaluationDamaged as error:
        return None, _line(str(error))


def _is_alive(folder: Path, updated: str) -> bool:
    """Say whether the trainer that wrote a status lives."""
    if read_holder(folder):
        return True
    if died_here(folder):
        return False
    try:
        silence = datetime.now(UTC) - datetime.fromisoformat(updated)
    except (ValueError, TypeError):
        return False
    return silence.total_seconds() < SILENCE


def _last_line(path: Path) -> str:
    """Return a log's last line that says something; nothing when there is none."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read(TAIL).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return ""
    return _line(next((line for line in reversed(lines) if line.strip()), ""))


def _line(text: str) -> str:
    """Return what a log or a trainer says as one line for a terminal."""
    return shown(" ".join(text.split()), DETAIL)


# --- for people ----------------------------------------------------------------------------------


def counted(runs: Sequence[RunStatus]) -> str:
    """Return how many runs there are, and how many in each state."""
    found = Counter(run.state for run in runs)
    states = ", ".join(f"{found[state]} {state}" for state in COLOURS if found[state])
    return f"{plural(len(runs), 'run')}: {states}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: 1 run, 2 runs."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a time for reading: in minutes below an hour, in days from two days on."""
    if not 0 <= seconds < AGES:
        return "ages" if seconds > 0 else "0 min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
