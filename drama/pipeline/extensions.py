"""Going on with a finished run: a longer run that begins where the finished one ended.

The longer run has a recipe of its own, which differs in `training.total_steps` and names the run it
goes on from, so its fingerprint is its own. It lives in results of its own, results/xs-to200000 for
results/xs, in the same layout; the finished run is only read. On a CPU it ends with the same agent,
replay and episodes as a run that was planned with as many steps.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from drama.agent.settings import EvaluationSettings
from drama.errors import ConfigurationError
from drama.files import remove_leftovers, replacing, sha256_file, sync_folder
from drama.pipeline.artifacts.records import read_record
from drama.pipeline.artifacts.verify import verify
from drama.pipeline.fingerprints import evaluation_code, report_code
from drama.pipeline.jobs import RunIncomplete, say
from drama.pipeline.plans import PlannedRun, plan_text
from drama.pipeline.recipes import (
    RunFiles,
    evaluation_recipe,
    evaluation_text,
    extended_preset,
    read_evaluation_recipe,
    read_recipe,
    recipe_text,
    run_files,
    shortened,
    write_changed,
)
from drama.runs.checkpoint import load_checkpoint, save_checkpoint
from drama.runs.folder import (
    CHECKPOINT,
    SHORT,
    STATUS,
    is_whole,
    locked,
    make_current,
    owner,
    superseded,
    versions,
)
from drama.runs.progress import Status

OTHER_CODE = (
    "Only what wrote a run's checkpoint can go on from it: go back to that code and those "
    "versions, or train the run anew, `drama plan` and `drama train`, and then go on with it"
)


def extend(path: Path, steps: int) -> RunFiles:
    """Make a longer run of a finished one, ready to be trained; one that is there stays as it is.

    Args:
        path: the finished run's recipe.
        steps: agent steps of the longer run, those of the finished one included.

    Returns:
        The longer run. A kill at any moment leaves its folder absent or complete.

    Raises:
        ConfigurationError: when there is no recipe, it is of other code or library versions, or
            has as many steps already.
        RunIncomplete: when the run is not whole, or its files are not those that it recorded.
    """
    ancestor = read_recipe(path, OTHER_CODE)
    extension = _longer(ancestor, steps)
    evaluation = read_evaluation_recipe(ancestor).settings
    if not _is_begun(extension):
        _check_whole(ancestor)
    with locked(extension.folder):
        if not _is_begun(extension):
            with locked(ancestor.folder):
                _take_over(ancestor, extension)
    _write_recipes(extension, evaluation)
    return extension


def _longer(ancestor: RunFiles, steps: int) -> RunFiles:
    training = ancestor.recipe.settings.training
    if steps <= training.total_steps:
        raise ConfigurationError(
            f"--steps {steps}: {ancestor.path} is a run of {training.total_steps} steps, and a "
            "longer one has more. Without --steps, `drama train` brings it to its own end"
        )
    longer = training.model_copy(update={"total_steps": steps})
    settings = ancestor.recipe.settings.model_copy(update={"training": longer})
    update = {"settings": settings, "ancestor": ancestor.fingerprint}
    recipe = ancestor.recipe.model_copy(update=update)
    game, name = ancestor.path.absolute().parts[-2:]
    results = ancestor.path.absolute().parents[2].with_name(extended_preset(recipe))
    path = shortened(results / "recipes" / game / name)
    return run_files(path, recipe, recipe_text(recipe))


def _is_begun(extension: RunFiles) -> bool:
    """Say whether the longer run is there, in its folder or set aside."""
    here = owner(extension.folder) == extension.fingerprint[:SHORT]
    return here or superseded(extension.folder, extension.fingerprint).exists()


def _check_whole(run: RunFiles) -> None:
    if is_whole(run.folder, run.fingerprint):
        return
    other = owner(run.folder)
    held, does = "", "finishes it"
    if other not in (None, run.fingerprint[:SHORT]):
        held = f"; its folder holds run {other}"
        does = "sets that one aside and trains this one from the start"
    raise RunIncomplete(
        f"{run.folder}: run {run.fingerprint[:SHORT]} is not trained to its end{held}. "
        f"`drama train {run.path}` {does}, and then it can be gone on with"
    )


# --- taking over ---------------------------------------------------------------------------------


def _take_over(ancestor: RunFiles, extension: RunFiles) -> None:
    """Make the longer run's folder out of the finished run's files, after checking every one.

    It is made beside its place and renamed when it is complete. Both folders are locked.
    """
    make_current(ancestor.folder, ancestor.fingerprint)
    verdict = verify(ancestor.record, torch.device("cpu"), play_again=False)
    if not verdict.holds:
        raise RunIncomplete(f"{ancestor.folder}: cannot be gone on with: {verdict.text}")
    listed = {artifact.path for artifact in read_record(ancestor.record).record.artifacts}
    if absent := sorted(name for name in listed if not (ancestor.folder / name).is_file()):
        raise RunIncomplete(
            f"{ancestor.folder}: cannot be gone on with, since {absent[0]} is not here; `dvc pull "
            f"train@{ancestor.recipe.game}-{ancestor.recipe.seed}` where DVC keeps it, or put back "
            "a copy"
        )
    folder = extension.folder
    staging = folder.with_name(f".{folder.name}.part")
    if staging.exists():
        shutil.rmtree(staging)
    for name in sorted(listed - {CHECKPOINT}):
        _link(ancestor.folder / name, staging / name)
    state = load_checkpoint(ancestor.folder / CHECKPOINT, ancestor.fingerprint)
    save_checkpoint(staging / CHECKPOINT, extension.fingerprint, state)
    _write_status(ancestor, extension, staging / STATUS)
    for place in {file.parent for file in staging.rglob("*")}:
        sync_folder(place)
    make_current(folder, extension.fingerprint)  # another run's files make way
    os.replace(staging, folder)
    sync_folder(folder.parent)
    say(f"{folder}: goes on from run {ancestor.fingerprint[:SHORT]}, {ancestor.folder}")


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be.

    No file of a run is ever written to, only replaced: what the longer run adds to its last shard
    does not reach the finished run's.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # it may be a link into DVC's cache
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _write_status(ancestor: RunFiles, extension: RunFiles, path: Path) -> None:
    """Write the status.json that says whose folder it is, with the time already spent."""
    record = read_record(ancestor.record).record
    if record.versions != versions():
        say(
            f"{ancestor.folder}: made with other library versions than are installed here, though "
            f"the lock file's are the same: {record.versions} there, {versions()} here"
        )
    total = extension.recipe.settings.training.total_steps
    earlier = Status.resumed(ancestor.folder / STATUS, ancestor.fingerprint, total)
    replace(
        earlier,
        fingerprint=extension.fingerprint,
        state="stopped",
        step=ancestor.recipe.settings.training.total_steps,
        wall_seconds=record.wall_seconds,
    ).write(path)


# --- recipes -------------------------------------------------------------------------------------


def _write_recipes(extension: RunFiles, settings: EvaluationSettings) -> None:
    """Write the longer run's recipes, and the plan of all runs that were extended as far."""
    text = recipe_text(extension.recipe)
    evaluation = evaluation_text(extension.fingerprint, settings, evaluation_code())
    recipes = extension.path.parents[1]
    with locked(recipes):  # others may be extended at the same time
        remove_leftovers(recipes)
        write_changed({extension.path: text, evaluation_recipe(extension.path): evaluation})
        preset = extended_preset(extension.recipe)
        plan = plan_text(preset, False, _planned(recipes), report_code())
        write_changed({recipes / "report.json": plan})


def _planned(recipes: Path) -> list[PlannedRun]:
    """Return the runs whose recipes are there, by game and seed."""
    found = [
        PlannedRun(
            recipes.parent,
            path.parent.name,
            int(seed),
            sha256_file(path),
            sha256_file(evaluation_recipe(path)),
        )
        for path in recipes.glob("*/seed*.json")
        if (seed := path.stem.removeprefix("seed")).isdecimal()
        and evaluation_recipe(path).is_file()
    ]
    return sorted(found, key=lambda run: (run.game, run.seed))
