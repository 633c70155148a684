"""What the agent remembers: the ring (buffer), which windows are looked at (sampling), the files
it is kept in (shards). NumPy and PyArrow only; tensors begin in the training loop."""
