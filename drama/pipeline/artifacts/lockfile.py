"""dvc.lock: reading it, also when it is damaged, and replacing it as a whole.

DVC writes this file in place: of 46 kills at random moments of a `dvc commit` of 130 runs, 3 left
it empty or cut. A merge can leave conflict marks in it. DVC refuses such a file; here its entries
are looked for where older versions are, between the conflict marks and in git. Which of them still
hold, the runs' own files say.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from drama.errors import reason
from drama.files import write_text
from drama.pipeline.layers import PLAIN, load_yaml
from drama.reading import read_bytes

LOCK = Path("dvc.lock")
CONFLICT = re.compile(
    r"^<{7}.*?\n(?P<ours>.*?)(?:^\|{7}.*?)?^={7}\n(?P<theirs>.*?)^>{7}.*?(?:\n|\Z)",
    re.MULTILINE | re.DOTALL,
)

LARGEST = 64 * 2**20
"""Bytes of dvc.lock; 130 runs make some 200 000."""
Entry = dict[str, Any]
Entries = dict[str, Entry]
"""What dvc.lock says of each stage: cmd, deps and outs with their checksums."""


class _Listed(BaseModel):
    """A file or folder, by its MD5: a place in DVC's cache is made of it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: Annotated[str, Field(max_length=4096)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
    hash: Literal["md5"] = "md5"
    size: Annotated[int, Field(ge=0)] = 0
    nfiles: Annotated[int, Field(ge=0)] = 0
    isexec: bool = False


class _Stage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    cmd: str
    params: dict[str, dict[str, Any]] | None = None
    deps: list[_Listed] | None = None
    outs: list[_Listed] | None = None


_ENTRIES = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,200}$")], _Stage])


@dataclass(frozen=True)
class Ledger:
    """dvc.lock as it was found.

    Attributes:
        entries: of each stage; empty when the file is damaged.
        damage: what is wrong with the file, or None.
        text: the file's.
    """

    entries: Entries
    damage: str | None
    text: str | None

    @cached_property
    def older(self) -> tuple[Entries, ...]:
        """Entries from elsewhere, best first, to complete a damaged file with."""
        sides = [CONFLICT.sub(rf"\g<{side}>", self.text or "") for side in ("ours", "theirs")]
        found = []
        for text in (*sides, _committed()):
            with suppress(ValueError):
                found.append(_parse(text))
        return tuple(filter(None, found))

    @property
    def sources(self) -> tuple[Entries, ...]:
        """Where entries are looked for: the file, or older ones while it is damaged."""
        return self.older if self.damage else (self.entries,)


def read_ledger() -> Ledger:
    """Read dvc.lock in the working directory; one that never was is an empty one."""
    text = None
    try:
        text = read_bytes(LOCK, LARGEST).decode(errors="replace") if LOCK.exists() else None
        return Ledger(_parse(text), None, text)
    except ValueError as error:
        damaged = Ledger({}, str(error), text)
    never_was = text is None and not damaged.older
    return Ledger({}, None, None) if never_was else damaged


def write_ledger(entries: Entries) -> None:
    """Write dvc.lock as a whole, in DVC's layout."""
    from dvc.utils.serialize import dumps_yaml

    write_text(LOCK, dumps_yaml({"schema": "2.0", "stages": entries}))


def _parse(text: str | None) -> Entries:
    if text is None:
        raise ValueError("it is missing")
    if not text.strip():
        raise ValueError("it is empty")
    if not text.endswith("\n"):
        raise ValueError("it is cut off")
    if CONFLICT.search(text):
        raise ValueError("it holds the conflict marks of a merge")
    try:
        document = load_yaml(text, PLAIN)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"it is not YAML ({reason(error)})") from None
    stages = document.get("stages") if isinstance(document, dict) else None
    try:
        _ENTRIES.validate_python(stages)
    except ValidationError as error:
        raise ValueError(f"it is cut off or was edited: {reason(error)}") from None
    return cast(Entries, stages)


def _committed() -> str | None:
    command = ["git", "show", f"HEAD:./{LOCK}"]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
