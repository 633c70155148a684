"""One sitting of the real `drama`, in a process of its own, which one fault strikes.

Whatever the process does that can leave a trace on disk is a numbered event, and so is every step
of the agent and every round of an evaluation. A fault strikes at one of them: before it, after it,
or when a share of the bytes is written. So the same number strikes at the same place.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workspace import settle

SECONDS = 240
"""What a sitting may take on a slow machine, and a lock left by a killed process with it."""
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.19 GiB is free."
)
"""What PyTorch says where a GPU is full."""


@dataclass(frozen=True)
class Fault:
    """What happens to one sitting; nothing by default.

    Attributes:
        event: the number of the event that it strikes at.
        when: before the event, after it, or in the middle, when `share` of its file is written.
        share: of the file's bytes that are left.
        signals: which the process gets, one after another.
        error: which the system answers with, an errno; the event then does not happen, or in part.
        lasts: whether the system answers so to everything that writes from then on.
        seconds: after which the signals come, whatever happens then, instead of at an event.
        clock: seconds by which the clock is wrong all the time.
        poisoned: step whose frames turn into NaN on their way into the encoder.
        crowded: step, or round of an evaluation, at which no memory is left: a GPU's where the
            number is even, otherwise the machine's.
    """

    event: int | None = None
    when: Literal["before", "half", "after"] = "before"
    share: float = 0.5
    signals: tuple[int, ...] = ()
    error: int | None = None
    lasts: bool = False
    seconds: float | None = None
    clock: float = 0.0
    poisoned: int | None = None
    crowded: int | None = None

    @property
    def kills(self) -> bool:
        """Whether the process may die of it without a word."""
        return signal.SIGKILL in self.signals


@dataclass(frozen=True)
class Ended:
    """How a sitting ended."""

    fault: Fault
    code: int | None
    output: str
    events: tuple[str, ...]

    @property
    def struck(self) -> bool:
        return any(event.startswith("STRUCK") for event in self.events)

    def __str__(self) -> str:
        place = next((event for event in self.events if event.startswith("STRUCK")), "never struck")
        return f"{self.fault}\n  {place}\n  exit code {self.code}: {self.output!r:.3000}"


class Sitting:
    """A process that runs the command once; `end` waits for it.

    Args:
        root: the project's folder.
        arguments: of `drama`.
        fault: what happens to it.
        name: of its output's file, which lies beside the project's folder.
    """

    def __init__(self, root: Path, arguments: tuple[str, ...], fault: Fault, name: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["drama.cli", "drama.pipeline.jobs", "pandas"])
        self.fault = fault
        self.output, self.log = (root.parent / f"{name}.{kind}" for kind in ("output", "events"))
        self.process = context.Process(
            target=_sit, args=(root, arguments, fault, self.output, self.log)
        )
        self.process.start()

    def end(self) -> Ended:
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            code = None
        else:
            code = self.process.exitcode
        output, log = (
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in (self.output, self.log)
        )
        return Ended(self.fault, code, output, tuple(log.splitlines()))


def _sit(root: Path, arguments: tuple[str, ...], fault: Fault, output: Path, log: Path) -> None:
    """Become the `drama` command, in the child process."""
    settle(root, arguments, output)
    events = Events(root, log, fault)
    _count_writes(events)
    _count_steps(events, fault)
    if fault.clock:
        usual = time.time
        time.time = lambda: usual() + fault.clock
    if fault.seconds is not None:
        timer = threading.Timer(fault.seconds, lambda: events.strike("at any moment"))
        timer.daemon = True
        timer.start()

    from drama.cli import main

    main()


class Events:
    """The numbered events of this process.

    Args:
        root: events outside this folder do not count.
        log: which events there were.
        fault: strikes at one of them.
    """

    def __init__(self, root: Path, log: Path, fault: Fault) -> None:
        self.root, self.fault, self.count = root, fault, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)

    def happen(
        self,
        kind: str,
        path: Path | None,
        action: Callable[[], Any],
        *,
        growing: Path | None = None,
        named: bool = False,
    ) -> Any:
        """Carry out an action as an event, and the fault with it.

        Args:
            kind: of event.
            path: what it is about; None for a step.
            action: which returns what the event's caller wants.
            growing: the file whose bytes may be there in part only.
            named: whether the system's error names the file.
        """
        number, self.count = self.count, self.count + 1
        name = re.sub(r"\.[0-9a-f]{8}\.part$", ".part", path.name) if path else ""
        label, fault = f"{number} {kind} {name}".strip(), self.fault
        self.note(label)
        if not self._strikes(number, kind):
            return action()
        if fault.when == "after" and fault.error is None:
            result = action()
        elif fault.when == "half" and growing is not None:
            if kind.startswith("write"):
                result = action()
            found = growing.stat()
            if found.st_nlink == 1:  # otherwise it is one that was whole before, under a new name
                os.truncate(growing, int(found.st_size * fault.share))
        self.strike(f"{fault.when} {label}", path if named else None)
        return result if fault.when == "after" else action()

    def _strikes(self, number: int, kind: str) -> bool:
        fault = self.fault
        if fault.event is None or number <= fault.event or not fault.lasts:
            return number == fault.event
        if fault.error in (errno.ENOSPC, errno.EDQUOT):  # there is room for taking away
            return kind.startswith(("open", "write", "fsync", "mkdir"))
        return kind not in ("step", "round")

    def strike(self, place: str, path: Path | None = None) -> None:
        self.note(f"STRUCK {place}")
        for number in self.fault.signals:
            os.kill(os.getpid(), number)
        if self.fault.error is not None:
            words = os.strerror(self.fault.error)
            raise OSError(self.fault.error, words, *([str(path)] if path else []))

    def note(self, text: str) -> None:
        os.write(self._log, f"{text}\n".encode())

    def counts(self, path: Path) -> bool:
        return path.is_relative_to(self.root)


def _count_writes(events: Events) -> None:
    """Make events of what writes to disk."""
    import pyarrow.parquet as pq

    def about_paths(module: Any, name: str, *, source: bool = False) -> None:
        usual = getattr(module, name)

        def call(path: Any, *others: Any, **options: Any) -> Any:
            about = Path(os.path.abspath(others[0] if source else path))
            if not events.counts(about):
                return usual(path, *others, **options)
            growing = Path(path) if source and Path(path).suffix == ".part" else None
            return events.happen(
                name, about, lambda: usual(path, *others, **options), growing=growing, named=True
            )

        setattr(module, name, call)

    for name in ("replace", "rename", "link"):
        about_paths(os, name, source=True)
    for name in ("unlink", "mkdir", "rmdir"):
        about_paths(os, name)

    usual_open, usual_io_open, usual_fsync = os.open, io.open, os.fsync

    def os_open(path: Any, flags: int, *others: Any, **options: Any) -> int:
        about = Path(os.path.abspath(path))
        if not flags & os.O_CREAT or not events.counts(about):
            return usual_open(path, flags, *others, **options)
        return events.happen(
            "open", about, lambda: usual_open(path, flags, *others, **options), named=True
        )

    def io_open(file: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
        creates = isinstance(file, (str, Path)) and set(mode) & set("xwa")
        if not creates or not events.counts(Path(os.path.abspath(file))):
            return usual_io_open(file, mode, *others, **options)
        return events.happen(
            "open", Path(file), lambda: usual_io_open(file, mode, *others, **options), named=True
        )

    def fsync(descriptor: int) -> None:
        about = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        growing = about if about.suffix == ".part" else None
        events.happen("fsync", about, lambda: usual_fsync(descriptor), growing=growing)

    os.open, io.open, os.fsync = os_open, io_open, fsync  # type: ignore[assignment]

    usual_text, usual_table, usual_batch = (
        Path.write_text, pq.write_table, pq.ParquetWriter.write_batch
    )  # fmt: skip

    def write_text(self: Path, *given: Any, **options: Any) -> int:
        return events.happen(
            "write text", self, lambda: usual_text(self, *given, **options), growing=self
        )

    def write_table(table: Any, where: Path, **options: Any) -> None:
        events.happen(
            "write table", where, lambda: usual_table(table, where, **options), growing=where
        )

    def write_batch(self: Any, *given: Any, **options: Any) -> None:
        where = Path(self.where)
        events.happen(
            "write rows", where, lambda: usual_batch(self, *given, **options), growing=where
        )

    Path.write_text = write_text  # type: ignore[method-assign, assignment]
    pq.write_table, pq.ParquetWriter.write_batch = write_table, write_batch


def _count_steps(events: Events, fault: Fault) -> None:
    """Make events of steps and rounds; have the agent's own faults strike."""
    import torch

    from drama.agent.behaviour.agent import Agent
    from drama.agent.training.loop import Trainer
    from drama.pipeline import episodes

    usual_act, usual_learn, usual_add, usual_choose = (
        Trainer.act_and_store, Trainer.learn_world_model, episodes.KeptEpisodes.add, Agent.act
    )  # fmt: skip
    rounds = 0

    def run_out(place: str, number: int) -> None:
        events.note(f"STRUCK {place} {number}, out of memory")
        if number % 2:
            torch.empty(2**50)
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    def act_and_store(self: Trainer, *given: Any) -> None:
        usual_act(self, *given)
        events.happen("step", None, lambda: None)

    def learn_world_model(self: Trainer) -> None:
        if self.step == fault.crowded:
            run_out("step", self.step)
        if self.step != fault.poisoned:
            return usual_learn(self)
        events.note(f"STRUCK step {self.step}, poisoned")
        hook = self.agent.world_model.encoder.register_forward_pre_hook(
            lambda module, given: (given[0] * float("nan"), *given[1:])
        )
        usual_learn(self)
        hook.remove()

    def add(self: episodes.KeptEpisodes, those: Any) -> None:
        usual_add(self, those)
        events.happen("round", None, lambda: None)

    def act(self: Agent, *given: Any, **options: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == fault.crowded and "evaluate" in sys.argv:
            run_out("round", rounds)
        return usual_choose(self, *given, **options)

    Trainer.act_and_store = act_and_store  # type: ignore[method-assign]
    Trainer.learn_world_model = learn_world_model  # type: ignore[method-assign]
    episodes.KeptEpisodes.add = add  # type: ignore[method-assign]
    episodes.KEEP_SECONDS = 0.0
    Agent.act = act  # type: ignore[method-assign]
