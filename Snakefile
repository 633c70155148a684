# Drama on Atari100k, from configuration to score report. Contents:
#
#   plan      config/*.yaml -> one recipe per game and seed, each with its fingerprint; frozen
#   train     recipe        -> run-<fingerprint>.json, written when the run is whole
#   evaluate  run           -> evaluation-<fingerprint>.parquet, one row per episode
#   report    all of them   -> scores, figures and one page
#   record    what is whole -> DVC, whenever Snakemake ends
#
# A result's file name holds the fingerprint of everything that defines the result, so a result is
# current when a file of today's name is there. File times play no part. All files are `local`: they
# lie where every job sees them, also where Snakemake would bring others to it from a store.

from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/plan.smk"
include: "workflow/rules/shown.smk"


localrules:
    all,
    report,


rule all:
    """Bring everything that config/config.yaml asks for up to date."""
    input:
        goals,
    message:
        "Everything is up to date"


include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/record.smk"
