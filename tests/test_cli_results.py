"""The `drama` command: scores held to a bound, places that hold no results, what is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from workspace import Command, Workspace

from drama.files import write_parquet


@pytest.mark.parametrize(
    ("bounds", "code", "verdicts"),
    [
        (["--at-least", "0.9"], 1, ["ok     Catch8 seed 0", "MISSED Catch8 seed 1"]),
        (["--at-least", "0.5"], 0, ["ok     Catch8 seed 0", "ok     Catch8 seed 1"]),
        (
            ["--mean-below", "0.7"],
            1,
            ["ok     Catch8 seed 0", "MISSED all runs: mean return 0.700"],
        ),
        (["--mean-below", "0.71"], 0, ["ok     all runs: mean return 0.700"]),
    ],
)
def test_check_holds_every_run_to_its_bound(
    drama: Command, tmp_path: Path, bounds: list[str], code: int, verdicts: list[str]
) -> None:
    columns = {"game": ["Catch8", "Catch8"], "seed": [0, 1], "mean_return": [0.9, 0.5]}
    write_parquet(tmp_path / "report/scores.parquet", pa.table(columns))
    exit_code, output, _ = drama("check", str(tmp_path), *bounds)
    assert exit_code == code
    assert all(verdict in output for verdict in verdicts), output


def test_check_asks_for_a_bound_and_a_report(drama: Command, tmp_path: Path) -> None:
    assert drama("check", str(tmp_path))[0] == 2
    plan = tmp_path / "recipes/report.json"
    plan.parent.mkdir()
    plan.write_text("{}")
    code, _, errors = drama("check", str(tmp_path), "--mean-below", "1")
    assert code == 1
    assert "scores.parquet: no scores there (not found). `drama report" in errors
    for table, said in (
        (pa.table({"game": ["Pong"], "seed": [0]}), "mean_return: missing"),
        (pa.table({"game": [], "seed": [], "mean_return": []}), "it lists no run"),
        (pa.table({"game": ["Pong"], "seed": [0], "mean_return": [None]}), "a valid number"),
    ):
        write_parquet(tmp_path / "report/scores.parquet", table)
        code, _, errors = drama("check", str(tmp_path), "--mean-below", "1")
        assert code == 1 and said in errors and "no scores there (" in errors, errors


# --- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["report"],
        ["check", "--at-least", "1"],
        ["status"],
        ["campaign"],
        ["verify"],
        ["export"],
        ["record"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("place", "said"), [("README.md", "a file"), ("nowhere", "not found"),
                                             ("empty", "no ")])  # fmt: skip
def test_a_place_that_holds_no_results_is_said_to(
    drama: Command, workspace: Workspace, command: list[str], place: str, said: str
) -> None:
    (workspace.root / "README.md").write_text("# A file\n")
    (workspace.root / "empty").mkdir()
    before = workspace.tree()
    code, output, errors = drama(*command, place)
    if [*command, place] == ["record", "empty"]:
        assert (code, errors) == (0, "nothing recorded: DVC is not set up here (no "
                                  ".dvc/config)\n")  # fmt: skip
        return
    said = "no whole run" if command[0] in ("verify", "export") and said == "a file" else said
    assert code == 2 and output == "" and errors.startswith(f"{place}: {said}"), errors
    assert "such as results/" in errors and f"--preset {place}" not in errors
    assert workspace.tree() == before


def test_an_extra_that_is_not_installed_is_named(
    drama: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith(("drama.report", "jinja2"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, output, errors = drama("report", "results/quick")
    assert (code, output) == (1, "")
    extras = "pip install 'drama-world-model[report,workflow]'"
    assert errors == f"jinja2 is not installed here; `{extras}` brings it\n"


def test_only_a_presets_name_is_suggested(drama: Command) -> None:
    errors = drama("report", "results/quick")[2]
    assert "results/quick: not found" in errors and "`drama plan --preset quick` makes" in errors


def test_the_systems_errors_are_told_in_words(
    drama: Command, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace.root / "results").mkdir()
    (workspace.root / "results/tiny").write_text("in the way")
    code, _, errors = drama("plan")
    assert code == 1 and "Errno" not in errors and "Error" not in errors, errors
    assert re.match(r"results/tiny\S*: a file lies where a folder should\. When that is", errors)
