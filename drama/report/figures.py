"""Figures of the report, as SVG text: the same inputs give the same bytes.

One look throughout: one blue for what was run here, one vermilion for the published Drama, grey
for everything else (Okabe and Ito's colour-blind-safe palette), text left as text. Every figure
carries its own dark variant, which a browser picks by the reader's preference.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from drama.report.scores import (
    DRAMA,
    FAMILIES,
    Aggregates,
    Baselines,
    GameScore,
    aggregate,
    published_aggregates,
    read_curve,
)

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

POINTS = 160
"""Most points a drawn curve has: more cannot be told apart at this size."""
BANDWIDTH = 0.025
"""Least standard deviation of the smoothing kernel, as a share of the longest run."""

LOSSES = (
    ("loss/reconstruction", "Reconstruction (squared error per frame)"),
    ("loss/reward", "Reward (cross-entropy, nats)"),
    ("loss/termination", "Termination (cross-entropy, nats)"),
    ("loss/dynamics", "Dynamics (KL divergence, nats)"),
    ("entropy", "Entropy of the policy (nats)"),
    ("return_scale", "Return scale (5 % to 95 % range)"),
)
AGGREGATES = (
    ("mean", "Mean"),
    ("median", "Median"),
    ("interquartile_mean", "Interquartile mean"),
    ("optimality_gap", "Optimality gap"),
)

Curve = tuple[np.ndarray, np.ndarray]  # steps [rows], values [rows]


def draw(
    games: Sequence[GameScore],
    baselines: Baselines,
    aggregates: Aggregates | None,
    label: str | None,
) -> Iterator[tuple[str, str]]:
    """Yield (file name, SVG text) of every figure of a report.

    `label` stands in each figure beside its title and says what these runs are not; None for a
    full protocol run. Raises ReportError when a run's curves cannot be read.
    """
    with report_style():
        scored = [game for game in games if game.human_normalised_score is not None]
        if scored and aggregates is not None:
            yield "aggregates.svg", aggregates_figure(scored, baselines, aggregates, label)
            yield "scores.svg", scores_figure(scored, baselines, label)
        if len(games) > 1:
            yield "returns.svg", all_returns_figure(games, baselines, label)
        for game in games:
            yield f"returns-{game.game}.svg", returns_figure(game, baselines, label)
            yield f"losses-{game.game}.svg", losses_figure(game, label)


def aggregates_figure(
    games: Sequence[GameScore], baselines: Baselines, aggregates: Aggregates, label: str | None
) -> str:
    """Aggregates with their intervals, above the published world models over the same games."""
    names = [game.game for game in games]
    published = [
        (method, found)
        for method in FAMILIES["World models"]
        if (found := published_aggregates(baselines, method, names)) is not None
    ]
    own_means = _over_game_means(games)
    rows = len(published) + 1
    height = 1.3 + 0.2 * rows
    figure = Figure(figsize=(9.6, height))
    title = f"Human-normalised aggregates over {count(len(names), 'game')}"
    add_title(figure, title, label)
    axes = figure.subplots(1, 4, sharey=True)
    figure.subplots_adjust(0.125, 0.42 / height, 0.985, 1 - 0.78 / height, wspace=0.12)
    for axis, (key, heading) in zip(axes, AGGREGATES, strict=True):
        of_means = key in ("interquartile_mean", "optimality_gap")
        own = getattr(aggregates, key)
        if own.low is not None:
            axis.plot([own.low, own.high], [0, 0], color=OURS, lw=5, alpha=0.3)
        axis.plot(own.value, 0, "o", color=OURS, ms=6)
        if of_means:
            _hollow(axis, getattr(own_means, key).value, 0, OURS)
        for row, (method, found) in enumerate(published, 1):
            colour = DRAMA_COLOUR if method == DRAMA else OTHER
            value = getattr(found, key).value
            if of_means:
                _hollow(axis, value, row, colour)
            else:
                axis.plot(value, row, "o", color=colour, ms=5)
        axis.set_title(heading, fontsize=9, color=INK, pad=16)
        better = "lower is better" if key == "optimality_gap" else "higher is better"
        axis.text(0.5, 1.02, better, transform=axis.transAxes, ha="center", color=MUTED, size=7.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.margins(x=0.12)
        axis.axhline(0.5, color=GRID, lw=0.8)
    axes[0].set_yticks(range(rows), ["These runs", *(method_name(name) for name, _ in published)])
    axes[0].set_ylim(rows - 0.4, -0.6)
    _emphasise(axes[0].get_yticklabels())
    return as_svg(figure, title)


def scores_figure(games: Sequence[GameScore], baselines: Baselines, label: str | None) -> str:
    """Human-normalised score of every game: each seed, their mean, the published Drama."""
    ordered = sorted(games, key=lambda game: -(game.human_normalised_score or 0.0))
    height = 1.35 + 0.23 * len(ordered)
    figure = Figure(figsize=(9.6, height))
    title = "Human-normalised score per game"
    add_title(figure, title, label)
    axis = figure.subplots()
    figure.subplots_adjust(0.125, 0.42 / height, 0.93, 1 - 0.82 / height)
    drawn = [0.0, 1.0]
    for row, game in enumerate(ordered):
        seeds = [run.human_normalised_score or 0.0 for run in game.runs]
        mean = game.human_normalised_score or 0.0
        drama = baselines.normalise(game.game, baselines.published(DRAMA, game.game))
        axis.plot(seeds, [row] * len(seeds), "o", color=OURS, ms=4, alpha=0.35, mew=0)
        if drama is not None:
            axis.plot(drama, row, "D", mfc="none", mec=DRAMA_COLOUR, mew=1.3, ms=4.8)
        axis.plot(mean, row, "o", color=OURS, ms=6.2)
        axis.text(1.01, row, typeset(f"{mean:.3f}"), va="center",
                  transform=axis.get_yaxis_transform())  # fmt: skip
        drawn += [*seeds, mean, *([] if drama is None else [drama])]
    for value in (0.0, 1.0):
        axis.axvline(value, color=OTHER, lw=1, ls=(0, (4, 3)), zorder=1)
    _score_axis(axis, min(drawn), max(drawn))
    for value, name in ((0.0, "random"), (1.0, "human")):
        axis.text(value, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom",
                  color=MUTED, size=7.5)  # fmt: skip
    axis.set_yticks(range(len(ordered)), [game.game for game in ordered])
    axis.tick_params(axis="y", labelcolor=INK)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    _legend(figure, height, [("o", OURS, OURS, "these runs, mean over seeds"),
                             ("seed", OURS, OURS, "one seed"),
                             ("D", DRAMA_COLOUR, "none", "Drama as published")])  # fmt: skip
    return as_svg(figure, title)


def returns_figure(game: GameScore, baselines: Baselines, label: str | None) -> str:
    """Training returns over agent steps: each seed thin, their smoothed mean, the evaluation."""
    figure = Figure(figsize=(4.7, 2.9))
    add_title(figure, game.game, label, size=10)
    axis = figure.add_axes((0.115, 0.15, 0.67, 0.68))
    _returns(axis, game, baselines)
    axis.set_ylabel("episode return")
    return as_svg(figure, f"Training returns in {game.game}")


def all_returns_figure(games: Sequence[GameScore], baselines: Baselines, label: str | None) -> str:
    """Training returns over agent steps in every game, side by side."""
    columns = 2 if len(games) <= 4 else 4
    rows = -(-len(games) // columns)
    height = 0.45 + 2.1 * rows
    figure = Figure(figsize=(4.4 * columns, height))
    add_title(figure, "Episode returns while training; diamonds: evaluation", label)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        0.5 / (4.4 * columns), 0.4 / height, 1 - 1.0 / (4.4 * columns), 1 - 0.7 / height,
        hspace=0.5, wspace=0.45,
    )  # fmt: skip
    for axis, game in zip(axes.flat, games, strict=False):
        _returns(axis, game, baselines)
        axis.set_title(game.game, fontsize=9, color=INK, loc="left", pad=5)
    for axis in axes.flat[len(games) :]:
        axis.set_axis_off()
    return as_svg(figure, "Training returns in all games")


def _returns(axis: Axes, game: GameScore, baselines: Baselines) -> None:
    curves = []
    for run in game.runs:
        columns = read_curve(run, "episodes.parquet", ["episode_return"])
        curves.append((columns["step"], columns["episode_return"]))
    end = float(max(run.steps for run in game.runs))
    values = [run.mean_return for run in game.runs]
    for steps, returns in curves:
        marker = "o" if steps.size < 40 else ""
        axis.plot(
            *thin(steps, returns), color=OURS, lw=0.7, alpha=0.4, marker=marker, ms=2.2, mew=0
        )
        values += returns.tolist()
    smoothed = [smooth(*curve, BANDWIDTH * end) for curve in curves if curve[0].size > 1]
    mean = mean_curve(smoothed)
    if mean is not None:
        axis.plot(*mean, color=OURS, lw=2)
    finals = [run.mean_return for run in game.runs]
    axis.plot([end] * len(finals), finals, "D", color=OURS, ms=4.5, mew=0, alpha=0.8, clip_on=False)
    axis.set_xlim(0, end)
    _steps_axis(axis, "agent steps")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(_short))
    _reference_lines(axis, game.game, baselines, np.array(values))
    if not any(steps.size for steps, _ in curves):
        say_no_data(axis, "no finished training episode")


def losses_figure(game: GameScore, label: str | None) -> str:
    """Losses, policy entropy and return scale over agent steps, each seed and their mean."""
    names = [name for name, _ in LOSSES]
    tables = [read_curve(run, "training.parquet", names) for run in game.runs]
    end = float(max(run.steps for run in game.runs))
    figure = Figure(figsize=(9.6, 4.3))
    add_title(figure, f"{game.game}: losses, entropy, return scale", label)
    axes = figure.subplots(2, 3, sharex=True)
    figure.subplots_adjust(0.06, 0.1, 0.985, 0.84, hspace=0.32, wspace=0.2)
    for axis, (name, heading) in zip(axes.flat, LOSSES, strict=True):
        curves = [_finite(table["step"], table[name]) for table in tables]
        curves = [curve for curve in curves if curve[0].size]
        for curve in curves:
            marker = "o" if curve[0].size < 15 else ""
            axis.plot(*thin(*curve), color=OURS, lw=0.8, alpha=0.4, marker=marker, ms=2.2, mew=0)
        mean = mean_curve(curves)
        if mean is not None:
            axis.plot(*thin(*mean), color=OURS, lw=1.8)
        _loss_scale(axis, np.concatenate([np.empty(0), *(y for _, y in curves)]), name)
        axis.set_title(heading, fontsize=8.5, color=INK, loc="left", pad=5)
        axis.set_xlim(0, end)
        if not curves:
            say_no_data(axis, "not recorded")
    for axis in axes[1]:
        _steps_axis(axis, "agent steps")
    return as_svg(figure, f"Losses in {game.game}")


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> Curve:
    """Means over at most `points` consecutive groups of a curve's rows: [rows] to [<= points]."""
    if steps.size <= points:
        return steps, values
    edges = np.linspace(0, steps.size, points + 1).astype(int)[:-1]
    counts = np.diff([*edges, steps.size])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def smooth(steps: np.ndarray, values: np.ndarray, bandwidth: float) -> Curve:
    """Gaussian kernel average of (steps [rows], values [rows]) between its first and last step.

    The kernel's standard deviation is `bandwidth` steps, or the mean distance between rows where
    that is more: few episodes would otherwise make a staircase.
    """
    bandwidth = max(bandwidth, (steps[-1] - steps[0]) / max(steps.size - 1, 1))
    grid = np.linspace(steps[0], steps[-1], POINTS)
    exponents = -0.5 * ((grid[:, None] - steps[None, :]) / bandwidth) ** 2  # [points, rows]
    # Relative to the nearest row: far from all of them, every weight would underflow to zero.
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return grid, weights @ values / weights.sum(axis=1)


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean over seeds where all of them have data; None where they nowhere overlap.

    One curve alone is its own mean.
    """
    if not curves or any(steps.size == 0 for steps, _ in curves):
        return None
    low = max(steps[0] for steps, _ in curves)
    high = min(steps[-1] for steps, _ in curves)
    if low >= high:
        return None
    grid = np.linspace(low, high, POINTS)
    return grid, np.mean([np.interp(grid, *curve) for curve in curves], axis=0)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move labels apart to at least `gap`, in order, as little as a simple sweep allows."""
    order = np.argsort(positions, kind="stable")
    placed = np.array(positions, dtype=float)
    for _ in range(50):
        for lower, upper in pairwise(order):
            lack = gap - (placed[upper] - placed[lower])
            if lack > 1e-9:
                placed[lower] -= lack / 2
                placed[upper] += lack / 2
    return [float(position) for position in placed]


def _reference_lines(axis: Axes, game: str, baselines: Baselines, values: np.ndarray) -> None:
    """Draw Random, Human and published Drama where they fit; name the others below the title."""
    random, human = baselines.random.get(game), baselines.human.get(game)
    drama = baselines.published(DRAMA, game)
    low, high = float(values.min()), float(values.max())
    if random is not None:
        low, high = min(low, random), max(high, random)
    room = 0.6 * ((high - low) or 1.0)
    shown, outside = [], []
    for name, value, colour in (("Random", random, OTHER), ("Human", human, HUMAN),
                                (DRAMA, drama, DRAMA_COLOUR)):  # fmt: skip
        if value is not None and value <= high + room:
            shown.append((name, value, colour))
        elif value is not None:
            outside.append(typeset(f"{name} {value:,.0f}"))
    for _, value, colour in shown:
        axis.axhline(value, color=colour, lw=1.1, ls=(0, (4, 3)), zorder=1.5)
    axis.margins(y=0.06)
    axis.autoscale_view()
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top)
    heights = [(value - bottom) / (top - bottom) for _, value, _ in shown]
    for (name, value, colour), at in zip(shown, spread(heights, 0.13), strict=True):
        text = f"{name} {value:,.0f}" if abs(value) >= 100 else f"{name} {value:g}"
        axis.text(1.025, at, typeset(text), color=colour,
                  transform=axis.transAxes, va="center", size=8)  # fmt: skip
    if outside:
        axis.text(1, 1.03, "beyond the axis: " + ", ".join(outside), transform=axis.transAxes,
                  ha="right", va="bottom", color=MUTED, size=7.5)  # fmt: skip


def report_style() -> AbstractContextManager[None]:
    """This module's look on matplotlib's own defaults, whatever the reader's matplotlibrc says."""
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    # rc_context would not put it back, and writing SVG needs none.
    settings.pop("backend")
    return matplotlib.rc_context(settings)


def _over_game_means(games: Sequence[GameScore]) -> Aggregates:
    return aggregate([np.array([game.human_normalised_score]) for game in games])


def _score_axis(axis: Axes, low: float, high: float) -> None:
    """Linear where scores are near [0, 1]; linear up to 1 and logarithmic above otherwise."""
    if high <= 2 and low >= -1:
        margin = 0.04 * (high - low)
        axis.set_xlim(low - margin, high + margin)
        return
    axis.set_xscale("symlog", linthresh=1, linscale=1)
    axis.set_xlim(min(1.15 * low, -0.1), 1.15 * high)
    ticks = [t for t in (-10, -5, -2, -1, 0, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if
             1.15 * low <= t <= 1.15 * high]  # fmt: skip
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(_short))


def _steps_axis(axis: Axes, label: str) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(_short))
    axis.set_xlabel(label, labelpad=2)


def _short(value: float, _: object = None) -> str:
    text = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
    return typeset(text)


def typeset(text: str) -> str:
    """A formatted number with a true minus sign and thin spaces between groups of digits."""
    return text.replace(",", "\u202f").replace("-", "\u2212")


def _loss_scale(axis: Axes, values: np.ndarray, name: str) -> None:
    """Logarithmic for a loss that falls by more than a factor of 20, linear otherwise."""
    positive = name.startswith("loss/") and values.size > 0 and values.min() > 0
    if positive and values.max() > 20 * values.min():
        axis.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(_short))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.margins(y=0.08)


def _finite(steps: np.ndarray, values: np.ndarray) -> Curve:
    known = np.isfinite(values)
    return steps[known], values[known]


def say_no_data(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED)


def _hollow(axis: Axes, value: float, row: int, colour: str) -> None:
    axis.plot(value, row, "o", mfc="none", mec=colour, mew=1.3, ms=6 if row == 0 else 4.6)


def _emphasise(labels: Sequence[matplotlib.text.Text]) -> None:
    for label, colour in zip(labels, (OURS, DRAMA_COLOUR), strict=False):
        label.set_color(colour)
        label.set_fontweight("bold")


def method_name(method: str) -> str:
    """A published method's name as the report shows it."""
    return {"DreamerV3_2023": "DreamerV3 (2023)"}.get(method, method)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 game", "2 games"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def add_title(figure: Figure, text: str, label: str | None, size: float = 11) -> None:
    inch = 1 / figure.get_figheight()
    left = 0.06 / figure.get_figwidth()
    figure.text(left, 1 - 0.1 * inch, text, size=size, weight="bold", va="top")
    if label:
        figure.text(1 - left, 1 - 0.12 * inch, label, size=8, weight="bold", va="top", ha="right",
                    color=DRAMA_COLOUR)  # fmt: skip


def _legend(figure: Figure, height: float, entries: list[tuple[str, str, str, str]]) -> None:
    handles = [
        matplotlib.lines.Line2D(
            [],
            [],
            ls="",
            marker="o" if marker == "seed" else marker,
            mec=edge,
            mfc=face,
            ms=3.5 if marker == "seed" else 5,
            alpha=0.45 if marker == "seed" else 1,
            label=text,
        )
        for marker, edge, face, text in entries
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.3 / height), ncols=3,
        frameon=False, fontsize=8, labelcolor=MUTED, handletextpad=0.1, columnspacing=1.2,
        borderaxespad=0,
    )  # fmt: skip


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
