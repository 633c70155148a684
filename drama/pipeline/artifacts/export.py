"""Exporting a run's agent: its weights and a card that says what they are."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from drama.files import canonical_json, sha256_file, write_text
from drama.pipeline.artifacts.agents import read_agent
from drama.pipeline.artifacts.evaluations import Evaluation
from drama.pipeline.artifacts.records import (
    RecordedRun,
    evaluations_of,
    find_record,
    read_record,
)
from drama.pipeline.artifacts.weights import WeightsError, read_weights_of, write_weights
from drama.runs.folder import CHECKPOINT, SHORT, locked

PAPER = "xs"
"""The preset that is the published agent."""


def export(place: Path) -> tuple[Path, Path]:
    """Write a whole run's weights and their card into its folder; the same run, the same bytes.

    Where the checkpoint is not, weights that are stay as they are, and the card alone is written.

    Args:
        place: the run's recipe, record or folder.

    Returns:
        The weights and the card.

    Raises:
        ConfigurationError: when there is no whole run, or more than one.
        WeightsError, Damaged, CheckpointError: when there is neither checkpoint nor weights, they
            are not the recorded ones, or what was written does not read back.
        OtherCode: when today's code builds another agent from the run's recipe.
    """
    record = find_record(place)
    with locked(record.parent):
        run = read_record(record)
        evaluations = evaluations_of(run)
        checkpoint = run.folder / CHECKPOINT
        if not checkpoint.is_file():
            if not run.weights.is_file():
                raise WeightsError(
                    f"{checkpoint}: not here; `dvc pull {run.stage}` where DVC keeps it"
                )
            read_weights_of(run)
        else:
            write_weights(run, read_agent(run))
        card = run.weights.with_suffix(".md")
        write_text(card, card_text(run, evaluations))
    return run.weights, card


def card_text(run: RecordedRun, evaluations: list[Evaluation]) -> str:
    """Return the model card of exported weights, in Markdown."""
    recipe, record = run.recipe, run.record
    trained = timedelta(seconds=round(record.wall_seconds))
    smaller = (
        f"- not the paper's agent: preset `{recipe.preset}` has other sizes or another schedule, "
        "and its scores are no reproduction;\n"
    )
    return f"""\
# {recipe.game}, preset {recipe.preset}, seed {recipe.seed}

A reinforcement-learning agent: a world model with {recipe.settings.sequence_model.kind} \
as its sequence
model, and an actor that learned in what it imagines. The method is Drama
([arXiv 2410.08893](https://arxiv.org/abs/2410.08893)),
trained for {record.steps:,} agent steps of {recipe.game}.

What it is not:

- not the authors' weights: this is a reimplementation;
{smaller if recipe.preset != PAPER else ""}\
- not a mean over seeds: it is one run, and other seeds score otherwise;
- of no use in another game, or with frames made otherwise than its settings say.

## Playing

```python
import drama

run = drama.load("{run.weights.name}")  # refuses a damaged file
print(run.play(episodes=1))  # run.agent is a torch module, run.recipe its settings
```

In a clone, `drama verify` on this folder holds the files to their checksums and plays
the recorded episodes again.

## Scores

{_scores(evaluations) if evaluations else "None is recorded."}

## Where it comes from

| | |
|---|---|
| run (fingerprint) | `{run.fingerprint}` |
| code (git commit) | `{record.git_commit or "unknown"}` |
| trained on | {record.device}, in {trained} h, {record.finished} |
| versions | {", ".join(f"{name} {version}" for name, version in record.versions.items())} |
| SHA-256 of `{run.weights.name}` | `{sha256_file(run.weights)}` |
| SHA-256 of the checkpoint | `{run.checkpoint.sha256}` |

The weights are under the Apache License 2.0, like the code. The file is safetensors;
its metadata holds the recipe below, and checksums.

## Settings

```json
{canonical_json(record.recipe)}\
```
"""


def _scores(evaluations: list[Evaluation]) -> str:
    rows = [
        f"| `{evaluation.fingerprint[:SHORT]}` | {played.actions} | {evaluation.device} | "
        f"{played.episodes} | {played.different} | {played.mean_return:g} | "
        f"{min(played.returns):g} | {max(played.returns):g} |"
        for evaluation in evaluations
        for played in evaluation.played.values()
    ]
    return "\n".join(
        (
            "An episode's return is the game's own points, unclipped; the final checkpoint plays.",
            "Where the game itself is not random, episodes differ by their random first action and",
            "the agent's own random numbers: *different* counts those that do.",
            "",
            "| evaluation | actions | device | episodes | different | mean | lowest | highest |",
            "|---|---|---|---:|---:|---:|---:|---:|",
            *rows,
        )
    )
