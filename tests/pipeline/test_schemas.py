"""The schemas for editors say of configurations what reading them says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from drama.errors import ConfigurationError
from drama.pipeline.config import load_experiment, load_preset
from drama.pipeline.layers import Layer
from drama.pipeline.schemas import SCHEMAS, comments, schemas

CONFIGS = sorted(Path("config").glob("*.yaml"))
PRESETS = sorted(Path("config/presets").glob("*.yaml"))


def errors(name: str, data: Any) -> list[str]:
    """What a schema says against some data, by where."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(data)
    return [".".join(map(str, error.absolute_path)) for error in found]


@pytest.mark.parametrize("name", ["config", "preset"])
def test_the_committed_schemas_are_todays(name: str) -> None:
    written = (SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8")
    assert written == schemas()[f"{name}.schema.json"], "`make schemas` writes them anew"


@pytest.mark.parametrize("path", CONFIGS + PRESETS, ids=lambda path: path.stem)
def test_every_file_holds_to_its_schema_and_names_it(path: Path) -> None:
    name = "config" if path in CONFIGS else "preset"
    text = path.read_text(encoding="utf-8")
    assert errors(name, yaml.safe_load(text)) == []
    (line,) = [line for line in text.splitlines() if "$schema=" in line]
    schema = path.parent / line.partition("$schema=")[2]
    assert schema.resolve() == (SCHEMAS / f"{name}.schema.json").resolve()


GAME = "games.Pong"
WRONG = [
    ("seeds", [-1], "seeds.0"),
    ("seeds", [], "seeds"),
    ("seeds", [0, 0], "seeds"),
    ("games", {"Pong": {"complete_protocol": True}}, GAME),
    ("device", "tpu", "device"),
    ("runs_per_gpu", 0, "runs_per_gpu"),
    ("gpus", 2, ""),
    ("games", {}, "games"),
    ("games", {"Pong": {"behaviour": {"horizon": 0}}}, f"{GAME}.behaviour.horizon"),
    ("games", {"Pong": {"behaviour": {"horizn": 5}}}, f"{GAME}.behaviour"),
    ("games", {"Pong": {"replay": {"sampling": "all"}}}, f"{GAME}.replay.sampling"),
]


@pytest.mark.parametrize(("key", "value", "where"), WRONG)
def test_what_reading_refuses_the_schema_refuses(
    tmp_path: Path, key: str, value: object, where: str
) -> None:
    data = yaml.safe_load(Path("config/quick.yaml").read_text(encoding="utf-8")) | {key: value}
    assert errors("config", data) == [where]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigurationError):
        experiment = load_experiment(path)
        load_preset("quick", Layer("Pong", experiment.games["Pong"]))


def test_every_key_is_described() -> None:
    def undescribed(part: dict[str, Any], above: str = "") -> list[str]:
        found = []
        for key, value in part["properties"].items():
            inner = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2])
            if inner and "properties" in inner and key != "games":
                found += undescribed(inner, f"{above}{key}.")
            elif "description" not in value:
                found.append(f"{above}{key}")
        return found

    for text in schemas().values():
        schema = json.loads(text)
        assert undescribed(schema) == []


def test_comments_belong_to_the_keys_that_they_stand_at() -> None:
    text = """\
# Of the whole file.

# Of one,
# in two lines.
one: 1

two:
  # Above.
  three: 3                  # behind
                            # and below
  four: 4
five: 5  # last
"""
    assert list(comments(text)) == [
        (("one",), "Of one, in two lines."),
        (("two", "three"), "Above. behind and below"),
        (("five",), "last"),
    ]
