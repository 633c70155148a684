"""What a reader has to know about these particular runs, in sentences for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from drama.agent.settings import WAYS
from drama.report.scores import (
    PROTOCOL_EPISODES,
    PROTOCOL_SEEDS,
    PROTOCOL_STEPS,
    Baselines,
    GameScore,
    RunScore,
    scored,
)
from drama.report.words import count, integer, span


def notes(games: Sequence[GameScore], baselines: Baselines) -> list[str]:
    """Return what is to be said of these games and their runs."""
    runs = [run for game in games for run in game.runs]
    return [
        *_protocol(games, runs, len(baselines.games)),
        *_episodes(runs),
        *_code(runs),
    ]


def _protocol(
    games: Sequence[GameScore], runs: Sequence[RunScore], benchmark: int
) -> Iterator[str]:
    """Yield in what the runs fall short of the protocol."""
    counted = scored(games)
    seeds = [len(game.runs) for game in games]
    if counted and len(counted) < benchmark:
        yield (
            f"{len(counted)} of the benchmark's {benchmark} games: aggregates over so few are not "
            "those of the benchmark."
        )
    if others := [game.game for game in games if game not in counted]:
        yield (
            f"{', '.join(others)}: no published reference values, hence no human-normalised score "
            "and no part in the aggregates."
        )
    if min(seeds) < PROTOCOL_SEEDS:
        yield (
            f"{span(seeds)} {'seed' if max(seeds) == 1 else 'seeds'} per game, where the protocol "
            f"has {PROTOCOL_SEEDS}."
        )
    if counted:
        yield from _intervals(counted)
    steps, episodes = ([getattr(run, name) for run in runs] for name in ("steps", "episodes"))
    if {*steps} != {PROTOCOL_STEPS} or {*episodes} != {PROTOCOL_EPISODES}:
        yield (
            f"{span(steps)} agent steps and {span(episodes)} evaluation episodes per run, where "
            f"the protocol has {integer(PROTOCOL_STEPS)} and {PROTOCOL_EPISODES}."
        )


def _intervals(games: Sequence[GameScore]) -> Iterator[str]:
    counts = [len(game.runs) for game in games]
    if single := [game.game for game in games if len(game.runs) == 1]:
        which = "every game" if len(single) == len(games) else ", ".join(single)
        yield f"No intervals: {which} has one seed, and one seed says nothing about its spread."
    elif min(counts) < PROTOCOL_SEEDS:
        yield (
            f"The bootstrap redraws runs within a game. From {min(counts)} seeds there is little "
            "to redraw: read the intervals as too narrow."
        )
    if len(set(counts)) > 1:
        yield (
            "Games differ in their number of seeds. Each keeps the same weight in the aggregates, "
            "and is redrawn with its own number of seeds."
        )


def _episodes(runs: Sequence[RunScore]) -> Iterator[str]:
    """Yield what a mean over evaluation episodes stands on, where that is less than it seems."""
    for way in WAYS:
        played = [(run, run.played[way]) for run in runs if way in run.played]
        if same := [run for run, found in played if found.all_same]:
            yield (
                f"All {way} episodes are one and the same in {_names(same)}: such a mean says no "
                "more than a single episode."
            )
        if early := [run for run, found in played if found.episodes < found.asked]:
            done, asked = (
                span([getattr(run.played[way], name) for run in early])
                for name in ("episodes", "asked")
            )
            yield (
                f"{done} {way} episodes, where {asked} were asked for, in {_names(early)}: "
                "evaluation stopped there, the first being all the same."
            )
        if cut := sum(found.truncated for _, found in played):
            yield (
                f"{cut} of {sum(found.episodes for _, found in played)} {way} episodes were "
                f"truncated, in {_names([run for run, found in played if found.truncated])}."
            )


def _code(runs: Sequence[RunScore]) -> Iterator[str]:
    if earlier := sum(not run.current for run in runs):
        yield (
            f"{earlier} of {count(len(runs), 'run')} or their evaluations are of earlier code than "
            "was planned, with the same settings; the table of runs marks them."
        )
    commits = {run.git_commit or "" for run in runs}
    if len({commit.removesuffix("-dirty") for commit in commits}) > 1:
        yield "The runs were made at different commits; the table of runs shows which."
    if any(commit.endswith("-dirty") for commit in commits):
        yield "Some runs were made from a working tree with changes not committed (dirty)."


def _names(runs: Sequence[RunScore]) -> str:
    """Runs for reading: "Krull (seeds 0, 2), Pong (seed 1)"."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.game, []).append(str(run.seed))
    return ", ".join(
        f"{game} (seed{'s' * (len(numbers) > 1)} {', '.join(numbers)})"
        for game, numbers in seeds.items()
    )
