"""What a call of Snakemake freezes: named by its content, read back or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import ROOT
from workspace import GAME, SEED, Workspace

from drama.errors import ConfigurationError
from drama.pipeline.campaign import Campaign, new_campaign, read_campaign
from drama.pipeline.recipes import plan, read_evaluation_recipe, read_recipe

CONFIG = Path("config/config.yaml")


def campaign(**overrides: Any) -> Campaign:
    return new_campaign(ROOT, CONFIG, overrides, image=None)


def frozen(made: Campaign) -> dict[str, str]:
    files = (path for path in made.folder.rglob("*") if path.is_file())
    return {path.relative_to(made.folder).as_posix(): path.read_bytes().decode() for path in files}


def test_what_is_frozen_is_all_that_jobs_need(workspace: Workspace) -> None:
    made = campaign()
    assert not made.folder.exists() and not Path("results").exists()
    made.begin()
    assert frozen(made) == made.files
    names = {
        "Snakefile", "workflow/rules/train.smk", "drama/cli.py", "drama/pipeline/accepted.json",
        "drama/report/templates/index.html.j2", "drama/pipeline/shipped/containers/run.lock",
        f"recipes/{GAME}/seed{SEED}.json", "recipes/report.json",
    }  # fmt: skip
    assert names <= made.files.keys()
    assert not [name for name in made.files if "__pycache__" in name or "/shipped/config" in name]
    (run,) = made.runs.values()
    todays = made.results / f"recipes/{GAME}/seed{SEED}.json"
    assert run.recipe.is_relative_to(made.folder)
    assert run.recipe.read_bytes() == todays.read_bytes()


def test_its_name_is_that_of_its_content(workspace: Workspace) -> None:
    first = campaign()
    assert campaign().folder == first.folder
    others = [campaign(seeds=[1]), campaign(device="auto")]
    CONFIG.write_text(CONFIG.read_text().replace(f"{GAME}:", f"{GAME}: {{replay: {{alpha: 2}}}}"))
    others.append(campaign())
    assert len({made.folder for made in (first, *others)}) == 4
    for made in (first, *others):
        made.begin()
    assert frozen(first) == first.files, "others change nothing in it"


def test_a_job_reads_it_back(workspace: Workspace) -> None:
    made = campaign()
    made.begin()
    plan(CONFIG, settings=())  # whatever is planned meanwhile
    read = read_campaign(made.folder)
    assert read.runs == made.runs
    assert (read.command(), read.results) == (made.command(), made.results)
    before = workspace.tree()
    read.begin()
    assert workspace.tree() == before, "a job writes nothing of it"
    (run,) = read.runs.values()
    files = read_recipe(run.recipe)
    assert (files.folder, files.record, files.fingerprint) == (
        run.folder, run.record, run.fingerprint,
    )  # fmt: skip
    assert read_evaluation_recipe(files).path == run.evaluation


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"device": "tpu"}, {"runs": [["Pong"]]}, {"more": 1}, {"runs": []},
        {"image": "docker://example.org/other"}, {"image": "containers/images/../../other.sif"},
        {"runs": [["../../other", 0]]}, {"runs": [[GAME, -1]]}, {"runs": [["Pong", 0]]},
        {"backend": "$(touch seen)"}, {"deterministic": "; touch seen"},
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_one_is_refused(workspace: Workspace, change: dict[str, Any]) -> None:
    made = campaign()
    made.begin()
    path = made.folder / "campaign.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigurationError, match=r"campaign\.json: not a campaign"):
        read_campaign(made.folder)
    with pytest.raises(ConfigurationError, match="drama plan"):
        read_campaign(workspace.root)


def test_what_was_frozen_and_then_edited_is_not_used_again(workspace: Workspace) -> None:
    campaign().begin()
    campaign().begin()
    path = campaign().folder / "drama/cli.py"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigurationError, match=r"drama/cli\.py: not what an earlier call froze"):
        campaign().begin()
    path.unlink()
    with pytest.raises(ConfigurationError, match="Remove results/tiny/campaigns/"):
        campaign().begin()


def test_its_code_runs_and_names_the_commit_it_was_made_of(workspace: Workspace) -> None:
    made = campaign()
    made.begin()
    (made.folder / "drama/COMMIT").write_text("0123abcd-dirty\n")
    (workspace.root / "drama").mkdir()
    (workspace.root / "drama/__init__.py").write_text("raise SystemExit('from the checkout')\n")
    (workspace.root / "containers/run.lock").write_text("torch==0.0.1\n")
    asked = "import drama.runs.folder as f, drama.pipeline.fingerprints as p; print(" \
            "f.git_commit(), f.__file__, p.runtime())"  # fmt: skip
    script = made.command(sys.executable).replace("-m drama", f'-c "{asked}"')
    printed = subprocess.check_output(script, shell=True, text=True)
    commit, place, versions = printed.split()
    assert commit == "0123abcd-dirty" and Path(place).is_relative_to(made.folder.resolve())
    (run,) = made.runs.values()
    assert versions == json.loads(run.recipe.read_text())["runtime"]
