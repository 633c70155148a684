"""The look of all figures: colours, style, titles; SVG text, the same bytes for the same inputs.

One look throughout: one blue for what was run here, one vermilion for the published Drama, grey
for everything else (Okabe and Ito's colour-blind-safe palette), text left as text. Every figure
carries its own dark variant, which a browser picks by the reader's preference.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any
from xml.sax.saxutils import escape  # nosec B406

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drama.report.words import SEPARATOR, typeset

INK, MUTED, GRID = "#1f2328", "#656d76", "#d8dee4"
OURS, DRAMA_COLOUR, HUMAN, OTHER = "#0072b2", "#d55e00", "#009e73", "#8c959f"
DARK = {
    INK: "#e6edf3", MUTED: "#9aa4af", GRID: "#30363d",
    OURS: "#56b4e9", DRAMA_COLOUR: "#f08a4b", HUMAN: "#3fc79a", OTHER: "#7d8590",
}  # fmt: skip
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 8.5, "svg.fonttype": "none",
    "svg.hashsalt": "drama", "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.unicode_minus": True, "lines.solid_capstyle": "round",
}  # fmt: skip


def report_style() -> AbstractContextManager[None]:
    """This module's look on matplotlib's own defaults, whatever the reader's matplotlibrc says."""
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    # rc_context would not put it back, and writing SVG needs none.
    settings.pop("backend")
    return matplotlib.rc_context(settings)


def add_title(figure: Figure, text: str, label: str | None, size: float = 11) -> None:
    """Write a figure's title, and across from it what the runs are not, a line for each thing."""
    inch = 1 / figure.get_figheight()
    left = 0.06 / figure.get_figwidth()
    figure.text(left, 1 - 0.1 * inch, text, size=size, weight="bold", va="top")
    if label:
        figure.text(1 - left, 1 - 0.12 * inch, label.replace(SEPARATOR, "\n"), size=8,
                    weight="bold", va="top", ha="right", color=DRAMA_COLOUR)  # fmt: skip


def say_no_data(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED)


def short(value: float, _: object = None) -> str:
    text = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
    return typeset(text)


def as_svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )  # fmt: skip
    text = buffer.getvalue().replace("'DejaVu Sans'", FONTS)
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    inside = (
        f"<title>{escape(description)}</title>"
        f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    )
    # Hundredths of a point are all that can be seen; the rest would be half of the file.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + "\n " + inside, text, count=1)
