"""Says at the end of a session which faults struck, and how the sittings ended that they struck."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each kind of case that passed."""
    cases: dict[str, list[list[int]]] = {}
    for report in terminalreporter.getreports("passed"):
        said = dict(report.user_properties)
        if "kind" in said:
            cases.setdefault(str(said["kind"]), []).append(said["codes"])  # type: ignore[arg-type]
    for kind, sittings in cases.items():
        codes = Counter("killed" if code < 0 else code for case in sittings for code in case)
        ends = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items(), key=str))
        terminalreporter.write_line(f"{kind}: {len(sittings)} cases; sittings struck: {ends}")
