"""Which faults a case has: drawn from its number alone, so that it can be had again."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from striking import Fault

SEED = 20261128
Command = Literal["train", "evaluate"]
KINDS = ("kill", "error", "stop", "half", "two", "moment", "clock", "poison", "memory")
"""What strikes first; further faults of a case are of the first four or `moment`."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        number: its own.
        kind: what strikes first.
        command: which is given again and again.
        faults: of one sitting each.
    """

    number: int
    kind: str
    command: Command
    faults: tuple[Fault, ...]


def draw(number: int, events: dict[Command, Sequence[str]], seconds: dict[Command, float]) -> Case:
    """Draw a case.

    Args:
        number: the case's.
        events: of an undisturbed sitting of each command.
        seconds: that such a sitting takes.
    """
    chance = random.Random(f"{SEED} {number}")
    kind = KINDS[number % len(KINDS)]
    trains = kind == "poison" or chance.random() < 0.7
    command: Command = "train" if trains else "evaluate"
    faults = []
    for place in range(1 if kind == "poison" else chance.choice((1, 1, 2, 3))):
        of = kind if place == 0 else chance.choice(("kill", "error", "stop", "half", "moment"))
        # Who goes on has less to do.
        upto = len(events[command]) if place == 0 else max(1, len(events[command]) // 2)
        faults.append(_fault(chance, of, events[command][:upto], seconds[command], trains=trains))
    return Case(number, kind, command, tuple(faults))


def _fault(
    chance: random.Random, kind: str, events: Sequence[str], seconds: float, *, trains: bool
) -> Fault:
    writes = [
        number
        for number, event in enumerate(events)
        if not event.endswith(("step", "round"))
    ]  # fmt: skip
    event = chance.choice(writes if chance.random() < 0.8 else range(len(events)))
    when, share = chance.choice(("before", "after")), chance.choice((0.0, 0.1, 0.5, 0.9, 0.99))
    signals = (*chance.sample(REQUESTS, chance.choice((1, 1, 2))),)
    match kind:
        case "kill" | "two":
            return Fault(event, when, signals=(signal.SIGKILL,))
        case "half":
            return Fault(event, "half", share, (signal.SIGKILL,))
        case "stop":
            return Fault(event, when, signals=signals)
        case "error":
            error, lasts = chance.choice(ERRORS), chance.random() < 0.5
            return Fault(event, "half", share, error=error, lasts=lasts)
        case "moment":
            kills = chance.random() < 0.5
            after = chance.uniform(0, seconds)
            return Fault(seconds=after, signals=(signal.SIGKILL,) if kills else signals)
        case "clock":
            wrong = chance.choice((-1, 1)) * chance.choice((3600.0, 86_400.0, 4e7))
            return Fault(event, when, signals=(signal.SIGKILL,), clock=wrong)
        case "poison":
            return Fault(poisoned=chance.randrange(20, 61))
        case _:
            return Fault(crowded=chance.randrange(20, 61) if trains else chance.randrange(1, 20))
