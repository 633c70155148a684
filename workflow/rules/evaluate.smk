# Needs: a whole run.
# Makes: evaluation-<fingerprint>.parquet, one row per episode played with the final checkpoint.


rule evaluate:
    """Score one run over its evaluation episodes."""
    input:
        record=ancient(
            lambda wildcards: local(RUNS[wildcards.game, wildcards.seed].record)
        ),
    output:
        episodes=local(f"{RUN}/evaluation-{{fingerprint}}.parquet"),
    log:
        local(f"{LOG}/evaluate-{{fingerprint}}.log"),
    benchmark:
        local(f"{LOG}/evaluate-{{fingerprint}}.benchmark.tsv")
    wildcard_constraints:
        fingerprint=todays(run.evaluation for run in PLAN.runs),
    threads: 1
    resources:
        gpu=GPU,
    params:
        recipe=lambda wildcards: RUNS[wildcards.game, wildcards.seed].recipe,
    message:
        "Evaluating {wildcards.game}, seed {wildcards.seed}; log: {log}"
    # exec: a request to stop reaches the command itself, and who waits for the shell waits for it.
    shell:
        "exec drama evaluate {params.recipe} --device {EXPERIMENT.device} --backend {EXPERIMENT.backend}"
        " --threads {threads} >> {log} 2>&1"
