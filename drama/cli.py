"""The `drama` command: parses, calls, reports errors; nothing else."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from statistics import mean

import typer

from drama import options
from drama.errors import ConfigurationError, DramaError, reason, shown
from drama.pipeline import gpus
from drama.pipeline.config import project_file
from drama.pipeline.history import earlier_run
from drama.pipeline.layers import few, parse_assignment
from drama.pipeline.recipes import prepare, read_recipe
from drama.runs.stopping import stop_at_once
from drama.streams import settle_streams

EXPERIMENT = Path("config/config.yaml")
PIPELINE, RESULTS = "From configuration to report, in this order", "What is there, and keeping it"

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def about(version: options.Version = False) -> None:
    """Drama: a Mamba-2 world-model agent on Atari100k (arXiv 2410.08893).

    One run is one game and one seed. At toy size, in minutes and on a CPU:

        drama plan --preset quick --games Pong --seeds 0
        drama train results/quick/recipes/Pong/seed0.json
        drama evaluate results/quick/recipes/Pong/seed0.json
        drama report results/quick

    Snakemake gives the same commands for many runs.

    Exit codes: 0 done, 2 wrong usage or configuration, 3 failed and would again (a loss that is not
    finite, a damaged file of the run), 75 stopped on request (the same command goes on), 1 anything
    else.
    """


# --- from configuration to report ----------------------------------------------------------------


@app.command(rich_help_panel=PIPELINE)
def plan(
    config: options.Experiment = EXPERIMENT,
    preset: options.Preset = None,
    games: options.Games = None,
    seeds: options.Seeds = None,
    assign: options.Assignments = None,
    dry_run: options.DryRun = False,
) -> None:
    """Turn the configuration into one recipe per game and seed.

    Recipes go to `results/<preset>/recipes/<Game>/seed<k>.json`; each is written only when its
    content changes. Nothing is written when anything in the configuration is wrong.

    With `--games` or `--seeds`, everything else stays planned as it was; without, recipes of runs
    that the file does not ask for any more are removed. Runs never are.
    """
    file = project_file(config)
    overrides = {"preset": preset, "games": games, "seeds": seeds}
    planning = prepare(file, overrides, [parse_assignment(text) for text in assign or ()])
    if file != config:
        print(f"{config}: not here; planned from {file}", file=sys.stderr)
    planned, runs = planning.plan, planning.asked
    changed, left = planning.changed(), planning.left()
    if not dry_run:
        planning.write()
    whole = sum(run.record.exists() for run in runs)
    earlier = sum(earlier_run(run.folder, run.recipe) is not None for run in runs) - whole
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    print(
        f"{count} planned under preset {planned.preset}, {whole} of them trained"
        f"{f', {earlier} by earlier code' * (earlier > 0)}: {planned.results / 'recipes'}"
    )
    if dry_run and changed:
        print(f"Would be written: {few([f'{run.game} seed {run.seed}' for run in changed])}")
    if left:
        names = few([f"{path.parent.name} {path.stem}" for path in left])
        print(f"Not asked for any more, recipe{' to be' * dry_run} removed: {names}")
    if dry_run:
        return
    if file == EXPERIMENT and not assign and all(value is None for value in overrides.values()):
        from drama.pipeline.artifacts.ledger import record_plan

        if trouble := record_plan():
            print(f"The recipes are written, but not noted in DVC: {trouble}", file=sys.stderr)


@app.command(rich_help_panel=PIPELINE)
def train(
    recipe: options.RecipeFile,
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    threads: options.Threads = 1,
    checkpoint_every: options.CheckpointEvery = None,
    plain: options.Plain = False,
    steps: options.TotalSteps = None,
    deterministic: options.Deterministic = False,
) -> None:
    """Train a recipe's run; given again, it goes on where it stopped.

    Everything goes to `results/<preset>/runs/<Game>/seed<k>/`; `run-<fingerprint>.json` is written
    last and says that the run is whole. SIGTERM, SIGHUP and Ctrl-C save and exit with code 75.
    Another run found in the folder is moved to `results/<preset>/superseded/`, never overwritten.

    With `--steps`, a finished run goes on: as another run, with a recipe and a fingerprint of its
    own, in `results/<preset>-to<steps>/`. The finished one stays as it is.
    """
    with stop_at_once():
        if steps is None:
            files = read_recipe(recipe)
        else:
            from drama.pipeline.extensions import extend

            files = extend(recipe, steps)
        from drama.agent.training.runtime import Runtime
        from drama.pipeline.jobs import train_run

        play_on = gpus.choose(device, deterministic)
        train_run(files, Runtime(play_on, threads, checkpoint_every, plain, backend))


@app.command(rich_help_panel=PIPELINE)
def evaluate(
    recipe: options.RecipeFile,
    device: options.Device = "auto",
    backend: options.BackendName = "auto",
    threads: options.Threads = 1,
    deterministic: options.Deterministic = False,
) -> None:
    """Score a trained run by episodes that it plays; given again, it goes on where it stopped.

    `seed<k>.evaluation.json` beside the recipe says how: greedy or sampled actions, or both, and
    how many episodes; `drama plan` writes it from the section `evaluation` of the preset.

    Writes one row per episode to `evaluation-<fingerprint>.parquet` in the run's folder, prints the
    mean return and how many episodes differ: often only by first action and the agent's chance.

    A whole run of earlier code with the recipe's settings is scored in its place, by today's code.
    """
    with stop_at_once():
        from drama.pipeline.jobs import evaluate_run, find_scored

        files, evaluation = find_scored(recipe)
        evaluate_run(files, evaluation, gpus.choose(device, deterministic), threads, backend)


@app.command(rich_help_panel=PIPELINE)
def report(results: options.Results, plan: options.PlanFolder = None) -> None:
    """Write scores, figures and one page from a preset's runs, whenever one is finished.

    Reads the plan, `recipes/report.json`, and the runs and evaluations it names; writes to
    `report/` in the same folder, and prints the table. While planned runs are missing, the report
    is of those that are trained and evaluated, says so, and names the others by how far they are.
    A whole run of the same settings and of earlier code stands in for one that is missing, and is
    marked.
    """
    from rich.console import Console

    from drama.report import console_table, write_report

    written = write_report(results, plan)
    console = Console()
    console.print(console_table(written))
    for group in written.missing_by_state:
        print(textwrap.fill(str(group), min(console.width, 100), subsequent_indent="  "))
    console.print(f"Report: {results / 'report' / 'index.html'}")


# --- what is there, and keeping it ---------------------------------------------------------------


@app.command(rich_help_panel=RESULTS)
def status(
    results: options.SeveralResults = None,
    watch: options.Seconds = None,
    every: options.Every = False,
) -> None:
    """Show how every planned run is getting on.

    Told from files alone, on whichever machine sees them. A run is

    - *waiting*, *running* or *failed*, with the last line of its log;
    - *stopped* on request, or *lost* to a kill: both go on where they were when training is started
      again;
    - *trained*, or *done* when it is evaluated too, with that mean return instead of the last
      episode's;
    - *earlier code*, when a whole run of the same settings that other code made lies there.

    Of more than 20 runs, those that failed, run, were lost or stopped come first, as many as there
    is room for; the others are told together. With `--watch`, a terminal shows it in place, until
    Ctrl-C; a pipe gets it again and again.
    """
    from drama.pipeline.artifacts.overview import show_results

    show_results(results or [Path("results")], watch, every=every)


@app.command(rich_help_panel=RESULTS)
def campaign(results: options.PlannedResults = None) -> None:
    """Say what a plan costs, how far it is, what runs where and when it ends.

    Hours and disk are estimated from the plan's finished runs, hours otherwise from the speed of
    those under way; before that they are not known, and no figure is given.
    """
    from datetime import datetime

    from rich.console import Console

    from drama.pipeline.artifacts.outlook import read_outlook, show
    from drama.pipeline.artifacts.stages import or_configured

    outlook = read_outlook(or_configured(results))
    Console(highlight=False).print(show(outlook, datetime.now().astimezone()))


@app.command(rich_help_panel=RESULTS)
def check(
    results: options.Results,
    at_least: options.AtLeast = None,
    mean_below: options.MeanBelow = None,
) -> None:
    """Hold a report's scores to a bound; exits with code 1 when it is missed."""
    from drama.report import read_partial, read_returns

    if at_least is None and mean_below is None:
        raise ConfigurationError("drama check: give a bound, --at-least or --mean-below")
    returns = read_returns(results)
    if partial := read_partial(results):
        print(f"A partial report: {partial}", file=sys.stderr)
    verdicts = [
        (f"{game} seed {seed}", value, at_least is None or value >= at_least)
        for game, seed, value in returns
    ]
    if mean_below is not None:
        value = mean(value for _, _, value in returns)
        verdicts.append(("all runs", value, value < mean_below))
    for name, value, held in verdicts:
        print(f"{'ok    ' if held else 'MISSED'} {name}: mean return {value:.3f}")
    if not all(held for _, _, held in verdicts):
        raise typer.Exit(1)


@app.command(rich_help_panel=RESULTS)
def verify(
    runs: options.WholeRuns = None,
    files_only: options.FilesOnly = False,
    episodes: options.Episodes = None,
    device: options.Device = "auto",
    threads: options.Threads = 1,
) -> None:
    """Hold recorded runs to their files' checksums, and play them again.

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
        failed, play_on = 0, gpus.choose(device)
        for record in records:
            verdict = verify_run(record, play_on, play_again=not files_only, episodes=episodes)
            failed += not verdict.holds
            print(verdict.line(record), flush=True)
    print(f"{len(records) - failed} of {len(records)} runs hold")
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=RESULTS)
def export(run: options.WholeRun) -> None:
    """Write a trained agent's weights as safetensors, with a card.

    Writes `weights-<fingerprint>.safetensors` and `.md` into the run's folder; `drama evaluate` and
    `drama verify` play with them where the checkpoint is not, and so does `drama.load` in Python.
    Without the checkpoint, weights that are there stay and the card alone is written.
    """
    with stop_at_once():
        from drama.pipeline.artifacts.export import export as export_run

        weights, card = export_run(run)
    print(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB\n{card}")


@app.command(rich_help_panel=RESULTS)
def crate(
    results: options.PlannedResults = None,
    to: options.CrateFolder = None,
    with_large: options.WithLarge = False,
) -> None:
    """Write a plan's trained runs as a Workflow Run RO-Crate, a folder to archive.

    It holds workflow, recipes, report and the runs' small files, and says how each came about.
    """
    with stop_at_once():
        from drama.pipeline.artifacts.crate.writing import write_crate
        from drama.pipeline.artifacts.stages import or_configured

        written = write_crate(or_configured(results), to, with_large=with_large)
    print(*written.lines(), sep="\n")


@app.command(rich_help_panel=RESULTS)
def record(results: options.RecordedResults = None, if_kept: options.IfKept = False) -> None:
    """Record finished runs, their evaluations and the report in DVC.

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
        print(shown(line), file=sys.stderr)
    print(done.summary)
    if done.problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=RESULTS)
def stages() -> None:
    """Have DVC keep the results of config/config.yaml's preset, in place of another's.

    `drama record` then writes into dvc.yaml and dvc.lock what is recorded of them.
    """
    from drama.pipeline.artifacts.stages import DVC_YAML, write_stages

    print(f"{DVC_YAML}: DVC keeps {write_stages()}; `drama record` says what of it")


@app.command(rich_help_panel=RESULTS)
def accept(commit: options.Commit = None) -> None:
    """Hold the committed code against an earlier commit's; if equal, recorded runs stay current.

    Both train and play the same short runs, in some minutes. When all bytes agree, the hashes of
    today's code go into `drama/pipeline/accepted.json`, which belongs into the next commit.
    """
    from drama.pipeline.accept import accept as accept_code

    for line in accept_code(commit):
        print(line, flush=True)


@app.command(rich_help_panel=RESULTS)
def games() -> None:
    """List the games that can be named.

    The 26 of the benchmark come first, then ale-py's others and the project's own.
    """
    from drama.agent.env import game_names

    print("\n".join(game_names()))


def main() -> None:
    """Run the command; turn an error for people into its message and exit code."""
    settle_streams()
    try:
        app()
    except DramaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extras = "pip install 'drama-world-model[report,workflow]'"
        print(f"{error.name} is not installed here; `{extras}` brings it", file=sys.stderr)
        sys.exit(1)
    except (OSError, MemoryError) as error:  # a full disk, a folder that cannot be written to
        file = getattr(error, "filename", None)
        text = f"{f'{file}: ' if file else ''}{reason(error)}. When that is mended, give the same "
        print(shown(f"{text}command again"), file=sys.stderr)
        sys.exit(1)
