"""How long the commands around the runs take: for all of config/config.yaml, and for 26 x 40.

    python benchmarks/scale.py [FOLDER]

Makes a copy of the project in a scratch folder, fills it with synthetic whole runs (ten replay
shards each, as 100 000 steps leave behind; small files, so that what is measured is the commands'
own work, not the disk), and prints a table. Nothing outside the scratch folder changes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drama.files import canonical_json, sha256_file
from drama.pipeline.artifacts.evaluations import vouching
from drama.pipeline.plans import Plan, PlannedRun
from drama.pipeline.recipes import plan

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "config", "containers", "drama", "workflow", "Snakefile", "dvc.yaml", ".dvcignore",
    ".gitignore",
)  # fmt: skip
DRY_RUN = ("snakemake", "--profile", "workflow/profiles/local", "-n")
SHARDS = 10
SHARD_BYTES = 20_000
CHECKPOINT_BYTES = 100_000
TEN_STAGES = [f"{stage}@Pong-{seed}" for stage in ("train", "evaluate") for seed in range(5)]
REPORT = (
    "figures/scores.svg", "index.html", "report.md", "scores.parquet", "aggregates.json",
    "metrics.json", "scores.csv",
)  # fmt: skip


def make_project(root: Path) -> Plan:
    """Copy the project to an empty folder, make it a git repository, and go there."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "images")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    os.chdir(root)
    subprocess.run(["git", "init", "--quiet"], check=True)
    return plan(Path("config/config.yaml"))


def make_run(run: PlannedRun) -> None:
    """Write files as a whole run has them, different in every run, and its record."""
    names = [f"replay/part-{part:05d}.parquet" for part in range(SHARDS)]
    sizes = dict.fromkeys(names, SHARD_BYTES) | {
        "checkpoint.parquet": CHECKPOINT_BYTES, "episodes.parquet": 20_000,
        "training.parquet": 50_000,
    }  # fmt: skip
    (run.folder / "replay").mkdir(parents=True)
    for name, size in sizes.items():
        (run.folder / name).write_bytes(os.urandom(size))
    write_evaluation(run)
    artifacts = [
        {"path": name, "sha256": sha256_file(run.folder / name), "bytes": size}
        for name, size in sorted(sizes.items())
    ]
    record = {
        "format": 1, "fingerprint": run.fingerprint, "artifacts": artifacts,
        "recipe": json.loads(run.recipe.read_bytes()), "versions": {}, "device": "cpu",
        "backend": "torch", "wall_seconds": 3600.0, "steps": 100_000, "git_commit": None,
        "finished": "2026-11-28T00:00:00+00:00",
    }  # fmt: skip
    run.record.write_text(canonical_json(record))


def write_evaluation(run: PlannedRun) -> None:
    """Write an evaluation as it is read back: 100 greedy episodes."""
    asked = {"episodes": 100, "environments": 1, "actions": "greedy", "both": False}
    header = {
        "format": 1, "run": run.fingerprint, "fingerprint": run.evaluation_fingerprint,
        "device": "cpu", "backend": "torch", "played": {"greedy": 100},
        "settings": asked | {"enough_same": 0},
    }  # fmt: skip
    returns = [float(run.seed)] * 100
    table = pa.table({
        "episode": range(100), "actions": ["greedy"] * 100, "seed": [0] * 100,
        "episode_return": returns, "length": [90] * 100, "truncated": [False] * 100,
        "played": [f"{index:016x}" for index in range(100)],
    })  # fmt: skip
    header = vouching(header, table.to_pylist())
    pq.write_table(table.replace_schema_metadata({"drama": json.dumps(header)}), run.evaluation)


def make_report(planned: Plan) -> None:
    """Write files that stand for a report."""
    for name in REPORT:
        path = planned.results / "report" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    planned.report.write_text("{}")


def change_a_game() -> None:
    """Edit one game's entry."""
    path = Path("config/config.yaml")
    path.write_text(path.read_text().replace("Pong: {}", "Pong: {replay: {alpha: 0.5}}"))


def empty_the_lock_file() -> None:
    """Leave dvc.lock as a kill of DVC itself can leave it."""
    Path("dvc.lock").write_text("")


def ask_for_forty_seeds() -> None:
    """Edit the seeds: 26 x 40 runs."""
    path = Path("config/config.yaml")
    path.write_text(path.read_text().replace("[0, 1, 2, 3, 4]", str(list(range(40)))))


def processor_seconds() -> float:
    """Return the processor time of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*command: str) -> tuple[float, float, str]:
    """Run a command; returns the seconds and processor seconds it took, and its last line."""
    start, used = time.monotonic(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, used = time.monotonic() - start, processor_seconds() - used
    line = (done.stdout.strip().splitlines() or [""])[-1].strip()
    if line.startswith("{"):
        names = list(json.loads(line))
        line = f"names {len(names)} stages: {names[0]} ... {names[-1]}"
    return seconds, used, line


def main() -> None:
    """Measure and print."""
    scratch = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    root = scratch.resolve() / "project"
    root.mkdir(parents=True)
    os.environ["PYTHONPATH"] = str(root)
    planned = make_project(root)

    def make_everything() -> None:
        for run in planned.runs:
            make_run(run)
        make_report(planned)

    plan_runs = ("drama", "plan", "--config", "config/config.yaml", "--preset", "xs")
    steps: list[tuple[str, Callable[[], None] | None, tuple[str, ...]]] = [
        ("`drama plan`, first time", lambda: shutil.rmtree("results"), plan_runs),
        ("`drama plan`, nothing changed", None, plan_runs),
        ("`snakemake -n`, nothing made", None, DRY_RUN),
        ("`snakemake -n`, everything made", make_everything, DRY_RUN),
        ("`drama status`", None, ("drama", "status")),
        ("`drama record`, first time", None, ("drama", "record")),
        ("`drama record`, nothing new", None, ("drama", "record")),
        ("`drama record`, dvc.lock emptied", empty_the_lock_file, ("drama", "record")),
        ("`dvc status`, all current", None, ("dvc", "status")),
        ("`dvc commit`, everything", None, ("dvc", "commit", "--force")),
        ("`dvc commit`, ten stages named", None, ("dvc", "commit", "--force", *TEN_STAGES)),
        ("`dvc push`, everything", None, ("dvc", "push", "--quiet")),
        ("`drama plan`, one game edited, noted in DVC", change_a_game, ("drama", "plan")),
        ("`dvc status`, one game edited", None, ("dvc", "status", "--json")),
        ("26 x 40: `drama plan`, first time", ask_for_forty_seeds, plan_runs),
        ("26 x 40: `drama plan`, nothing changed", None, plan_runs),
        ("26 x 40: `snakemake -n`", None, DRY_RUN),
        ("26 x 40: `drama status`", None, ("drama", "status")),
    ]
    print(f"{len(planned.runs)} runs of {SHARDS + 3} files\n")
    print("| command | seconds | of a processor | the last line it printed |\n|---|---:|---:|---|")
    for name, prepare, command in steps:
        if prepare:
            prepare()
        seconds, used, line = timed(*command)
        print(f"| {name} | {seconds:.1f} | {used:.1f} | {line} |", flush=True)


if __name__ == "__main__":
    main()
