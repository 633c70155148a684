"""Damage one door's file, guided by Atheris: cases that reach new code are varied further.

    python tests/faults/guided.py DOOR FOLDER -runs=10000

DOOR is a number in `test_doors.DOORS`, FOLDER an empty one to work in; the rest goes to libFuzzer.
Ends with an exit code other than 0, and the input's bytes in FOLDER, when a case is not read or
refused as it should be.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["drama"]):
    from test_doors import DOORS, damaging, valid_files


def main() -> None:
    """Fuzz the door."""
    number, folder, *options = sys.argv[1:]
    with valid_files(Path(folder)):
        test = damaging(DOORS[int(number)])
        # Long from the start: a case takes some hundred bytes to be drawn from.
        options += ["-len_control=0", "-max_len=4096", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], *options], test.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
        atheris.Fuzz()


if __name__ == "__main__":
    main()
