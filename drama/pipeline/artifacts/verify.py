"""Does a recorded run still hold: are its files intact, does its score come out again?

Both are asked of the run's own record. The files' checksums are held to those that
run-<fingerprint>.json names. Then the checkpoint, or where that is not here the exported weights,
plays the recorded evaluations again, with their seeds and settings and today's code, and every
episode is held to its row, the hash of all that was seen, done and got in it included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import Episode, play
from drama.agent.model.sequence import kernels, use_backend
from drama.errors import DramaError, shown
from drama.files import sha256_text
from drama.pipeline.artifacts.agents import agent_of, read_agent
from drama.pipeline.artifacts.evaluations import Evaluation
from drama.pipeline.artifacts.records import (
    Damaged,
    OtherCode,
    RecordedRun,
    compare,
    evaluations_of,
    read_record,
)
from drama.pipeline.artifacts.store import cure
from drama.pipeline.artifacts.weights import read_weights_of, same_tensors
from drama.pipeline.fingerprints import Choices, evaluation_code, run_code
from drama.pipeline.jobs import device_name
from drama.pipeline.layers import few
from drama.pipeline.recipes import evaluation_text
from drama.runs.folder import CHECKPOINT, REPLAY, versions


class Missing(DramaError):
    """Files that a record names are not here."""


class Finding(IntEnum):
    """What came of verifying, from best to worst."""

    VERIFIED = 0  # every file that had to be here, and every episode that was asked for
    SIMILAR = 1  # likewise; played on something else, where equality cannot be asked for
    INTACT = 2  # likewise; no score was played
    EARLIER = 3  # likewise; today's code plays another score, or cannot play, earlier code may
    MISSING = 4  # files are not here; those that are here hold
    DIFFERENT = 5  # every file; another score, with the same code on the same kind of device
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

    def line(self, record: Path) -> str:
        """Return the line that tells it of a run's record."""
        return shown(f"{self.finding.name.lower():10} {record.parent}: {self.text}")


def verify(
    record: Path, device: torch.device, *, play_again: bool = True, episodes: int | None = None
) -> Verdict:
    """Verify one run; nothing is written.

    Args:
        record: its run-<fingerprint>.json.
        device: to play on. On the kind of device the score was made on, every episode has to
            come out exactly.
        play_again: whether to play the evaluations again or to check files only.
        episodes: how many of each evaluation to play, its first ones; all by default.
    """
    files = ""
    try:
        run = read_record(record)
        absent = _check_artifacts(run)
        files = _say_files(run, absent)
        evaluations = evaluations_of(run)
        if not play_again:
            return Verdict(Finding.INTACT, f"{files}; no score was played")
        if not evaluations:
            _require(run, absent)
            return Verdict(Finding.INTACT, f"{files}; no score is recorded")
        agent, _ = agent_of(run, device)
        verdicts = [_play(evaluation, run, agent, device, episodes) for evaluation in evaluations]
    except Missing as error:
        return Verdict(Finding.MISSING, str(error))
    except OtherCode as error:
        return Verdict(Finding.EARLIER, "; ".join(filter(None, (files, str(error)))))
    except DramaError as error:
        return Verdict(Finding.DAMAGED, str(error))
    finding = max(verdict.finding for verdict in verdicts)
    return Verdict(finding, "; ".join([files, *(verdict.text for verdict in verdicts)]))


def _check_artifacts(run: RecordedRun) -> list[str]:
    """Hold every listed file that is here to its size and checksum, and the weights to the record.

    Returns:
        The files that are not here, and need not be because the weights are.
    """
    absent, changed = compare(run)
    if changed:
        names = few([item.path for item in changed])
        raise Damaged(f"not the recorded bytes: {names}; {cure(run, changed[0])}")
    missing = [item.path for item in absent]
    # What git does not keep may be missing.
    _require(run, [n for n in missing if n != CHECKPOINT and not n.startswith(f"{REPLAY}/")])
    if not run.weights.exists():
        _require(run, missing)
        return []
    weights = read_weights_of(run)
    if CHECKPOINT not in missing:
        state = read_agent(run)
        if not same_tensors(weights.tensors, state):
            raise Damaged(f"{weights.path.name} is not what {CHECKPOINT} holds; export it anew")
    return missing


def _require(run: RecordedRun, missing: Sequence[str]) -> None:
    if missing:
        raise Missing(f"not here: {few(missing)}; {run.remedy} where DVC keeps them")


def _say_files(run: RecordedRun, absent: Sequence[str]) -> str:
    listed = len(run.record.artifacts)
    if not run.weights.exists():
        return f"{listed} files intact"
    if not absent:
        return f"{listed} files and the weights intact"
    return (
        f"{listed - len(absent)} of {listed} files intact, not here and not checked: "
        f"{few(absent)}; the weights are intact and name the recorded checkpoint"
    )


# --- playing -------------------------------------------------------------------------------------


def _play(
    evaluation: Evaluation,
    run: RecordedRun,
    agent: Agent,
    device: torch.device,
    episodes: int | None,
) -> Verdict:
    """Play one recorded evaluation again, or its first episodes, with today's code."""
    settings = evaluation.settings
    backend = kernels.choose(
        "torch" if evaluation.backend == "torch" else "auto",
        device,
        run.recipe.settings.sequence_model,
    )
    use_backend(agent, backend)
    asked = min(episodes or settings.episodes, settings.episodes)
    rows = [row for row in evaluation.rows if row["episode"] < asked]
    played = play(agent, run.recipe, settings.model_copy(update={"episodes": asked}))
    equal = _count_equal(rows, played)
    if equal < len(rows) < len(evaluation.rows):
        # Fewer side by side round otherwise, and one draw in a million then falls otherwise.
        whole = play(agent, run.recipe, settings)
        played = [episode for episode in whole if episode.index < asked]
        equal = _count_equal(rows, played)
    mean, count = evaluation.score.mean_return, len(rows)
    complete = count == len(evaluation.rows)
    which = "all" if complete else f"the first {asked} of {settings.episodes}"
    ways = f", {' and '.join(settings.ways)}," if settings.both else ""
    made = f", with today's code; the run was made at commit {run.commit}"
    code = "" if _is_todays(run, evaluation) else made
    if equal == count == len(played):
        again = f"recorded, {which} episodes{ways} again,"
        if complete:
            again = f"again, all {count} episodes"
        return Verdict(Finding.VERIFIED, f"score {mean:g} {again} exactly{code}")
    way = evaluation.score.actions
    now = fmean(episode.episode_return for episode in played if episode.actions == way)
    then = fmean(row["episode_return"] for row in rows if row["actions"] == way)
    found = (
        f"score {now:g} where {then:g} is recorded for {which} episodes, "
        f"{equal} of {count} episodes exactly{code}"
    )
    here = (device_name(device), backend.name, versions())
    if here != (evaluation.device, evaluation.backend, run.record.versions):
        return Verdict(
            Finding.SIMILAR,
            f"{found}; played on another device, backend or other library versions",
        )
    if code:
        return Verdict(Finding.EARLIER, f"{found}, which may be needed to play it")
    return Verdict(Finding.DIFFERENT, found)


def _count_equal(rows: Sequence[dict[str, Any]], played: Sequence[Episode]) -> int:
    """Count the episodes that are as recorded, in all that was recorded of them."""
    return sum(row == new.row() for row, new in zip(rows, played, strict=False))


def _is_todays(run: RecordedRun, evaluation: Evaluation) -> bool:
    """Say whether today's code is the one that trained the run and played the evaluation."""
    text = evaluation_text(run.fingerprint, evaluation.settings, evaluation_code())
    todays = run.recipe.code == run_code(Choices.of(run.recipe.game, run.recipe.settings))
    return todays and sha256_text(text) == evaluation.fingerprint
