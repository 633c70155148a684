"""Evaluations as they lie in a run's folder: read back, told in words, noted under a fixed name.

An evaluation's own name holds its fingerprint. DVC, which knows files by name, and whoever wants
to check an evaluation's bytes need a fixed place to start from: evaluation.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drama.agent.settings import Actions, EvaluationSettings
from drama.errors import ConfigurationError, DramaError, reason
from drama.files import canonical_json, sha256_file, write_text
from drama.pipeline.history import read_evaluation_settings, read_note

NOTE = "evaluation.json"


class EvaluationDamaged(DramaError):
    """An evaluation that cannot be read, or is not whole."""


@dataclass(frozen=True)
class Played:
    """The episodes of an evaluation whose actions were chosen in one way.

    Attributes:
        actions: that way, greedy or sampled.
        returns: of every episode.
        asked: how many episodes were asked for.
        different: how many differ in anything that was seen, done or got.
        truncated: how many were cut off.
    """

    actions: Actions
    returns: tuple[float, ...]
    asked: int
    different: int
    truncated: int

    @property
    def episodes(self) -> int:
        """How many were played."""
        return len(self.returns)

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def all_same(self) -> bool:
        """Whether there are several, which are all one and the same."""
        return self.different == 1 and self.episodes > 1

    def __str__(self) -> str:
        cut = f", {self.truncated} truncated" if self.truncated else ""
        return (
            f"mean return {self.mean_return:g} over {self.episodes} {self.actions} episodes, "
            f"{self.different} different among them{cut}"
        )

    def warning(self) -> str:
        """Return what to say when all episodes are the same; nothing otherwise."""
        if not self.all_same:
            return ""
        more = self.asked - self.episodes
        left = f"; {more} more were not played (evaluation.enough_same)" if more else ""
        return (
            f"all {self.episodes} {self.actions} episodes are the same: their mean says no more "
            f"than one of them{left}"
        )


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was read.

    Attributes:
        run: fingerprint of the run that was scored.
        fingerprint: the evaluation's own.
        device: that it was played on.
        backend: that computed Mamba-2.
        settings: that it was played with.
        rows: the file's, by column.
        played: the same by the way actions were chosen.
    """

    run: str
    fingerprint: str
    device: str
    backend: str
    settings: EvaluationSettings
    rows: list[dict[str, Any]]
    played: Mapping[Actions, Played]

    @property
    def score(self) -> Played:
        """The episodes whose mean return is the run's score."""
        return self.played[self.settings.actions]


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        EvaluationDamaged: when it cannot be read, or lacks episodes or finite returns.
    """
    try:
        # Without pyarrow's data sets, which import pandas: a second and more.
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        header = json.loads((table.schema.metadata or {})[b"drama"])
        settings = read_evaluation_settings(header["settings"], "settings")
        rows = table.to_pylist()
        evaluation = Evaluation(
            run=str(header["run"]),
            fingerprint=str(header["fingerprint"]),
            device=str(header["device"]),
            backend=str(header["backend"]),
            settings=settings,
            rows=rows,
            played={way: _played(rows, way, settings) for way in settings.ways},
        )
        _check_whole(evaluation, header["played"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ConfigurationError,
        pa.ArrowException,
    ) as error:
        raise EvaluationDamaged(
            f"{path}: not a whole evaluation ({reason(error)}); remove it and evaluate again"
        ) from None
    return evaluation


def _check_whole(evaluation: Evaluation, recorded: Any) -> None:
    """Raise a ValueError unless the file holds what was asked for, and was said to be played."""
    for played in evaluation.played.values():
        ended = played.all_same and played.episodes == evaluation.settings.enough_same
        finite = int(np.isfinite(played.returns).sum())
        if finite != played.episodes or not (ended or finite == played.asked):
            raise ValueError(
                f"{played.episodes} {played.actions} episodes, {finite} of them with a finite "
                f"return, where {played.asked} were asked for"
            )
    counts = {way: played.episodes for way, played in evaluation.played.items()}
    if sum(counts.values()) != len(evaluation.rows) or recorded != counts:
        raise ValueError(f"{len(evaluation.rows)} episodes, where {recorded} were played")


def _played(rows: list[dict[str, Any]], way: Actions, settings: EvaluationSettings) -> Played:
    own = [row for row in rows if row["actions"] == way]
    return Played(
        actions=way,
        returns=tuple(float(row["episode_return"]) for row in own),
        asked=settings.episodes,
        different=len({row["played"] for row in own}),
        truncated=sum(bool(row["truncated"]) for row in own),
    )


def read_noted(path: Path) -> Evaluation:
    """Read an evaluation, held to the checksum that evaluation.json beside it keeps of it, if any.

    Raises:
        EvaluationDamaged: as `read_evaluation`, and when its bytes are not those noted.
    """
    evaluation = read_evaluation(path)
    note = read_note(path.parent)  # there may be none, or another evaluation's
    if note and note.name == path.name and note.sha256 != sha256_file(path):
        raise EvaluationDamaged(
            f"{path}: not the bytes that {NOTE} noted when it was played; put back a good copy, or "
            "remove both and evaluate again"
        )
    return evaluation


def note_evaluation(path: Path) -> Evaluation:
    """Read an evaluation, and write evaluation.json beside it when its content changes.

    Raises:
        EvaluationDamaged: as `read_evaluation`.
    """
    evaluation = read_evaluation(path)
    shown = ("episodes", "different", "truncated", "mean_return")
    text = canonical_json(
        {
            "format": 1,
            "fingerprint": evaluation.fingerprint,
            "path": path.name,
            "sha256": sha256_file(path),
            "actions": evaluation.score.actions,
            "episodes": evaluation.score.episodes,
            "mean_return": evaluation.score.mean_return,
            "played": {
                way: {name: getattr(played, name) for name in shown}
                for way, played in evaluation.played.items()
            },
        }
    )
    note = path.with_name(NOTE)
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        write_text(note, text)
    return evaluation
