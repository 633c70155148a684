"""Training: the loop, optimisation, checkpoints, what is logged."""
