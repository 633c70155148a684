"""Evaluation: greedy, seeded by episode, the same however many are played side by side."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workspace import GAME, SEED, Workspace

from drama.behaviour.agent import Agent
from drama.config import EvaluationSettings
from drama.env import make
from drama.evaluation import SCHEMA, load_agent, new_episode, play, write_evaluation
from drama.recipes import read_recipe
from drama.settings import Recipe
from drama.training.checkpoint import CheckpointError

CPU = torch.device("cpu")
EPISODES = 16
Played = tuple[Agent, Recipe]


@pytest.fixture(scope="module")
def trained(undisturbed: Workspace) -> Played:
    """A trained agent that knows its mind: its actions depend on no rounding."""
    run = read_recipe(undisturbed.recipe)
    checkpoint = undisturbed.folder / "checkpoint.parquet"
    agent = load_agent(run.recipe, checkpoint, run.fingerprint, CPU)
    agent.behaviour.actor.net[-1].weight.data *= 1000
    return agent, run.recipe


def outcomes(trained: Played, episodes: int, environments: int) -> list[dict[str, Any]]:
    settings = EvaluationSettings(episodes=episodes, environments=environments)
    played = play(*trained, settings)
    assert [episode.index for episode in played] == list(range(episodes))
    keys = ("seed", "episode_return", "length", "truncated")
    return [{key: asdict(episode)[key] for key in keys} for episode in played]


@pytest.fixture(scope="module")
def catcher(trained: Played) -> Played:
    """An agent whose every action shows: in Catch, one step decides between +1 and -1."""
    recipe = trained[1].model_copy(update={"game": "Catch8"})
    torch.manual_seed(0)
    agent = Agent(recipe.settings, actions=3).eval()
    agent.behaviour.actor.net[-1].weight.data *= 1000
    return agent, recipe


@pytest.fixture(scope="module")
def one_by_one(catcher: Played) -> list[dict[str, Any]]:
    return outcomes(catcher, EPISODES, 1)


def played_plainly(trained: Played, index: int) -> tuple[dict[str, Any], list[int], bool]:
    """Play one episode as the text has it, alone: its outcome, its actions, whether a life went."""
    agent, recipe = trained
    episode = new_episode(recipe.seed, index)
    environment = make(recipe.game, recipe.settings.environment)
    frame, _ = environment.reset(seed=episode.seed)
    window = agent.new_window(1)
    actions: list[int] = []
    total, over, lost = 0.0, False, False
    while not over:
        first = episode.generator.integers(agent.actions) if not actions else -1
        noise = episode.generator.standard_exponential((1, *agent.noise_shape()), np.float32)
        action = int(
            agent.act(
                window,
                np.array([0]),
                frame[None],
                np.array([first]),
                torch.from_numpy(noise),
                greedy=True,
            )[0]
        )
        actions.append(action)
        frame, reward, terminated, truncated, info = environment.step(action)
        total += reward
        lost |= info["life_lost"]
        over = terminated or truncated
    environment.close()
    outcome = {
        "seed": episode.seed,
        "episode_return": total,
        "length": len(actions),
        "truncated": truncated and not terminated,
    }
    return outcome, actions, lost


def test_an_episode_is_what_it_is_when_played_alone(
    catcher: Played, one_by_one: list[dict[str, Any]]
) -> None:
    """So contexts are cleared at each reset."""
    plainly = [played_plainly(catcher, index) for index in range(EPISODES)]
    assert [outcome for outcome, _, _ in plainly] == one_by_one
    assert {item["episode_return"] for item in one_by_one} == {-1.0, 1.0}
    assert len({tuple(actions) for _, actions, _ in plainly}) > EPISODES / 2


@pytest.mark.parametrize("environments", [2, 3, EPISODES, 50])
def test_how_many_are_stepped_together_changes_nothing(
    catcher: Played, one_by_one: list[dict[str, Any]], environments: int
) -> None:
    assert outcomes(catcher, EPISODES, environments) == one_by_one


def test_more_episodes_leave_the_first_ones_as_they_are(
    catcher: Played, one_by_one: list[dict[str, Any]]
) -> None:
    assert outcomes(catcher, 7, 2) == one_by_one[:7]


def test_nothing_but_the_episodes_seeds_plays_a_part(
    catcher: Played, one_by_one: list[dict[str, Any]]
) -> None:
    agent, _ = catcher
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    torch.manual_seed(12345)
    np.random.seed(12345)
    assert outcomes(catcher, EPISODES, 3) == one_by_one
    after = agent.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "evaluation learns"


def test_a_game_is_played_to_its_end_however_short_others_are(trained: Played) -> None:
    """Keeping the first to finish would favour short ones; a lost life ends no episode."""
    agent, recipe = trained
    frames = recipe.settings.environment.model_copy(update={"max_frames": 2000})
    longer = recipe.model_copy(
        update={"settings": recipe.settings.model_copy(update={"environment": frames})}
    )
    plainly = [played_plainly((agent, longer), index) for index in range(2)]
    assert outcomes((agent, longer), 2, 2) == [outcome for outcome, _, _ in plainly]
    assert len({outcome["length"] for outcome, _, _ in plainly}) > 1, "nothing is shown"
    assert all(lost for _, _, lost in plainly)


def test_scores_are_of_whole_games_whatever_a_lost_life_terminates(trained: Played) -> None:
    agent, recipe = trained
    changes = {"life_loss_terminates": "episode", "max_frames": 2000}
    environment = recipe.settings.environment.model_copy(update=changes)
    other = recipe.model_copy(
        update={"settings": recipe.settings.model_copy(update={"environment": environment})}
    )
    outcome, _, lost = played_plainly((agent, other), 0)
    assert outcomes((agent, other), 1, 1) == [outcome] and lost


@given(st.integers(0, 2**31 - 1), st.integers(0, 10_000))
def test_seeds_are_derived_from_run_and_episode(run_seed: int, index: int) -> None:
    episode, again = new_episode(run_seed, index), new_episode(run_seed, index)
    assert 0 <= episode.seed < 2**31
    assert episode.seed == again.seed
    assert episode.generator.random() == again.generator.random()
    other = new_episode(run_seed, index + 1)
    assert other.generator.random() != new_episode(run_seed, index).generator.random()


def test_episodes_of_one_run_and_of_five_have_seeds_of_their_own() -> None:
    seeds = [new_episode(run, index).seed for run in range(5) for index in range(100)]
    assert len(set(seeds)) == 500
    training = [np.random.SeedSequence(run).spawn(4)[0].generate_state(1)[0] for run in range(5)]
    assert not {int(seed) & 0x7FFF_FFFF for seed in training} & set(seeds)


# --- files ---------------------------------------------------------------------------------------


def evaluation_file(workspace: Workspace) -> Path:
    (path,) = workspace.folder.glob("evaluation-*.parquet")
    return path


def test_the_file_holds_a_row_per_episode_and_says_what_it_is_of(undisturbed: Workspace) -> None:
    run = read_recipe(undisturbed.recipe)
    path = evaluation_file(undisturbed)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA) and table.num_rows == 5
    assert table["episode"].to_pylist() == list(range(5))
    assert table["seed"].to_pylist() == [new_episode(SEED, index).seed for index in range(5)]
    header = json.loads(table.schema.metadata[b"drama"])
    fingerprint = header.pop("fingerprint")
    assert path.name == f"evaluation-{fingerprint[:16]}.parquet" and len(fingerprint) == 64
    assert header == {
        "format": 1, "run": run.fingerprint, "game": GAME, "seed": SEED, "device": "cpu",
        "backend": "torch", "settings": {"episodes": 5, "environments": 2},
    }  # fmt: skip


def test_the_file_holds_what_was_played(tmp_path: Path, trained: Played) -> None:
    agent, recipe = trained
    episodes = play(agent, recipe, EvaluationSettings(episodes=2, environments=2))
    path = tmp_path / "evaluation.parquet"
    write_evaluation(path, episodes, recipe, {"device": "cpu"})
    rows = pq.read_table(path).to_pylist()
    for row, episode in zip(rows, episodes, strict=True):
        assert row == {"episode": episode.index} | {
            key: getattr(episode, key) for key in ("seed", "episode_return", "length", "truncated")
        }


def test_evaluating_again_gives_the_same_bytes(undisturbed: Workspace) -> None:
    before = evaluation_file(undisturbed).read_bytes()
    evaluation_file(undisturbed).unlink()
    assert "mean return" in undisturbed.evaluate()
    assert evaluation_file(undisturbed).read_bytes() == before


@pytest.fixture
def copy(undisturbed: Workspace, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(undisturbed.root, workspace.root)
    evaluation_file(workspace).unlink()
    return workspace


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_checkpoint_that_cannot_be_used_is_named(copy: Workspace, damage: str) -> None:
    path = copy.folder / "checkpoint.parquet"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[:-9], "flipped": flipped}[damage])
    before = copy.tree()
    output = copy.evaluate(expected=1)
    said = "not here, and not to be found" if damage == "missing" else "not a whole checkpoint"
    assert "Traceback" not in output and f"checkpoint.parquet: {said}" in output
    assert copy.tree() == before


def test_an_agent_of_another_run_is_not_taken(copy: Workspace) -> None:
    run = read_recipe(copy.recipe)
    with pytest.raises(CheckpointError, match="belongs to run"):
        load_agent(run.recipe, copy.folder / "checkpoint.parquet", "0" * 64, CPU)


def test_a_run_that_is_not_whole_is_not_scored_and_moves_no_other(copy: Workspace) -> None:
    copy.plan("--set", "behaviour.horizon=2")
    before = copy.tree()
    output = copy.evaluate(expected=1)
    assert "not trained to its end" in output and "drama train" in output
    assert "Traceback" not in output
    assert copy.tree() == before


def test_a_run_that_was_set_aside_is_brought_back_to_be_scored(
    copy: Workspace, undisturbed: Workspace
) -> None:
    copy.plan()
    aside = copy.root / f"results/tiny/superseded/{GAME}/seed{SEED}"
    aside.mkdir(parents=True)
    run = read_recipe(copy.recipe)
    copy.folder.rename(aside / run.fingerprint[:16])
    copy.evaluate()
    assert evaluation_file(copy).read_bytes() == evaluation_file(undisturbed).read_bytes()
