"""Going on with a finished run: what the longer run holds, what it leaves alone, kills."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from workspace import GAME, SEED, TOTAL_STEPS, AtStep, AtWrite, Moment, Workspace, make_workspace

from drama.errors import ConfigurationError
from drama.files import canonical_json
from drama.pipeline.accept import first_difference
from drama.pipeline.artifacts.status import planned_results, read_statuses
from drama.pipeline.artifacts.verify import verify
from drama.pipeline.extensions import extend
from drama.pipeline.jobs import RunIncomplete
from drama.pipeline.recipes import read_evaluation_recipe, read_recipe
from drama.runs.checkpoint import save_checkpoint
from drama.runs.folder import make_current, superseded
from drama.runs.progress import Status

pytestmark = pytest.mark.whole

STEPS = 240  # the ring of 70 goes round once more, and its last shard is begun and not full
STOPPED, KILLED = 75, -signal.SIGKILL


class Longer(Workspace):
    """The same folder, looked at for its longer run."""

    @property
    def recipe(self) -> Path:
        return self.root / f"results/tiny-to{STEPS}/recipes/{GAME}/seed{SEED}.json"

    @property
    def folder(self) -> Path:
        return self.root / f"results/tiny-to{STEPS}/runs/{GAME}/seed{SEED}"

    def extend(self, moment: Moment | None = None, *, expected: int = 0) -> str:
        return self.run(
            "train", str(Workspace(self.root).recipe), "--steps", str(STEPS), "--device", "cpu",
            "--checkpoint-every", "37", moment=moment, expected=expected,
        )  # fmt: skip


def copy_of(workspace: Workspace, root: Path) -> Workspace:
    shutil.copytree(workspace.root, root)
    return Workspace(root)


@pytest.fixture
def finished(undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A finished run of 160 steps, to do with as one likes, and the process in its folder."""
    workspace = copy_of(undisturbed, tmp_path / "copy")
    monkeypatch.chdir(workspace.root)
    return workspace


@pytest.fixture(scope="module")
def extended(undisturbed: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Longer:
    """A longer run that nobody stopped, beside the finished one; leave it as it is."""
    copy = copy_of(undisturbed, tmp_path_factory.mktemp("extended") / "copy")
    workspace = Longer(copy.root)
    output = workspace.extend()
    assert f"from step {TOTAL_STEPS} of {STEPS}" in output
    workspace.evaluate()
    return workspace


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run that was planned with as many steps from the start."""
    workspace = make_workspace(tmp_path_factory.mktemp("direct"))
    workspace.plan("--set", f"training.total_steps={STEPS}")
    workspace.train()
    workspace.evaluate()
    return workspace


def assert_same_run(one: Workspace, other: Workspace) -> None:
    """Every tensor, generator, transition, episode and loss; only the fingerprints differ."""
    for earlier, later in ((one, other), (other, one)):
        assert first_difference(earlier.folder, later.folder) is None


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(
    extended: Longer, direct: Workspace
) -> None:
    assert_same_run(extended, direct)
    shards = sorted(path.name for path in (extended.folder / "replay").iterdir())
    assert shards == sorted(path.name for path in (direct.folder / "replay").iterdir())


def test_an_extension_can_be_extended(
    undisturbed: Workspace, direct: Workspace, tmp_path: Path
) -> None:
    workspace = Longer(copy_of(undisturbed, tmp_path / "copy").root)
    train = ("train", "--device", "cpu")
    workspace.run(*train, str(Workspace(workspace.root).recipe), "--steps", "200")
    middle = workspace.root / f"results/tiny-to200/recipes/{GAME}/seed{SEED}.json"
    workspace.run(*train, str(middle), "--steps", str(STEPS))
    workspace.evaluate()
    recipe = read_recipe(workspace.recipe).recipe
    assert recipe.ancestor == read_recipe(middle).fingerprint
    assert_same_run(workspace, direct)


def test_the_finished_run_is_only_read(extended: Longer, undisturbed: Workspace) -> None:
    """Not even its last, short shard changes, which the longer run fills."""
    before, after = (
        {name: item[0] for name, item in tree.items() if name.startswith("results/tiny/")}
        for tree in (undisturbed.tree(), extended.tree())
    )
    assert after == before
    output = extended.run("verify", "results", "--device", "cpu")
    assert output.count("verified") == 2 and "2 of 2 runs hold" in output


def test_a_longer_run_says_in_its_recipe_what_it_is(extended: Longer) -> None:
    ancestor, longer = read_recipe(Workspace(extended.root).recipe), read_recipe(extended.recipe)
    text = extended.recipe.read_text(encoding="utf-8")
    before = json.loads(ancestor.path.read_text(encoding="utf-8"))
    assert text == canonical_json(json.loads(text)) and "ancestor" not in before
    before["settings"]["training"]["total_steps"] = STEPS
    assert json.loads(text) == before | {"ancestor": ancestor.fingerprint}
    record = json.loads(longer.record.read_text(encoding="utf-8"))
    assert record["fingerprint"] == longer.fingerprint and record["steps"] == STEPS
    assert record["recipe"] == json.loads(text)
    earlier = json.loads(ancestor.record.read_text(encoding="utf-8"))
    assert record["wall_seconds"] >= earlier["wall_seconds"], "the time of all sittings together"
    settings = [read_evaluation_recipe(run).settings for run in (ancestor, longer)]
    assert settings[0] == settings[1]


def test_verify_status_and_report_know_both_runs_apart(extended: Longer) -> None:
    results = [extended.root / "results/tiny", extended.root / f"results/tiny-to{STEPS}"]
    assert planned_results([extended.root / "results"]) == results
    for place, steps in zip(results, (TOTAL_STEPS, STEPS), strict=True):
        (run,) = read_statuses(place)
        assert (run.state, run.step, run.total_steps) == ("done", steps, steps)
    assert "1 of 1 runs hold" in extended.run("verify", str(extended.recipe), "--device", "cpu")
    before = extended.tree()
    extended.plan()
    assert extended.tree() == before, "planning leaves longer runs alone"


def test_a_report_of_longer_runs_is_their_own(extended: Longer, tmp_path: Path) -> None:
    copy = copy_of(extended, tmp_path / "copy")
    for name, steps in (("tiny", TOTAL_STEPS), (f"tiny-to{STEPS}", STEPS)):
        copy.run("report", f"results/{name}")
        page = (copy.root / f"results/{name}/report/report.md").read_text(encoding="utf-8")
        assert f"Preset `{name}`" in page and f"{steps} agent steps" in page


# --- stopping and going on -----------------------------------------------------------------------

TAKING_OVER = [
    AtWrite("checkpoint.parquet", share=0.5),
    AtWrite("checkpoint.parquet", share=None),
    AtWrite("status.json", share=None),
    AtWrite(f"seed{SEED}", share=None),
    AtWrite(f"seed{SEED}.json", share=0.5),
    AtWrite(f"seed{SEED}.evaluation.json"),
    AtWrite("report.json"),
]


def test_a_kill_while_taking_over_leaves_nothing_or_a_whole_start(
    extended: Longer, finished: Workspace
) -> None:
    workspace = Longer(finished.root)
    before = finished.result()
    begun = []
    for moment in TAKING_OVER:
        workspace.extend(moment, expected=KILLED)
        begun.append(workspace.folder.exists())
        if workspace.folder.exists():
            files = {path.name for path in workspace.folder.iterdir()}
            assert files == {
                "checkpoint.parquet", "episodes.parquet", "training.parquet", "replay",
                "status.json",
            }  # fmt: skip
        assert finished.result() == before
    assert begun == [False] * 3 + [True] * 4
    assert f"from step {TOTAL_STEPS} of {STEPS}" in workspace.extend()
    workspace.evaluate()
    assert workspace.result() == extended.result()
    assert not list(workspace.root.rglob("*.part")), "something was left"


@pytest.mark.parametrize(
    "moments",
    [
        # On request before its first checkpoint, killed between two, and before the end.
        [AtStep(TOTAL_STEPS + 1, (signal.SIGTERM,)), AtStep(200), AtStep(STEPS - 1)],
        # Between the shard that was short, written again longer, and the checkpoint of that.
        [AtWrite("part-00002.parquet", share=None), AtWrite("part-00002.parquet", share=0.5)],
        [AtWrite("part-00003.parquet", share=None), AtWrite("run-*.json", share=0.5)],
    ],
    ids=["steps", "shard", "end"],
)
def test_a_longer_run_that_was_stopped_ends_with_the_same_bytes(
    extended: Longer, finished: Workspace, moments: list[Moment]
) -> None:
    workspace = Longer(finished.root)
    for moment in moments:
        asked = isinstance(moment, AtStep) and signal.SIGKILL not in moment.signals
        workspace.extend(moment, expected=STOPPED if asked else KILLED)
    workspace.train()  # the longer run's own recipe, as for any run
    workspace.evaluate()
    assert workspace.result() == extended.result()


def test_a_whole_longer_run_is_left_alone(extended: Longer) -> None:
    before = extended.tree()
    assert "this run is whole already" in extended.extend()
    assert "this run is whole already" in extended.train()
    assert extended.tree() == before


def test_a_begun_longer_run_needs_the_finished_ones_files_no_more(finished: Workspace) -> None:
    workspace = Longer(finished.root)
    workspace.extend(AtStep(200, (signal.SIGTERM,)), expected=STOPPED)
    shutil.rmtree(finished.folder)
    assert "from step 200 of 240" in workspace.extend()


def test_another_run_in_its_place_makes_way(finished: Workspace) -> None:
    workspace = Longer(finished.root)
    workspace.folder.mkdir(parents=True)
    Status("a" * 64, "stopped", 1, 160).write(workspace.folder / "status.json")
    longer = extend(finished.recipe, STEPS)
    aside = superseded(longer.folder, "a" * 64)
    assert [path.name for path in aside.iterdir()] == ["status.json"]
    taken = (longer.folder / "checkpoint.parquet").stat().st_ino
    make_current(longer.folder, "a" * 64)  # and back, the longer run being set aside
    assert extend(finished.recipe, STEPS) == longer
    make_current(longer.folder, longer.fingerprint)
    assert (longer.folder / "checkpoint.parquet").stat().st_ino == taken, "taken over once"
    assert aside.exists()


# --- refusals ------------------------------------------------------------------------------------


def test_a_longer_run_has_more_steps(finished: Workspace) -> None:
    before = finished.tree()
    for steps in (TOTAL_STEPS, 1):
        with pytest.raises(ConfigurationError, match=f"--steps {steps}: .* of {TOTAL_STEPS} steps"):
            extend(finished.recipe, steps)
    output = finished.run("train", str(finished.recipe), "--steps", "0", expected=2)
    assert "--steps" in output and "Traceback" not in output
    assert finished.tree() == before


def test_a_run_that_is_not_whole_is_finished_first(finished: Workspace) -> None:
    run = read_recipe(finished.recipe)
    run.record.unlink()
    before = finished.tree()
    said = "not trained to its end. `drama train .*` finishes it"
    with pytest.raises(RunIncomplete, match=said):
        extend(finished.recipe, STEPS)
    assert finished.tree() == before
    save_checkpoint(run.folder / "checkpoint.parquet", "b" * 64, {})
    before = finished.tree()
    with pytest.raises(RunIncomplete, match=f"its folder holds run {'b' * 16}"):
        extend(finished.recipe, STEPS)
    assert finished.tree() == before


@pytest.mark.parametrize("name", ["code", "runtime"])
def test_a_run_of_other_code_or_versions_is_not_gone_on_with(
    finished: Workspace, name: str
) -> None:
    changed = json.loads(finished.recipe.read_text(encoding="utf-8")) | {name: "0" * 64}
    finished.recipe.write_text(canonical_json(changed), encoding="utf-8")
    before = finished.tree()
    with pytest.raises(ConfigurationError, match=r"made for other .*Only what wrote .* go back"):
        extend(finished.recipe, STEPS)
    assert finished.tree() == before


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("checkpoint.parquet", "flip", "not the recorded bytes: checkpoint.parquet"),
        ("checkpoint.parquet", "lose", "not here: checkpoint.parquet; `dvc pull"),
        ("replay/part-00001.parquet", "flip", "not the recorded bytes: replay/part-00001.parquet"),
        ("episodes.parquet", "lose", "not here: episodes.parquet"),
    ],
)
def test_a_run_that_is_not_what_it_recorded_is_not_gone_on_with(
    finished: Workspace, name: str, damage: str, said: str
) -> None:
    path = finished.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "flip":
        path.write_bytes(content)
    with pytest.raises(RunIncomplete, match="cannot be gone on with") as caught:
        extend(finished.recipe, STEPS)
    assert said in str(caught.value)
    longer = Longer(finished.root)
    assert not longer.folder.exists() and not longer.recipe.exists()


@pytest.mark.parametrize("name", ["checkpoint.parquet", "replay/part-00000.parquet"])
def test_weights_in_place_of_large_files_are_not_enough_to_go_on(
    finished: Workspace, name: str
) -> None:
    """Such a run holds when it is verified; to go on takes what was not exported."""
    run = read_recipe(finished.recipe)
    finished.run("export", str(finished.recipe))
    (run.folder / name).unlink()
    assert verify(run.record, torch.device("cpu"), play_again=False).holds
    with pytest.raises(RunIncomplete, match=rf"{name} is not here; `dvc pull train@"):
        extend(finished.recipe, STEPS)
    longer = Longer(finished.root)
    assert not longer.folder.exists() and not longer.recipe.exists()


def test_a_longer_run_never_begins_at_step_0(finished: Workspace) -> None:
    workspace = Longer(finished.root)
    longer = extend(finished.recipe, STEPS)
    said = f"goes on from run {longer.recipe.ancestor[:16]}, not from step 0"  # type: ignore[index]
    (longer.folder / "checkpoint.parquet").rename(finished.root / "kept")
    for arguments in ([str(workspace.recipe)], [str(finished.recipe), "--steps", str(STEPS)]):
        output = finished.run("train", *arguments, "--device", "cpu", expected=1)
        assert said in output and f"drama train --steps {STEPS}" in output
    shutil.rmtree(longer.folder)
    assert said in workspace.train(expected=1)
    assert not longer.folder.exists()
    assert extend(finished.recipe, STEPS) == longer
    assert (longer.folder / "checkpoint.parquet").read_bytes() == (
        finished.root / "kept"
    ).read_bytes()


def test_a_longer_runs_recipe_lies_in_its_own_results(finished: Workspace) -> None:
    longer = extend(finished.recipe, STEPS)
    shutil.copy(longer.path, finished.recipe)
    with pytest.raises(ConfigurationError, match=f"belongs to results/tiny-to{STEPS}/recipes"):
        read_recipe(finished.recipe)


def test_stale_recipes_of_a_longer_run_say_what_makes_them_anew(finished: Workspace) -> None:
    longer = extend(finished.recipe, STEPS)
    said = f"`drama train --steps {STEPS}` with the recipe it went on from"
    evaluation = longer.path.with_suffix(".evaluation.json")
    text = evaluation.read_text(encoding="utf-8")
    evaluation.write_text(canonical_json(json.loads(text) | {"code": "0" * 64}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=f"out of date. {said}"):
        read_evaluation_recipe(longer)
    extend(finished.recipe, STEPS)
    assert evaluation.read_text(encoding="utf-8") == text
    stale = json.loads(longer.path.read_text(encoding="utf-8")) | {"code": "0" * 64}
    longer.path.write_text(canonical_json(stale), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=said):
        read_recipe(longer.path)


def test_a_run_can_be_named_from_within_its_results(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extend(finished.recipe, STEPS)
    monkeypatch.chdir(finished.root / "results/tiny")
    again = extend(Path("recipes", GAME, f"seed{SEED}.json"), STEPS)
    assert again.folder.resolve() == (finished.root / expected.folder).resolve()
    assert again.fingerprint == expected.fingerprint


def test_where_files_cannot_be_linked_they_are_copied(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = extend(finished.recipe, STEPS)
    content = {p.name: p.read_bytes() for p in (linked.folder / "replay").iterdir()}
    inodes = {p.name: p.stat().st_ino for p in (finished.folder / "replay").iterdir()}
    assert {p.name: p.stat().st_ino for p in (linked.folder / "replay").iterdir()} == inodes
    shutil.rmtree(linked.folder)
    monkeypatch.setattr("os.link", Mock(side_effect=OSError("Invalid cross-device link")))
    extend(finished.recipe, STEPS)
    assert {p.name: p.read_bytes() for p in (linked.folder / "replay").iterdir()} == content
