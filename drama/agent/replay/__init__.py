"""The replay memory: the ring (buffer), what is drawn (sampling), the ring as tensors (tensors)."""
