"""A plan is read back or refused: recipes/report.json as it should not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_files import write_results

from drama.errors import ConfigurationError
from drama.pipeline.plans import read_plan


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "quick", {"Pong": [[-20.0]]})


def test_without_a_plan_the_error_says_how_to_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="drama plan --preset quick"):
        read_plan(tmp_path / "quick")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"runs": []}, "it lists no run"),
        ({"runs": [{"game": "Pong"}]}, "missing"),
        ({"runs": 3}, "runs: "),
        ({"complete_protocol": "false"}, "complete_protocol: "),
        ({"complete_protocol": 1}, "complete_protocol: "),
    ],
)
def test_a_senseless_plan_is_refused(
    results: Path, change: dict[str, object], message: str
) -> None:
    path = results / "recipes" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigurationError, match=message):
        read_plan(results)


def test_a_run_listed_twice_is_refused(results: Path) -> None:
    path = results / "recipes" / "report.json"
    plan = json.loads(path.read_text())
    plan["runs"].append(plan["runs"][0])
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigurationError, match="Pong seed 0 more than once"):
        read_plan(results)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("game", "../../etc"), ("seed", "0"), ("seed", -1), ("run", "ab"), ("evaluation", "../x"),
        ("folder", "runs/Boxing/seed0"), ("folder", "/tmp"),
    ],
)  # fmt: skip
def test_a_plan_leads_nowhere_but_to_its_own_runs(results: Path, key: str, value: object) -> None:
    path = results / "recipes" / "report.json"
    plan = json.loads(path.read_text())
    plan["runs"][0][key] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(ConfigurationError, match="not a plan"):
        read_plan(results)
