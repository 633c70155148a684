"""Measure how fast everything is and how it grows, on whatever is there: `make bench`.

    python benchmarks/bench.py [--parts NAME,...] [--device cpu|cuda] [--published CHECKOUT]
        [--against COMMIT] [--dry]
    python benchmarks/bench.py --markdown

Parts run one after another; one that fails says so, and the rest go on. Figures are held against
those that are stored for the same device, which are then replaced, part by part, unless something
failed. `--markdown` measures nothing: it prints the README's table from what is stored.
OMP_NUM_THREADS says how many cores to use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import records
import torch
import training
import updates
from measuring import ROOT, ROUNDS, Figure, describe, device_name, slug
from rich.console import Console
from scaling import imagination, memory, parquet, replay, sequence

RESULTS = ROOT / "benchmarks" / "results"
UNSTORED = ROOT / "build" / "benchmarks"
ANYWHERE = ("cpu", "cuda")

Measure = Callable[[torch.device], Iterable[Figure]]


@dataclass(frozen=True)
class Part:
    """A part of the benchmarks.

    Attributes:
        measure: yields its figures, measured on a device.
        devices: the kinds of device that it has something to say about.
    """

    measure: Measure
    devices: tuple[str, ...] = ANYWHERE


PARTS = {
    "training": Part(training.measure, devices=("cuda",)),
    "updates": Part(updates.measure),
    "sequence": Part(sequence.measure),
    "imagination": Part(imagination.measure),
    "replay": Part(replay.measure),
    "parquet": Part(parquet.measure),
    "memory": Part(memory.measure),
}


def published(checkout: Path) -> Part:
    """Return the part that times the published code, and this one beside it."""

    def measure(device: torch.device) -> Iterable[Figure]:
        from published import measure as take_turns

        for name, times in take_turns(checkout, ROUNDS - 1, device.type).items():
            for code, seconds in times.items():
                yield Figure("published", name, {"code": code}, seconds, "s")
                if code == "published":
                    continue
                gain = times["published"] / seconds
                yield Figure(
                    "published", f"{name}, {code} over published", {}, gain, "times as fast",
                    headline=f"one update of everything, {code} against the published code"
                    if name == "together"
                    else "",
                )  # fmt: skip

    return Part(measure)


def laptop(commit: str) -> Part:
    """Return the part that times preset laptop, and an earlier commit's beside it."""

    def measure(device: torch.device) -> Iterable[Figure]:
        from laptop import gains

        for part, before, now in gains(commit):
            name = updates.PARTS.get(part, part)
            for code, seconds in ((commit, before), ("now", now)):
                yield Figure("laptop", name, {"code": code}, seconds, "s")
            whole = f"one update of everything, preset laptop, one core, over commit {commit}"
            yield Figure(
                "laptop", f"{name}, now over {commit}", {}, before / now, "times as fast",
                headline=whole if part == "together" else "",
            )  # fmt: skip

    return Part(measure, devices=("cpu",))


def run(
    parts: dict[str, Part], device: torch.device, console: Console
) -> tuple[dict[str, records.Measured], list[str]]:
    """Measure parts one after another; returns what was found, and the names of those that failed.

    A failure is reported and concerns its own part only.
    """
    found: dict[str, records.Measured] = {}
    failed: list[str] = []
    for name, part in parts.items():
        if device.type not in part.devices:
            console.print(f"{name}: nothing to measure on {device.type}")
            continue
        console.print(f"{name} ...")
        start = time.monotonic()
        try:
            with console.status(name):
                machine = describe(device)
                figures = tuple(part.measure(device))
        except (Exception, SystemExit) as error:
            failed.append(name)
            console.print(f"{name} failed: {error}", style="bold red", markup=False)
            console.print("".join(traceback.format_exception(error)), markup=False, highlight=False)
            continue
        found[name] = records.Measured(machine, time.monotonic() - start, figures)
        console.print(records.table(name, found[name]))
    return found, failed


def report(
    before: dict[str, records.Measured], now: dict[str, records.Measured], console: Console
) -> None:
    """Print what is not as wanted and what changed against the stored figures."""
    for figure in records.beyond_limits(now):
        value, limit = records.number(figure.value), records.number(figure.limit)
        text = f"{records.label(figure)}: {value} {figure.unit}, wanted at most {limit}"
        console.print(text, style="red", markup=False)
    compared = [name for name in now if name in before]
    if not compared:
        console.print("No stored figures of these parts on this device to compare with.")
        return
    changes = records.compare(before, now)
    for change in changes:
        console.print(str(change), style="yellow" if change.worse else "green", markup=False)
    if not changes:
        console.print(f"{', '.join(compared)}: all within a quarter of the stored figures.")


def store(parts: dict[str, records.Measured], path: Path) -> None:
    """Write figures, and the picture of them beside them."""
    from drawing import draw  # slow to import, and not wanted in the processes of the parts

    records.write(path, parts)
    draw(path.with_suffix(".svg"), parts)


def choose(given: argparse.Namespace) -> dict[str, Part]:
    """Return the parts that are asked for.

    Raises:
        SystemExit: naming one that there is not.
    """
    known = dict(PARTS)
    if given.published:
        known["published"] = published(given.published)
    if given.against:
        asked = ["git", "rev-parse", "--verify", "--quiet", f"{given.against}^{{commit}}"]
        if subprocess.run(asked, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            print(f"--against {given.against}: no such commit here", file=sys.stderr)
            raise SystemExit(2)
        known["laptop"] = laptop(given.against)
    if not given.parts:
        return known
    names = given.parts.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = " (name a checkout with --published)" if "published" in unknown else ""
        hint += " (name a commit with --against)" if "laptop" in unknown else ""
        print(f"no part {', '.join(unknown)}{hint}; parts are {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return {name: known[name] for name in names}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure how fast it is and how it grows.")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)},published; by default all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--published", type=Path, help="a checkout of the published code")
    parser.add_argument("--against", help="a commit, to time preset laptop beside its own")
    parser.add_argument("--dry", action="store_true", help="leave the stored figures as they are")
    parser.add_argument("--markdown", action="store_true", help="print the stored figures' table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are stored")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store; returns the exit code."""
    given = parse(arguments)
    if given.markdown:
        stored = [records.read(path) for path in sorted(given.results.glob("*.json"))]
        order = [*PARTS, "laptop", "published"]
        devices = [{name: parts[name] for name in order if name in parts} for parts in stored]
        print(records.markdown(devices, training.headlines()), end="")
        return 0
    kind = given.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    console = Console(width=None if sys.stdout.isatty() else 120)
    wanted = choose(given)
    name = f"{slug(device_name(device))}.json"
    before = records.read(given.results / name)
    console.print(f"{device_name(device)}, PyTorch {torch.__version__}")
    if not given.published and not given.parts:
        console.print("The published code is not timed: no checkout of it is named.")

    start = time.monotonic()
    now, failed = run(wanted, device, console)
    report(before, now, console)
    place = (UNSTORED if given.dry or failed else given.results) / name
    if now:
        store({**before, **now}, place)
        console.print(f"{place}, after {(time.monotonic() - start) / 60:.1f} minutes")
    if failed:
        console.print(f"failed: {', '.join(failed)}; the stored figures are as they were")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
