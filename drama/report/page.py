"""The report's files: a page, a Markdown digest, the scores as tables, the figures, the stamp.

Everything is made in memory first, so that a run that cannot be read leaves an older report as it
was. Then the old stamp goes, the files are replaced one by one, and the new stamp is written last:
a folder with a stamp holds one whole report. No file holds a time of writing, so the same inputs
give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.markup import escape
from rich.table import Table

from drama.agent.settings import WAYS, Actions
from drama.errors import reason
from drama.files import canonical_json, replacing, write_json
from drama.pipeline.config import no_plan
from drama.pipeline.plans import read_plan
from drama.report.figures import AGGREGATES, count, draw, method_name, typeset
from drama.report.scores import (
    BOOTSTRAP_REPETITIONS,
    DRAMA,
    FAMILIES,
    FORMAT,
    PROTOCOL_EPISODES,
    PROTOCOL_SEEDS,
    PROTOCOL_STEPS,
    TRAINING_EPISODES,
    Aggregates,
    Baselines,
    Estimate,
    GameScore,
    ReportError,
    RunScore,
    aggregate,
    load_baselines,
    published_aggregates,
    read_scores,
)

DASH = "\u2013"
EARLIER = "earlier code"

SCHEMA = pa.schema([
    ("preset", pa.string()), ("reproduction", pa.bool_()), ("game", pa.string()),
    ("seed", pa.int64()), ("mean_return", pa.float64()), ("standard_deviation", pa.float64()),
    ("episodes", pa.int64()), ("actions", pa.string()), ("different", pa.int64()),
    ("truncated", pa.int64()), ("greedy_return", pa.float64()), ("sampled_return", pa.float64()),
    ("training_return", pa.float64()), ("training_episodes", pa.int64()),
    ("human_normalised_score", pa.float64()), ("random", pa.float64()),
    ("human", pa.float64()), ("drama_published", pa.float64()), ("steps", pa.int64()),
    ("device", pa.string()), ("wall_seconds", pa.float64()), ("run", pa.string()),
    ("evaluation", pa.string()), ("git_commit", pa.string()), ("current", pa.bool_()),
])  # fmt: skip
"""Columns of scores.csv and scores.parquet, one row per run.

`actions` says how those of `mean_return` were chosen; `different` and `truncated` are of its
episodes. `greedy_return` and `sampled_return` are empty where that was not played.
"""


@dataclass(frozen=True)
class Report:
    """A written report: where it is and what it says."""

    path: Path  # index.html
    stamp: Path
    preset: str
    reproduction: bool
    games: tuple[GameScore, ...]
    aggregates: Aggregates | None  # None when no game has published reference values
    baselines: Baselines = field(repr=False)

    @property
    def label(self) -> str | None:
        """What must stand beside every number; None for runs of the full protocol."""
        return None if self.reproduction else f"preset {self.preset}: not a reproduction"

    @property
    def earlier(self) -> list[RunScore]:
        """Runs of earlier code, which stand in for planned ones."""
        return [run for game in self.games for run in game.runs if not run.current]


def write_report(results: Path) -> Report:
    """Write results/<preset>/report out of the runs that recipes/report.json lists.

    `results` is the folder results/<preset>. Raises ReportError, before anything is written, when
    a run is missing or damaged.
    """
    results = Path(results)
    plan = read_plan(results)
    baselines = load_baselines()
    games = read_scores(plan, baselines)
    scored = [g for g in games if g.human_normalised_score is not None]
    folder = results / "report"
    # The plan's own stamp would tell Snakemake that its runs are in the report.
    current = all(run.current for game in games for run in game.runs)
    stamp = f"report-{plan.fingerprint[:16]}{'' if current else '-earlier'}.json"
    report = Report(
        path=folder / "index.html",
        stamp=folder / stamp,
        preset=plan.preset,
        reproduction=plan.complete_protocol,
        games=games,
        aggregates=aggregate([_normalised(game) for game in scored]) if scored else None,
        baselines=baselines,
    )
    files = _render(report, plan.fingerprint)
    _replace(folder, files, report.stamp, plan.fingerprint, report)
    return report


def read_returns(results: Path) -> list[tuple[str, int, float]]:
    """Return game, seed and mean return of every run in the report of results/<preset>.

    Raises ReportError when there is no report, ConfigurationError when there are no results.
    """
    path = results / "report" / "scores.parquet"
    if not (path.is_file() or (results / "recipes" / "report.json").is_file()):
        raise no_plan(results)
    try:
        rows = pq.read_table(path).to_pylist()
        if not rows:
            raise ValueError("it lists no run")
        return [(row["game"], row["seed"], float(row["mean_return"])) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ReportError(f"{path}: no scores there ({reason(error)}). `drama report {results}` "
                          "writes them") from None  # fmt: skip


def console_table(report: Report) -> Table:
    """The scores as a table for a terminal of 80 columns: a row per game, then the aggregates."""
    seeds = _range([len(game.runs) for game in report.games])
    title = f"Drama: {count(len(report.games), 'game')}, {seeds} seed{'s' * (seeds != '1')} each"
    if report.label:
        title += f"\n[bold red]{escape(report.label)}[/]"
    runs = [run for game in report.games for run in game.runs]
    beside = _beside(runs)
    references = ("random", "human", DRAMA)[len(beside) :]  # as many as there is room for
    table = Table(
        title=title,
        caption=f"return: {_scored_by(runs)} actions; Drama: as published{_earlier_note(report)}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("game", no_wrap=True)
    for name in ("return", *beside, *references, "human-normalised"):
        table.add_column(name, justify="right", no_wrap=True)
    for game in report.games:
        known = {
            "random": report.baselines.random.get(game.game),
            "human": report.baselines.human.get(game.game),
            DRAMA: report.baselines.published(DRAMA, game.game),
        }
        returns = [game.mean_return, *map(game.return_by, beside), *map(known.get, references)]
        mark = " *" if any(not run.current for run in game.runs) else ""
        row = [*map(number, returns), ratio(game.human_normalised_score)]
        table.add_row(game.game + mark, *row)
    if report.aggregates is not None:
        table.add_section()
        for key, name in AGGREGATES:
            estimate = getattr(report.aggregates, key)
            low, high = ratio(estimate.low), ratio(estimate.high)
            spread = "" if estimate.low is None else f" [{low}, {high}]"
            short = "IQM" if key == "interquartile_mean" else name.lower()
            table.add_row(short, "", "", "", "", ratio(estimate.value) + spread)
    return table


def _earlier_note(report: Report) -> str:
    commits = sorted({(run.git_commit or "unknown")[:8] for run in report.earlier})
    return f"\n* {EARLIER}: commit {', '.join(commits)}" if commits else ""


def _normalised(game: GameScore) -> np.ndarray:
    return np.array([run.human_normalised_score for run in game.runs], dtype=np.float64)


def _render(report: Report, fingerprint: str) -> dict[str, bytes]:
    """Every file of the report but the stamp, by its path in the report's folder."""
    label = report.label
    figures = dict(draw(report.games, report.baselines, report.aggregates, label))
    rows = _rows(report)
    files = {f"figures/{name}": text.encode() for name, text in figures.items()}
    files["scores.csv"] = _csv(rows)
    files["scores.parquet"] = _parquet(rows, report, fingerprint)
    files["aggregates.json"] = canonical_json(_aggregates_document(report)).encode()
    files["metrics.json"] = canonical_json(_metrics_document(report)).encode()
    context = _context(report, fingerprint, set(figures))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drama.report"), undefined=jinja2.StrictUndefined,
        autoescape=lambda name: bool(name and name.endswith((".html.j2", ".css.j2"))),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number, "ratio": ratio, "interval": interval, "duration": duration,
        "method": method_name, "integer": integer,
        "known": lambda value: DASH if value is None else integer(value),
    }  # fmt: skip
    for template, name in (("report.md.j2", "report.md"), ("index.html.j2", "index.html")):
        files[name] = environment.get_template(template).render(context).encode()
    return files


def _context(report: Report, fingerprint: str, figures: set[str]) -> dict[str, Any]:
    baselines, games = report.baselines, report.games
    scored = [game.game for game in games if game.human_normalised_score is not None]
    runs = [run for game in games for run in game.runs]
    shown = set(baselines.methods)
    families = {
        family: [method for method in methods if method in shown]
        for family, methods in FAMILIES.items()
    }
    return {
        "report": report, "baselines": baselines, "games": games, "runs": runs, "scored": scored,
        "aggregates": report.aggregates, "aggregate_names": AGGREGATES, "families": families,
        "comparison": _comparison(report, scored, families), "figures": figures,
        "all_games": len(scored) == len(baselines.games), "fingerprint": fingerprint,
        "single_source": [game for game in scored if game in baselines.single_source],
        "unpublished": [m for methods in FAMILIES.values() for m in methods if m not in shown],
        "notes": _notes(report, runs, scored), "repetitions": BOOTSTRAP_REPETITIONS,
        "scored_by": _scored_by(runs), "beside": _beside(runs),
        "training_episodes": TRAINING_EPISODES,
        "seeds": _range([len(game.runs) for game in games]),
        "steps": _range([run.steps for run in runs]),
        "episodes": _range([run.episodes for run in runs]),
        "commits": sorted({run.git_commit for run in runs if run.git_commit}),
        "protocol": {"steps": PROTOCOL_STEPS, "episodes": PROTOCOL_EPISODES,
                     "seeds": PROTOCOL_SEEDS},
        "DRAMA": DRAMA, "EARLIER": EARLIER,
        "title": f"Drama on {'Atari 100k' if scored else ', '.join(g.game for g in games)}",
    }  # fmt: skip


def _scored_by(runs: Sequence[RunScore]) -> str:
    """How the actions behind the scores were chosen, for reading."""
    return " or ".join(sorted({run.actions for run in runs}))


def _beside(runs: Sequence[RunScore]) -> list[Actions]:
    """The ways to choose actions that were played and are not every run's score already."""
    played = {way for run in runs for way in run.played}
    return [way for way in WAYS if way in played and any(run.actions != way for run in runs)]


def _comparison(
    report: Report, scored: list[str], families: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Rows of the comparison: aggregates of the games' means, the same games for everyone."""
    baselines = report.baselines
    means = [g.human_normalised_score for g in report.games if g.human_normalised_score is not None]
    own = aggregate([np.array([mean]) for mean in means]) if means else None
    complete = len(scored) == len(baselines.games)
    rows: list[dict[str, Any]] = [
        {"name": "These runs", "family": "", "same": own, "all": own if complete else None,
         "kind": "ours", "single_source": False}
    ]  # fmt: skip
    for family, methods in families.items():
        for method in methods:
            rows.append({
                "name": method_name(method), "family": family,
                "same": published_aggregates(baselines, method, scored),
                "all": published_aggregates(baselines, method, baselines.games),
                "kind": "drama" if method == DRAMA else "",
                "single_source": method == DRAMA,
            })  # fmt: skip
    return rows


def _notes(report: Report, runs: Sequence[RunScore], scored: list[str]) -> list[str]:
    """What a reader has to know about these particular runs."""
    notes = []
    seeds = [len(game.runs) for game in report.games]
    others = [game.game for game in report.games if game.human_normalised_score is None]
    if scored and len(scored) < len(report.baselines.games):
        notes.append(
            f"{len(scored)} of the benchmark's {len(report.baselines.games)} games: aggregates "
            "over so few are not those of the benchmark."
        )
    if others:
        notes.append(
            f"{', '.join(others)}: no published reference values, hence no human-normalised score "
            "and no part in the aggregates."
        )
    if min(seeds) < PROTOCOL_SEEDS:
        notes.append(
            f"{_range(seeds)} {'seed' if max(seeds) == 1 else 'seeds'} per game, where the "
            f"protocol has {PROTOCOL_SEEDS}."
        )
    if report.aggregates is not None:
        notes += _interval_notes([g for g in report.games if g.game in scored])
    off = [r for r in runs if (r.steps, r.episodes) != (PROTOCOL_STEPS, PROTOCOL_EPISODES)]
    if off:
        notes.append(
            f"{_range([run.steps for run in runs])} agent steps and "
            f"{_range([run.episodes for run in runs])} evaluation episodes per run, where the "
            f"protocol has {integer(PROTOCOL_STEPS)} and {PROTOCOL_EPISODES}."
        )
    return notes + _episode_notes(runs) + _code_notes(report, runs)


def _code_notes(report: Report, runs: Sequence[RunScore]) -> list[str]:
    notes = []
    if report.earlier:
        notes.append(
            f"{len(report.earlier)} of {count(len(runs), 'run')} or their evaluations are of "
            "earlier code than was planned, with the same settings; the table of runs marks them."
        )
    commits = {run.git_commit for run in runs}
    if len({commit and commit.removesuffix("-dirty") for commit in commits}) > 1:
        notes.append("The runs were made at different commits; the table of runs shows which.")
    if any(commit and commit.endswith("-dirty") for commit in commits):
        notes.append("Some runs were made from a working tree with changes not committed (dirty).")
    return notes


def _episode_notes(runs: Sequence[RunScore]) -> list[str]:
    """What a mean over evaluation episodes stands on, where that is less than it seems."""
    notes = []
    for way in WAYS:
        played = [(run, run.played[way]) for run in runs if way in run.played]
        same = [run for run, found in played if found.all_same]
        if same:
            notes.append(
                f"All {way} episodes are one and the same in {_names(same)}: such a mean says no "
                "more than a single episode."
            )
        early = [run for run, found in played if found.episodes < found.asked]
        if early:
            counts = [_range([getattr(run.played[way], name) for run in early])
                      for name in ("episodes", "asked")]  # fmt: skip
            notes.append(
                f"{counts[0]} {way} episodes, where {counts[1]} were asked for, in "
                f"{_names(early)}: evaluation stopped there, the first being all the same."
            )
        cut = sum(found.truncated for _, found in played)
        if cut:
            notes.append(
                f"{cut} of {sum(found.episodes for _, found in played)} {way} episodes were "
                f"truncated, in {_names([run for run, found in played if found.truncated])}."
            )
    return notes


def _names(runs: Sequence[RunScore]) -> str:
    """Runs for reading: "Krull (seeds 0, 2), Pong (seed 1)"."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.game, []).append(str(run.seed))
    return ", ".join(
        f"{game} (seed{'s' * (len(numbers) > 1)} {', '.join(numbers)})"
        for game, numbers in seeds.items()
    )


def _interval_notes(games: Sequence[GameScore]) -> list[str]:
    counts = [len(game.runs) for game in games]
    single = [game.game for game in games if len(game.runs) == 1]
    notes = []
    if single:
        which = "every game" if len(single) == len(games) else ", ".join(single)
        notes.append(
            f"No intervals: {which} has one seed, and one seed says nothing about its spread."
        )
    elif min(counts) < PROTOCOL_SEEDS:
        notes.append(
            f"The bootstrap redraws runs within a game. From {min(counts)} seeds there is little "
            "to redraw: read the intervals as too narrow."
        )
    if len(set(counts)) > 1:
        notes.append(
            "Games differ in their number of seeds. Each keeps the same weight in the aggregates, "
            "and is redrawn with its own number of seeds."
        )
    return notes


def _rows(report: Report) -> list[dict[str, Any]]:
    baselines = report.baselines
    return [
        {
            **{name: getattr(run, name) for name in SCHEMA.names if hasattr(run, name)},
            **{f"{way}_return": run.return_by(way) for way in WAYS},
            "preset": report.preset,
            "reproduction": report.reproduction,
            "random": baselines.random.get(run.game),
            "human": baselines.human.get(run.game),
            "drama_published": baselines.published(DRAMA, run.game),
        }
        for game in report.games
        for run in game.runs
    ]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({n: _word(value) for n, value in row.items()} for row in rows)
    return buffer.getvalue().encode()


def _word(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _parquet(rows: list[dict[str, Any]], report: Report, fingerprint: str) -> bytes:
    origin = {
        "format": FORMAT, "fingerprint": fingerprint, "preset": report.preset,
        "reproduction": report.reproduction,
    }  # fmt: skip
    schema = SCHEMA.with_metadata({b"drama": json.dumps(origin, sort_keys=True).encode()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    return buffer.getvalue()


def _aggregates_document(report: Report) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "preset": report.preset,
        "reproduction": report.reproduction,
        "aggregates": asdict(report.aggregates) if report.aggregates else None,
        "games": {
            game.game: {
                "runs": len(game.runs),
                "mean_return": game.mean_return,
                **{f"{way}_return": game.return_by(way) for way in WAYS},
                "training_return": game.training_return,
                "human_normalised_score": game.human_normalised_score,
            }
            for game in report.games
        },
    }


def _metrics_document(report: Report) -> dict[str, Any]:
    """The few numbers that tools compare between versions: no text, no intervals."""
    found = asdict(report.aggregates) if report.aggregates else {}
    aggregates = {name: found[name]["value"] for name, _ in AGGREGATES if name in found}
    games = {game.game: game.human_normalised_score for game in report.games}
    return {**aggregates, "human_normalised_score": games}


def _replace(
    folder: Path, files: dict[str, bytes], stamp: Path, fingerprint: str, report: Report
) -> None:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report-*.json"):
        old.unlink()
    for old in (folder / "figures").glob("*.svg"):
        if f"figures/{old.name}" not in files:
            old.unlink()
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    document = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "preset": report.preset,
        "reproduction": report.reproduction,
        "files": [
            {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
        ],
    }
    write_json(stamp, document)


def number(value: float | None) -> str:
    """A return for reading: one decimal below 10 000, digits in groups of three."""
    if value is None:
        return DASH
    text = f"{value:z,.1f}" if abs(value) < 10_000 else f"{value:,.0f}"
    return typeset(text)


def ratio(value: float | None) -> str:
    """A human-normalised score for reading: three decimals."""
    return DASH if value is None else typeset(f"{value:z.3f}")


def interval(estimate: Estimate) -> str | None:
    """An estimate's interval for reading; None where there is none."""
    if estimate.low is None or estimate.high is None:
        return None
    return f"{ratio(estimate.low)} to {ratio(estimate.high)}"


def duration(seconds: float) -> str:
    """A wall time for reading, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def integer(value: int) -> str:
    """A count for reading, digits in groups of three."""
    return typeset(f"{value:,}")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return integer(low) if low == high else f"{integer(low)} to {integer(high)}"
