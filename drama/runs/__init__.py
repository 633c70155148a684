"""How a run is kept."""
