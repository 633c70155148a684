"""The agents of real games that git keeps: each plays from its exported weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import drama
from drama.report.scores import load_baselines

RESULTS = Path(__file__).resolve().parents[1] / "results" / "laptop"
WEIGHTS = sorted(RESULTS.glob("runs/*/*/weights-*.safetensors"))


def test_there_are_some() -> None:
    assert WEIGHTS


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_a_recorded_agent_plays_from_its_weights_better_than_at_random(path: Path) -> None:
    """Not the recorded return itself: another kind of CPU rounds otherwise."""
    run = drama.load(path)
    (episode,) = run.play(episodes=1)
    assert not episode.truncated
    assert episode.episode_return > load_baselines().random[run.recipe.game]
