"""Reports while planned runs are missing: what they show, whom they name, that they say so."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_files import digest, plan_anew, write_results
from test_page import Page, contents, csv_of, printed
from workspace import Command

import drama.report.page
from drama.pipeline.artifacts.status import RunStatus
from drama.report import Report, ReportError, read_partial, read_returns, write_report
from drama.report.missing import grouped
from drama.runs.folder import locked

# Human-normalised by hand: Krull (random 1598, human 2665.5), Boxing (0.1, 12.1).
RETURNS = {
    "Krull": [[1598.0], [2665.5], [2131.75]],
    "Boxing": [[12.1], [0.1], [0.1]],
    "Pong": [[1.0], [1.0], [1.0]],
    "Catch8": [[1.0], [1.0], [1.0]],
}
SMALL = {"Pong": [[1.0], [1.0]]}


def write(place: Path, **options: Any) -> Path:
    return write_results(place, RETURNS, **options)


def write_small(place: Path, **options: Any) -> Path:
    return write_results(place, SMALL, **options)


def folder(results: Path, game: str, seed: int) -> Path:
    return results / f"runs/{game}/seed{seed}"


def remove(results: Path, game: str, seed: int, what: str = "*") -> None:
    """Take a run's files away: all, or those of a name."""
    for path in folder(results, game, seed).glob(what):
        path.unlink()


def say(results: Path, game: str, seed: int, state: str, step: int = 1250) -> None:
    """Write status.json as a trainer does; nobody holds the folder."""
    remove(results, game, seed)
    status = {
        "fingerprint": digest(f"run {game} {seed}"), "state": state, "step": step,
        "total_steps": 100_000, "steps_per_second": 9.0, "last_return": None, "wall_seconds": 1.0,
        "updated": "2026-01-01T00:00:00+00:00", "message": "",
    }  # fmt: skip
    (folder(results, game, seed) / "status.json").write_text(json.dumps(status))


def miss(results: Path) -> Path:
    """Leave 5 of 12 runs: Krull whole, two of Boxing, nothing of the others; each state once."""
    remove(results, "Boxing", 2, "evaluation-*")
    say(results, "Pong", 0, "running", 37_000)
    say(results, "Pong", 1, "stopped", 52_000)
    say(results, "Pong", 2, "failed")
    for seed in range(3):
        remove(results, "Catch8", seed)
    return results


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Report:
    results = write(tmp_path_factory.mktemp("a") / "xs", preset="xs", complete=True)
    return write_report(miss(results))


GROUPS = [
    "1 failed: Pong (seed 2 at step 1\u202f250 of 100\u202f000)",
    "1 stopped: Pong (seed 1 at step 52\u202f000 of 100\u202f000)",
    "1 under way: Pong (seed 0 at step 37\u202f000 of 100\u202f000)",
    "1 trained, not evaluated: Boxing (seed 2)",
    "3 waiting: Catch8",
]


def test_each_missing_run_is_named_by_its_state(partial: Report) -> None:
    page = Page(partial.path.read_text(encoding="utf-8"))
    digest_ = partial.path.with_name("report.md").read_text(encoding="utf-8")
    assert [str(group) for group in partial.missing_by_state] == GROUPS
    for group in GROUPS:
        assert group in page.words
        assert f"> - {group}\n" in digest_
    assert page.words.count("5 of 12 runs so far") == 1
    assert "`drama status`" not in digest_ and "drama status" in page.words
    assert "of 2 of 4 planned games" in page.words


def test_aggregates_are_of_the_runs_that_are_there_and_say_which(partial: Report) -> None:
    """By hand: Krull 0, 1 and 0.5, Boxing 1 and 0. Each game's mean is 0.5."""
    assert partial.aggregates is not None
    assert (partial.aggregates.games, partial.aggregates.runs) == (2, 5)
    assert partial.aggregates.mean.value == pytest.approx(0.5)
    for name in ("index.html", "report.md"):
        text = partial.path.with_name(name).read_text(encoding="utf-8")
        # Catch8 is planned, but has no reference values and no part in the aggregates.
        assert "ver 2 of 3 games and 5 of 9 runs" in text
        assert "So far 3 seeds in Krull; 2 seeds in Boxing." in text
        assert "26 games: aggregates over so few are not those of the benchmark." in text
    assert [row["game"] for row in csv_of(partial)] == ["Krull"] * 3 + ["Boxing"] * 2
    assert not list(partial.path.parent.glob("figures/*Pong*"))


def test_wherever_a_number_stands_the_report_says_that_it_is_partial(partial: Report) -> None:
    place, said = partial.path.parent, "5 of 12 runs"
    counts = {"done": 5, "planned": 12}
    headings = re.findall(r"<h[12][ >].*?</h[12]>", partial.path.read_text(encoding="utf-8"))
    assert [said in heading for heading in headings].count(False) == 1, "the glossary's"
    assert said in (place / "report.md").read_text(encoding="utf-8").splitlines()[0]
    for path in (place / "figures").iterdir():
        assert said in path.read_text(encoding="utf-8"), path
    for name in ("aggregates.json", partial.stamp.name):
        document = json.loads((place / name).read_text())
        assert (document["partial"], document["runs"]) == (True, counts)
        assert document["reproduction"] is False, "of the whole protocol, some runs are no such"
    assert json.loads((place / "metrics.json").read_text())["runs"] == counts
    table = pq.read_table(place / "scores.parquet")
    assert json.loads(table.schema.metadata[b"drama"])["runs"] == counts
    assert table["partial"].to_pylist() == [row["partial"] for row in csv_of(partial)] == [said] * 5
    shown = printed(partial)
    assert "Drama: 2 of 4 games, 2 to 3 seeds each" in shown and said in shown
    text = partial.path.read_text(encoding="utf-8")
    assert "ot a reproduction" not in text, "the settings are the protocol's"


def test_the_plans_stamp_is_for_whole_reports(partial: Report, tmp_path: Path) -> None:
    """Or Snakemake would take the plan's report for made."""
    name = f"report-{partial.fingerprint[:16]}-partial.json"
    assert [path.name for path in partial.path.parent.glob("report-*")] == [name]
    results = write_small(tmp_path / "quick")
    whole = write_report(results)
    before = contents(results / "report")
    kept = folder(results, "Pong", 1).rename(tmp_path / "kept")
    plan_anew(results, "Pong", 0)
    assert write_report(results).stamp.name == name.replace(
        partial.fingerprint[:16], whole.fingerprint[:16]
    )
    assert not whole.stamp.exists()
    kept.rename(folder(results, "Pong", 1))
    assert write_report(results).stamp.name.endswith("-earlier.json")
    assert before.keys() - contents(results / "report").keys() == {whole.stamp.name}


@pytest.mark.parametrize("reduced", [False, True])
def test_a_report_made_whole_is_the_same_as_one_made_at_once(tmp_path: Path, reduced: bool) -> None:
    options = {} if reduced else {"preset": "xs", "complete": True, "steps": 100_000}
    expected = write_report(write_small(tmp_path / "at once" / "xs", **options))
    results = write_small(tmp_path / "later" / "xs", **options)
    kept = folder(results, "Pong", 0).rename(tmp_path / "kept")
    assert write_report(results).partial == "1 of 2 runs"
    kept.rename(folder(results, "Pong", 0))
    whole = write_report(results)
    assert (whole.partial, whole.missing_by_state, whole.reproduction) == (None, [], not reduced)
    assert contents(results / "report") == contents(expected.path.parent)
    every = b"".join(contents(results / "report").values())
    assert b"partial" not in every and b"issing" not in every and b"of 2 runs" not in every


def test_one_run_is_enough(tmp_path: Path) -> None:
    results = write(tmp_path / "quick")
    for game in RETURNS:
        for seed in range(3):
            if (game, seed) != ("Catch8", 1):
                remove(results, game, seed)
    report = write_report(results)
    assert report.label == "preset quick: not a reproduction · 1 of 12 runs"
    assert report.aggregates is None and "Catch8" in printed(report)
    figure = (report.path.parent / "figures/returns-Catch8.svg").read_text(encoding="utf-8")
    lines = re.findall(r"<text[^>]*>([^<]* (?:runs|reproduction))<", figure)
    assert lines == ["preset quick: not a reproduction", "1 of 12 runs"], "a line each fits"
    assert [str(group) for group in report.missing_by_state] == [
        "11 waiting: Krull, Boxing, Pong, Catch8 (seeds 0, 2)"
    ]


def test_without_a_whole_run_there_is_none_and_the_error_says_how_they_are(tmp_path: Path) -> None:
    results = miss(write(tmp_path / "quick"))
    for game, seed in (("Krull", 0), ("Krull", 1), ("Krull", 2), ("Boxing", 0), ("Boxing", 1)):
        remove(results, game, seed)
    with pytest.raises(ReportError) as caught:
        write_report(results)
    said = str(caught.value)
    assert said.startswith(f"{results}: 12 runs planned and none of them trained and evaluated yet")
    # Nobody holds Pong's folder, and its status is of long ago.
    lost = GROUPS[2].replace("under way", "lost")
    waiting = "8 waiting: Krull, Boxing (seeds 0, 1), Catch8"
    assert said.splitlines()[1:-1] == [GROUPS[0], lost, GROUPS[1], GROUPS[3], waiting]
    assert f"drama status {results}" in said
    assert said.endswith(f"Run: drama evaluate {results}/recipes/Boxing/seed2.json")
    assert not (results / "report").exists()
    remove(results, "Boxing", 2)
    with pytest.raises(ReportError, match=r"Run: drama train .*/recipes/Krull/seed0\.json$"):
        write_report(results)


def test_damage_is_still_an_error_when_runs_are_missing(tmp_path: Path) -> None:
    results = miss(write(tmp_path / "quick"))
    (folder(results, "Krull", 0) / "episodes.parquet").write_bytes(b"")
    with pytest.raises(
        ReportError, match=r"1 of 12 runs cannot be reported on:\nKrull seed 0 is d"
    ):
        write_report(results)


def test_a_run_of_earlier_code_without_evaluation_is_not_evaluated(tmp_path: Path) -> None:
    results = write_small(tmp_path / "quick")
    plan_anew(results, "Pong", 0)
    (folder(results, "Pong", 0) / "evaluation.json").unlink()
    (group,) = write_report(results).missing_by_state
    assert str(group) == "1 trained, not evaluated: Pong (seed 0)"


def test_many_missing_games_are_cut_short() -> None:
    runs = [RunStatus(f"Game{number}", seed, "waiting") for number in range(30) for seed in (0, 1)]
    (group,) = grouped(runs[1:], [run.game for run in runs])
    assert group.runs == 59
    assert group.which.startswith("Game0 (seed 1), Game1, Game2, ")
    assert group.which.endswith("Game25, 4 games more")


def test_the_same_files_give_the_same_bytes_whoever_holds_a_run(
    partial: Report, tmp_path: Path
) -> None:
    results = miss(write(tmp_path / "xs", preset="xs", complete=True))
    with locked(folder(results, "Pong", 0)):
        write_report(results)
    assert contents(results / "report") == contents(partial.path.parent)


def test_a_partial_report_is_read_back_and_checked(
    partial: Report, drama: Command, tmp_path: Path
) -> None:
    results = partial.path.parents[1]
    assert len(read_returns(results)) == 5 and read_partial(results) == "5 of 12 runs"
    code, output, errors = drama("check", str(results), "--at-least", "0")
    assert (code, output.count("ok ")) == (0, 5)
    assert errors == "A partial report: 5 of 12 runs\n"
    whole = write_small(tmp_path / "quick")
    write_report(whole)
    assert read_partial(whole) is None
    assert drama("check", str(whole), "--at-least", "0")[::2] == (0, "")


def test_the_command_shows_what_is_missing(drama: Command, tmp_path: Path) -> None:
    results = miss(write(tmp_path / "quick"))
    code, output, errors = drama("report", str(results))
    assert (code, errors) == (0, "")
    assert output.splitlines()[-6:] == [*GROUPS, f"Report: {results}/report/index.html"]


def report_in_two_parts(results: Path, replacing: Any, go_on: Any) -> None:
    """Write a report, but wait before the first of its files."""
    usual: Callable[[Path], Any] = drama.report.page.replacing

    def slow(path: Path) -> Any:
        replacing.set()
        assert go_on.wait(60)
        return usual(path)

    drama.report.page.replacing = slow
    write_report(results)


def report_and_tell(results: Path, reading: Any) -> None:
    """Write a report, and say when reading begins."""
    usual = drama.report.page.read_report

    def read(*places: Path | None) -> Report:
        reading.set()
        return usual(*places)

    drama.report.page.read_report = read
    write_report(results)


def test_two_at_once_do_not_mix_their_files(tmp_path: Path) -> None:
    """The second begins while the first replaces files, waits for it, and sees a run more."""
    results = write_small(tmp_path / "quick")
    expected = contents(write_report(results).path.parent)
    kept = folder(results, "Pong", 0).rename(tmp_path / "kept")
    context = multiprocessing.get_context("fork")
    replacing, go_on, reading = context.Event(), context.Event(), context.Event()
    first = context.Process(target=report_in_two_parts, args=(results, replacing, go_on))
    first.start()
    assert replacing.wait(60)
    kept.rename(folder(results, "Pong", 0))
    second = context.Process(target=report_and_tell, args=(results, reading))
    second.start()
    assert not reading.wait(2)
    go_on.set()
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert contents(results / "report") == expected
