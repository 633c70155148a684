"""The tables of a campaign told as Croissant 1.0, so that loaders of data sets can read them.

A table of every run lies in a file, or shards, of its own. One file set and one record set stand
for all files of a kind; game and seed, which no row holds, are taken from the files' paths.
Croissant (https://docs.mlcommons.org/croissant/docs/croissant-spec.html) is plain JSON-LD: nothing
but `json` is needed to write it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"

_CROISSANT = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty",
    "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator",
    "source", "subField", "transform",
)  # fmt: skip
"""The vocabulary's own terms, which the context of every Croissant file maps."""

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {term: f"cr:{term}" for term in _CROISSANT}

INTEGER, FLOAT, BOOLEAN, TEXT = "sc:Integer", "sc:Float", "sc:Boolean", "sc:Text"

Columns = Mapping[str, tuple[str, str]]
"""Type and meaning of each column."""


@dataclass(frozen=True)
class Kind:
    """A kind of table: where its files lie below runs/<Game>/seed<k>/, what a row is, its columns.

    `files` may hold a `*`.
    """

    files: str
    row: str
    columns: Columns


KINDS: dict[str, Kind] = {
    "replay": Kind(
        "replay/part-*.parquet",
        "One row per transition that the agent saw while it was trained, in order; 10 000 rows a "
        "file.",
        {
            "step": (INTEGER, "Agent steps before this one, from 0."),
            "episode": (INTEGER, "Number of the training episode, from 0."),
            "frame": (
                TEXT,
                "What the agent saw before it acted: the bytes of an RGB picture, height x width x "
                "3 unsigned 8-bit integers in C order, {sizes} pixels. No text: Croissant has no "
                "type for bytes. numpy.frombuffer(frame, 'uint8').reshape(height, width, 3)",
            ),
            "action": (INTEGER, "The action taken, by its number in the game's action set."),
            "reward": (FLOAT, "The game's points in the frames of this step, unclipped."),
            "terminated": (BOOLEAN, "Whether the game was over after this step."),
            "truncated": (BOOLEAN, "Whether the episode was cut off after this step."),
            "life_lost": (BOOLEAN, "Whether a life was lost in this step."),
        },
    ),
    "episodes": Kind(
        "episodes.parquet",
        "One row per finished training episode, in order.",
        {
            "episode": (INTEGER, "Number of the training episode, from 0."),
            "step": (INTEGER, "Agent steps done when it ended."),
            "episode_return": (FLOAT, "Sum of the game's points, unclipped."),
            "length": (INTEGER, "Its agent steps."),
            "truncated": (BOOLEAN, "Whether it was cut off before the game was over."),
        },
    ),
    "training": Kind(
        "training.parquet",
        "One row per window of training steps, with the means of what was measured in it; empty "
        "where there was no update.",
        {
            "step": (INTEGER, "Agent steps done at the window's end."),
            "loss/total": (FLOAT, "World model: the sum of its losses, in nats."),
            "loss/reconstruction": (FLOAT, "World model: loss of the decoded frames."),
            "loss/reward": (FLOAT, "World model: loss of predicted rewards, in nats."),
            "loss/termination": (FLOAT, "World model: loss of predicted ends, in nats."),
            "loss/dynamics": (FLOAT, "World model: KL divergence that the prior learns from."),
            "loss/representation": (FLOAT, "World model: that which the encoder learns from."),
            "gradient_norm/world_model": (FLOAT, "World model: norm before clipping."),
            "loss/actor": (FLOAT, "Behaviour: the actor's loss."),
            "loss/critic": (FLOAT, "Behaviour: the critic's loss."),
            "entropy": (FLOAT, "Behaviour: the policy's entropy in imagination, in nats."),
            "return_scale": (FLOAT, "Behaviour: range of returns that advantages are scaled by."),
            "imagined_reward": (FLOAT, "Behaviour: mean imagined reward of a step."),
            "imagined_value": (FLOAT, "Behaviour: mean value of imagined states."),
            "gradient_norm/behaviour": (FLOAT, "Behaviour: norm before clipping."),
        },
    ),
    "evaluation": Kind(
        "evaluation-*.parquet",
        "One row per episode that the trained agent was scored by.",
        {
            "episode": (INTEGER, "Number of the episode, from 0."),
            "actions": (TEXT, "How actions were chosen: greedy, or sampled from the policy."),
            "seed": (INTEGER, "Seed of the episode."),
            "episode_return": (FLOAT, "Sum of the game's points, unclipped."),
            "length": (INTEGER, "Its agent steps."),
            "truncated": (BOOLEAN, "Whether it was cut off before the game was over."),
            "played": (TEXT, "Hash of all that was seen, done and got: equal for equal episodes."),
        },
    ),
}

PLACE: Columns = {
    "run_game": (TEXT, "Game of the run, from the file's path."),
    "run_seed": (INTEGER, "Seed of the run, from the file's path."),
}
_PATTERNS = {
    "run_game": r"(?:.*/)?runs/([A-Za-z0-9]+)/seed[0-9]+/.*",
    "run_seed": r"(?:.*/)?runs/[A-Za-z0-9]+/seed([0-9]+)/.*",
}


def croissant(
    about: Mapping[str, Any], kinds: Mapping[str, str], sizes: Collection[int]
) -> dict[str, Any]:
    """Describe the tables of a campaign's runs.

    Args:
        about: what is said of the whole: name, description, license and so on.
        kinds: which of `KINDS` there are, each with what is to be said of its files.
        sizes: height, which is the width, of the runs' frames.

    Returns:
        A JSON-LD document, to be written where `runs` lies.
    """
    shapes = ", ".join(f"{size} x {size}" for size in sorted(sizes))
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        **about,
        "isLiveDataset": False,
        "distribution": [
            {
                "@type": "cr:FileSet",
                "@id": f"{kind}-files",
                "name": f"{kind}-files",
                "description": said,
                "encodingFormat": "application/x-parquet",
                "includes": f"runs/*/seed*/{KINDS[kind].files}",
            }
            for kind, said in kinds.items()
        ],
        "recordSet": [_record_set(kind, shapes) for kind in kinds],
    }


def _record_set(kind: str, shapes: str) -> dict[str, Any]:
    columns = {**PLACE, **KINDS[kind].columns}
    return {
        "@type": "cr:RecordSet",
        "@id": kind,
        "name": kind,
        "description": KINDS[kind].row,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{kind}/{name}",
                "name": f"{kind}/{name}",
                "description": meaning.replace("{sizes}", shapes),
                "dataType": data_type,
                "source": {"fileSet": {"@id": f"{kind}-files"}} | _extract(name),
            }
            for name, (data_type, meaning) in columns.items()
        ],
    }


def _extract(name: str) -> dict[str, Any]:
    if name in _PATTERNS:
        return {"extract": {"fileProperty": "fullpath"}, "transform": {"regex": _PATTERNS[name]}}
    return {"extract": {"column": name}}
