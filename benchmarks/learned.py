"""What `make learn` has just reached, beside what git keeps.

python benchmarks/learned.py build/learn-20261127-120000
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from drama.report import read_returns

KEPT = Path("results/learn")


def beside(fresh: Path, kept: Path = KEPT) -> pd.DataFrame:
    """Return mean returns, kept ones beside fresh ones: a row per preset and run in `fresh`.

    Raises:
        ReportError: a report that cannot be read; ConfigurationError: there is none.
    """
    rows = []
    for folder in sorted(fresh.iterdir()):
        known = {(game, seed): value for game, seed, value in read_returns(kept / folder.name)}
        for game, seed, value in read_returns(folder):
            rows.append((folder.name, game, seed, known[game, seed], value))
    return pd.DataFrame(rows, columns=["preset", "game", "seed", "in git", "fresh"])


if __name__ == "__main__":
    print(beside(Path(sys.argv[1])).to_string(index=False, float_format="{:.2f}".format))
