# Needs: the runs and evaluations that this call makes: all of them, or with `report_after: game`
#        also those of one game.
# Makes: the report's pages, tables and figures, of what there is by then. report-<fingerprint>.json
#        in the report's folder says that it shows the whole plan.
#
# Always where Snakemake itself runs, whose environment has the report's libraries: no image has.

import sys


rule report:
    """Compare scores with people, random play and published methods."""
    input:
        ancient(reported),
    output:
        local(touch(REPORTED)),
    log:
        local(f"{LOGS}/report-{{what}}.log"),
    wildcard_constraints:
        what="[A-Za-z0-9]+",
    # None by itself would look forgotten to --lint.
    container:
        lambda wildcards: None
    params:
        drama=CAMPAIGN.command(sys.executable),
        results=CAMPAIGN.results,
        plan=CAMPAIGN.recipes,
    message:
        "Writing the report after {wildcards.what}; log: {log}"
    shell:
        "{params.drama} report {params.results:q} --plan {params.plan:q} > {log:q} 2>&1"
