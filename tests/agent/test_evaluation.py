"""Evaluation: what an episode depends on, the same however many are played side by side."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workspace import GAME, SEED, Workspace

from drama.agent import evaluation
from drama.agent.behaviour.agent import ActingWindow, Agent
from drama.agent.env import make
from drama.agent.env.catch import Catch
from drama.agent.evaluation import (
    SCHEMA,
    build_agent,
    describe,
    new_episode,
    play,
    write_evaluation,
)
from drama.agent.settings import EvaluationSettings, Recipe
from drama.pipeline.artifacts.evaluations import vouching
from drama.pipeline.recipes import read_recipe
from drama.runs.checkpoint import load_checkpoint

CPU = torch.device("cpu")
EPISODES = 16
Played = tuple[Agent, Recipe]


@pytest.fixture(scope="module")
def trained(undisturbed: Workspace) -> Played:
    """A trained agent that knows its mind: its actions depend on no rounding."""
    run = read_recipe(undisturbed.recipe)
    state = load_checkpoint(undisturbed.folder / "checkpoint.parquet", run.fingerprint)["agent"]
    agent = build_agent(run.recipe, state, CPU)
    agent.behaviour.actor.net[-1].weight.data *= 1000
    return agent, run.recipe


def asking(episodes: int, environments: int, **more: Any) -> EvaluationSettings:
    usual = {"actions": "greedy", "both": False, "enough_same": 0}
    return EvaluationSettings(episodes=episodes, environments=environments, **usual | more)


def outcomes(
    trained: Played, episodes: int, environments: int, **more: Any
) -> list[dict[str, Any]]:
    played = play(*trained, asking(episodes, environments, **more))
    assert [episode.index for episode in played] == list(range(episodes))
    return [episode.row() for episode in played]


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


def played_plainly(
    trained: Played, index: int, *, greedy: bool = True
) -> tuple[dict[str, Any], list[int], bool]:
    """Play one episode as the text has it, alone: its outcome, its actions, whether a life went."""
    agent, recipe = trained
    episode = new_episode(recipe.seed, index)
    environment = make(recipe.game, recipe.settings.environment)
    frame, _ = environment.reset(seed=episode.seed)
    told = hashlib.sha256(frame)
    window = agent.new_window(1)
    actions: list[int] = []
    total, over, lost = 0.0, False, False
    while not over:
        first = episode.generator.integers(agent.actions) if not actions else -1
        noise = episode.generator.standard_exponential((1, *agent.noise_shape()), np.float32)
        draws = episode.choices.standard_exponential((1, agent.actions), np.float32)
        action = int(
            agent.act(
                window,
                np.array([0]),
                frame[None],
                np.array([first]),
                torch.from_numpy(noise),
                greedy=greedy,
                action_noise=torch.from_numpy(draws),
            )[0]
        )
        actions.append(action)
        frame, reward, terminated, truncated, info = environment.step(action)
        told.update(struct.pack("<qd??", action, reward, terminated, truncated) + frame.tobytes())
        total += reward
        lost |= info["life_lost"]
        over = terminated or truncated
    environment.close()
    outcome = {
        "episode": index,
        "actions": "greedy" if greedy else "sampled",
        "seed": episode.seed,
        "episode_return": total,
        "length": len(actions),
        "truncated": truncated and not terminated,
        "played": told.hexdigest()[:16],
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


def test_an_episode_remembers_its_own_steps_also_when_others_have_no_more_to_play(
    catcher: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first environment is done before the second begins its last episode."""
    agent, recipe = catcher
    lengths = [[2, 2], [7, 5]]
    uneven = iter([Uneven(own) for own in lengths])
    monkeypatch.setattr(evaluation, "make", lambda *_: next(uneven))
    seen: list[dict[int, int]] = []
    act = agent.act

    def watched(window: ActingWindow, rows: np.ndarray, *others: Any, **more: Any) -> np.ndarray:
        seen.append({int(row): int(window.lengths[row]) for row in rows})
        return act(window, rows, *others, **more)

    monkeypatch.setattr(agent, "act", watched)
    assert len(play(agent, recipe, asking(4, 2))) == 4
    most = recipe.settings.behaviour.acting_window
    for row, own in enumerate(lengths):
        remembered = [min(step, most) for length in own for step in range(length)]
        assert [steps[row] for steps in seen if row in steps] == remembered


class Uneven(Catch):
    """Catch, but each episode ends after as many steps as it is told."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(columns=8)
        self.ends = iter(lengths)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = next(self.ends)
        return super().reset(seed=seed)

    def step(self, action: int) -> Any:
        frame, reward, _, truncated, info = super().step(action)
        self.left -= 1
        return frame, reward, self.left == 0, truncated, info


def test_a_game_is_played_to_its_end_however_short_others_are(trained: Played) -> None:
    """Keeping the first to finish would favour short ones; a lost life ends no episode."""
    agent, recipe = trained
    frames = recipe.settings.environment.model_copy(update={"max_frames": 2000})
    longer = recipe.model_copy(
        update={"settings": recipe.settings.model_copy(update={"environment": frames})}
    )
    plainly = [played_plainly((agent, longer), index) for index in range(4)]
    assert outcomes((agent, longer), 4, 2) == [outcome for outcome, _, _ in plainly]
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


# --- sampled actions, and what is different ------------------------------------------------------


def undecided(trained: Played) -> Played:
    """The same agent, to which all actions are about as good."""
    agent = deepcopy(trained[0])
    agent.behaviour.actor.net[-1].weight.data *= 1e-6
    return agent, trained[1]


@pytest.mark.parametrize("environments", [1, 3, EPISODES])
def test_sampled_actions_are_each_episodes_own(catcher: Played, environments: int) -> None:
    """Neither torch's generator nor what is played beside it decides."""
    torch.manual_seed(environments)
    sampled = outcomes(undecided(catcher), EPISODES, environments, actions="sampled")
    plainly = [played_plainly(undecided(catcher), i, greedy=False) for i in range(EPISODES)]
    assert sampled == [outcome for outcome, _, _ in plainly]
    assert min(len(set(actions)) for _, actions, _ in plainly) == 3, "drawn from all three"


def test_both_ways_are_played_the_scores_first(catcher: Played) -> None:
    agent = undecided(catcher)
    for first, second in (("greedy", "sampled"), ("sampled", "greedy")):
        both = [episode.row() for episode in play(*agent, asking(6, 4, actions=first, both=True))]
        assert both == [
            *outcomes(agent, 6, 6, actions=first),
            *outcomes(agent, 6, 6, actions=second),
        ]
        assert both[:6] != both[6:] and [row["seed"] for row in both[:6]] == [
            row["seed"] for row in both[6:]
        ]


def stubborn(trained: Played, seed: int = SEED) -> Played:
    """An agent that plays Pong and prefers one action whatever it sees."""
    recipe = trained[1].model_copy(update={"game": "Pong", "seed": seed})
    agent = Agent(recipe.settings, actions=6).eval()
    last = agent.behaviour.actor.net[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data.zero_()
    last.bias.data.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    return agent, recipe


def first_actions(seed: int, episodes: int) -> list[int]:
    return [int(new_episode(seed, i).generator.integers(6)) for i in range(episodes)]


def test_atari_episodes_of_a_stubborn_policy_differ_by_their_first_action_alone(
    trained: Played,
) -> None:
    """The emulator's seed changes nothing: without sticky actions the machine is the same."""
    rows = outcomes(stubborn(trained), 8, 8)
    first = first_actions(SEED, 8)
    assert len(set(first)) < 8 == len({row["seed"] for row in rows})
    by_action: dict[int, set[str]] = {}
    for action, row in zip(first, rows, strict=True):
        by_action.setdefault(action, set()).add(row["played"])
    assert [len(played) for played in by_action.values()] == [1] * len(by_action)
    assert len(set.union(*by_action.values())) > 1


@pytest.mark.parametrize(
    "change",
    [
        {"action": 1}, {"reward": 1.0}, {"terminated": True},
        {"terminated": True, "truncated": False},
        {"frame": np.ones((2, 2, 3), np.uint8)},
    ],
)  # fmt: skip
def test_episodes_are_different_when_anything_in_them_is(change: dict[str, Any]) -> None:
    step = {"action": 0, "reward": 0.0, "terminated": False, "truncated": False,
            "frame": np.zeros((2, 2, 3), np.uint8)}  # fmt: skip
    episodes = [new_episode(0, index) for index in range(3)]
    end = step | {"truncated": True}
    for episode, last in zip(episodes, (end, end, end | change), strict=True):
        episode.note(**step)
        assert not episode.played
        episode.note(**last)
    one, same, other = (episode.played for episode in episodes)
    assert one == same != other
    assert re.fullmatch("[0-9a-f]{16}", one)


# --- the early end -------------------------------------------------------------------------------


@pytest.mark.parametrize("environments", [2, 6])
def test_evaluation_ends_early_when_the_first_episodes_are_all_the_same(
    trained: Played, environments: int
) -> None:
    """The first by number, not the first to finish; those not played need not be the same."""
    seed = next(
        seed for seed in range(1000)
        if len(set(first_actions(seed, 3))) == 1 and len(set(first_actions(seed, 4))) == 2
    )  # fmt: skip
    agent = stubborn(trained, seed)
    everything = outcomes(agent, 6, environments)
    assert [len({row["played"] for row in everything[:count]}) for count in (3, 4)] == [1, 2]
    for enough_same, played in ((3, 3), (4, 6), (7, 6)):
        asked = asking(6, environments, enough_same=enough_same)
        assert [episode.row() for episode in play(*agent, asked)] == everything[:played]


def test_each_way_to_choose_actions_ends_for_itself(trained: Played) -> None:
    asked = asking(4, 4, both=True, enough_same=2)
    seed = next(seed for seed in range(100) if len(set(first_actions(seed, 2))) == 1)
    played = play(*stubborn(trained, seed), asked)
    assert [episode.actions for episode in played] == ["greedy"] * 2 + ["sampled"] * 4


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


# --- going on with what was finished before ------------------------------------------------------


class Seeded(Catch):
    """Catch, but how long an episode is depends on its seed."""

    def __init__(self) -> None:
        super().__init__(columns=8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        assert seed is not None
        self.left = 1 + seed % 13
        return super().reset(seed=seed)

    def step(self, action: int) -> Any:
        frame, reward, _, truncated, info = super().step(action)
        self.left -= 1
        return frame, reward, self.left == 0, truncated, info


class Stop(Exception):
    pass


Batch = tuple[np.ndarray, torch.Tensor]


def sitting(
    agent: Played, asked: EvaluationSettings, kept: list[dict[str, Any]], rounds: int | None = None
) -> tuple[list[dict[str, Any]], list[Batch]]:
    """Play on for so many rounds; returns all rows, none unless whole, and what was computed.

    That is, by round, the environments and the policy's logits. What is finished goes to `kept`.
    """
    batches: list[Batch] = []
    act, actor = agent[0].act, agent[0].behaviour.actor

    def watched(window: ActingWindow, rows: np.ndarray, *others: Any, **more: Any) -> np.ndarray:
        hook = actor.register_forward_hook(lambda _, __, out: batches.append((rows, out.clone())))
        try:
            return act(window, rows, *others, **more)
        finally:
            hook.remove()

    def after_round(ended: list[evaluation.Episode]) -> None:
        kept.extend(episode.row() for episode in ended)
        if len(batches) == rounds:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make", lambda *_: Seeded())
        patch.setattr(agent[0], "act", watched)
        try:
            episodes = play(*agent, asked, tuple(kept), after_round)
        except Stop:
            return [], batches
    return [episode.row() for episode in episodes], batches


@settings(max_examples=10, deadline=None)
@given(
    asked=st.builds(
        asking,
        st.integers(1, 7),
        st.integers(1, 4),
        actions=st.sampled_from(["greedy", "sampled"]),
        both=st.booleans(),
        enough_same=st.sampled_from([0, 2, 4]),
    ),
    stops=st.lists(st.integers(1, 25), max_size=3),
)
def test_an_evaluation_that_was_stopped_goes_on_as_if_it_had_not_been(
    catcher: Played, asked: EvaluationSettings, stops: list[int]
) -> None:
    agent = undecided(catcher)
    whole, _ = sitting(agent, asked, [])
    kept: list[dict[str, Any]] = []
    for rounds in stops:
        sitting(agent, asked, kept, rounds)
    rows, _ = sitting(agent, asked, kept)
    assert rows == whole and len(kept) == len(whole)


@pytest.mark.parametrize("kind", ["mamba2", "mamba", "transformer", "gru"])
@pytest.mark.parametrize("finished", [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 6}, {0, 2, 5}])
def test_an_episode_is_computed_in_batches_as_large_as_it_would_have_been(
    catcher: Played, kind: str, finished: set[int]
) -> None:
    """And to the last bit as it would have been, whatever rows stand in beside it."""
    agent, recipe = other_kind(catcher, kind)
    asked = asking(7, 3, actions="sampled")
    whole, batches = sitting((agent, recipe), asked, [])
    kept = [row for row in whole if row["episode"] in finished]
    begun = [[int(sum(lengths[:i])) for i in range(len(lengths))] for lengths in by_place(whole)]
    ends = [sum(lengths) for lengths in by_place(whole)]
    starts = [sum(lengths) for lengths in by_place(kept)]
    waited_for = [place for place in range(3) if starts[place] < ends[place]]
    first, last = min(starts[i] for i in waited_for), max(ends[i] for i in waited_for)
    rows, again = sitting((agent, recipe), asked, kept)
    assert rows == whole and len(set(ends)) == 3 and len(again) == last - first
    for now, (before, after) in enumerate(zip(batches[first:last], again, strict=True), first):
        assert before[0].tolist() == after[0].tolist()
        for i, place in enumerate(before[0]):  # an episode's first action is not the policy's
            if starts[place] <= now < ends[place] and now not in begun[place]:
                assert torch.equal(before[1][i], after[1][i])


def by_place(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The lengths of the episodes that each of three environments played."""
    return [[row["length"] for row in rows if row["episode"] % 3 == place] for place in range(3)]


def other_kind(trained: Played, kind: str) -> Played:
    recipe = trained[1]
    sequence = recipe.settings.sequence_model.model_copy(update={"kind": kind})
    changed = recipe.settings.model_copy(update={"sequence_model": sequence})
    torch.manual_seed(0)
    return Agent(changed, actions=3).eval(), recipe


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
    digest = header.pop("digest")
    assert vouching(header | {"fingerprint": fingerprint}, table.to_pylist())["digest"] == digest
    assert header == {
        "format": 1, "run": run.fingerprint, "game": GAME, "seed": SEED, "device": "cpu",
        "backend": "torch", "settings": asking(5, 2).model_dump(), "played": {"greedy": 5},
    }  # fmt: skip


def test_the_file_holds_what_was_played(tmp_path: Path, trained: Played) -> None:
    agent, recipe = trained
    episodes = play(agent, recipe, asking(2, 2, both=True))
    path = tmp_path / "evaluation.parquet"
    header = describe(episodes, recipe) | {"device": "cpu"}
    write_evaluation(path, [episode.row() for episode in episodes], header)
    table = pq.read_table(path)
    keys = ("actions", "seed", "episode_return", "length", "truncated", "played")
    assert table.to_pylist() == [
        {"episode": episode.index} | {key: getattr(episode, key) for key in keys}
        for episode in episodes
    ]
    header = json.loads(table.schema.metadata[b"drama"])
    assert header["played"] == {"greedy": 2, "sampled": 2}


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
    output = copy.evaluate(expected=1 if damage == "missing" else 3)
    said = "not here, and not to be found" if damage == "missing" else "not a whole checkpoint"
    assert "Traceback" not in output and f"checkpoint.parquet: {said}" in output
    assert copy.tree() == before


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
