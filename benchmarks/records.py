"""What was measured, as a file per device: read, merged, compared, set in a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import HIGHER_IS_BETTER, Figure, Machine
from rich.table import Table

from drama.errors import DramaError
from drama.files import write_json

FORMAT = 1
NOTABLE = 1.25
"""A figure this many times another run's, or that one this many times it, is worth a line."""


class RecordError(DramaError):
    """A file of earlier figures cannot be used; the text says why."""


@dataclass(frozen=True)
class Measured:
    """One part of the benchmarks, measured.

    Attributes:
        machine: where and when; parts of one file may differ in when.
        seconds: what measuring it took.
        figures: what was found.
    """

    machine: Machine
    seconds: float
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Change:
    """A figure that differs notably from an earlier run's.

    Attributes:
        figure: as it is now.
        factor: how many times as much as before, as far as the two can be compared.
    """

    figure: Figure
    factor: float

    @property
    def worse(self) -> bool:
        """Whether it got slower or larger, or a rate lower."""
        return (self.factor > 1) != (self.figure.unit in HIGHER_IS_BETTER)

    def __str__(self) -> str:
        verdict = "worse" if self.worse else "better"
        return f"{verdict}: {label(self.figure)}: {self.factor:.2f} times the stored figure"


def read(path: Path) -> dict[str, Measured]:
    """Return the parts that a file holds, none where there is no file.

    Raises:
        RecordError: it is not what `write` writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
        return {
            name: Measured(
                Machine(**part["machine"]),
                part["seconds"],
                tuple(Figure(part=name, **figure) for figure in part["figures"]),
            )
            for name, part in data["parts"].items()
        }
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: not a benchmark's figures: {error}. Remove it.") from error


def write(path: Path, parts: Mapping[str, Measured]) -> None:
    """Write parts to a file as a whole."""
    write_json(
        path,
        {
            "format": FORMAT,
            "parts": {
                name: {
                    "machine": asdict(part.machine),
                    "seconds": round(part.seconds, 1),
                    "figures": [_compact(figure) for figure in part.figures],
                }
                for name, part in parts.items()
            },
        },
    )


def _compact(figure: Figure) -> dict[str, Any]:
    """Return a figure's fields but for its part's name and those that say nothing."""
    fields = {name: value for name, value in asdict(figure).items() if value not in (None, "")}
    del fields["part"]
    for name in ("value", "ratio"):
        if isinstance(fields.get(name), float):
            fields[name] = float(f"{fields[name]:.5g}")
    return fields


def compare(before: Mapping[str, Measured], now: Mapping[str, Measured]) -> list[Change]:
    """Return the figures that differ notably from those of an earlier run, worst first.

    Times are compared as ratios to the reference load that was timed beside them.
    """
    known = {figure.key: figure for part in before.values() for figure in part.figures}
    changes: list[Change] = []
    for part in now.values():
        for figure in part.figures:
            earlier = known.get(figure.key)
            if earlier is None or min(earlier.comparable, figure.comparable) <= 0:
                continue
            factor = figure.comparable / earlier.comparable
            if not 1 / NOTABLE <= factor <= NOTABLE:
                changes.append(Change(figure, factor))
    return sorted(changes, key=lambda change: (not change.worse, change.figure.key))


def beyond_limits(parts: Mapping[str, Measured]) -> list[Figure]:
    """Return the figures that are not what was wanted."""
    return [f for part in parts.values() for f in part.figures if not f.within_limit]


# --- tables ------------------------------------------------------------------------------------


def label(figure: Figure) -> str:
    """Return a figure's name with its parameters."""
    parameters = ", ".join(f"{name} {value}" for name, value in figure.parameters.items())
    return f"{figure.part}: {figure.name}" + (f" ({parameters})" if parameters else "")


def number(value: float | None) -> str:
    """Return a number with three digits, or all those before its point; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(name: str, part: Measured) -> Table:
    """Return one part's figures for the terminal."""
    took = f"{name}, measured in {part.seconds:.0f} s"
    shown = Table(title=took, title_justify="left", title_style="bold")
    for heading in ("figure", "at", "value", "unit", "ratio", "wanted"):
        right = heading in ("value", "ratio", "wanted")
        shown.add_column(heading, justify="right" if right else "left")
    for figure in part.figures:
        at = ", ".join(f"{key} {value}" for key, value in figure.parameters.items())
        wanted = f"≤ {number(figure.limit)}" if figure.limit is not None else ""
        style = None if figure.within_limit else "bold red"
        shown.add_row(
            figure.name, at, number(figure.value), figure.unit, number(figure.ratio), wanted,
            style=style,
        )  # fmt: skip
    return shown


def markdown(devices: Sequence[Mapping[str, Measured]], wanted: Sequence[str] = ()) -> str:
    """Return the README's table: a row per headline, value and ratio for each device.

    Args:
        devices: what was measured on each, parts in the order wanted; where none of them is a GPU,
            its cells stay empty.
        wanted: headlines that have a row though nobody has measured them yet.
    """
    devices = sorted((parts for parts in devices if parts), key=_kind)
    columns = [{f.headline: f for f in _headlines(parts)} for parts in devices]
    names = [_newest(parts).device for parts in devices]
    if "cuda" not in map(_kind, devices):
        columns.append({})
        names.append("GPU")
    measured = (headline for column in columns for headline in column)
    rows = list(dict.fromkeys([*measured, *wanted]))
    lines = [
        "| what | " + " | ".join(f"{name} | ratio" for name in names) + " |",
        "|---" + "|---:" * 2 * len(names) + "|",
    ]
    for row in rows:
        cells = [cell for column in columns for cell in _cells(column.get(row))]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*_caption(devices), "", *lines]) + "\n"


def _cells(figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "", ""
    limit = f" (≤ {number(figure.limit)} wanted)" if figure.limit is not None else ""
    # Of rates and shares, the ratio is no more than a means to compare runs.
    ratio = figure.ratio if figure.unit == "s" else None
    return f"{number(figure.value)} {figure.unit}{limit}", number(ratio)


def _caption(devices: Sequence[Mapping[str, Measured]]) -> Iterator[str]:
    for parts in devices:
        machine = _newest(parts)
        dates = sorted({part.machine.date for part in parts.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        yield (
            f"{machine.device}: {when}, PyTorch {machine.torch}, float32 matrix products at "
            f"{machine.gigaflops:,.0f} GFLOP/s."
        )
    if "cuda" not in map(_kind, devices):
        yield "No GPU was at hand: its cells are empty."
    yield "*ratio*: the time over that of the reference load, a float32 matrix product, beside it."


def _headlines(parts: Mapping[str, Measured]) -> list[Figure]:
    return [figure for part in parts.values() for figure in part.figures if figure.headline]


def _newest(parts: Mapping[str, Measured]) -> Machine:
    return max((part.machine for part in parts.values()), key=lambda machine: machine.date)


def _kind(parts: Mapping[str, Measured]) -> str:
    return _newest(parts).kind
