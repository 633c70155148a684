"""JSON schemas of config/*.yaml and of presets, for editors: `make schemas` writes them.

They are the models that configuration is held to when it is read, with the comments of
config/config.yaml and of preset xs as descriptions. What the models check beyond types and bounds,
such as settings that do not go together, a schema cannot say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drama.agent.settings import ATARI_100K
from drama.files import write_text
from drama.pipeline.config import PRESETS, Experiment, Preset
from drama.reading import read_text

SCHEMAS = Path("workflow/schemas")
"""Where the schemas lie, relative to the project's root."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
LINE = re.compile(r"^(?P<indent> *)(?:(?P<key>\w+):)?[^#\n]*(?:# ?(?P<comment>.*))?$", re.MULTILINE)
DEEP = 8
"""A comment that begins further right than this goes on from the line above."""

Schema = dict[str, Any]


def schemas() -> dict[str, str]:
    """Return the text of each schema, by the name of its file."""
    preset = _described(_optional(Preset.model_json_schema()), PRESETS / "xs.yaml")
    preset["properties"]["base"] = {
        "type": "string",
        "description": "The preset that this one starts from.",
    }
    overrides = {
        name: value
        for name, value in preset["properties"].items()
        if name not in ("base", "complete_protocol")
    }
    config = _described(Experiment.model_json_schema(), Path("config/config.yaml"))
    config["$defs"] = preset["$defs"] | {
        "Overrides": {
            "type": ["object", "null"],
            "description": "This game's own settings, over the preset's.",
            "properties": overrides,
            "additionalProperties": False,
        }
    }
    config["properties"]["seeds"]["uniqueItems"] = True
    game = {"$ref": "#/$defs/Overrides"}
    config["properties"]["games"] |= {
        "properties": {name: game for name in ATARI_100K},
        "additionalProperties": game,
        "minProperties": 1,
    }
    return {
        f"{name}.schema.json": json.dumps({"$schema": DIALECT, **schema}, indent=1) + "\n"
        for name, schema in (("config", config), ("preset", preset))
    }


def _optional(schema: Schema) -> Schema:
    """Let everything be left out: a preset may start from another."""
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    return schema


def _described(schema: Schema, file: Path) -> Schema:
    """Take a YAML file's comments as the descriptions of the keys that they are about."""
    for keys, comment in comments(read_text(file)):
        part = schema
        for key in keys[:-1]:
            reference = part["properties"].get(key, {}).get("$ref", "")
            part = schema.get("$defs", {}).get(reference.rpartition("/")[2], {"properties": {}})
        if keys[-1] in part["properties"]:  # the first word counts where two share a definition
            part["properties"][keys[-1]].setdefault("description", comment)
    return schema


def comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys of a YAML file, each with those above it, and the comment on it.

    A comment stands above its key, or behind it and on further lines below, deep to the right.
    """
    keys: tuple[str, ...] = ()
    above: list[str] = []
    found: dict[tuple[str, ...], list[str]] = {}
    for match in LINE.finditer(text):
        indent, comment = len(match["indent"]), match["comment"]
        if match["key"]:
            keys = (*keys[: indent // 2], match["key"])
            found[keys] = [*above, *([comment] if comment else [])]
            above = []
        elif not comment:
            above = []
        elif indent > DEEP:
            found[keys].append(comment)
        else:
            above.append(comment)
    yield from ((keys, " ".join(words)) for keys, words in found.items() if words)


def main() -> None:
    """Write the schemas of today's models and comments."""
    for name, text in schemas().items():
        write_text(SCHEMAS / name, text)


if __name__ == "__main__":
    main()
