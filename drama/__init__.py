"""Drama: a Mamba-2 world-model agent for Atari100k (arXiv 2410.08893), as a reproducible pipeline.

Reading order, wing by wing; each imports only those before it:

1. `errors`, `reading`, `files`   errors for people; files read with care, and never seen half
2. `runs`      how a run is kept: its folder, checkpoint, replay shards, tables, progress
3. `agent`     what decides a result: `settings`, `shapes`, `env`, `replay`, `model`,
               `behaviour`, `training`, `evaluation`, in this order
4. `pipeline`  which runs, where: `layers`, `config`, `recipes` (fingerprints), `history`, `jobs`,
               `episodes`, `extensions`, `gpus`, `slurm`, and `artifacts`, what becomes of results
5. `report`    what is shown: scores, figures, one page
6. `options`, `cli`    what the `drama` command takes; what it calls

For notebooks there is `drama.load`.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from drama.pipeline.artifacts.agents import LoadedRun

__version__ = "0.2.0"


def _spare_threads() -> None:
    """Keep libraries from starting threads where the system allows no more.

    They would end the process or wait for ever. Each looks at its variable as it is loaded.
    """
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        one = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        os.environ |= dict.fromkeys(one, "1") | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}


_spare_threads()


def load(place: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load a trained agent from a weights file, a run's folder or a recipe; see `LoadedRun`.

    `drama.load("results/laptop/runs/Boxing/seed0").play(episodes=1)` plays an episode.

    Raises:
        DramaError: saying which file cannot be used, and what to do.
    """
    from drama.pipeline.artifacts.agents import load as load_agent  # brings torch in, so only now

    return load_agent(place, device)
