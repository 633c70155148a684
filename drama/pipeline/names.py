"""What a file may call things: each a word that is safe in a path, a table and a shell's command.

Whatever is read from a file that somebody else may have written has one of these types before
anything is done with it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from drama.agent.settings import Fingerprint, Frozen, Recipe

Game = Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,100}$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""Of a run, as files name them."""

PRESET = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Preset = Annotated[str, Field(pattern=PRESET)]
"""A preset's name: of its file, and of its results."""

Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{7,64}(-dirty)?$")]
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._()/+:,@-]{0,99}$")]
"""What a device calls itself, such as NVIDIA H100 80GB HBM3."""

Backend = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
"""What computed Mamba-2, maybe one that today's code does not have."""

Library = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,99}$")]
Time = Annotated[str, Field(pattern=r"^[0-9T:.+-]{1,40}Z?$")]
"""A time, ISO 8601."""


Seconds = Annotated[float, Field(ge=0, le=1e10)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]


class _Names(Frozen):
    preset: Preset
    game: Game
    seed: Seed
    code: Fingerprint
    runtime: Fingerprint


def check_names(recipe: Recipe) -> None:
    """Raise a ValidationError unless what a recipe names can be a part of paths and texts."""
    _Names.model_validate({name: getattr(recipe, name) for name in _Names.model_fields})
