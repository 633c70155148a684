"""A results folder as training and evaluation leave it, made small for the report's tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drama.agent.evaluation import SCHEMA
from drama.files import canonical_json, sha256_file
from drama.pipeline.artifacts.evaluations import vouching


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_results(
    results: Path,
    returns: Mapping[str, Sequence[Sequence[float]]],
    *,
    preset: str = "quick",
    complete: bool = False,
    steps: int = 600,
) -> Path:
    """Write plan and runs; `returns` holds, per game and seed, the evaluation's returns."""
    runs = []
    for game, seeds in returns.items():
        for seed, episodes in enumerate(seeds):
            run, evaluation = digest(f"run {game} {seed}"), digest(f"evaluation {game} {seed}")
            folder = results / "runs" / game / f"seed{seed}"
            folder.mkdir(parents=True)
            write_curves(folder, steps, seed)
            write_evaluation(folder, game, seed, run, evaluation, episodes)
            write_record(folder, run, steps, seed)
            runs.append({"game": game, "seed": seed, "run": run, "evaluation": evaluation,
                         "folder": f"runs/{game}/seed{seed}"})  # fmt: skip
    plan = {
        "format": 1,
        "preset": preset,
        "complete_protocol": complete,
        "code": "0" * 64,
        "runs": runs,
    }
    (results / "recipes").mkdir()
    (results / "recipes" / "report.json").write_text(json.dumps(plan))
    return results


def write_curves(folder: Path, steps: int, seed: int) -> None:
    ends = np.linspace(steps / 5, steps - 10 * seed - 1, 5).astype(np.int64)
    episodes = {
        "episode": pa.array(range(5), pa.int32()),
        "step": ends,
        "episode_return": np.linspace(0.0, 4.0 + seed, 5),
        "length": pa.array([steps // 5] * 5, pa.int32()),
        "truncated": [False] * 5,
    }
    pq.write_table(pa.table(episodes), folder / "episodes.parquet")
    windows = np.arange(1, 11) * (steps // 10)
    falling: list[float | None] = [None, *np.linspace(40.0, 1.0, 9)]
    names = ("reconstruction", "reward", "termination", "dynamics")
    losses = {f"loss/{name}": falling for name in names}
    columns: dict[str, Any] = {"step": windows, **losses, "entropy": falling}
    pq.write_table(
        pa.table({**columns, "return_scale": [0.5 + seed] * 10}), folder / "training.parquet"
    )


def write_evaluation(
    folder: Path,
    game: str,
    seed: int,
    run: str,
    evaluation: str,
    returns: Sequence[float],
    *,
    beside: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
    same: bool = False,
    truncated: int = 0,
) -> Path:
    """Write an evaluation: greedy episodes with these returns, sampled ones `beside` them.

    `settings` go over those that fit; `same` episodes are all one and the same, and the first
    `truncated` are cut off.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for actions, values in (("greedy", returns), ("sampled", beside)):
        for index, value in enumerate(values):
            row = {"episode": index, "actions": actions, "seed": index, "episode_return": value,
                   "length": 90, "truncated": index < truncated,
                   "played": digest("" if same else f"{actions} {index}")[:16]}  # fmt: skip
            for name, cell in row.items():
                columns[name].append(cell)
    table = pa.table(columns, SCHEMA)
    asked = {"episodes": max(len(returns), 1), "environments": 2, "actions": "greedy",
             "both": bool(beside), "enough_same": 0}  # fmt: skip
    played = {"greedy": len(returns)} | ({"sampled": len(beside)} if beside else {})
    origin = {
        "format": 1, "run": run, "fingerprint": evaluation, "game": game, "seed": seed,
        "settings": {**asked, **(settings or {})}, "device": "cpu", "backend": "torch",
        "played": played,
    }  # fmt: skip
    path = folder / f"evaluation-{evaluation[:16]}.parquet"
    return write_vouching(path, table, origin)


def write_vouching(path: Path, table: pa.Table, header: Mapping[str, Any]) -> Path:
    """Write rows and header with the digest that is right for them."""
    known = json.dumps(vouching(header, table.to_pylist()))
    pq.write_table(table.replace_schema_metadata({b"drama": known.encode()}), path)
    return path


def write_record(folder: Path, run: str, steps: int, seed: int) -> None:
    artifacts = [
        {"path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
         "bytes": path.stat().st_size}
        for path in (folder / "episodes.parquet", folder / "training.parquet")
    ]  # fmt: skip
    record = {
        "format": 1, "fingerprint": run, "recipe": {}, "artifacts": artifacts,
        "versions": {"python": "3.11.2"}, "device": "cpu", "backend": "torch",
        "wall_seconds": 3725.0 + seed,
        "git_commit": "abcdef0123456789" + ("-dirty" if seed else ""),
        "finished": "2025-01-01T00:00:00+00:00", "steps": steps,
    }  # fmt: skip
    (folder / f"run-{run[:16]}.json").write_text(json.dumps(record))


def plan_anew(results: Path, game: str, seed: int, **settings: int) -> str:
    """Let the plan ask for a run of later code where a whole one lies; returns that one's commit.

    `settings` are what the later plan says in place of the whole run's `{"steps": 600}`.
    """
    folder = results / "runs" / game / f"seed{seed}"
    (path,) = folder.glob("run-*.json")
    (old,) = folder.glob("evaluation-*.parquet")
    recipe = {"game": game, "seed": seed, "settings": {"steps": 600}, "code": "1", "runtime": "1"}
    run, evaluation = digest(canonical_json(recipe)), digest("an earlier evaluation")
    record = json.loads(path.read_text()) | {"recipe": recipe, "fingerprint": run}
    path.unlink()
    (folder / f"run-{run[:16]}.json").write_text(json.dumps(record))
    returns = pq.read_table(old)["episode_return"].to_pylist()
    old.unlink()
    new = write_evaluation(folder, game, seed, run, evaluation, returns)
    note = {"fingerprint": evaluation, "sha256": sha256_file(new)}
    (folder / "evaluation.json").write_text(json.dumps(note))
    planned = recipe | {"code": "2", "settings": {"steps": 600} | settings}
    place = results / "recipes" / game / f"seed{seed}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(canonical_json(planned))
    return str(record["git_commit"])
