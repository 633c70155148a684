"""Scores, figures and one page out of finished runs.

Reading order: `scores` (what was reached), `aggregates` (over games, and how sure that is),
`missing` (which planned runs have no score yet), `contents` (all of that together), `figures` (the
same to look at, in the style of `look`), `notes` (what to know about these runs), `page` (the
report's files); `words` writes numbers. Everything is read from the small files of each
run's folder; neither a checkpoint nor torch is needed.
"""

from drama.report.contents import Report
from drama.report.page import console_table, read_partial, read_returns, write_report
from drama.report.scores import ReportError

__all__ = ["Report", "ReportError", "console_table", "read_partial", "read_returns", "write_report"]
