"""The `drama` command: parses, calls, reports errors; nothing else.

Exit codes: 0 done, 2 wrong usage or configuration, 75 stopped on request and resumable, 1 anything
else.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from drama.agent.settings import Backend
from drama.errors import ConfigurationError, DramaError, reason
from drama.pipeline import gpus
from drama.pipeline.config import nearest, parse_assignment
from drama.pipeline.history import earlier_run
from drama.pipeline.recipes import plan as make_plan
from drama.pipeline.recipes import read_recipe
from drama.runs.stopping import stop_at_once

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


RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe, such as results/quick/recipes/Pong/seed0.json.")
]
Device = Annotated[
    str, typer.Option(help="auto (a GPU when there is one), cpu, cuda (the least taken) or cuda:N.")
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="What computes Mamba-2: auto (mamba_ssm on a GPU where it loads, torch elsewhere), "
        "torch or mamba_ssm; the same but for rounding.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, max=1024, help="CPU threads. The same number gives the same bytes.")
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
    earlier = sum(earlier_run(run.folder, run.recipe) is not None for run in planned.runs) - whole
    count = f"{len(planned.runs)} run{'s' * (len(planned.runs) != 1)}"
    print(
        f"{count} planned under preset {planned.preset}, {whole} of them trained"
        f"{f', {earlier} by earlier code' * (earlier > 0)}: {planned.results / 'recipes'}"
    )
    whole_plan = not assign and all(value is None for value in overrides.values())
    if whole_plan and config == Path("config/config.yaml"):
        from drama.pipeline.artifacts.ledger import record_plan

        if trouble := record_plan():
            print(f"The recipes are written, but not noted in DVC: {trouble}", file=sys.stderr)


@app.command()
def train(
    recipe: RecipeFile,
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = 1,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            parser=_steps,
            metavar="INTEGER",
            help="Agent steps between checkpoints, instead of five minutes; they change no result.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Take the plain path, with backend torch: slower, the same but for rounding.",
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            parser=_steps, metavar="INTEGER", help="Go on with this finished run to so many."
        ),
    ] = None,
) -> None:
    """Train one run from its recipe; the same command goes on where it stopped.

    With `--steps`, a finished run is gone on with: as another run, with a recipe and a fingerprint
    of its own, in `results/<preset>-to<steps>/`. The finished one stays as it is.

    Everything goes to `results/<preset>/runs/<Game>/seed<k>/`; `run-<fingerprint>.json` is written
    last and says that the run is whole. SIGTERM and Ctrl-C save and exit with code 75. Another run
    found in the folder is moved to `results/<preset>/superseded/` as this one begins, never
    overwritten.
    """
    with stop_at_once():
        if steps is None:
            files = read_recipe(recipe)
        else:
            from drama.pipeline.extensions import extend

            files = extend(recipe, steps)
        from drama.agent.training.runtime import Runtime
        from drama.pipeline.jobs import train_run

        runtime = Runtime(_device(device), threads, checkpoint_every, plain, _backend(backend))
        train_run(files, runtime)


@app.command()
def evaluate(
    recipe: RecipeFile,
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = 1,
) -> None:
    """Score a finished run over evaluation episodes, as its evaluation recipe says.

    That recipe lies beside the run's, `seed<k>.evaluation.json`; `drama plan` writes it from the
    section `evaluation` of the preset: greedy or sampled actions, or both, and how many episodes.
    Writes one row per episode to `evaluation-<fingerprint>.parquet` in the run's folder and prints
    the mean return and how many episodes are different: where the game itself is not random, they
    differ only by their first action and the agent's random numbers. A whole run of earlier code
    with the recipe's settings is scored in its place, by today's code.
    """
    with stop_at_once():
        from drama.pipeline.jobs import evaluate_run, find_scored

        files, evaluation = find_scored(recipe)
        evaluate_run(files, evaluation, _device(device), threads, _backend(backend))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A preset's results, such as results/quick.")],
) -> None:
    """Write scores, figures and one page from a preset's finished runs, and print the table.

    Reads the plan, recipes/report.json, and the runs and evaluations it names; writes to report/
    in the same folder. Every planned run must be trained and evaluated; a whole run of the same
    settings and of earlier code stands in for one that is not, and is marked.
    """
    from rich.console import Console

    from drama.report import console_table, write_report

    written = write_report(results)
    console = Console()
    console.print(console_table(written))
    console.print(f"Report: {results / 'report' / 'index.html'}")


@app.command()
def verify(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Recipes, run folders, or results such as results/xs; those of config/config.yaml "
            "when left out."
        ),
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check checksums and play nothing.")
    ] = False,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Play the first so many episodes of each evaluation only."),
    ] = None,
    device: Device = "auto",
    threads: Threads = 1,
) -> None:
    """Hold recorded runs to their records: every file's checksum, then the score.

    The checkpoint, or where that is not here the exported weights, plays each recorded evaluation
    again, with its seeds and settings and today's code. On the kind of device and the library
    versions it was made with, every episode must come out exactly. Exits with code 1 when a run
    does not hold, or when it would take earlier code to play it.
    """
    with stop_at_once():
        import torch

        from drama.pipeline.artifacts.records import find_records
        from drama.pipeline.artifacts.verify import verify as verify_run

        torch.set_num_threads(threads)
        records = find_records(runs)
        play_on = _device(device)
        failed = 0
        for record in records:
            verdict = verify_run(record, play_on, play_again=not files_only, episodes=episodes)
            failed += not verdict.holds
            print(f"{verdict.finding.name.lower():10} {record.parent}: {verdict.text}", flush=True)
    print(f"{len(records) - failed} of {len(records)} runs hold")
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A whole run's recipe, record or folder.")],
) -> None:
    """Export a whole run's agent: its weights as safetensors, and a card that describes them.

    Writes `weights-<fingerprint>.safetensors` and `.md` into the run's folder; `drama evaluate` and
    `drama verify` play with them where the checkpoint is not, and so does `drama.load` in Python.
    """
    with stop_at_once():
        from drama.pipeline.artifacts.export import export as export_run

        weights, card = export_run(run)
    print(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB\n{card}")


@app.command()
def record(
    results: Annotated[
        Path | None, typer.Argument(help="A preset's results; others than dvc.yaml's are left.")
    ] = None,
    if_kept: Annotated[
        bool, typer.Option("--if-kept", help="Say nothing where DVC does not keep these results.")
    ] = False,
) -> None:
    """Record every finished run, its evaluation and the report in DVC.

    Puts the files of whole runs into DVC's cache and their checksums into dvc.lock, after holding
    them to the run's own record; `dvc push` then carries them to where others can pull them.
    Snakemake gives this command whenever it ends.
    """
    from drama.pipeline.artifacts.ledger import NothingToRecord
    from drama.pipeline.artifacts.ledger import record as record_runs

    try:
        done = record_runs(results)
    except NothingToRecord:
        if if_kept:
            return
        raise
    for line in (*done.notes, *done.problems):
        print(line, file=sys.stderr)
    print(done.summary)
    if done.problems:
        raise typer.Exit(1)


@app.command()
def stages() -> None:
    """Write dvc.yaml out of config/config.yaml, after its games, seeds or preset changed."""
    from drama.pipeline.artifacts.stages import DVC_YAML, write_stages

    print(f"{DVC_YAML}: {write_stages()} stages")


@app.command()
def status(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Results, such as results/xs; everything in results/ when left out."),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=86_400,
            callback=_finite,
            help="Show it anew after so many seconds, until Ctrl-C.",
        ),
    ] = None,
) -> None:
    """Show how every planned run is getting on, from files alone, on whichever node.

    waiting; running; stopped on request and lost to a kill, which both go on where they were when
    training is started again; trained; done, with the evaluation's mean return instead of the last
    episode's; earlier code, for a whole run of the same settings that other code made; failed, with
    the last line of the run's log.
    """
    from rich.console import Console

    from drama.pipeline.artifacts.status import planned_results, read_statuses, remarks, table

    console = Console(highlight=False)
    while True:
        plans = [
            (folder, read_statuses(folder))
            for folder in planned_results(results or [Path("results")])
        ]
        if watch:
            console.clear()
        for folder, runs in plans:
            console.print(f"{folder}")
            console.print(table(runs))
            for line in remarks(runs):
                console.print(line, soft_wrap=True, markup=False)
        if not watch:
            return
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return


@app.command()
def accept(
    commit: Annotated[
        str | None,
        typer.Argument(help="The earlier commit; by default the one that was accepted last."),
    ] = None,
) -> None:
    """Hold the committed code against an earlier commit's; if equal, recorded runs stay current.

    Both train and play the same short runs, in some minutes. When all bytes agree, the hashes of
    today's code go into `drama/pipeline/accepted.json`, which belongs into the next commit.
    """
    from drama.pipeline.accept import accept as accept_code

    for line in accept_code(commit):
        print(line, flush=True)


@app.command()
def check(
    results: Annotated[Path, typer.Argument(help="A preset's results, such as results/quick.")],
    at_least: Annotated[
        float | None,
        typer.Option(callback=_finite, help="Every run's mean return must reach this."),
    ] = None,
    mean_below: Annotated[
        float | None,
        typer.Option(
            callback=_finite,
            help="The mean over all runs must stay below this, as a control's should.",
        ),
    ] = None,
) -> None:
    """Hold the runs of a report to a bound; exits with code 1 when it is missed."""
    from drama.report import read_returns

    if at_least is None and mean_below is None:
        raise ConfigurationError("drama check: give a bound, --at-least or --mean-below")
    returns = read_returns(results)
    misses = 0
    for game, seed, value in returns:
        reached = at_least is None or value >= at_least
        misses += not reached
        print(f"{'ok    ' if reached else 'MISSED'} {game} seed {seed}: mean return {value:.3f}")
    if mean_below is not None:
        value = mean(value for _, _, value in returns)
        misses += not value < mean_below
        print(f"{'ok    ' if value < mean_below else 'MISSED'} all runs: mean return {value:.3f}")
    if misses:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--seeds {text!r}: expected numbers such as 0,1,2") from None


def _device(name: str) -> torch.device:
    """Turn a device's name into one that is there; without a number, the GPU fewest others took."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    if device.type == "cuda" and device.index is None:
        every = range(torch.cuda.device_count())
        names = [str(torch.cuda.get_device_properties(index).uuid) for index in every]
        device = torch.device("cuda", gpus.claim(names))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _backend(name: str) -> Backend:
    names = get_args(Backend)
    if name not in names:
        raise ConfigurationError(f"--backend {name}: {nearest(name, names)}")
    return cast(Backend, name)


def main() -> None:
    """Run the command; turn an error for people into its message and exit code."""
    try:
        app()
    except DramaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:  # a full disk, a folder that cannot be written to
        file = getattr(error, "filename", None)
        print(f"{f'{file}: ' if file else ''}{reason(error)}. When that is mended, give the same "
              "command again", file=sys.stderr)  # fmt: skip
        sys.exit(1)
