"""Runs of earlier code in a report: they stand in for planned ones, and are marked."""

from __future__ import annotations

import hashlib

import pyarrow.parquet as pq
import pytest
from report_files import plan_anew, write_results
from test_page import RETURNS, csv_of, printed

from drama.report import Report, write_report


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(write_results(tmp_path_factory.mktemp("a") / "quick", RETURNS))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Report:
    results = write_results(tmp_path_factory.mktemp("c") / "quick", RETURNS)
    plan_anew(results, "Pong", 0)
    return write_report(results)


def test_runs_of_earlier_code_are_marked_everywhere(earlier: Report) -> None:
    folder = earlier.path.parent
    rows = csv_of(earlier)
    assert [row["current"] for row in rows] == ["false", "true", "true", "true"]
    assert pq.read_table(folder / "scores.parquet")["current"].to_pylist()[:2] == [False, True]
    for text in (earlier.path.read_text(), (folder / "report.md").read_text()):
        assert text.count("1 of 4 runs or their evaluations are of earlier code") == 1
        (line,) = [
            line for line in text.splitlines() if "<strong>earlier" in line or "**ear" in line
        ]
        assert "Pong" in line and "abcdef01" in line
    table = printed(earlier)
    assert "Pong *" in table and "Boxing *" not in table
    assert "* earlier code: commit abcdef01" in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_report_of_planned_runs_marks_none(quick: Report) -> None:
    page, digest = (quick.path.with_name(name).read_text() for name in ("index.html", "report.md"))
    assert "earlier code" not in page + digest + printed(quick) and "Pong *" not in printed(quick)
    assert {row["current"] for row in csv_of(quick)} == {"true"}


def test_a_report_of_earlier_code_has_no_stamp_of_the_plans(earlier: Report) -> None:
    """Or Snakemake would take the plan's report for made."""
    plan = (earlier.path.parents[1] / "recipes/report.json").read_bytes()
    name = f"report-{hashlib.sha256(plan).hexdigest()[:16]}"
    assert [path.name for path in earlier.path.parent.glob("report-*.json")] == [
        f"{name}-earlier.json"
    ]
    assert earlier.stamp.name == f"{name}-earlier.json"
