"""What the commands of `drama` take: each option's type, its help, its completion."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import drama
from drama.agent.settings import GAMES, Backend
from drama.pipeline.config import preset_files


def _show_version(asked: bool) -> None:
    if asked:
        print(f"drama {drama.__version__}")
        raise typer.Exit


def _steps(text: str) -> int:
    """Read a number of agent steps, which can be written 2e5 as well."""
    with suppress(ValueError):
        number = float(text)
        if number.is_integer() and 1 <= number <= 1_000_000_000:
            return int(number)
    raise typer.BadParameter(f"{text!r}: expected a whole number from 1 to 1000000000")


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def _complete_games(incomplete: str) -> list[str]:
    """Complete the last of several names; ale-py, which knows more of them, loads too slowly."""
    before = incomplete[: incomplete.rfind(",") + 1]
    return [before + game for game in GAMES]


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
]

# --- what is planned -----------------------------------------------------------------------------

Experiment = Annotated[
    Path,
    typer.Option(
        "--config",
        metavar="FILE",
        help="File that says what to run: preset, games, seeds. If it is not there, drama's own.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=lambda: list(preset_files()),
        help="Another preset than the file's: drama's own, or one in config/presets.",
    ),
]
Games = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        autocompletion=_complete_games,
        help="Games instead of the file's, such as Pong,Krull.",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="NUMBERS", help="Seeds instead of the file's, such as 0,1,2.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting for every game, such as training.total_steps=20000; can be repeated. Its "
        "keys are those of config/presets/xs.yaml.",
    ),
]

# --- runs and results ----------------------------------------------------------------------------

RecipeFile = Annotated[
    Path, typer.Argument(help="By drama plan, such as results/quick/recipes/Pong/seed0.json.")
]
WholeRun = Annotated[Path, typer.Argument(help="A whole run's recipe, record or folder.")]
WholeRuns = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Recipes, run folders, or results such as results/xs; those of config/config.yaml "
        "when left out."
    ),
]
Results = Annotated[Path, typer.Argument(help="A preset's results, such as results/quick.")]
PlanFolder = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FOLDER",
        help="Plan and recipes of a campaign, as Snakemake gives them; by default today's.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Only say what would be planned; write nothing.")
]
RecordedResults = Annotated[
    Path | None, typer.Argument(help="A preset's results; only those in dvc.yaml are recorded.")
]
SeveralResults = Annotated[
    list[Path] | None,
    typer.Argument(help="Results, such as results/xs; everything in results/ when left out."),
]

PlannedResults = Annotated[
    Path | None,
    typer.Argument(
        help="A preset's results, such as results/xs; those of config/config.yaml when left out."
    ),
]
CrateFolder = Annotated[
    Path | None,
    typer.Option(
        "--to",
        metavar="FOLDER",
        help="Where the crate is to be: crates/<preset> when left out. An earlier one is replaced.",
    ),
]
WithLarge = Annotated[
    bool,
    typer.Option(
        "--with-large",
        help="Put in checkpoints and replay that are here, not only their names and checksums.",
    ),
]

# --- how a command works -------------------------------------------------------------------------

Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto (a GPU when there is one), cpu, cuda (the least taken), cuda:N."
    ),
]
BackendName = Annotated[
    Backend,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What computes Mamba-2: auto (mamba_ssm on a GPU where it loads, torch elsewhere), "
        "torch or mamba_ssm; the same but for rounding.",
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, max=1024, help="CPU threads. The same number gives the same bytes."
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        parser=_steps,
        metavar="STEPS",
        help="Agent steps between checkpoints, instead of five minutes; they change no result.",
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="Take the plain path, with backend torch: slower, the same but for rounding.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Have a GPU add in a fixed order, for the same bytes each time; slower.",
    ),
]
TotalSteps = Annotated[
    int | None,
    typer.Option(
        parser=_steps, metavar="STEPS", help="Go on with this finished run, to so many in all."
    ),
]
FilesOnly = Annotated[bool, typer.Option("--files-only", help="Check checksums and play nothing.")]
Episodes = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Play the first so many episodes of each evaluation only."
    ),
]
IfKept = Annotated[
    bool, typer.Option("--if-kept", help="Say nothing where DVC does not keep these results.")
]
Seconds = Annotated[
    int | None,
    typer.Option(
        metavar="SECONDS",
        min=1,
        max=86_400,
        help="Show it anew after so many seconds, until Ctrl-C.",
    ),
]
Every = Annotated[bool, typer.Option("--all", help="Show every run, however many there are.")]
AtLeast = Annotated[
    float | None,
    typer.Option(
        metavar="RETURN", callback=_finite, help="Every run's mean return must reach this."
    ),
]
MeanBelow = Annotated[
    float | None,
    typer.Option(
        metavar="RETURN",
        callback=_finite,
        help="The mean over all runs must stay below this, as a control's should.",
    ),
]
Commit = Annotated[
    str | None,
    typer.Argument(help="The earlier commit; by default the one that was accepted last."),
]
