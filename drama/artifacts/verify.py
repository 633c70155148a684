"""Does a recorded run still hold: are its files intact, does its score come out again?

Both are asked of the run's own record. The files' checksums are held to those that
run-<fingerprint>.json names. Then the checkpoint plays the recorded evaluations again, with their
seeds and settings, and every episode is held to its row, the hash of all that was seen, done and
got in it included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from drama.artifacts.evaluations import Evaluation, EvaluationDamaged, read_evaluation
from drama.artifacts.stages import EXPERIMENT, results_folder
from drama.config import load_experiment
from drama.errors import ConfigurationError, DramaError
from drama.evaluation import load_agent, play
from drama.files import canonical_json, sha256_file, sha256_text
from drama.jobs import device_name
from drama.model.sequence import kernels
from drama.recipes import EVALUATION_CODE, RUN_CODE, code_hash, evaluation_text
from drama.runs import SHORT, SUPERSEDED, versions
from drama.settings import Recipe
from drama.training.loop import CHECKPOINT


class Damaged(DramaError):
    """A record, or a file that it names, is not what it was."""


class Missing(DramaError):
    """Files that a record names are not here."""


class Finding(IntEnum):
    """What came of verifying, from best to worst."""

    VERIFIED = 0  # every file and every episode
    SIMILAR = 1  # every file; played on something else, where equality cannot be asked for
    INTACT = 2  # every file; no score was played
    UNPLAYABLE = 3  # every file; made by other code than today's
    MISSING = 4  # files are not here; those that are here hold
    DIFFERENT = 5  # every file; another score, on the same kind of device
    DAMAGED = 6


@dataclass(frozen=True)
class Verdict:
    """What came of verifying one run, and the words for it."""

    finding: Finding
    text: str

    @property
    def holds(self) -> bool:
        """Whether all that was asked for was checked, and nothing speaks against the run."""
        return self.finding <= Finding.INTACT


def find_records(places: Sequence[Path] | None = None) -> list[Path]:
    """Return the records of all whole runs at or below the given places.

    Args:
        places: recipes, records, or folders of any level from a run's to `results`; by default
            the results that config/config.yaml names.

    Raises:
        ConfigurationError: when a place holds no whole run.
    """
    if not places:
        places = [Path(results_folder(load_experiment(EXPERIMENT)))]
    return [record for place in places for record in _records_at(place)]


def _records_at(place: Path) -> list[Path]:
    if place.is_file() and place.match("run-*.json"):
        return [place]
    folder = place
    if place.suffix == ".json":  # results/<preset>/recipes/<Game>/seed<k>.json
        folder = place.parents[2] / "runs" / place.parent.name / place.stem
    found = [
        path
        for path in sorted(folder.rglob("run-*.json"))
        if SUPERSEDED not in path.relative_to(folder).parts
    ]
    if not found:
        raise ConfigurationError(
            f"{place}: no whole run there. Name a recipe, a run's folder or a preset's results, "
            "such as results/xs"
        )
    return found


def verify(record: Path, device: torch.device, *, play_again: bool = True) -> Verdict:
    """Verify one run; nothing is written.

    Args:
        record: its run-<fingerprint>.json.
        device: to play on. On the kind of device the score was made on, every episode has to
            come out exactly.
        play_again: whether to play the evaluations again or to check files only.
    """
    try:
        data, recipe = _read_record(record)
        files = f"{_check_artifacts(record.parent, data, recipe)} files intact"
        if not play_again:
            return Verdict(Finding.INTACT, files)
        verdicts = [
            _play(path, data, recipe, device)
            for path in sorted(record.parent.glob("evaluation-*.parquet"))
        ]
    except Missing as error:
        return Verdict(Finding.MISSING, str(error))
    except DramaError as error:
        return Verdict(Finding.DAMAGED, str(error))
    if not verdicts:
        return Verdict(Finding.INTACT, f"{files}; no score is recorded")
    findings = {verdict.finding for verdict in verdicts}
    if len(findings) > 1:  # an evaluation of earlier code lies beside today's
        findings.discard(Finding.UNPLAYABLE)
    return Verdict(max(findings), "; ".join([files, *(verdict.text for verdict in verdicts)]))


def _read_record(path: Path) -> tuple[dict[str, Any], Recipe]:
    try:
        data = json.loads(path.read_bytes())
        recipe = Recipe.model_validate_json(canonical_json(data["recipe"]))
        listed = {item["path"]: (item["sha256"], item["bytes"]) for item in data["artifacts"]}
        named = data["fingerprint"]
        data["device"], data["versions"], data["git_commit"]
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise Damaged(
            f"{path.name} cannot be read ({type(error).__name__}); `git checkout` brings it back"
        ) from None
    fingerprint = sha256_text(canonical_json(data["recipe"]))
    if not fingerprint == named or path.stem != f"run-{fingerprint[:SHORT]}":
        raise Damaged(
            f"{path.name} says {str(named)[:SHORT]}, but its recipe's fingerprint is "
            f"{fingerprint[:SHORT]}; `git checkout` brings it back"
        )
    if CHECKPOINT not in listed:
        raise Damaged(f"{path.name} lists no {CHECKPOINT}; `git checkout` brings it back")
    return data, recipe


def _check_artifacts(folder: Path, data: dict[str, Any], recipe: Recipe) -> int:
    """Hold every listed file to its size and checksum; returns how many there are."""
    missing, changed = [], []
    for item in data["artifacts"]:
        path = folder / item["path"]
        if not path.is_file():
            missing.append(item["path"])
        elif path.stat().st_size != item["bytes"] or sha256_file(path) != item["sha256"]:
            changed.append(item["path"])
    pull = f"`dvc pull train@{recipe.game}-{recipe.seed}`"
    if recipe.ancestor is not None:  # in results of its own, of which dvc.yaml knows nothing
        pull = "put back a copy"
    if changed:
        raise Damaged(
            f"not the recorded bytes: {_few(changed)}; remove them, then {pull}, "
            "or `git checkout` for what git keeps"
        )
    if missing:
        raise Missing(f"not here: {_few(missing)}; {pull} where DVC keeps them")
    return len(data["artifacts"])


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _play(path: Path, data: dict[str, Any], recipe: Recipe, device: torch.device) -> Verdict:
    """Play one recorded evaluation again."""
    recorded = _read_evaluation(path, data["fingerprint"])
    mean = recorded.score.mean_return
    text = evaluation_text(data["fingerprint"], recorded.settings, code_hash(EVALUATION_CODE))
    if recipe.code != code_hash(RUN_CODE) or sha256_text(text) != recorded.fingerprint:
        commit = data["git_commit"] or "unknown"
        return Verdict(
            Finding.UNPLAYABLE,
            f"score {mean:g} not played again: it was made by other code (commit {commit})",
        )
    agent = load_agent(recipe, path.parent / CHECKPOINT, data["fingerprint"], device)
    backend = kernels.choose(
        "torch" if recorded.backend == "torch" else "auto", device, recipe.settings.sequence_model
    )
    kernels.use(agent, backend)
    rows = recorded.rows
    now = [episode.row() for episode in play(agent, recipe, recorded.settings)]
    equal = sum(row == again for row, again in zip(rows, now, strict=False))
    if equal == len(rows) == len(now):
        return Verdict(Finding.VERIFIED, f"score {mean:g} again, all {equal} episodes exactly")
    scored = [row["episode_return"] for row in now if row["actions"] == recorded.score.actions]
    found = (
        f"score {sum(scored) / len(scored):g} where {mean:g} is recorded, "
        f"{equal} of {len(rows)} episodes exactly"
    )
    here = (device_name(device), backend.name, versions())
    if here != (recorded.device, recorded.backend, data["versions"]):
        return Verdict(
            Finding.SIMILAR,
            f"{found}; played on another device, backend or other library versions",
        )
    return Verdict(Finding.DIFFERENT, found)


def _read_evaluation(path: Path, fingerprint: str) -> Evaluation:
    try:
        evaluation = read_evaluation(path)
    except EvaluationDamaged as error:
        raise Damaged(f"{error}, or `git checkout` brings it back") from None
    if evaluation.run != fingerprint:
        raise Damaged(f"{path.name} is not this run's evaluation; `git checkout` brings it back")
    return evaluation
