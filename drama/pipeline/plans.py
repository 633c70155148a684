"""A plan: the runs that are to be made and the report over them, as recipes/report.json says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from drama.agent.settings import Fingerprint, Frozen
from drama.errors import ConfigurationError, reason
from drama.files import canonical_json, sha256_text
from drama.pipeline.config import no_plan
from drama.pipeline.names import Game, Preset, Seed
from drama.reading import parse_model, read_text
from drama.runs.folder import SHORT

CAMPAIGNS = "campaigns"
"""The folder of campaigns in a preset's results: what each call of Snakemake froze."""
RECIPES = "recipes"
"""The folder of recipes in a preset's results, and in a campaign's."""
PLAN = "report.json"
"""The file that lists the runs, beside their recipes: what the report is made from."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan, with its and its evaluation's whole fingerprints, and what it makes.

    `recipes` is where its recipe lies when that is not results/<preset>/recipes.
    """

    results: Path
    game: str
    seed: int
    fingerprint: str
    evaluation_fingerprint: str
    recipes: Path | None = field(default=None, compare=False)

    @property
    def recipe(self) -> Path:
        """Its recipe file."""
        return (self.recipes or self.results / RECIPES) / self.game / f"seed{self.seed}.json"

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.results / "runs" / self.game / f"seed{self.seed}"

    @property
    def record(self) -> Path:
        """The file that says the run is whole, run-<fingerprint>.json."""
        return self.folder / f"run-{self.fingerprint[:SHORT]}.json"

    @property
    def evaluation(self) -> Path:
        """Its evaluation, evaluation-<fingerprint>.parquet."""
        return self.folder / f"evaluation-{self.evaluation_fingerprint[:SHORT]}.parquet"


@dataclass(frozen=True)
class Plan:
    """What is to be made: runs in the order of configuration, and the report of this fingerprint.

    `complete_protocol` says whether this is the whole Atari100k protocol.
    """

    preset: str
    results: Path
    complete_protocol: bool
    runs: tuple[PlannedRun, ...]
    fingerprint: str

    @property
    def report(self) -> Path:
        """The file that says the report is whole, report-<fingerprint>.json."""
        return self.results / "report" / f"report-{self.fingerprint[:SHORT]}.json"


class _Run(Frozen):
    game: Game
    seed: Seed
    run: Fingerprint
    evaluation: Fingerprint
    folder: Annotated[str, Field(pattern=r"^runs/[A-Za-z0-9]{1,100}/seed[0-9]{1,10}$")]


class _Document(Frozen):
    format: Literal[1]
    preset: Preset
    complete_protocol: bool
    code: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    runs: Annotated[list[_Run], Field(min_length=1, max_length=100_000)]


def plan_text(preset: str, complete: bool, runs: Iterable[PlannedRun], code: str) -> str:
    """Return recipes/report.json; its SHA-256 is the report's fingerprint.

    `complete` says whether this is the whole Atari100k protocol; `code` is the hash of the code
    that makes the report.
    """
    listed = [
        {
            "game": run.game,
            "seed": run.seed,
            "run": run.fingerprint,
            "evaluation": run.evaluation_fingerprint,
            "folder": run.folder.relative_to(run.results).as_posix(),
        }
        for run in runs
    ]
    return canonical_json(
        {"format": 1, "preset": preset, "complete_protocol": complete, "code": code, "runs": listed}
    )


def read_plan(results: Path, recipes: Path | None = None) -> Plan:
    """Read the plan that was made last in a preset's results, or a campaign's.

    Args:
        results: the folder results/<preset>.
        recipes: where the plan and the recipes lie, when that is not in the results.

    Raises:
        ConfigurationError: when there is none, or it is none, is empty or names a run twice.
    """
    path = (recipes or results / RECIPES) / PLAN
    if not path.is_file():
        raise no_plan(results)
    try:
        text = read_text(path)
        document = parse_model(text, _Document)
        runs = tuple(
            PlannedRun(results, run.game, run.seed, run.run, run.evaluation, recipes)
            for run in document.runs
        )
        for run, listed in zip(runs, document.runs, strict=True):
            if run.folder != results / listed.folder:
                raise ValueError(f"{run.game} seed {run.seed} in another folder, {listed.folder}")
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        trouble = reason(error)
        if isinstance(error, ValidationError) and error.errors()[0]["type"] == "too_short":
            trouble = "it lists no run"
        raise ConfigurationError(
            f"{path}: not a plan ({trouble}); `drama plan` writes it anew"
        ) from None
    keys = Counter((run.game, run.seed) for run in runs)
    if twice := sorted(key for key, times in keys.items() if times > 1):
        raise ConfigurationError(f"{path}: lists {twice[0][0]} seed {twice[0][1]} more than once")
    return Plan(document.preset, results, document.complete_protocol, runs, sha256_text(text))
