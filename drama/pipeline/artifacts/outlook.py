"""What a plan costs and when it ends: hours, disk, hosts, all from what its runs left so far.

Estimates are means over this plan's finished runs, or the present speed of those under way. Where
there is neither, nothing is estimated.
"""

from __future__ import annotations

import heapq
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from drama.errors import shown
from drama.pipeline.artifacts.records import Record, record_of
from drama.pipeline.artifacts.status import (
    AGES,
    RunStatus,
    counted,
    duration,
    planned_steps,
    plural,
    read_status,
)
from drama.pipeline.plans import PlannedRun, read_plan
from drama.reading import read_model
from drama.runs.folder import CHECKPOINT, REPLAY
from drama.runs.locks import read_holder

WIDTH = 80
"""Columns that everything fits."""

DEVICES, HOSTS = 3, 8
"""Most kinds of device, and most hosts, that are named."""

AT_A_TIME = (1, 4, 16)
"""Runs at a time that an end is given for while none is under way."""

WHOLE = ("trained", "done", "earlier code")
"""States of runs that need no more training."""


@dataclass(frozen=True)
class Finished:
    """A finished run: what it ran on, how long, and the bytes it left.

    Attributes:
        device: by name, or cpu.
        steps: agent steps.
        seconds: wall time of all sittings together.
        in_git: bytes of the files that git keeps.
        large: bytes of checkpoint and replay, which it does not.
    """

    device: str
    steps: int
    seconds: float
    in_git: int
    large: int


@dataclass(frozen=True)
class Outlook:
    """What is planned in one results folder, and how far it is.

    Attributes:
        results: the folder.
        preset: that is planned.
        runs: how each planned run is getting on, in the plan's order.
        finished: what those that are trained left.
        hosts: of each run that is running, in their order; None where it is not known.
        free: bytes that are free where the results lie.
    """

    results: Path
    preset: str
    runs: tuple[RunStatus, ...]
    finished: tuple[Finished, ...]
    hosts: tuple[str | None, ...]
    free: int

    @property
    def running(self) -> list[RunStatus]:
        """The runs that are running."""
        return [run for run in self.runs if run.state == "running"]

    @property
    def left(self) -> list[RunStatus]:
        """The runs that are not trained to their end."""
        return to_train(self.runs)


def read_outlook(results: Path) -> Outlook:
    """Read what is planned in a results folder and what its runs left.

    Raises:
        ConfigurationError: when there is no plan, or it cannot be read.
    """
    plan = read_plan(results)
    runs, hosts = [], []
    for planned in plan.runs:
        status = read_status(planned)
        steps = status.total_steps or planned_steps(planned.recipe)
        runs.append(replace(status, total_steps=steps))
        if status.state == "running":
            hosts.append(host_of(planned))
    finished = tuple(filter(None, map(_finished, plan.runs)))
    free = shutil.disk_usage(results).free
    return Outlook(results, plan.preset, tuple(runs), finished, tuple(hosts), free)


def host_of(run: PlannedRun) -> str | None:
    """Return the host that a running run is on; None where nobody says that it holds the run."""
    holder = read_holder(run.folder)
    return holder.host if holder else None


def _finished(run: PlannedRun) -> Finished | None:
    """Return what a run left that is trained, maybe by earlier code; None of any other."""
    path = record_of(run)
    if path is None:
        return None
    try:
        record = read_model(path, Record)
        beside = sum(file.stat().st_size for file in (path, *run.folder.glob("evaluation*")))
    except (OSError, ValueError):  # ValidationError is one
        return None  # `drama verify` says what is wrong with it
    sizes = {item.path: item.bytes for item in record.artifacts}
    large = sum(size for name, size in sizes.items() if name.startswith((CHECKPOINT, REPLAY)))
    in_git = sum(sizes.values()) - large + beside
    return Finished(record.device, record.steps, record.wall_seconds, in_git, large)


# --- how long ------------------------------------------------------------------------------------


def to_train(runs: Sequence[RunStatus]) -> list[RunStatus]:
    """Return the runs that are not trained to their end."""
    return [run for run in runs if run.state not in WHOLE]


def steps_left(runs: Sequence[RunStatus]) -> int | None:
    """Return the agent steps that runs have to do still; None where one's number is not known."""
    left = [_left(run) for run in runs]
    known = [steps for steps in left if steps is not None]
    return sum(known) if len(known) == len(left) else None


def _left(run: RunStatus) -> int | None:
    return None if run.total_steps is None else max(run.total_steps - (run.step or 0), 0)


def rate_of(runs: Sequence[RunStatus]) -> float:
    """Return the agent steps a second that all runs make together at present."""
    return sum(run.steps_per_second or 0.0 for run in runs)


def seconds_left(runs: Sequence[RunStatus]) -> float | None:
    """Return the seconds until all runs are trained, at the present speed and as many at a time.

    Those that are not under way begin one after another, in the plan's order, each where one ends
    first, and go on from their last step at the mean speed. None where no speed, or the number of
    a run's steps, is not known.
    """
    rates = [run.steps_per_second for run in runs if run.steps_per_second]
    left = to_train(runs)
    if not rates or steps_left(left) is None:
        return None
    mean = sum(rates) / len(rates)
    under_way = [run for run in left if run.state == "running"]
    ends = [(_left(run) or 0) / (run.steps_per_second or mean) for run in under_way]
    return last_end(ends, [(_left(run) or 0) / mean for run in left if run.state != "running"])


def last_end(ends: Sequence[float], durations: Sequence[float]) -> float:
    """Return when the last of some runs ends, where each waiting one follows the first to end.

    `ends` are the times at which those under way end, `durations` the times that the others take.
    """
    places = list(ends)
    heapq.heapify(places)
    for seconds in durations:
        heapq.heapreplace(places, places[0] + seconds)
    return max(places)


def seconds_per_step(finished: Sequence[Finished]) -> dict[str, float]:
    """Return the mean seconds of a step on each kind of device, the commonest first."""
    runs = Counter(run.device for run in finished)
    return {
        device: sum(run.seconds for run in finished if run.device == device)
        / sum(run.steps for run in finished if run.device == device)
        for device, _ in sorted(runs.items(), key=lambda item: (-item[1], item[0]))
    }


# --- for people ----------------------------------------------------------------------------------


def size(number: float) -> str:
    """Return bytes for reading, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def show(outlook: Outlook, now: datetime) -> Group:
    """Return what there is to say, in 80 columns and some 25 lines at most."""
    parts: list[RenderableType] = [*_lines(*_plan(outlook)), Text(), _costs(outlook)]
    parts += _lines(_basis(outlook))
    if outlook.running:
        parts += [Text(), _hosts(outlook)]
    return Group(*parts, Text(), *_lines(_end(outlook, now)))


def _lines(*texts: str) -> list[Text]:
    return [Text(line) for text in texts for line in textwrap.wrap(shown(text), WIDTH)]


def _plan(outlook: Outlook) -> Iterator[str]:
    runs = outlook.runs
    games, seeds = len({run.game for run in runs}), len({run.seed for run in runs})
    what = f"{plural(len(runs), 'run')} of {plural(games, 'game')}"
    if len(runs) == games * seeds:
        what = f"{plural(games, 'game')} x {plural(seeds, 'seed')} = {plural(len(runs), 'run')}"
    steps = {run.total_steps for run in runs if run.total_steps}
    ends = dict.fromkeys(f"{number:,}" for number in (min(steps), max(steps))) if steps else ()
    each = f", {' to '.join(ends)} steps each" if ends else ""
    yield f"{outlook.results}: {what}{each}, preset {outlook.preset}"
    yield counted(runs)


def _costs(outlook: Outlook) -> Table:
    """Return what a run costs, all of them, and what is left of them."""
    left = len(outlook.left)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True, max_width=36)
    for name in ("a run", f"all {len(outlook.runs)}", *([f"the {left} left"] if left else [])):
        table.add_column(name, justify="right", no_wrap=True)
    columns = len(table.columns) - 1
    for name, seconds in _speeds(outlook):
        table.add_row(name, *[_hours(steps, seconds) for steps in _steps(outlook)][:columns])
    for name, mean in _disk(outlook.finished):
        counts = (1, len(outlook.runs), left)[:columns]
        table.add_row(name, *("unknown" if mean is None else size(mean * n) for n in counts))
    table.add_row("disk, free here", *[""] * (columns - 1), size(outlook.free))
    return table


def _speeds(outlook: Outlook) -> list[tuple[str, float | None]]:
    """Return what hours are called, and the seconds of a step in them; None where unknown."""
    known = list(seconds_per_step(outlook.finished).items())[:DEVICES]
    if known:
        kind = {"cpu": "CPU hours"}
        return [(kind.get(name, f"GPU hours, {name}"), seconds) for name, seconds in known]
    rates = [run.steps_per_second for run in outlook.running if run.steps_per_second]
    return [("hours", len(rates) / sum(rates) if rates else None)]


def _steps(outlook: Outlook) -> tuple[float | None, int | None, int | None]:
    """Return the agent steps of a run on average, of all, and those left."""
    fresh = [replace(run, step=0) for run in outlook.runs]
    every = steps_left(fresh)
    mean = None if every is None else every / len(fresh)
    return mean, every, steps_left(outlook.left)


def _hours(steps: float | None, seconds: float | None) -> str:
    if steps is None or seconds is None:
        return "unknown"
    hours = steps * seconds / 3600
    return f"{hours:.2f}" if hours < 9.995 else f"{hours:,.0f}"


def _disk(finished: Sequence[Finished]) -> Iterator[tuple[str, float | None]]:
    """Yield the mean bytes that a finished run left, by where they are kept."""
    for name, kept in (("disk, kept in git", "in_git"), ("disk, large files", "large")):
        sizes = [getattr(run, kept) for run in finished]
        yield name, sum(sizes) / len(sizes) if sizes else None


def _basis(outlook: Outlook) -> str:
    """Say what the estimates stand on."""
    if outlook.finished:
        hours = [run.seconds / 3600 for run in outlook.finished]
        of = f" of {min(hours):.2f} to {max(hours):.2f} hours" if len(hours) > 1 else ""
        return f"From {plural(len(hours), 'finished run')}{of}; evaluations come on top."
    if rate_of(outlook.running):
        return (
            f"Hours by the present speed of {plural(len(outlook.running), 'run')}; evaluations "
            "come on top. Disk is not known until a run is finished."
        )
    return "Hours are not known until a run is under way, disk until one is finished."


def _hosts(outlook: Outlook) -> Table:
    """Return what runs where."""
    places: dict[str, list[RunStatus]] = {}
    for run, host in zip(outlook.running, outlook.hosts, strict=True):
        places.setdefault(host or "unknown", []).append(run)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Host", no_wrap=True, max_width=24)
    for name in ("Runs", "Steps/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Which", no_wrap=True, overflow="ellipsis", max_width=36)
    by_name = sorted(places.items())
    for host, runs in by_name[:HOSTS]:
        which = ", ".join(f"{run.game} {run.seed}" for run in runs)
        table.add_row(host, str(len(runs)), f"{rate_of(runs):.1f}", which)
    if rest := [run for _, runs in by_name[HOSTS:] for run in runs]:
        name = f"{len(by_name) - HOSTS} more"
        table.add_row(name, str(len(rest)), f"{rate_of(rest):.1f}")
    return table


def _end(outlook: Outlook, now: datetime) -> str:
    """Return when all runs are trained."""
    if not outlook.left:
        return "All are trained."
    if outlook.running:
        running = plural(len(outlook.running), "run")
        pace = f"{rate_of(outlook.runs):.1f} steps/s by {running} at a time"
        seconds = seconds_left(outlook.runs)
        if seconds is None or seconds >= AGES:
            return f"{pace}: no end can be told yet."
        day = (now + timedelta(seconds=seconds)).strftime("%a %-d %b %Y, %H:%M %Z").rstrip()
        return f"{pace}: all are trained in {duration(seconds)}, on {day}."
    (_, speed), *_ = _speeds(outlook)
    if speed is None or steps_left(outlook.left) is None:
        return "Nothing is running, so no end can be told."
    times = [(_left(run) or 0) * speed for run in outlook.left]
    ends = (f"{duration(last_end([0.0] * n, times))} at {n}" for n in AT_A_TIME)
    return f"Nothing is running. By runs at a time, what is left takes {', '.join(ends)}."
