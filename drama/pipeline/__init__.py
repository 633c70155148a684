"""Which runs, where."""
