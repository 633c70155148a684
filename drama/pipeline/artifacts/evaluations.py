"""Evaluations as they lie in a run's folder: read back, told in words, noted under a fixed name.

An evaluation's own name holds its fingerprint. DVC, which knows files by name, and whoever wants
to check an evaluation's bytes need a fixed place to start from: evaluation.json.

An evaluation vouches for itself, by a digest over its rows and all else that it says. Those of
earlier versions have none, and are held to the checksum that evaluation.json was given with them.
What nothing vouches for is no result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from drama.agent.settings import Actions, EvaluationSettings, Fingerprint
from drama.errors import ConfigurationError, DramaError, reason
from drama.files import canonical_json, sha256_file, sha256_text, write_text
from drama.pipeline.history import read_evaluation_settings, read_note
from drama.reading import parse_json, read_table, read_text
from drama.runs.folder import SHORT

NOTE = "evaluation.json"
DIGEST = "digest"
"""The key of an evaluation's metadata by which it vouches for itself."""

Number = Annotated[int, Field(ge=0, le=100_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class EvaluationDamaged(DramaError):
    """An evaluation that cannot be read, or is not whole."""


class EpisodeRow(BaseModel):
    """An episode as files hold it, by the names of `drama.agent.evaluation.SCHEMA`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    episode: Number
    actions: Actions
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    episode_return: float
    length: Annotated[int, Field(ge=1, lt=2**31)]
    truncated: bool
    played: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Header(BaseModel):
    """What an evaluation's metadata say; keys that are not known are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[1]
    run: Fingerprint
    fingerprint: Fingerprint
    device: Name
    backend: Name
    settings: dict[str, Any]
    played: dict[Actions, Number]
    digest: Fingerprint | None = None


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
        vouched: whether the file vouches for itself, and not evaluation.json alone for it.
    """

    run: str
    fingerprint: str
    device: str
    backend: str
    settings: EvaluationSettings
    rows: list[dict[str, Any]]
    played: Mapping[Actions, Played]
    vouched: bool

    @property
    def score(self) -> Played:
        """The episodes whose mean return is the run's score."""
        return self.played[self.settings.actions]


def vouching(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a file says beside its rows, with the digest over both."""
    rest = {key: value for key, value in header.items() if key != DIGEST}
    return rest | {DIGEST: sha256_text(canonical_json({"header": rest, "rows": rows}))}


def read_evaluation(path: Path, *, noted: bool = True) -> Evaluation:
    """Read an evaluation, held to its digest and to the checksum in evaluation.json beside it.

    Args:
        path: the evaluation.
        noted: False to pass evaluation.json over.

    Raises:
        EvaluationDamaged: when it cannot be read, lacks episodes or finite returns, or is not what
            was played, or when nothing says that it is.
    """
    try:
        evaluation = _read(path)
        wanted = _noted(path) if noted else None
        found = sha256_file(path) if wanted else None
    except (OSError, ValueError, KeyError, TypeError, ConfigurationError) as error:
        raise EvaluationDamaged(
            f"{path}: not a whole evaluation ({reason(error)}); remove it and evaluate again"
        ) from None
    if wanted != found:
        raise EvaluationDamaged(
            f"{path}: not the bytes that {NOTE} noted when it was played; put back a good copy, or "
            "remove both and evaluate again"
        )
    if not (evaluation.vouched or wanted):
        raise EvaluationDamaged(
            f"{path}: of an earlier version, and no {NOTE} beside it says that these are the bytes "
            f"that were played; put back the {NOTE} that was written with it, or remove it and "
            "evaluate again"
        )
    return evaluation


def _read(path: Path) -> Evaluation:
    """Read an evaluation, held to its own digest if it has one."""
    table = read_table(path, None)
    recorded = parse_json((table.schema.metadata or {})[b"drama"])
    header = _Header.model_validate(recorded, strict=True)
    settings = read_evaluation_settings(header.settings, "settings")
    rows = table.to_pylist()
    for row in rows:
        EpisodeRow.model_validate(row, strict=True)
    if header.digest and header.digest != vouching(recorded, rows)[DIGEST]:
        raise ValueError("altered since it was played: its digest is of other rows or settings")
    if path.name != f"evaluation-{header.fingerprint[:SHORT]}.parquet":
        raise ValueError(f"it is evaluation {header.fingerprint[:SHORT]}, not what its name says")
    evaluation = Evaluation(
        run=header.run,
        fingerprint=header.fingerprint,
        device=header.device,
        backend=header.backend,
        settings=settings,
        rows=rows,
        played={way: _played(rows, way, settings) for way in settings.ways},
        vouched=header.digest is not None,
    )
    _check_whole(evaluation, header.played)
    return evaluation


def _noted(path: Path) -> str | None:
    """Return the checksum that evaluation.json beside an evaluation keeps of it, if any."""
    note = read_note(path.parent)  # there may be none, or one of other evaluations
    return note.checksums.get(path.name) if note else None


def _check_whole(evaluation: Evaluation, recorded: Mapping[Actions, int]) -> None:
    """Raise a ValueError unless the file holds what was asked for, and was said to be played."""
    for played in evaluation.played.values():
        ended = played.all_same and played.episodes == evaluation.settings.enough_same
        finite = int(np.isfinite(played.returns).sum())
        if finite != played.episodes or not (ended or finite == played.asked):
            raise ValueError(
                f"{played.episodes} {played.actions} episodes, {finite} of them with a finite "
                f"return, where {played.asked} were asked for"
            )
        numbers = [row["episode"] for row in _rows(evaluation.rows, played.actions)]
        if numbers != list(range(played.episodes)):
            raise ValueError(f"its {played.actions} episodes are not numbered from 0 on")
    counts = {way: played.episodes for way, played in evaluation.played.items()}
    if sum(counts.values()) != len(evaluation.rows) or recorded != counts:
        raise ValueError(f"{len(evaluation.rows)} episodes, where {recorded} were played")


def _rows(rows: list[dict[str, Any]], way: Actions) -> list[dict[str, Any]]:
    return [row for row in rows if row["actions"] == way]


def _played(rows: list[dict[str, Any]], way: Actions, settings: EvaluationSettings) -> Played:
    own = _rows(rows, way)
    return Played(
        actions=way,
        returns=tuple(float(row["episode_return"]) for row in own),
        asked=settings.episodes,
        different=len({row["played"] for row in own}),
        truncated=sum(bool(row["truncated"]) for row in own),
    )


def note_evaluation(path: Path, *, played_now: bool = False) -> Evaluation:
    """Read an evaluation, and write evaluation.json beside it when its content changes.

    One that does not vouch for itself is noted already, and its note is left alone.

    Args:
        path: the evaluation.
        played_now: whether it was played just now, so that an older note of one that lay here
            says nothing about it.

    Raises:
        EvaluationDamaged: as `read_evaluation`.
    """
    evaluation = read_evaluation(path, noted=not played_now)
    if not evaluation.vouched:
        return evaluation
    shown = ("episodes", "different", "truncated", "mean_return")
    content = {
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
    if earlier := _earlier(path):
        content["earlier"] = earlier
    note, text = path.with_name(NOTE), canonical_json(content)
    try:
        written = read_text(note)
    except (OSError, ValueError):
        written = ""
    if written != text:
        write_text(note, text)
    return evaluation


def _earlier(path: Path) -> dict[str, str]:
    """Return what is noted of other evaluations, as far as they lie beside this one."""
    note = read_note(path.parent)
    others = note.checksums if note else {}
    return {
        name: sha256
        for name, sha256 in others.items()
        if name != path.name and path.with_name(name).is_file()
    }
