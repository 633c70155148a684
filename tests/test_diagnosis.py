"""benchmarks/diagnosis.py: each figure by hand, and all of them of a whole run of toy size."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

# ruff: noqa: E402
import diagnosis


def test_the_share_of_moving_pixels_that_is_explained() -> None:
    """One pixel of four moves, from 0 to 255: shown as it is, as the background, halfway."""
    background = torch.zeros(2, 2, 3, dtype=torch.uint8)
    frame = background.clone()
    frame[0, 1] = 255
    shown = torch.zeros(1, 3, 2, 2)
    assert diagnosis._explained(shown, frame[None], background) == 0
    shown[0, :, 1, 1] = 0.7  # an error where nothing moves does not count
    shown[0, :, 0, 1] = 0.5
    assert diagnosis._explained(shown, frame[None], background) == pytest.approx(0.75)
    shown[0, :, 0, 1] = 1
    assert diagnosis._explained(shown, frame[None], background) == 1


def test_precision_and_recall_of_rewards() -> None:
    """Paid 10, 10, -10; called 6, -6 (of the wrong sign), 0 and, for nothing, 7."""
    paid = torch.tensor([10.0, 10.0, -10.0, 0.0, 0.0])
    predicted = torch.tensor([6.0, -6.0, 0.0, 7.0, 1.0])
    found = diagnosis._outcomes("", predicted, paid)
    assert found == {
        "rewarding steps": 3, "reward precision": pytest.approx(1 / 3),
        "reward recall": pytest.approx(1 / 3), "reward predicted over paid": pytest.approx(0.8),
    }  # fmt: skip
    assert diagnosis._outcomes("", predicted, torch.zeros(5)) == {"rewarding steps": 0}


def test_what_follows_is_discounted_up_to_an_end() -> None:
    rewards = np.array([1.0, 2.0, 4.0, 8.0, 0.0, 0.0, 0.0, 0.0])
    ended = np.array([False, True, False, False, False, False, False, False])
    returns = diagnosis._discounted(rewards, ended, 0.5)
    np.testing.assert_allclose(returns, [2, 2, 8, 8])  # the last 2 / (1 - 0.5) say too little


def test_a_whole_run_is_measured_and_left_alone(
    undisturbed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = undisturbed.tree()
    monkeypatch.chdir(undisturbed.root)
    figures = diagnosis.diagnose(undisturbed.recipe, recent=70)
    assert figures["agent steps"] == 160
    assert all(math.isfinite(value) for value in figures.values())
    assert 0 < figures["entropy over that of uniform play"] <= 1
    assert figures["reconstruction, moving pixels explained"] <= 1
    assert undisturbed.tree() == before
