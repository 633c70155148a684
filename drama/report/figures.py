"""Figures of the report: functions from scores and curves to SVG text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from drama.report import look
from drama.report.aggregates import AGGREGATES, Aggregates
from drama.report.scores import (
    DRAMA,
    FAMILIES,
    Baselines,
    GameScore,
    over_means,
    published_aggregates,
    read_curve,
    scored,
)
from drama.report.words import count, method_name, typeset

POINTS = 160
"""Most points a drawn curve has: more cannot be told apart at this size."""
MOST_ROWS = 100_000
"""Most rows that are smoothed one by one; more are averaged in groups first."""
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
HOLLOW: dict[str, Any] = {"mfc": "none", "mew": 1.3}
"""A mark of what is computed from games' means."""

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
    with look.report_style():
        if aggregates is not None:
            yield "aggregates.svg", aggregates_figure(scored(games), baselines, aggregates, label)
            yield "scores.svg", scores_figure(scored(games), baselines, label)
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
    own_means, rows = over_means(games), len(published) + 1
    height = 1.3 + 0.2 * rows
    figure = Figure(figsize=(9.6, height))
    title = f"Human-normalised aggregates over {count(len(names), 'game')}"
    look.add_title(figure, title, label)
    axes = figure.subplots(1, 4, sharey=True)
    figure.subplots_adjust(0.125, 0.42 / height, 0.985, 1 - 0.78 / height, wspace=0.12)
    for axis, (key, heading) in zip(axes, AGGREGATES, strict=True):
        of_means = key in ("interquartile_mean", "optimality_gap")
        own = getattr(aggregates, key)
        if own.low is not None:
            axis.plot([own.low, own.high], [0, 0], color=look.OURS, lw=5, alpha=0.3)
        axis.plot(own.value, 0, "o", color=look.OURS, ms=6)
        if of_means:
            axis.plot(getattr(own_means, key).value, 0, "o", ms=6, color=look.OURS, **HOLLOW)
        for row, (method, found) in enumerate(published, 1):
            shape = {"ms": 4.6, **HOLLOW} if of_means else {"ms": 5}
            colour = look.DRAMA_COLOUR if method == DRAMA else look.OTHER
            axis.plot(getattr(found, key).value, row, "o", color=colour, **shape)
        axis.set_title(heading, fontsize=9, color=look.INK, pad=16)
        better = "lower is better" if key == "optimality_gap" else "higher is better"
        axis.text(
            0.5, 1.02, better, transform=axis.transAxes, ha="center", color=look.MUTED, size=7.5
        )
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.margins(x=0.12)
        axis.axhline(0.5, color=look.GRID, lw=0.8)
    axes[0].set_yticks(range(rows), ["These runs", *(method_name(name) for name, _ in published)])
    axes[0].set_ylim(rows - 0.4, -0.6)
    for text, colour in zip(
        axes[0].get_yticklabels(), (look.OURS, look.DRAMA_COLOUR), strict=False
    ):
        text.set_color(colour)
        text.set_fontweight("bold")
    return look.as_svg(figure, title)


def scores_figure(games: Sequence[GameScore], baselines: Baselines, label: str | None) -> str:
    """Human-normalised score of every game: each seed, their mean, the published Drama."""
    ordered = sorted(games, key=lambda game: -(game.human_normalised_score or 0.0))
    height = 1.35 + 0.23 * len(ordered)
    figure = Figure(figsize=(9.6, height))
    title = "Human-normalised score per game"
    look.add_title(figure, title, label)
    axis = figure.subplots()
    figure.subplots_adjust(0.125, 0.42 / height, 0.93, 1 - 0.82 / height)
    drawn = [0.0, 1.0]
    for row, game in enumerate(ordered):
        seeds = [run.human_normalised_score or 0.0 for run in game.runs]
        mean = game.human_normalised_score or 0.0
        drama = baselines.normalise(game.game, baselines.published(DRAMA, game.game))
        axis.plot(seeds, [row] * len(seeds), "o", color=look.OURS, ms=4, alpha=0.35, mew=0)
        if drama is not None:
            axis.plot(drama, row, "D", color=look.DRAMA_COLOUR, ms=4.8, **HOLLOW)
        axis.plot(mean, row, "o", color=look.OURS, ms=6.2)
        axis.text(1.01, row, typeset(f"{mean:.3f}"), va="center",
                  transform=axis.get_yaxis_transform())  # fmt: skip
        drawn += [*seeds, mean, *([] if drama is None else [drama])]
    for value in (0.0, 1.0):
        axis.axvline(value, color=look.OTHER, lw=1, ls=(0, (4, 3)), zorder=1)
    _score_axis(axis, min(drawn), max(drawn))
    for value, name in ((0.0, "random"), (1.0, "human")):
        axis.text(value, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom",
                  color=look.MUTED, size=7.5)  # fmt: skip
    axis.set_yticks(range(len(ordered)), [game.game for game in ordered])
    axis.tick_params(axis="y", labelcolor=look.INK)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    _legend(figure, height)
    return look.as_svg(figure, title)


def returns_figure(game: GameScore, baselines: Baselines, label: str | None) -> str:
    """Training returns over agent steps: each seed thin, their smoothed mean, the evaluation."""
    figure = Figure(figsize=(4.7, 2.9))
    look.add_title(figure, game.game, label, size=10)
    axis = figure.add_axes((0.115, 0.15, 0.67, 0.68))
    _returns(axis, game, baselines)
    axis.set_ylabel("episode return")
    return look.as_svg(figure, f"Training returns in {game.game}")


def all_returns_figure(games: Sequence[GameScore], baselines: Baselines, label: str | None) -> str:
    """Training returns over agent steps in every game, side by side."""
    columns = 2 if len(games) <= 4 else 4
    rows = -(-len(games) // columns)
    height = 0.45 + 2.1 * rows
    figure = Figure(figsize=(4.4 * columns, height))
    look.add_title(figure, "Episode returns while training; diamonds: evaluation", label)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        0.5 / (4.4 * columns), 0.4 / height, 1 - 1.0 / (4.4 * columns), 1 - 0.7 / height,
        hspace=0.5, wspace=0.45,
    )  # fmt: skip
    for axis, game in zip(axes.flat, games, strict=False):
        _returns(axis, game, baselines)
        axis.set_title(game.game, fontsize=9, color=look.INK, loc="left", pad=5)
    for axis in axes.flat[len(games) :]:
        axis.set_axis_off()
    return look.as_svg(figure, "Training returns in all games")


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
            *thin(steps, returns), color=look.OURS, lw=0.7, alpha=0.4, marker=marker, ms=2.2, mew=0
        )
        values += returns.tolist()
    smoothed = [smooth(*curve, BANDWIDTH * end) for curve in curves if curve[0].size > 1]
    mean = mean_curve(smoothed)
    if mean is not None:
        axis.plot(*mean, color=look.OURS, lw=2)
    finals = [run.mean_return for run in game.runs]
    axis.plot(
        [end] * len(finals), finals, "D", color=look.OURS, ms=4.5, mew=0, alpha=0.8, clip_on=False
    )
    axis.set_xlim(0, end)
    _steps_axis(axis)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(look.short))
    _reference_lines(axis, game.game, baselines, np.array(values))
    if not any(steps.size for steps, _ in curves):
        look.say_no_data(axis, "no finished training episode")


def losses_figure(game: GameScore, label: str | None) -> str:
    """Losses, policy entropy and return scale over agent steps, each seed and their mean."""
    names = [name for name, _ in LOSSES]
    tables = [read_curve(run, "training.parquet", names) for run in game.runs]
    end = float(max(run.steps for run in game.runs))
    figure = Figure(figsize=(9.6, 4.3))
    look.add_title(figure, f"{game.game}: losses, entropy, return scale", label)
    axes = figure.subplots(2, 3, sharex=True)
    figure.subplots_adjust(0.06, 0.1, 0.985, 0.84, hspace=0.32, wspace=0.2)
    for axis, (name, heading) in zip(axes.flat, LOSSES, strict=True):
        curves = [_finite(table["step"], table[name]) for table in tables]
        curves = [curve for curve in curves if curve[0].size]
        for curve in curves:
            marker = "o" if curve[0].size < 15 else ""
            axis.plot(
                *thin(*curve), color=look.OURS, lw=0.8, alpha=0.4, marker=marker, ms=2.2, mew=0
            )
        mean = mean_curve(curves)
        if mean is not None:
            axis.plot(*thin(*mean), color=look.OURS, lw=1.8)
        _loss_scale(axis, np.concatenate([np.empty(0), *(y for _, y in curves)]), name)
        axis.set_title(heading, fontsize=8.5, color=look.INK, loc="left", pad=5)
        axis.set_xlim(0, end)
        if not curves:
            look.say_no_data(axis, "not recorded")
    for axis in axes[1]:
        _steps_axis(axis)
    return look.as_svg(figure, f"Losses in {game.game}")


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
    steps, values = thin(steps, values, MOST_ROWS)
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
    if not curves:
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
    return placed.tolist()


def _reference_lines(axis: Axes, game: str, baselines: Baselines, values: np.ndarray) -> None:
    """Draw Random, Human and published Drama where they fit; name the others below the title."""
    random, human = baselines.random.get(game), baselines.human.get(game)
    drama = baselines.published(DRAMA, game)
    low, high = float(values.min()), float(values.max())
    if random is not None:
        low, high = min(low, random), max(high, random)
    room = 0.6 * ((high - low) or 1.0)
    shown, outside = [], []
    for name, value, colour in (("Random", random, look.OTHER), ("Human", human, look.HUMAN),
                                (DRAMA, drama, look.DRAMA_COLOUR)):  # fmt: skip
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
                  ha="right", va="bottom", color=look.MUTED, size=7.5)  # fmt: skip


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
    axis.xaxis.set_major_formatter(FuncFormatter(look.short))


def _steps_axis(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(look.short))
    axis.set_xlabel("agent steps", labelpad=2)


def _loss_scale(axis: Axes, values: np.ndarray, name: str) -> None:
    """Logarithmic for a loss that falls by more than a factor of 20, linear otherwise."""
    positive = name.startswith("loss/") and values.size > 0 and values.min() > 0
    if positive and values.max() > 20 * values.min():
        axis.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(look.short))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.margins(y=0.08)


def _finite(steps: np.ndarray, values: np.ndarray) -> Curve:
    known = np.isfinite(values)
    return steps[known], values[known]


def _legend(figure: Figure, height: float) -> None:
    marks: dict[str, dict[str, Any]] = {
        "these runs, mean over seeds": {"marker": "o", "color": look.OURS, "ms": 5},
        "one seed": {"marker": "o", "color": look.OURS, "ms": 3.5, "alpha": 0.45},
        "Drama as published": {"marker": "D", "color": look.DRAMA_COLOUR, "mfc": "none", "ms": 5},
    }
    figure.legend(
        handles=[Line2D([], [], ls="", label=text, **mark) for text, mark in marks.items()],
        loc="upper left", bbox_to_anchor=(0.0, 1 - 0.3 / height), ncols=3,
        frameon=False, fontsize=8, labelcolor=look.MUTED, handletextpad=0.1, columnspacing=1.2,
        borderaxespad=0,
    )  # fmt: skip
