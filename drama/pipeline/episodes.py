"""An evaluation that is under way: its finished episodes are kept, so that it goes on after a stop.

They lie beside the evaluation until that is whole. How an episode comes out may depend on all that
the file names; kept by anything else, they are passed over and played again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from drama.agent.behaviour.agent import Agent
from drama.agent.evaluation import Episode, play
from drama.agent.settings import EvaluationSettings, Fingerprint, Recipe
from drama.errors import reason
from drama.files import write_json
from drama.pipeline.artifacts.evaluations import DIGEST, EpisodeRow, Name, vouching
from drama.reading import read_model
from drama.runs.progress import EpisodesReporter
from drama.runs.stopping import Stopped, stop_on_signal

KEEP_SECONDS = 5.0
"""At most so much work is lost with a kill, beside the episodes that are being played."""
MOST = 128 * 2**20
"""Bytes; twice as many episodes as can be asked for, with some 250 each, have 50 million."""


class _Kept(BaseModel):
    """The file of kept episodes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1]
    run: Fingerprint
    fingerprint: Fingerprint
    device: Name
    backend: Name
    threads: Annotated[int, Field(ge=1)]
    rows: Annotated[tuple[EpisodeRow, ...], Field(max_length=200_000)]
    digest: Fingerprint


class KeptEpisodes:
    """The finished episodes of an evaluation.

    Args:
        evaluation: the evaluation's file, which the kept episodes lie beside.
        origin: what the episodes come from: run and fingerprint (the evaluation's), device,
            backend, threads.
    """

    def __init__(self, evaluation: Path, origin: Mapping[str, Any]) -> None:
        self.path = self.beside(evaluation)
        self.origin = {"format": 1, **origin}
        self.rows = self._read()
        self._due = time.monotonic()
        self._saved = True

    @staticmethod
    def beside(evaluation: Path) -> Path:
        """Return where they lie."""
        return evaluation.with_suffix(".kept.json")

    def _read(self) -> list[dict[str, Any]]:
        """Read what an earlier sitting kept; say so where that is of no use."""
        if not self.path.exists():
            return []
        try:
            kept = read_model(self.path, _Kept, MOST).model_dump()
            rows = list(kept.pop("rows"))
            if vouching(kept, rows)[DIGEST] != kept.pop(DIGEST):
                raise ValueError("altered since it was written")
            if other := [key for key, value in self.origin.items() if kept[key] != value]:
                raise ValueError(f"played with another {', '.join(other)}")
        except (OSError, ValueError) as error:  # ValidationError is a ValueError
            text = f"{self.path}: passed over ({reason(error)}); its episodes are played again"
            print(text, file=sys.stderr, flush=True)
            return []
        return rows

    def add(self, episodes: Sequence[Episode]) -> None:
        """Keep finished episodes, on disk every few seconds."""
        self.rows += [episode.row() for episode in episodes]
        self._saved = self._saved and not episodes
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Have what is kept on disk."""
        if not self._saved:
            write_json(self.path, {**vouching(self.origin, self.rows), "rows": self.rows})
            self._saved = True
            self._due = time.monotonic() + KEEP_SECONDS


def play_on(
    agent: Agent, recipe: Recipe, settings: EvaluationSettings, kept: KeptEpisodes
) -> list[Episode]:
    """Play an evaluation's episodes, but for those that were kept; show how it is getting on.

    Returns:
        All of them, as `play` returns them.

    Raises:
        Stopped: when it was asked to stop; what is finished is kept.
    """
    total = settings.episodes * len(settings.ways)
    title = f"{recipe.game} seed {recipe.seed}"
    with stop_on_signal() as stop, EpisodesReporter(title, total) as reporter:

        def after_round(ended: list[Episode]) -> None:
            kept.add(ended)
            reporter.tick([episode.row() for episode in ended])
            if stop():
                kept.save()
                raise Stopped(
                    f"stopped after {len(kept.rows)} of {total} episodes, which are kept. "
                    "The same command goes on from here."
                )

        reporter.tick(kept.rows)
        return play(agent, recipe, settings, tuple(kept.rows), after_round)
