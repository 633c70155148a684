"""Shapes: the check, by hand; what every border refuses; letters that the table explains."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drama.agent import shapes
from drama.agent.behaviour.agent import Agent
from drama.agent.behaviour.imagination import Trajectories, imagine
from drama.agent.replay.buffer import ReplayBuffer
from drama.agent.replay.tensors import RingTensors
from drama.agent.shapes import check_shapes
from drama.pipeline.config import Preset

A, B, C, D, E, H, K, L, S = 3, 4, 5, 8, 2, 3, 2, 6, 16
TINY: dict[str, Any] = {
    "environment": {"image_size": S},
    "world_model": {
        "channels": [4, 4], "strides": [2, 2], "categoricals": K, "classes": C, "head_hidden": 6,
    },
    "sequence_model": {"width": D, "head_width": 4, "state_size": 3},
    "behaviour": {"horizon": H, "acting_window": L},
}  # fmt: skip


def some(*sizes: int) -> torch.Tensor:
    """A tensor that has a shape and nothing else: whoever asks for a value gets an error."""
    return torch.empty(sizes, device="meta")


# --- the check -----------------------------------------------------------------------------------


def test_what_fits_is_let_through() -> None:
    check_shapes(frames=(some(B, L, S, S, 3), "B L S S 3"), actions=(some(B, L), "B L"))
    check_shapes({"A": A}, logits=(some(B, A), "B A"), rows=(np.zeros(B), "B"))
    check_shapes(states=(some(B, H + 1, 7), "B H+1 width"), actions=(some(B, H), "B H"))
    check_shapes(actions=(some(B, H), "B H"), states=(some(B, H + 1, 7), "B H+1 width"))
    check_shapes(given=(some(B), "B"), left_out=(None, "B L"), scalar=(some(), ""))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Of one tensor: too few axes, too many, another number, a letter of two sizes.
        ({"a": (some(4), "B L")}, "a has shape [4], expected [B, L]"),
        ({"a": (some(4, 6), "B")}, "a has shape [4, 6], expected [B]"),
        ({"a": (some(4, 2), "B 3")}, "a has shape [4, 2], expected [B, 3]"),
        ({"a": (some(8, 9, 3), "S S 3")}, "a has shape [8, 9, 3], expected [S, S, 3]"),
        # Of a size known beforehand.
        ({"a": (some(4, 7), "B A")}, "a has shape [4, 7], expected [B, A] with A = 3"),
        # Of two tensors: they would broadcast, or be off by one.
        (
            {"a": (some(4, 6), "B L"), "b": (some(1, 6), "B L")},
            "b has shape [1, 6], expected [B, L] with B = 4, L = 6; beside it a [4, 6]",
        ),
        (
            {"a": (some(4, 6), "B L"), "b": (some(4, 1), "B L"), "c": (some(4, 6), "B L")},
            "b has shape [4, 1], expected [B, L] with B = 4, L = 6; beside it a [4, 6], c [4, 6]",
        ),
        (
            {"a": (some(4, 3), "B H"), "b": (some(4, 3, 7), "B H+1 width"), "c": (None, "B")},
            "b has shape [4, 3, 7], expected [B, H+1, width] with B = 4, H = 3; beside it a [4, 3]",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape_and_what_was_expected(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_shapes({"A": A}, **given)


# --- the borders ---------------------------------------------------------------------------------


@pytest.fixture
def agent(preset: Callable[..., Preset]) -> Agent:
    return Agent(preset("quick", TINY).settings(), A).eval()


def frames(*before: int) -> torch.Tensor:
    return torch.zeros(*before, S, S, 3, dtype=torch.uint8)


def whole(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.int64)


def refused(call: Callable[..., Any], given: dict[str, Any], wrong: Any, message: str) -> None:
    """Expect a call to be carried out as it stands, and refused with one argument replaced."""
    call(**given)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**given | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rewards": torch.zeros(B, 1)}, "rewards has shape [4, 1], expected [B, L]"),
        ({"terminations": torch.zeros(1, L)}, "terminations has shape [1, 6], expected [B, L]"),
        ({"actions": whole(B, L - 1)}, "actions has shape [4, 5], expected [B, L]"),
        ({"frames": frames(B * L)}, "frames has shape [24, 16, 16, 3], expected [B, L, S, S, 3]"),
        (
            {"frames": frames(B, L)[:, :, :8, :8]},
            "frames has shape [4, 6, 8, 8, 3], expected [B, L, S, S, 3] with S = 16",
        ),
    ],
)
def test_the_world_models_loss(agent: Agent, wrong: dict[str, Any], message: str) -> None:
    given = {
        "frames": frames(B, L), "actions": whole(B, L), "rewards": torch.zeros(B, L),
        "terminations": torch.zeros(B, L),
    }  # fmt: skip
    refused(agent.world_model.loss, given, wrong, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"actions": whole(1, L)}, "actions has shape [1, 6], expected [B, L] with B = 4, L = 6"),
        ({"frames": frames(7)}, "frames has shape [7, 16, 16, 3], expected [B, L, S, S, 3]"),
        (
            {"frames": frames(7), "places": whole(1, L)},
            "places has shape [1, 6], expected [B, L] with B = 4, L = 6",
        ),
        (
            {"places": whole(B, L)},
            "frames has shape [4, 6, 16, 16, 3], expected [F, S, S, 3] with S = 16",
        ),
    ],
)
@pytest.mark.parametrize("border", ["observe", "imagine"])
def test_observing_and_imagining(
    agent: Agent, border: str, wrong: dict[str, Any], message: str
) -> None:
    given = {"frames": frames(B, L), "actions": whole(B, L)}

    def imagining(**contexts: Any) -> None:
        imagine(agent.world_model, agent.behaviour.actor.sample, horizon=H, **contexts)

    refused(agent.world_model.observe if border == "observe" else imagining, given, wrong, message)


def test_imagining_with_a_policy_that_gives_actions_an_axis_of_their_own(agent: Agent) -> None:
    def policy(states: torch.Tensor) -> torch.Tensor:
        return agent.behaviour.actor.sample(states).unsqueeze(-1)

    with pytest.raises(ValueError, match=re.escape("actions has shape [4, 1], expected [B]")):
        imagine(agent.world_model, policy, frames(B, L), whole(B, L), H)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # The probabilities of the first trajectory's actions would meet everyone's advantages.
        (
            {"actions": whole(1, H)},
            "actions has shape [1, 3], expected [B, H] with B = 4, H = 3; beside it "
            "states [4, 4, 18], rewards [4, 3], terminations [4, 3]",
        ),
        ({"rewards": torch.zeros(B, H + 1)}, "rewards has shape [4, 4], expected [B, H]"),
        ({"terminations": torch.zeros(B)}, "terminations has shape [4], expected [B, H]"),
        (
            {"states": torch.zeros(B, H + 1, D)},
            "states has shape [4, 4, 8], expected [B, H+1, width] with width = 18",
        ),
    ],
)
def test_the_behaviours_loss(agent: Agent, wrong: dict[str, Any], message: str) -> None:
    trajectories = Trajectories(
        states=torch.zeros(B, H + 1, K * C + D), actions=whole(B, H),
        rewards=torch.zeros(B, H), terminations=torch.zeros(B, H),
    )  # fmt: skip
    agent.behaviour.loss(trajectories)
    with pytest.raises(ValueError, match=re.escape(message)):
        agent.behaviour.loss(replace(trajectories, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reward_rows": whole(1, L)}, "reward_rows has shape [1, 6], expected [B, L] with B = 4"),
        ({"rows": whole(L)}, "rows has shape [6], expected [B, L]"),
    ],
)
def test_reading_the_ring(wrong: dict[str, Any], message: str) -> None:
    ring = RingTensors(ReplayBuffer(10, (S, S, 3)), torch.device("cpu"))
    refused(ring.read, {"rows": whole(B, L), "reward_rows": whole(B, L)}, wrong, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # One environment's noise would serve them all.
        (
            {"noise": torch.ones(1, 2, K, C)},
            "noise has shape [1, 2, 2, 5], expected [E, 2, K, C] with E = 2, K = 2, C = 5",
        ),
        ({"frames": frames(1)}, "frames has shape [1, 16, 16, 3], expected [E, S, S, 3]"),
        ({"random_actions": np.zeros(1, np.int64)}, "random_actions has shape [1], expected [E]"),
        ({"action_noise": torch.ones(E, A + 1)}, "action_noise has shape [2, 4], expected [E, A]"),
    ],
)
def test_acting(agent: Agent, wrong: dict[str, Any], message: str) -> None:
    def act(**given: Any) -> None:
        given = {key: v.numpy() if key == "frames" else v for key, v in given.items()}
        agent.act(agent.new_window(E), np.arange(E), greedy=False, **given)

    given = {
        "frames": frames(E), "random_actions": np.zeros(E, np.int64),
        "noise": torch.ones(E, 2, K, C),
    }  # fmt: skip
    refused(act, given, wrong, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": torch.ones(1, 2, K, C)}, "noise has shape [1, 2, 2, 5], expected [E, 2, K, C]"),
        ({"latents": whole(E, L, K, C)}, "latents has shape [2, 6, 2, 5], expected [E, L, K]"),
        ({"actions": whole(E, 1)}, "actions has shape [2, 1], expected [E, L] with E = 2, L = 6"),
        ({"lengths": whole(E, 1)}, "lengths has shape [2, 1], expected [E] with E = 2"),
    ],
)
@pytest.mark.parametrize("border", ["decide", "explore"])
def test_deciding(agent: Agent, border: str, wrong: dict[str, Any], message: str) -> None:
    given = {
        "frames": frames(E), "latents": whole(E, L, K), "actions": whole(E, L),
        "lengths": whole(E) + 1, "noise": torch.ones(E, 2, K, C),
    }  # fmt: skip
    refused(getattr(agent, border), given, wrong, message)


# --- the letters ---------------------------------------------------------------------------------

SHAPE = re.compile(r"\[([^\[\]]*)\]")
LETTER = re.compile(r"(?<![\w'])\d*([A-Z])(?![\w'])")
HERE = ("drama/agent", "drama/runs", "benchmarks")


def explained() -> tuple[set[str], set[str]]:
    """Letters of the table: everyone's, and those of the sequence models alone."""
    assert shapes.__doc__ is not None
    everyones, sequence = shapes.__doc__.split("Inside the sequence models")
    rows = re.compile(r"^    ([A-Z])   \w", re.MULTILINE)
    listed = rows.findall(everyones), rows.findall(sequence)
    assert all(len(letters) == len(set(letters)) for letters in listed)
    return set(listed[0]), set(listed[1])


def letters(text: str) -> set[str]:
    """Letters of the shapes in a text; what a command line leaves optional is none."""
    found = (shape for shape in SHAPE.findall(text) if "--" not in shape)
    return {letter for shape in found for letter in LETTER.findall(shape)}


def prose(source: str) -> Iterator[str]:
    """Yield the comments and docstrings of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def checks(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_shapes":
            yield node


def sources(root: Path) -> Iterator[tuple[str, str]]:
    for folder in HERE:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def test_every_letter_of_a_shape_is_in_the_table(root: Path) -> None:
    everyones, sequence = explained()
    assert everyones == set("ABCDEFHKLSZ") and sequence == set("NPQW")
    for name, source in sources(root):
        known = everyones | sequence if "model/sequence/" in name else everyones
        for text in prose(source):
            assert letters(text) <= known, f"{name}: {letters(text) - known} in {text.strip()!r}"
        for check in checks(ast.parse(source)):
            axes = [node.value for node in ast.walk(check) if isinstance(node, ast.Constant)]
            said = {letter for text in axes for letter in LETTER.findall(str(text))}
            assert said <= everyones, f"{name}:{check.lineno}: {said - everyones}"


def test_letters_without_a_meaning_would_be_found() -> None:
    assert letters("frames uint8 [T, H, W, 3], d [..., 2N + D], bins [..., bins]") == set("THWND")
    assert letters("usage: [--threads N] [FOLDER], list[int], P [x_T']") == set()
    assert list(prose("x = 1  # [T]\n'''[U]'''\ny = '[V]'\n")) == ["# [T]", "[U]"]


def test_the_check_stands_alone(root: Path) -> None:
    """As a statement of its own, which changes nothing: fingerprints leave it out."""
    seen = 0
    for name, source in sources(root):
        tree = ast.parse(source)
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for check in checks(tree):
            assert id(check) in alone, f"{name}:{check.lineno}"
            seen += 1
    assert seen >= 7
