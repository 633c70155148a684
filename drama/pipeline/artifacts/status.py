"""How every planned run is getting on, told from files alone, so that any node can tell it.

A run's trainer writes status.json every few seconds and holds the lock of the run's folder. A
status that says "running" while nobody holds the lock is of a trainer that was killed. A lock that
another node holds may not be seen everywhere, so there a fresh status counts as well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from drama.pipeline.artifacts.evaluations import EvaluationDamaged, read_noted
from drama.pipeline.config import no_plan
from drama.pipeline.history import earlier_run, noted_evaluation
from drama.pipeline.plans import PlannedRun, read_plan
from drama.runs.folder import SHORT, STATUS
from drama.runs.locks import died_here, read_holder

SILENCE = 120.0
"""Seconds without a word after which a trainer on another node is taken for dead."""

TAIL = 4096
"""Bytes at a log's end among which its last line is looked for."""

COLOURS = {
    "waiting": "dim", "running": "cyan", "stopped": "yellow", "lost": "yellow",
    "trained": "blue", "done": "green", "earlier code": "green", "failed": "red",
}  # fmt: skip


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
        total_steps: agent steps to do.
        steps_per_second: lately, None when it is not running.
        last_return: of the last training episode; the evaluation's mean when it is done.
        detail: for a failed run, the last line of its log.
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
    """Return the results folders that hold a plan: the places themselves, or what lies in them.

    Raises:
        ConfigurationError: when a place has none.
    """
    found: list[Path] = []
    for place in places:
        here = sorted(
            path.parents[1]
            for depth in ("", "*/")
            for path in place.glob(f"{depth}recipes/report.json")
        )
        if not here:
            raise no_plan(place)
        found += here
    return list(dict.fromkeys(found))


def read_statuses(results: Path) -> list[RunStatus]:
    """Return how the runs that were planned last are getting on, in the plan's order.

    Raises:
        ConfigurationError: when the plan cannot be read.
    """
    return [_status(run) for run in read_plan(results).runs]


def _status(run: PlannedRun) -> RunStatus:
    logs = run.results / "logs" / run.game / f"seed{run.seed}"
    live = _live(run.folder / STATUS, run.fingerprint)
    found = RunStatus(
        run.game,
        run.seed,
        str(live.get("state", "waiting")),
        live.get("step"),
        live.get("total_steps"),
        last_return=live.get("last_return"),
    )
    if run.record.exists():
        score = _score(run.evaluation)
        if score is not None:
            return replace(found, state="done", last_return=score)
        log = _last_line(logs / f"evaluate-{run.evaluation_fingerprint[:SHORT]}.log")
        return replace(found, state="trained", detail=log)
    if made := earlier_run(run.folder, run.recipe):
        noted = noted_evaluation(run.folder)
        score = _score(run.folder / noted.name) if noted else None
        found = replace(found, step=made.steps, total_steps=made.steps, commit=made.commit)
        return replace(found, state="earlier code", last_return=score)
    if found.state == "failed":
        log = _last_line(logs / f"train-{run.fingerprint[:SHORT]}.log")
        return replace(found, detail=log or str(live.get("message", "")))
    if found.state in ("running", "done"):  # a record is written a moment after the last step
        if not _is_alive(run.folder, str(live.get("updated", ""))):
            return replace(found, state="lost")
        rate = float(live.get("steps_per_second") or 0) or None
        return replace(found, state="running", steps_per_second=rate)
    return found


def _live(path: Path, fingerprint: str) -> dict[str, Any]:
    """Return what a run's status.json says; nothing when it is of another run, or unreadable."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if data["fingerprint"] == fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _score(path: Path) -> float | None:
    try:
        return read_noted(path).score.mean_return
    except EvaluationDamaged:
        return None


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
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# --- for people ----------------------------------------------------------------------------------


def table(runs: Sequence[RunStatus]) -> Table:
    """Return the runs as a table that fits 80 columns."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("Game", "Seed", "State", "Step", "Steps/s", "Time left", "Return"):
        words = name in ("Game", "State")
        shown.add_column(name, justify="left" if words else "right", no_wrap=True)
    for run in runs:
        rate, last = run.steps_per_second, run.last_return
        shown.add_row(
            run.game,
            str(run.seed),
            Text(run.state, COLOURS.get(run.state, "")),
            "" if run.step is None else f"{run.step}/{run.total_steps}",
            "" if rate is None else f"{rate:.1f}",
            _time_left(run),
            "" if last is None else f"{last:g}" if float(last).is_integer() else f"{last:.1f}",
        )
    return shown


def _time_left(run: RunStatus) -> str:
    if not run.steps_per_second or run.step is None or run.total_steps is None:
        return ""
    minutes = round((run.total_steps - run.step) / run.steps_per_second / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def remarks(runs: Sequence[RunStatus]) -> Iterator[str]:
    """Yield what went wrong, a line each, and last how many runs there are of each kind."""
    for run in runs:
        if run.detail:
            what = "failed" if run.state == "failed" else "not evaluated"
            yield f"{run.game} seed {run.seed} {what}: {run.detail}"
    earlier = Counter(run.commit for run in runs if run.commit)
    for commit, count in earlier.items():
        yield f"{count} run{'s' * (count != 1)} of earlier code, commit {commit}"
    counted = Counter(run.state for run in runs)
    states = ", ".join(f"{counted[state]} {state}" for state in COLOURS if counted[state])
    yield f"{len(runs)} run{'s' * (len(runs) != 1)}: {states}"
