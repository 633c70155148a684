"""evaluation.json: which evaluation of a run is today's, under a name that does not change.

An evaluation's own name holds its fingerprint. DVC, which knows files by name, and whoever wants
to check an evaluation's bytes need a fixed place to start from.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from drama.errors import DramaError
from drama.files import canonical_json, sha256_file, write_text

NOTE = "evaluation.json"


class EvaluationDamaged(DramaError):
    """An evaluation that cannot be read."""


def note_evaluation(evaluation: Path, fingerprint: str) -> None:
    """Write evaluation.json beside an evaluation, when its content changes.

    Args:
        evaluation: the evaluation's file.
        fingerprint: the evaluation's, in full.

    Raises:
        EvaluationDamaged: when the file cannot be read.
    """
    try:
        returns = pq.read_table(evaluation, columns=["episode_return"])["episode_return"]
    except (OSError, pa.ArrowException) as error:
        raise EvaluationDamaged(
            f"{evaluation}: cannot be read ({error}). Remove it, and the same command that wrote "
            "it writes it again"
        ) from None
    text = canonical_json(
        {
            "format": 1,
            "fingerprint": fingerprint,
            "path": evaluation.name,
            "sha256": sha256_file(evaluation),
            "episodes": len(returns),
            "mean_return": pc.mean(returns).as_py(),
        }
    )
    note = evaluation.with_name(NOTE)
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        write_text(note, text)
