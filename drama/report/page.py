"""The report's files: a page, a Markdown digest, the scores as tables, the figures, the stamp.

Everything is made in memory first, so that a run that cannot be read leaves an older report as it
was. Then the old stamp goes, the files are replaced one by one, and the new stamp is written last:
a folder with a stamp holds one whole report. No file holds a time of writing, so the same inputs
give the same bytes.

A report can be made from the first whole run on. One that lacks planned runs is *partial*: it says
so wherever a number stands, and its stamp has another name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.markup import escape
from rich.table import Table

from drama.agent.settings import WAYS, Actions
from drama.errors import reason
from drama.files import canonical_json, replacing, write_json
from drama.pipeline.config import no_plan
from drama.pipeline.names import Game, Seed
from drama.pipeline.plans import read_plan
from drama.reading import read_table
from drama.report.aggregates import AGGREGATES, BOOTSTRAP_REPETITIONS
from drama.report.contents import Report, read_report
from drama.report.figures import draw
from drama.report.missing import seeds_per_game
from drama.report.notes import notes
from drama.report.scores import (
    DRAMA,
    FAMILIES,
    PROTOCOL_EPISODES,
    PROTOCOL_STEPS,
    TRAINING_EPISODES,
    ReportError,
    RunScore,
    over_means,
    published_aggregates,
    scored,
)
from drama.report.words import count, duration, integer, interval, method_name, number, ratio, span
from drama.runs.folder import locked

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
PARTIAL = pa.field("partial", pa.string())
"""One more column, of partial reports alone: "37 of 130 runs" in every row."""


class _Row(BaseModel):
    """What of a row of scores.parquet is read back."""

    model_config = ConfigDict(strict=True)

    game: Game
    seed: Seed
    mean_return: Annotated[float, Field(allow_inf_nan=False)]
    partial: Annotated[str, Field(pattern=r"^[0-9]{1,9} of [0-9]{1,9} runs?$")] | None = None


def write_report(results: Path, recipes: Path | None = None) -> Report:
    """Write results/<preset>/report out of the runs that recipes/report.json lists.

    `results` is the folder results/<preset>, `recipes` another place of plan and recipes than
    there, such as a campaign's. One process at a time reads and writes there, so that
    no two mix their files and the later one has seen more. Raises ReportError, before anything is
    written, when a run is damaged or none is whole.
    """
    read_plan(results, recipes)  # or its error, before a lock is left where no results are
    with locked(results / "report"):
        report = read_report(results, recipes)
        _replace(report, _render(report))
    return report


def read_returns(results: Path) -> list[tuple[str, int, float]]:
    """Return game, seed and mean return of every run in the report of results/<preset>.

    Raises ReportError when there is no report, ConfigurationError when there are no results.
    """
    return _written(results)[0]


def read_partial(results: Path) -> str | None:
    """How many of the planned runs the report of results/<preset> shows; None when it shows all.

    Raises as `read_returns`.
    """
    return _written(results)[1]


def _written(results: Path) -> tuple[list[tuple[str, int, float]], str | None]:
    path = results / "report" / "scores.parquet"
    if not (path.is_file() or (results / "recipes" / "report.json").is_file()):
        raise no_plan(results)
    try:
        rows = [_Row.model_validate(row) for row in read_table(path, None).to_pylist()]
        if not rows:
            raise ValueError("it lists no run")
        return [(row.game, row.seed, row.mean_return) for row in rows], rows[0].partial
    except (OSError, ValueError, pa.ArrowException) as error:  # ValidationError is a ValueError
        raise ReportError(f"{path}: no scores there ({reason(error)}). `drama report {results}` "
                          "writes them") from None  # fmt: skip


def console_table(report: Report) -> Table:
    """The scores as a table for a terminal of 80 columns: a row per game, then the aggregates."""
    seeds = span([len(game.runs) for game in report.games])
    games = count(len(report.games), "game")
    if report.missing:
        games = f"{len(report.games)} of {count(report.planned_games, 'game')}"
    title = f"Drama: {games}, {seeds} seed{'s' * (seeds != '1')} each"
    if report.label:
        title += f"\n[bold red]{escape(report.label)}[/]"
    beside = _beside(report.runs)
    earlier = sorted({(r.git_commit or "unknown")[:8] for r in report.runs if not r.current})
    marked = f"\n* {EARLIER}: commit {', '.join(earlier)}" if earlier else ""
    references = ("random", "human", DRAMA)[len(beside) :]  # as many as there is room for
    table = Table(
        title=title,
        caption=f"return: {_scored_by(report.runs)} actions; Drama: as published{marked}",
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


def _render(report: Report) -> dict[str, bytes]:
    """Every file of the report but the stamp, by its path in the report's folder."""
    figures = dict(draw(report.games, report.baselines, report.aggregates, report.label))
    rows, schema = _rows(report), _schema(report)
    files = {f"figures/{name}": text.encode() for name, text in figures.items()}
    files["scores.csv"] = _csv(rows, schema)
    files["scores.parquet"] = _parquet(rows, schema)
    files["aggregates.json"] = canonical_json(_aggregates_document(report)).encode()
    files["metrics.json"] = canonical_json(_metrics_document(report)).encode()
    context = _context(report, set(figures))
    # Bandit knows no function here: pages are escaped, and Markdown is no HTML.
    environment = jinja2.Environment(  # nosec B701
        loader=jinja2.PackageLoader("drama.report"), undefined=jinja2.StrictUndefined,
        autoescape=lambda name: bool(name and name.endswith((".html.j2", ".css.j2"))),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    filters = (number, ratio, interval, duration, integer, method_name)
    environment.filters |= {function.__name__: function for function in filters}
    for template, name in (("report.md.j2", "report.md"), ("index.html.j2", "index.html")):
        files[name] = environment.get_template(template).render(context).encode()
    return files


def _context(report: Report, figures: set[str]) -> dict[str, Any]:
    baselines, games, runs = report.baselines, report.games, report.runs
    counted = [game.game for game in scored(games)]
    shown = set(baselines.methods)
    families = {
        family: [method for method in methods if method in shown]
        for family, methods in FAMILIES.items()
    }
    return {
        "report": report, "baselines": baselines, "games": games, "runs": runs, "scored": counted,
        "aggregates": report.aggregates, "aggregate_names": AGGREGATES, "families": families,
        "comparison": _comparison(report, families), "figures": figures,
        "all_games": len(counted) == len(baselines.games), "fingerprint": report.fingerprint,
        "single_source": [game for game in counted if game in baselines.single_source],
        "unpublished": [m for methods in FAMILIES.values() for m in methods if m not in shown],
        "notes": [*_uneven(report), *notes(games, baselines)], "repetitions": BOOTSTRAP_REPETITIONS,
        "over": _over(report), "scored_by": _scored_by(runs), "beside": _beside(runs),
        "training_episodes": TRAINING_EPISODES,
        "seeds": span([len(game.runs) for game in games]),
        "steps": span([run.steps for run in runs]),
        "episodes": span([run.episodes for run in runs]),
        "commits": sorted({run.git_commit for run in runs if run.git_commit}),
        "protocol": {"steps": PROTOCOL_STEPS, "episodes": PROTOCOL_EPISODES},
        "DRAMA": DRAMA, "EARLIER": EARLIER,
        "title": f"Drama on {'Atari 100k' if counted else ', '.join(g.game for g in games)}",
    }  # fmt: skip


def _over(report: Report) -> str:
    """Which games and runs the aggregates are over: "8 of 26 games and 37 of 130 runs"."""
    if report.aggregates is None:
        return ""
    games, runs = report.aggregates.games, report.aggregates.runs
    if not report.missing:
        return f"{count(games, 'game')} and {count(runs, 'run')}"
    planned = [run.game for run in report.planned if run.game in report.baselines.games]
    all_games, all_runs = count(len({*planned}), "game"), count(len(planned), "run")
    return f"{games} of {all_games} and {runs} of {all_runs}"


def _uneven(report: Report) -> list[str]:
    """Over which seeds a partial report goes, where games differ in them."""
    uneven = len({len(game.runs) for game in report.games}) > 1
    return [f"So far {seeds_per_game(report.games)}."] if report.missing and uneven else []


def _scored_by(runs: Sequence[RunScore]) -> str:
    """How the actions behind the scores were chosen, for reading."""
    return " or ".join(sorted({run.actions for run in runs}))


def _beside(runs: Sequence[RunScore]) -> list[Actions]:
    """The ways to choose actions that were played and are not every run's score already."""
    played = {way for run in runs for way in run.played}
    return [way for way in WAYS if way in played and any(run.actions != way for run in runs)]


def _comparison(report: Report, families: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Rows of the comparison: aggregates of the games' means, the same games for everyone."""
    baselines, games = report.baselines, scored(report.games)
    names = [game.game for game in games]
    own = over_means(games) if games else None
    complete = len(games) == len(baselines.games)
    return [
        {"name": "These runs", "family": "", "same": own, "all": own if complete else None,
         "kind": "ours", "single_source": False},
        *(
            {"name": method_name(method), "family": family,
             "same": published_aggregates(baselines, method, names),
             "all": published_aggregates(baselines, method, baselines.games),
             "kind": "drama" if method == DRAMA else "", "single_source": method == DRAMA}
            for family, methods in families.items()
            for method in methods
        ),
    ]  # fmt: skip


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
            **({"partial": report.partial} if report.partial else {}),
        }
        for run in report.runs
    ]


def _schema(report: Report) -> pa.Schema:
    origin = report.origin | {"fingerprint": report.fingerprint}
    schema = SCHEMA.append(PARTIAL) if report.partial else SCHEMA
    return schema.with_metadata({b"drama": json.dumps(origin, sort_keys=True).encode()})


def _csv(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, schema.names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        words = {name: str(v).lower() for name, v in row.items() if isinstance(v, bool)}
        writer.writerow(row | words)
    return buffer.getvalue().encode()


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    return buffer.getvalue()


def _aggregates_document(report: Report) -> dict[str, Any]:
    return {
        **report.origin,
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
    return {**aggregates, "human_normalised_score": games, **report.counts}


def _replace(report: Report, files: dict[str, bytes]) -> None:
    folder = report.path.parent
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
        **report.origin,
        "fingerprint": report.fingerprint,
        "files": [
            {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(files.items())
        ],
    }
    write_json(report.stamp, document)
