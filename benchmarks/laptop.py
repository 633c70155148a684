"""Seconds per update at preset laptop on one core, today's beside an earlier commit's.

    python benchmarks/laptop.py TREE PRESET

times the code in TREE, a checkout of this repository, and prints the seconds of each part as JSON.
Each code is timed in processes of its own, with the preset as that code has it, in turn with the
other, so that a spell of other work on the machine slows both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("learn_world_model", "imagine", "learn_behaviour")
ROUNDS = 3
CALLS = 12
"""Of each part in a process, the first of which are not counted."""
WARM_UP = 3


def gains(
    commit: str, preset: str = "laptop", rounds: int = ROUNDS
) -> Iterator[tuple[str, float, float]]:
    """Yield each part's name and its seconds at an earlier commit and today, and those together.

    Raises:
        ConfigurationError: when there is no such commit here.
        subprocess.CalledProcessError: when its code fails.
    """
    from drama.pipeline.accept import checkout  # not when this times earlier code, which has none

    with tempfile.TemporaryDirectory() as folder:
        earlier = checkout(commit, Path(folder))
        best: dict[Path, dict[str, float]] = {}
        for _ in range(rounds):
            for tree in (earlier, ROOT):
                now = _time(tree, preset)
                before = best.setdefault(tree, now)
                best[tree] = {part: min(now[part], before[part]) for part in PARTS}
    for part in PARTS:
        yield part, best[earlier][part], best[ROOT][part]
    yield "together", sum(best[earlier].values()), sum(best[ROOT].values())


def _time(tree: Path, preset: str) -> dict[str, float]:
    """Return the seconds of each part of a tree's code, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tree), preset],
        env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def main() -> None:
    """Time the code of the tree that the command line names, as its `drama train` runs it."""
    sys.path.insert(0, str(Path(sys.argv[1]) / "benchmarks"))
    import time
    from statistics import median

    import torch
    from updates import Updates

    from drama.pipeline import jobs

    getattr(jobs, "keep_freed_memory", lambda: None)()  # earlier code has none
    torch.set_num_threads(1)
    updates = Updates(sys.argv[2])
    updates.agent.world_model.choose_path(plain=False)
    updates.bfloat16 = updates.settings.training.precision == "bfloat16"
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(CALLS):
        for part in PARTS:
            start = time.perf_counter()
            getattr(updates, part)()
            taken[part].append(time.perf_counter() - start)
    print(json.dumps({part: median(values[WARM_UP:]) for part, values in taken.items()}))


if __name__ == "__main__":
    main()
