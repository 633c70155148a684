"""The picture of what was measured on one device: small multiples in the report's look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from measuring import Figure
from records import Measured

from drama.files import write_text
from drama.report import look

COLOURS = {"mamba2": look.OURS, "transformer": look.DRAMA_COLOUR, "gru": look.OTHER}
LABELS = {"mamba2": "Mamba-2", "transformer": "transformer", "gru": "GRU"}
Line = list[tuple[float, float]]


def draw(path: Path, parts: Mapping[str, Measured]) -> None:
    """Write the picture as SVG, which also has a dark variant."""
    with look.report_style():
        write_text(path, picture(parts))


def picture(parts: Mapping[str, Measured]) -> str:
    """Return the picture: a panel per part that was measured, the others saying so."""
    found = [figure for part in parts.values() for figure in part.figures]
    canvas = Canvas(figsize=(9.6, 5.6))
    newest = max((part.machine for part in parts.values()), key=lambda machine: machine.date)
    title = f"{newest.device}, {newest.date}"
    look.add_title(canvas, title, None)
    axes = canvas.subplots(2, 3)
    canvas.subplots_adjust(0.06, 0.08, 0.985, 0.89, hspace=0.4, wspace=0.3)
    panels: list[tuple[str, Callable[[Axes, list[Figure]], bool]]] = [
        ("Sequence update, seconds by length", _sequence_time),
        ("Its peak memory, MiB by length", _sequence_memory),
        ("DFS draw, seconds by transitions stored", _draws),
        ("Imagination, seconds", _imagination),
        ("One update, seconds", _updates),
        ("Memory of a run, GiB", _memory),
    ]
    for axis, (heading, panel) in zip(axes.flat, panels, strict=True):
        axis.set_title(heading, fontsize=8.5, color=look.INK, loc="left", pad=5)
        if not panel(axis, found):
            axis.grid(False)
            axis.set_xticks([])
            axis.set_yticks([])
            look.say_no_data(axis, "not measured")
    return look.as_svg(canvas, title)


def _pick(found: list[Figure], part: str, name: str) -> list[Figure]:
    return [figure for figure in found if (figure.part, figure.name) == (part, name)]


def _line(figures: list[Figure], along: str, **where: str | int) -> Line:
    """Return (parameter, value) of the figures at some point, in order, as far as logs can show."""
    chosen = [f for f in figures if all(f.parameters[k] == v for k, v in where.items())]
    return sorted((float(f.parameters[along]), f.value) for f in chosen if f.value > 0)


def _loglog(axis: Axes, lines: list[tuple[str, str, Line]]) -> bool:
    """Draw named lines, on logarithmic axes, each with its name at its end."""
    lines = [entry for entry in lines if entry[2]]
    for name, colour, line in lines:
        axis.plot(*zip(*line, strict=True), "o-", color=colour, lw=1.4, ms=3, mew=0, label=name)
    if not lines:
        return False
    axis.set_xscale("log", base=2 if lines[0][2][0][0] < 1000 else 10)
    axis.set_yscale("log")
    points = sorted({x for _, _, line in lines for x, _ in line})
    axis.xaxis.set_major_locator(FixedLocator(points))
    axis.yaxis.set_major_locator(LogLocator(numticks=6))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(_short))
    axis.legend(frameon=False, fontsize=7.5, labelcolor=look.MUTED, handlelength=1.2)
    return True


def _short(value: float, _: object = None) -> str:
    if value < 10_000:
        return f"{value:g}"
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def _sequence(axis: Axes, figures: list[Figure]) -> bool:
    return _loglog(
        axis, [(LABELS[k], COLOURS[k], _line(figures, "length", kind=k)) for k in COLOURS]
    )


def _sequence_time(axis: Axes, found: list[Figure]) -> bool:
    return _sequence(axis, _pick(found, "sequence", "update"))


def _sequence_memory(axis: Axes, found: list[Figure]) -> bool:
    return _sequence(axis, _pick(found, "sequence", "peak memory"))


def _draws(axis: Axes, found: list[Figure]) -> bool:
    figures = _pick(found, "replay", "draw")
    kinds = {"world model": look.OURS, "imagination": look.DRAMA_COLOUR}
    return _loglog(
        axis, [(kind, colour, _line(figures, "transitions", kind=kind))
               for kind, colour in kinds.items()]
    )  # fmt: skip


def _imagination(axis: Axes, found: list[Figure]) -> bool:
    """By horizon at a fixed number of contexts, and by contexts at a fixed horizon."""
    figures = _pick(found, "imagination", "imagination")
    lines = []
    for along, other, colour in (
        ("horizon", "contexts", look.OURS),
        ("contexts", "horizon", look.DRAMA_COLOUR),
    ):
        fixed = [f.parameters[other] for f in figures]
        if not fixed:
            return False
        most = max(fixed, key=fixed.count)
        name = f"by {along}, {most} {'steps' if other == 'horizon' else other}"
        lines.append((name, colour, _line(figures, along, **{other: most})))
    drawn = _loglog(axis, lines)
    axis.xaxis.set_major_locator(FixedLocator([4, 16, 64, 256, 1024]))
    return drawn


def _updates(axis: Axes, found: list[Figure]) -> bool:
    """Bars: every path, and the published code where it was timed."""
    figures = [f for f in found if f.part == "updates" and "path" in f.parameters]
    names = list(dict.fromkeys(f.name for f in figures if f.name != "together"))
    bars = {
        "plain": (look.OTHER, 1.0),
        "fast": (look.OURS, 1.0),
        "fast, bfloat16": (look.OURS, 0.5),
    }
    heights = {(f.name, str(f.parameters["path"])): f.value for f in figures}
    for figure in found:
        if figure.part == "published" and figure.parameters.get("code") == "published":
            bars = {"published": (look.DRAMA_COLOUR, 1.0)} | bars
            heights[figure.name, "published"] = figure.value
    width = 0.8 / len(bars)
    for place, (kind, (colour, alpha)) in enumerate(bars.items()):
        at = [index + (place - (len(bars) - 1) / 2) * width for index in range(len(names))]
        values = [heights.get((name, kind), 0.0) for name in names]
        axis.bar(at, values, 0.9 * width, color=colour, alpha=alpha, label=kind)
    if not names:
        return False
    axis.set_xticks(range(len(names)), [name.replace(" update", "\nupdate") for name in names])
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False, fontsize=7.5, labelcolor=look.MUTED, handlelength=1)
    return True


def _memory(axis: Axes, found: list[Figure]) -> bool:
    figures = [f for f in found if f.part == "memory"]
    if not figures:
        return False
    names = [figure.name for figure in figures]
    values = [figure.value / 1024 for figure in figures]
    axis.barh(range(len(names)), values, 0.6, color=look.OURS)
    for row, value in enumerate(values):
        axis.text(value, row, f" {value:.2g}", va="center", color=look.MUTED, size=7.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)
    # The names stand inside the panel's column, not in its neighbour's.
    box = axis.get_position()
    axis.set_position((box.x0 + 0.07, box.y0, box.width - 0.07, box.height))
    return True
