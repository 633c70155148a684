"""The house rules: rings of imports, lock files, commented configuration, a short Snakefile."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from drama import __version__

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("run", "report", "workflow", "dev")
# What comes on top of run.lock in the image where torch is its CUDA build.
CUDA_LOCKS = ("cuda", "kernels")
ALL_LOCKS = (*LOCKS, *CUDA_LOCKS, "cpu", "installer")
HASH = r"--hash=sha256:([0-9a-f]{64})"

# The wings and the single files beside them, inner to outer: each imports those before it only.
WINGS = (
    "errors", "streams", "reading", "files", "runs", "agent", "pipeline", "report", "options",
    "cli",
)  # fmt: skip
# Inside agent/, likewise, but that those of one rank do not know each other.
AGENT = (
    ("settings", "shapes"), ("env", "replay", "model"), ("behaviour",), ("training",),
    ("evaluation",),
)  # fmt: skip


def modules() -> list[Path]:
    return sorted((ROOT / "drama").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every imported module, with its line; functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name: drama.…"
            assert node.module is not None
            if node.module == "drama":
                yield from ((f"drama.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def name_of(path: Path) -> str:
    """Name a file's module: drama/runs/__init__.py is drama.runs."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    """Which modules of the project each one imports; names inside a module count as the module."""
    known = {name_of(path) for path in modules()}
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for path in modules():
        for name, _ in imports(path):
            target = name if name in known else name.rpartition(".")[0]
            if target in known - {"drama", name_of(path)}:
                arrows[name_of(path)].add(target)
    return arrows


def rank(module: str) -> tuple[int, int]:
    """Say how far out a module lies: its wing, and within the agent its room."""
    _, wing, *rooms = module.split(".")
    room = next((i for i, rank in enumerate(AGENT) if wing == "agent" and {*rank} & {*rooms}), 0)
    return WINGS.index(wing), room


def test_wings_import_inward_only() -> None:
    for module, imported in graph().items():
        for other in imported if module not in ("drama", "drama.__main__") else ():
            assert rank(other) <= rank(module), f"{module} imports {other}, which lies further out"
            if rank(other) == rank(module) and module.startswith("drama.agent."):
                rooms = module.split(".")[2], other.split(".")[2]
                assert rooms[0] == rooms[1], f"{module} imports {other}, a room beside it"


def test_no_import_goes_in_a_circle() -> None:
    arrows = {
        # A package's __init__ knows its modules, and whoever imports one runs it: no circle.
        module: {other for other in imported if not module.startswith(f"{other}.")}
        for module, imported in graph().items()
    }
    TopologicalSorter(arrows).prepare()


def test_the_rules_of_imports_can_be_broken() -> None:
    assert rank("drama.runs.shards") < rank("drama.agent.settings") < rank("drama.agent.env.base")
    assert rank("drama.agent.behaviour.agent") < rank("drama.agent.training.loop")
    assert rank("drama.pipeline.artifacts.ledger") < rank("drama.report") < rank("drama.cli")
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def picture() -> str:
    """Draw the rooms, inner to outer, each with the numbers of those it imports."""
    rooms: dict[tuple[int, int, str], set[tuple[int, int, str]]] = {}

    def room(module: str) -> tuple[int, int, str]:
        _, wing, *inner = module.split(".")
        return *rank(module), f"{wing}/{inner[0]}" if wing == "agent" and inner else wing

    for module, imported in graph().items():
        if module not in ("drama", "drama.__main__", "drama.agent"):
            rooms.setdefault(room(module), set()).update({*map(room, imported)} - {room(module)})
    order = sorted(rooms)
    lines = []
    for number, here in enumerate(order, 1):
        others = (f"{n:3}" if there in rooms[here] else "   " for n, there in enumerate(order, 1))
        lines.append(f"{number:2} {here[2]:16}{''.join(others)}".rstrip())
    return "\n".join(lines)


def test_the_picture_of_imports_is_todays() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert f"```text\n{picture()}\n```" in text, f"docs/architecture.md; today:\n{picture()}"


def reachable(start: str) -> set[str]:
    """Every module that importing `start` brings in, following the project's own modules.

    `drama` itself imports only when `drama.load` is called: a test below asks Python.
    """
    seen: set[str] = {"drama"}
    queue = [start]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        parts = name.split(".")
        if parts[0] != "drama":
            continue
        queue += [".".join(parts[:length]) for length in range(1, len(parts))]
        stem = ROOT.joinpath(*parts)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                queue += [module for module, _ in imports(path)]
    return {name.split(".")[0] for name in seen}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_planning_and_reporting_need_no_torch(path: Path) -> None:
    module = name_of(path)
    light = ("drama.report", "drama.pipeline.recipes", "drama.pipeline.config")
    if module.startswith(light):
        assert "torch" not in reachable(module)


def test_the_package_itself_imports_nothing_large() -> None:
    code = "import sys, drama; print(*{'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Versions and hashes of one lock, by package; every line of it must be understood."""
    text = (ROOT / "containers" / f"{name}.lock").read_text(encoding="utf-8")
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in text.replace(" \\\n", " ").splitlines():
        if not entry.startswith("#"):
            # A marker such as `; sys_platform == 'win32'` may stand between pin and hashes.
            pin, *options = re.sub(" ;.*?(?= --hash)", "", entry).split()
            package, version = pin.split("==")
            assert package not in found, package
            found[package] = version, [re.fullmatch(HASH, option)[1] for option in options]  # type: ignore[index]
    return found


def pins(name: str) -> dict[str, str]:
    return {package: version for package, (version, _) in locked(name).items()}


def required(name: str) -> list[Requirement]:
    lines = (ROOT / "containers" / f"{name}.in").read_text(encoding="utf-8").splitlines()
    stripped = [line.split("#")[0].strip() for line in lines]
    return [Requirement(line) for line in stripped if line]


def declared() -> dict[str, list[Requirement]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def test_no_package_is_pinned_twice() -> None:
    names = [package for name in LOCKS for package in pins(name)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", LOCKS)
def test_each_lock_holds_what_is_asked_for(name: str) -> None:
    upto = LOCKS[: LOCKS.index(name) + 1]
    locked = {package: version for earlier in upto for package, version in pins(earlier).items()}
    for requirement in [*required(name), *declared()[name]]:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.mark.parametrize("name", LOCKS)
def test_pyproject_and_requirement_files_name_the_same_packages(name: str) -> None:
    listed = {canonicalize_name(requirement.name) for requirement in required(name)}
    assert listed == {canonicalize_name(requirement.name) for requirement in declared()[name]}


@pytest.mark.parametrize("name", ALL_LOCKS)
def test_every_pin_carries_sorted_hashes_of_its_files(name: str) -> None:
    assert list(locked(name)) == sorted(locked(name))
    for package, (_, hashes) in locked(name).items():
        assert hashes and hashes == sorted(set(hashes)), package


def test_no_lock_says_where_packages_come_from() -> None:
    for name in ALL_LOCKS:
        text = (ROOT / "containers" / f"{name}.lock").read_text(encoding="utf-8")
        assert not re.search(r"://|--(index|extra|find)|/", text), name


def test_what_a_run_pins_holds_on_every_platform() -> None:
    """The fingerprints of runs hash these lines, so they say the same everywhere."""
    assert ";" not in (ROOT / "containers/run.lock").read_text(encoding="utf-8")


def test_locks_leave_the_build_of_torch_to_the_machine() -> None:
    assert pins("run")["torch"] == "2.13.0"
    assert pins("cpu") == {"torch": "2.13.0+cpu"}
    for name in (*LOCKS, *CUDA_LOCKS):
        for package, version in pins(name).items():
            assert name in CUDA_LOCKS or not package.startswith(("nvidia-", "cuda-", "triton"))
            assert "+" not in version, f"{package}=={version}"


def test_cuda_locks_add_to_the_image_and_agree_with_the_other_locks() -> None:
    image = pins("run")
    assert not set(image) & set(pins("cuda"))
    assert not (set(image) | set(pins("cuda"))) & set(pins("kernels"))
    elsewhere = pins("report") | pins("workflow") | pins("dev")
    for package, version in (pins("cuda") | pins("kernels")).items():
        assert elsewhere.get(package, version) == version, package
    present = image | pins("cuda") | pins("kernels")
    for requirement in [*required("kernels"), *declared()["kernels"]]:
        version = present[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_nvcc_is_of_the_cuda_that_torch_asks_for() -> None:
    runtime, nvcc = pins("cuda")["nvidia-cuda-runtime"], pins("kernels")["nvidia-cuda-nvcc"]
    assert runtime.split(".")[:2] == nvcc.split(".")[:2]


def test_what_presents_results_is_not_part_of_a_runs_fingerprint() -> None:
    assert not {"matplotlib", "rliable", "pandas", "scipy", "snakemake"} & set(pins("run"))


def test_the_version_stands_in_one_place_and_is_repeated_right() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", changes, re.MULTILINE)[0] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__


def settings_without_comment(text: str) -> list[str]:
    """Keys with a value of their own that have a comment neither behind nor above them.

    A block under `games:` is a list of names, not of keys: a comment above it is enough.
    """
    missing = []
    previous, inside_games = "", False
    for line in text.splitlines():
        key = re.match(r"^(\s*)([\w-]+):(.*)$", line)
        if key:
            inside_games = inside_games and key[1] != ""
            commented = "#" in key[3] or previous.lstrip().startswith("#")
            section = key[3].strip() == "" and key[2] != "games"
            if not (commented or section or inside_games):
                missing.append(key[2])
            inside_games = inside_games or key[2] == "games"
        previous = line
    return missing


CONFIGURATION = sorted((ROOT / "config").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATION, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_key_is_explained(path: Path) -> None:
    assert settings_without_comment(path.read_text(encoding="utf-8")) == []


def test_an_unexplained_key_would_be_found() -> None:
    text = (
        "# what it is\na: 1\nb: 2\nsection:\n  c: 3  # why\n  d: 4\n# names\ngames:\n  Pong: {}\n"
    )
    assert settings_without_comment(text) == ["b", "d"]


def test_the_configuration_names_the_26_games() -> None:
    from drama.agent.settings import ATARI_100K

    experiment = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    assert tuple(game for game in experiment["games"] if game in ATARI_100K) == ATARI_100K
    assert experiment["preset"] == "xs"
    assert experiment["seeds"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("preset", ["laptop", "learn/catch"])
def test_git_keeps_what_a_clone_needs_to_play_and_nothing_large(preset: str) -> None:
    results = f"results/{preset}"
    small = ("run-0.json", "evaluation-0.parquet", "evaluation.json", "episodes.parquet",
             "training.parquet", "weights-0.safetensors", "weights-0.md")  # fmt: skip
    large = (
        "checkpoint.parquet",
        "checkpoint.previous.parquet",
        "replay/part-00000.parquet",
        "status.json",
        ".run.json.x.part",
    )
    kept = [f"{results}/runs/Pong/seed0/{name}" for name in small]
    kept += [f"{results}/recipes/Pong/seed0.json", f"{results}/report/index.html"]
    left = [f"{results}/runs/Pong/seed0/{name}" for name in large]
    left += [f"{results}/runs/Pong/.seed0.lock", f"{results}/logs/report.log"]
    left += ["results/xs/runs/Pong/seed0/weights-0.safetensors", "results/quick/report/index.html"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *kept, *left],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == left, done


def test_the_snakefile_is_a_table_of_contents() -> None:
    assert len((ROOT / "Snakefile").read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize(
    "path", sorted((ROOT / "workflow/rules").glob("*.smk")), ids=lambda p: p.name
)
def test_a_rule_has_a_docstring_and_one_drama_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Needs: ")
    rules = re.findall(r"^rule (\w+):\n    (.*)", text, re.MULTILINE)
    commands = re.findall(r'^        "(?:exec )?{params.drama} (\w+) ', text, re.MULTILINE)
    assert commands == [name for name, _ in rules]
    assert all(first.startswith('"""') for _, first in rules)


@pytest.mark.parametrize("name", ["quick", "local", "cluster"])
def test_every_profile_decides_by_name_and_needs_no_unlocking(name: str) -> None:
    path = ROOT / "workflow/profiles" / name / "config.yaml"
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert profile["rerun-triggers"] == ["mtime"]
    assert profile["nolock"] is True
    # Not rerun-incomplete: with ancient inputs it makes Snakemake 9.27 forget what comes after.
    assert profile["ignore-incomplete"] is True
    assert "rerun-incomplete" not in profile


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", ".ci/run",
     ".github/workflows/ci.yml"],
)  # fmt: skip
def test_make_targets_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|run: )make ([a-z-]+)", text, re.MULTILINE))
    assert named, f"{name} names no make target"
    assert named <= targets()


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:config|workflow|drama|tests|containers)/[\w/.*-]+)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{document} names {path}"
    for path in re.findall(r"\]\(([^):#]+)\)", text):
        assert (document.parent / path).exists(), f"{document} links to {path}"


def test_continuous_integration_calls_the_two_commands_of_the_readme() -> None:
    for name in ("README.md", ".ci/run", ".github/workflows/ci.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "make test" in text and "make demo" in text
