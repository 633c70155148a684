"""The `drama` command: parses, calls, reports errors; nothing else.

Exit codes: 0 done, 2 wrong usage or configuration, 75 stopped on request and resumable, 1 anything
else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drama.config import parse_assignment
from drama.errors import ConfigurationError, DramaError
from drama.recipes import plan as make_plan
from drama.recipes import read_evaluation_recipe, read_recipe
from drama.stopping import stop_at_once

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="""Drama: a Mamba-2 world-model agent on Atari100k (arXiv 2410.08893).

    One run is one game and one seed: plan, train, evaluate, report, in this order. Snakemake calls
    the same commands for all runs.

    Exit codes: 0 done, 2 wrong usage or configuration, 75 stopped on request (the same command
    goes on), 1 anything else.""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe, such as results/quick/recipes/Pong/seed0.json.")
]
Device = Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")]
Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads. The same number gives the same bytes.")
]


@app.command()
def plan(
    config: Annotated[
        Path, typer.Option(help="File that says what to run: preset, games, seeds.")
    ] = Path("config/config.yaml"),
    preset: Annotated[
        str | None, typer.Option(help="A preset of config/presets, instead of the file's.")
    ] = None,
    games: Annotated[
        str | None, typer.Option(help="Games instead of the file's, such as Pong,Krull.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds instead of the file's, such as 0,1,2.")
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting for every game, such as training.total_steps=20000; can be repeated. "
            "Its keys are those of config/presets/xs.yaml.",
        ),
    ] = None,
) -> None:
    """Resolve the configuration into one recipe per game and seed.

    Recipes go to `results/<preset>/recipes/<Game>/seed<k>.json`; each is written only when its
    content changes. Nothing is written when anything in the configuration is wrong.
    """
    overrides = {
        "preset": preset,
        "games": None if games is None else [name.strip() for name in games.split(",")],
        "seeds": None if seeds is None else _numbers(seeds),
    }
    planned = make_plan(config, overrides, [parse_assignment(text) for text in assign or ()])
    whole = sum(run.record.exists() for run in planned.runs)
    count = f"{len(planned.runs)} run{'s' * (len(planned.runs) != 1)}"
    print(
        f"{count} planned under preset {planned.preset}, {whole} of them trained: "
        f"{planned.results / 'recipes'}"
    )


@app.command()
def train(
    recipe: RecipeFile,
    device: Device = "auto",
    threads: Threads = 1,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Agent steps between checkpoints; they change no result.")
    ] = 2000,
) -> None:
    """Train one run from its recipe; the same command goes on where it stopped.

    Everything goes to `results/<preset>/runs/<Game>/seed<k>/`; `run-<fingerprint>.json` is written
    last and says that the run is whole. SIGTERM and Ctrl-C save and exit with code 75. Another run
    found in the folder is moved to `results/<preset>/superseded/`, never overwritten.
    """
    with stop_at_once():
        files = read_recipe(recipe)
        from drama.jobs import train_run

        train_run(files, _device(device), threads, checkpoint_every)


@app.command()
def evaluate(recipe: RecipeFile, device: Device = "auto", threads: Threads = 1) -> None:
    """Score a finished run with greedy episodes, as its evaluation recipe says.

    That recipe lies beside the run's, `seed<k>.evaluation.json`. Writes one row per episode to
    `evaluation-<fingerprint>.parquet` in the run's folder and prints the mean return.
    """
    with stop_at_once():
        files = read_recipe(recipe)
        evaluation = read_evaluation_recipe(files)
        from drama.jobs import evaluate_run

        evaluate_run(files, evaluation, _device(device), threads)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A preset's results, such as results/quick.")],
) -> None:
    """Write scores, figures and one page from a preset's finished runs, and print the table.

    Reads the plan, recipes/report.json, and the runs and evaluations it names; writes to report/
    in the same folder. Every planned run must be trained and evaluated.
    """
    from rich.console import Console

    from drama.report import console_table, write_report

    written = write_report(results)
    console = Console()
    console.print(console_table(written))
    console.print(f"Report: {results / 'report' / 'index.html'}")


@app.command()
def check(
    results: Annotated[Path, typer.Argument(help="A preset's results, such as results/quick.")],
    at_least: Annotated[
        float | None, typer.Option(help="Every run's mean return must reach this.")
    ] = None,
    below: Annotated[
        float | None, typer.Option(help="Every run's mean return must stay below this.")
    ] = None,
) -> None:
    """Hold every run of a report to a bound; exits with code 1 when one misses it."""
    from drama.report import read_returns

    if at_least is None and below is None:
        raise ConfigurationError("drama check: give a bound, --at-least or --below")
    misses = 0
    for game, seed, mean in read_returns(results):
        reached = (at_least is None or mean >= at_least) and (below is None or mean < below)
        misses += not reached
        print(f"{'ok    ' if reached else 'MISSED'} {game} seed {seed}: mean return {mean:.3f}")
    if misses:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--seeds {text!r}: expected numbers such as 0,1,2") from None


def _device(name: str) -> torch.device:
    """Turn a device's name into one that is there."""
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name}: allowed are auto, cpu, cuda, cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use cpu or auto"
        )
    return device


def main() -> None:
    """Run the command; turn an error for people into its message and exit code."""
    try:
        app()
    except DramaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:  # a full disk, a folder that cannot be written to
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
