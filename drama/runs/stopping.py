"""Stopping on request: SIGTERM, Ctrl-C or a closed terminal, for commands that can go on later."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from drama.errors import DramaError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Requests to stop. SIGHUP stays ignored where it was ignored before, as `nohup` has it."""


class Stopped(DramaError):
    """The command was asked to stop; what it had reached is saved, and it can go on from there."""

    exit_code = 75


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let a request end the command at once, while there is nothing that must be saved first."""

    def stop(number: int, frame: FrameType | None) -> None:
        _say(b"stopped; the same command goes on\n")
        # Not an Exception, which libraries that are just being imported might swallow.
        raise SystemExit(Stopped.exit_code)

    with _handling(stop):
        yield


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn requests into a flag that the training loop looks at after each step."""
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if not requested:
            _say(b"stopping: this step is finished and everything saved first\n")
        requested = True

    with _handling(request):
        yield lambda: requested


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _say(text: bytes) -> None:
    try:
        os.write(2, text)  # a handler may interrupt a print, whose buffer it must not touch
    except OSError:
        _leave_terminal()


def _leave_terminal() -> None:
    """Let what is still printed go nowhere: a closed terminal must not keep anybody from saving."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)
