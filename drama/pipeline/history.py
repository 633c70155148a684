"""Recorded recipes read by later code: settings that were added since, and what was done before.

What a run recorded stays as it was written, and its fingerprint is that text's. Whoever reads a
record, an evaluation or a weights file to show it, verify it or play with it reads it through here.
Planning and training never do: their recipes have every key.

To add a setting: give it its line in config/presets/xs.yaml, its field in `drama.agent.settings`
and a line in `ADDED`: its key as in that file, and the value under which today's code does what was
done before there was such a key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from drama.agent.settings import Count, EvaluationSettings, Fingerprint, Recipe
from drama.files import canonical_json, sha256_text
from drama.pipeline.config import parse_recipe
from drama.pipeline.layers import Layer, resolve
from drama.pipeline.names import Commit
from drama.reading import read_json, read_model
from drama.runs.folder import SHORT, short_commit

ADDED: dict[str, Any] = {
    "environment.repeat_action_probability": 0.0,
    "environment.no_op_starts": 0,
    "environment.life_loss_terminates": "learning",
    "world_model.kernel": 5,
    "world_model.optimiser.decay_spares": "nothing",
    "behaviour.temperature": 1.0,
    "behaviour.epsilon": 0.0,
    "behaviour.as_published": False,
    "behaviour.optimiser.decay_spares": "nothing",
    "evaluation.actions": "greedy",
    "evaluation.both": False,
    "evaluation.enough_same": 0,
}
"""Settings that were added after runs had been recorded: what was done before."""


def read_recipe(recorded: Mapping[str, Any], source: str) -> Recipe:
    """Parse a recipe that this or an earlier version recorded in a source.

    Raises:
        ConfigurationError: when today's settings cannot say what it says.
    """
    return parse_recipe(canonical_json(filled(recorded)), source)


def read_evaluation_settings(recorded: Any, source: str) -> EvaluationSettings:
    """Parse evaluation settings that this or an earlier version recorded.

    Raises:
        ConfigurationError: when today's settings cannot say what they say.
    """
    settings = {"evaluation": copy.deepcopy(recorded)}
    _fill(settings)
    return resolve(EvaluationSettings, [Layer(source, settings["evaluation"])])


def filled(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded recipe with what its settings lack."""
    whole = copy.deepcopy(dict(recipe))
    _fill(whole.get("settings"))
    return whole


def _fill(settings: Any) -> None:
    """Give nested settings the keys they lack; what is no mapping is left for parsing to refuse."""
    for key, before in ADDED.items():
        *sections, name = key.split(".")
        place = settings
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.setdefault(name, copy.deepcopy(before))


# --- whole runs of earlier code ------------------------------------------------------------------


@dataclass(frozen=True)
class EarlierRun:
    """A whole run of earlier code: its record and the little of it that is shown of it."""

    record: Path
    fingerprint: str
    recipe: dict[str, Any]
    commit: str
    steps: int


class _Made(BaseModel):
    """What of a record is asked for."""

    model_config = ConfigDict(frozen=True, strict=True)

    fingerprint: Fingerprint
    recipe: dict[str, Any]
    git_commit: Commit | None
    steps: Count


def earlier_run(folder: Path, recipe: Path) -> EarlierRun | None:
    """Find the whole run of earlier code that lies in a planned run's folder.

    Returns:
        The one run there, when its recipe says what the planned one says but for code and library
        versions; None otherwise.
    """
    records = list(folder.glob("run-*.json"))
    if len(records) != 1:
        return None
    try:
        made, planned = read_model(records[0], _Made), read_json(recipe)
        fingerprint = sha256_text(canonical_json(made.recipe))
        same = _apart_from_code(made.recipe) == _apart_from_code(planned)
    except (OSError, ValueError, TypeError):  # ValidationError is a ValueError
        return None
    if not same or made.fingerprint != fingerprint or "code" not in made.recipe:
        return None
    commit = short_commit(made.git_commit or "unknown")
    return EarlierRun(records[0], fingerprint, made.recipe, commit, made.steps)


class Note(BaseModel):
    """What evaluation.json says that others rely on: which evaluation, and its file's checksum.

    `earlier` holds the checksums of evaluations that were noted before and lie beside it still.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    fingerprint: Fingerprint
    sha256: Fingerprint
    earlier: Annotated[dict[str, Fingerprint], Field(max_length=1000)] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """The evaluation's file name."""
        return f"evaluation-{self.fingerprint[:SHORT]}.parquet"

    @property
    def checksums(self) -> dict[str, str]:
        """All checksums, by file name."""
        return {**self.earlier, self.name: self.sha256}


def read_note(folder: Path) -> Note | None:
    """Read evaluation.json in a run's folder; None when there is none, or nothing of use in it."""
    try:
        return read_model(folder / "evaluation.json", Note)
    except (OSError, ValueError):  # ValidationError is a ValueError
        return None


def noted_evaluation(folder: Path) -> Note | None:
    """Read evaluation.json in a run's folder; None when the evaluation it names is not there."""
    note = read_note(folder)
    return note if note and (folder / note.name).is_file() else None


def _apart_from_code(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in filled(recipe).items() if k not in ("code", "runtime")}
