"""Recipes: written when they change, fingerprints that follow meaning, plans that lose nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from workspace import EXPERIMENT, GAME, SEED, Workspace

from drama.agent.settings import ATARI_100K
from drama.errors import ConfigurationError
from drama.files import canonical_json
from drama.pipeline.config import Preset, load_preset
from drama.pipeline.fingerprints import Choices, run_code, runtime
from drama.pipeline.layers import parse_assignment
from drama.pipeline.plans import Plan
from drama.pipeline.recipes import is_complete_protocol, plan, read_evaluation_recipe, read_recipe
from drama.runs.folder import superseded

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "config" / "presets"
CONFIG = Path("config/config.yaml")
EVALUATION = {
    "episodes": 5, "environments": 2, "actions": "greedy", "both": False, "enough_same": 0,
}  # fmt: skip


def planned(*assignments: str, **overrides: Any) -> Plan:
    return plan(CONFIG, overrides, [parse_assignment(text) for text in assignments])


def test_a_plan_names_what_is_to_be_made(workspace: Workspace) -> None:
    made = planned(games=["Pong", "Krull"], seeds=[3, 1])
    assert [(run.game, run.seed) for run in made.runs] == [
        ("Pong", 3), ("Pong", 1), ("Krull", 3), ("Krull", 1),
    ]  # fmt: skip
    assert made.results == Path("results/tiny")
    run = made.runs[0]
    text = run.recipe.read_text(encoding="utf-8")
    assert run.recipe == Path("results/tiny/recipes/Pong/seed3.json")
    assert run.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert run.folder == Path("results/tiny/runs/Pong/seed3")
    assert run.record == run.folder / f"run-{run.fingerprint[:16]}.json"
    assert run.evaluation == run.folder / f"evaluation-{run.evaluation_fingerprint[:16]}.parquet"
    report = Path("results/tiny/recipes/report.json")
    stamp = hashlib.sha256(report.read_bytes()).hexdigest()[:16]
    assert made.report == Path(f"results/tiny/report/report-{stamp}.json")
    listed = json.loads(report.read_text())["runs"]
    assert listed[0] == {
        "game": "Pong", "seed": 3, "run": run.fingerprint,
        "evaluation": run.evaluation_fingerprint, "folder": "runs/Pong/seed3",
    }  # fmt: skip
    assert len({run.fingerprint for run in made.runs}) == 4
    assert len(listed) == 4


def test_a_recipe_says_everything_and_is_canonical(workspace: Workspace) -> None:
    run = planned().runs[0]
    text = run.recipe.read_text(encoding="utf-8")
    data = json.loads(text)
    assert text == canonical_json(data)
    assert data["settings"] == load_preset("tiny").settings().model_dump(mode="json", by_alias=True)
    assert (data["game"], data["seed"], data["preset"]) == (GAME, SEED, "tiny")
    assert data["code"] == run_code(Choices("atari", "mamba2", "dfs"))
    assert data["runtime"] == runtime()
    read = read_recipe(run.recipe)
    assert (read.fingerprint, read.folder, read.record) == (run.fingerprint, run.folder, run.record)
    evaluation = read_evaluation_recipe(read)
    assert (evaluation.fingerprint, evaluation.path) == (run.evaluation_fingerprint, run.evaluation)
    assert (evaluation.settings.episodes, evaluation.settings.environments) == (5, 2)


def test_nothing_is_written_twice(workspace: Workspace) -> None:
    planned()
    before = workspace.tree()
    time.sleep(0.01)
    planned()
    assert workspace.tree() == before


def test_only_what_changed_is_written(workspace: Workspace) -> None:
    planned(games=["Pong", "Krull"])
    before = workspace.tree()
    time.sleep(0.01)
    CONFIG.write_text(EXPERIMENT.replace(f"  {GAME}:", "  Pong:\n  Krull: {replay: {alpha: 2}}"))
    planned()
    changed = {name for name, item in workspace.tree().items() if before.get(name) != item}
    recipes = "results/tiny/recipes"
    assert changed == {
        "config/config.yaml", f"{recipes}/report.json", f"{recipes}/Krull/seed{SEED}.json",
        f"{recipes}/Krull/seed{SEED}.evaluation.json",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}"])
def test_a_recipe_that_is_none_any_more_is_written_anew(
    workspace: Workspace, content: bytes
) -> None:
    run = planned().runs[0]
    text = run.recipe.read_bytes()
    run.recipe.write_bytes(content)
    planned()
    assert run.recipe.read_bytes() == text


@pytest.mark.parametrize(
    "assignment",
    [
        "environment.max_frames=201", "replay.sampling=uniform", "world_model.free_nats=0.5",
        "world_model.optimiser.learning_rate=2e-3", "sequence_model.dropout=0",
        "behaviour.lambda=0.9", "training.total_steps=161", "training.log_every=16",
    ],
)  # fmt: skip
def test_any_setting_changes_the_fingerprint_and_comes_back(
    workspace: Workspace, assignment: str
) -> None:
    before = planned().runs[0]
    changed = planned(assignment).runs[0]
    assert changed.fingerprint != before.fingerprint
    assert changed.evaluation_fingerprint != before.evaluation_fingerprint
    assert planned().runs[0] == before


def test_a_setting_written_another_way_is_the_same_setting(workspace: Workspace) -> None:
    before = planned()
    same = "world_model.optimiser.learning_rate"
    assert planned(f"{same}=1e-3") == planned(f"{same}=0.001") == before


def test_evaluation_settings_change_the_evaluation_alone(workspace: Workspace) -> None:
    before, changed = planned().runs[0], planned("evaluation.episodes=6").runs[0]
    assert changed.fingerprint == before.fingerprint
    assert changed.evaluation_fingerprint != before.evaluation_fingerprint


def test_device_backend_and_place_define_nothing(workspace: Workspace) -> None:
    before = planned().runs[0]
    moved = planned(device="auto", backend="torch", results="elsewhere").runs[0]
    assert moved.fingerprint == before.fingerprint
    assert moved.folder == Path("elsewhere/tiny/runs") / GAME / f"seed{SEED}"


def test_one_wrong_game_of_several_stops_the_others(workspace: Workspace) -> None:
    for _ in range(2):  # before there is anything, and over what there is
        usual = CONFIG.read_text()
        CONFIG.write_text(usual.replace(f"{GAME}:", "Pong:\n  Krull: {replay: {alpha: -1}}"))
        before = workspace.tree()
        with pytest.raises(ConfigurationError, match=r"games\.Krull\.replay\.alpha = -1"):
            planned()
        assert workspace.tree() == before
        CONFIG.write_text(usual)
        planned()


def test_the_packages_pins_stand_in_for_the_folders(workspace: Workspace) -> None:
    lock = workspace.root / "containers/run.lock"
    lock.write_text("torch==0.0.1\n")
    (other,) = planned().runs
    assert read_recipe(other.recipe).fingerprint == other.fingerprint
    lock.unlink()
    with pytest.raises(ConfigurationError, match="other library versions"):
        read_recipe(other.recipe)
    (run,) = planned().runs
    assert read_recipe(run.recipe).recipe.runtime == runtime()


def test_all_130_runs_are_planned_at_once(workspace: Workspace) -> None:
    shutil.copy(ROOT / "config/config.yaml", CONFIG)
    began = time.perf_counter()
    made = planned(games=list(ATARI_100K), seeds=[0, 1, 2, 3, 4])
    print(f"{len(made.runs)} runs planned in {time.perf_counter() - began:.2f} s")
    assert len({run.fingerprint for run in made.runs}) == 130
    assert json.loads((made.results / "recipes/report.json").read_text())["complete_protocol"]


@pytest.mark.parametrize(
    "assignment",
    [
        "training.total_steps=99999", "training.total_steps=200000", "evaluation.episodes=99",
        "evaluation.actions=sampled", "evaluation.enough_same=10",
        "environment.max_frames=10000", "environment.action_repeat=2", "environment.actions=full",
        "replay.shuffle_rewards=true", "complete_protocol=false",
        "environment.repeat_action_probability=0.25", "environment.no_op_starts=30",
        "environment.life_loss_terminates=nothing", "environment.life_loss_terminates=episode",
        "behaviour.temperature=2", "behaviour.epsilon=0.01",
    ],
)  # fmt: skip
def test_a_run_that_departs_from_the_protocol_is_not_called_complete(assignment: str) -> None:
    layer = parse_assignment(assignment)
    assert is_complete_protocol(load_preset("xs", folder=PRESETS))
    assert not is_complete_protocol(load_preset("xs", layer, folder=PRESETS))


@pytest.mark.parametrize("name", ["xs-as-published", "xs-exempt-decay"])
def test_an_ablation_of_learning_keeps_to_the_protocol(name: str) -> None:
    assert is_complete_protocol(load_preset(name, folder=PRESETS))


@pytest.mark.parametrize(("games", "complete"), [
    (["Pong", "SpaceInvaders"], True), (["Pong", "Catch8"], False),
])  # fmt: skip
def test_a_game_beside_the_benchmark_must_be_played_by_its_protocol(
    workspace: Workspace, games: list[str], complete: bool
) -> None:
    made = planned(preset="xs", games=games)
    report = json.loads((made.results / "recipes/report.json").read_text())
    assert report["complete_protocol"] is complete


def test_toy_presets_are_never_complete() -> None:
    longer = parse_assignment("training.total_steps=100000")
    for name in ("quick", "laptop"):
        preset: Preset = load_preset(name, longer, folder=PRESETS)
        assert not is_complete_protocol(preset)


# --- setting aside and bringing back -------------------------------------------------------------


def test_a_setting_switched_and_back_brings_its_run_back(workspace: Workspace) -> None:
    """Files stand for a run here; test_runs.py and test_pipeline.py use real ones."""
    from drama.runs.folder import locked, make_current

    def trained(run: Any, text: str) -> None:
        with locked(run.folder):
            make_current(run.folder, run.fingerprint)
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "checkpoint.parquet").write_text(text)
            run.record.write_text("{}")

    first = planned().runs[0]
    trained(first, "first")
    second = planned("behaviour.horizon=2").runs[0]
    assert first.record.exists(), "planning alone moves nothing away"
    trained(second, "second")
    assert second.record.exists() and not first.record.exists()
    assert (superseded(first.folder, first.fingerprint) / first.record.name).exists()
    planned()
    assert first.record.exists() and not second.record.exists()
    assert (first.folder / "checkpoint.parquet").read_text() == "first"
    planned("behaviour.horizon=2")
    assert (second.folder / "checkpoint.parquet").read_text() == "second"
    with locked(first.folder):  # somebody works on the run that has the folder
        planned()
    assert second.record.exists()


# --- recipes that cannot be used -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "said"), [("code", r"other code \(0{16};"), ("runtime", "other library versions")]
)
def test_a_recipe_of_other_code_or_versions_is_refused(
    workspace: Workspace, key: str, said: str
) -> None:
    run = planned().runs[0]
    data = json.loads(run.recipe.read_text()) | {key: "0" * 64}
    run.recipe.write_text(canonical_json(data))
    with pytest.raises(ConfigurationError, match=f"made for {said}.*drama plan"):
        read_recipe(run.recipe)


@pytest.mark.parametrize(
    "place",
    [
        "seed9.json",
        f"results/tiny/recipes/Pong/seed{SEED}.json",
        f"results/tiny/recipes/{GAME}/seed1.json",
        f"results/tiny/other/{GAME}/seed{SEED}.json",
    ],
)
def test_a_recipe_in_another_runs_place_is_refused(workspace: Workspace, place: str) -> None:
    """Its run's files would land among those of another."""
    run = planned().runs[0]
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    run.recipe.rename(place)
    with pytest.raises(ConfigurationError, match=f"of {GAME}, seed {SEED}; it belongs to"):
        read_recipe(Path(place))


def test_a_recipe_can_be_named_from_anywhere(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned().runs[0]
    expected = (workspace.root / run.folder).resolve()
    for place in (".", "results", "results/tiny", "results/tiny/runs", "config"):
        (workspace.root / place).mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(workspace.root / place)
        read = read_recipe(workspace.root / run.recipe)
        assert read.folder.resolve() == expected
        aside = superseded(read.folder, read.fingerprint).resolve()
        assert aside.parents[2] == (workspace.root / "results/tiny/superseded").resolve()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "0" * 64}, "out of date"),
        ({"code": "0" * 64}, "out of date"),
        ({"code": "0" * 64, "settings": {"episodes": 5, "environments": 2}}, "out of date"),
        ({"settings": EVALUATION | {"episodes": 0}}, "not an evaluation's recipe"),
        ({"settings": EVALUATION | {"enough_same": 1}}, "not an evaluation's recipe"),
        ({"settings": {"episodes": 5, "environments": 2}}, "not an evaluation's recipe"),
        ({"settings": {"episodes": 1}}, "not an evaluation's recipe"),
        ({"settings": 5}, "not an evaluation's recipe"),
        ("run", "not an evaluation's recipe"),
        (None, "not an evaluation's recipe"),
        ([], "not an evaluation's recipe"),
    ],
)
def test_an_evaluations_recipe_that_cannot_be_used_is_refused(
    workspace: Workspace, change: Any, said: str
) -> None:
    run = planned().runs[0]
    path = run.recipe.with_suffix(".evaluation.json")
    data = json.loads(path.read_text())
    if isinstance(change, str):
        del data[change]
    else:
        data = data | change if isinstance(change, dict) else change
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigurationError, match=f"(?s){said}.*drama plan"):
        read_evaluation_recipe(read_recipe(run.recipe))
    path.unlink()
    with pytest.raises(ConfigurationError, match=r"seed9\.evaluation\.json"):
        read_evaluation_recipe(read_recipe(run.recipe))


# --- narrowing ---------------------------------------------------------------------------------


def listed() -> dict[tuple[str, int], str]:
    runs = json.loads(Path("results/tiny/recipes/report.json").read_text())["runs"]
    return {(run["game"], run["seed"]): run["run"] for run in runs}


def test_naming_games_or_seeds_leaves_the_rest_planned(workspace: Workspace) -> None:
    planned()
    before = listed()
    recipes = {path: path.read_bytes() for path in Path("results/tiny/recipes").rglob("seed*")}
    planned("behaviour.horizon=2", games=["Pong"], seeds=[7])
    planned(seeds=[SEED + 1])
    assert set(listed()) == {*before, ("Pong", 7), (GAME, SEED + 1)}
    assert before.items() <= listed().items()
    assert all(path.read_bytes() == text for path, text in recipes.items())
    planned(games=["Pong"], seeds=[7])
    assert list(listed()) == [*before, ("Pong", 7), (GAME, SEED + 1)], "replaced in its place"


def test_the_whole_configuration_is_the_whole_plan(workspace: Workspace) -> None:
    planned(games=["Pong"], seeds=[7])
    planned(games={GAME: {}}, seeds=[SEED])  # as a whole configuration file gives them
    assert set(listed()) == {(GAME, SEED)}
    assert not list(Path("results/tiny/recipes/Pong").iterdir())
    planned(games=["Pong"], seeds=[7])
    Path("results/tiny/recipes/report.json").write_text("{")
    planned(games=["Krull"], seeds=[7])
    assert set(listed()) == {("Krull", 7)}
    assert Path("results/tiny/recipes/Pong/seed7.json").exists(), "narrowing removes nothing"


def test_a_plan_beside_others_keeps_the_protocol_only_with_them(workspace: Workspace) -> None:
    plan_file = Path("results/xs/recipes/report.json")

    def complete() -> bool:
        return json.loads(plan_file.read_text())["complete_protocol"]

    planned(preset="xs", games=["Pong"])
    assert complete()
    planned("training.total_steps=90000", preset="xs", games=["Krull"])
    assert not complete()
