"""Training: the loop, the run that it trains and saves, updates, optimiser, CUDA graphs."""
