"""A campaign: what one call of Snakemake makes, frozen, so that later edits change nothing.

A reproduction takes days, and its jobs begin when the cluster lets them. So a call of Snakemake
puts into results/<preset>/campaigns/<hash>/ the recipes of the runs that it was asked for, the plan
that its report shows, and the rules and code that make them, and its jobs read these alone: the
checkout may be edited while they wait. The hash is of what is in the folder, which therefore never
changes; two calls from the same configuration and code share it, others have their own.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from drama.agent.settings import Backend, Frozen
from drama.errors import ConfigurationError, reason
from drama.files import canonical_json, sha256_text
from drama.pipeline.config import load_experiment, project_file
from drama.pipeline.fingerprints import LOCK_FILE, PACKAGE
from drama.pipeline.plans import (
    CAMPAIGNS,
    PLAN,
    RECIPES,
    Game,
    Plan,
    PlannedRun,
    Seed,
    read_plan,
)
from drama.pipeline.recipes import Planning, holds, prepare
from drama.reading import read_model, read_text
from drama.runs.folder import COMMIT, SHORT, git_commit, superseded

DOCUMENT = "campaign.json"
RULES = "workflow/rules"
CODE_SUFFIXES = (".py", ".j2", ".csv", ".json")
"""Of the files that the package consists of; an editor's other files are left out."""

SHIPPED = Path("pipeline/shipped")
"""What the package holds of the project's files; of a campaign's, the versions in use."""

Device = Literal["auto", "cpu", "cuda"]
IMAGE = r"^containers/images/drama-[0-9a-f]{16}(-cpu)?\.sif$"
"""What the path of an image looks like; a stranger's file names no other."""


class Document(Frozen):
    """campaign.json: what jobs must know beside recipes and plan."""

    format: Literal[1]
    device: Device
    backend: Backend
    deterministic: bool = False
    image: Annotated[str, Field(pattern=IMAGE)] | None
    runs: Annotated[tuple[tuple[Game, Seed], ...], Field(min_length=1, max_length=100_000)]


@dataclass(frozen=True)
class Campaign:
    """What one call of Snakemake makes.

    Attributes:
        folder: where it is frozen.
        document: device, backend, image and which runs.
        plan: of everything in the results, which the report shows.
        runs_per_gpu: how many may share one, on this machine.
        report_after: everything, or game, when the report is written after each as well.
        planning: what is to be written as it begins; None in a job, which only reads.
        files: what is to be frozen, by path in the folder; empty in a job.
    """

    folder: Path
    document: Document
    plan: Plan
    runs_per_gpu: int = 1
    report_after: str = "everything"
    planning: Planning | None = None
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def results(self) -> Path:
        """The folder results/<preset>."""
        return self.plan.results

    @property
    def recipes(self) -> Path:
        """Where the frozen recipes lie."""
        return self.folder / RECIPES

    def command(self, python: str = "python") -> str:
        """Return what a shell is given before `drama`'s arguments, to run the frozen code.

        Args:
            python: the interpreter; by default the one of the environment or image of the job.
        """
        code = shlex.quote(str(self.folder))
        return f"env PYTHONSAFEPATH=1 PYTHONPATH={code} {shlex.quote(python)} -m drama"

    @property
    def bind(self) -> str:
        """What Apptainer must be told to show jobs the results; nothing below this folder."""
        place = self.results.resolve()
        return "" if place.is_relative_to(Path.cwd()) else f" --bind {shlex.quote(str(place))}"

    @cached_property
    def runs(self) -> dict[tuple[str, str], PlannedRun]:
        """The runs that were asked for, by game and seed as Snakemake's wildcards name them.

        Their recipes are the frozen ones.
        """
        asked = set(self.document.runs)
        runs = (run for run in self.plan.runs if (run.game, run.seed) in asked)
        return {(run.game, str(run.seed)): replace(run, recipes=self.recipes) for run in runs}

    # --- what there is to make -------------------------------------------------------------------

    def record(self, run: PlannedRun) -> Path:
        """Return where a run's record is, or is to be: a whole run may lie set aside."""
        return _at_hand(run, run.record)

    def evaluation(self, run: PlannedRun) -> Path:
        """Return where a run's evaluation is, or is to be."""
        return _at_hand(run, run.evaluation)

    def is_made(self, run: PlannedRun) -> bool:
        """Say whether a run is trained and evaluated."""
        return self.record(run).exists() and self.evaluation(run).exists()

    def made(self, games: Collection[str] | None = None) -> list[Path]:
        """Return the records and evaluations of the runs of some games; of all when left out."""
        return [
            place(run)
            for run in self.runs.values()
            if games is None or run.game in games
            for place in (self.record, self.evaluation)
        ]

    @cached_property
    def changed_games(self) -> list[str]:
        """The games of which something is to be made."""
        games = (run.game for run in self.runs.values() if not self.is_made(run))
        return list(dict.fromkeys(games))

    @property
    def reports(self) -> list[str]:
        """After what the report is to be written: everything, if that is due, and single games."""
        games = self.changed_games if self.report_after == "game" else []
        return [*games[:-1], "everything"] if self._report_is_due() else []

    def _report_is_due(self) -> bool:
        """Say whether the report does not show what there will be when this call is done."""
        partial = self.plan.report.with_name(f"{self.plan.report.stem}-partial.json")
        narrowed = len(self.runs) < len(self.plan.runs)
        shown = self.plan.report.exists() or (narrowed and partial.exists())
        return bool(self.changed_games) or not shown

    # --- beginning -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write today's recipes and plan, give runs their folders back, and freeze everything.

        In a job nothing happens.

        Raises:
            ConfigurationError: when what was frozen under this name by an earlier call was changed.
        """
        if self.planning is None:
            return
        self.planning.write()
        if self.folder.exists():
            self._check_unchanged()
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=self.folder.parent))
        try:
            for name, text in self.files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            partial.chmod(0o755)
            partial.rename(self.folder)
        except OSError:
            if not self.folder.exists():  # another call may have been as quick
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_unchanged(self) -> None:
        for name, text in self.files.items():
            path = self.folder / name
            if not holds(path, text):
                raise ConfigurationError(
                    f"{path}: not what an earlier call froze here, so its jobs and new ones would "
                    f"differ. Remove {self.folder} when none of them runs; it is made anew"
                )


def _at_hand(run: PlannedRun, file: Path) -> Path:
    places = (run.folder, superseded(run.folder, run.fingerprint))
    return next((place / file.name for place in places if (place / file.name).exists()), file)


def new_campaign(
    root: Path | None, experiment: Path, overrides: Mapping[str, Any], image: str | None
) -> Campaign:
    """Return what a call of Snakemake is to make; nothing is written until it begins.

    Args:
        root: where Snakefile and workflow/ lie; None where another workflow uses these as a module,
            whose own rules jobs read.
        experiment: the YAML file that says what to run.
        overrides: keys of that file to replace.
        image: what jobs run in; None for none.

    Raises:
        ConfigurationError: for any mistake in the configuration.
    """
    wanted, planning = load_experiment(experiment, overrides), prepare(experiment, overrides)
    plan = planning.plan
    asked = tuple((run.game, run.seed) for run in planning.asked)
    document = Document(
        format=1,
        device=wanted.device,
        backend=wanted.backend,
        deterministic=wanted.deterministic,
        image=image,
        runs=asked,
    )
    files = dict(_code(root))
    files[DOCUMENT] = canonical_json(document.model_dump())
    files[f"{RECIPES}/{PLAN}"] = planning.text
    for path, text in planning.texts.items():
        files[f"{RECIPES}/{path.relative_to(plan.results / RECIPES).as_posix()}"] = text
    digest = sha256_text(canonical_json({name: sha256_text(text) for name, text in files.items()}))
    folder = plan.results / CAMPAIGNS / digest[:SHORT]
    return Campaign(
        folder, document, plan, wanted.runs_per_gpu, wanted.report_after, planning, files
    )


def _code(root: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the pipeline's files: Snakefile, rules, package, the versions in use, the commit."""
    if root is not None:
        for path in (root / "Snakefile", *sorted((root / RULES).glob("*.smk"))):
            yield path.relative_to(root).as_posix(), read_text(path)
    for path in sorted(PACKAGE.rglob("*")):
        inner = path.relative_to(PACKAGE)
        hidden = any(part.startswith((".", "__pycache__")) for part in inner.parts)
        if path.suffix in CODE_SUFFIXES and inner.parts[:2] != SHIPPED.parts and not hidden:
            yield f"drama/{inner.as_posix()}", read_text(path)
    lock = read_text(project_file(LOCK_FILE))
    yield f"drama/{SHIPPED.as_posix()}/{LOCK_FILE.as_posix()}", lock
    yield f"drama/{COMMIT}", f"{git_commit() or ''}\n"


def read_campaign(folder: Path) -> Campaign:
    """Read a campaign from its folder, as jobs do.

    Raises:
        ConfigurationError: when its files are not there, or not what they should be.
    """
    path = folder / DOCUMENT
    plan = read_plan(folder.parents[1], folder / RECIPES)
    try:
        document = read_model(path, Document)
        if unknown := set(document.runs) - {(run.game, run.seed) for run in plan.runs}:
            raise ValueError(f"{sorted(unknown)[0]} is not in its plan")
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        raise ConfigurationError(
            f"{path}: not a campaign ({reason(error)}); the call of Snakemake that it belongs to "
            "can only be given anew"
        ) from None
    return Campaign(folder, document, plan)
