"""Drama: a Mamba-2 world-model agent for Atari100k (arXiv 2410.08893), as a reproducible pipeline.

Reading order:

1. `settings`    what a run is made of; `config` reads and checks it
2. `env`         the game as the agent sees it
3. `replay`      what it remembers, and which parts of it are looked at
4. `model`       the world model: encoder, latent, Mamba-2, heads, losses
5. `behaviour`   actor and critic, learning in imagination
6. `training`    the loop that ties these together, optimisation, checkpoints
7. `evaluation`  the score of a finished run
8. `recipes`     one file per run that says everything about it; fingerprints
9. `history`     recorded recipes of earlier code, read by today's
10. `report`     scores, figures, one page
11. `artifacts`  what becomes of results: DVC, exported weights, verification, status, the image
12. `jobs`       training and evaluating one run; `extensions`: going on with a finished one;
    `gpus`, `slurm`: where that happens
13. `cli`        the `drama` command

An inner package never imports an outer one. For notebooks there is `drama.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from drama.artifacts.agents import LoadedRun

__version__ = "0.1.0"


def load(place: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Load a trained agent from a weights file, a run's folder or a recipe; see `LoadedRun`.

    `drama.load("results/laptop/runs/Pong/seed0").play(episodes=1)` plays an episode.

    Raises:
        DramaError: saying which file cannot be used, and what to do.
    """
    from drama.artifacts.agents import load as load_agent  # brings torch in, so only now

    return load_agent(place, device)
