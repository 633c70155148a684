# Needs: config/config.yaml (or --config experiment=FILE) and the presets in config/presets/.
# Makes: PLAN, all runs of the experiment with today's fingerprints. Their recipes are written as
#        this file is read, each only when its content changes, so that every call of Snakemake
#        starts from a validated configuration.

import shutil
import sys
from pathlib import Path

from drama.errors import ConfigurationError
from drama.recipes import plan


def listed(value):
    """Split what `--config games=Pong,Krull` or `seeds=0,1` gave into a list of names or numbers."""
    items = value if isinstance(value, list) else str(value).split(",")
    words = [str(item).strip() for item in items]
    return [int(word) if word.isdecimal() else word for word in words]


OVERRIDES = {
    key: listed(value) if key in ("games", "seeds") else value
    for key, value in config.items()
    if key != "experiment"
}

try:
    PLAN = plan(Path(config.get("experiment", "config/config.yaml")), OVERRIDES)
except ConfigurationError as error:
    print(error, file=sys.stderr)
    sys.exit(2)

RUN = f"{PLAN.results}/runs/{{game}}/seed{{seed}}"
LOG = f"{PLAN.results}/logs/{{game}}/seed{{seed}}"
# GPUs a job takes: how many jobs share what there is, a profile says.
GPU = int(PLAN.device != "cpu" and shutil.which("nvidia-smi") is not None)
RUNS = {(run.game, str(run.seed)): run for run in PLAN.runs}


def todays(files):
    """Return a pattern for the fingerprints in the names of planned files, and for no others."""
    return "|".join(sorted({file.stem.split("-")[-1] for file in files}))


wildcard_constraints:
    game="[A-Za-z0-9]+",
    seed="[0-9]+",
