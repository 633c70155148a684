"""Standard streams as commands need them: all three there, none failing over a character."""

from __future__ import annotations

import io
import os
import sys


def settle_streams() -> None:
    """Open those that are closed, and let a terminal show `?` for characters that it lacks.

    The next file to be opened would otherwise get a closed stream's number, and what is said would
    go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False, errors="replace"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
