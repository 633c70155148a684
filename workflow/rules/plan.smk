# Needs: config/config.yaml (or --config experiment=FILE) and the presets in config/presets/.
# Makes: PLAN, all runs of the experiment with today's fingerprints. Their recipes are written as
#        this file is read, each only when its content changes, so that every call of Snakemake
#        starts from a validated configuration.
#        IMAGE, what jobs run in when Snakemake is asked for Apptainer.

import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

from drama.errors import ConfigurationError
from drama.pipeline import gpus
from drama.pipeline.artifacts.image import require_image, variant_for
from drama.pipeline.config import load_experiment
from drama.pipeline.recipes import plan

OVERRIDES = {key: value for key, value in config.items() if key != "experiment"}

CONTAINED = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method

try:
    FILE = Path(config.get("experiment", "config/config.yaml"))
    EXPERIMENT, PLAN = load_experiment(FILE, OVERRIDES), plan(FILE, OVERRIDES)
    IMAGE = str(require_image(variant_for(EXPERIMENT.device))) if CONTAINED else None
except ConfigurationError as error:
    print(error, file=sys.stderr)
    sys.exit(2)


container: IMAGE


RUN = f"{PLAN.results}/runs/{{game}}/seed{{seed}}"
LOG = f"{PLAN.results}/logs/{{game}}/seed{{seed}}"
# GPUs here; a job takes one when there is one. A cluster's profile says for itself what jobs take.
GPUS = gpus.count() if EXPERIMENT.device != "cpu" else 0
GPU = min(GPUS, 1)
HERE = workflow.is_main_process and workflow.resource_settings.nodes is None
if GPU and HERE and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", GPUS * EXPERIMENT.runs_per_gpu)
RUNS = {(run.game, str(run.seed)): run for run in PLAN.runs}


def todays(files):
    """Return a pattern for the fingerprints in the names of planned files, and for no others."""
    return "|".join(sorted({file.stem.split("-")[-1] for file in files}))


wildcard_constraints:
    game="[A-Za-z0-9]+",
    seed="[0-9]+",
