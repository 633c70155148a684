"""Let a program built against glibc 2.38 start on an older one: `relax_glibc.py FILE`.

What it usually needs of 2.38 are strtol and its kin under names that also read binary literals
(__isoc23_strtol); the plain functions do the same for everything else. So each such name loses its
prefix, and the need for 2.38 is turned into one for the version that the C library began with.
Anything else of 2.38 is refused.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NEWER = b"GLIBC_2.38"
FIRST = {62: b"GLIBC_2.2.5", 183: b"GLIBC_2.17"}
"""The oldest version that a C library has, by the ELF header's machine: x86-64, AArch64."""
PREFIX = b"__isoc23_"
DYNSYM, VERNEED, VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF


class Section(NamedTuple):
    """What is needed of a section header."""

    kind: int
    offset: int
    size: int
    link: int
    info: int


class Need(NamedTuple):
    """A version that the program asks for: where the entry lies, its name, its index."""

    entry: int
    name: bytes
    index: int


class Program:
    """A 64-bit little-endian ELF file, in memory."""

    def __init__(self, data: bytearray) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise SystemExit("not a 64-bit little-endian ELF file")
        self.data = data
        self.machine = self.read("<H", 0x12)[0]
        start = self.read("<Q", 0x28)[0]
        size, count = self.read("<HH", 0x3A)
        self.sections = [self._section(start + size * number) for number in range(count)]
        self.symbols = self._only(DYNSYM)
        self.names = self.sections[self.symbols.link].offset

    def read(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self.data, offset)

    def _section(self, header: int) -> Section:
        _, kind, _, _, offset, size, link, info = self.read("<IIQQQQII", header)
        return Section(kind, offset, size, link, info)

    def _only(self, kind: int) -> Section:
        return next(section for section in self.sections if section.kind == kind)

    def name(self, offset: int) -> bytes:
        start = self.names + offset
        return bytes(self.data[start : self.data.index(0, start)])

    def needs(self) -> Iterator[Need]:
        section = self._only(VERNEED)
        library = section.offset
        for _ in range(section.info):
            _, count, _, first, following = self.read("<HHIII", library)
            entry = library + first
            for _ in range(count):
                _, _, index, name, step = self.read("<IHHII", entry)
                yield Need(entry, self.name(name), index)
                entry += step
            library += following

    def relax(self) -> list[str]:
        """Rename what is wanted of the newer library; return the names."""
        needs = list(self.needs())
        newer = [need for need in needs if need.name == NEWER]
        if not newer:
            return []
        first = next(need.entry for need in needs if need.name == FIRST[self.machine])
        versions = self._only(VERSYM).offset
        renamed = []
        for number in range(self.symbols.size // 24):
            (version,) = self.read("<H", versions + 2 * number)
            if version & 0x7FFF not in {need.index for need in newer}:
                continue
            symbol = self.symbols.offset + 24 * number
            (place,) = self.read("<I", symbol)
            name = self.name(place)
            if not name.startswith(PREFIX):
                raise SystemExit(f"needs {name.decode()} of {NEWER.decode()}: no older one does")
            struct.pack_into("<I", self.data, symbol, place + len(PREFIX))
            renamed.append(name.decode())
        for need in newer:
            self.data[need.entry : need.entry + 4] = self.data[
                first : first + 4
            ]  # hash of the name
            self.data[need.entry + 8 : need.entry + 12] = self.data[first + 8 : first + 12]  # name
        return renamed


if __name__ == "__main__":
    path = Path(sys.argv[1])
    program = Program(bytearray(path.read_bytes()))
    if changed := program.relax():
        path.write_bytes(program.data)
        print(f"{path.name}: {', '.join(changed)} by their older names", file=sys.stderr)
