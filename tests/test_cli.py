"""The `drama` command: exit codes, what it says, that a mistake writes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workspace import EXPERIMENT, GAME, SEED, Command, Workspace

from drama import __version__
from drama.cli import app
from drama.files import canonical_json, sha256_text, write_json
from drama.pipeline.recipes import read_recipe
from drama.runs.folder import locked

RECIPE = f"results/tiny/recipes/{GAME}/seed{SEED}.json"
NO_SUCH_GPU = f"cuda:{torch.cuda.device_count()}"


# --- help ----------------------------------------------------------------------------------------


def test_help_names_the_commands_and_exit_codes(drama: Command) -> None:
    for arguments in (["--help"], ["-h"], []):
        code, output, errors = drama(*arguments)
        text = output + errors
        assert all(word in text for word in ("plan", "train", "evaluate", "report", "75"))
        assert "arXiv 2410.08893" in text
        assert code == (0 if arguments else 2)


@pytest.mark.parametrize(
    ("command", "explained"),
    [
        ("plan", ["--config", "--preset", "--games", "--seeds", "--set", "config/config.yaml"]),
        (
            "train",
            [
                "recipe",
                "--device",
                "--backend",
                "--checkpoint-every",
                "--steps",
                "75",
                "superseded",
            ],
        ),
        (
            "evaluate",
            ["recipe", "--device", "--backend", "--threads", "evaluation-<fingerprint>.parquet"],
        ),
        ("report", ["results", "recipes/report.json"]),
    ],
)
def test_every_command_explains_itself(drama: Command, command: str, explained: list[str]) -> None:
    code, output, _ = drama(command, "--help")
    assert code == 0
    assert all(word in output for word in explained), output


def test_every_command_says_in_a_line_what_it_does(
    drama: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = re.findall(r"^│ ([a-z]+) +\S.*│$", drama("-h")[1], re.MULTILINE)
    assert set(listed) == {command.callback.__name__ for command in app.registered_commands}
    for command in listed:
        code, output, _ = drama(command, "-h")
        assert code == 0 and all(len(line) <= 80 for line in output.splitlines())


def test_the_version_is_said(workspace: Workspace) -> None:
    for command in ([Path(sys.executable).with_name("drama")], [sys.executable, "-m", "drama"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"drama {__version__}\n"), done


# --- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("pl", "plan"),
        ("plan --games Pong,Kr", "Pong,Krull"),
        ("plan --preset ti", "tiny"),
        ("plan --preset xs-as", "xs-as-published"),
        ("train --backend ma", "mamba_ssm"),
        ("train results/", ""),  # left to the shell, which completes files
    ],
)
def test_bash_completes_what_is_typed(workspace: Workspace, typed: str, completed: str) -> None:
    """As bash itself calls it, and without what takes long to import."""
    script = (
        "source <(drama --show-completion bash); COMP_WORDS=(drama $1); "
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); export PYTHONPROFILEIMPORTTIME=1; "
        '_drama_completion drama; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", typed], capture_output=True, text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == f"{completed}\n", done
    assert "drama.cli" in done.stderr
    assert not re.search(r"\| +(torch|ale_py|cv2|gymnasium)$", done.stderr, re.MULTILINE)


def test_games_that_can_be_named_are_listed(drama: Command) -> None:
    code, output, _ = drama("games")
    names = output.split()
    assert code == 0 and {"Pong", "SpaceInvaders", "Catch8"} < set(names) and len(names) > 100


# --- plan ----------------------------------------------------------------------------------------


def test_plan_says_what_it_planned(drama: Command, workspace: Workspace) -> None:
    code, output, errors = drama("plan")
    assert (code, errors) == (0, "")
    assert output == "1 run planned under preset tiny, 0 of them trained: results/tiny/recipes\n"
    assert workspace.recipe.exists()


def test_plan_takes_words_over_the_file(drama: Command, workspace: Workspace) -> None:
    arguments = ["--preset", "quick", "--games", "Pong, Krull", "--seeds", "4,5"]
    code, _, _ = drama("plan", *arguments, "--set", "behaviour.horizon=2", "--set", "replay.beta=0")
    assert code == 0
    recipes = workspace.root / "results/quick/recipes"
    assert {str(path.relative_to(recipes)) for path in recipes.glob("*/*[0-9].json")} == {
        "Pong/seed4.json", "Pong/seed5.json", "Krull/seed4.json", "Krull/seed5.json",
    }  # fmt: skip
    settings = read_recipe(recipes / "Krull/seed5.json").recipe.settings
    assert (settings.behaviour.horizon, settings.replay.beta) == (2, 0)


def test_a_whole_number_gives_the_same_recipe_however_it_is_written(
    drama: Command, workspace: Workspace
) -> None:
    written = []
    for number in ("1000", "1e3"):
        assert drama("plan", "--set", f"training.total_steps={number}")[0] == 0
        written.append(workspace.recipe.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("arguments", [["--games", "Pong"], ["--seeds", "0,1"]])
def test_plan_takes_games_or_seeds_alone(drama: Command, arguments: list[str]) -> None:
    code, output, errors = drama("plan", *arguments)
    assert (code, errors) == (0, "") and "planned under preset tiny" in output


WRONG_PLANS = [
    (["--config", "nowhere.yaml"], ["nowhere.yaml: cannot be read"]),
    (["--preset", "qick"], ["command line: preset = 'qick'", "Did you mean 'quick'"]),
    (["--preset", ""], ["command line: preset = ''"]),
    (["--games", "Pong,Krul"], ["command line: games.Krul", "Did you mean 'Krull'"]),
    (["--games", ""], ["command line: games.: unknown game"]),
    (["--games", "Pong,Pong"], ["command line: games = ['Pong', 'Pong']", "twice"]),
    (["--seeds", "0,x"], ["command line: seeds[1] = 'x'", "whole number"]),
    (["--seeds", ""], ["command line: seeds[0] = ''", "whole number"]),
    (["--seeds", "9" * 5000], ["command line: seeds[0] = ", "whole number"]),
    (["--seeds", "0,0"], ["command line: seeds = [0, 0]", "twice"]),
    (["--seeds", "-1"], ["command line: seeds[0] = -1", "at least 0"]),
    (["--set", "environment.actions=31"], ["--set: environment.actions = 31", "minimal, full"]),
    (["--set", "behaviour.horizon=-3"], ["--set: behaviour.horizon = -3", "at least 1"]),
    (["--set", "behaviour.horizn=3"], ["--set: behaviour.horizn = 3", "Did you mean 'horizon'"]),
    (["--set", "world_model.batch_size=500"], ["--set: world_model.batch_size = 500"]),
    (["--set", "training.total_steps=1.5"], ["= 1.5", "whole number"]),
    (["--set", "training.total_steps=1.0005e3"], ["= 1000.5", "whole number"]),
    (["--set", "training.total_steps=4e1"], ["--set: training.total_steps = 40", "random_steps"]),
    (["--set", "training.total_steps="], ["= None", "whole number"]),
    (["--set", "evaluation.enough_same=99"], ["--set: evaluation.enough_same = 99", "= 5; set"]),
    (["--set", "training"], ["--set training: expected section.key=value"]),
    (["--set", "training=[1"], ["--set training=[1", "not valid YAML"]),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG_PLANS, ids=lambda value: " ".join(value))
def test_a_wrong_plan_exits_with_2_and_writes_nothing(
    drama: Command, workspace: Workspace, arguments: list[str], said: list[str]
) -> None:
    before = workspace.tree()
    code, output, errors = drama("plan", *arguments)
    assert (code, output) == (2, "")
    assert all(word in errors for word in said), errors
    assert "Traceback" not in errors and "pydantic" not in errors
    assert workspace.tree() == before


@pytest.mark.parametrize(
    "arguments",
    [["pln"], ["train"], ["train", "a", "b"], ["train", "--speed", "3"], ["plan", "--set"],
     ["train", RECIPE, "--threads", "0"], ["train", RECIPE, "--checkpoint-every", "0"],
     ["train", RECIPE, "--threads", "two"], ["train", RECIPE, "--threads", "1025"],
     ["train", RECIPE, "--steps", "2e9"], ["train", RECIPE, "--steps", "1.5"],
     ["train", RECIPE, "--steps", "nan"], ["status", "--watch", "nan"],
     ["status", "--watch", "inf"], ["check", "results/tiny", "--at-least", "nan"],
     ["check", "results/tiny", "--at-least", "inf"],
     ["check", "results/tiny", "--mean-below", "nan"],
     ["check", "results/tiny", "--mean-below=-inf"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_with_2_and_writes_nothing(
    drama: Command, workspace: Workspace, arguments: list[str]
) -> None:
    before = workspace.tree()
    code, _, errors = drama(*arguments)
    assert code == 2 and "Error" in errors and "Traceback" not in errors
    assert workspace.tree() == before


def test_the_installed_command_reports_the_same(workspace: Workspace) -> None:
    (workspace.root / "config/config.yaml").write_text(EXPERIMENT.replace(GAME, "Braekout"))
    before = workspace.tree()
    done = subprocess.run(
        [Path(sys.executable).with_name("drama"), "plan"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "config/config.yaml: games.Braekout: unknown game. Did you mean 'Breakout'? `drama games` "
    )
    assert workspace.tree() == before


# --- train and evaluate --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no recipe there"),
        ("", "not a recipe"),
        ("{}", "not a recipe: format: "),
        ("\xff", "not a recipe"),
    ],
)
def test_what_is_no_recipe_exits_with_2_and_writes_nothing(
    drama: Command, workspace: Workspace, command: str, content: str | None, said: str
) -> None:
    if content is not None:
        workspace.recipe.parent.mkdir(parents=True)
        workspace.recipe.write_bytes(content.encode("latin-1"))
    before = workspace.tree()
    code, _, errors = drama(command, RECIPE)
    assert code == 2 and said in errors and RECIPE in errors and "Traceback" not in errors
    assert workspace.tree() == before


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("device", ["gpu", "tpu:0", "mps", "", "cuda:x", "cuda:-1", NO_SUCH_GPU])
def test_a_device_that_is_not_there_is_explained(
    drama: Command, workspace: Workspace, command: str, device: str
) -> None:
    drama("plan")
    before = workspace.tree()
    code, _, errors = drama(command, RECIPE, "--device", device)
    assert code == 2 and f"--device {device}: " in errors
    assert "cpu" in errors and "Traceback" not in errors
    assert workspace.tree() == before


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("mamba", "'mamba' is not one of 'auto', 'torch', 'mamba_ssm'."),
        ("mamba_ssm", "mamba_ssm needs a CUDA GPU; the device is cpu. Use auto or torch"),
    ],
)
def test_a_backend_that_cannot_be_used_is_explained(
    drama: Command, workspace: Workspace, backend: str, said: str
) -> None:
    drama("plan")
    code, _, errors = drama("train", RECIPE, "--device", "cpu", "--backend", backend)
    assert code == 2 and said in errors and "Traceback" not in errors
    if status := [path for path in workspace.tree() if path.endswith("status.json")]:
        found = json.loads((workspace.root / status[0]).read_text(encoding="utf-8"))
        assert found["state"] == "failed" and found["permanent"] and said in found["message"]
    assert len(status) == (backend == "mamba_ssm"), "only what a run was asked for is its failure"


def test_plan_says_when_a_run_of_earlier_code_lies_there(
    undisturbed: Workspace, drama: Command, workspace: Workspace
) -> None:
    shutil.copytree(undisturbed.folder, workspace.folder)
    assert "1 of them trained: " in drama("plan")[1]
    (path,) = workspace.folder.glob("run-*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    record["recipe"]["code"] = "0" * 64
    record["fingerprint"] = sha256_text(canonical_json(record["recipe"]))
    path.unlink()
    write_json(workspace.folder / f"run-{record['fingerprint'][:16]}.json", record)
    assert "0 of them trained, 1 by earlier code: " in drama("plan")[1]


def test_a_whole_run_keeps_its_place_until_another_begins(
    undisturbed: Workspace, drama: Command, workspace: Workspace
) -> None:
    shutil.copytree(undisturbed.folder, workspace.folder)
    before = sorted(workspace.folder.iterdir())
    assert drama("plan", "--set", "behaviour.horizon=2")[0] == 0
    code, _, errors = drama("train", RECIPE, "--device", "cpu", "--backend", "mamba_ssm")
    assert code == 2 and "set aside" not in errors
    assert sorted(workspace.folder.iterdir()) == before
    code, _, errors = drama("train", RECIPE, "--device", "cpu")
    assert code == 0 and "set aside to results/tiny/superseded/" in errors


def test_a_recipe_that_was_edited_by_hand_trains_and_says_that_it_is_not_planned(
    drama: Command, workspace: Workspace
) -> None:
    def errors() -> str:
        return drama("train", RECIPE, "--device", "cpu", "--backend", "mamba_ssm")[2]

    said = f"{RECIPE}: not the recipe that was planned (run "
    drama("plan")
    planned = (workspace.root / RECIPE).read_text(encoding="utf-8")
    assert said not in errors()
    recipe = json.loads(planned)
    recipe["settings"]["behaviour"]["horizon"] = 2
    write_json(workspace.root / RECIPE, recipe)
    found = errors()
    assert found.count(said) == 1 and "`drama plan --set section.key=value`" in found
    assert found.index(said) < found.index("mamba_ssm needs a CUDA GPU"), "and it goes on"
    (workspace.root / "results/tiny/recipes/report.json").unlink()
    assert said not in errors()


def test_a_run_that_another_process_works_on_is_waited_for(
    drama: Command, workspace: Workspace
) -> None:
    drama("plan")
    command = [sys.executable, "-c", "from drama.cli import main; main()", "train", RECIPE]
    with locked(workspace.folder):
        before = workspace.tree()
        process = subprocess.Popen(
            [*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, cwd=workspace.root
        )
        assert process.stderr is not None
        assert f"waiting for process {os.getpid()} on " in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, "a request to stop is heard while waiting"
        process.stderr.close()
        assert workspace.tree() == before


def test_an_untrained_run_is_not_scored(drama: Command, workspace: Workspace) -> None:
    drama("plan")
    before = workspace.tree()
    code, _, errors = drama("evaluate", RECIPE, "--device", "cpu")
    assert code == 1
    assert f"not trained to its end; `drama train {RECIPE}`" in errors
    assert workspace.tree() == before


def test_plan_train_evaluate_say_what_they_made(
    undisturbed: Workspace, drama: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(undisturbed.root)
    _, output, _ = drama("plan")
    assert "1 run planned under preset tiny, 1 of them trained" in output
    code, output, errors = drama("train", RECIPE, "--device", "cpu")
    assert (code, output) == (0, "")
    folder = f"results/tiny/runs/{GAME}/seed{SEED}"
    assert re.fullmatch(rf"{folder}/run-[0-9a-f]{{16}}\.json: this run is whole already\n", errors)
    for evaluation in Path(folder).glob("evaluation-*"):
        evaluation.unlink()
    torch_is_used = r"Sequence backend: torch \(mamba_ssm needs a CUDA GPU; the device is cpu\)\n"
    begins = rf"{GAME} seed {SEED}: 0 of 5 episodes\n"
    for before, said in (
        (torch_is_used + begins, r"mean return [\d.]+ over 5 greedy episodes, \d different .*"),
        ("", "there already"),
    ):  # fmt: skip
        code, output, errors = drama("evaluate", RECIPE, "--device", "cpu")
        assert (code, output) == (0, "")
        assert re.fullmatch(
            rf"{before}{folder}/evaluation-[0-9a-f]{{16}}\.parquet: {said}\n", errors
        )
