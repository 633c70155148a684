# Needs: every run and evaluation of the plan.
# Makes: the report's pages, tables and figures; report-<fingerprint>.json, written last, says
#        which plan they show.


rule report:
    """Compare scores with people, random play and published methods."""
    input:
        records=ancient(local([run.record for run in PLAN.runs])),
        evaluations=ancient(local([run.evaluation for run in PLAN.runs])),
    output:
        local(PLAN.report),
    log:
        local(f"{PLAN.results}/logs/report.log"),
    benchmark:
        local(f"{PLAN.results}/logs/report.benchmark.tsv")
    message:
        "Writing the report; log: {log}"
    shell:
        "drama report {PLAN.results} > {log} 2>&1"
