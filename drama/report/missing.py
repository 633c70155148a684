"""Which planned runs a report lacks, and how far they are: by state, in few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from drama.pipeline.artifacts.status import RunStatus, as_written, read_status
from drama.pipeline.plans import Plan, PlannedRun
from drama.report.scores import GameScore, ReportError
from drama.report.words import count, integer

STATES = {
    "failed": "failed",
    "lost": "lost",
    "stopped": "stopped",
    "running": "under way",
    "trained": "trained, not evaluated",
    "earlier code": "trained, not evaluated",
    "done": "finished meanwhile",
    "waiting": "waiting",
}
"""What the states of `RunStatus` are called, those first that somebody should look at."""

BEGUN = ("failed", "lost", "stopped", "under way")
"""Those whose runs are named with their steps."""

ENTRIES = 26
"""Most games that are named of one state."""


@dataclass(frozen=True)
class Missing:
    """The runs of one state: how many, and which, for reading."""

    state: str
    runs: int
    which: str

    def __str__(self) -> str:
        return f"{self.runs} {self.state}: {self.which}"


def missing_runs(plan: Plan, games: Sequence[GameScore]) -> tuple[RunStatus, ...]:
    """How the planned runs without a score are getting on, in the plan's order.

    By their files alone: the same files make the same report.
    """
    return tuple(as_written(run) for run in _without_score(plan, games))


def nothing_to_report(plan: Plan) -> ReportError:
    """The error that says that no planned run is whole, how they get on, and what to do."""
    runs = _without_score(plan, ())
    statuses = [read_status(run) for run in runs]
    trained = [
        run
        for run, status in zip(runs, statuses, strict=True)
        if STATES.get(status.state) == "trained, not evaluated"
    ]
    command, first = ("evaluate", trained[0]) if trained else ("train", runs[0])
    lines = "\n".join(str(group) for group in grouped(statuses, (run.game for run in runs)))
    return ReportError(
        f"{plan.results}: {count(len(runs), 'run')} planned and none of them trained and evaluated "
        f"yet, so there is nothing to report\n{lines}\n"
        f"`drama status {plan.results}` keeps an eye on them. A report can be made from the first "
        f"whole run on. Run: drama {command} {first.recipe}"
    )


def _without_score(plan: Plan, games: Sequence[GameScore]) -> list[PlannedRun]:
    found = {(run.game, run.seed) for game in games for run in game.runs}
    return [run for run in plan.runs if (run.game, run.seed) not in found]


def grouped(statuses: Sequence[RunStatus], planned: Iterable[str]) -> list[Missing]:
    """Missing runs by state; a game all of whose runs are in one state is named without seeds.

    `planned` holds the game of every planned run.
    """
    seeds = Counter(planned)
    found = []
    for state in dict.fromkeys(STATES.values()):
        runs = [run for run in statuses if STATES.get(run.state, "waiting") == state]
        by_game: dict[str, list[RunStatus]] = {}
        for run in runs:
            by_game.setdefault(run.game, []).append(run)
        entry = _steps if state in BEGUN else _seeds
        entries = [entry(of, len(of) == seeds[game]) for game, of in by_game.items()]
        if (more := len(entries) - ENTRIES) > 0:
            entries = [*entries[:ENTRIES], f"{count(more, 'game')} more"]
        if runs:
            found.append(Missing(state, len(runs), ", ".join(entries)))
    return found


def _steps(runs: Sequence[RunStatus], _: bool) -> str:
    """A game's runs with how far they are: "Pong (seed 0 at step 250, 1 at 90 of 1 000)"."""
    begun = [run for run in runs if run.step is not None and run.total_steps is not None]
    if len(begun) < len(runs):
        return _seeds(runs, False)
    words = [f"{run.seed} at {integer(run.step or 0)}" for run in runs]
    words[0] = words[0].replace(" at ", " at step ")
    total = max(run.total_steps or 0 for run in runs)  # the same for all of a game
    return f"{runs[0].game} (seed {', '.join(words)} of {integer(total)})"


def _seeds(runs: Sequence[RunStatus], whole: bool) -> str:
    """A game's runs: "Pong" where these are all, else "Pong (seeds 0, 2)"."""
    if whole:
        return runs[0].game
    return f"{runs[0].game} (seed{'s' * (len(runs) > 1)} {', '.join(str(r.seed) for r in runs)})"


def seeds_per_game(games: Sequence[GameScore]) -> str:
    """How many seeds each game has, for reading: "5 seeds in Alien, Amidar; 2 seeds in Pong"."""
    names: dict[int, list[str]] = {}
    for game in sorted(games, key=lambda game: -len(game.runs)):
        names.setdefault(len(game.runs), []).append(game.game)
    return "; ".join(f"{count(seeds, 'seed')} in {', '.join(of)}" for seeds, of in names.items())
