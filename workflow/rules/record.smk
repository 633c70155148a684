# Needs: whatever this call of Snakemake brought about, when it ends well and when it does not.
# Makes: dvc.lock's entries of whole runs, and their files in DVC's cache, ready for `dvc push`.

RECORD = (
    "drama record --if-kept {CAMPAIGN.results:q} >&2 || echo 'Not everything is recorded in DVC: "
    "the lines above say why. The results are where they were; give `drama record` when that is "
    "mended.' >&2"
)


def finish():
    """Record what is whole, and forget that a report was written."""
    shell(RECORD)
    for file in Path().glob(REPORTED.format(what="*")):
        file.unlink()


onsuccess:
    finish()


onerror:
    finish()
