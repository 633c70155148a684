"""The documents: every command that they show is run, in their order, in a clone of toy size.

What they show is told apart by the language of its block: `sh`, a command a line; `console`, a
transcript, commands behind `$ ` and what they print below; `python`; `yaml`, configuration, whose
first line names the file; `text`, to look at. A command that cannot be run here has a reason in the
source, above its block: `<!-- not run: REASON -->`, or `<!-- not run (START): REASON -->` for those
commands of it that start so.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_pipeline import BIN, ROOT
from typer.core import TyperGroup
from workspace import make_workspace

from drama.cli import app
from drama.pipeline.recipes import plan

DOCUMENTS = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COMMANDS, TO_LOOK_AT = ("sh", "console", "python"), ("yaml", "text")
FENCE = re.compile(r"((?:<!-- not run.*?-->\n)*)```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run(?: \((.+?)\))?:(.*?)-->", re.DOTALL)
STARTS = "::: "  # begins a line between the outputs of two commands

# Stand-ins, so that minutes are enough where the text's own files would take days. Every preset
# that is trained becomes this one:
TOY: dict[str, Any] = {
    "complete_protocol": False,
    "environment": {"max_frames": 240},
    "world_model": {"batch_size": 2, "sequence_length": 8},
    "behaviour": {"contexts": 4, "context_length": 4, "horizon": 3},
    "training": {"total_steps": 60, "random_steps": 40, "world_model_every": 50,
                 "behaviour_every": 50, "log_every": 20},
    "evaluation": {"episodes": 2, "environments": 2},
}  # fmt: skip
FULL, PRESETS = ("xs", "quick"), ("laptop", "quick", "walk")
# Every experiment is one run, of the preset that the document is about:
EXPERIMENT = "preset: {}\n{}seeds: [0]\ndevice: cpu\nresults: results\n"
GAMES = "games:\n  Pong: {}\n"
CONFIG = {"README.md": "xs", "docs/reproduce.md": "walk"}


@dataclass(frozen=True)
class Command:
    """A command as typed, what is shown of its output, and why it is not run, if it is not."""

    place: str
    text: str
    shown: tuple[str, ...] = ()
    reason: str | None = None


def blocks(text: str) -> Iterator[tuple[int, list[tuple[str, str]], str, str]]:
    """Yield every fenced block's line, marks (start of commands, reason), language and text."""
    for found in FENCE.finditer(text):
        marks = [(start, reason.strip()) for start, reason in MARK.findall(found[1])]
        line = text.count("\n", 0, found.start(2)) + 2
        yield line, marks, found[2], found[3]


def read_commands(document: str, text: str) -> list[Command]:
    """Return every command of a document, in order."""
    commands = []
    for line, marks, language, block in blocks(text):
        place = f"{document}:{line}"
        assert language in (*COMMANDS, *TO_LOOK_AT), f"{place}: of language {language!r}"
        assert all(reason for _, reason in marks), f"{place}: not run, and no reason given"
        entries = split(language, block) if language in COMMANDS else []
        unused = [start for start, _ in marks if not any(c.startswith(start) for c, _ in entries)]
        assert not unused, f"{place}: no command starts with {unused}"
        for typed, shown in entries:
            reasons = [reason for start, reason in marks if typed.startswith(start)]
            commands.append(Command(place, typed, shown, reasons[0] if reasons else None))
    return commands


def split(language: str, block: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return a block's commands, each with the lines that are shown below it."""
    if language == "python":
        return [(f"python - <<'END'\n{block}END", ())]
    if language == "sh":
        return [(line, ()) for line in block.splitlines() if line.split("#")[0].strip()]
    before, *typed = re.split(r"^\$ ", block, flags=re.MULTILINE)
    assert not before and typed, f"a console block begins with output: {before!r}"
    entries = (entry.splitlines() for entry in typed)
    return [(command, tuple(shown)) for command, *shown in entries]


def all_commands(document: str) -> list[Command]:
    return read_commands(document, (ROOT / document).read_text(encoding="utf-8"))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what `over` says, section by section."""
    return {**base} | {
        key: merged(base[key], value) if isinstance(value, Mapping) else value
        for key, value in over.items()
    }


def make_clone(root: Path, preset: str) -> None:
    """Put the project under git at `root`, with the stand-ins, as if `make setup` had been run."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    presets = root / "config/presets"
    full, quick = (yaml.safe_load((presets / f"{name}.yaml").read_text()) for name in FULL)
    del quick["base"]
    toy = merged(merged(full, quick), TOY)
    (presets / "xs.yaml").write_text(yaml.safe_dump(toy), encoding="utf-8")
    for name in PRESETS:
        (presets / f"{name}.yaml").write_text("base: xs\n", encoding="utf-8")
    for name, of in {"config": preset, "quick": "quick", "laptop": "laptop"}.items():
        (root / f"config/{name}.yaml").write_text(EXPERIMENT.format(of, GAMES), encoding="utf-8")
    for name in ("local", "cluster"):  # there is no Slurm here: tests/cluster brings one
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to("workflow/profiles/local")
    (root / ".venv").symlink_to(sys.prefix)
    script = "git init --quiet; echo .venv >> .git/info/exclude; drama stages; git add --all"
    subprocess.run(
        ["bash", "-ec", f"{script}; git commit --quiet -m Toy"],
        cwd=root,
        env=environment(),
        check=True,
    )


def environment() -> dict[str, str]:
    """The code of whichever clone a command is given in, and nothing of the user's settings."""
    kept = {key: value for key, value in os.environ.items() if "SNAKEMAKE" not in key}
    person = {f"GIT_{who}_{what}": "test@example.org"
              for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return kept | person | {"PATH": path, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}


def missing(shown: Iterable[str], printed: str) -> list[str]:
    """Return the shown lines that were not printed, of those that another size prints as well.

    These are lines of words, without a number, a path or the game that the stand-ins leave out.
    """
    words = [line.strip() for line in shown if re.search(r"\w{3}", line)]
    lines = {line.strip() for line in printed.splitlines()}
    return [line for line in words if not re.search(r"[\d/…]|Boxing", line) and line not in lines]


@pytest.mark.whole
@pytest.mark.parametrize("document", CONFIG)
def test_commands_work_as_typed_and_print_what_is_shown(document: str, tmp_path: Path) -> None:
    clone = tmp_path / "drama"
    make_clone(clone, CONFIG[document])
    if subprocess.run(["make", "--question", "setup"], cwd=clone, env=environment()).returncode:
        pytest.skip("the locks are not what is installed: `make setup` first")
    commands = [c for c in all_commands(document) if not c.reason]
    lines = (f"echo {shlex.quote(STARTS + c.place + ': ' + c.text)}\n{c.text}" for c in commands)
    done = subprocess.run(
        ["bash", "-eo", "pipefail"], input="\n".join(lines), cwd=clone, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    _, *printed = re.split(f"^{STARTS}", done.stdout, flags=re.MULTILINE)
    pairs = zip(commands, printed, strict=True)
    untrue = [(c.place, line) for c, output in pairs for line in missing(c.shown, output)]
    assert not untrue, done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_left_out_says_why(document: str) -> None:
    left = [command for command in all_commands(document) if command.reason]
    first = {(c.place, c.reason): c.text.split("#")[0].strip() for c in reversed(left)}
    if left:
        pytest.skip("; ".join(f"{place}: `{text}`: {why}" for (place, why), text in first.items()))


def test_documents_that_show_commands_are_known() -> None:
    assert {document for document in DOCUMENTS if all_commands(document)} == set(CONFIG)


def test_the_rules_of_what_is_run() -> None:
    shown = "```sh\nmake demo  # a remark\n# another\nmake test\n```\n"
    marked = "<!-- not run (make t): it takes\nhours -->\n" + shown
    transcript = "```console\n$ ls\nhere\n12\n\n$ pwd\n```\n"
    commands = read_commands("a", f"{shown}{marked}{transcript}```text\n$ no\n```\n")
    assert [(c.text.split()[-1], c.reason) for c in commands] == [
        ("remark", None), ("test", None), ("remark", None), ("test", "it takes\nhours"),
        ("ls", None), ("pwd", None),
    ]  # fmt: skip
    assert commands[0].place == "a:2" and commands[4].shown == ("here", "12", "")
    assert missing(commands[4].shown, "13\nthere\n") == ["here"]
    assert missing(commands[4].shown, "13\nhere\n") == []
    for wrong, problem in {
        f"<!-- not run: -->\n{shown}": "no reason",
        f"<!-- not run (ls): slow -->\n{shown}": "no command starts",
        "```\nls\n```\n": "of language",
        "```console\nhere\n```\n": "begins with output",
    }.items():
        with pytest.raises(AssertionError, match=problem):
            read_commands("a", wrong)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_text_keeps_to_100_columns(document: str) -> None:
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 100]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_drama_commands_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    drama = typer.main.get_command(app)
    assert isinstance(drama, TyperGroup)
    for line in re.findall(r"`drama ([^`]+)`", FENCE.sub("", text)):
        words = line.split()
        command = drama if words[0].startswith("-") else drama.commands.get(words.pop(0))
        assert command, f"{document} names `drama {line}`"
        options = {option for parameter in command.params for option in parameter.opts}
        given = {word for word in words if word.startswith("-")} - {"-h", "--help"}
        assert given <= options, f"{document} names `drama {line}`"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_configuration_that_is_shown_can_be_planned(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = Path("config/config.yaml")
    for _, _, language, text in blocks((ROOT / document).read_text(encoding="utf-8")):
        if language == "yaml":
            named = re.match(r"# (config/\S+\.yaml)", text)
            whole = text if named else EXPERIMENT.format("xs", text)
            Path(named[1] if named else config).write_text(whole, encoding="utf-8")
    assert plan(config, {}).runs
