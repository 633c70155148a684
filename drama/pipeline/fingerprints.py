"""What of the code and of the library versions counts in a fingerprint: what can change a result.

Of the code, that is the files of drama/agent/ that a run's choices use: all that training imports,
and of packages that hold one module per choice (`CHOICES`), the chosen module. Of each file, its
syntax tree without what people read: comments, docstrings, annotations, assertions, texts of
errors, calls that only say something. Settings are no part of it, since their values stand in the
recipe. Of the lock file, it is the versions of the libraries that the agent computes with.

A hash that `drama accept` found to mean the same as an earlier one is called by the earlier one's
name, so that a refactoring leaves recipes, and with them recorded runs, as they are.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

import drama
from drama.agent.settings import (
    CATCH,
    Fingerprint,
    Frozen,
    ReplaySettings,
    SequenceModelSettings,
    Settings,
)
from drama.errors import ConfigurationError, reason
from drama.files import sha256_text
from drama.pipeline.config import project_file
from drama.reading import read_model, read_text

PACKAGE = Path(drama.__file__).parent
TRAINING = "drama.agent.training.loop"
"""The module whose imports a run is made by."""
EVALUATION = "agent/evaluation.py"
"""What plays the episodes of a score, besides the code of the run itself."""
REPORT = ("report", "pipeline/artifacts/evaluations.py", "pipeline/history.py")
REPORT_SUFFIXES = (".py", ".j2", ".csv")

UNCOUNTED = ("drama.agent.settings", "drama.agent.shapes")
"""Settings, whose values are in the recipe, and assertions about shapes."""
SILENT = ("print", "check_shapes", "reporter", "warnings", "logging")
"""What only says or asserts something: statements that call these, or methods of these."""

LOCK_FILE = Path("containers/run.lock")
LIBRARIES = ("ale-py", "gymnasium", "numpy", "opencv-python-headless", "torch")
"""What the agent computes with; the others parse, store and show."""

ACCEPTED = PACKAGE / "pipeline" / "accepted.json"


# --- what a run's choices use --------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What of the agent's code a run uses where there is a choice.

    Attributes:
        family: of its game's environment.
        kind: of sequence model.
        sampling: distribution over the replay memory's windows.
    """

    family: str
    kind: str
    sampling: str

    @classmethod
    def of(cls, game: str, settings: Settings) -> Choices:
        """Return the choices of a run of this game under these settings."""
        family = "catch" if game in CATCH else "atari"
        return cls(family, settings.sequence_model.kind, settings.replay.sampling)

    @classmethod
    def every(cls) -> list[Choices]:
        """Return all choices that there are."""
        kinds = get_args(SequenceModelSettings.model_fields["kind"].annotation)
        samplings = get_args(ReplaySettings.model_fields["sampling"].annotation)
        return [cls(*chosen) for chosen in product(("atari", "catch"), kinds, samplings)]

    @property
    def modules(self) -> dict[str, str]:
        """The packages that hold one module per choice, and the modules chosen."""
        return {
            "drama.agent.env": f"drama.agent.env.{self.family}",
            "drama.agent.model.sequence": f"drama.agent.model.sequence.{self.kind}",
            "drama.agent.replay.distribution": f"drama.agent.replay.distribution.{self.sampling}",
        }


def run_code(choices: Choices) -> str:
    """Return the name of the code that defines a run of these choices."""
    return _name(run_code_hash(choices), "code")


def run_code_hash(choices: Choices, package: Path = PACKAGE) -> str:
    """Return the hash of the code that defines a run of these choices, as it stands."""
    modules = agent_modules(choices, package)
    return sha256_text("\n".join(f"{name} {_read(path)[0]}" for name, path in modules.items()))


def agent_modules(choices: Choices, package: Path = PACKAGE) -> dict[str, Path]:
    """Return the modules of the agent that a run of these choices uses, by name, sorted."""
    found: dict[str, Path] = {}
    queue = [TRAINING]
    while queue:
        name = queue.pop()
        name = choices.modules.get(name, name)
        path = _file(name, package)
        if path is None or name in found or name in UNCOUNTED:
            continue
        found[name] = path
        packages = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") - 1)]
        queue += [*_read(path)[1], *(each for each in packages if each not in choices.modules)]
    return dict(sorted(found.items()))


def _file(module: str, package: Path) -> Path | None:
    """Return the file of a module of the agent; None for a name inside one, and for others."""
    if not module.startswith("drama.agent"):
        return None
    stem = package.joinpath(*module.split(".")[1:])
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)


def evaluation_code() -> str:
    """Return the name of the code that plays evaluation episodes, the run's own aside."""
    return _name(evaluation_code_hash(), "evaluation")


def evaluation_code_hash() -> str:
    """Return the hash of the code that plays evaluation episodes, as it stands."""
    return code_hash([EVALUATION])


def report_code() -> str:
    """Return the hash of the code that makes a report."""
    return code_hash(REPORT)


# --- library versions ----------------------------------------------------------------------------


def runtime() -> str:
    """Return the name of the library versions that define a run, by the lock file."""
    return _name(lock_hash(project_file(LOCK_FILE), LIBRARIES), "runtime")


def lock_hash(path: Path, libraries: Sequence[str] = ()) -> str:
    """Return the hash of what a lock file pins; comments and files' hashes aside.

    A version has as many files as there are platforms, so their hashes do not define a run.

    Args:
        path: the lock file.
        libraries: whose pins count; by default all.

    Raises:
        ConfigurationError: when there is no such file.
    """
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: not found; run this from the project's root") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: {reason(error)}; put back git's") from None
    pins = [line.split("#")[0].split(" --hash")[0].strip(" \\") for line in lines]
    pinned = [(pin.split("==")[0], pin) for pin in pins if "==" in pin]
    counted = (pin for name, pin in pinned if not libraries or name in libraries)
    return sha256_text("\n".join(sorted(counted)))


# --- accepted names ------------------------------------------------------------------------------


class Accepted(Frozen):
    """Which hashes mean the same: accepted.json, written by `drama accept`.

    Attributes:
        commit: what today's code is held against next.
        code: of run-defining code, by the name of the first: all that were found to equal it.
        evaluation: likewise, of the code that plays evaluation episodes.
        runtime: likewise, of library versions.
    """

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    code: dict[Fingerprint, list[Fingerprint]]
    evaluation: dict[Fingerprint, list[Fingerprint]]
    runtime: dict[Fingerprint, list[Fingerprint]]


@cache
def accepted() -> Accepted:
    """Read accepted.json.

    Raises:
        ConfigurationError: when it is not what `drama accept` writes.
    """
    try:
        return read_model(ACCEPTED, Accepted)
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        raise ConfigurationError(f"{ACCEPTED}: {reason(error)}; put back git's") from None


def _name(digest: str, section: str) -> str:
    names: dict[str, list[str]] = getattr(accepted(), section)
    return next((name for name, same in names.items() if digest in same), digest)


# --- what code means -----------------------------------------------------------------------------


def code_hash(parts: Iterable[str], package: Path = PACKAGE) -> str:
    """Return the hash of what code means, and of templates' and tables' bytes.

    `parts` are files and folders inside the package.
    """
    digest = hashlib.sha256()
    for part in parts:
        path = package / part
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in REPORT_SUFFIXES and not file.name.startswith("."):
                digest.update(f"\n{file.relative_to(package).as_posix()}\n".encode())
                code = file.suffix == ".py"
                digest.update(_read(file)[0].encode() if code else file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the hash of what a module means, and the names of what it imports."""
    return _parse(path.read_text(encoding="utf-8"), path.name == "__init__.py")


@cache
def _parse(source: str, all_imports: bool) -> tuple[str, tuple[str, ...]]:
    tree = _Meaning().visit(ast.parse(source))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = sorted(
        (module, name, bound)
        for module, name, bound in _imports(tree)
        if all_imports or bound in used
    )
    text = "\n".join([*map(" ".join, imports), _written(tree)])
    modules = {module for module, _, _ in imports}
    return sha256_text(text), (*modules, *(f"{module}.{name}" for module, name, _ in imports))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield module, name in it and name here of all that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", alias.asname or alias.name.split(".")[0]


class _Meaning(ast.NodeTransformer):
    """Takes out of a syntax tree what changes no number."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        called = _root(node.value.func) if isinstance(node.value, ast.Call) else None
        return None if text or called in SILENT else self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if typing else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _root(node: ast.expr) -> str | None:
    """Return the name that an attribute's or a call's chain begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _written(node: Any) -> str:
    """Write a syntax tree out, empty fields and imports aside.

    Own code instead of `ast.dump`, whose text differs between versions of Python: a recipe must
    not depend on the interpreter that planned it.
    """
    if isinstance(node, list):
        kept = (item for item in node if not isinstance(item, ast.Import | ast.ImportFrom))
        return f"[{','.join(map(_written, kept))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if value is not None and value != [] and name not in ("kind", "type_comment"):
            fields.append(f"{name}={_written(value)}")
    return f"{type(node).__name__}({','.join(fields)})"
