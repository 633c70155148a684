"""drama.report.page: the report's files, their labels, their order, their sameness."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from report_files import write_evaluation, write_results
from rich.console import Console

from drama.errors import ConfigurationError
from drama.report import Report, ReportError, console_table, read_returns, write_report
from drama.report.scores import PROTOCOL_STEPS

RETURNS = {"Pong": [[-20.0, -18.0], [-21.0, -20.4]], "Boxing": [[1.0, 3.0, 5.0], [0.1, 0.1, 0.1]]}
LABEL = "preset quick: not a reproduction"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, links and text, and holds that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.words += data + " "


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def csv_of(report: Report) -> list[dict[str, str]]:
    return list(csv.DictReader(report.path.with_name("scores.csv").read_text().splitlines()))


def printed(report: Report, width: int = 80) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(console_table(report))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(write_results(tmp_path_factory.mktemp("a") / "quick", RETURNS))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    results = tmp_path_factory.mktemp("b") / "xs"
    returns = {"Krull": [[9000.0] * 100], "Catch8": [[1.0] * 100] * 2}
    write_results(results, returns, preset="xs", complete=True, steps=PROTOCOL_STEPS)
    return write_report(results)


# -- what is written --------------------------------------------------------------------------


def test_the_report_is_whole(quick: Report) -> None:
    folder = quick.path.parent
    figures = {f"figures/{kind}-{game}.svg" for kind in ("returns", "losses") for game in RETURNS}
    assert set(contents(folder)) == figures | {
        "index.html", "report.md", "scores.csv", "scores.parquet", "aggregates.json",
        "metrics.json", "figures/aggregates.svg", "figures/scores.svg", "figures/returns.svg",
        quick.stamp.name,
    }  # fmt: skip


def test_the_stamp_names_the_plan_and_every_file(quick: Report) -> None:
    folder = quick.path.parent
    plan = (folder.parent / "recipes" / "report.json").read_bytes()
    fingerprint = hashlib.sha256(plan).hexdigest()
    assert quick.stamp == folder / f"report-{fingerprint[:16]}.json"
    stamp = json.loads(quick.stamp.read_text())
    assert stamp["fingerprint"] == fingerprint
    for file in stamp["files"]:
        content = (folder / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert {file["path"] for file in stamp["files"]} == set(contents(folder)) - {quick.stamp.name}


def test_csv_and_parquet_hold_the_same_runs(quick: Report) -> None:
    rows = csv_of(quick)
    table = pq.read_table(quick.path.parent / "scores.parquet")
    assert list(rows[0]) == table.column_names
    assert [(row["game"], int(row["seed"])) for row in rows] == [
        ("Pong", 0), ("Pong", 1), ("Boxing", 0), ("Boxing", 1)
    ]  # fmt: skip
    assert [float(row["mean_return"]) for row in rows] == table["mean_return"].to_pylist()
    assert table["mean_return"].to_pylist() == pytest.approx([-19.0, -20.7, 3.0, 0.1])
    assert table["human_normalised_score"].to_pylist() == pytest.approx(
        [1.7 / 35.3, 0.0, 2.9 / 12.0, 0.0], abs=1e-12
    )


def test_a_written_report_is_read_back(quick: Report, tmp_path: Path) -> None:
    games, seeds, means = zip(*read_returns(quick.path.parents[1]), strict=True)
    assert (games, seeds) == (("Pong", "Pong", "Boxing", "Boxing"), (0, 1, 0, 1))
    assert means == pytest.approx((-19.0, -20.7, 3.0, 0.1))
    with pytest.raises(ConfigurationError, match=r"nowhere: not found"):
        read_returns(tmp_path / "nowhere")


def test_the_page_is_sound_html_and_needs_nothing_from_elsewhere(quick: Report) -> None:
    text = quick.path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert "url(" not in text and "@import" not in text
    ids = {attributes["id"] for _, attributes in page.attributes if "id" in attributes}
    for tag, attributes in page.attributes:
        target = attributes.get("src") or attributes.get("href")
        if target and target.startswith("#"):
            assert target[1:] in ids, f"{target} leads nowhere"
        elif target:
            assert (quick.path.parent / target).is_file(), target
        if tag == "img":
            assert attributes.get("alt")
    assert page.tags["img"] == 6


def test_the_page_shows_scores_and_where_they_come_from(quick: Report) -> None:
    words = Page(quick.path.read_text(encoding="utf-8")).words
    run = quick.games[0].runs[0]
    for part in ("\u221219.9", "0.024", run.run[:8], run.evaluation[:8], "abcdef01", "1 h 02 min",
                 "sticky actions", "Interquartile mean", "DreamerV3 (2023)", "BBF", "0.270",
                 "TWISTER"):  # fmt: skip
        assert part in words, part


def test_single_source_values_are_marked(quick: Report, full: Report) -> None:
    text = quick.path.read_text(encoding="utf-8")
    marked = [line for line in text.splitlines() if "†" in line and line.startswith("<tr>")]
    # Pong's return and score in the table of games, its return in the table of methods.
    assert [line.count("†") for line in marked] == [2, 1]
    assert all("<th>Pong</th>" in line for line in marked)
    assert 'id="single-source"' in text
    assert 'id="single-source"' not in full.path.read_text(encoding="utf-8")
    assert "| 15.0 † |" in quick.path.with_name("report.md").read_text(encoding="utf-8")


def test_markdown_tables_are_rectangular(quick: Report) -> None:
    text = quick.path.with_name("report.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    for target in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (quick.path.parent / target).is_file()


# -- nobody takes it for a reproduction -------------------------------------------------------


def test_reduced_runs_are_labelled_everywhere(quick: Report) -> None:
    folder = quick.path.parent
    text = quick.path.read_text(encoding="utf-8")
    headings = re.findall(r"<h[12][ >].*?</h[12]>", text)
    assert len(headings) >= 6
    unlabelled = [heading for heading in headings if LABEL not in heading]
    assert unlabelled == ['<h2 id="reading">What the numbers mean</h2>']
    assert LABEL in re.findall(r"<title>(.*?)</title>", text)[0]
    assert "Not a reproduction of Drama" in text
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert LABEL in markdown.splitlines()[0]
    assert "Not a reproduction" in markdown.splitlines()[2]
    for row in csv_of(quick):
        assert (row["preset"], row["reproduction"]) == ("quick", "false")
    table = pq.read_table(folder / "scores.parquet")
    assert set(table["reproduction"].to_pylist()) == {False}
    assert json.loads(table.schema.metadata[b"drama"])["reproduction"] is False
    for name in ("aggregates.json", quick.stamp.name):
        assert json.loads((folder / name).read_text())["reproduction"] is False
    for path in (folder / "figures").iterdir():
        assert LABEL in path.read_text(encoding="utf-8"), path
    assert LABEL in printed(quick)


def test_full_protocol_runs_are_not(full: Report) -> None:
    assert full.reproduction and full.label is None
    for name in ("index.html", "report.md"):
        text = (full.path.parent / name).read_text(encoding="utf-8")
        assert "not a reproduction" not in text.lower()
    assert "reproduction" not in printed(full)
    assert {row["reproduction"] for row in csv_of(full)} == {"true"}


# -- games without reference, single seeds ----------------------------------------------------


def test_a_game_without_reference_is_shown_raw(full: Report) -> None:
    words = Page(full.path.read_text(encoding="utf-8")).words
    assert "Catch8: no published reference values" in words
    assert "No intervals: every game has one seed" in words
    assert full.aggregates is not None and full.aggregates.games == 1
    rows = csv_of(full)
    assert rows[1]["game"] == "Catch8" and rows[1]["human_normalised_score"] == ""
    table = pq.read_table(full.path.parent / "scores.parquet")
    assert table["human_normalised_score"].to_pylist()[1:] == [None, None]


def test_an_atari_game_outside_the_benchmark_is_shown_raw(tmp_path: Path) -> None:
    """Beside others it counts nowhere; under an ablation's preset, which is named."""
    returns = {"Krull": [[9000.0] * 100], "SpaceInvaders": [[500.0] * 100]}
    results = tmp_path / "xs-as-published"
    write_results(results, returns, preset="xs-as-published", complete=True, steps=PROTOCOL_STEPS)
    report = write_report(results)
    words = Page(report.path.read_text(encoding="utf-8")).words
    assert "SpaceInvaders: no published reference values" in words
    assert report.aggregates is not None and report.aggregates.games == 1
    assert report.label is None and "preset xs-as-published" in words
    rows = csv_of(report)
    assert [row["human_normalised_score"] == "" for row in rows] == [False, True]
    assert rows[1]["mean_return"] == "500.0" and rows[1]["preset"] == "xs-as-published"
    text = (report.path.parent / "report.md").read_text(encoding="utf-8")
    assert "`xs-as-published`" in text and "reproduction" not in text.lower()


def test_a_report_without_any_reference(tmp_path: Path) -> None:
    report = write_report(write_results(tmp_path / "quick", {"Catch8": [[1.0, -1.0]]}))
    page = Page(report.path.read_text(encoding="utf-8"))
    assert report.aggregates is None
    assert "Drama on Catch8" in page.words and "Beside published" not in page.words
    assert "Catch8" in printed(report)


# -- what a score stands on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Greedy episodes, for Pong all the same and stopped early, with sampled ones beside them."""
    results = write_results(tmp_path_factory.mktemp("c") / "laptop", RETURNS, preset="laptop")
    for game, seeds in RETURNS.items():
        for seed, returns in enumerate(seeds):
            early = {"episodes": 9, "enough_same": 2} if game == "Pong" else {}
            names = hashed(f"run {game} {seed}"), hashed(f"evaluation {game} {seed}")
            write_evaluation(
                results / f"runs/{game}/seed{seed}", game, seed, *names, returns,
                beside=[4.5] * len(returns), same=game == "Pong", settings=early,
                truncated=2 if game == "Boxing" and seed == 1 else 0,
            )  # fmt: skip
    return write_report(results)


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rows_of(text: str, heading: str) -> list[dict[str, str]]:
    """The first Markdown table below a heading, a mapping per row; headings must be different."""
    lines = re.search(rf"## {heading}\n(?:.*\n)*?((?:\|.*\n)+)", text)[1].splitlines()  # type: ignore[index]
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_both_ways_are_named_per_game_and_per_run(both: Report) -> None:
    text = both.path.with_name("report.md").read_text(encoding="utf-8")
    games = {row["game"]: row for row in rows_of(text, "Scores per game")}
    for game, greedy in (("Pong", "\u221219.9"), ("Boxing", "1.6")):
        assert games[game]["mean return, greedy actions"] == greedy
        assert games[game]["mean return, sampled actions"] == "4.5"
        assert games[game]["last training episodes"] == "2.2"
    runs = rows_of(text, "Every run")
    assert [row["episodes"] for row in runs] == ["2", "2", "3", "3"]
    assert [row["different, greedy"] for row in runs] == ["1", "1", "3", "3"]
    assert [row["different, sampled"] for row in runs] == ["1", "1", "3", "3"]
    assert [row["truncated"] for row in runs] == ["0", "0", "0", "2"]
    table = pq.read_table(both.path.with_name("scores.parquet")).to_pylist()
    assert [row["different"] for row in table] == [1, 1, 3, 3]
    for row in table:
        assert (row["actions"], row["sampled_return"]) == ("greedy", 4.5)
        assert row["greedy_return"] == row["mean_return"] != row["training_return"]
    page = Page(both.path.read_text(encoding="utf-8")).words
    for words in ("Mean return, greedy actions", "Mean return, sampled actions"):
        assert page.count(words) == 2, "per game and per run"
    assert "Last training episodes" in page and "last 10 that ended while training" in page


def test_episodes_that_are_all_the_same_or_cut_off_are_said(both: Report, quick: Report) -> None:
    for path in (both.path, both.path.with_name("report.md")):
        text = path.read_text(encoding="utf-8")
        assert "All greedy episodes are one and the same in Pong (seeds 0, 1):" in text
        assert "2 greedy episodes, where 9 were asked for, in Pong (seeds 0, 1)" in text
        assert "2 of 10 greedy episodes were truncated, in Boxing (seed 1)." in text
        assert "same in Boxing" not in text
    text = quick.path.read_text(encoding="utf-8")
    assert "one and the same in" not in text and "were truncated" not in text


def test_what_was_played_beside_the_score_has_a_column_on_the_terminal(
    both: Report, quick: Report
) -> None:
    for report, names in (
        (both, "return sampled human Drama"),
        (quick, "return random human Drama"),
    ):
        text = printed(report)
        (head,) = (line for line in text.splitlines() if line.startswith(" game"))
        assert head.split() == ["game", *names.split(), "human-normalised"]
        assert "return: greedy actions; Drama: as published" in text
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text
        for part in ("Pong", "\u221219.9", "0.024", "optimality gap", "IQM"):
            assert part in text


# -- the same bytes, and never half a report --------------------------------------------------


def test_another_process_elsewhere_writes_the_same_bytes(quick: Report, tmp_path: Path) -> None:
    results = write_results(tmp_path / "elsewhere" / "quick", RETURNS)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    program = (
        "import sys; from pathlib import Path; from drama.report import write_report;"
        "write_report(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(results)], check=True, env=environment)
    assert contents(results / "report") == contents(quick.path.parent)


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    results = write_results(tmp_path / "quick", {"Catch8": [[1.0]]})
    report = write_report(results)
    before = contents(report.path.parent)
    next((results / "runs").rglob("evaluation-*.parquet")).write_bytes(b"")
    with pytest.raises(ReportError, match=r"drama evaluate .*Catch8/seed0\.json"):
        write_report(results)
    assert contents(report.path.parent) == before


def test_a_report_broken_off_has_no_stamp(tmp_path: Path) -> None:
    results = write_results(tmp_path / "quick", {"Catch8": [[1.0]]})
    report = write_report(results)
    report.path.unlink()
    report.path.mkdir()  # the last file but the stamp cannot be put in place
    with pytest.raises(OSError):
        write_report(results)
    assert not list(report.path.parent.glob("report-*.json"))
    assert not [path for path in contents(report.path.parent) if "/." in path or path[0] == "."]


def test_a_new_plan_replaces_stamp_and_figures(tmp_path: Path) -> None:
    results = write_results(tmp_path / "quick", {"Catch8": [[1.0]], "Catch16": [[0.0]]})
    old = write_report(results)
    path = results / "recipes" / "report.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "runs": plan["runs"][:1]}))
    new = write_report(results)
    assert new.stamp != old.stamp
    assert [p.name for p in new.path.parent.glob("report-*.json")] == [new.stamp.name]
    assert {p.name for p in (new.path.parent / "figures").iterdir()} == {
        "returns-Catch8.svg", "losses-Catch8.svg",
    }  # fmt: skip
