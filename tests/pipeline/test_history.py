"""Recorded recipes of earlier versions, read by today's code; whole runs of earlier code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drama.errors import ConfigurationError
from drama.files import canonical_json, sha256_text, write_json
from drama.pipeline import history
from drama.pipeline.artifacts.records import evaluations_of, find_records, read_record
from drama.pipeline.config import Preset
from drama.pipeline.history import ADDED, earlier_run, filled, noted_evaluation

Recorded = dict[str, Any]


@pytest.fixture
def recorded(preset: Callable[..., Preset]) -> Recorded:
    settings = preset().settings().model_dump(mode="json", by_alias=True)
    return {
        "format": 1, "preset": "quick", "game": "Pong", "seed": 0, "settings": settings,
        "code": "0" * 64, "runtime": "1" * 64,
    }  # fmt: skip


def test_runs_in_git_are_read_whatever_their_age(root: Path) -> None:
    records = find_records([root / "results/learn"])
    assert records
    for path in records:
        run = read_record(path)
        assert run.recipe.game in ("Catch8", "Catch16")
        assert evaluations_of(run)


def test_every_key_of_the_table_is_a_setting_of_today(preset: Callable[..., Preset]) -> None:
    whole = preset("xs").model_dump(mode="json", by_alias=True)
    for key in ADDED:
        place = whole
        for name in key.split("."):
            assert name in place, f"{key}: no such setting"
            place = place[name]


def test_what_is_recorded_is_kept_and_what_lacks_is_filled_in(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADDED, "replay.shuffle_rewards", True)
    assert history.read_recipe(recorded, "here").settings.replay.shuffle_rewards is False
    del recorded["settings"]["replay"]["shuffle_rewards"]
    before = copy.deepcopy(recorded)
    assert history.read_recipe(recorded, "here").settings.replay.shuffle_rewards is True
    assert recorded == before, "a fingerprint is of what was written"


def test_a_value_of_the_table_is_nobodys_to_change(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADDED, "behaviour.optimiser.exempt", ["bias"])
    filled(recorded)["settings"]["behaviour"]["optimiser"]["exempt"].append("gain")
    assert filled(recorded)["settings"]["behaviour"]["optimiser"]["exempt"] == ["bias"]


def test_evaluation_settings_have_keys_of_their_own(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADDED, "evaluation.environments", 3)
    read = history.read_evaluation_settings({"episodes": 5}, "here")
    assert (read.episodes, read.environments) == (5, 3)
    assert "evaluation" not in filled(recorded)["settings"]


@pytest.mark.parametrize("settings", [None, [], {"world_model": 3}, {"world_model": {}}])
def test_what_is_no_recipe_is_refused_and_not_mended(recorded: Recorded, settings: Any) -> None:
    recorded["settings"] = settings
    with pytest.raises(ConfigurationError, match=r"^here: not a recipe: settings"):
        history.read_recipe(recorded, "here")


@pytest.mark.parametrize("settings", [None, {"episodes": 0, "environments": 1}, {"episodes": 1}])
def test_what_is_no_evaluation_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^here"):
        history.read_evaluation_settings(settings, "here")


# --- whole runs of earlier code ------------------------------------------------------------------


@pytest.fixture
def made(recorded: Recorded, tmp_path: Path) -> tuple[Path, Path, Recorded]:
    """The folder of a whole run, the recipe planned for it, and what the run recorded."""
    planned = recorded | {"code": "2" * 64, "runtime": "3" * 64}
    write_json(tmp_path / "recipe.json", planned)
    write_run(tmp_path / "seed0", recorded)
    return tmp_path / "seed0", tmp_path / "recipe.json", recorded


def write_run(folder: Path, recipe: Recorded) -> None:
    fingerprint = sha256_text(canonical_json(recipe))
    commit = f"{'0123456789' * 4}-dirty"
    record = {"recipe": recipe, "fingerprint": fingerprint, "git_commit": commit, "steps": 600}
    write_json(folder / f"run-{fingerprint[:16]}.json", record)


def test_a_run_that_differs_in_code_only_stands_in(made: tuple[Path, Path, Recorded]) -> None:
    folder, planned, recipe = made
    found = earlier_run(folder, planned)
    assert found is not None
    assert found.fingerprint == sha256_text(canonical_json(recipe))
    assert (found.commit, found.steps) == ("012345678901-dirty", 600)
    assert found.record.parent == folder


def test_so_does_one_that_lacks_a_later_key(
    made: tuple[Path, Path, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, planned, recipe = made
    recipe["settings"]["replay"].pop("alpha")
    next(folder.glob("run-*")).unlink()
    write_run(folder, recipe)
    assert earlier_run(folder, planned) is None
    monkeypatch.setitem(ADDED, "replay.alpha", 1.0)
    assert earlier_run(folder, planned) is not None
    monkeypatch.setitem(ADDED, "replay.alpha", 2.0)
    assert earlier_run(folder, planned) is None


@pytest.mark.parametrize("key", ["game", "seed", "preset", "settings"])
def test_a_run_of_something_else_does_not(made: tuple[Path, Path, Recorded], key: str) -> None:
    folder, planned, recipe = made
    if key == "settings":
        recipe["settings"]["behaviour"]["horizon"] += 1
    else:
        recipe[key] = "Krull"
    next(folder.glob("run-*")).unlink()
    write_run(folder, recipe)
    assert earlier_run(folder, planned) is None


@pytest.mark.parametrize("damage", ["no plan", "no run", "two runs", "no json", "other recipe"])
def test_where_it_cannot_be_told_there_is_none(
    made: tuple[Path, Path, Recorded], damage: str
) -> None:
    folder, planned, recipe = made
    (record,) = folder.glob("run-*")
    if damage == "no plan":
        planned.unlink()
    elif damage == "no run":
        record.unlink()
    elif damage == "two runs":
        write_run(folder, recipe | {"code": "4" * 64})
    elif damage == "no json":
        record.write_text("{")
    else:
        data = json.loads(record.read_text())
        write_json(record, data | {"recipe": recipe | {"code": "5" * 64}})
    assert earlier_run(folder, planned) is None


def test_the_noted_evaluation_is_the_one_that_lies_there(tmp_path: Path) -> None:
    fingerprint = "ab" * 32
    assert noted_evaluation(tmp_path) is None
    write_json(
        tmp_path / "evaluation.json",
        {"fingerprint": fingerprint, "sha256": "b" * 64, "path": "../elsewhere"},
    )
    assert noted_evaluation(tmp_path) is None
    path = tmp_path / f"evaluation-{fingerprint[:16]}.parquet"
    path.touch()
    noted = noted_evaluation(tmp_path)
    assert noted is not None and (noted.name, noted.fingerprint) == (path.name, fingerprint)


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[]", "null", '{"fingerprint": 3}', '{"fingerprint": "../../../../etc/passwd"}',
        '{"fingerprint": "' + "a" * 63 + '"}', '{"sha256": "' + "a" * 64 + '"}',
        '{"fingerprint": "' + "a" * 64 + '", "sha256": ["b"]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_note_that_makes_no_sense_names_no_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text, encoding="utf-8")
    assert history.read_note(tmp_path) is None
    assert noted_evaluation(tmp_path) is None
