"""The world model: distributions, networks, sequence models, losses."""
