"""Does a long run stay as it is: memory, open files and disk, once its replay ring is full?

    python benchmarks/soak.py --minutes 30

trains a toy run of Pong over a ring of 5000 transitions, in a folder of its own, and looks at the
process again and again. Every row in the ring is overwritten many times. Prints a table, and how
much the second half of the time differs from the first after the ring was full. What grows on the
disk is replay that has left the ring, which is told apart.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from drama.runs.folder import REPLAY, STATUS
from drama.runs.progress import Status

ROOT = Path(__file__).resolve().parents[1]
LOOKS = 60
"""How often the process is looked at, evenly."""


@dataclass(frozen=True)
class Look:
    """What a look at the process found.

    Attributes:
        minutes: since it was started.
        step: agent steps done.
        memory: resident, in MB.
        files: open descriptors.
        threads: of the process.
        disk: of its folder without replay, in MB.
        replay: on disk, in MB.
    """

    minutes: float
    step: int
    memory: float
    files: int
    threads: int
    disk: float
    replay: float


def soak(folder: Path, minutes: float, ring: int) -> Iterator[Look]:
    """Train in a folder for so long, and yield what is seen; asks the run to stop at the end."""
    game = ("--preset", "quick", "--games", "Pong", "--seeds", "0")
    settings = (
        f"replay.capacity={ring}",
        "training.total_steps=100000000",
        "training.log_every=1000",
    )
    wanted = [part for setting in settings for part in ("--set", setting)]
    call = [sys.executable, "-m", "drama"]
    place = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    subprocess.run([*call, "plan", *game, *wanted], check=True, **place)
    recipe = "results/quick/recipes/Pong/seed0.json"
    run = folder / "results/quick/runs/Pong/seed0"
    started = time.monotonic()
    with subprocess.Popen([*call, "train", recipe, "--device", "cpu"], **place) as process:
        try:
            for look in range(1, LOOKS + 1):
                time.sleep(max(0.0, started + 60 * minutes * look / LOOKS - time.monotonic()))
                if process.poll() is not None:
                    raise SystemExit(f"the run ended by itself, with code {process.returncode}")
                yield _look(process.pid, run, (time.monotonic() - started) / 60)
        finally:
            process.terminate()


def _look(process: int, run: Path, minutes: float) -> Look:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    said = dict(line.split(":", 1) for line in lines)
    status = Status.read(run / STATUS)
    sizes = {path: path.stat().st_size for path in run.rglob("*.parquet") if path.exists()}
    replay = sum(size for path, size in sizes.items() if path.parent.name == REPLAY)
    return Look(
        minutes=minutes,
        step=status.step if status else 0,
        memory=int(said["VmRSS"].split()[0]) / 1024,
        files=len(os.listdir(f"/proc/{process}/fd")),
        threads=int(said["Threads"]),
        disk=(sum(sizes.values()) - replay) / 1e6,
        replay=replay / 1e6,
    )


def main() -> None:
    """Run the soak and print what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ring", type=int, default=5_000, help="transitions")
    asked = parser.parse_args()
    looks: list[Look] = []
    with tempfile.TemporaryDirectory() as folder:
        for look in soak(Path(folder), asked.minutes, asked.ring):
            looks.append(look)
            print(f"{look.minutes:5.1f} min, step {look.step}: {look.memory:.0f} MB", flush=True)
    table = Table(
        "minute", "step", "memory, MB", "descriptors", "threads", "disk, MB", "replay, MB"
    )
    for look in looks[:: max(1, len(looks) // 15)]:
        table.add_row(
            f"{look.minutes:.0f}", str(look.step), f"{look.memory:.1f}", str(look.files),
            str(look.threads), f"{look.disk:.2f}", f"{look.replay:.1f}",
        )  # fmt: skip
    Console().print(table)
    full = [look for look in looks if look.step >= 2 * asked.ring]
    if len(full) < 4:
        print(f"The ring of {asked.ring} was not full for long enough; give it more minutes")
        return
    halves = full[: len(full) // 2], full[len(full) // 2 :]
    for name, unit in (("memory", "MB"), ("files", "descriptors"), ("disk", "MB")):
        first, second = (mean(getattr(look, name) for look in half) for half in halves)
        print(f"{name}: {first:.2f} {unit} on average, then {second:.2f}: {second - first:+.2f}")


if __name__ == "__main__":
    main()
