"""How the agent's parts grow: with sequence length, replay size, horizon, batch and run length."""
