"""Training as a process: stopped, killed, starved of disk space, it ends with the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from workspace import TOTAL_STEPS, AtStep, AtWrite, Moment, Workspace, make_workspace

from drama.agent.behaviour.agent import Agent
from drama.agent.training import resumable
from drama.agent.training.loop import Trainer
from drama.agent.training.resumable import TrainingFailed
from drama.agent.training.runtime import Runtime
from drama.errors import DramaError
from drama.files import flatten
from drama.pipeline.recipes import read_recipe
from drama.runs.checkpoint import PREVIOUS, load_checkpoint, save_checkpoint
from drama.runs.folder import make_current, write_record
from drama.runs.progress import Reporter, Status
from drama.runs.shards import ShardError, read_shard, read_shards, write_shard
from drama.runs.stopping import Stopped

STOPPED = 75
KILLED = -signal.SIGKILL
ON_CPU = Runtime(torch.device("cpu"), threads=1, checkpoint_every=1000)
TERM, INT = (signal.SIGTERM,), (signal.SIGINT,)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = make_workspace(tmp_path)
    made.plan()
    return made


def step_of(workspace: Workspace) -> int:
    """The step at which a run would go on."""
    fingerprint = read_recipe(workspace.recipe).fingerprint
    state = load_checkpoint(workspace.folder / "checkpoint.parquet", fingerprint)
    return int(state["episode"]["step"])


def status(workspace: Workspace) -> dict[str, object]:
    return dict(json.loads((workspace.folder / "status.json").read_text(encoding="utf-8")))


def test_the_undisturbed_run_holds_what_stopping_could_spoil(undisturbed: Workspace) -> None:
    """Otherwise equal bytes would prove little."""
    columns = read_shards(undisturbed.folder / "replay", 0, TOTAL_STEPS)
    assert columns["life_lost"].any() and columns["reward"].any()
    assert columns["episode"].max() >= 2
    assert len(list((undisturbed.folder / "replay").iterdir())) == 3, "the ring never wrapped"
    curves = pq.read_table(undisturbed.folder / "training.parquet")
    assert np.isfinite(curves["loss/critic"].to_numpy()[-3:]).all()


def test_replay_holds_the_episodes_that_are_listed(undisturbed: Workspace) -> None:
    columns = read_shards(undisturbed.folder / "replay", 0, TOTAL_STEPS)
    episodes = pq.read_table(undisturbed.folder / "episodes.parquet").to_pylist()
    assert [row["episode"] for row in episodes] == list(range(len(episodes)))
    begin = 0
    for row in episodes:
        mine = columns["episode"] == row["episode"]
        assert mine.sum() == row["length"] == row["step"] - begin
        assert columns["reward"][mine].sum() == row["episode_return"]
        last = row["step"] - 1
        assert columns["truncated"][last] == row["truncated"] != columns["terminated"][last]
        begin = row["step"]


@pytest.mark.parametrize(
    "moments",
    [
        # While a shard is written, and between a shard and the checkpoint that knows of it.
        [AtWrite("part-00000.parquet", share=0.5), AtWrite("part-00000.parquet", share=None)],
        # Within a checkpoint, before it takes its name, and between a table and it.
        [AtWrite("checkpoint.parquet", 2, share=0.5), AtWrite("checkpoint.parquet", 2)],
        # Both kinds, in turns.
        [AtStep(50, TERM), AtStep(88), AtStep(100, INT), AtStep(TOTAL_STEPS - 1)],
    ],
    ids=["shard", "checkpoint", "mixed"],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    undisturbed: Workspace, workspace: Workspace, moments: list[Moment]
) -> None:
    for moment in moments:
        asked = isinstance(moment, AtStep) and signal.SIGKILL not in moment.signals
        output = workspace.train(moment, expected=STOPPED if asked else KILLED)
        if asked:
            assert isinstance(moment, AtStep)
            assert f"stopped at step {moment.step} of {TOTAL_STEPS}" in output
            assert step_of(workspace) == moment.step
            assert status(workspace)["state"] == "stopped"
        assert not list(workspace.folder.glob("run-*.json"))
    workspace.train()
    workspace.evaluate()
    assert workspace.result() == undisturbed.result()
    names = {path.name for path in workspace.folder.rglob("*")}
    assert names == {path.name for path in undisturbed.folder.rglob("*")}, "something was left"


@pytest.mark.whole
@pytest.mark.parametrize(
    "moments",
    [
        # Asked to stop: before the first update, within an episode, later.
        [AtStep(1, TERM), AtStep(23, INT), AtStep(61, TERM)],
        # Killed before the first checkpoint, then between two, then just after going on.
        [AtStep(30), AtStep(90), AtStep(75)],
        # Twice at once, and at the end.
        [AtStep(40, INT + INT + TERM), AtStep(105, TERM), AtStep(TOTAL_STEPS, TERM)],
        # Between the two names of the one before and the new one's.
        [
            AtWrite("checkpoint.previous.parquet"),
            AtWrite("checkpoint.previous.parquet", share=None),
        ],
        [
            AtWrite("checkpoint.parquet", share=0.0),
            AtWrite("episodes.parquet", 2, share=None),
            AtWrite("training.parquet", 2, share=0.5),
        ],
        # At the end: a short last shard, the last checkpoint, the record.
        [AtWrite("part-00002.parquet", share=None), AtWrite("run-*.json", share=0.5)],
    ],
    ids=["term", "kill", "int", "before", "tables", "end"],
)
def test_so_does_one_that_was_stopped_at_other_moments(
    undisturbed: Workspace, workspace: Workspace, moments: list[Moment]
) -> None:
    test_a_run_that_was_stopped_ends_with_the_same_bytes(undisturbed, workspace, moments)


# What is off by default, all at once: its generators must be part of the saved state, too.
OTHERS = """\
base: quick
environment:
  max_frames: 200
  repeat_action_probability: 0.25
  no_op_starts: 30
  life_loss_terminates: episode
replay: {capacity: 70}
world_model:
  channels: [4, 8, 8]
  batch_size: 2
  sequence_length: 8
  optimiser: {decay_spares: gains_and_dynamics}
behaviour:
  contexts: 4
  horizon: 3
  acting_window: 4
  temperature: 2
  epsilon: 0.3
  as_published: true
training: {total_steps: 160, random_steps: 40, log_every: 15}
evaluation: {episodes: 5, environments: 2}
"""


@pytest.mark.whole
def test_a_stopped_run_with_everything_that_is_off_by_default_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    runs = []
    for number, moments in enumerate(([], [AtStep(61, TERM), AtStep(110), AtStep(140, INT)])):
        made = make_workspace(tmp_path / str(number), {"config/presets/tiny.yaml": OTHERS})
        made.plan()
        for moment in moments:
            made.train(moment, expected=KILLED if signal.SIGKILL in moment.signals else STOPPED)
        made.train()
        made.evaluate()
        runs.append(made)
    assert runs[0].result() == runs[1].result()
    columns = read_shards(runs[0].folder / "replay", 0, TOTAL_STEPS)
    ended = np.flatnonzero(np.diff(columns["episode"]))
    lost = np.flatnonzero(columns["life_lost"])
    assert len(lost) >= 2 and set(lost) - {TOTAL_STEPS - 1} <= set(ended)
    assert not columns["terminated"][lost].all(), "no game went on that was not let go on"


OTHERWISE = """
from drama.agent.training import resumable
resumable.ROWS_PER_SHARD = 23
from drama.cli import main
main()
"""


def test_neither_hash_seed_nor_shards_nor_checkpoints_change_what_is_learned(
    undisturbed: Workspace, workspace: Workspace
) -> None:
    command = ["train", str(workspace.recipe), "--device", "cpu", "--checkpoint-every", "11"]
    subprocess.run(
        [sys.executable, "-c", OTHERWISE, *command],
        cwd=workspace.root, env=os.environ | {"PYTHONHASHSEED": "4242"}, check=True,
    )  # fmt: skip
    both = [each.result() for each in (undisturbed, workspace)]
    assert "part-00006.parquet" in both[1]
    for name in ("training.parquet", "episodes.parquet"):
        assert both[0][name] == both[1][name]
    fingerprint = read_recipe(workspace.recipe).fingerprint
    states = [
        load_checkpoint(each.folder / "checkpoint.parquet", fingerprint)
        for each in (undisturbed, workspace)
    ]
    for name in ("shards", "rows_in_shards", "tail"):
        for state in states:
            del state["replay"][name]
    first, second = map(flatten, states)
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        same = value.tobytes() == other.tobytes() if hasattr(value, "tobytes") else value == other
        assert same, name


@pytest.mark.whole
@pytest.mark.parametrize("name", ["xs-as-published", "xs-exempt-decay"])
def test_ablations_of_xs_train_at_toy_size(
    undisturbed: Workspace, tmp_path: Path, name: str
) -> None:
    """Quick's sizes over the ablation instead of xs; it learns something else than xs does."""
    quick = (undisturbed.root / "config/presets/quick.yaml").read_text(encoding="utf-8")
    assert quick.count("base: xs ") == 1
    other = {"config/presets/quick.yaml": quick.replace("base: xs ", f"base: {name} ")}
    made = make_workspace(tmp_path / "run", other)
    made.plan()
    made.train()
    curves = pq.read_table(made.folder / "training.parquet")
    before = pq.read_table(undisturbed.folder / "training.parquet")
    for column in ("loss/reconstruction", "imagined_reward", "loss/critic"):
        assert np.isfinite(curves[column].to_numpy()[-3:]).all()
    assert curves["imagined_reward"].to_pylist() != before["imagined_reward"].to_pylist()


def acting(workspace: Workspace, steps: int, *assignments: str) -> Trainer:
    """A trainer that has played so many steps, none of them random by schedule but the first."""
    workspace.plan("--set=training.random_steps=40", *(f"--set={text}" for text in assignments))
    run = read_recipe(workspace.root / workspace.recipe)
    trainer = Trainer(run.recipe, run.fingerprint, workspace.folder, ON_CPU)
    trainer.step = 40  # of the schedule; nothing is learned here
    status_file = workspace.folder / "status.json"
    reporter = Reporter("run", Status.resumed(status_file, run.fingerprint, 1000), status_file)
    for _ in range(steps):
        trainer.act_and_store(reporter)
    trainer.environment.close()
    return trainer


@pytest.mark.parametrize("meaning", ["learning", "nothing", "episode"])
def test_what_a_lost_life_terminates(workspace: Workspace, meaning: str) -> None:
    trainer = acting(
        workspace, 150, f"environment.life_loss_terminates={meaning}",
        "environment.max_frames=108000", "replay.capacity=1000",
    )  # fmt: skip
    columns = trainer.buffer.columns(0, 150)
    lost, over = np.flatnonzero(columns["life_lost"]), np.flatnonzero(columns["terminated"])
    ended = np.flatnonzero(np.diff(columns["episode"]))
    assert len(lost) > 2 and lost[-1] < 149
    rows = torch.arange(150)[None]
    told = np.flatnonzero(trainer.ring.read(rows, rows).terminations[0])
    assert told.tolist() == (over if meaning == "nothing" else lost).tolist()
    assert ended.tolist() == (lost if meaning == "episode" else over).tolist()


def test_epsilon_mixes_in_uniform_actions_while_training(workspace: Workspace) -> None:
    """A policy that always wants action 1 gets it but for a share of epsilon * 3/4."""
    usual = Agent.explore

    def stubborn(self: Agent, *given: torch.Tensor) -> torch.Tensor:
        decision = usual(self, *given)
        decision[:, :2] = 1
        return decision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "explore", stubborn)
        shares = {}
        for epsilon in (0.0, 0.4, 1.0):
            trainer = acting(workspace, 400, f"behaviour.epsilon={epsilon}", "replay.capacity=1000")
            actions = trainer.buffer.columns(0, 400)["action"]
            counts = np.bincount(actions, minlength=4) / 400
            shares[epsilon] = counts
    firsts = 12 / 400  # episodes begin with a random action, at most so many here
    assert 1 - shares[0.0][1] <= firsts
    np.testing.assert_allclose(shares[0.4], [0.1, 0.7, 0.1, 0.1], atol=0.075)
    np.testing.assert_allclose(shares[1.0], 0.25, atol=0.09)


def test_the_recorded_time_is_of_all_sittings_together(workspace: Workspace) -> None:
    workspace.train(AtStep(45, TERM), expected=STOPPED)
    earlier = status(workspace)
    path = workspace.folder / "status.json"
    path.write_text(json.dumps(earlier | {"wall_seconds": 1000.0}), encoding="utf-8")
    workspace.train(AtStep(46, TERM), expected=STOPPED)
    later = status(workspace)
    assert 1000 < float(str(later["wall_seconds"])) < 1000 + 600
    assert later["last_return"] == earlier["last_return"]


def test_the_command_stops_when_asked_from_outside(workspace: Workspace) -> None:
    """The installed command, in a shell's hands; the rest is in test_pipeline.py."""
    drama = Path(sys.executable).with_name("drama")
    process = subprocess.Popen(
        [drama, "train", workspace.recipe, "--device", "cpu"],
        cwd=workspace.root,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (workspace.folder / "status.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == STOPPED, message
    assert "stopping: this step is finished" in message
    assert "The same command goes on from here" in message
    assert step_of(workspace) < TOTAL_STEPS


def test_asked_while_it_is_still_loading_it_stops_with_the_same_code(workspace: Workspace) -> None:
    before = workspace.tree()
    code = (
        "import os, signal, sys, drama.cli as cli\n"
        "read = cli.read_recipe\n"
        "cli.read_recipe = lambda p: (os.kill(os.getpid(), signal.SIGTERM), read(p))[1]\n"
        f"sys.argv = ['drama', 'train', {str(workspace.recipe)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workspace.root, capture_output=True, text=True
    )
    assert done.returncode == STOPPED, done.stderr
    assert done.stderr == "stopped; the same command goes on\n"
    assert workspace.tree() == before


def test_the_plain_path_learns_the_same_but_for_rounding(
    undisturbed: Workspace, workspace: Workspace
) -> None:
    workspace.run("train", str(workspace.recipe), "--device", "cpu", "--plain")
    curves = [pq.read_table(w.folder / "training.parquet") for w in (undisturbed, workspace)]
    for name in ("loss/reconstruction", "loss/reward", "loss/dynamics"):
        fast, plain = (np.array(c[name].to_pylist(), float) for c in curves)
        assert np.isfinite(fast).any()
        np.testing.assert_allclose(fast, plain, rtol=1e-3)
    weights = [w.result()["checkpoint.parquet"] for w in (undisturbed, workspace)]
    assert weights[0] != weights[1], "no rounding differs: is the plain path another one?"


def test_a_whole_run_is_left_alone(undisturbed: Workspace) -> None:
    before = undisturbed.tree()
    assert "whole already" in undisturbed.train()
    assert undisturbed.tree() == before


def test_a_full_disk_is_explained_and_costs_only_what_came_after_the_last_checkpoint(
    undisturbed: Workspace, workspace: Workspace
) -> None:
    workspace.train(AtStep(42), expected=KILLED)
    saved = (workspace.folder / "checkpoint.parquet").read_bytes()
    output = workspace.train(file_limit=len(saved) // 2, expected=1)
    assert "Traceback" not in output and "too large" in output
    assert (workspace.folder / "checkpoint.parquet").read_bytes() == saved
    assert not list(workspace.folder.rglob(".*.part"))
    assert status(workspace)["state"] == "failed"
    workspace.train()
    assert workspace.result() == {
        name: value for name, value in undisturbed.result().items() if "evaluation" not in name
    }


# --- losses that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "rate", "named"),
    [
        ("world_model", "1e30", "loss/total is nan, loss/reconstruction is nan"),
        ("behaviour", "1e35", "gradient_norm/behaviour is nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    workspace: Workspace, section: str, rate: str, named: str
) -> None:
    optimiser = f"{section}.optimiser"
    other = {"world_model": "behaviour", "behaviour": "world_model"}[section]
    workspace.plan(
        f"--set={optimiser}.learning_rate={rate}",
        f"--set={optimiser}.warmup_updates=0",
        f"--set=training.{other}_every=1000",
    )
    output = workspace.train(every=1, expected=3)
    assert "Traceback" not in output
    found = re.search(
        r"at step (\d+) (.*); training cannot go on; the last good state is (.*), of step (\d+)",
        output,
    )
    assert found and named in found[2]
    assert 40 < int(found[1]) <= 60
    assert status(workspace)["state"] == "failed" and named in str(status(workspace)["message"])
    assert status(workspace)["permanent"] is True
    assert status(workspace)["step"] == int(found[1]) - 1, "steps that are done"
    assert (workspace.root / found[3]).samefile(workspace.folder / "checkpoint.parquet")
    assert step_of(workspace) == int(found[4]) < int(found[1])
    fingerprint = read_recipe(workspace.recipe).fingerprint
    for name, value in load_checkpoint(workspace.root / found[3], fingerprint)["agent"].items():
        assert np.isfinite(value).all(), name
    assert not list(workspace.folder.glob("run-*.json"))


def test_checkpoints_come_every_few_minutes_or_every_so_many_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_recipe(workspace.root / workspace.recipe)
    for every, seconds, saves in ((None, 0.0, 6), (None, 1e9, 1), (3, 0.0, 2)):
        monkeypatch.setattr(resumable, "CHECKPOINT_SECONDS", seconds)
        runtime = replace(ON_CPU, checkpoint_every=every)
        trainer = Trainer(run.recipe, run.fingerprint, workspace.folder, runtime)
        saved: list[int] = []
        save = trainer.save
        monkeypatch.setattr(
            trainer, "save", lambda trainer=trainer, save=save, saved=saved: (
                saved.append(trainer.step) or save()
            ),
        )  # fmt: skip
        steps = iter([False] * 5 + [True])  # a request to stop at the sixth step
        with pytest.raises(Stopped):
            status_file = workspace.folder / "status.json"
            progress = Status.resumed(status_file, run.fingerprint, TOTAL_STEPS)
            trainer.run(Reporter("run", progress, status_file), lambda steps=steps: next(steps))
        assert len(saved) == saves and saved[-1] == 6


def test_parameters_that_are_not_finite_never_become_a_checkpoint(workspace: Workspace) -> None:
    """They do not show in a loss before the next update."""
    run = read_recipe(workspace.root / workspace.recipe)
    trainer = Trainer(run.recipe, run.fingerprint, workspace.folder, ON_CPU)
    trainer.save()
    saved = (workspace.folder / "checkpoint.parquet").read_bytes()
    trainer.agent.behaviour.actor.net[0].bias.data[0] = np.inf
    with pytest.raises(TrainingFailed, match=r"behaviour\.actor\.net\.0\.bias is not finite"):
        trainer.save()
    assert (workspace.folder / "checkpoint.parquet").read_bytes() == saved
    trainer.environment.close()


def test_a_poisoned_checkpoint_is_refused(workspace: Workspace) -> None:
    workspace.train(AtStep(60, TERM), expected=STOPPED)
    checkpoint = workspace.folder / "checkpoint.parquet"
    fingerprint = read_recipe(workspace.recipe).fingerprint
    state = load_checkpoint(checkpoint, fingerprint)
    state["agent"]["world_model.prior_head.weight"][0] = np.nan
    save_checkpoint(checkpoint, fingerprint, state)
    poisoned = checkpoint.read_bytes()
    output = workspace.train(expected=3)
    assert "Traceback" not in output
    assert "checkpoint.parquet: world_model.prior_head.weight is not finite" in output
    assert checkpoint.read_bytes() == poisoned


# --- files that are damaged or missing -----------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_late(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run stopped when its ring had wrapped: it needs its checkpoint, tables and two shards."""
    workspace = make_workspace(tmp_path_factory.mktemp("stopped"))
    workspace.plan()
    workspace.train(AtStep(150, TERM), expected=STOPPED)
    return workspace


def last_value_byte(path: Path) -> int:
    """Where the first column's values end. Checksums cover values, not what describes them."""
    column = pq.read_metadata(path).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    return int(start + column.total_compressed_size - 1)


DAMAGES = ("cut", "flipped", "missing", "empty")


def damaged(path: Path, damage: str) -> None:
    """Damage a Parquet file."""
    content = path.read_bytes()
    values = last_value_byte(path)
    path.write_bytes(
        {
            "cut": content[:-100],
            "flipped": content[:values] + bytes([content[values] ^ 1]) + content[values + 1 :],
            "missing": b"",
            "empty": b"",
        }[damage]
    )
    if damage == "missing":
        path.unlink()


@pytest.fixture
def late(stopped_late: Workspace, tmp_path: Path) -> Workspace:
    """A copy of `stopped_late`."""
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(stopped_late.root, workspace.root)
    return workspace


def trained(undisturbed: Workspace) -> dict[str, object]:
    return {n: v for n, v in undisturbed.result().items() if "evaluation" not in n}


def refusal(workspace: Workspace) -> DramaError:
    """Begin to train in this process, which must be refused and change no file of the run."""
    run = read_recipe(workspace.root / workspace.recipe)
    before = workspace.tree()
    with pytest.raises(DramaError) as caught:
        make_current(run.folder, run.fingerprint)
        Trainer(run.recipe, run.fingerprint, run.folder, ON_CPU).begin()
    assert workspace.tree() == before
    return caught.value


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["part-00000.parquet", "part-00001.parquet"])
def test_a_damaged_shard_is_named_and_nothing_is_overwritten(
    late: Workspace, name: str, damage: str
) -> None:
    """The first one's rows have left the ring; the run needs them all the same."""
    path = late.folder / "replay" / name
    damaged(path, damage)
    error = refusal(late)
    assert str(path) in str(error)
    assert error.is_permanent is (damage != "missing"), "what is missing may turn up"


def test_a_run_that_cannot_go_on_says_so_once_and_in_its_status(late: Workspace) -> None:
    path = late.folder / "replay/part-00001.parquet"
    damaged(path, "flipped")
    output = late.train(expected=3)
    assert "Traceback" not in output and output.count(path.name) == 1
    assert path.name in str(status(late)["message"])
    assert (status(late)["state"], status(late)["permanent"]) == ("failed", True)


def test_a_whole_shard_with_other_rewards_is_refused(late: Workspace) -> None:
    path = late.folder / "replay/part-00001.parquet"
    columns = dict(read_shard(path))
    columns["reward"] = np.full_like(columns["reward"], 5)
    write_shard(path, [columns], columns["frame"].shape[1:])
    assert f"{path} is damaged: its bytes are not" in str(refusal(late))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("episodes.parquet", "flipped"), ("training.parquet", "missing"),
        ("status.json", "missing"), ("status.json", "flipped"), ("status.json", "empty"),
    ],
)  # fmt: skip
def test_what_only_informs_may_be_damaged(
    undisturbed: Workspace, late: Workspace, name: str, damage: str
) -> None:
    path = late.folder / name
    if path.suffix == ".parquet":
        damaged(path, damage)
    elif damage == "missing":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text({"flipped": text.replace(": ", ":!", 1), "empty": ""}[damage])
    assert "from step 150" in late.train()
    assert late.result() == trained(undisturbed)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_gone_on_from(
    undisturbed: Workspace, late: Workspace, damage: str
) -> None:
    path = late.folder / "checkpoint.parquet"
    damaged(path, damage)
    content = path.read_bytes() if path.exists() else b""
    output = late.train()
    assert (
        "from step 148" in output and "the run goes on from checkpoint.previous.parquet" in output
    )
    aside = late.folder / "checkpoint.damaged.parquet"
    if damage != "missing":
        assert str(aside.relative_to(late.root)) in output and aside.read_bytes() == content
        aside.unlink()
    assert late.result() == trained(undisturbed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_any_good_checkpoint_nothing_is_begun_anew(late: Workspace, damage: str) -> None:
    for name in ("checkpoint.parquet", PREVIOUS):
        damaged(late.folder / name, damage)
    error = refusal(late)
    assert "checkpoint.parquet: not" in str(error) and "train it anew" in str(error)
    assert error.is_permanent is (damage != "missing")


@pytest.mark.parametrize("left", ["replay", "training.parquet", "status.json"])
def test_any_trace_of_steps_keeps_a_run_from_being_begun_anew(late: Workspace, left: str) -> None:
    for path in late.folder.iterdir():
        if path.name != left and path.is_file():
            path.unlink()
        elif path.name != left:
            shutil.rmtree(path)
    said = str(refusal(late))
    assert left in said and "move the" in said and "anew" in said
    shutil.move(late.folder, late.root / "away")
    assert "from step 0" in late.train(AtStep(1, TERM), expected=STOPPED)


def test_another_runs_checkpoint_in_a_runs_folder_is_explained(late: Workspace) -> None:
    state = load_checkpoint(
        late.folder / "checkpoint.parquet", read_recipe(late.root / late.recipe).fingerprint
    )
    save_checkpoint(late.folder / "checkpoint.parquet", "a" * 64, state)
    said = str(refusal(late))
    assert f"belongs to run {'a' * 16}" in said and "trained here to step 150" in said
    assert "move the folder away" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("episode/step", 10**9, "step 1000000000 with 150 transitions"),
        ("episode/step", True, "episode/step is True, not of type int"),
        ("episode/save", 1, "'episode/save' is unknown"),
        ("episode/episode_length", -1, "of -1 steps"),
        ("replay/rows_in_shards", 70, "70 transitions in 2 shards"),
        ("replay/shards", ["a" * 64] * 2, "part-00000.parquet is damaged"),
        ("generators/random_actions/state/inc", 2**200, "does not fit"),
        ("window/lengths", np.zeros(2, np.int64), "window/lengths is"),
        ("window/latents", 99, "latents are 99 to 99"),
        ("replay/tail/action", 99, "actions are 0 to 99"),
        ("replay/tail/reward", np.nan, "a reward is not finite"),
        ("metrics/behaviour/steps", np.zeros(1, np.int64), "values of 1 updates"),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(
    late: Workspace, key: str, value: object, said: str
) -> None:
    checkpoint = late.folder / "checkpoint.parquet"
    fingerprint = read_recipe(late.root / late.recipe).fingerprint
    state = load_checkpoint(checkpoint, fingerprint)
    *sections, name = key.split("/")
    place = state
    for section in sections:
        place = place[section]
    if isinstance(place.get(name), np.ndarray) and np.isscalar(value):
        place[name][...] = value
    else:
        place[name] = value
    save_checkpoint(checkpoint, fingerprint, state)
    assert said in str(refusal(late))


def test_one_of_the_first_checkpoints_without_tables_is_gone_on_from(
    undisturbed: Workspace, late: Workspace
) -> None:
    checkpoint = late.folder / "checkpoint.parquet"
    fingerprint = read_recipe(late.root / late.recipe).fingerprint
    state = load_checkpoint(checkpoint, fingerprint)
    del state["tables"], state["replay"]["shards"]
    save_checkpoint(checkpoint, fingerprint, state)
    assert "from step 150" in late.train()
    assert late.result() == trained(undisturbed)


@pytest.mark.parametrize("content", ["", "{}", "[[[", '{"fingerprint": "../../x"}'])
def test_a_damaged_record_is_written_anew_from_the_checkpoint_and_only_from_that(
    undisturbed: Workspace, tmp_path: Path, content: str
) -> None:
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(undisturbed.root, copy.root)
    (record,) = copy.folder.glob("run-*.json")
    whole = json.loads(record.read_text())
    record.write_text(content)
    output = copy.train()
    assert f"{record.name}: not this run's record, or damaged; it is written anew" in output
    again = json.loads(record.read_text())
    assert again["artifacts"] == whole["artifacts"]
    record.write_text(content)
    (copy.folder / "checkpoint.parquet").unlink()
    assert "Put it back" in copy.train(expected=1)


def test_a_shard_that_is_damaged_while_the_run_goes_on_is_not_recorded(
    workspace: Workspace,
) -> None:
    run = read_recipe(workspace.root / workspace.recipe)
    workspace.train()
    for record in workspace.folder.glob("run-*.json"):
        record.unlink()
    damaged(workspace.folder / "replay/part-00000.parquet", "flipped")
    with pytest.raises(ShardError, match=r"part-00000\.parquet is damaged"):
        write_record(
            run.record, {}, run.fingerprint, device="cpu", backend="torch", seconds=1, steps=1
        )
    assert not run.record.exists()


def test_a_checkpoint_of_another_library_version_is_explained(
    stopped_late: Workspace, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path / "copy")
    shutil.copytree(stopped_late.root, workspace.root)
    checkpoint = workspace.folder / "checkpoint.parquet"
    fingerprint = read_recipe(workspace.recipe).fingerprint
    state = load_checkpoint(checkpoint, fingerprint)
    state["environment"]["emulator"][100] ^= 1
    save_checkpoint(checkpoint, fingerprint, state)
    output = workspace.train(expected=3)
    assert "Traceback" not in output
    assert "does not fit" in output and "ale-py" in output
