# Needs: a run's frozen recipe.
# Makes: run-<fingerprint>.json, the last file of a whole run.
#
# Nothing else is declared as output: Snakemake deletes declared outputs before a rerun and after
# a failure, and a stopped run goes on from its checkpoint and replay shards.

from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

if ExecutorPluginRegistry().is_installed("slurm"):
    from drama.pipeline import slurm

    slurm.use(CAMPAIGN, alone=ALONE)


rule train:
    """Train one run; a run that was stopped goes on where it was."""
    output:
        record=local(f"{RUN}/run-{{fingerprint}}.json"),
    log:
        local(f"{LOG}/train-{{fingerprint}}.log"),
    benchmark:
        local(f"{LOG}/train-{{fingerprint}}.benchmark.tsv")
    wildcard_constraints:
        fingerprint=todays(run.record for run in CAMPAIGN.runs.values()),
    threads: 1
    resources:
        gpu=GPU,
    params:
        drama=CAMPAIGN.command(),
        recipe=recipe,
        device=device,
        backend=BACKEND,
        order=ORDER,
    message:
        "Training {wildcards.game}, seed {wildcards.seed}; progress: {log}"
    # exec: a request to stop reaches the command itself, and who waits for the shell waits for it.
    shell:
        "exec {params.drama} train {params.recipe:q} --device {params.device}"
        " --backend {params.backend}{params.order} --threads {threads} >> {log:q} 2>&1"
