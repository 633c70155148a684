# Needs: a whole run.
# Makes: evaluation-<fingerprint>.parquet, one row per episode played with the final checkpoint.


rule evaluate:
    """Score one run over its evaluation episodes."""
    input:
        record=ancient(lambda wildcards: local(CAMPAIGN.record(run(wildcards)))),
    output:
        episodes=local(f"{RUN}/evaluation-{{fingerprint}}.parquet"),
    log:
        local(f"{LOG}/evaluate-{{fingerprint}}.log"),
    benchmark:
        local(f"{LOG}/evaluate-{{fingerprint}}.benchmark.tsv")
    wildcard_constraints:
        fingerprint=todays(run.evaluation for run in CAMPAIGN.runs.values()),
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
        "Evaluating {wildcards.game}, seed {wildcards.seed}; log: {log}"
    # exec: a request to stop reaches the command itself, and who waits for the shell waits for it.
    shell:
        "exec {params.drama} evaluate {params.recipe:q} --device {params.device}"
        " --backend {params.backend}{params.order} --threads {threads} >> {log:q} 2>&1"
