# Needs: config/config.yaml (or --config experiment=FILE) and the presets in config/presets/; the
#        project's own where the working directory has none.
# Makes: CAMPAIGN, what this call makes: the runs, with today's fingerprints, and what they need.
#        When it begins, it is frozen in results/<preset>/campaigns/, and jobs read it there, so
#        that they do what was asked for whatever is edited while they wait. A call that only looks
#        (-n, --dag, ...) writes nothing.

import sys
from functools import cache
from pathlib import Path
from uuid import uuid4

from snakemake.settings.types import DeploymentMethod

from drama.errors import ConfigurationError
from drama.pipeline import gpus
from drama.pipeline.artifacts.image import (
    ImageMissing,
    current_image,
    hold_image,
    require_image,
    variant_for,
)
from drama.pipeline.campaign import new_campaign, read_campaign
from drama.pipeline.config import load_experiment, project_file

ROOT = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parents[1]
# Not where another Snakefile uses this one as a module, from here or from a repository elsewhere:
# jobs read that one then.
ALONE = Path(workflow.main_snakefile).resolve() == (ROOT / "Snakefile").resolve()
CONTAINED = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
MISSING = None
# What the call itself gives, whatever configuration it passes to this as a module.
GIVEN = workflow.config_settings.overwrite_config


def image(device):
    """Return the image that jobs run in when Snakemake is asked for Apptainer, there or not."""
    global MISSING
    variant = variant_for(device)
    try:
        require_image(variant)
    except ImageMissing as error:
        MISSING = error if CONTAINED else None
    except ConfigurationError:  # not in the project's root
        if CONTAINED:
            raise
        return None
    return str(current_image(variant))


try:
    if not workflow.is_main_process:
        CAMPAIGN = read_campaign(Path(GIVEN["campaign"]))
    else:
        FILE = project_file(Path(str(config.get("experiment", "config/config.yaml"))))
        OVERRIDES = {key: value for key, value in config.items() if key != "experiment"}
        IMAGE = image(load_experiment(FILE, OVERRIDES).device)
        CAMPAIGN = new_campaign(ROOT if ALONE else None, FILE, OVERRIDES, IMAGE)
except ConfigurationError as error:
    print(error, file=sys.stderr)
    sys.exit(2)


if MISSING and workflow.output_settings.dryrun:
    print(MISSING, file=sys.stderr)
if CONTAINED and workflow.is_main_process:
    workflow.deployment_settings.apptainer_args += CAMPAIGN.bind


container: CAMPAIGN.document.image


RUN = f"{CAMPAIGN.results}/runs/{{game}}/seed{{seed}}"
LOGS = f"{CAMPAIGN.results}/logs"
# Tells Snakemake that this call has written the report; of no use to any other call.
REPORTED = f".snakemake/reported-{uuid4().hex}-{{what}}"
LOG = f"{LOGS}/{{game}}/seed{{seed}}"
DEVICE, BACKEND = CAMPAIGN.document.device, CAMPAIGN.document.backend
ORDER = " --deterministic" if CAMPAIGN.document.deterministic else ""
# GPUs here; a job takes one when there is one. A cluster's profile says for itself what jobs take.
GPUS = gpus.count() if DEVICE != "cpu" else 0
GPU = min(GPUS, 1)
HERE = workflow.is_main_process and workflow.resource_settings.nodes is None
if GPU and HERE and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", GPUS * CAMPAIGN.runs_per_gpu)


@cache
def freeze():
    """Begin the campaign, and have jobs read it in place of the configuration."""
    try:
        if MISSING:
            raise MISSING
        if CONTAINED:
            hold_image(variant_for(DEVICE))
        CAMPAIGN.begin()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    settings = workflow.config_settings
    if ALONE:
        settings.configfiles, settings.config_args = [], []
    settings.config_args = [*settings.config_args, f'campaign="{CAMPAIGN.folder}"']


def executing():
    """Say whether this call is about to run jobs, and not only looks."""
    return workflow.executor_plugin and not workflow.dryrun


def begin():
    """Begin when this call is about to run jobs, before any is looked at."""
    if executing() and workflow.is_main_process:
        freeze()


def goals(wildcards):
    """Return what this call is to bring about."""
    begin()
    done = [REPORTED.format(what=what) for what in CAMPAIGN.reports]
    return [*local([*CAMPAIGN.made(), *done]), *([] if executing() else shown())]


def reported(wildcards):
    """Return what a report waits for."""
    everything = wildcards.what == "everything"
    return local(
        CAMPAIGN.made(CAMPAIGN.changed_games if everything else [wildcards.what])
    )


def run(wildcards):
    """Return the planned run of a job's wildcards."""
    begin()
    return CAMPAIGN.runs[wildcards.game, wildcards.seed]


def recipe(wildcards):
    """Return a run's frozen recipe."""
    return run(wildcards).recipe


def device(wildcards, resources):
    """Return the device that a job is to use: where a GPU was asked for, it must be there."""
    return "cuda" if resources.gpu and DEVICE != "cpu" else DEVICE


def todays(files):
    """Return a pattern for the fingerprints in the names of planned files, and for no others."""
    return "|".join(sorted({file.stem.split("-")[-1] for file in files}))


wildcard_constraints:
    game="[A-Za-z0-9]+",
    seed="[0-9]+",
