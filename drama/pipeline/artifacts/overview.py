"""How planned runs are getting on, for people: few one by one, many so that they fit a terminal."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from drama.errors import shown
from drama.pipeline.artifacts.outlook import rate_of, seconds_left, to_train
from drama.pipeline.artifacts.status import (
    COLOURS,
    RunStatus,
    counted,
    duration,
    planned_results,
    plural,
    read_statuses,
)

WIDTH, ROWS = 80, 30
"""Of the terminal that everything fits, with the command above and the next prompt below."""

FEW = 20
"""Most runs that are shown one by one anyway."""

DETAILS = 3
"""Most failures of many runs that are told in full lines."""

FIRST = ("failed", "running", "lost", "stopped")
"""States whose runs are shown one by one while there is room; in this order."""

Plans = Mapping[Path, Sequence[RunStatus]]


def overview(plans: Plans, rows: int = ROWS, *, every: bool = False) -> Group:
    """Return what there is to see of several results, in so many rows of 80 columns.

    Few runs are shown one by one, as all are with `every`. Of many, results with fewer runs get
    their rows first, and leave what they do not need to the others.
    """
    if every or sum(map(len, plans.values())) <= FEW:
        return Group(*(part for place, runs in plans.items() for part in one_by_one(place, runs)))
    left, shown = rows - 2, {}
    by_size = sorted(plans, key=lambda place: len(plans[place]))
    for index, place in enumerate(by_size):
        lines, parts = _fitted(place, plans[place], left // (len(plans) - index))
        left -= lines
        shown[place] = parts
    return Group(*(part for place in plans for part in shown[place]))


def show_results(places: Sequence[Path], seconds: float | None, *, every: bool) -> None:
    """Print what there is to see of the results at or below some places, as `show` does.

    Raises:
        ConfigurationError: when a place has none.
    """

    def look(rows: int) -> RenderableType:
        folders = planned_results(places)
        return overview({folder: read_statuses(folder) for folder in folders}, rows, every=every)

    show(look, Console(highlight=False), seconds)


def show(
    look: Callable[[int], RenderableType], console: Console, seconds: float | None = None
) -> None:
    """Print what there is to see, once or again and again until Ctrl-C.

    Args:
        look: returns it, given the rows of the terminal.
        console: where to. A terminal shows it in place, a pipe gets it again and again.
        seconds: between two looks; None for one look.
    """
    rows = console.height if console.is_terminal else ROWS
    if seconds is None:
        console.print(look(rows), soft_wrap=True)
        return
    with suppress(KeyboardInterrupt):
        while not console.is_terminal:
            console.print(look(rows), soft_wrap=True)
            console.print()
            time.sleep(seconds)
        live = Live(look(rows), console=console, screen=True, auto_refresh=False)
        try:  # not `with`, which would not put back a screen that Ctrl-C meets while it is set up
            live.start(refresh=True)
            while True:
                time.sleep(seconds)
                live.update(look(console.height), refresh=True)
        finally:
            live.stop()


def one_by_one(place: Path, runs: Sequence[RunStatus]) -> list[RenderableType]:
    """Return the parts that show every run, and what there is to say of them."""
    return [Text(shown(place)), table(runs), *map(Text, remarks(runs))]


def table(runs: Sequence[RunStatus]) -> Table:
    """Return the runs as a table that fits 80 columns."""
    names = ("Game", "Seed", "State", "Step", "Steps/s", "Time left", "Return")
    cells = [_cells(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(names) - 1) <= WIDTH else 1
    shown = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for name in names:
        words = name in ("Game", "State")
        shown.add_column(name, justify="left" if words else "right", no_wrap=True)
    for run, (game, seed, state, *numbers) in zip(runs, cells, strict=True):
        shown.add_row(game, seed, Text(state, COLOURS.get(run.state, "")), *numbers)
    return shown


def _cells(run: RunStatus) -> tuple[str, ...]:
    rate = run.steps_per_second
    left = None
    if rate and run.step is not None and run.total_steps is not None:
        left = (run.total_steps - run.step) / rate
    return (
        run.game,
        str(run.seed),
        run.state,
        "" if run.step is None else f"{run.step}/{run.total_steps}",
        "" if rate is None else f"{rate:.1f}",
        "" if left is None else duration(left),
        "" if run.last_return is None else number(run.last_return),
    )


def number(value: float) -> str:
    """Return a return for reading, with one decimal unless it is whole."""
    return f"{value:g}" if float(value).is_integer() else f"{value:.1f}"


def remarks(runs: Sequence[RunStatus]) -> Iterator[str]:
    """Yield what went wrong, a line each, and last how many runs there are of each kind."""
    yield from _troubles(runs)
    yield counted(runs)


def _troubles(runs: Sequence[RunStatus]) -> Iterator[str]:
    for run in runs:
        if run.detail:
            what = "failed" if run.state == "failed" else "not evaluated"
            yield f"{run.game} seed {run.seed} {what}: {run.detail}"
    commits = Counter(run.commit for run in runs if run.commit)
    for commit, count in commits.items():
        yield f"{plural(count, 'run')} of earlier code, commit {commit}"


# --- many runs -----------------------------------------------------------------------------------


def _fitted(
    place: Path, runs: Sequence[RunStatus], rows: int
) -> tuple[int, Sequence[RenderableType]]:
    """Return how many lines the parts that show these runs take, and the parts."""
    said = list(remarks(runs))
    if len(runs) + 2 + len(said) <= rows and all(len(line) <= WIDTH for line in said):
        return len(runs) + 2 + len(said), one_by_one(place, runs)
    head = [Text(line) for line in (shown(place), *_wrapped(counted(runs)), *_pace(runs))][:rows]
    single = sorted((run for run in runs if run.state in FIRST), key=_rank)
    room = rows - len(head)
    for detail in (2, 1, 0):
        below = _below(runs, detail)
        if len(single) + bool(single) + len(below) <= room:
            break
    else:
        below = below[:room]
        single, more = _cut(single, room - len(below))
        below = [*more, *below]
    parts: list[RenderableType] = [*head, *([table(single)] if single else []), *below]
    return len(head) + len(single) + bool(single) + len(below), parts


def _below(runs: Sequence[RunStatus], detail: int) -> list[Text]:
    """Return the lines below the table, in more or less detail: 2, 1 or 0."""
    notes = _shortened(list(_troubles(runs)), DETAILS if detail else 1)
    states = (_together(state, runs, detail) for state in COLOURS if state not in FIRST)
    return [*notes, *(line for lines in states for line in lines)]


def _cut(runs: list[RunStatus], room: int) -> tuple[list[RunStatus], list[Text]]:
    """Return as many runs as there is room for below a heading, and a line about the others."""
    if len(runs) + bool(runs) <= room:
        return runs, []
    shown = max(room - 2, 0)
    found = Counter(run.state for run in runs[shown:])
    words = ", ".join(f"{found[state]} {state}" for state in FIRST if found[state])
    return runs[:shown], [Text(f"and {words}; --all shows them")][:room]


def _rank(run: RunStatus) -> int:
    return FIRST.index(run.state)


def _pace(runs: Sequence[RunStatus]) -> Iterator[str]:
    """Yield how fast all runs are together, and when all would be trained."""
    running = sum(run.state == "running" for run in runs)
    if not running:
        yield from ["nothing is running"] if to_train(runs) else []
        return
    left = seconds_left(runs)
    when = (
        "no end in sight yet" if left is None else f"at that, all are trained in {duration(left)}"
    )
    yield f"{rate_of(runs):.1f} steps/s by {plural(running, 'run')} at a time; {when}"


def _shortened(lines: Sequence[str], most: int) -> Iterator[Text]:
    """Yield the first lines, each cut to 80 columns, and how many more there are."""
    for line in lines[:most]:
        text = Text(line)
        text.truncate(WIDTH, overflow="ellipsis")
        yield text
    if len(lines) > most:
        yield Text(f"and {len(lines) - most} more; --all tells them")


def _together(state: str, runs: Sequence[RunStatus], detail: int) -> list[Text]:
    """Return the lines that tell of all runs in one state.

    Args:
        state: that state.
        runs: all runs.
        detail: 0 for how many games they are of, 1 for each game's number, 2 for its return too.
    """
    games: dict[str, list[RunStatus]] = {}
    for run in runs:
        if run.state == state:
            games.setdefault(run.game, []).append(run)
    if not games:
        return []
    label = f"{state:12} {sum(map(len, games.values())):4}  "
    if detail == 2 and state in ("done", "earlier code"):
        entries = [_with_return(game, of) for game, of in games.items()]
        label += "mean return (seeds): "
    elif detail:
        entries = [f"{game} {len(of)}" for game, of in games.items()]
    else:
        entries = [f"of {plural(len(games), 'game')}"]
    # An entry is one word to textwrap, so that a game keeps its number.
    words = ", ".join(entry.replace(" ", "\xa0") for entry in entries)
    lines = [line.replace("\xa0", " ") for line in _wrapped(label + words, " " * 19)]
    return [Text.assemble((lines[0][:12], COLOURS[state]), lines[0][12:]), *map(Text, lines[1:])]


def _with_return(game: str, runs: Sequence[RunStatus]) -> str:
    known = [run.last_return for run in runs if run.last_return is not None]
    mean = f" {number(round(sum(known) / len(known), 1))}" if known else ""
    return f"{game}{mean} ({len(runs)})"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent)
