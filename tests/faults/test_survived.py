"""Killed, starved, stopped at any moment: the same command goes on, and ends with the same bytes.

`DRAMA_FAULT_CASES` says how many cases are tried; each is drawn from its number alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from schedule import Case, Command, draw
from striking import Ended, Fault, Sitting
from workspace import make_workspace, sha256

from drama.errors import LONGEST, shown

CASES = int(os.environ.get("DRAMA_FAULT_CASES", "9"))
TOTAL_STEPS = 60
FAILED, WRONG_USE, FAILED_FOR_GOOD, STOPPED = 1, 2, 3, 75

# Four games, two whole shards; the first update at step 20, the first checkpoints between shards.
PRESET = f"""\
base: quick
replay: {{capacity: 30}}
world_model: {{channels: [4, 8, 8], batch_size: 2, sequence_length: 8}}
behaviour: {{contexts: 4, horizon: 3, acting_window: 4}}
training:
  total_steps: {TOTAL_STEPS}
  random_steps: 20
  world_model_every: 1
  behaviour_every: 3
  log_every: 15
evaluation: {{episodes: 3, environments: 2}}
"""
EXPERIMENT = """\
preset: tiny
games:
  Catch8:
seeds: [0]
device: cpu
results: results
"""
RECIPE = "results/tiny/recipes/Catch8/seed0.json"
RUN = Path("results/tiny/runs/Catch8/seed0")
ARGUMENTS: dict[Command, tuple[str, ...]] = {
    "train": ("train", RECIPE, "--device", "cpu", "--checkpoint-every", "17"),
    "evaluate": ("evaluate", RECIPE, "--device", "cpu"),
}


@dataclass(frozen=True)
class Undisturbed:
    """Projects in which a command is about to be given, and what it then leaves and does."""

    before: dict[Command, Path]
    left: dict[Command, dict[str, Any]]
    events: dict[Command, Sequence[str]]
    seconds: dict[Command, float]


@pytest.fixture(scope="session")
def undisturbed_catch(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    files = {"config/presets/tiny.yaml": PRESET, "config/config.yaml": EXPERIMENT}
    made = make_workspace(folder / "project", files)
    made.plan()
    found = Undisturbed({}, {}, {}, {})
    for command, arguments in ARGUMENTS.items():
        found.before[command] = folder / command
        shutil.copytree(made.root, folder / command)
        begun = time.monotonic()
        ended = Sitting(made.root, arguments, Fault(), command).end()
        found.seconds[command] = time.monotonic() - begun
        assert ended.code == 0, ended
        found.events[command] = ended.events
        found.left[command] = what_is_left(made.root)
    return found


def what_is_left(root: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way, hidden files included."""
    left: dict[str, Any] = {}
    for path in (root / "results").rglob("*"):
        name = str(path.relative_to(root))
        if path.is_dir():
            left[name] = "folder"
        elif path.name == "status.json":
            status = json.loads(path.read_text(encoding="utf-8"))
            kept = ("fingerprint", "state", "step", "total_steps", "message", "permanent")
            left[name] = {key: status[key] for key in kept}
        elif path.match("run-*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            left[name] = record | {"wall_seconds": 0, "finished": ""}
        else:
            left[name] = sha256(path)
    return left


def check_ended(ended: Ended) -> None:
    """It was done, or killed, or says in a clear sentence why not."""
    assert ended.code is not None, "it did not end"
    assert "Traceback" not in ended.output and "Exception ignored" not in ended.output
    if ended.code == 0 or (ended.struck and ended.fault.kills and ended.code < 0):
        return
    if ended.code < 0:  # asked to stop before there was anything to stop, or after all was done
        events = [event for event in ended.events if not event.startswith("STRUCK")]
        assert -ended.code in ended.fault.signals
        assert not events or ("unlink" in events[-1] and ".lock" in events[-1])
        return
    assert ended.code in (FAILED, WRONG_USE, FAILED_FOR_GOOD, STOPPED)
    said = ended.output.strip().splitlines()[-1]
    assert not ended.fault.poisoned or re.search(r"is nan.* of step (0|17|34|51)$", said)
    assert len(said) <= LONGEST and shown(said) == said and len(said.split()) > 4
    expected = FAILED_FOR_GOOD if ended.fault.poisoned else FAILED
    assert ended.code == (STOPPED if ended.fault.signals else expected)


def given_again(root: Path, case: Case) -> list[Ended]:
    """Give the command with each of the faults, then until it ends well; returns all sittings."""
    sittings = []
    arguments = ARGUMENTS[case.command]
    for place, fault in enumerate(case.faults):
        together = [Sitting(root, arguments, fault, f"{place}")]
        if case.kind == "two" and place == 0:
            together.append(Sitting(root, arguments, Fault(), "other"))
        sittings += [sitting.end() for sitting in together]
    sittings.append(Sitting(root, arguments, Fault(), "last").end())
    return sittings


def how_to_repeat(case: Case) -> str:
    return (
        f"{case.kind} case {case.number} of `drama {case.command}`; alone: "
        f"DRAMA_FAULT_CASES={case.number + 1} pytest tests/faults -k 'bytes and {case.number}]'"
    )


@pytest.mark.parametrize("number", range(CASES))
def test_the_same_command_ends_with_the_same_bytes(
    undisturbed_catch: Undisturbed,
    tmp_path: Path,
    number: int,
    record_property: Callable[[str, object], None],
) -> None:
    case = draw(number, undisturbed_catch.events, undisturbed_catch.seconds)
    root = tmp_path / "project"
    shutil.copytree(undisturbed_catch.before[case.command], root)
    sittings = given_again(root, case)
    print(how_to_repeat(case), *sittings, sep="\n")  # shown where it fails
    for ended in sittings:
        check_ended(ended)
        assert ended.code == 0 or ended.fault != Fault(), "it does not go on"
    assert what_is_left(root) == undisturbed_catch.left[case.command]
    record_property("kind", case.kind)
    record_property("codes", [ended.code for ended in sittings[:-1] if ended.struck])


@pytest.mark.whole
@pytest.mark.parametrize(
    ("command", "crowded", "named"),
    [
        ("train", 24, "cpu: CUDA out of memory"),
        ("train", 25, "can't allocate memory: you tried to allocate"),
        ("evaluate", 2, "cpu: CUDA out of memory"),
    ],
)
def test_a_device_without_memory_is_named_and_the_same_command_goes_on(
    undisturbed_catch: Undisturbed, tmp_path: Path, command: Command, crowded: int, named: str
) -> None:
    case = Case(0, "memory", command, (Fault(crowded=crowded),))
    root = tmp_path / "project"
    shutil.copytree(undisturbed_catch.before[command], root)
    struck, last = given_again(root, case)
    check_ended(struck)
    assert struck.code == FAILED and last.code == 0
    said = struck.output.splitlines()[-1]
    assert said.startswith(str(RUN)) and named in said and said.endswith("same command goes on")
    assert what_is_left(root) == undisturbed_catch.left[command]
