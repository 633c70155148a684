# Needs: whatever there is of the report, and the records of whole runs, at any time.
# Makes: nothing; shown() says what Snakemake's own report (`snakemake --report FILE`) shows.


report: "../report/workflow.rst"


RULES = workflow.current_basedir
SHOWN = {
    "report/index.html": ("Scores", "scores"),
    "report/scores.csv": ("Scores", "table"),
    "report/figures/[!lr]*.svg": ("Scores", "scores"),
    "report/figures/returns*.svg": ("Learning", "returns"),
    "report/figures/losses*.svg": ("Learning", "losses"),
    "runs/*/seed*/run-*.json": ("Runs", "run"),
}


def shown():
    """Return the files that `snakemake --report` shows, those that are there."""
    files = []
    for pattern, (category, caption) in SHOWN.items():
        text = RULES.join(f"../report/{caption}.rst")
        for file in sorted(CAMPAIGN.results.glob(pattern)):
            place = file.parts[-3] if category == "Runs" else None
            flagged = report(local(str(file)), text, category, subcategory=place)
            files.append(flagged)
    return files
