"""Refactoring without retraining: is today's code the same as an earlier commit's, byte for byte?

Both codes train, stop, go on and play the same short runs. When all that they made is equal, the
hashes of today's code join the earlier ones in accepted.json, and every recorded run stays current
(`drama.pipeline.fingerprints`). The probes walk every sequence model, both distributions over the
replay memory, both families of games and most settings; what they do not walk, such as a GPU, they
say nothing about.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from drama.errors import ConfigurationError, DramaError
from drama.files import flatten, unflatten, write_json
from drama.pipeline.config import Preset, load_preset
from drama.pipeline.fingerprints import (
    ACCEPTED,
    LIBRARIES,
    LOCK_FILE,
    PACKAGE,
    Accepted,
    Choices,
    accepted,
    evaluation_code_hash,
    lock_hash,
    run_code_hash,
)
from drama.pipeline.history import ADDED
from drama.pipeline.layers import Layer, read_mapping
from drama.reading import read_json, read_table
from drama.runs.checkpoint import load_checkpoint
from drama.runs.folder import CHECKPOINT, EPISODES, REPLAY, TRAINING
from drama.runs.shards import read_shards

PATIENCE = 1200.0
"""Seconds that one command of a probe may take, on a machine that has other work, too."""

BASE: Mapping[str, Any] = {
    "environment": {"max_frames": 200},
    "replay": {"capacity": 90},
    "world_model": {"channels": [4, 8, 8], "batch_size": 2, "sequence_length": 8},
    "behaviour": {"contexts": 4, "horizon": 3, "acting_window": 4},
    "training": {"total_steps": 240, "random_steps": 40, "log_every": 15},
    "evaluation": {"episodes": 3, "environments": 2, "both": True},
}
"""Over preset quick, in every probe: a ring that wraps, windows that fill, some hundred updates."""


@dataclass(frozen=True)
class Probe:
    """A short run, with settings over those of all probes."""

    name: str
    game: str
    settings: Mapping[str, Any]


PROBES = (
    Probe("mamba2", "Pong", {}),
    Probe(
        "mamba2-laptop",
        "Breakout",
        {
            "world_model": {"channels": [8, 16], "kernel": 3, "strides": [8, 2]},
            "sequence_model": {"dropout": 0.0},
            "training": {"precision": "bfloat16"},
        },
    ),
    Probe(
        "mamba",
        "Breakout",
        {
            "environment": {
                "repeat_action_probability": 0.25,
                "no_op_starts": 10,
                "life_loss_terminates": "episode",
            },
            "replay": {"sampling": "uniform"},
            "sequence_model": {"kind": "mamba"},
            "world_model": {"optimiser": {"decay_spares": "gains_and_dynamics"}},
            "behaviour": {"epsilon": 0.1, "temperature": 1.5},
        },
    ),
    Probe(
        "transformer",
        "Catch8",
        {
            "sequence_model": {"kind": "transformer"},
            "replay": {"shuffle_rewards": True},
            "behaviour": {"act_on": "posterior"},
        },
    ),
    Probe(
        "gru",
        "Catch16",
        {
            "sequence_model": {"kind": "gru"},
            "replay": {"sampling": "uniform"},
            "world_model": {"reconstruction": "gaussian"},
            "behaviour": {"as_published": True},
        },
    ),
    Probe("rwkv", "Pong", {"sequence_model": {"kind": "rwkv"}}),
)


class NotAccepted(DramaError):
    """Today's code makes other bytes; the text says where the first are."""


@dataclass(frozen=True)
class Names:
    """What a commit calls its code, in the recipes that it plans."""

    code: Mapping[Choices, str]
    evaluation: str
    runtime: str


def accept(commit: str | None = None) -> Iterator[str]:
    """Hold the code of HEAD against an earlier commit's; enter it into accepted.json if equal.

    Args:
        commit: the earlier one; by default the one that was held against, or accepted, last.

    Yields:
        What was found, line by line.

    Raises:
        ConfigurationError: outside a checkout, with changes not committed, or no such commit.
        NotAccepted: when anything differs; accepted.json stays as it is.
    """
    head = _head()
    with tempfile.TemporaryDirectory(prefix="drama-accept-") as folder:
        earlier = checkout(commit or accepted().commit, Path(folder) / "earlier")
        today = checkout(head, Path(folder) / "today")
        if lock_hash(earlier / LOCK_FILE, LIBRARIES) != lock_hash(LOCK_FILE, LIBRARIES):
            raise NotAccepted(
                f"{LOCK_FILE} pins other versions of {', '.join(LIBRARIES)} than that commit's; "
                "probes with today's versions say nothing about runs with others"
            )
        names = _names(earlier)
        entered = enter(accepted(), names, head)
        if entered == accepted().model_copy(update={"commit": head}):
            yield "The same code in all that counts in a fingerprint: nothing to accept"
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(lambda probe: held(probe, earlier, today), PROBES)
        write_json(ACCEPTED, entered.model_dump())
    yield f"Accepted, and recorded runs stay current: commit {ACCEPTED.relative_to(PACKAGE.parent)}"


def enter(known: Accepted, names: Names, commit: str) -> Accepted:
    """Return what is accepted when today's code equals the code that has these names.

    An accepted commit may not have known yet that it was, and call its code by a hash that is
    another name's entry by now.
    """
    entered = known.model_dump() | {"commit": commit}
    todays = [
        *(("code", names.code[choices], run_code_hash(choices)) for choices in Choices.every()),
        ("evaluation", names.evaluation, evaluation_code_hash()),
        ("runtime", names.runtime, lock_hash(LOCK_FILE, LIBRARIES)),
    ]
    for section, name, digest in todays:
        entries = entered[section]
        name = next((first for first, same in entries.items() if name in same), name)
        if digest != name and not any(digest in same for same in entries.values()):
            entries.setdefault(name, []).append(digest)
    return Accepted(**entered)


# --- commits -------------------------------------------------------------------------------------


def _head() -> str:
    """Return the commit of the code that runs, which must be all there is."""
    if _git("status", "--porcelain", "--", "drama", "config", str(LOCK_FILE)):
        raise ConfigurationError(
            "drama accept: commit the changes of drama/ and config/ first, so that what is "
            "accepted can be found again"
        )
    return _git("rev-parse", "HEAD").decode().strip()


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True)
    if done.returncode:
        raise ConfigurationError(
            f"drama accept: git {arguments[0]} says: {done.stderr.decode().strip()}"
        )
    return done.stdout


def checkout(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder.

    Raises:
        ConfigurationError: when there is no such commit here.
    """
    # By its hash: what a file or the command line says is never read as an option of git's.
    found = _git("rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}").decode()
    folder.mkdir(exist_ok=True)
    unpack = ["tar", "--extract", f"--directory={folder}"]
    subprocess.run(unpack, input=_git("archive", found.strip()), check=True)
    return folder


def _names(tree: Path) -> Names:
    """Return what the code in a tree calls itself: for every choice, as its recipes have it."""
    places = {("atari", "dfs"): "Pong", ("atari", "uniform"): "Breakout",
              ("catch", "dfs"): "Catch8", ("catch", "uniform"): "Catch16"}  # fmt: skip
    code: dict[Choices, str] = {}
    for kind in sorted({choices.kind for choices in Choices.every()}):
        games = {
            game: {"sequence_model": {"kind": kind}, "replay": {"sampling": sampling}}
            for (_, sampling), game in places.items()
        }
        recipes = _plan(tree, f"names-{kind}", games, _settings(Probe(kind, "", {}), tree))
        for (family, sampling), game in places.items():
            recipe = read_json(recipes / game / "seed0.json")
            code[Choices(family, kind, sampling)] = recipe["code"]
    evaluation = read_json(recipes / game / "seed0.evaluation.json")
    return Names(code, evaluation["code"], recipe["runtime"])


# --- probes --------------------------------------------------------------------------------------


def held(probe: Probe, earlier: Path, today: Path) -> str:
    """Run a probe with both codes and compare.

    Returns:
        What was equal.

    Raises:
        NotAccepted: naming the first thing that differs.
    """
    settings = _settings(probe, earlier)
    made = [_run(probe, tree, settings) for tree in (earlier, today)]
    if difference := first_difference(*made):
        raise NotAccepted(f"probe {probe.name} ({probe.game}): {difference}; nothing is accepted")
    steps = settings.training.total_steps
    return f"{probe.name} ({probe.game}): {steps} steps, stopped once, and its score are the same"


def _settings(probe: Probe, tree: Path) -> Preset:
    """Return a probe's settings; what the tree has no setting for is as it was before."""
    known = _known(tree)
    new = {key: value for key, value in ADDED.items() if key not in known}
    both = flatten(dict(BASE), ".") | flatten(dict(probe.settings), ".")
    return load_preset("quick", Layer("the probe", unflatten(both | new, ".")))


def _known(tree: Path) -> set[str]:
    """Return the keys of all settings that the code in a tree has."""
    return {*flatten(read_mapping(tree / "config/presets/xs.yaml"), ".")}


def _plan(tree: Path, name: str, games: Mapping[str, Mapping[str, Any]], settings: Preset) -> Path:
    """Plan runs with the code in a tree; return the folder of the recipes."""
    known = _known(tree)
    values = flatten(settings.model_dump(mode="json", by_alias=True), ".")
    preset = {key: value for key, value in values.items() if key in known}
    _write(tree / f"config/presets/{name}.yaml", unflatten(preset, "."))
    experiment = {"preset": name, "games": games, "seeds": [0], "device": "cpu", "results": "made"}
    _write(tree / f"config/{name}.yaml", experiment)
    _drama(tree, "plan", "--config", f"config/{name}.yaml")
    return tree / "made" / name / "recipes"


def _write(path: Path, data: Any) -> None:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")


def _run(probe: Probe, tree: Path, settings: Preset) -> Path:
    """Plan, train, stop, go on and score with the code in a tree; return the run's folder."""
    recipes = _plan(tree, probe.name, {probe.game: {}}, settings)
    recipe = str((recipes / probe.game / "seed0.json").relative_to(tree))
    folder = recipes.parent / "runs" / probe.game / "seed0"
    train = ("train", recipe, "--device", "cpu", "--checkpoint-every", "60")
    _stop_once(tree, folder / TRAINING, *train)
    _drama(tree, *train)
    _drama(tree, "evaluate", recipe, "--device", "cpu")
    return folder


def _stop_once(tree: Path, table: Path, *arguments: str) -> None:
    """Train until a table has been written, which follows a checkpoint, then ask it to stop."""
    with subprocess.Popen(
        _command(*arguments), cwd=tree, env=_environment(tree), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        patience = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < patience:
            if table.exists():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        else:
            process.kill()
        output, _ = process.communicate()
    if process.returncode != 75:
        raise NotAccepted(f"{' '.join(arguments)}: did not stop when asked to: {output[-1000:]}")


def _drama(tree: Path, *arguments: str) -> None:
    done = subprocess.run(
        _command(*arguments), cwd=tree, env=_environment(tree), timeout=PATIENCE,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise NotAccepted(f"drama {' '.join(arguments)}, in {tree.name}: {done.stdout[-1000:]}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from drama.cli import main; main()", *arguments]


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


# --- comparing -----------------------------------------------------------------------------------


def first_difference(earlier: Path, today: Path) -> str | None:
    """Say what first differs between two runs' folders; None when nothing does.

    What today's has beside all that the earlier one had is no difference.
    """
    both = [_contents(folder) for folder in (earlier, today)]
    for (file, before), (_, now) in zip(*both, strict=True):
        if missing := sorted(before.keys() - now.keys()):
            return f"{file}: {', '.join(missing)} is gone"
        for name, value in before.items():
            if text := _difference(value, now[name]):
                return f"{file}: {name}: {text}"
    return None


def _contents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a run made, file by file: by name, arrays and plain values."""
    (record,) = folder.glob("run-*.json")
    fingerprint = read_json(record)["fingerprint"]
    checkpoint = flatten(load_checkpoint(folder / CHECKPOINT, fingerprint))
    yield REPLAY, read_shards(folder / REPLAY, 0, checkpoint["episode/step"])
    for name in [n for n in checkpoint if n.startswith(("replay/tail/", "replay/rows_in_shards"))]:
        del checkpoint[name]  # the same transitions, differently divided
    for table in (EPISODES, TRAINING):
        yield table, _table(folder / table)
    yield CHECKPOINT, checkpoint
    (evaluation,) = folder.glob("evaluation-*.parquet")
    yield "evaluation", _table(evaluation)


def _table(path: Path) -> dict[str, list[Any]]:
    columns = read_table(path, None).to_pydict()
    columns.pop("steps_per_second", None)  # a clock's
    return {name: [repr(value) for value in values] for name, values in columns.items()}


def _difference(before: Any, now: Any) -> str:
    """Say how two values differ; nothing when their bytes are the same."""
    if not isinstance(before, np.ndarray) or not isinstance(now, np.ndarray):
        return "" if before == now else f"{_short(before)} became {_short(now)}"
    if (before.dtype, before.shape) != (now.dtype, now.shape):
        return f"{before.dtype} {before.shape} became {now.dtype} {now.shape}"
    if before.tobytes() == now.tobytes():
        return ""
    places = np.flatnonzero(before.ravel() != now.ravel())
    first = before.ravel()[places[:1]], now.ravel()[places[:1]]
    return f"{len(places)} of {before.size} numbers differ, the first {first[0]} became {first[1]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
