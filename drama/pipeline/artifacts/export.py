"""Exporting a run's agent: its weights and a card that says what they are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from drama.files import canonical_json, sha256_file, write_text
from drama.pipeline.artifacts.evaluations import Evaluation
from drama.pipeline.artifacts.records import (
    Damaged,
    RecordedRun,
    evaluations_of,
    find_record,
    read_record,
)
from drama.pipeline.artifacts.weights import WeightsError, write_weights
from drama.runs.checkpoint import load_checkpoint
from drama.runs.folder import CHECKPOINT, SHORT, locked

PAPER = "xs"
"""The preset that is the published agent."""


def export(place: Path) -> tuple[Path, Path]:
    """Write a whole run's weights and their card into its folder; the same run, the same bytes.

    Args:
        place: the run's recipe, record or folder.

    Returns:
        The weights and the card.

    Raises:
        ConfigurationError: when there is no whole run, or more than one.
        WeightsError, Damaged, CheckpointError: when the checkpoint is not here or not the recorded
            one, or what was written does not read back.
        OtherCode: when today's code builds another agent from the run's recipe.
    """
    record = find_record(place)
    with locked(record.parent):
        run = read_record(record)
        checkpoint = run.folder / CHECKPOINT
        if not checkpoint.is_file():
            raise WeightsError(f"{checkpoint}: not here; `dvc pull {run.stage}` where DVC keeps it")
        if sha256_file(checkpoint) != run.checkpoint.sha256:
            raise Damaged(
                f"{checkpoint}: not the bytes that {run.path.name} recorded; nothing is exported. "
                f"Remove it, then `dvc pull {run.stage}`, or put back a good copy"
            )
        evaluations = evaluations_of(run)
        weights = write_weights(run, load_checkpoint(checkpoint, run.fingerprint)["agent"])
        card = weights.with_suffix(".md")
        write_text(card, card_text(run, weights, evaluations))
    return weights, card


def card_text(run: RecordedRun, weights: Path, evaluations: list[Evaluation]) -> str:
    """Return the model card of exported weights, in Markdown."""
    return "\n".join(
        [*_what(run), *_use(run, weights), *_scores(evaluations), *_origin(run, weights)]
    )


def _what(run: RecordedRun) -> Iterator[str]:
    recipe = run.recipe
    yield f"# {recipe.game}, preset {recipe.preset}, seed {recipe.seed}"
    yield ""
    yield (
        f"A reinforcement-learning agent: a world model with {recipe.settings.sequence_model.kind} "
        "as its sequence"
    )
    yield "model, and an actor that learned in what it imagines. The method is Drama"
    yield "([arXiv 2410.08893](https://arxiv.org/abs/2410.08893)),"
    yield f"trained for {run.record.steps:,} agent steps of {recipe.game}."
    yield ""
    yield "What it is not:"
    yield ""
    yield "- not the authors' weights: this is a reimplementation;"
    if recipe.preset != PAPER:
        yield (
            f"- not the paper's agent: preset `{recipe.preset}` has other sizes or another "
            "schedule, and its scores are no reproduction;"
        )
    yield "- not a mean over seeds: it is one run, and other seeds score otherwise;"
    yield "- of no use in another game, or with frames made otherwise than its settings say."
    yield ""


def _use(run: RecordedRun, weights: Path) -> Iterator[str]:
    yield "## Playing"
    yield ""
    yield "```python"
    yield "import drama"
    yield ""
    yield f'run = drama.load("{weights.name}")  # refuses a damaged file'
    yield "print(run.play(episodes=1))  # run.agent is a torch module, run.recipe its settings"
    yield "```"
    yield ""
    yield "In a clone, `drama verify` on this folder holds the files to their checksums and plays"
    yield "the recorded episodes again."
    yield ""


def _scores(evaluations: list[Evaluation]) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if not evaluations:
        yield "None is recorded."
        yield ""
        return
    yield "An episode's return is the game's own points, unclipped; the final checkpoint plays."
    yield "Where the game itself is not random, episodes differ by their random first action and"
    yield "the agent's own random numbers: *different* counts those that do."
    yield ""
    yield "| evaluation | actions | device | episodes | different | mean | lowest | highest |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for evaluation in evaluations:
        for played in evaluation.played.values():
            different = "unknown" if played.different is None else played.different
            yield (
                f"| `{evaluation.fingerprint[:SHORT]}` | {played.actions} | {evaluation.device} | "
                f"{played.episodes} | {different} | {played.mean_return:g} | "
                f"{min(played.returns):g} | {max(played.returns):g} |"
            )
    yield ""


def _origin(run: RecordedRun, weights: Path) -> Iterator[str]:
    record = run.record
    trained = timedelta(seconds=round(record.wall_seconds))
    yield "## Where it comes from"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in (
        ("run (fingerprint)", f"`{run.fingerprint}`"),
        ("code (git commit)", f"`{record.git_commit or 'unknown'}`"),
        ("trained on", f"{record.device}, in {trained} h, {record.finished}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        (f"SHA-256 of `{weights.name}`", f"`{sha256_file(weights)}`"),
        ("SHA-256 of the checkpoint", f"`{run.checkpoint.sha256}`"),
    ):
        yield f"| {name} | {value} |"
    yield ""
    yield "The weights are under the Apache License 2.0, like the code. The file is safetensors;"
    yield "its metadata holds the recipe below, and checksums."
    yield ""
    yield "## Settings"
    yield ""
    yield "```json"
    yield canonical_json(run.record.recipe).rstrip("\n")
    yield "```"
    yield ""
