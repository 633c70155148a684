"""What a person sees of a run: a progress bar, or a line now and then, and status.json."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from drama.errors import DramaError
from drama.files import write_json
from drama.reading import Fingerprint, parse_kind, read_bytes

LINE_SECONDS = 30.0
STATUS_SECONDS = 10.0
DRAW_SECONDS = 0.1
BAR_WIDTH = 16
"""Of 80 columns; with a long title and 100 000 steps, a return still has room behind it."""

SHOWN = {
    "loss/reconstruction": "reconstruction {:.1f}",
    "loss/reward": "reward {:.3f}",
    "loss/dynamics": "dynamics {:.2f}",
    "entropy": "entropy {:.2f}",
}
"""Which metrics are shown while a run goes on, and how."""


Steps = Annotated[int, Field(ge=0, le=1_000_000_000)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
"""Less than a record may hold, which seconds go into that are counted on from here."""
Word = Annotated[str, Field(max_length=64)]
LONGEST = 10_000
"""Characters of a message that are kept."""


@dataclass
class Status:
    """A run's live state, as kept in status.json for whoever asks from another machine.

    Attributes:
        fingerprint: of the run, in full.
        state: running, stopped, done or failed.
        step: agent steps done.
        total_steps: agent steps to do.
        steps_per_second: lately.
        last_return: of the last finished episode; None before one is.
        wall_seconds: spent so far, all sittings together.
        updated: when this was written, ISO 8601 in UTC.
        message: why it failed.
        permanent: whether it failed in a way that trying again would not change.
    """

    fingerprint: Fingerprint | Literal[""]
    state: Literal["running", "stopped", "done", "failed"]
    step: Steps
    total_steps: Steps
    steps_per_second: Amount = 0.0
    last_return: Annotated[float, Field(allow_inf_nan=False)] | None = None
    wall_seconds: Amount = 0.0
    updated: Word = ""
    message: Annotated[str, Field(max_length=LONGEST)] = ""
    permanent: bool = False

    @classmethod
    def read(cls, path: Path) -> Status | None:
        """Read status.json; None when there is none, or none that `write` could have written."""
        try:
            return parse_kind(read_bytes(path), _STATUS)
        except (OSError, ValueError):  # ValidationError is a ValueError
            return None

    @classmethod
    def resumed(cls, path: Path, fingerprint: str, total_steps: int) -> Status:
        """Return the state of a run that begins, or goes on, with what earlier sittings left."""
        status, earlier = cls(fingerprint, "running", 0, total_steps), cls.read(path)
        if earlier and earlier.fingerprint == fingerprint:
            status.wall_seconds, status.last_return = earlier.wall_seconds, earlier.last_return
        return status

    @classmethod
    def failed(cls, path: Path, fingerprint: str, total_steps: int, error: DramaError) -> None:
        """Write status.json of a run that failed, with what is known of it from before."""
        status = cls.resumed(path, fingerprint, total_steps)
        if earlier := cls.read(path):
            status.step = earlier.step
        status.fail(path, error)

    def write(self, path: Path) -> None:
        """Write status.json."""
        self.updated = datetime.now(UTC).isoformat(timespec="seconds")
        self.message = self.message[:LONGEST]
        write_json(path, asdict(self))

    def fail(self, path: Path, error: Exception) -> None:
        """Write status.json of a run that could not even go on."""
        self.state, self.message = "failed", str(error)
        self.permanent = isinstance(error, DramaError) and error.is_permanent
        self.write(path)


_STATUS = TypeAdapter(Status)


class Detail(ProgressColumn):
    """What is left out first: as many whole parts as the other columns leave room for."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(ratio=1))

    def render(self, task: Task) -> WholeParts:
        """Return the parts, to be fitted in when the width is known."""
        return WholeParts(task.fields["detail"])


class WholeParts:
    """Parts of one line that are shown or left out, but never cut.

    Args:
        parts: the most important one first.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the longest line that fits; Rich's protocol."""
        lines = (" · ".join(self.parts[:count]) for count in range(len(self.parts), 0, -1))
        yield Text(next((line for line in lines if len(line) <= options.max_width), ""))


class Bar(Progress):
    """A progress bar that is drawn as it moves, without a thread: there may be no more to be had.

    Args:
        title: what it is of.
        done: how much of it was done before.
        total: how much there is to do.
        console: the terminal.
    """

    def __init__(self, title: str, done: int, total: int, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            Detail(),
            console=console,
            transient=True,
            expand=True,
            auto_refresh=False,
        )
        self._due = 0.0
        self._task = self.add_task(title, total=total, completed=done, rate="", detail=[])

    def move(self, done: int, rate: str, detail: list[str]) -> None:
        """Say how much is done; drawn now and then. A terminal that is gone is no obstacle."""
        self.update(self._task, completed=done, rate=rate, detail=detail)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + DRAW_SECONDS
            with suppress(OSError):
                self.refresh()

    def stop(self) -> None:
        """Take the bar away."""
        with suppress(OSError):
            super().stop()


class Reporter:
    """Shows progress: a bar on a terminal, one line every half minute elsewhere.

    Game, seed, step, speed and time left come first, and fit into 80 columns; the last return and
    losses follow where there is room.

    Args:
        title: the run's name.
        status: what to show; changed by the training loop.
        path: where status.json lies.
    """

    def __init__(self, title: str, status: Status, path: Path) -> None:
        self.title = title
        self.status = status
        self.path = path
        self._losses: list[str] = []
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._earlier_seconds = status.wall_seconds
        self._started = time.monotonic()
        self._line_due = self._started + LINE_SECONDS
        self._status_due = self._started
        self._mark = (self._started, status.step)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            status = self.status
            self._bar = Bar(self.title, status.step, status.total_steps, self._console)
            self._bar.start()
        else:
            _say(f"{self.title}: from step {self.status.step} of {self.status.total_steps}")
        self.status.state = "running"
        self.status.write(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        # A disk that is full must not hide the error that it caused.
        with suppress(OSError) if error else nullcontext():
            self.tick(self.status.step)
            self.status.write(self.path)

    def show(self, means: Mapping[str, float]) -> None:
        """Show these means of metrics, by name, until the next ones; without those that are NaN.

        A metric is NaN where there was no update, as before the first one.
        """
        named = ((means[name], text) for name, text in SHOWN.items())
        self._losses = [text.format(mean) for mean, text in named if not math.isnan(mean)]

    def tick(self, step: int) -> None:
        """Take note that `step` agent steps are done; cheap enough for every step."""
        now = time.monotonic()
        status = self.status
        status.step = step
        status.wall_seconds = self._earlier_seconds + now - self._started
        if now >= self._status_due:
            then, before = self._mark
            if now > then:
                status.steps_per_second = (step - before) / (now - then)
            self._mark = (now, step)
            self._status_due = now + STATUS_SECONDS
            status.write(self.path)
        if self._bar:
            self._bar.move(step, f"{status.steps_per_second:.1f} steps/s", self._detail())
        elif now >= self._line_due:
            self._line_due = now + LINE_SECONDS
            _say(self._line())

    def finish_episode(self, episode_return: float) -> None:
        """Take note of a finished episode's return."""
        self.status.last_return = episode_return

    def _detail(self) -> list[str]:
        value = self.status.last_return
        return [*([] if value is None else [f"return {value:g}"]), *self._losses]

    def _line(self) -> str:
        status = self.status
        rate = status.steps_per_second
        left = (status.total_steps - status.step) / rate if rate else math.inf
        ahead = f"{left / 60:.0f} min left" if math.isfinite(left) else "time left unknown"
        step = f"{self.title}: step {status.step} of {status.total_steps}"
        return " · ".join([step, f"{rate:.1f} steps/s", ahead, *self._detail()])


class EpisodesReporter:
    """Shows how an evaluation is getting on: a bar on a terminal, a line now and then elsewhere.

    Args:
        title: the run's name.
        total: episodes to play, in all ways together.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self._returns: dict[str, list[float]] = {}
        self._way = ""
        self._bar: Bar | None = None
        self._line_due = time.monotonic()

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Bar(self.title, 0, self.total, console)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self, ended: Sequence[Mapping[str, Any]]) -> None:
        """Take note of the rows of episodes that ended; cheap enough for every step."""
        for row in ended:
            self._way = row["actions"]
            self._returns.setdefault(self._way, []).append(row["episode_return"])
        now, done = time.monotonic(), sum(map(len, self._returns.values()))
        if self._bar:
            self._bar.move(done, "episodes", self._detail())
        elif now >= self._line_due:
            self._line_due = now + LINE_SECONDS
            line = f"{self.title}: {done} of {self.total} episodes"
            _say(" · ".join([line, *self._detail()]))

    def _detail(self) -> list[str]:
        """Return the mean return so far, of episodes that were played as the last one was."""
        if not self._way:
            return []
        way = f"{self._way} " * (len(self._returns) > 1)
        return [f"{way}mean return {fmean(self._returns[self._way]):.4g}"]


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)
