"""drama.pipeline.fingerprints: what counts in a fingerprint, and what does not."""

from __future__ import annotations

import ast
import re
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from drama.agent.env import make
from drama.agent.model.sequence import BLOCKS
from drama.agent.replay.distribution import DISTRIBUTIONS
from drama.agent.settings import ATARI_100K, ReplaySettings, SequenceModelSettings, Settings
from drama.errors import ConfigurationError
from drama.pipeline import fingerprints
from drama.pipeline.config import load_preset
from drama.pipeline.fingerprints import (
    EVALUATION,
    LIBRARIES,
    PACKAGE,
    REPORT,
    Accepted,
    Choices,
    agent_modules,
    code_hash,
    lock_hash,
    run_code,
    run_code_hash,
)

PONG = Choices("atari", "mamba2", "dfs")
CATCH = Choices("catch", "gru", "uniform")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "drama"))


def test_a_recipe_chooses_by_its_game_and_settings(preset: Any) -> None:
    assert Choices.of("Pong", preset("xs").settings()) == PONG
    other = {"sequence_model": {"kind": "gru"}, "replay": {"sampling": "uniform"}}
    assert Choices.of("Catch8", preset("quick", other).settings()) == CATCH
    assert len(set(Choices.every())) == 2 * 5 * 2


# --- which files ---------------------------------------------------------------------------------


def test_what_a_run_computes_with_is_among_the_files_that_count(preset: Any) -> None:
    for choices in Choices.every():
        modules = agent_modules(choices)
        settings = preset("quick").environment
        game = make("Pong" if choices.family == "atari" else "Catch8", settings)
        used = [type(game), *BLOCKS[choices.kind], DISTRIBUTIONS[choices.sampling]]
        game.close()
        assert {each.__module__ for each in used} <= set(modules), choices
        assert {"drama.agent.training.loop", "drama.agent.model.world_model"} <= set(modules)


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("agent/training/loop.py", {PONG, CATCH}),
        ("agent/training/learner.py", {PONG, CATCH}),
        ("agent/replay/buffer.py", {PONG, CATCH}),
        ("agent/behaviour/returns.py", {PONG, CATCH}),
        ("agent/env/base.py", {PONG, CATCH}),
        ("agent/env/atari.py", {PONG}),
        ("agent/env/catch.py", {CATCH}),
        ("agent/model/sequence/base.py", {PONG, CATCH}),
        ("agent/model/sequence/mamba2.py", {PONG}),
        ("agent/model/sequence/gru.py", {CATCH}),
        ("agent/model/sequence/rwkv.py", set()),
        ("agent/replay/distribution/dfs.py", {PONG}),
        ("agent/replay/distribution/uniform.py", {CATCH}),
        ("agent/settings.py", set()),
        ("agent/evaluation.py", set()),
        ("runs/progress.py", set()),
        ("pipeline/recipes.py", set()),
        ("report/page.py", set()),
        ("cli.py", set()),
    ],
)
def test_a_file_counts_for_the_runs_that_use_it(
    package: Path, path: str, counts: set[Choices]
) -> None:
    before = {choices: run_code_hash(choices, package) for choices in (PONG, CATCH)}
    with (package / path).open("a", encoding="utf-8") as file:
        file.write("\nAN_ADDITION = 1\n")
    after = {choices: run_code_hash(choices, package) for choices in (PONG, CATCH)}
    assert {choices for choices in before if before[choices] != after[choices]} == counts


def test_a_new_module_counts_once_it_is_imported(package: Path) -> None:
    before = run_code_hash(PONG, package)
    new = package / "agent/training/schedule.py"
    new.write_text("WARM_UP = 3\n")
    for leftover in ("agent/model/world_model.py~", "agent/model/.world_model.py.swp"):
        (package / leftover).write_text("?")
    (package / "agent/env/maze.py").write_text("class Maze: ...\n")
    assert run_code_hash(PONG, package) == before
    loop = package / "agent/training/loop.py"
    text = loop.read_text(encoding="utf-8")
    loop.write_text(f"{text}\nfrom drama.agent.training.schedule import WARM_UP\nWARM_UP + 1\n")
    used = run_code_hash(PONG, package)
    assert used != before
    new.write_text("WARM_UP = 4\n")
    assert run_code_hash(PONG, package) not in (before, used)


def test_a_further_game_changes_no_other_runs_fingerprint(package: Path) -> None:
    before = [run_code_hash(choices, package) for choices in Choices.every()]
    for path, old, new in (
        ("agent/settings.py", '"Alien", ', '"Adventure", "Alien", '),
        ("agent/env/__init__.py", "    names = game_names()\n", "    names = game_names()[1:]\n"),
    ):
        text = (package / path).read_text(encoding="utf-8")
        assert old in text
        (package / path).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert [run_code_hash(choices, package) for choices in Choices.every()] == before


def test_a_recipes_values_are_the_values_used() -> None:
    """Settings are no code of a run, since they cannot change what its recipe says."""
    for path in Path("config/presets").rglob("*.yaml"):
        name = path.relative_to("config/presets").with_suffix("").as_posix()
        text = load_preset(name).settings().model_dump_json(by_alias=True)
        assert Settings.model_validate_json(text).model_dump_json(by_alias=True) == text


# --- what of a file ------------------------------------------------------------------------------


def test_words_annotations_and_layout_do_not_count(package: Path) -> None:
    before = [run_code_hash(choices, package) for choices in Choices.every()]
    reworded = 0
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str()) as text):
                    text.value = "Other words."
                    reworded += 1
                case ast.FunctionDef():
                    node.returns = ast.Name("object")
                case ast.arg(annotation=ast.expr()) | ast.AnnAssign():
                    node.annotation = ast.Name("object")
                case ast.Raise(exc=ast.Call() as call):
                    call.args = [ast.Constant("other words")]
        # Unparsed, comments and every choice of layout and quotes are gone.
        path.write_text(f"# A remark.\n{ast.unparse(tree)}\n\n# The end.\n", encoding="utf-8")
    assert reworded > 200
    assert [run_code_hash(choices, package) for choices in Choices.every()] == before


MODULE = '''\
"""Words."""

from typing import TYPE_CHECKING

from numpy import float32
from here import there as elsewhere

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 3
"""Words about it."""


class Thing:
    """Words."""

    width: int = 3

    def run(self, x: int = 1, *rest: int) -> float:
        """Words."""
        assert x > 0, "x is positive"
        check_shapes("B", x=x)
        reporter.show(x)
        if x > 1000:
            raise ValueError(f"{x} is too large")
        return elsewhere(x) * 0.5 if x > LIMIT else -x
'''


def hash_of(folder: Path, text: str) -> str:
    (folder / "part.py").write_text(text, encoding="utf-8")
    return code_hash(["part.py"], folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("LIMIT = 3", "LIMIT = '3'"),
        ("width: int = 3", "width: int = 4"),
        ("x > LIMIT", "x >= LIMIT"),
        ("x > 1000", "x > 100"),
        ("raise ValueError", "raise KeyError"),
        ("-x", "x"),
        ("x: int = 1", "x: int = 2"),
        ("x: int = 1, *rest", "x: int = 1, *, rest"),
        ("class Thing:", "class Thing(Exception):"),
        ("    def run", "    @staticmethod\n    def run"),
        ("        return", "        yield"),
        ("reporter.show(x)", "y = reporter.show(x)"),
        ("import there as elsewhere", "import other as elsewhere"),
        ("from here import", "from there import"),
    ],
)
def test_what_code_means_counts(tmp_path: Path, old: str, new: str) -> None:
    assert old in MODULE
    assert hash_of(tmp_path, MODULE) != hash_of(tmp_path, MODULE.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Words", "More words"),
        ("* 0.5", "* (5e-1)"),
        ("\n\n", "\n\n\n# Hm\n"),
        ("x: int", "x: float"),
        ("-> float", "-> None"),
        ("width: int", "width: float"),
        ("too large", "far too large"),
        ('raise ValueError(f"{x} is too large")', "raise ValueError from None"),
        ('        assert x > 0, "x is positive"\n', ""),
        ('        check_shapes("B", x=x)\n', ""),
        ("reporter.show(x)", 'print("hello")'),
        ("from numpy import float32\n", "import numpy\n"),
        ("from pathlib import Path", "from pathlib import PurePath"),
    ],
)
def test_what_people_read_does_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert old in MODULE
    assert hash_of(tmp_path, MODULE) == hash_of(tmp_path, MODULE.replace(old, new))


def test_the_reports_code_is_its_sources_and_no_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "a.py").write_text(MODULE)
    (folder / "table.csv").write_text("1,2\n")
    before = code_hash(["part"], tmp_path)
    (folder / "__pycache__").mkdir()
    for leftover in ("__pycache__/a.pyc", ".a.py.swp", "a.py~", "a.py.orig", "#a.py#"):
        (folder / leftover).write_bytes(b"1")
    assert code_hash(["part"], tmp_path) == before
    (folder / "table.csv").write_text("1,3\n")
    changed = code_hash(["part"], tmp_path)
    assert changed != before
    (folder / "a.py").rename(folder / "b.py")
    assert code_hash(["part"], tmp_path) not in (before, changed)


def test_every_part_of_the_code_is_there() -> None:
    for part in (EVALUATION, *REPORT):
        assert (PACKAGE / part).exists(), part
        assert code_hash([part]) != code_hash([])


# --- library versions ----------------------------------------------------------------------------


def test_a_lock_files_pins_count_and_its_comments_do_not(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("# made by x\ntorch==2.13.0  # via drama\n\nnumpy==2.4.0\n")
    before = lock_hash(path)
    for same in (
        "numpy==2.4.0\ntorch==2.13.0\n# other\n",
        "numpy==2.4.0 \\\n    --hash=sha256:01 \\\n    --hash=sha256:23\n"
        "torch==2.13.0 --hash=sha256:45\n",
    ):
        path.write_text(same)
        assert lock_hash(path) == before
    path.write_text("numpy==2.4.1\ntorch==2.13.0\n")
    assert lock_hash(path) != before


def test_only_libraries_that_the_agent_computes_with_count_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text("numpy==2.4.0\ntorch==2.13.0\ntyper==0.29.2\n")
    before = lock_hash(path, LIBRARIES)
    path.write_text("numpy==2.4.0\nrich==15.0.0\ntorch==2.13.0\n")
    assert lock_hash(path, LIBRARIES) == before
    path.write_text("numpy==2.4.0\ntorch==2.13.1\n")
    assert lock_hash(path, LIBRARIES) != before
    pinned = Path("containers/run.lock").read_text(encoding="utf-8")
    assert all(re.search(f"^{name}==", pinned, re.MULTILINE) for name in LIBRARIES)


def test_the_agent_imports_no_other_library_that_could_change_a_result() -> None:
    distributions = packages_distributions()
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for path in (PACKAGE / "agent").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    names = {name for module in imported for name in distributions.get(module.split(".")[0], [])}
    # Settings are parsed with the one, evaluations are stored with the other; the kernels have
    # locks of their own, and run on a GPU only, where rounding differs anyway.
    harmless = {"pydantic", "pyarrow", "mamba-ssm", "causal-conv1d"}
    assert names - harmless - {n for n in names if n.startswith("drama")} == set(LIBRARIES)


# --- accepted names ------------------------------------------------------------------------------


def test_a_hash_goes_by_the_name_of_the_first_that_it_was_found_to_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = run_code_hash(PONG)
    entry = Accepted(commit="c" * 40, code={"a" * 64: ["b" * 64, mine]}, evaluation={}, runtime={})
    monkeypatch.setattr(fingerprints, "accepted", lambda: entry)
    assert run_code(PONG) == "a" * 64
    assert run_code(CATCH) == run_code_hash(CATCH)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"commit": 1}',
        '{"commit": "--output=x", "code": {}, "evaluation": {}, "runtime": {}}',
        '{"commit": "%s", "code": {"x": []}, "evaluation": {}, "runtime": {}}' % ("c" * 40),
    ],
)
def test_a_damaged_list_of_accepted_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "accepted.json"
    path.write_text(text)
    monkeypatch.setattr(fingerprints, "ACCEPTED", path)
    with pytest.raises(ConfigurationError, match="put back"):
        fingerprints.accepted.__wrapped__()


def test_every_choice_of_the_settings_has_its_module() -> None:
    assert set(BLOCKS) == set(get_args(SequenceModelSettings.model_fields["kind"].annotation))
    assert set(DISTRIBUTIONS) == set(get_args(ReplaySettings.model_fields["sampling"].annotation))
    for choices in Choices.every():
        assert set(choices.modules.values()) <= set(agent_modules(choices)), choices
    games = yaml.safe_load(Path("config/config.yaml").read_text(encoding="utf-8"))["games"]
    assert set(games) >= set(ATARI_100K)
