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
9. `report`      scores, figures, one page
10. `artifacts`  what becomes of results: DVC, verification, status, the container's image
11. `jobs`       training and evaluating one run; `extensions`: going on with a finished one;
    `gpus`, `slurm`: where that happens
12. `cli`        the `drama` command

An inner package never imports an outer one.
"""

__version__ = "0.1.0"
